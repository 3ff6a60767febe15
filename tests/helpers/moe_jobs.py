"""A tiny Qwen-MoE, whole or shared out over ranks in several ways, and a run of it on each rank."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

import maskpro_kernels as mk
from helpers.rank_jobs import rank_trainer
from helpers.sharded_jobs import whole_logits
from maskpro_kernels.digests import digest
from maskpro_kernels.prune.convert import Conversion

EXPERTS = "model.layers.0.mlp.experts"
# Of the mesh that transformers makes, by how a model is cut; of the world as many as there are
PLANS = {"plan": {"tp_size": 2}, "fsdp": {"fsdp_size": 2}, "fsdp and plan": {"fsdp_size": 2, "tp_size": 2}}


def write_checkpoint(folder: Path, **others) -> str:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    # as large as what they give is told by a rounded loss
    experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.2}
    tokens = {"max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes | heads | experts | tokens | others)).save_pretrained(folder)
    return str(folder)


def of_transformers(path: str, rank: int, **sizes) -> torch.nn.Module:
    """As its own loader gives it to a rank."""
    world = torch.distributed.get_world_size()
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": 29500, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in told.items()})
    return AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(**sizes))


def shard_blocks(model: torch.nn.Module, mesh) -> None:
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole_or_cut(path: str, cut_by: str | None, rank: int) -> torch.nn.Module:
    """The model, or what a rank has of it by one of ``PLANS``."""
    return (
        of_transformers(path, rank, **PLANS[cut_by]) if cut_by in PLANS else AutoModelForCausalLM.from_pretrained(path)
    )


def converted(path: str, cut_by: str | None, rank: int, pattern: str = "2:4") -> tuple[torch.nn.Module, Conversion]:
    """(A model with masks, what ``convert`` has told).

    Args:
        cut_by: one of ``PLANS``; "fully_shard" behind ``convert``, on a mesh of four "copies and shards"; "data and
            plan" on one of four; None: whole.
    """
    model = whole_or_cut(path, cut_by, rank)
    if cut_by == "data and plan":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tp"))
        apply_tensor_parallelism(model, mesh["tp"], model._expand_parallel_plan(model.tp_plan))
    told = mk.convert(model, pattern, gap=2.0)
    if cut_by == "fully_shard":
        shard_blocks(model, init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    if cut_by == "copies and shards":
        shard_blocks(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "fsdp")))
    return model, told


def tokens() -> torch.Tensor:
    return torch.randint(2, 32, (4, 2, 12), generator=torch.Generator().manual_seed(3))


def language_loss(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch, use_cache=False).loss.float()


def rounded_loss(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """In steps of 1 / 256: the order of a sum does not tell, but where it crosses one."""
    return (256 * language_loss(model, batch)).round() / 256


def learn(
    rank: int,
    path: str,
    steps: int,
    cut_by: str | None = None,
    how: str = "reinforce",
    folder: str | None = None,
    save: str | None = None,
    accumulate: int = 2,
) -> dict:
    """A run, which goes on where its folder holds one, and what the finished model gives."""
    model, told = converted(path, cut_by, rank)
    loss = rounded_loss if how == "reinforce" else language_loss
    batches = [{"input_ids": ids, "labels": ids} for ids in tokens()]
    of = {"model": model, "batches": batches, "loss_fn": loss, "accumulate": accumulate, "output_dir": folder}
    trainer = rank_trainer(how, **of)
    if folder is not None and any(Path(folder).glob("snapshot-*")):
        trainer.resume()
    records = trainer.run(steps - trainer.steps_done, progress=False)
    trainer.close()
    logits = whole_logits(model)
    if save is not None:
        model.save_pretrained(f"{save}/masked")
    mk.finalize(model)
    if save is not None:
        model.save_pretrained(f"{save}/dense")
    batch = batches[0]["input_ids"]
    with torch.no_grad():
        outputs = model.eval()(batch, use_cache=False).logits
    # FSDP2 hooks to forward alone
    generates = cut_by in (None, "plan", "data and plan")
    text = model.generate(batch[:, :4], max_new_tokens=12, pad_token_id=0) if generates else None
    return {
        "converted": told.converted,
        "losses": [record.loss for record in records],
        "logits": logits,
        "digest": digest([*(mk.top_n_mask(one, "2:4") for one in logits), *logits]),
        "outputs": outputs,
        "tokens": text,
        "built": sorted(name for name, _ in model.named_parameters()),
    }
