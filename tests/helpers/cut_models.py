"""A tiny LLaMA or Qwen3 on disk, and what a rank has of it, cut by a plan, by fully_shard, or by both."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.distributed import DistributedConfig

from helpers.sharded_jobs import a_mesh
from helpers.tiny_llama import tiny_model


def write_checkpoint(name: str, folder: Path) -> str:
    if name == "llama":
        model = tiny_model(num_key_value_heads=2, tie_word_embeddings=False)
    else:
        torch.manual_seed(0)
        sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        others = {"max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None}
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, **others, tie_word_embeddings=False))
    model.save_pretrained(folder / name)
    return str(folder / name)


def loaded(path: str, cut_by: str | None, rank: int, world: int = 2) -> torch.nn.Module:
    """As it is, or cut over the ranks by "plan" or "fully_shard", or over four by "both"."""
    if cut_by not in ("plan", "both"):
        model = AutoModelForCausalLM.from_pretrained(path)
        for block in model.model.layers if cut_by else ():
            fully_shard(block, mesh=a_mesh([world]))
        return model if cut_by is None else fully_shard(model, mesh=a_mesh([world]))
    how = {"tp_size": 2, "fsdp_size": 2} if cut_by == "both" else {"tp_size": world}
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": math.prod(how.values()), "MASTER_PORT": 29500}
    os.environ.update({name: str(value) for name, value in told.items()}, MASTER_ADDR="127.0.0.1")
    return AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(**how))


def tokens() -> torch.Tensor:
    return torch.randint(2, 32, (4, 2, 12), generator=torch.Generator().manual_seed(3))
