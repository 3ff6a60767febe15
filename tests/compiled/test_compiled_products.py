"""Masked products as a GPU gets them: exact of one-hot operands, else within the error budget."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.cases import cases
from helpers.compiled import DTYPES, Matrix
from helpers.compiled_products import PRODUCTS, STEP, Product
from helpers.products import normal

from maskpro_kernels import ops
from maskpro_kernels.ops import reference
from maskpro_kernels.ops.triton.tiles import tiles_of

pytestmark = pytest.mark.compiled

TARGETS = ["sm_80", "sm_90"]
ALL_TARGETS = [*TARGETS, "sm_100"]
LINEAR, INPUT, WEIGHT, SLOPE = PRODUCTS


def rows_of(kernel, target, dtype, which):
    """Numbers of rows of the tile table: "all", or those of the narrowest and the widest tile."""
    count = len(tiles_of(kernel, target, dtype.itemsize))
    return range(count) if which == "all" else sorted({0, count - 1})


# (target, kernel, row of the table, pattern, dtype): every row at 2:4, the narrowest and widest at others
EVERY = [
    (target, kernel, row, pattern, dtype)
    for target, kernel, dtype in itertools.product(ALL_TARGETS, PRODUCTS, DTYPES)
    for pattern, which in (((2, 4), "all"), ((1, 4), "ends"), ((4, 8), "ends"), ((8, 16), "ends"))
    for row in rows_of(kernel, target, dtype, which)
]
# narrow before wide
CHOSEN = {
    *((target, kernel, 0, (2, 4), torch.bfloat16) for target, kernel in itertools.product(TARGETS, PRODUCTS)),
    ("sm_80", LINEAR, 0, (2, 4), torch.float32),
    # 64 rows reach wgmma
    ("sm_90", LINEAR, 3, (2, 4), torch.bfloat16),
    ("sm_80", LINEAR, 0, (1, 4), torch.bfloat16),
    ("sm_80", WEIGHT, 0, (4, 8), torch.bfloat16),
}
every_row = pytest.mark.parametrize(
    ("target", "kernel", "row", "pattern", "dtype"), cases(EVERY, slow=lambda *case: case not in CHOSEN), ids=str
)


def tile_of(kernel, target, row, dtype):
    return tiles_of(kernel, target, dtype.itemsize)[row]


@every_row
def test_products_of_one_hot_operands_are_exact(target, kernel, row, pattern, dtype, compiled_for, launched):
    compiled_for(target)
    tile = tile_of(kernel, target, row, dtype)
    Product(kernel, tile, *pattern, dtype, one_hot=True, update=True).assert_right()
    assert launched[kernel] == 1


@pytest.mark.slow
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "ragged"])
@pytest.mark.parametrize(("target", "kernel", "row", "pattern", "dtype"), EVERY, ids=str)
def test_products_are_within_the_error_budget(target, kernel, row, pattern, dtype, aligned, compiled_for):
    compiled_for(target)
    tile = tile_of(kernel, target, row, dtype)
    Product(kernel, tile, *pattern, dtype, aligned=aligned, log_prob=pattern[0] <= 4).assert_right()


@pytest.mark.parametrize("target", TARGETS)
def test_aligned_products_and_their_log_probability(target, compiled_for):
    compiled_for(target)
    tile = tile_of(LINEAR, target, 0, torch.bfloat16)
    Product(LINEAR, tile, aligned=True, log_prob=True).assert_right()


@pytest.mark.parametrize("target", TARGETS)
def test_a_log_probability_counts_every_group_once_beside_several_blocks_of_tokens(target, compiled_for):
    compiled_for(target)
    product = Product(LINEAR, tile_of(LINEAR, target, 0, torch.bfloat16), log_prob=True)
    assert product.sizes[0] > product.tile.tokens
    product.assert_right()


@pytest.mark.parametrize("aligned", [True, False], ids=["words of codes", "ragged"])
@pytest.mark.parametrize(
    ("target", "kernel"),
    cases(itertools.product(TARGETS, PRODUCTS), slow=lambda target, kernel: (target, kernel) != ("sm_80", LINEAR)),
)
def test_products_under_given_masks(target, kernel, aligned, compiled_for):
    compiled_for(target)
    tile = tile_of(kernel, target, 0, torch.bfloat16)
    Product(kernel, tile, kind="codes", aligned=aligned, one_hot=True).assert_right()


@pytest.mark.parametrize(
    ("kind", "dtype", "kernel", "target"),
    cases(
        itertools.product(("codes", "drawn"), (torch.bfloat16, torch.float32), PRODUCTS, ALL_TARGETS),
        slow=lambda *case: case != ("codes", torch.bfloat16, LINEAR, "sm_80"),
    ),
    ids=str,
)
def test_products_of_groups_of_16(kind, dtype, kernel, target, compiled_for, launched):
    """On the narrowest and the widest of the tiles that they take."""
    compiled_for(target)
    tiles = tiles_of(kernel, target, dtype.itemsize)
    ends = dict.fromkeys((tiles[0], tiles[-1]))
    for tile in ends:
        Product(kernel, tile, 8, 16, dtype, kind=kind, one_hot=True).assert_right()
    assert launched[kernel] == len(ends)


@pytest.mark.parametrize("target", [pytest.param("sm_90", marks=pytest.mark.slow), "sm_80"])
def test_tf32_cuts_operands_off(target, compiled_for, launched):
    """No ``cvt.rna`` rounds them: the matrix units leave out 13 bits."""
    compiled_for(target)
    x, weight, matrix = normal(16, 64, seed=1), normal(16, 64, seed=2), Matrix(2, 4, rows=16, groups=16)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        (found,) = ops.masked_linear(x, weight, None, False, matrix.source("codes"))
    finally:
        torch.set_float32_matmul_precision(before)
    assert launched[LINEAR] == 1

    def product(operand):
        kept = reference.masked_weight(operand(weight), matrix.source("codes"))
        return operand(x).double() @ kept.double().t()

    def cut(tensor):
        return (tensor.view(torch.int32) & -(1 << 13)).view(torch.float32)

    torch.testing.assert_close(found.double(), product(cut), rtol=1e-6, atol=1e-5)
    assert (found - product(lambda tensor: tensor)).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("logits", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("operand", "weight"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("kernel", [LINEAR, INPUT])
@pytest.mark.parametrize("target", TARGETS)
def test_weights_and_logits_of_other_dtypes(target, kernel, operand, weight, logits, compiled_for):
    compiled_for(target)
    tile = tile_of(kernel, target, 0, operand)
    Product(kernel, tile, operand=operand, weight=weight, logits=logits, one_hot=True).assert_right()


@pytest.mark.parametrize(
    "logits", [torch.float32, *(pytest.param(d, marks=pytest.mark.slow) for d in DTYPES[1:])], ids=str
)
@pytest.mark.parametrize("target", TARGETS)
def test_slopes_and_the_gradient_of_the_weight(target, logits, compiled_for):
    compiled_for(target)
    tile = tile_of(SLOPE, target, 0, torch.bfloat16)
    Product(SLOPE, tile, logits=logits, one_hot=True).assert_right()


@pytest.mark.parametrize(
    ("target", "kind", "update"),
    cases(
        [(target, *case) for target in ALL_TARGETS for case in (("drawn", True), ("drawn", False), ("codes", False))],
        slow=lambda *case: case != ("sm_80", "drawn", True),
    ),
)
def test_what_follows_torchs_product(target, kind, update, compiled_for, launched):
    compiled_for(target)
    Product(STEP, tiles_of(STEP, target, 2)[0], kind=kind, one_hot=True, update=update).assert_right()
    assert launched[STEP] == 1 and not launched[SLOPE]


@pytest.mark.parametrize(
    ("target", "kernel", "kind", "parts"),
    cases(
        itertools.product(ALL_TARGETS, (LINEAR, INPUT), ("codes", "drawn"), (2, 4)),
        slow=lambda target, _, *case: (target, *case) != ("sm_80", "codes", 2),
    ),
)
def test_products_whose_sum_is_split(target, kernel, kind, parts, compiled_for, launched):
    compiled_for(target)
    tile = tile_of(kernel, target, 0, torch.bfloat16)
    Product(kernel, tile, kind=kind, log_prob=kind == "drawn", parts=parts).assert_right()
    assert launched["split_sum"] == 1
