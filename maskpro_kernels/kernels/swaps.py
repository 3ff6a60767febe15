"""The best swap of a kept with a dropped weight in every group."""

import torch
import triton
import triton.language as tl

from . import device as d
from .launch import launch
from .sampling import load_codes, load_columns


@triton.jit(do_not_specialize=["columns", "total"])
def best_swaps_kernel(
    weight,
    product,
    codes,
    blocks,
    change,
    swap,
    columns: tl.int64,
    total: tl.int64,
    N: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    group = first + tl.arange(0, BLOCK)
    inside = group < total
    w = load_columns(weight, first, total, M, BLOCK)
    r = load_columns(product, first, total, M, BLOCK)
    kept = d.decode(load_codes(codes, first, total, N, BLOCK), M)
    block = blocks + group % columns
    costs = ()
    for i in tl.static_range(M):
        pull = 2.0 * w[i] * r[i]
        h = tl.load(block + (i * M + i) * columns, mask=inside, other=0.0)
        costs = costs + (tl.where(kept[i], 0.0 - pull, pull) + w[i] * w[i] * h,)
    best = tl.full((BLOCK,), float("inf"), tl.float32)
    pair = tl.zeros((BLOCK,), tl.int32)
    for i in tl.static_range(M):
        for j in tl.static_range(i + 1, M):
            h = tl.load(block + (i * M + j) * columns, mask=inside, other=0.0)
            value = costs[i] + costs[j] - 2.0 * (w[i] * w[j]) * h
            better = (kept[i] != kept[j]) & (value < best)
            best = tl.where(better, value, best)
            pair = tl.where(better, i * M + j, pair)
    one = tl.full((BLOCK,), 1, tl.int32)
    code = tl.where(pair == 0, 0, (one << pair // M) | (one << pair % M))
    tl.store(change + group, best, mask=inside)
    tl.store(swap + group, code.to(swap.dtype.element_ty), mask=inside)


def best_swaps(weight, product, codes, blocks, n, m):
    """``reference.best_swaps`` as one kernel."""
    change = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    swap = torch.empty_like(codes)
    launch(best_swaps_kernel, "best_swaps", m, codes.numel(), codes.device,
           weight, product, codes, blocks, change, swap, codes.shape[1], codes.numel(), N=n)  # fmt: skip
    return change, swap
