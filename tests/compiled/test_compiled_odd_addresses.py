"""Tensors that begin where no vector load may start: Triton compiles for them by their addresses."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from helpers.cases import cases
from helpers.compiled import DTYPES, OVER_GROUPS, Matrix, assert_bits_of_reference, misaligned
from helpers.compiled_products import PRODUCTS, PackedProduct, Product
from helpers.layers import OVER_LAYERS, ManyLayers

from maskpro_kernels.ops.triton.tiles import PACKED_ROWS, tiles_of

pytestmark = pytest.mark.compiled

TARGETS = ["sm_80", "sm_90"]


@pytest.mark.parametrize(
    ("target", "kernel", "pattern", "dtype", "by"),
    cases(
        itertools.product([*TARGETS, "gfx942"], OVER_GROUPS, ((2, 4), (4, 8), (1, 2)), DTYPES, (1, 2, 3)),
        slow=lambda target, kernel, pattern, dtype, by: (
            (target, pattern, dtype, by) != ("sm_80", (2, 4), torch.bfloat16, 1)
            or kernel not in ("sample_mask", "top_n_mask", "unpack", "best_swaps", "adamw")
        ),
    ),
    ids=str,
)
def test_kernels_over_groups(target, kernel, pattern, dtype, by, compiled_for, launched):
    compiled_for(target)
    of, moved = Matrix(*pattern, dtype=dtype, rows=7, groups=37), functools.partial(misaligned, by=by)
    assert_bits_of_reference(lambda: OVER_GROUPS[kernel](of, moved))
    assert launched[kernel] == 1


@pytest.mark.parametrize(
    ("target", "kernel", "pattern", "dtype", "by"),
    cases(
        itertools.product([*TARGETS, "gfx942"], OVER_LAYERS, ((2, 4), (4, 8), (1, 2)), DTYPES, (1, 2, 3)),
        slow=lambda *case: case != ("sm_80", "by codes", (2, 4), torch.bfloat16, 1),
    ),
    ids=str,
)
def test_kernels_over_layers(target, kernel, pattern, dtype, by, compiled_for):
    compiled_for(target)
    of = ManyLayers(*pattern, dtype, moved=functools.partial(misaligned, by=by))
    assert not of.group().aligned
    assert_bits_of_reference(lambda: of.call(kernel))


@pytest.mark.parametrize(
    ("target", "kernel", "by"),
    cases(
        itertools.product(TARGETS, PRODUCTS, (1, 3)),
        slow=lambda target, kernel, by: (
            (target, kernel, by) not in (("sm_80", PRODUCTS[0], 1), ("sm_90", PRODUCTS[3], 1))
        ),
    ),
)
def test_products(target, kernel, by, compiled_for, launched):
    compiled_for(target)
    tile = tiles_of(kernel, target, 2)[0]
    for one_hot in (True, False):
        product = Product(kernel, tile, aligned=True, one_hot=one_hot, update=one_hot)
        product.assert_right(functools.partial(misaligned, by=by))
    assert launched[kernel] == 2


@pytest.mark.parametrize("target", ["sm_80", pytest.param("sm_90", marks=pytest.mark.slow)])
@pytest.mark.parametrize("config", [PACKED_ROWS[0], tiles_of("packed_linear", "sm_80", 2)[0]], ids=str)
def test_activations_of_packed_products(target, config, compiled_for):
    compiled_for(target)
    PackedProduct(config, aligned=True, one_hot=True).assert_right(functools.partial(misaligned, by=1))
