"""The best swap of a kept with a dropped weight in each group."""

import torch
import triton
import triton.language as tl

from .launch import launch
from .sampling import load_codes, store_codes


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
