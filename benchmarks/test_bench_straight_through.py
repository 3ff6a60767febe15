"""The straight-through update of a layer's logits from its inputs and the gradient of its outputs, under 2:4.

Set against the same formulas in eager torch: the gradient of the weight, its slope in the mask, the bounded step.
"""

from __future__ import annotations

import pytest
import torch
from harness import DEVICE, Work

import maskpro_kernels as mk
from maskpro_kernels import ops
from maskpro_kernels.functional.checks import counter_of
from maskpro_kernels.modules import initial_logits
from maskpro_kernels.ops import reference
from maskpro_kernels.ops.counter import MaskSource
from maskpro_kernels.ops.pattern import NMPattern

PATTERN = "2:4"
N = 2
M = 4
DTYPE = "bfloat16 operands, float32 logits"
SEED = 11
STEP = 3
LAYER = 5
GAP = 15.0
CURVATURE = 1.0
LARGEST = 2.0
# Small enough that thousands of timed updates leave the logits near where they were
RATE = 1e-6
SHAPES = [(4096, 4096), (11008, 4096)] if DEVICE == "cuda" else [(1536, 576)]
TOKENS = [128, 1024, 4096] if DEVICE == "cuda" else [1024]


class Layer:
    def __init__(self, shape: tuple[int, int], tokens: int):
        generator = torch.Generator(DEVICE).manual_seed(0)
        rows, k = shape
        self.x, self.grad, self.weight = (
            torch.randn(size, generator=generator, device=DEVICE).bfloat16()
            for size in ((tokens, k), (tokens, rows), shape)
        )
        self.logits = initial_logits(reference.top_n_mask(self.weight.abs().float(), n=N, m=M), PATTERN, GAP)
        self.counter = counter_of(self.logits, NMPattern(PATTERN), SEED, STEP, LAYER)
        self.rate = torch.tensor(RATE, device=DEVICE)

    def ours(self):
        mask = MaskSource(self.logits, "drawn", N, M, 1.0, counter=self.counter)
        return ops.straight_through_update_(self.grad, self.x, self.weight, CURVATURE, self.rate, LARGEST, mask)

    def eager(self):
        """Step by one torch operation after another; returns the mean square of the slope."""
        kept = mk.expand_mask(ops.sample_mask(self.logits, N, M, 1.0, self.counter), PATTERN)
        w = self.weight.float()
        first = (self.grad.T @ self.x).float()
        second = CURVATURE * torch.outer(self.grad.float().square().sum(0), self.x.float().square().sum(0))
        slope = (w * first + (0.5 - kept.float()) * w.square() * second).view(-1, M)
        slope = (slope - slope.mean(-1, keepdim=True)).view(w.shape)
        self.logits -= (self.rate * slope).clamp(-LARGEST, LARGEST)
        return slope.square().mean()

    def check(self):
        """Both move the logits alike, within the rounding of the products to bfloat16."""
        original = self.logits.clone()
        squares = []
        moved = []
        self.rate.fill_(1e-3)
        for update in (self.ours, self.eager):
            squares.append(update())
            moved.append(self.logits - original)
            self.logits.copy_(original)
        self.rate.fill_(RATE)
        torch.testing.assert_close(squares[0], squares[1], rtol=0.02, atol=0)
        scale = moved[1].square().mean().sqrt()
        assert (moved[0] - moved[1]).square().mean().sqrt() <= 0.02 * scale


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_straight_through_update(shape, tokens, compare):
    with torch.inference_mode():
        layer = Layer(shape, tokens)
        rows, k = shape
        # the logits are read and written, the weight and the operands read
        work = Work(bytes=10 * rows * k + 2 * tokens * (rows + k), flops=2 * tokens * rows * k)
        compare(
            layer.check,
            {"ours": layer.ours, "eager formulation": layer.eager},
            work=work,
            op="straight-through update",
            pattern=PATTERN,
            shape=(tokens, *shape),
            dtype=DTYPE,
        )
