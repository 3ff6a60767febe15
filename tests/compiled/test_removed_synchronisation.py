"""Each barrier, wait and fence of compiled kernels is taken away in turn: the emulator finds it, or it did nothing."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
from helpers.cases import cases
from helpers.compiled import OVER_GROUPS, Matrix, assert_bits_of_reference
from helpers.compiled_products import PRODUCTS, STEP, PackedProduct, Product, SparseProduct
from helpers.layers import OVER_LAYERS, ManyLayers
from helpers.planted import synchronisations, what_is_found, without

from maskpro_kernels.ops.triton.tiles import PACKED_ROWS, multiplies_by_warps, tiles_of

pytestmark = pytest.mark.compiled

TARGETS = ["sm_80", "sm_90", "sm_100"]
OWN_COPY = "each thread reads what it has copied itself, after its own wait"
EQUAL_BEFORE = "an equal one is before it on every way here, and since then shared memory has only been read"
BEFORE_COPIES = "no thread has touched the memory that is copied to after it"
OWN_WAIT = "each thread waits for the product itself, before it writes where the product has read"
BEFORE_PRODUCT = "another barrier is after it, before the product"
ONLY_WAITS = "up to the next barrier each thread does nothing but wait"
WAITS_LATER = "before the product each thread waits again, for all that it has stored"
AFTER_LOADS = "a barrier is after the loads of tensor memory, before this one"
OTHER_STAGE = "it is between copies to one stage and reads of another"
BEFORE_THE_END = "no thread uses shared memory after it"
# those of a kernel are taken away at once, which is found
FOR_EACH_OTHER = "another barrier is between the same accesses"
BEFORE_THE_START = "a wave begins after it, as its first arguments are in registers"
OWN_WAVE = "the wave that reads there has written it itself, in the order of its code"
# By (kernel, target), in the oldest release of Triton and in the newest: numbers that nothing depends on, and why. Of
# releases between them the quick cases alone are known.
RELEASE = tuple(map(int, triton.__version__.split(".")[:2]))
IS_OLDEST = RELEASE == (3, 6)
IS_BETWEEN = RELEASE in ((3, 7), (3, 8))
REDUNDANT_IN_OLDEST = (
    {("masked_linear", target): {0: BEFORE_COPIES, 2: OWN_COPY} for target in TARGETS[:2]}
    | {("masked_linear_input_grad", target): {0: BEFORE_COPIES, 6: OWN_COPY} for target in TARGETS}
    | {
        (kernel, target): {0: BEFORE_COPIES}
        for kernel in ("masked_linear_weight_grad", "straight_through", "packed_linear")
        for target in TARGETS
    }
)
REDUNDANT = (
    {("masked_linear", target): {1: OWN_COPY} for target in TARGETS}
    | {("sparse_mma", target): {3: BEFORE_THE_END} for target in TARGETS}
    | {("masked_linear_input_grad", target): {5: OWN_COPY} for target in TARGETS}
    | {
        (kernel, "sm_80"): {2: EQUAL_BEFORE, 3: EQUAL_BEFORE}
        for kernel in ("masked_linear_weight_grad", "straight_through")
    }
    | {
        # a fence between two barriers, of which either will do
        (kernel, "sm_100"): dict.fromkeys((4, 6, 10, 12), FOR_EACH_OTHER)
        | {7: OWN_WAIT, 13: ONLY_WAITS, last: AFTER_LOADS}
        for kernel, last in (("masked_linear_weight_grad", 27), ("straight_through", 37))
    }
)
REDUNDANT_IN_OLDEST |= {
    ("sparse_mma", target): {0: BEFORE_COPIES, 1: BEFORE_COPIES, 4: OTHER_STAGE, 6: BEFORE_THE_END}
    for target in TARGETS
}
REDUNDANT_IN_OLDEST["masked_linear", "sm_100"] = {0: BEFORE_COPIES, 1: BEFORE_COPIES, 3: OWN_COPY}
# Of a table's last row where the first is too narrow for it: its instruction, and the kernels
WIDE, UNIT = ", wide", {"sm_90": "wgmma", "sm_100": "tcgen05"}
OF_WIDE = ("masked_linear", "masked_linear_input_grad")
REDUNDANT |= {
    ("masked_linear, wide", "sm_90"): {1: OWN_COPY, 9: FOR_EACH_OTHER, 10: EQUAL_BEFORE, 13: FOR_EACH_OTHER},
    ("masked_linear, wide", "sm_100"): {2: WAITS_LATER, 28: OWN_WAIT, 29: ONLY_WAITS, 37: AFTER_LOADS}
    | dict.fromkeys((12, 14, 25, 27), FOR_EACH_OTHER),
    ("masked_linear_input_grad, wide", "sm_90"): {6: FOR_EACH_OTHER, 7: EQUAL_BEFORE, 10: FOR_EACH_OTHER, 12: OWN_COPY},
    ("masked_linear_input_grad, wide", "sm_100"): {7: BEFORE_PRODUCT, 15: BEFORE_PRODUCT, 25: AFTER_LOADS}
    | {10: OWN_WAIT, 19: ONLY_WAITS},
    ("packed_linear", "sm_90"): {20: EQUAL_BEFORE},
    ("packed_linear", "sm_100"): {2: WAITS_LATER, 8: OWN_WAIT, 15: ONLY_WAITS, 21: AFTER_LOADS},
}
KERNELS = [*PRODUCTS, STEP, "packed_vector", "packed_linear", "sparse_mma", "descend"]
# "by codes" launches a second kernel after the draw
OF_LAYERS = [kernel for kernel in OVER_LAYERS if kernel != "by codes"]
for of_release in (REDUNDANT, REDUNDANT_IN_OLDEST):
    of_release |= {(kernel, "gfx942"): {0: BEFORE_THE_START} for kernel in (*OVER_GROUPS, *OF_LAYERS)}
REDUNDANT_IN_OLDEST["descend", "gfx942"] |= dict.fromkeys((9, 10), OWN_WAVE)
if RELEASE < (3, 9):
    REDUNDANT["masked_linear", "sm_80"] = REDUNDANT_IN_OLDEST["masked_linear", "sm_80"]
if RELEASE < (3, 8):
    REDUNDANT["descend", "gfx942"] = REDUNDANT_IN_OLDEST["descend", "gfx942"]
WITH_UNIT = [target for target in UNIT if not multiplies_by_warps(target)]
OF_NVIDIA = [*itertools.product(TARGETS, KERNELS), *itertools.product(WITH_UNIT, (name + WIDE for name in OF_WIDE))]
QUICK = ("sm_80", "masked_linear"), ("gfx942", "descend")
CASES = QUICK if IS_BETWEEN else [*OF_NVIDIA, *(("gfx942", kernel) for kernel in (*OVER_GROUPS, *OF_LAYERS))]


def call_of(kernel, target):
    """A small launch that needs all that its kernel waits for: several steps of its loop, all of its epilogue."""
    row = -1 if kernel.endswith(WIDE) else 0
    kernel = kernel.removesuffix(WIDE)
    if kernel in (*PRODUCTS, STEP):
        tile = tiles_of(kernel, target, 2)[row]
        return Product(kernel, tile, log_prob=kernel == "masked_linear", update=True, aligned=True).assert_right
    if kernel == "packed_vector":
        return PackedProduct(PACKED_ROWS[-1], aligned=True).assert_right
    if kernel == "packed_linear":
        return PackedProduct(tiles_of(kernel, target, 2)[row], aligned=True).assert_right
    if kernel == "sparse_mma":
        # more steps than are in flight at once
        return SparseProduct(tiles_of(kernel, target, 2)[1], 16, 64, 384).assert_right
    if kernel in OF_LAYERS:
        layers = ManyLayers(2, 4, torch.bfloat16)
        return lambda: assert_bits_of_reference(lambda: layers.call(kernel))
    of = Matrix(2, 4, torch.bfloat16, rows=8, groups=64)
    return lambda: assert_bits_of_reference(lambda: OVER_GROUPS[kernel](of))


def redundant_in(kernel, target):
    return (REDUNDANT_IN_OLDEST if IS_OLDEST else REDUNDANT).get((kernel, target), {})


class Compiled(BaseException):
    """Ends a call before its launch; nothing takes it for an error."""


def text_of(emulator, call) -> str:
    """The kernel that a call would launch."""

    def keep(text):
        raise Compiled(text)

    emulator.rewrite = keep
    with pytest.raises(Compiled) as ended:
        call()
    emulator.rewrite = str
    return str(ended.value)


@pytest.mark.parametrize(("target", "kernel"), cases(CASES, slow=lambda *case: case not in QUICK))
def test_each_that_is_taken_away_is_found(target, kernel, compiled_for, emulator):
    compiled_for(target)
    call = call_of(kernel, target)
    assert not what_is_found(emulator, call, str)
    text = text_of(emulator, call)
    if kernel.endswith(WIDE):
        assert UNIT[target] in text
    found = synchronisations(text)
    assert found

    def finds(numbers):
        return what_is_found(emulator, call, lambda text: without(text, numbers))

    missed = {k: " ".join(found[k][0][0].split()) for k in range(len(found)) if not finds({k})}
    redundant = redundant_in(kernel, target)
    assert missed.keys() == redundant.keys(), missed
    alike = {number for number, reason in redundant.items() if reason == FOR_EACH_OTHER}
    assert not alike or finds(alike)
    # nothing depends on the others, nor on one of them for want of another
    assert not redundant.keys() - alike or not finds(redundant.keys() - alike)


@pytest.mark.parametrize("kernel", ["sample_mask", "masked_weight", "score_update", *OF_LAYERS])
def test_a_warp_that_draws_waits_for_no_other(kernel, compiled_for, emulator):
    compiled_for("sm_80")
    assert not synchronisations(text_of(emulator, call_of(kernel, "sm_80")))


@pytest.mark.slow
@pytest.mark.skipif(IS_BETWEEN, reason="of this release the quick cases alone are known")
def test_most_that_are_taken_away_are_found(compiled_for, emulator):
    """Of all kernels for NVIDIA, by the numbers that the test above holds; docs/verification.md states both ratios."""
    total, reasons = 0, []
    for target, kernel in OF_NVIDIA:
        compiled_for(target)
        total += len(synchronisations(text_of(emulator, call_of(kernel, target))))
        reasons += redundant_in(kernel, target).values()
    alone = 1 - len(reasons) / total
    assert alone >= (0.79 if IS_OLDEST else 0.87), (len(reasons), total)
