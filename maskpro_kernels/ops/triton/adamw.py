"""AdamW on the weights that a mask keeps, in one pass over weights, moments and gradient."""

import triton
import triton.language as tl

from ..reference.adamw import BETA, BETA_OF_SQUARES, EPSILON
from . import device as d
from .launch import launch

PART_OF_FIRST = tl.constexpr(1.0 - BETA)
PART_OF_SECOND = tl.constexpr(1.0 - BETA_OF_SQUARES)
SMALLEST_SPREAD = tl.constexpr(EPSILON)
# Where ``reference.adamw_scalars`` has each of them. They are loaded where they are used: all at the top they leave a
# value on the stack on sm_100
USABLE, REMAINING, RATE, CORRECTION = (tl.constexpr(i) for i in range(4))


@triton.jit(do_not_specialize=["total"])
def adamw_kernel(
    weight,
    master,
    first,
    second,
    gradient,
    codes,
    scalars,
    total: tl.int64,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A step of ``master`` and moments, all float32 [rows, K], by the gradient; the weight is rounded from ``master``.

    ``scalars`` are those of ``reference.adamw_scalars``, ``total`` the number of weights, BLOCK those of a program.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.where(tl.load(scalars + USABLE) > 0.0, total, 0)
    code = tl.load(codes + at // M, mask=inside, other=0).to(tl.int32)
    # what is dropped is neither read nor written
    kept = inside & ((code >> (at % M).to(tl.int32) & 1) != 0)
    g = tl.load(gradient + at, mask=kept, other=0.0)
    old_first = tl.load(first + at, mask=kept, other=0.0)
    old_second = tl.load(second + at, mask=kept, other=0.0)
    new_first = old_first + (g - old_first) * PART_OF_FIRST
    new_second = old_second + (g * g - old_second) * PART_OF_SECOND
    spread = tl.sqrt_rn(tl.maximum(new_second, 0.0)) * tl.load(scalars + CORRECTION) + SMALLEST_SPREAD
    remaining = tl.load(master + at, mask=kept, other=0.0) * tl.load(scalars + REMAINING)
    moved = remaining - tl.load(scalars + RATE) * tl.div_rn(new_first, spread)
    tl.store(first + at, new_first, mask=kept)
    tl.store(second + at, new_second, mask=kept)
    tl.store(master + at, moved, mask=kept)
    tl.store(weight + at, d.round_to_nearest(moved, weight.dtype.element_ty), mask=kept)


def adamw_(weight, master, first, second, gradient, codes, scalars, m):
    """``reference.adamw_`` as one kernel."""
    count = master.numel()
    launch(adamw_kernel, "adamw", m, count, master.device,
           weight, master, first, second, gradient, codes, scalars, count)  # fmt: skip
