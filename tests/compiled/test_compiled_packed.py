"""Products with packed weights as a GPU gets them."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.cases import cases
from helpers.compiled_products import PackedProduct
from helpers.packed_codes import assert_every_code_is_placed

from maskpro_kernels.ops.triton.tiles import PACKED_ROWS, PACKED_TOKENS, Tiles, tiles_of
from maskpro_kernels.packed import VALUE_KINDS

pytestmark = pytest.mark.compiled

TARGETS = ["sm_80", "sm_90", "sm_100"]
PATTERNS = [(2, 4), (1, 4), (4, 8), (8, 16)]
DTYPES = [torch.bfloat16, torch.float16]
# of one token, as many on each target
VECTORS = len(PACKED_ROWS)


def configs_of(target):
    return *PACKED_ROWS, *tiles_of("packed_linear", target, 2)


# (target, row of the tables, pattern, dtype, values): every row at 2:4, the narrowest and widest at others
EVERY = [
    (target, row, pattern, dtype, values)
    for target, pattern, dtype, values in itertools.product(TARGETS, PATTERNS, DTYPES, VALUE_KINDS)
    for count in (len(configs_of(target)),)
    for row in (range(count) if pattern == (2, 4) else (0, VECTORS - 1, VECTORS, count - 1))
]
# one token and several
CHOSEN = {
    *((target, row, (2, 4), torch.bfloat16, "keep") for target in ("sm_80", "sm_90") for row in (0, VECTORS)),
    *(("sm_80", row, (2, 4), torch.bfloat16, values) for row in (0, VECTORS) for values in ("int8", "int4")),
    *(("sm_80", 0, (4, 8), torch.float16, values) for values in ("keep", "int4")),
}


@pytest.mark.parametrize(
    ("target", "row", "pattern", "dtype", "values"), cases(EVERY, slow=lambda *case: case not in CHOSEN), ids=str
)
def test_packed_products(target, row, pattern, dtype, values, compiled_for, launched):
    """One-hot operands read the weight out; others stay within the budget, on aligned and on ragged sizes."""
    compiled_for(target)
    config = configs_of(target)[row]
    for aligned, one_hot in ((False, True), (False, False), (True, False)):
        PackedProduct(config, *pattern, dtype, values, aligned=aligned, one_hot=one_hot).assert_right()
    assert launched["packed_vector" if row < VECTORS else "packed_linear"] == 3


def config_of(kernel, target):
    if kernel == "unpack":
        # more tokens than unpack tiles of the weight
        return Tiles(out=16, tokens=PACKED_TOKENS + 4, k=64)
    return PACKED_ROWS[0] if kernel == "packed_vector" else tiles_of(kernel, target, 2)[0]


@pytest.mark.parametrize("kernel", ["packed_vector", "packed_linear", "unpack"])
@pytest.mark.parametrize("k", [576, 1088])
@pytest.mark.parametrize(
    ("target", "dtype"), cases(itertools.product(TARGETS, DTYPES), slow=lambda *case: case != ("sm_80", torch.bfloat16))
)
def test_int4_rows_that_end_with_a_short_group_of_a_scale(target, dtype, k, kernel, compiled_for, launched):
    """``packed_vector`` loads four chunks together, which divide these rows; a scale belongs to eight."""
    compiled_for(target)
    config = config_of(kernel, target)
    for one_hot in (True, False):
        PackedProduct(config, operand=dtype, values="int4", one_hot=one_hot, k=k).assert_right()
    assert launched[kernel] == 2


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize(
    ("target", "dtype"), cases(itertools.product(TARGETS, DTYPES), slow=lambda target, dtype: target == "sm_100")
)
def test_values_of_every_code_are_at_their_places(target, dtype, tokens, compiled_for, emulator):
    compiled_for(target)
    emulator.programs.clear()
    assert_every_code_is_placed(tokens, dtype)
    # that is how they got there
    assert any("prmt.b32" in text for text in emulator.programs)


@pytest.mark.parametrize(
    ("target", "parts", "aligned"),
    cases(itertools.product(TARGETS, (2, 4), (True, False)), slow=lambda *case: case != ("sm_80", 2, False)),
)
def test_products_whose_sum_is_split(target, parts, aligned, compiled_for, launched):
    compiled_for(target)
    PackedProduct(configs_of(target)[VECTORS], aligned=aligned, parts=parts).assert_right()
    assert launched["split_sum"] == 1
