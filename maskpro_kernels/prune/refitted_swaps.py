"""Swaps that count on the refit: they improve a layer's mask by what a swap costs once the kept values are refitted.

In the terms of ``least_squares.py``: with the dropped set D and A = H^-1 the error after a refit is E(S) = w_D A_DD^-1
w_D^T. To drop i raises it by v_i^2 / (H_SS^-1)_ii, to keep j lowers it by g_j^2 / (H_jj - H_jS H_SS^-1 H_Sj), v being
the refitted row and g = (w - v) H. docs/mathematics.md derives both, and what a swap of one group costs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..pattern import NMPattern
from .least_squares import PIECE, conjugate_gradients, row_errors
from .swap_descent import from_places, kept_of, lowest, to_places

# Rows whose masks give the conditional blocks. More do not lower the error of a language model's layers
SAMPLED_ROWS = 8
# By then a language model's layers have done 90% of the fall that twice as many bring
SWEEPS = 8
# Of the refit behind the swaps of a sweep. Fewer take the error that is left of it for that of the swaps
ITERATIONS = 10
# One in so many of a row's groups may swap together at first
FIRST_SHARE = 16
# E has to fall by this part of itself, or rounding could pass for progress
LEAST_FALL = 1e-6


def conditional_blocks(codes: Tensor, gram: Tensor, pattern: NMPattern) -> Tensor:
    """What is left of each group's block of H once the kept values of all other groups follow: its Schur complement.

    T_g = H_gg - H_gS H_SS^-1 H_Sg, where S is kept outside of group g. It depends on the row, but little: this is the
    mean over a few rows at equal distances.

    Args:
        codes: group codes [out, K / M].
        gram: symmetric positive definite float32 [K, K], in the order of ``by_place``.
        pattern: of the codes.

    Returns:
        float32 [M, M, K / M]; as in ``gram`` where a number is not finite.
    """
    rows, groups = codes.shape
    n, m = pattern.n, pattern.m
    own = gram.view(m, groups, m, groups).diagonal(dim1=1, dim2=3)
    by_group, each = own.permute(2, 0, 1).double(), torch.arange(groups, device=gram.device)
    total = torch.zeros_like(by_group)
    count = min(SAMPLED_ROWS, rows)
    for index in range(count):
        kept = kept_of(codes[index * rows // count][None], m)[0].T > 0
        order = torch.cat([kept.nonzero()[:, 1].view(groups, n), (~kept).nonzero()[:, 1].view(groups, m - n)], 1)
        s, d = ((order[:, part] * groups + each[:, None]).flatten() for part in (slice(n), slice(n, m)))
        of_kept = gram[s].double()
        # not by Cholesky: of a layer that saw zeros alone the matrix is zero
        inverse, across = torch.linalg.inv_ex(of_kept[:, s])[0], of_kept[:, d]
        follows = (inverse @ across).view(-1, groups, m - n)
        left = by_group[each[:, None, None], order[:, n:, None], order[:, None, n:]]
        left = left - across.T.view(groups, m - n, -1) @ follows.transpose(0, 1)
        follows = follows.view(groups, n, groups, m - n)[each, :, each]
        # by the inverse of a matrix in blocks, from those of H_SS^-1 and of H_DD - H_DS H_SS^-1 H_SD
        alone = torch.linalg.inv_ex(inverse.view(groups, n, groups, n)[each, :, each])[0]
        mixed = alone @ follows
        block = torch.cat([torch.cat([alone, mixed], 2), torch.cat([mixed.mT, left + follows.mT @ mixed], 2)], 1)
        total[each[:, None, None], order[:, :, None], order[:, None, :]] += block
    blocks = (total / count).permute(1, 2, 0).float()
    return torch.where(torch.isfinite(blocks), blocks, own).contiguous()


def swap_and_refit(
    weight: Tensor, codes: Tensor, gram: Tensor, blocks: Tensor, pattern: NMPattern, sweeps: int = SWEEPS
) -> tuple[Tensor, Tensor, Tensor]:
    """Descend on the error after a refit by swaps within groups, then refit; the error of no row rises.

    Args:
        weight: dense, float32, bfloat16 or float16 [out, K].
        codes: group codes [out, K / M] to start from.
        gram: symmetric positive definite float32 [K, K], in the order of ``by_place``.
        blocks: of ``conditional_blocks``, of these or more rows.
        pattern: of the codes.
        sweeps: at most.

    Returns:
        (group codes [out, K / M]; weight [out, K] in its dtype with refitted kept values, dense where dropped; float32
        [out, 2], the error of each row before and after).
    """
    rows = max(PIECE // weight.shape[1], 1)
    pieces = [
        _swap_and_refit(w, code, gram, blocks, pattern, sweeps)
        for w, code in zip(weight.split(rows), codes.split(rows), strict=True)
    ]
    return tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))


def _swap_and_refit(weight: Tensor, codes: Tensor, gram: Tensor, blocks: Tensor, pattern: NMPattern, sweeps: int):
    rows = len(codes)
    ordered = to_places(weight, pattern.m)
    dense = ordered.float()
    found, fitted = _descend(dense, codes, gram, blocks, pattern, sweeps)
    kept = kept_of(found, pattern.m).view(rows, -1)
    fitted, _ = conjugate_gradients(dense, fitted, kept, gram)
    fitted = fitted.to(weight.dtype)
    before = row_errors(dense - dense * kept_of(codes, pattern.m).view(rows, -1), gram)
    after = row_errors(dense - fitted.float() * kept, gram)
    # false for what is not finite, too
    better = (after < before)[:, None]
    refitted = torch.where(better & (kept > 0), fitted, ordered)
    errors = torch.stack([before, torch.where(better[:, 0], after, before)], 1)
    return torch.where(better, found, codes), from_places(refitted, pattern.m), errors


def _descend(dense: Tensor, codes: Tensor, gram: Tensor, blocks: Tensor, pattern: NMPattern, sweeps: int):
    """(group codes, refitted kept values, zero where dropped), on rows in the order of ``by_place``."""
    rows, groups = codes.shape
    n, m = pattern.n, pattern.m

    def refitted(start: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fitted, product = conjugate_gradients(dense, start, kept, gram, ITERATIONS)
        return fitted, product, ((dense - fitted) * product).sum(1)

    kept = kept_of(codes, m).view(rows, -1)
    fitted, product, error = refitted(dense * kept, kept)
    curvature = blocks.diagonal(dim1=0, dim2=1).T.reshape(-1)
    count = torch.full((rows,), max(1, groups // FIRST_SHARE), device=dense.device)
    for _ in range(sweeps):
        dropped_product = product * (1 - kept)
        # what each dropped value would be, were it kept and nothing else of its group changed
        values = torch.addcdiv(fitted, dropped_product, curvature)
        change, swap = ops.best_swaps(
            values.view(rows, m, groups), -dropped_product.view(rows, m, groups), codes, blocks, n, m
        )
        swap = torch.where(lowest(change, count), swap, 0)
        if not swap.any():
            break
        swapped = kept_of(codes ^ swap, m).view(rows, -1)
        *found, fallen = refitted(values * swapped, swapped)
        accepted = fallen < (1 - LEAST_FALL) * error
        count = torch.where(accepted, count, count // 2)
        error = torch.where(accepted, fallen, error)
        accepted = accepted[:, None]
        codes = torch.where(accepted, codes ^ swap, codes)
        kept, fitted, product = (
            torch.where(accepted, new, old) for new, old in zip((swapped, *found), (kept, fitted, product), strict=True)
        )
    return codes, fitted
