"""The slope of a loss in the mask, and the step along it: what they mean, and the bits of the compiled loops."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.products import DTYPES, PATTERNS, mask_of
from helpers.slopes import CURVATURE, slope_operands

from maskpro_kernels.functional.checks import counter_of
from maskpro_kernels.ops import reference
from maskpro_kernels.ops.cpu import kernels


@pytest.mark.parametrize("m", [2, 4, 8])
def test_a_slope_is_what_dropping_and_keeping_cost(m):
    """Of a loss whose derivatives those are: exactly, were it not for the mean of the group."""
    generator = torch.Generator().manual_seed(0)
    weight, grad, square = torch.randn(3, 5, m, generator=generator).abs().unbind(0)
    kept = torch.rand(5, m, generator=generator) < 0.5

    def loss_change(mask):
        step = (mask.double() - kept.double()) * weight
        return grad * step + square * step.square() / 2

    cost_of_keeping = loss_change(torch.ones(5, m)) - loss_change(torch.zeros(5, m))
    codes = sum(kept[:, i].to(torch.uint8) << i for i in range(m))
    found = reference.group_mask_slope(weight, grad, square, codes)
    expected = cost_of_keeping - cost_of_keeping.mean(1, keepdim=True)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("pattern", "logits_dtype"),
    [
        pytest.param(p, d, marks=[pytest.mark.slow] if str(p) != "2:4" else [], id=f"{p}-{d}")
        for p in PATTERNS
        for d in DTYPES
    ],
)
def test_the_compiled_reference_steps_to_the_same_bits(pattern, logits_dtype, monkeypatch):
    grad, x, weight, logits = (
        t.cpu() for t in slope_operands(pattern, rows=40, dtype=torch.bfloat16, logits=logits_dtype)
    )
    # three pieces of rows
    monkeypatch.setattr(kernels, "COPIED_BYTES", 16 * 4 * logits.shape[1])
    codes, _ = mask_of("drawn", logits, pattern)
    first = (grad.T @ x).contiguous()
    factors = CURVATURE * grad.float().square().sum(0), x.float().square().sum(0)
    square = torch.outer(*factors)
    place = {"layer": 3, "group_offset": 2, "group_row_stride": logits.shape[1]}
    counter = counter_of(logits, pattern, seed=5, step=6, **place)
    step = torch.tensor(1e-3), 0.75, pattern.m, counter
    ours, eager = logits.clone(), logits.clone()
    values = [
        module.descend_by_slope_(into, weight, first, factors, codes, *step)
        for module, into in ((kernels, ours), (reference, eager))
    ]
    assert torch.equal(ours, eager) and not torch.equal(ours, logits)
    torch.testing.assert_close(*values, rtol=1e-5, atol=0)
    slopes = [module.mask_slope(weight, first, square, codes, pattern.m) for module in (kernels, reference)]
    assert_same_bits(*slopes)
    apart = logits.clone()
    kernels.descend_(apart, slopes[0], *step)
    assert_same_bits(apart, eager)
