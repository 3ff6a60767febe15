"""Kernels of the factors of a curvature, beside the formula in float64 and the reference."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.curvature import CURVATURE, Curvature
from helpers.enumerated import KERNEL_DEVICE
from helpers.products import DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st

from maskpro_kernels import ops
from maskpro_kernels.ops import reference
from maskpro_kernels.ops.triton import curvature, tiles
from maskpro_kernels.ops.triton.tiles import Rows

GIVEN = ("", "tokens", "row_squares", "tokens row_squares")


@settings(max_examples=40)
@given(
    st.builds(
        Curvature,
        tokens=st.integers(0, 90),
        rows=st.integers(0, 70),
        columns=st.integers(0, 70),
        dtype=st.sampled_from(DTYPES),
        given=st.sampled_from(GIVEN),
        without=st.sampled_from(["none", "some", "all"]),
        not_finite=st.sampled_from([0.0, math.inf, -math.inf, math.nan]),
    ),
    st.sampled_from([(64, 2048), (1, 16), (4, 64), (32, 32)]),
    st.sampled_from([(256, 32), (16, 16), (8, 64)]),
    st.sampled_from([16, 4096]),
)
def test_factors_are_those_of_the_formula_and_of_the_reference(problem, squares, factors, scan):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(curvature, "gradient_rows", lambda *_: Rows(*squares))
        patched.setattr(curvature, "FACTORS", Rows(*factors))
        patched.setattr(curvature, "SCAN", scan)
        problem.assert_right()
        found = ops.curvature_factors(*problem.operands())
    expected = reference.curvature_factors(*(part.cpu() if isinstance(part, torch.Tensor) else part
                                             for part in problem.operands()))  # fmt: skip
    for factor, by_torch in zip(found, expected, strict=True):
        torch.testing.assert_close(factor.cpu(), by_torch, rtol=2e-6, atol=1e-30, equal_nan=True)


def test_two_launches_make_both_factors(launched):
    problem = Curvature(tokens=200)
    first = ops.curvature_factors(*problem.operands())
    assert launched == {"gradient_squares": 1, "curvature_factors": 1}
    assert_same_bits(list(first), list(ops.curvature_factors(*problem.operands())))


def test_a_count_of_tokens_may_be_on_the_cpu():
    grad, x, *_ = Curvature().operands()
    count = torch.tensor(5.0)
    found, expected = (ops.curvature_factors(grad, x, CURVATURE, c, None) for c in (count, count.to(KERNEL_DEVICE)))
    assert_same_bits(list(found), list(expected))


def test_programs_of_a_gradient_leave_no_processor_idle(monkeypatch):
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    for target, row in tiles.TARGETS.items():
        for tokens in (1, 16, 100, 131, 132, 1000, 2048, 16_384, 100_000):
            config = tiles.gradient_rows(tokens, target)
            assert -(-tokens // config.rows) >= min(tokens, row.processors)
            # a thread has at most 32 elements, and partial sums are few
            assert config.rows * config.block <= 32 * 32 * config.num_warps
            assert -(-tokens // config.rows) <= max(2 * row.processors + 1, tokens // tiles.MOST_ROWS + 1)


@pytest.mark.parametrize("of", GIVEN)
def test_opcheck(of):
    torch.library.opcheck(torch.ops.maskpro.curvature_factors.default, Curvature(given=of).operands())
