"""The best swap of a kept with a dropped weight in each group."""

from __future__ import annotations

import torch

from .groups import columns, decode


def best_swaps(weight, product, codes, blocks, n, m):
    """Find in each group the swap of a kept with a dropped weight that lowers the reconstruction error most.

    The error of a row is E = d H d^T, d = weight * mask - weight. With R = d H, and c_i = -2 w_i R_i + w_i^2 H_ii
    for a kept weight and +2 w_j R_j + w_j^2 H_jj for a dropped one, a swap changes it by c_i + c_j - 2 w_i w_j H_ij.

    Args:
        weight, product: w and R, float32 [rows, M, K / M], so that weights of one place in their groups are
            contiguous.
        codes: [rows, K / M].
        blocks: the diagonal blocks of H, float32 [M, M, K / M].

    Returns:
        (change of E, float32 [rows, K / M]; codes of the two weights, which give the swapped mask by exclusive or); of
        equal pairs the one with the lower indices.
    """
    return _best_swaps(weight.unbind(1), product.unbind(1), codes, blocks.flatten(0, 1))


def group_best_swaps(weight, product, codes, blocks):
    """``best_swaps`` of groups: weight and product [groups, M], codes [groups], blocks [groups, M * M]."""
    return _best_swaps(columns(weight), columns(product), codes, columns(blocks))


def _best_swaps(w, r, codes, blocks):
    m = len(w)
    kept = decode(codes, m)
    costs = []
    for i in range(m):
        pull = 2.0 * w[i] * r[i]
        costs.append(torch.where(kept[i], 0.0 - pull, pull) + w[i] * w[i] * blocks[i * m + i])
    best = torch.full_like(costs[0], torch.inf)
    swap = torch.zeros_like(codes)
    for i in range(m):
        for j in range(i + 1, m):
            change = costs[i] + costs[j] - 2.0 * (w[i] * w[j]) * blocks[i * m + j]
            better = (kept[i] != kept[j]) & (change < best)
            best = torch.where(better, change, best)
            swap = torch.where(better, 1 << i | 1 << j, swap)
    return best, swap
