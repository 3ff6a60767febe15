"""Each barrier, wait and fence of compiled kernels is taken away in turn: the machine finds it, or it did nothing."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
from helpers.cases import cases
from helpers.compiled import OVER_GROUPS, Matrix, assert_bits_of_reference
from helpers.compiled_products import PRODUCTS, PackedProduct, Product
from helpers.planted import synchronisations, what_is_found, without

from maskpro_kernels.ops.triton.tiles import PACKED_TILES, ROWS, TILES

pytestmark = pytest.mark.ptx

TARGETS = ["sm_80", "sm_90", "sm_100"]
OWN_COPY = "each thread reads what it has copied itself, after its own wait"
STANDS_BEFORE = "the same stands before it on every way here, and since then shared memory has been read alone"
BEFORE_COPIES = "no thread has touched the memory that is copied to after it"
OWN_WAIT = "each thread waits for the product itself, before it writes where the product has read"
AFTER_LOADS = "a barrier stands behind the loads of tensor memory, ahead of this one"
# a test takes all of a kernel away at once
FOR_EACH_OTHER = "another barrier stands between the same accesses"
# By (kernel, target), in the oldest release of Triton and in later ones: numbers that nothing depends on, and why
OLDEST = (3, 6)
REDUNDANT_IN_OLDEST = (
    {("masked_linear", target): {0: BEFORE_COPIES, 2: OWN_COPY} for target in TARGETS}
    | {("masked_linear_input_grad", target): {0: BEFORE_COPIES, 6: OWN_COPY} for target in TARGETS}
    | {
        (kernel, target): {0: BEFORE_COPIES}
        for kernel in ("masked_linear_weight_grad", "straight_through", "packed_linear")
        for target in TARGETS
    }
    | {
        (kernel, "sm_100"): dict.fromkeys((1, 3, 4, 5, 15, 16), FOR_EACH_OTHER)
        | {8: OWN_WAIT, 10: OWN_WAIT, last: AFTER_LOADS}
        for kernel, last in (("masked_linear_weight_grad", 28), ("straight_through", 31))
    }
)
REDUNDANT = (
    {("masked_linear", target): {1: OWN_COPY} for target in TARGETS}
    | {("masked_linear_input_grad", target): {5: OWN_COPY} for target in TARGETS}
    | {
        (kernel, "sm_80"): {2: STANDS_BEFORE, 3: STANDS_BEFORE}
        for kernel in ("masked_linear_weight_grad", "straight_through")
    }
    | {
        # a fence between two barriers, of which either will do
        (kernel, "sm_100"): dict.fromkeys((4, 6, 10, 12), FOR_EACH_OTHER)
        | {7: OWN_WAIT, 13: OWN_WAIT, last: AFTER_LOADS}
        for kernel, last in (("masked_linear_weight_grad", 27), ("straight_through", 37))
    }
)
KERNELS = [*PRODUCTS, "packed_vector", "packed_linear", "descend"]


def call_of(kernel, target):
    """A small launch that needs all that its kernel waits for: several steps of its loop, all of its epilogue."""
    if kernel in PRODUCTS:
        tile = TILES[kernel, target, 2][0]
        return Product(kernel, tile, log_prob=kernel == "masked_linear", update=True, aligned=True).assert_right
    if kernel == "packed_vector":
        return PackedProduct(ROWS[kernel][-1], aligned=True).assert_right
    if kernel == "packed_linear":
        return PackedProduct(PACKED_TILES[kernel, target, 2][0], aligned=True).assert_right
    of = Matrix(2, 4, torch.bfloat16, rows=8, groups=64)
    return lambda: assert_bits_of_reference(lambda: OVER_GROUPS[kernel](of))


@pytest.mark.parametrize(
    ("target", "kernel"),
    cases(itertools.product(TARGETS, KERNELS), slow=lambda *case: case != ("sm_80", "masked_linear")),
)
def test_each_that_is_taken_away_is_found(target, kernel, compiled_for, machine):
    compiled_for(target)
    texts, call = [], call_of(kernel, target)
    before = what_is_found(machine, call, lambda text: texts.append(text) or text)
    assert before <= machine.let_pass
    (text,) = set(texts)
    count = len(synchronisations(text))
    assert count
    missed = {
        number: " ".join(synchronisations(text)[number][0][0].split())
        for number in range(count)
        if not what_is_found(machine, call, lambda text, number=number: without(text, {number})) - before
    }
    oldest = tuple(map(int, triton.__version__.split(".")[:2])) == OLDEST
    redundant = (REDUNDANT_IN_OLDEST if oldest else REDUNDANT).get((kernel, target), {})
    assert missed.keys() == redundant.keys(), missed
    alike = {number for number, reason in redundant.items() if reason == FOR_EACH_OTHER}
    assert not alike or what_is_found(machine, call, lambda text: without(text, alike)) - before


@pytest.mark.parametrize("kernel", ["sample_mask", "masked_weight", "score_update"])
def test_a_warp_that_draws_waits_for_no_other(kernel, compiled_for, machine):
    compiled_for("sm_80")
    texts = []
    what_is_found(machine, call_of(kernel, "sm_80"), lambda text: texts.append(text) or text)
    assert texts and not any(synchronisations(text) for text in texts)
