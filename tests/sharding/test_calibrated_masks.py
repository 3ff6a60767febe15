"""Masks and refits by calibration of a model that is cut over ranks: those of one process."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.in_ranks import all_in_ranks
from helpers.sharded_jobs import Blocks, a_mesh, resets, shard, whole_logits
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import maskpro_kernels as mk
from maskpro_kernels.modules import masked_layers
from maskpro_kernels.prune import reconstruction
from maskpro_kernels.ranks import FailedRank
from maskpro_kernels.shards import whole


class Chain(nn.Module):
    """Blocks of which each takes what the one before gives, and a layer of the model's own after them."""

    def __init__(self, width: int = 16):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)) for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


FOUND = [
    {"init": "wanda"},
    {"init": "random", "seed": 3},
    {"init": "reconstruction"},
    {"init": "reconstruction", "refit": "scales"},
    {"init": "reconstruction", "refit": "weights"},
    {"init": "magnitude", "refit": "weights"},
]


def a_model(kind: str, world: int | None) -> tuple[nn.Module, list]:
    """(A model that nothing has converted, cut where there are ranks; its batches)."""
    model = Blocks() if kind == "rows" else Chain()
    if world is not None and kind == "chain in one":
        fully_shard(model, mesh=a_mesh([world]))
    elif world is not None:
        shard(model, [world])
    return model, list(torch.randn(3, 50, 16, generator=torch.Generator().manual_seed(1)))


@torch.no_grad()
def outputs(model: nn.Module, batches: list) -> torch.Tensor:
    """Of all batches, in float64."""
    return torch.cat([whole(model.eval()(x)).flatten() for x in batches]).double()


def found(rank: int, kind: str, cut_over: int | None, ways: list[dict]) -> list:
    """(Whole logits, whole weights, squared error of the outputs) of each way to convert it."""
    results = []
    for how in ways:
        model, batches = a_model(kind, cut_over)
        dense = outputs(model, batches)
        reported: list[tuple[int, int]] = []
        how = how | {
            "calibration": iter(batches),
            "gap": 2.0,
            "progress": lambda *counts, reported=reported: reported.append(counts),
        }
        mk.convert(model, "2:4", targets=["*"], **how)
        layers = masked_layers(model)
        done = [count for count, _ in reported]
        assert done == list(range(len(done))) and all(total == done[-1] for _, total in reported)
        assert (len(done) > len(layers)) == ("refit" in how or how["init"] == "reconstruction")
        assert all(layer.weight_changed == ("refit" in how) for layer in layers.values())
        weights = [whole(layer.weight.detach()).clone() for layer in layers.values()]
        error = float((outputs(model, batches) - dense).square().sum())
        results.append((whole_logits(model), weights, error))
    return results


def assert_found_as_by_one_process(kind: str, world: int, ways: list[dict]) -> None:
    alone = found(0, kind, None, ways)
    ranks = all_in_ranks(world, found, kind=kind, cut_over=world, ways=ways)
    for theirs in ranks:
        for how, one, other, of_first in zip(ways, theirs, alone, ranks[0], strict=True):
            assert_same_bits([*one[0], *one[1]], [*of_first[0], *of_first[1]])
            assert one[2] == pytest.approx(other[2], rel=0.03)
            if how != {"init": "reconstruction", "refit": "weights"}:
                assert_same_bits(one[0], other[0])
            if "refit" not in how:
                assert_same_bits(one[1], other[1])
            elif how["init"] == "magnitude":
                for weight, expected in zip(one[1], other[1], strict=True):
                    torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-3)


IN_SHORT = [{"init": "wanda"}, {"init": "reconstruction", "refit": "weights"}]


def test_rows_of_ranks_get_the_masks_of_one_process(eager_reference):
    assert_found_as_by_one_process("chain", 2, IN_SHORT)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "world"), [("rows", 4), ("chain", 2), ("chain in one", 2)])
def test_all_ways_give_the_masks_of_one_process(kind, world, eager_reference):
    assert_found_as_by_one_process(kind, world, FOUND)


def fail(rank: int) -> None:
    """Errors amid the layers of the second block, on all ranks and on one, and inside of a forward."""
    model, batches = a_model("chain", 2)
    before = [whole(parameter.detach()).clone() for parameter in model.parameters()]
    descend_rows, calls = reconstruction.descend_rows, []

    def fails(*operands, **how):
        calls.append(None)
        if len(calls) % 4 == 0 and (rank == 1 or len(calls) == 4):
            raise MemoryError("too large")
        return descend_rows(*operands, **how)

    def assert_unchanged() -> None:
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        assert_same_bits([whole(parameter.detach()) for parameter in model.parameters()], before)
        assert not any(isinstance(module, mk.MaskedLinear) for module in model.modules())

    reconstruction.descend_rows = fails
    with pytest.raises(MemoryError, match="too large"):
        mk.convert(model, "2:4", init="reconstruction", calibration=batches)
    assert_unchanged()
    with pytest.raises(MemoryError if rank == 1 else (ValueError, FailedRank), match="too large"):
        mk.convert(model, "2:4", init="reconstruction", calibration=batches)
    assert_unchanged()
    reconstruction.descend_rows = descend_rows
    with pytest.raises(RuntimeError, match="size of tensor"):
        mk.convert(model, "2:4", init="wanda", calibration=[*batches, torch.zeros(2, 3)])
    assert_unchanged()
    mk.convert(model, "2:4", init="reconstruction", calibration=batches)


def refuse(rank: int) -> None:
    """Differences between ranks, and layers without a code."""
    model, batches = a_model("chain", 2)
    reported = "^ranks: expected the settings of rank 0 on all of them, got other calibration on rank 1"
    for theirs in (batches[rank:], None if rank else batches, [torch.zeros(2 + rank, 16)]):
        with pytest.raises(ValueError, match=reported):
            mk.convert(model, "2:4", init="wanda", calibration=theirs)
    with pytest.raises(TypeError if rank else (ValueError, FailedRank), match="^calibration|calibration: expected"):
        mk.convert(model, "2:4", init="wanda", calibration=3 if rank else batches)
    for how in ({"init": "wanda"}, {"refit": "scales"}):
        with pytest.raises(ValueError, match="^calibration: expected batches for .*, got none"):
            mk.convert(model, "2:4", **how)
    mixed = Chain()
    fully_shard(mixed.blocks[0], mesh=a_mesh([2]))
    with pytest.raises(
        ValueError, match="^model: expected fully_shard to split all masked layers over one mesh or none, got Device"
    ):
        mk.convert(mixed, "2:4", init="wanda", calibration=batches)
    tied = Blocks()
    tied.blocks[1][1].weight = tied.blocks[0][1].weight
    fully_shard(tied, mesh=a_mesh([2]))
    with pytest.raises(
        ValueError, match="^model: expected another weight in each layer that .* blocks.0.1 and blocks.1"
    ):
        mk.convert(tied, "2:4", targets=["*"], init="wanda", calibration=batches)


@resets
def test_errors_change_nothing(eager_reference):
    all_in_ranks(2, fail)


def test_what_ranks_have_not_alike_is_refused(eager_reference):
    all_in_ranks(2, refuse)
