"""How many graphs ``torch.compile`` makes of a masked model: layer ids, draws and steps are in none of them."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import assert_same_bits
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import maskpro_kernels as mk

BLOCKS, WIDTH, TOKENS = 12, 16, 3


class Block(nn.Module):
    """A residual block of two layers."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


@pytest.fixture
def compiled():
    """(a converted model of equal blocks, each compiled by itself; the counter of graphs)."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(*[Block() for _ in range(BLOCKS)])
    mk.convert(model, "2:4", gap=1.0)
    graphs = CompileCounter()
    for block in model:
        block.compile(backend=graphs, fullgraph=True)
    yield model, graphs
    torch._dynamo.reset()


@torch.no_grad()
def eager(model: nn.Sequential, x: Tensor) -> Tensor:
    for block in model:
        x = block.forward(x)
    return x


def test_equal_blocks_share_one_graph(compiled, eager_reference):
    model, graphs = compiled
    x = torch.randn(TOKENS, WIDTH)
    with torch.no_grad():
        assert_same_bits(model(x), eager(model, x))
    assert graphs.frame_count == 1


def test_all_draws_and_steps_share_one_graph(compiled, eager_reference):
    model, graphs = compiled
    x, seen = torch.randn(TOKENS, WIDTH), []
    for _ in range(2):
        for draw in range(4):
            model[0].up.counter_state.draw.fill_(draw)
            with torch.no_grad():
                seen.append(model(x))
                assert_same_bits(seen[-1], eager(model, x))
        mk.advance(model)
    assert graphs.frame_count == 1
    assert all(not torch.equal(one, other) for i, one in enumerate(seen) for other in seen[:i])


def test_a_function_of_several_draws_is_one_graph(eager_reference):
    torch._dynamo.reset()
    graphs = CompileCounter()
    logits, layer = torch.randn(4, WIDTH), torch.tensor(5)

    @torch.compile(backend=graphs, fullgraph=True)
    def drawn(draw: Tensor) -> Tensor:
        return mk.sample_mask(logits, "2:4", seed=3, layer=layer, draw=draw)

    for draw in range(4):
        expected = mk.sample_mask(logits, "2:4", seed=3, layer=5, draw=draw)
        assert_same_bits(drawn(torch.tensor(draw)), expected)
    assert graphs.frame_count == 1
