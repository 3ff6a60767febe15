"""Models that are sharded in a way that has no code, and what sharded ones cannot do: one line each, by name."""

from __future__ import annotations

from unittest import mock

import torch
import torch.distributed as dist
from helpers.in_ranks import all_in_ranks
from helpers.moe_jobs import a_mixture
from helpers.rank_jobs import rank_trainer
from helpers.refusals import assert_lines, lines_of
from helpers.sharded_jobs import Blocks, a_mesh, a_sharded_model, logits_of, shard
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import maskpro_kernels as mk
from maskpro_kernels.modules import masked_layers

OTHERS = (
    "model: tensor parallel and other DTensors than those of fully_shard are not supported; use FSDP2 (fully_shard)"
)
ROWS = "model: expected a weight that fully_shard has split into rows"
NAN = "model: expected finite logits, got NaN or infinity in out"
CUT = "got blocks.0.1, which fully_shard has split"


def converted(pattern: str = "2:4", targets: tuple[str, ...] = ("*",)) -> Blocks:
    model = Blocks()
    mk.convert(model, pattern, targets=targets, gap=2.0)
    return model


def sharded_by(pattern: str = "2:4", targets: tuple[str, ...] = ("*",), **how) -> mk.MaskTrainer:
    model = converted(pattern, targets)
    fully_shard(model, **{"mesh": a_mesh([2]), "ignored_params": logits_of(model)} | how)
    return trained(model)


def columns(parameter: nn.Parameter) -> Shard:
    return Shard(parameter.dim() - 1)


def placed_by_hand(weight, logits=None) -> mk.MaskTrainer:
    model, mesh = converted(), a_mesh([2])
    for layer in masked_layers(model).values():
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [weight]), requires_grad=False)
        if logits is not None:
            layer.logits = nn.Parameter(distribute_tensor(layer.logits.detach(), mesh, [logits]))
    return trained(model)


def cut_by_a_plan() -> None:
    model = Blocks()
    parallelize_module(model, a_mesh([2]), {"blocks.*.1": ColwiseParallel(), "blocks.*.3": RowwiseParallel()})
    before = dict(model.named_modules())
    try:
        mk.convert(model, "2:4", targets=["*"])
    finally:
        assert dict(model.named_modules()) == before


def cut_by_a_plan_and_fully_shard() -> None:
    model, mesh = Blocks(), init_device_mesh("cpu", (2, 1), mesh_dim_names=("fsdp", "tp"))
    parallelize_module(model, mesh["tp"], {"blocks.*.1": ColwiseParallel(), "blocks.*.3": RowwiseParallel()})
    fully_shard(model, mesh=mesh["fsdp"])
    mk.convert(model, "2:4", targets=["blocks.0.1"])


def cut(model: nn.Module) -> nn.Module:
    for block in model.model.layers:
        fully_shard(block, mesh=a_mesh([2]), ignored_params=logits_of(model))
    return model


def converted_experts_after() -> None:
    mk.convert(cut(a_mixture()), "2:4", targets=["*.experts.*"])


def finished_experts() -> None:
    model = a_mixture()
    mk.convert(model, "2:4", gap=2.0)
    mk.finalize(cut(model))


def sharded_in_part() -> mk.MaskTrainer:
    model = converted()
    fully_shard(model.blocks[0], mesh=a_mesh([2]), ignored_params=logits_of(model))
    return trained(model)


def on_the_meta_device() -> mk.MaskTrainer:
    model = converted().to("meta")
    shard(model, [2])
    return trained(model)


def with_other_layers_on_rank_1() -> None:
    model = converted(targets=("*",) if dist.get_rank() == 0 else ("blocks.*",))
    shard(model, [2])
    trained(model).begin()


def with_nan_on_rank_1() -> None:
    model = a_sharded_model([2])
    if dist.get_rank() == 1:
        masked_layers(model)["out"].own_logits.detach().fill_(torch.nan)
    trained(model).begin()


def converted_after(**how) -> None:
    model = Blocks()
    shard(model, [2])
    mk.convert(model, "2:4", targets=["*"], **how)


def in_flat_parameters() -> mk.MaskTrainer:
    return trained(FullyShardedDataParallel(converted(), device_id=torch.device("cpu"), use_orig_params=True))


def finished_around_a_layer_itself() -> None:
    model = converted()
    fully_shard(model.out, mesh=a_mesh([2]), ignored_params=logits_of(model))
    shard(model, [2])
    before = dict(model.named_modules())
    try:
        mk.finalize(model)
    finally:
        assert dict(model.named_modules()) == before


def with_logits_that_fully_shard_has_split() -> mk.MaskTrainer:
    model = converted()
    shard(model, [2], ignored_params=None)
    return trained(model)


