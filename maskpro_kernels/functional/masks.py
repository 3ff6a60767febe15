"""Masks: draw, top-N, codes, log-probability, and the update of the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from .. import ops
from ..ops import philox
from ..ops.pattern import NMPattern
from .checks import (
    CounterKeywords,
    Scalar,
    as_codes,
    check_codes,
    check_int,
    check_like,
    check_no_overlap,
    coefs_and_draws,
    counter_of,
    describe,
    drawn_from,
    inverse_of,
    matrix_of,
    stacked,
)


def sample_mask(
    logits: Tensor, pattern: str | NMPattern, *, temperature: float = 1.0, **counter: Unpack[CounterKeywords]
) -> Tensor:
    """Draw N of every M weights without replacement from softmax(logits / temperature).

    Gumbel-top-N: keep the N weights with the largest logit / temperature + noise. The draw is a pure function of the
    logits and of (seed, step, layer, draw, group index), on every device. Noise spans [-3.13, 22.87]: no draw crosses a
    gap above 26, and rates are exact to 1% up to a gap of 21.

    Args:
        logits: float32, bfloat16 or float16 [..., K], K divisible by M, finite.
        pattern: "N:M" or NMPattern.
        temperature: in [1e-30, 1e30].
        counter: keywords, each an int or a 0-dim int64 tensor: ``seed`` of 64 bits; ``step`` = 0 in [0, 2**32);
            ``layer`` = 0, an id in [0, 2**32): two layers with the same id draw the same noise; ``draw`` = 0, an id in
            [0, 2**16) for several draws in a step. For a shard also the ints ``group_offset`` = 0, the index of its
            first group in the whole layer, and ``group_row_stride``, the groups in a row of the whole layer (default:
            of the given logits), see ``shard_counter``. Tensors are checked on the CPU alone. On another device a step
            is clamped to its range, and layer and draw must be in theirs.

    Returns:
        Group codes [..., K / M]: bit i is set where weight i of the group is kept; uint8 for M <= 8,
        int32 above.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    pattern = NMPattern(pattern)
    mask = drawn_from(logits, pattern, temperature, counter)
    return ops.codes_under(mask).view(*logits.shape[:-1], logits.shape[-1] // pattern.m)


def sample_masked_weight(weight: Tensor, logits: Tensor, pattern: str | NMPattern, *,
                         temperature: float = 1.0, **counter: Unpack[CounterKeywords]) -> Tensor:  # fmt: skip
    """Mask a weight as ``sample_mask`` draws from the same arguments, with exact zeros for dropped weights.

    Args:
        weight: float32, bfloat16 or float16, with the shape and device of ``logits``. Gradients flow to it.
        logits and the others: as for ``sample_mask``.

    Returns:
        Tensor like ``weight``, contiguous.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    pattern = NMPattern(pattern)
    mask = drawn_from(logits, pattern, temperature, counter)
    check_like("weight", weight, "logits", logits)
    mask = mask._replace(tensor=mask.tensor.detach())
    return ops.masked_weight(matrix_of("weight", weight, pattern), mask).view(weight.shape)


def shard_counter(pattern: str | NMPattern, in_features: int, *, row: int = 0, column: int = 0) -> dict[str, int]:
    """Place of a shard in its layer, as keywords of the functions that draw and of ``MaskedLinear``.

    Args:
        pattern: "N:M" or NMPattern.
        in_features: K of the whole layer, divisible by M.
        row: index in the whole layer of the shard's first row.
        column: index in the whole layer of the shard's first column, divisible by M.

    Returns:
        ``group_offset`` and ``group_row_stride``.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    pattern = NMPattern(pattern)
    check_int("in_features", in_features, philox.MAX_GROUPS * pattern.m + 1)
    if in_features == 0 or in_features % pattern.m:
        raise ValueError(f"in_features: expected an int divisible by {pattern.m}, above 0, got {in_features}")
    check_int("row", row, philox.MAX_GROUPS)
    check_int("column", column, in_features)
    if column % pattern.m:
        raise ValueError(f"column: expected an int divisible by {pattern.m}, so that no group is cut, got {column}")
    stride = in_features // pattern.m
    return {"group_offset": row * stride + column // pattern.m, "group_row_stride": stride}


def top_n_mask(scores: Tensor, pattern: str | NMPattern) -> Tensor:
    """Keep the N largest scores of each group; of equal scores those with the lower index.

    Args:
        scores: float32, bfloat16 or float16 [..., K], K divisible by M, no NaN.
        pattern: "N:M" or NMPattern.

    Returns:
        Group codes [..., K / M].

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    pattern = NMPattern(pattern)
    codes = ops.top_n_mask(matrix_of("scores", scores, pattern), pattern.n, pattern.m)
    return codes.view(*scores.shape[:-1], scores.shape[-1] // pattern.m)


def pack_mask(mask: Tensor, pattern: str | NMPattern) -> Tensor:
    """Pack a bool mask [..., K] into group codes [..., K / M].

    Raises:
        TypeError: if ``mask`` is not a bool tensor.
        ValueError: if K is not divisible by M, or a group does not keep exactly N.
    """
    pattern = NMPattern(pattern)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.layout is not torch.strided:
        raise TypeError(f"mask: expected a dense bool tensor, got {describe(mask)}")
    return as_codes("mask", mask, pattern, mask)


def expand_mask(codes: Tensor, pattern: str | NMPattern) -> Tensor:
    """Expand group codes [..., K / M] to a bool mask [..., K].

    Raises:
        TypeError: if ``codes`` does not have the pattern's code dtype.
        ValueError: if ``codes`` has no dimension.
    """
    pattern = NMPattern(pattern)
    check_codes("codes", codes, pattern)
    bits = torch.arange(pattern.m, device=codes.device, dtype=codes.dtype)
    return (codes[..., None] >> bits & 1).to(torch.bool).flatten(-2)


def mask_log_prob(logits: Tensor, codes: Tensor, pattern: str | NMPattern) -> Tensor:
    """Log-probability of each group's mask S as drawn from softmax(logits), in any order; differentiable in the logits.

    Exact, without cancellation. Up to N = 4 by recursion over the subsets of S. Above by quadrature over the arrival
    time of the first dropped weight, with 150 to 300 nodes: slow, for checks rather than for training. Finite logits
    give finite results: the distance of a logit from its group's largest and log p(S) are clamped to finite float32.

    Args:
        logits: float32, bfloat16 or float16 [..., K], K divisible by M, finite.
        codes: group codes [..., K / M] that keep exactly N. This is not checked: the check would wait for the device.
            Or a bool mask [..., K], which is checked.
        pattern: "N:M" or NMPattern.

    Returns:
        float32 [..., K / M].

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    pattern = NMPattern(pattern)
    matrix = matrix_of("logits", logits, pattern)
    codes = as_codes("codes", codes, pattern, logits)
    flat = codes.reshape(matrix.shape[0], matrix.shape[1] // pattern.m).contiguous()
    return ops.mask_log_prob(matrix, flat, pattern.n, pattern.m, 1.0).view(codes.shape)


def score_update_(logits: Tensor, coef: float | Tensor | Sequence[float | Tensor], *,
                  pattern: str | NMPattern, temperature: float = 1.0, draw: Scalar | Sequence[Scalar] = 0,
                  **counter: Unpack[CounterKeywords]) -> Tensor:  # fmt: skip
    """Update logits in place: logits -= sum of coef * score. The masks are drawn again from their counters.

    The score is the gradient of log p(S) in the logits at the temperature of the draw. Up to N = 4 it is exact. Above,
    it is an unbiased estimate by the arrival times of the draw: its mean given S is the exact score. All scores are
    taken at the given logits, which are read once and written once. 16-bit logits are rounded stochastically, once, so
    small updates are right on average.

    Args:
        logits: float32, bfloat16 or float16 [..., K], K divisible by M; changed.
        coef: float or 0-dim tensor, or with K draws a sequence of K of them. Their absolute values sum to a finite
            float32. A tensor on a GPU is not checked: if it is not finite, neither are the logits.
        draw: id of the draw, or a sequence of distinct ones.
        pattern, temperature, counter: as for ``sample_mask``.

    Returns:
        ``logits``.

    Raises:
        TypeError, ValueError: an argument is not as above. The logits are then unchanged.
    """
    pattern = NMPattern(pattern)
    matrix = matrix_of("logits", logits, pattern).detach()
    if not logits.is_contiguous():
        check_no_overlap("logits", logits)
    # dynamo cannot trace ``is_inference``, and refuses such a tensor itself
    if not torch.compiler.is_compiling() and logits.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError("logits: expected a tensor that may change, got one made in inference mode, outside of it")
    inverse = inverse_of(temperature)
    coefs, draws = coefs_and_draws(coef, draw, inverse)
    counter_of_draws = counter_of(matrix, pattern, **counter)._replace(draw=stacked(draws, torch.int64, logits.device))
    with torch.no_grad():
        factors = stacked(coefs, torch.float32, logits.device)
        ops.score_update_(matrix, factors, pattern.n, pattern.m, inverse, counter_of_draws)
        if not logits.is_contiguous():
            logits.copy_(matrix.view(logits.shape))
    return logits
