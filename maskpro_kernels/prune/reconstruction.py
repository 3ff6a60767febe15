"""Masks that reconstruct the outputs of each layer, by swaps of kept with dropped weights.

For inputs X of a layer, H = X^T X, and a row w of its weight under a mask m, the squared error of the outputs is E(m) =
d H d^T with d = w * m - w. A closed form gives the swap of each group that lowers E most, for all groups at once.
``swap_descent`` applies many swaps together as long as E falls. SparseSwaps (arXiv 2512.10922) descends on the same
error.

With a refit of weights the error is that after the kept values are refitted to a target t (``swap_and_refit``). For the
dropped set D and B = H^-1 it is E(S) = t_D B_DD^-1 t_D^T. With the refitted row v and g = (t - v) H, dropping i raises
it by v_i^2 / (H_SS^-1)_ii, and keeping j lowers it by g_j^2 / (H_jj - H_jS H_SS^-1 H_Sj). docs/mathematics.md derives
these and the cost of a swap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..functional.checks import check_codes, check_one_of
from ..ops.pattern import NMPattern
from .calibration import Moments, calls_of, layer_by_layer, masks_of
from .refit import DAMPING, FITS, PIECE, conjugate_gradients, refit_rows, row_errors, target_of, target_shift

# At first, one in FIRST_SHARE of a row's groups may swap together
FIRST_SHARE = 16
# E must fall by this fraction, so that rounding does not count as progress
LEAST_FALL = 1e-6
# On a language model's layers they lower the error by 80 to 90% of what 50 sweeps do
SWEEPS = 16
# With a refit of weights they lower the error by more than 90% of what twice as many do
REFITTED_SWEEPS = 8
# Iterations of the refit after the swaps of a sweep. With fewer, its remaining error hides that of the swaps
ITERATIONS = 10
# Rows whose masks the conditional blocks average over. More do not lower the error of a language model's layers
SAMPLED_ROWS = 8


class Reconstruction(NamedTuple):
    """Group codes [out, K / M] by name, and with a refit new tensors of weights [out, K] by name."""

    codes: dict[str, Tensor]
    weights: dict[str, Tensor]


@torch.no_grad()
def reconstruct(model: nn.Module, layers: Mapping[str, nn.Module], codes: Mapping[str, Tensor],
                pattern: str | NMPattern, calibration: Iterable, *, refit: str = "none",
                progress: Callable[[int, int], None] | None = None) -> Reconstruction:  # fmt: skip
    """Compute masks whose layers have outputs close to those of the dense weights, on calibration inputs.

    It visits the layers in the order in which they run. Layers with the same input tensor share its Gram matrix.

    Args:
        model: the model of ``layers``; its weights stay unchanged.
        layers: nn.Linear or similar modules, by name.
        codes: group codes to start from, by the same names.
        pattern: "N:M" or NMPattern.
        calibration: batches for the model, each a tensor, a tuple or a mapping.
        refit: "scales" or "weights" refit each layer after its swaps; later layers get inputs from refitted ones. With
            "weights" the swaps take the refit into account, see ``swap_and_refit``.
        progress: called with (layers done, layers in all) before the first layer and after each.

    Warns:
        UserWarning: names experts without a token, which keep their codes and weights.

    Raises:
        TypeError, ValueError: an argument is not as above, there is no batch, or another layer gets no input.
    """
    pattern = NMPattern(pattern)
    check_one_of("refit", refit, ("none", *FITS))
    calls = calls_of(calibration)
    masks = masks_of(model, layers, codes, dict.fromkeys(layers, pattern))

    def visit(names: Sequence[str], moments: Moments) -> Iterator[None]:
        ordered, group_blocks = by_place(moments.gram, pattern.m, DAMPING)
        shift = target_shift(moments)
        if shift is not None:
            shift, _ = by_place(shift, pattern.m)
        swapped = partial(descend_rows, gram=ordered, blocks=group_blocks, pattern=pattern, sweeps=SWEEPS)

        def fitted(weight: Tensor, codes: Tensor) -> list[Tensor]:
            kept = kept_of(codes, pattern.m).view(weight.shape) > 0
            fitted_rows, _ = refit_rows(to_places(weight, pattern.m), kept, ordered, FITS[refit], shift)
            return [from_places(fitted_rows, pattern.m)]

        for name in names:
            weight = masks.dense(name)
            layer_codes = masks.whole_codes(name)
            refitted = None
            if refit == "weights":
                blocks = conditional_blocks(layer_codes, ordered, pattern)
                both = partial(swap_and_refit, gram=ordered, blocks=blocks, pattern=pattern, shift=shift)
                layer_codes, refitted, _ = masks.by_rows(both, weight, layer_codes)
            else:
                layer_codes, _ = masks.by_rows(swapped, weight, layer_codes)
                if refit != "none":
                    (refitted,) = masks.by_rows(fitted, weight, layer_codes)
            masks.put(name, layer_codes, refitted)
            yield

    unvisited = "keep their masks and weights"
    layer_by_layer(model, layers, calls, masks, visit, unvisited, progress, with_dense=refit != "none")
    return Reconstruction(masks.codes, masks.weights)


def swap_descent(
    weight: Tensor, codes: Tensor, gram: Tensor, pattern: str | NMPattern, sweeps: int = SWEEPS
) -> tuple[Tensor, Tensor]:
    """Lower the reconstruction error of each row by swaps within groups; no row's error rises.

    A sweep applies the best swaps of each row together, at first in one of 16 groups. If they do not lower the row's
    error, none is applied, and the next sweep tries half as many. A row is done when its single best swap does not
    help.

    Args:
        weight: [out, K], K divisible by M.
        codes: group codes [out, K / M] to start from.
        gram: symmetric positive semidefinite float32 [K, K].
        pattern: "N:M" or NMPattern.
        sweeps: the most sweeps of a row.

    Returns:
        (group codes [out, K / M]; decrease of each row's error, float32 [out]).

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    pattern = NMPattern(pattern)
    check_codes("codes", codes, pattern, weight)
    k = weight.shape[1]
    if gram.shape != (k, k) or gram.dtype != torch.float32 or gram.device != weight.device:
        raise ValueError(
            f"gram: expected a float32 tensor [{k}, {k}] on {weight.device}, "
            f"got {list(gram.shape)} of {gram.dtype} on {gram.device}"
        )
    return descend_rows(weight, codes, *by_place(gram, pattern.m), pattern, sweeps)


def by_place(gram: Tensor, m: int, damping: float = 0.0) -> tuple[Tensor, Tensor]:
    """(matrix [K, K] with columns and rows in the order [M, K / M], its diagonal blocks [M, M, K / M]).

    It adds ``damping`` times the mean of the diagonal to the diagonal of this copy.
    """
    groups = len(gram) // m
    ordered = gram.view(groups, m, groups, m).permute(1, 0, 3, 2).clone(memory_format=torch.contiguous_format)
    ordered = ordered.view(gram.shape)
    if damping:
        ordered.diagonal().add_(damping * gram.diagonal().mean())
    return ordered, ordered.view(m, groups, m, groups).diagonal(dim1=1, dim2=3).contiguous()


def to_places(weight: Tensor, m: int) -> Tensor:
    """Reorder the columns of a weight [out, K] like those of ``by_place``."""
    return weight.view(len(weight), -1, m).transpose(1, 2).reshape(weight.shape)


def from_places(weight: Tensor, m: int) -> Tensor:
    """Inverse of ``to_places``."""
    return weight.view(len(weight), m, -1).transpose(1, 2).reshape(weight.shape)


def descend_rows(
    weight: Tensor, codes: Tensor, gram: Tensor, blocks: Tensor, pattern: NMPattern, sweeps: int
) -> tuple[Tensor, Tensor]:
    """``swap_descent`` with a Gram matrix from ``by_place``."""
    rows = max(PIECE // weight.shape[1], 1)
    pieces = [
        _descend(w, code, gram, blocks, pattern, sweeps)
        for w, code in zip(weight.detach().split(rows), codes.split(rows), strict=True)
    ]
    return torch.cat([code for code, _ in pieces]), torch.cat([fall for _, fall in pieces])


def kept_of(codes: Tensor, m: int) -> Tensor:
    """Mask of codes as 1.0 and 0.0, [rows, M, K / M]."""
    bits = torch.arange(m, device=codes.device, dtype=codes.dtype)
    return (codes[:, None] >> bits[:, None] & 1).float()


def _descend(weight: Tensor, codes: Tensor, gram: Tensor, blocks: Tensor, pattern: NMPattern, sweeps: int):
    rows, groups = codes.shape
    # weights of one place in their groups are contiguous, so that nothing below strides
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
    """Mask of the groups with the ``count`` lowest changes of their row, only changes below zero."""
    most = int(count.max())
    if most == 0:
        return torch.zeros_like(change, dtype=torch.bool)
    value, where = change.topk(most, dim=1, largest=False)
    wanted = (torch.arange(most, device=change.device) < count[:, None]) & (value < 0)
    return torch.zeros_like(change, dtype=torch.bool).scatter_(1, where, wanted)


def conditional_blocks(codes: Tensor, gram: Tensor, pattern: NMPattern) -> Tensor:
    """Block of H for each group, float32 [M, M, K / M], given that the kept values of other groups are refitted.

    It is the Schur complement T_g = H_gg - H_gS H_SS^-1 H_Sg, where S is the kept set outside of group g. It depends
    little on the row, so this is the mean over a few rows at equal distances. H_gg replaces numbers that are not
    finite.

    Args:
        codes: group codes [out, K / M].
        gram: symmetric positive definite float32 [K, K], in the order of ``by_place``.
        pattern: of the codes.
    """
    rows, groups = codes.shape
    n = pattern.n
    m = pattern.m
    diagonal_blocks = gram.view(m, groups, m, groups).diagonal(dim1=1, dim2=3)
    by_group = diagonal_blocks.permute(2, 0, 1).double()
    each = torch.arange(groups, device=gram.device)
    total = torch.zeros_like(by_group)
    count = min(SAMPLED_ROWS, rows)
    for index in range(count):
        kept = kept_of(codes[index * rows // count][None], m)[0].T > 0
        order = torch.cat([kept.nonzero()[:, 1].view(groups, n), (~kept).nonzero()[:, 1].view(groups, m - n)], 1)
        s, d = ((order[:, part] * groups + each[:, None]).flatten() for part in (slice(n), slice(n, m)))
        of_kept = gram[s].double()
        # not by Cholesky: the matrix of a layer with zeros as inputs is zero
        inverse = torch.linalg.inv_ex(of_kept[:, s])[0]
        across = of_kept[:, d]
        follows = (inverse @ across).view(-1, groups, m - n)
        of_dropped = by_group[each[:, None, None], order[:, n:, None], order[:, None, n:]]
        complement = of_dropped - across.T.view(groups, m - n, -1) @ follows.transpose(0, 1)
        follows = follows.view(groups, n, groups, m - n)[each, :, each]
        # the formula for the inverse of a block matrix, from H_SS^-1 and H_DD - H_DS H_SS^-1 H_SD
        alone = torch.linalg.inv_ex(inverse.view(groups, n, groups, n)[each, :, each])[0]
        mixed = alone @ follows
        upper = torch.cat([alone, mixed], 2)
        lower = torch.cat([mixed.mT, complement + follows.mT @ mixed], 2)
        block = torch.cat([upper, lower], 1)
        total[each[:, None, None], order[:, :, None], order[:, None, :]] += block
    blocks = (total / count).permute(1, 2, 0).float()
    return torch.where(torch.isfinite(blocks), blocks, diagonal_blocks).contiguous()


def swap_and_refit(
    weight: Tensor, codes: Tensor, gram: Tensor, blocks: Tensor, pattern: NMPattern, sweeps: int = REFITTED_SWEEPS,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Lower the error after a refit by swaps within groups, then refit; no row's error rises.

    Args:
        weight: dense, float32, bfloat16 or float16 [out, K].
        codes: group codes [out, K / M] to start from.
        gram, pattern: as for ``conditional_blocks``.
        blocks: from ``conditional_blocks``, of these or more rows.
        sweeps: the most sweeps.
        shift: see ``target_shift``, in the order of ``by_place``.

    Returns:
        (group codes [out, K / M]; weight [out, K] in its dtype with refitted kept values and dense dropped values;
        float32 [out, 2], the error of each row before and after).
    """
    pieces = []
    rows = max(PIECE // weight.shape[1], 1)
    for w, start in zip(weight.split(rows), codes.split(rows), strict=True):
        ordered = to_places(w, pattern.m)
        dense = ordered.float()
        target = target_of(dense, shift)
        swapped_codes, fitted = _descend_refitted(target, start, gram, blocks, pattern, sweeps)
        kept = kept_of(swapped_codes, pattern.m).view(dense.shape)
        fitted = conjugate_gradients(target, fitted, kept, gram)[0].to(w.dtype)
        before = row_errors(target - dense * kept_of(start, pattern.m).view(dense.shape), gram)
        after = row_errors(target - fitted.float() * kept, gram)
        # also false for NaN
        better = (after < before)[:, None]
        refitted = torch.where(better & (kept > 0), fitted, ordered)
        errors = torch.stack([before, torch.where(better[:, 0], after, before)], 1)
        pieces.append((torch.where(better, swapped_codes, start), from_places(refitted, pattern.m), errors))
    return tuple(torch.cat(tensors) for tensors in zip(*pieces, strict=True))


def _descend_refitted(target: Tensor, codes: Tensor, gram: Tensor, blocks: Tensor, pattern: NMPattern, sweeps: int):
    """(group codes, refitted kept values with zeros elsewhere) for rows in the order of ``by_place``."""
    rows, groups = codes.shape
    n = pattern.n
    m = pattern.m

    def refitted(start: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fitted, product = conjugate_gradients(target, start, kept, gram, ITERATIONS)
        return fitted, product, ((target - fitted) * product).sum(1)

    kept = kept_of(codes, m).view(rows, -1)
    fitted, product, error = refitted(target * kept, kept)
    curvature = blocks.diagonal(dim1=0, dim2=1).T.reshape(-1)
    count = torch.full((rows,), max(1, groups // FIRST_SHARE), device=target.device)
    for _ in range(sweeps):
        dropped_product = product * (1 - kept)
        # the value of each dropped weight if it were kept and nothing else of its group changed
        values = torch.addcdiv(fitted, dropped_product, curvature)
        change, swap = ops.best_swaps(
            values.view(rows, m, groups), -dropped_product.view(rows, m, groups), codes, blocks, n, m
        )
        swap = torch.where(lowest(change, count), swap, 0)
        if not swap.any():
            break
        swapped = kept_of(codes ^ swap, m).view(rows, -1)
        new_fitted, new_product, new_error = refitted(values * swapped, swapped)
        accepted = new_error < (1 - LEAST_FALL) * error
        count = torch.where(accepted, count, count // 2)
        error = torch.where(accepted, new_error, error)
        accepted = accepted[:, None]
        codes = torch.where(accepted, codes ^ swap, codes)
        kept = torch.where(accepted, swapped, kept)
        fitted = torch.where(accepted, new_fitted, fitted)
        product = torch.where(accepted, new_product, product)
    return codes, fitted
