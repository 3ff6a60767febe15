"""AdamW on the weights that a mask keeps, and the best swap of a kept with a dropped weight."""

import torch
import triton
import triton.language as tl

from ..reference.slopes import BETA, BETA_OF_SQUARES, EPSILON
from . import device as d
from .launch import launch
from .sampling import load_codes, store_codes

PART_OF_FIRST = tl.constexpr(1.0 - BETA)
PART_OF_SECOND = tl.constexpr(1.0 - BETA_OF_SQUARES)
SMALLEST_SPREAD = tl.constexpr(EPSILON)
# Indices into ``reference.adamw_scalars``. Kernels load each where they use it: loading all at the top puts a value on
# the stack on sm_100
USABLE, REMAINING, RATE, CORRECTION = (tl.constexpr(i) for i in range(4))


@triton.jit(do_not_specialize=["total"])
def adamw_kernel(
    weight, master, first, second, gradient, codes, scalars, total: tl.int64,
    M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update ``master`` and moments, all float32 [rows, K], by the gradient, and round ``master`` to the weight.

    ``scalars`` are from ``reference.adamw_scalars``; ``total`` weights, BLOCK a program.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.where(tl.load(scalars + USABLE) > 0.0, total, 0)
    code = tl.load(codes + at // M, mask=inside, other=0).to(tl.int32)
    # dropped weights are neither read nor written
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


@triton.jit
def weight_and_cost(weight, product, blocks, code, i, columns, inside, M: tl.constexpr):
    """(weights at place i of their groups, whether they are kept, c_i of ``reference.best_swaps``)."""
    w = tl.load(weight + i * columns, mask=inside, other=0.0)
    r = tl.load(product + i * columns, mask=inside, other=0.0)
    h = tl.load(blocks + (i * M + i) * columns, mask=inside, other=0.0)
    kept = (code >> i & 1) != 0
    pull = 2.0 * w * r
    return w, kept, tl.where(kept, 0.0 - pull, pull) + w * w * h


@triton.jit(do_not_specialize=["columns", "total"])
def best_swaps_kernel(
    weight, product, codes, blocks, change, swap, columns: tl.int64, total: tl.int64,
    N: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``reference.best_swaps``: weight and product [rows, M, columns], blocks [M, M, columns], columns = K / M.

    ``change`` and ``swap`` [rows, columns] have ``total`` elements; a program computes BLOCK of them.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK
    group = first + tl.arange(0, BLOCK)
    inside = group < total
    code = load_codes(codes, first, total, N, BLOCK)
    start = group // columns * (M * columns) + group % columns
    weight += start
    product += start
    blocks += group % columns
    best = tl.full((BLOCK,), float("inf"), tl.float32)
    pair = tl.zeros((BLOCK,), tl.int32)
    one = tl.full((BLOCK,), 1, tl.int32)
    # not unrolled: 16 weights have 120 pairs. Repeated loads come from the cache
    for i in range(M - 1):
        w_i, kept_i, cost_i = weight_and_cost(weight, product, blocks, code, i, columns, inside, M)
        for j in range(i + 1, M):
            w_j, kept_j, cost_j = weight_and_cost(weight, product, blocks, code, j, columns, inside, M)
            h = tl.load(blocks + (i * M + j) * columns, mask=inside, other=0.0)
            value = cost_i + cost_j - 2.0 * (w_i * w_j) * h
            better = (kept_i != kept_j) & (value < best)
            best = tl.where(better, value, best)
            pair = tl.where(better, one << i | one << j, pair)
    store_codes(change, best, first, total, BLOCK)
    store_codes(swap, pair, first, total, BLOCK)


def best_swaps(weight, product, codes, blocks, n, m):
    """``reference.best_swaps`` as one kernel."""
    codes = codes.contiguous()
    change = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    swap = torch.empty_like(codes)
    launch(best_swaps_kernel, "best_swaps", m, codes.numel(), codes.device,
           weight, product, codes, blocks, change, swap, codes.shape[1], codes.numel(), N=n)  # fmt: skip
    return change, swap
