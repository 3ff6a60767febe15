"""Products with 2:4 weights by ``mma.sp``, the instruction of sparse tensor cores, as a GPU gets them."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import compiled_products
from helpers.cases import cases
from helpers.compiled_products import SparseProduct
from helpers.planted import what_is_found

from maskpro_kernels.ops.triton import tiles
from maskpro_kernels.ops.triton.tiles import tiles_of

pytestmark = pytest.mark.compiled

TARGETS = ["sm_80", "sm_90", "sm_100"]
BF16, FP16 = DTYPES = [torch.bfloat16, torch.float16]
# as many on each target
TABLE = tiles_of("sparse_mma", "sm_80", 2)
# Of two steps and more, which end with one, a half and three of four parts of another
COLUMNS = (192, 144, 160, 176)


def tokens_of(tile, target):
    """Up to the tokens from which a dense product is taken."""
    most = tiles.TARGETS[target].sparse_tokens
    return [min(tokens, most) for tokens in (1, tile.tokens - 1, tile.tokens, 2 * tile.tokens + 3, 300)]


# (target, row of the table, dtype, columns, rows beside whole tiles, place in ``tokens_of``)
EVERY = [
    (target, row, *rest)
    for target, row in itertools.product(TARGETS, range(len(TABLE)))
    for rest in itertools.product(DTYPES, COLUMNS, (0, 37), range(5))
]
CHOSEN = {
    *(("sm_80", row, BF16, k, 37, 0) for row, k in enumerate((192, 144, 160, 176, 144))),
    *(("sm_80", row, FP16, 176, 0, 3) for row in (0, 1)),
    *((target, 0, BF16, 144, 37, 3) for target in TARGETS),
}


@pytest.mark.parametrize(
    ("target", "row", "dtype", "k", "beside", "place"), cases(EVERY, slow=lambda *case: case not in CHOSEN), ids=str
)
def test_products(target, row, dtype, k, beside, place, compiled_for, launched):
    compiled_for(target)
    tile = tiles_of("sparse_mma", target, 2)[row]
    SparseProduct(tile, tokens_of(tile, target)[place], tile.out + beside, k, dtype).assert_right()
    assert launched["sparse_mma"] == 1


@pytest.mark.parametrize(
    ("target", "row", "dtype"),
    cases(itertools.product(TARGETS, (0, 3), DTYPES), slow=lambda *case: case != ("sm_80", 0, BF16)),
)
def test_products_of_any_numbers_are_within_the_budget(target, row, dtype, compiled_for):
    compiled_for(target)
    tile = tiles_of("sparse_mma", target, 2)[row]
    SparseProduct(tile, tile.tokens, tile.out, 1024, dtype, biased=False, whole_numbers=False).assert_right()


@pytest.mark.parametrize(
    ("target", "parts"), cases(itertools.product(TARGETS, (2, 5)), slow=lambda *case: case != ("sm_80", 5))
)
def test_products_whose_sum_is_split(target, parts, compiled_for, launched):
    """Of five steps, the last one is a quarter."""
    compiled_for(target)
    SparseProduct(TABLE[0], 5, 70, 272, parts=parts).assert_right()
    assert launched["split_sum"] == 1


def test_a_swapped_nibble_of_metadata_is_found(compiled_for, emulator, monkeypatch):
    compiled_for("sm_80")
    metadata_of = compiled_products.metadata_of

    def with_a_fault(bitmask):
        metadata = metadata_of(bitmask)
        # of the first groups of a word; in another word than this they may be alike
        (groups,) = metadata.view(torch.uint8).view(-1)[:1]
        assert groups & 15 != groups >> 4
        groups.copy_(groups << 4 | groups >> 4)
        return metadata

    monkeypatch.setattr(compiled_products, "metadata_of", with_a_fault)
    product = SparseProduct(TABLE[0], 8, 32, 64)
    assert what_is_found(emulator, product.assert_right, str) == {"wrong result"}
