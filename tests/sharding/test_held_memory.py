"""Memory of a rank while sharded layers learn: its share of weights and logits, and gathered weights."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from helpers.held_bytes import counting_held
from helpers.in_ranks import all_in_ranks
from helpers.rank_jobs import rank_trainer
from helpers.sharded_jobs import shard
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.modules import masked_layers
from maskpro_kernels.ops import dispatch
from maskpro_kernels.shards import local

WIDTH = 256
# Layers in a block
IN_BLOCK = 2


class Deep(nn.Module):
    """Equal blocks, whose layers take all of the memory but for some thousand bytes."""

    def __init__(self, blocks: int, dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for _ in range(IN_BLOCK)))
            for _ in range(blocks)
        )
        self.out = nn.Linear(WIDTH, 8, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


class Held(NamedTuple):
    """Bytes of a rank.

    Attributes:
        share: of weights and logits, its own rows of them.
        groups: how many its rows have.
        peak: most that it has held in two steps.
    """

    share: int
    groups: int
    peak: int


def hold(rank: int, mesh: list[int], how: str, blocks: int, dtype: torch.dtype) -> Held:
    # the formulas of the reference hold more than the code that users run
    dispatch.compiler_available = lambda: True
    model = Deep(blocks, dtype)
    mk.convert(model, "2:4", targets=["*"], gap=2.0, logits_dtype=dtype)
    shard(model, mesh)
    batches = [torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(place)).to(dtype) for place in range(4)]
    trainer = rank_trainer(how, model=model, batches=batches, loss_fn=loss_fn, accumulate=4)
    share = sum(local(parameter).nbytes for parameter in model.parameters())
    groups = sum(layer.own_logits.numel() // 4 for layer in masked_layers(model).values())
    with counting_held() as held:
        trainer.run(2, progress=False)
    trainer.close()
    return Held(share, groups, held.peak)


def loss_fn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).float().square().mean()


def beside(held: Held, how: str) -> int:
    """Bytes beside the share, the codes of masks, drawn and initial, and with straight-through a slope a weight."""
    return held.peak - held.share - 2 * held.groups - (16 * held.groups if how == "straight-through" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("how", ["reinforce", "straight-through"])
def test_a_rank_holds_its_share_and_two_blocks(how, dtype):
    layer = WIDTH * WIDTH * dtype.itemsize
    # gathered and sent: half of the values, and a bit for each
    two_blocks = 2 * IN_BLOCK * (layer + layer // 2 + WIDTH * WIDTH // 8)
    # of the largest layer, in float32, sent and received
    gradient = 2 * WIDTH * WIDTH * 4 if how == "straight-through" else 0
    # whatever the depth
    for blocks in (6, 12):
        whole = sum(parameter.nbytes for parameter in converted(blocks, dtype).parameters())
        for held in all_in_ranks(2, hold, mesh=[2], how=how, blocks=blocks, dtype=dtype):
            assert 2 * held.share == pytest.approx(whole, rel=0.001)
            assert 0 < beside(held, how) <= two_blocks + gradient, (beside(held, how) / layer, two_blocks / layer)


def converted(blocks: int, dtype: torch.dtype) -> nn.Module:
    model = Deep(blocks, dtype)
    mk.convert(model, "2:4", targets=["*"], gap=2.0, logits_dtype=dtype)
    return model
