"""Factors of a curvature as a GPU computes them."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.cases import cases
from helpers.compiled import DTYPES, misaligned
from helpers.curvature import CURVATURE, Curvature

from maskpro_kernels import ops
from maskpro_kernels.ops.triton import curvature
from maskpro_kernels.ops.triton.launch import launch_blocks
from maskpro_kernels.ops.triton.tiles import gradient_rows

pytestmark = pytest.mark.compiled

TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
GIVEN = ("", "tokens", "row_squares", "tokens row_squares")
# Sizes that no block divides, multiples of 16, and several blocks of each kind
SIZES = [(5, 37, 41), (32, 48, 64), (300, 2100, 33)]
CHOSEN = (("sm_80", SIZES[0], torch.bfloat16, ""), ("sm_90", SIZES[1], torch.float32, "tokens row_squares"))


@pytest.mark.parametrize(
    ("target", "sizes", "dtype", "given"),
    cases(itertools.product(TARGETS, SIZES, DTYPES, GIVEN), slow=lambda *case: case not in CHOSEN),
    ids=str,
)
def test_factors(target, sizes, dtype, given, compiled_for, launched):
    compiled_for(target)
    Curvature(*sizes, dtype=dtype, given=given).assert_right()
    assert launched == {"gradient_squares": 1, "curvature_factors": 1}


@pytest.mark.parametrize(
    ("target", "given", "without", "value"),
    cases(
        itertools.product(TARGETS, GIVEN, ("none", "all"), (0.0, math.inf, math.nan)),
        slow=lambda target, given, without, value: (target, given, without) != ("sm_80", "", "none") or not value,
    ),
)
def test_rows_without_a_gradient_and_values_that_are_not_finite(target, given, without, value, compiled_for):
    compiled_for(target)
    Curvature(tokens=9, given=given, without=without, not_finite=value).assert_right()


@pytest.mark.parametrize(("target", "tokens"), cases(itertools.product(TARGETS, (1000, 4500)), slow=lambda *case: True))
def test_many_tokens(target, tokens, compiled_for):
    """Programs with several of them, and more than are scanned at a time."""
    compiled_for(target)
    Curvature(tokens=tokens).assert_right()


@pytest.mark.parametrize(
    ("target", "dtype", "by"),
    cases(itertools.product(TARGETS, DTYPES, (1, 2, 3)), slow=lambda *case: case != ("sm_90", torch.bfloat16, 1)),
    ids=str,
)
def test_odd_addresses(target, dtype, by, compiled_for):
    compiled_for(target)
    for given in ("", "row_squares"):
        problem = Curvature(tokens=17, rows=48, columns=64, dtype=dtype, given=given)
        problem.assert_right(functools.partial(misaligned, by=by))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_gradients_of_more_than_2_to_31_elements(target, compiled_for, emulator):
    """The last program of many tokens."""
    compiled_for(target)
    tokens, rows = (1 << 20) + 3, 2064
    assert tokens * rows > 1 << 31
    config = gradient_rows(tokens, target)
    parts = -(-tokens // config.rows)
    last = tokens - (parts - 1) * config.rows
    near, *_ = Curvature(tokens=last, rows=rows, without="none").operands()
    grad = torch.empty(tokens, rows, dtype=near.dtype)
    grad[-last:] = near
    token_squares, partial = torch.empty(tokens), torch.empty(parts, rows)
    emulator.last = 1
    launch_blocks(curvature.gradient_squares_kernel, "gradient_squares", parts, config, grad.device,
                  grad, token_squares, partial, tokens, rows)  # fmt: skip
    squares = near.double().square()
    torch.testing.assert_close(token_squares[-last:], squares.sum(1).float(), rtol=2e-6, atol=0)
    torch.testing.assert_close(partial[-1], squares.sum(0).float(), rtol=2e-6, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_activations_of_more_than_2_to_31_elements(target, compiled_for, emulator, monkeypatch):
    """The last columns of many; the gradient is small, and one program squares it."""
    compiled_for(target)
    monkeypatch.setattr(curvature, "gradient_rows", lambda *_: gradient_rows(1 << 20, target))
    problem = Curvature(tokens=20, rows=24, columns=41)
    grad, near, *_ = problem.operands()
    columns = (1 << 27) + 41
    assert len(grad) * columns > 1 << 31
    x = torch.empty(len(grad), columns, dtype=near.dtype)
    x[:, -41:] = near
    # one program for all rows of the weight, and those of the last columns
    emulator.last = 3
    found = ops.curvature_factors(grad, x, CURVATURE, None, None)
    expected = problem.exact()
    torch.testing.assert_close(found[0], expected[0].float(), rtol=2e-6, atol=0)
    torch.testing.assert_close(found[1][-41:], expected[1].float(), rtol=2e-6, atol=0)


def test_bits_repeat(compiled_for):
    compiled_for("sm_90")
    problem = Curvature(tokens=300, rows=48, columns=64)
    assert_same_bits(*(list(ops.curvature_factors(*problem.operands())) for _ in range(2)))
