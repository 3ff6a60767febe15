"""Swap descent: the mask of one layer is improved by swaps of a kept with a dropped weight of the same group.

For inputs X of a layer, H = X^T X, and a row w of its weight under a mask m, the squared error of the outputs is
E(m) = d H d^T with d = w * m - w. The swap of a group that lowers E most is found in closed form, for all groups at
once, and many are taken together as long as E falls. SparseSwaps (arXiv 2512.10922) descends on the same error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..functional.checks import check_codes
from ..pattern import NMPattern

# Elements of the weight that are worked on at a time; rows do not depend on each other
PIECE = 1 << 24
# One in so many of a row's groups may swap together at first
FIRST_SHARE = 16
# E has to fall by this part of itself, or rounding could pass for progress
LEAST_FALL = 1e-6
# By then the error of a language model's layers has done 80 to 90% of the fall that 50 sweeps bring
SWEEPS = 16


def swap_descent(
    weight: Tensor, codes: Tensor, gram: Tensor, pattern: str | NMPattern, sweeps: int = SWEEPS
) -> tuple[Tensor, Tensor]:
    """Descend on the reconstruction error of every row by swaps within groups; the error of no row rises.

    In a sweep every row takes its best swaps together, at first one in 16 of its groups. If the error does not fall by
    them, the row takes none of them, and half as many the next time. A row whose single best swap does not help is
    done.

    Args:
        weight: [out, K], K divisible by M.
        codes: group codes [out, K / M] to start from.
        gram: symmetric positive semidefinite float32 [K, K].
        pattern: "N:M" or NMPattern.
        sweeps: most sweeps of a row.

    Returns:
        (group codes [out, K / M]; by how much the error of each row fell, float32 [out]).

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    pattern = NMPattern(pattern)
    check_codes("codes", codes, pattern, weight)
    k = weight.shape[1]
    if not isinstance(gram, Tensor):
        raise TypeError(f"gram: expected a tensor, got {type(gram).__name__}")
    if gram.shape != (k, k) or gram.dtype != torch.float32 or gram.device != weight.device:
        raise ValueError(
            f"gram: expected a float32 tensor [{k}, {k}] on {weight.device}, "
            f"got {list(gram.shape)} of {gram.dtype} on {gram.device}"
        )
    if isinstance(sweeps, bool) or not isinstance(sweeps, int) or sweeps < 0:
        raise ValueError(f"sweeps: expected an int of at least 0, got {sweeps!r}")
    return descend_rows(weight, codes, *by_place(gram, pattern.m), pattern, sweeps)


def by_place(gram: Tensor, m: int, damping: float = 0.0) -> tuple[Tensor, Tensor]:
    """(the matrix [K, K] with columns and rows in the order of [M, K / M], its diagonal blocks [M, M, K / M]).

    ``damping`` is added to the diagonal of that copy, as a share of its mean.
    """
    groups = len(gram) // m
    ordered = gram.view(groups, m, groups, m).permute(1, 0, 3, 2).clone(memory_format=torch.contiguous_format)
    ordered = ordered.view(gram.shape)
    if damping:
        ordered.diagonal().add_(damping * gram.diagonal().mean())
    return ordered, ordered.view(m, groups, m, groups).diagonal(dim1=1, dim2=3).contiguous()


def to_places(weight: Tensor, m: int) -> Tensor:
    """A weight [out, K] with columns in the order of ``by_place``."""
    return weight.view(len(weight), -1, m).transpose(1, 2).reshape(weight.shape)


def from_places(weight: Tensor, m: int) -> Tensor:
    """The inverse of ``to_places``."""
    return weight.view(len(weight), m, -1).transpose(1, 2).reshape(weight.shape)


def descend_rows(
    weight: Tensor, codes: Tensor, gram: Tensor, blocks: Tensor, pattern: NMPattern, sweeps: int
) -> tuple[Tensor, Tensor]:
    """``swap_descent`` with a Gram matrix as ``by_place`` gives it."""
    rows = max(PIECE // weight.shape[1], 1)
    pieces = [
        _descend(w, code, gram, blocks, pattern, sweeps)
        for w, code in zip(weight.detach().split(rows), codes.split(rows), strict=True)
    ]
    return torch.cat([code for code, _ in pieces]), torch.cat([fall for _, fall in pieces])


def kept_of(codes: Tensor, m: int) -> Tensor:
    """1.0 where kept and 0.0 where dropped, [rows, M, K / M]."""
    bits = torch.arange(m, device=codes.device, dtype=codes.dtype)
    return (codes[:, None] >> bits[:, None] & 1).float()


def _descend(weight: Tensor, codes: Tensor, gram: Tensor, blocks: Tensor, pattern: NMPattern, sweeps: int):
    rows, groups = codes.shape
    # Weights that stand at the same place of their groups lie together: nothing below strides
    w = weight.float().view(rows, groups, pattern.m).transpose(1, 2).contiguous()

    def times_gram(x):
        return (x.view(rows, -1) @ gram).view(w.shape)

    kept = kept_of(codes, pattern.m)
    difference = (kept - 1.0) * w
    product = times_gram(difference)
    error = (difference * product).sum((1, 2))
    fallen = torch.zeros_like(error)
    count = torch.full((rows,), max(1, groups // FIRST_SHARE), device=w.device)
    for _ in range(sweeps):
        change, swap = ops.best_swaps(w, product, codes, blocks, pattern.n, pattern.m)
        swap = torch.where(lowest(change, count), swap, 0)
        if not swap.any():
            break
        swapped = kept_of(codes ^ swap, pattern.m)
        step = (swapped - kept) * w
        step_product = times_gram(step)
        fall = -(step * torch.add(step_product, product, alpha=2.0)).sum((1, 2))
        accepted = fall > LEAST_FALL * (error - fallen)
        count = torch.where(accepted, count, count // 2)
        product.addcmul_(step_product, accepted[:, None, None].float())
        kept = torch.where(accepted[:, None, None], swapped, kept)
        codes = torch.where(accepted[:, None], codes ^ swap, codes)
        fallen += torch.where(accepted, fall, 0.0)
    return codes, fallen


def lowest(change: Tensor, count: Tensor) -> Tensor:
    """Which groups hold the ``count`` lowest changes of their row, of those below zero."""
    most = int(count.max())
    if most == 0:
        return torch.zeros_like(change, dtype=torch.bool)
    value, where = change.topk(most, dim=1, largest=False)
    wanted = (torch.arange(most, device=change.device) < count[:, None]) & (value < 0)
    return torch.zeros_like(change, dtype=torch.bool).scatter_(1, where, wanted)
