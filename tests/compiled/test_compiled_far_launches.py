"""Launches whose last program lies beyond 2^31 elements: memory that nobody touches costs nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.compiled import OVER_GROUPS, Matrix
from helpers.products import normal
from helpers.routes import take_route

from maskpro_kernels import ops
from maskpro_kernels.ops import reference
from maskpro_kernels.ops.pattern import bitmask_of
from maskpro_kernels.ops.triton import masked_gemm, packed_gemm, slopes, tiles
from maskpro_kernels.ops.triton.tiles import PACKED_ROWS, tiles_of

pytestmark = [pytest.mark.compiled, pytest.mark.slow]

# Of the last of so many rows
LAST, ALL_ROWS, GROUPS = 19, (1 << 21) + 3, 272
TARGETS = ["sm_80", "sm_90"]
NEAR = Matrix(2, 4, torch.bfloat16, LAST, GROUPS, spread="open")
FAR = replace(NEAR, before=(ALL_ROWS - LAST) * GROUPS)
assert ALL_ROWS * GROUPS * NEAR.m > 1 << 31


def far(tensor: torch.Tensor) -> torch.Tensor:
    """The rows of a matrix as the last ones of a large one; a tensor without rows stays unchanged."""
    if tensor.dim() < 2 or len(tensor) != LAST:
        return tensor
    whole = torch.empty(ALL_ROWS, *tensor.shape[1:], dtype=tensor.dtype)
    whole[-LAST:] = tensor
    return whole


def one_hot(tokens: int, columns: int) -> torch.Tensor:
    return torch.eye(columns)[(torch.arange(tokens) * 67 + 5) % columns].bfloat16()


@pytest.mark.parametrize("kernel", OVER_GROUPS)
@pytest.mark.parametrize("target", [*TARGETS, "gfx942"])
def test_kernels_over_groups(target, kernel, compiled_for, emulator, monkeypatch):
    compiled_for(target)
    # one block a program
    monkeypatch.setattr(tiles, "PROGRAMS_A_PROCESSOR", ALL_ROWS * GROUPS)
    block = tiles.configuration(kernel, NEAR.m, NEAR.groups, target).block
    each = NEAR.groups * (NEAR.m if kernel == "adamw" else 1)
    emulator.last = LAST * each // block - 1
    found = OVER_GROUPS[kernel](FAR, far)
    take_route(monkeypatch, "eager")
    expected = OVER_GROUPS[kernel](NEAR)
    # which those programs have written whole
    rows = emulator.last * block // each - 1
    assert rows > LAST - 4
    assert_same_bits([part[-rows:] for part in found], [part[-rows:] for part in expected])


@pytest.mark.parametrize("target", TARGETS)
def test_products_of_many_rows(target, compiled_for, emulator, monkeypatch):
    """Of the last tile of rows, three of them."""
    compiled_for(target)
    tile = tiles_of("masked_linear", target, 2)[0]
    monkeypatch.setattr(masked_gemm, "tiles_for", lambda *_: tile)
    edge, k = ALL_ROWS % tile.out, GROUPS * NEAR.m
    weight, x = normal(LAST, k, dtype=torch.bfloat16), one_hot(16, k)
    emulator.last = 1
    (y,) = ops.masked_linear(x, far(weight), None, False, FAR.source(logits=far(NEAR.logits)))
    take_route(monkeypatch, "eager")
    (expected,) = ops.masked_linear(x, weight, None, False, NEAR.source())
    assert_same_bits(y[:, -edge:] + 0.0, expected[:, -edge:] + 0.0)


@pytest.mark.parametrize("target", TARGETS)
def test_steps_and_gradients_of_many_rows(target, compiled_for, emulator, monkeypatch):
    compiled_for(target)
    tile = tiles_of("straight_through", target, 2)[0]
    for module in (masked_gemm, slopes):
        monkeypatch.setattr(module, "tiles_for", lambda *_: tile)
    edge, k = ALL_ROWS % tile.out, GROUPS * NEAR.m
    grad, x = torch.zeros(edge, ALL_ROWS, dtype=torch.bfloat16), normal(edge, k, seed=1, dtype=torch.bfloat16)
    grad[:, -edge:] = torch.eye(edge)
    weight, squares = normal(LAST, k, dtype=torch.bfloat16), torch.zeros(ALL_ROWS)
    squares[-edge:] = 0.7
    # tiles of columns go in groups, the last of them row by row of tiles
    tiles = -(-k // tile.k)
    emulator.last = columns = tiles % slopes.SHARING.value
    logits, step = far(NEAR.logits), (torch.tensor(0.4), 2.0)
    ops.straight_through_update_(grad, x, far(weight), 1.0, *step, FAR.source(logits=logits), row_squares=squares)
    weight_grad = ops.masked_linear_weight_grad(grad, x, FAR.source(logits=far(NEAR.logits)))
    take_route(monkeypatch, "eager")
    expected, near = NEAR.logits.clone(), (grad[:, -LAST:].contiguous(), x)
    ops.straight_through_update_(
        *near, weight, 1.0, *step, NEAR.source(logits=expected), row_squares=squares[-LAST:].contiguous()
    )
    of_weight = ops.masked_linear_weight_grad(*near, NEAR.source())
    width = k - (tiles - columns) * tile.k
    assert_same_bits(logits[-edge:, -width:], expected[-edge:, -width:])
    assert not torch.equal(logits[-edge:, -width:], NEAR.logits[-edge:, -width:])
    # its grid goes row by row of tiles
    assert_same_bits(weight_grad[-edge:, -tile.k // 2 :] + 0.0, of_weight[-edge:, -tile.k // 2 :] + 0.0)


@pytest.mark.parametrize("target", TARGETS)
def test_gradients_of_many_columns(target, compiled_for, emulator, monkeypatch):
    compiled_for(target)
    tile = tiles_of("masked_linear_input_grad", target, 2)[0]
    monkeypatch.setattr(masked_gemm, "tiles_for", lambda *_: tile)
    rows, tokens, width = 64, 8, 272
    of = Matrix(2, 4, torch.bfloat16, rows, width // 4, spread="open")
    k = (1 << 25) + width
    assert rows * k > 1 << 31
    weight, grad = normal(rows, width, dtype=torch.bfloat16), one_hot(tokens, rows)

    def widened(tensor):
        whole = torch.empty(rows, k, dtype=tensor.dtype)
        whole[:, -width:] = tensor
        return whole

    # each row of the layer is as long as those here
    source = of.source(logits=widened(of.logits))
    source = source._replace(counter=source.counter._replace(group_offset=7, group_row_stride=k // 4))
    emulator.last = 4
    found = ops.masked_linear_input_grad(grad, widened(weight), source)
    take_route(monkeypatch, "eager")
    near = source._replace(tensor=of.logits, counter=source.counter._replace(group_offset=7 + (k - width) // 4))
    expected = ops.masked_linear_input_grad(grad, weight, near)
    assert_same_bits(found[:, -3 * tile.k :] + 0.0, expected[:, -3 * tile.k :] + 0.0)


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("target", TARGETS)
def test_packed_products_of_many_rows(target, tokens, compiled_for, emulator, monkeypatch):
    compiled_for(target)
    config = PACKED_ROWS[0] if tokens == 1 else tiles_of("packed_linear", target, 2)[0]
    monkeypatch.setattr(packed_gemm, "rows_for" if tokens == 1 else "tiles_for", lambda *_: config)
    edge = ALL_ROWS % (config.rows if tokens == 1 else config.out)
    values = normal(LAST, GROUPS * 2, seed=7, dtype=torch.bfloat16)
    bitmask, x = bitmask_of(NEAR.codes, 4), one_hot(tokens, GROUPS * 4)
    emulator.last = 1
    found = ops.nm_linear(x, far(values), far(bitmask), None, None, 2, 4)
    expected = x.float() @ reference.unpack_nm(values, bitmask, n=2, m=4).float().t()
    assert_same_bits(found[:, -edge:] + 0.0, expected.bfloat16()[:, -edge:] + 0.0)
