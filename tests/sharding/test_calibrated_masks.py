"""Masks and refits by calibration of a model that is cut over ranks: those of one process."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.in_ranks import all_in_ranks
from helpers.sharded_jobs import Blocks, shard, whole_logits
from helpers.tensor_jobs import Exact, a_mesh, batches_of_whole_numbers, split
from sharding.test_plans_of_transformers import loaded, tokens, write_checkpoint
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import maskpro_kernels as mk
from maskpro_kernels.modules import masked_layers
from maskpro_kernels.pruning import reconstruction
from maskpro_kernels.shards import whole

FOUND = [
    {"init": "wanda"},
    {"init": "random", "seed": 3},
    {"init": "reconstruction"},
    {"init": "reconstruction", "refit": "scales"},
    {"init": "reconstruction", "refit": "weights"},
    {"init": "magnitude", "refit": "weights"},
]


def a_model(kind: str, world: int | None, rank: int, path: str | None) -> tuple[nn.Module, list]:
    """(A model that nothing has converted, cut where there are ranks; its batches)."""
    if kind == "rows":
        model, batches = Blocks(), list(torch.randn(3, 50, 16, generator=torch.Generator().manual_seed(1)))
        if world is not None:
            shard(model, [world])
    elif kind == "language model":
        model, batches = loaded(path, None if world is None else "fully_shard", rank, world), list(tokens())
    elif kind == "transformers' plan":
        model, batches = loaded(path, None if world is None else "plan", rank, world), list(tokens())
    else:
        model, batches = Exact(), batches_of_whole_numbers(24)
        if world is not None:
            mesh = a_mesh([world] if kind == "plan" else [2, world // 2])
            split(model, mesh)
            if kind == "both":
                fully_shard(model, mesh=mesh["fsdp"])
    return model, batches


@torch.no_grad()
def outputs(model: nn.Module, batches: list) -> torch.Tensor:
    """Of all batches, in float64."""
    model.eval()
    found = [getattr(model(x), "logits", None) if x.dtype == torch.int64 else model(x) for x in batches]
    return torch.cat([whole(y).flatten() for y in found]).double()


def found(rank: int, kind: str, cut_over: int | None, ways: list[dict], path: str | None = None) -> list:
    """(Whole logits, whole weights, squared error of the outputs) of each way to convert it."""
    results = []
    for how in ways:
        model, batches = a_model(kind, cut_over, rank, path)
        dense = outputs(model, batches)
        mk.convert(model, "2:4", targets=None if path else ["*"], calibration=iter(batches), gap=2.0, **how)
        layers = masked_layers(model)
        assert all(layer.weight_changed == ("refit" in how) for layer in layers.values())
        weights = [whole(layer.weight.detach()).clone() for layer in layers.values()]
        error = float((outputs(model, batches) - dense).square().sum())
        results.append((whole_logits(model), weights, error))
    return results


def assert_found_as_by_one_process(kind: str, world: int, ways: list[dict], path: str | None = None) -> None:
    alone = found(0, kind, None, ways, path)
    ranks = all_in_ranks(world, found, kind=kind, cut_over=world, ways=ways, path=path)
    for theirs in ranks:
        for how, one, other, of_first in zip(ways, theirs, alone, ranks[0], strict=True):
            assert_same_bits([*one[0], *one[1]], [*of_first[0], *of_first[1]])
            assert one[2] == pytest.approx(other[2], rel=0.03)
            if how.get("refit") != "weights":
                assert_same_bits(one[0], other[0])
            if "refit" not in how:
                assert_same_bits(one[1], other[1])


IN_SHORT = [{"init": "wanda"}, {"init": "reconstruction", "refit": "weights"}]


def test_rows_of_ranks_get_the_masks_of_one_process(eager_reference):
    assert_found_as_by_one_process("rows", 2, IN_SHORT)


def test_parts_of_a_plan_get_the_masks_of_one_process(eager_reference):
    assert_found_as_by_one_process("plan", 2, IN_SHORT)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "world"), [("rows", 2), ("rows", 3), ("plan", 2), ("both", 4)])
def test_all_ways_give_the_masks_of_one_process(kind, world, eager_reference):
    assert_found_as_by_one_process(kind, world, FOUND)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["language model", "transformers' plan"])
def test_language_models_get_the_masks_of_one_process(kind, eager_reference, tmp_path):
    assert_found_as_by_one_process(kind, 2, FOUND, write_checkpoint("llama", tmp_path))


def fail(rank: int) -> None:
    """An error amid the layers of the second block, and what the ranks don't have alike."""
    model, batches = a_model("rows", 2, rank, None)
    before = [whole(parameter.detach()).clone() for parameter in model.parameters()]
    descend_rows, calls = reconstruction.descend_rows, []

    def fails(*operands):
        calls.append(None)
        if len(calls) == 4:
            raise MemoryError("too large")
        return descend_rows(*operands)

    reconstruction.descend_rows = fails
    with pytest.raises(MemoryError, match="too large"):
        mk.convert(model, "2:4", init="reconstruction", calibration=batches)
    reconstruction.descend_rows = descend_rows
    with pytest.raises(ValueError, match="^ranks: expected what rank 0 has on all of them, got other calibration on r"):
        mk.convert(model, "2:4", init="wanda", calibration=batches[rank:])
    for how in ({"init": "wanda"}, {"refit": "scales"}):
        with pytest.raises(ValueError, match="^calibration: expected batches for .*, got none"):
            mk.convert(model, "2:4", **how)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert_same_bits([whole(parameter.detach()) for parameter in model.parameters()], before)
    assert not any(isinstance(module, mk.MaskedLinear) for module in model.modules())
    mk.convert(model, "2:4", init="reconstruction", calibration=batches)


def test_errors_leave_the_model_as_it_was(eager_reference):
    all_in_ranks(2, fail)