def offloaded_by_fully_shard() -> None:
    """With a CPUOffloadPolicy on a GPU the mesh is on another device than the shards."""
    model = converted()
    shard(model, [2], offload_policy=CPUOffloadPolicy(pin_memory=False))
    with mock.patch.object(DeviceMesh, "device_type", "cuda"):
        masked_layers(model)


def with_rows_that_ranks_cannot_share_equally() -> None:
    model = Blocks(outputs=3)
    mk.convert(model, "2:4", targets=["out"])
    shard(model, [2])
    masked_layers(model)


def trained(model: nn.Module, **how) -> mk.MaskTrainer:
    return rank_trainer(model=model, accumulate=2, **how)


# what is refused, and how the line begins
REFUSED = {
    "split logits": (
        with_logits_that_fully_shard_has_split,
        "model: expected whole logits, which fully_shard ignores, got split ones in blocks.0.1; call it with "
        "ignored_params={layer.logits for layer in masked_layers(model).values()}",
    ),
    "flat parameters": (in_flat_parameters, "model: expected plain parameters or those of fully_shard, got the"),
    "placed by hand": (lambda: placed_by_hand(Shard(0), Shard(0)), f"{OTHERS}; got (Shard(dim=0),) in blocks.0.1"),
    "a plan": (cut_by_a_plan, f"{OTHERS}; got (Shard(dim=0),) in blocks.0.1"),
    "a plan and fully_shard": (cut_by_a_plan_and_fully_shard, f"{OTHERS}; got (Shard(dim=0), Shard(dim=0)) in "),
    "experts that are cut": (converted_experts_after, "targets: expected each to match an nn.Linear, '*.experts.*'"),
    "finished experts": (
        finished_experts,
        "model: expected whole layers, got model.layers.0.mlp.experts.linears.gate_proj.0, which fully_shard has "
        "split: model.layers.0.mlp.experts, which convert unfused, can only be fused from whole layers",
    ),
    "columns": (lambda: sharded_by(shard_placement_fn=columns), f"{ROWS}, got (Shard(dim=1),) in blocks.0.1"),
    "an odd number of rows": (
        with_rows_that_ranks_cannot_share_equally,
        f"{ROWS}, the same number for each rank, got 3 over 2 ranks in out",
    ),
    "fewer ranks": (
        lambda: sharded_by(mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("apart", "fsdp"))["fsdp"]),
        f"{ROWS}, over all ranks, got a mesh of 1 of 2 in blocks.0.1",
    ),
    "ranks in another order": (
        lambda: sharded_by(mesh=DeviceMesh("cpu", [1, 0])),
        f"{ROWS}, over ranks in rising order, got a mesh of [1, 0] in blocks.0.1",
    ),
    "ranks that are not alike": (
        with_other_layers_on_rank_1,
        "ranks: expected the settings of rank 0 on all of them, got other out on rank 1",
    ),
    "logits of one rank": (with_nan_on_rank_1, NAN),
    "a part of the model": (
        sharded_in_part,
        "model: expected fully_shard to split all masked layers over one mesh or none, got DeviceMesh(",
    ),
    "meta": (on_the_meta_device, "model: expected weights and logits in memory, got some on meta in blocks.0.1"),
    "offloaded": (
        offloaded_by_fully_shard,
        "model: expected shards that stay on their device, got some offloaded to cpu in blocks.0.1",
    ),
    "an initial mask": (
        lambda: converted_after(init="sparsegpt", calibration=[torch.randn(4, 16)]),
        "init: expected one of magnitude, random, wanda, reconstruction, or group codes in a model that is "
        "cut over ranks, got 'sparsegpt'; convert it before fully_shard",
    ),
    "calibration": (lambda: converted_after(init="wanda"), 'calibration: expected batches for init="wanda", got none'),
    "refit": (lambda: converted_after(refit="weights"), 'calibration: expected batches for refit="weights", got none'),
    "weights that learn": (
        lambda: trained(a_sharded_model([2]), how="trained weights").begin(),
        f"model: expected whole layers, {CUT}: only whole weights can learn",
    ),
    "an optimizer": (
        lambda: mk.MaskOptimizer(a_sharded_model([2])),
        "model: expected plain tensors as weights, got a DTensor in blocks.0.1",
    ),
    "dense forwards": (
        lambda: mk.dense(a_sharded_model([2])).__enter__(),
        f"model: expected whole layers, {CUT}: ranks exchange kept values alone",
    ),
    "a layer itself": (
        finished_around_a_layer_itself,
        "model: expected fully_shard around a module that contains masked layers, got one around out itself",
    ),
    "packing": (
        lambda: mk.finalize(a_sharded_model([2]), to="packed"),
        f"model: expected whole layers, {CUT}: save a dense checkpoint",
    ),
}


def refuse_all(rank: int) -> dict[str, str]:
    return lines_of(REFUSED)


def test_what_has_no_code_is_refused_by_name():
    for reported in all_in_ranks(2, refuse_all):
        assert_lines(reported, REFUSED)
