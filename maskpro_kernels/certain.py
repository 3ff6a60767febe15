"""Draws without logarithms: most groups of a sharp mask keep their N largest logits whatever the noise.

Noise lies between LEAST_NOISE and a ``ceiling`` that a byte tells for each group, so a draw keeps the N largest logits
unless the largest dropped one, with the ceiling added, reaches the smallest kept one with the least noise added.
Rounded addition is monotone, so the comparison holds for the rounded keys of ``reference`` as well. Functions take
groups as ``reference`` does, and say which groups are undecided: those have to be drawn.
"""

from __future__ import annotations

import functools

import torch

from . import philox, reference

# Below gumbel(2**32 - 1) = -ln(33 ln 2) = -3.13000
LEAST_NOISE = -3.1301
# -ln(2^-30) and the exponent's bias of 127, in nats, and slack for the roundings below
BOUND_AT_ZERO = 157 * reference.LN2 + 1e-3
# The kernels bound the noise of the dropped weights alone, by all bits
NATS_PER_BIT_PATTERN = reference.LN2 / (1 << 23)

# Of the bit pattern of a float: its exponent and three bits of its mantissa
LEVEL_SHIFT = 20
NATS_PER_LEVEL = reference.LN2 / 8
# Level 0: above gumbel(0) = 33 ln 2 = 22.874
LOWEST_PATTERN = 127 * 8 - 25
HIGHEST_CEILING = BOUND_AT_ZERO - LOWEST_PATTERN * NATS_PER_LEVEL


def noise_levels(words):
    """The level of the largest noise of each group, uint8; ``words`` are columns of 32-bit integers in int64.

    gumbel(r) <= -ln(u) with u = (r + 1/2) / 2^32, and the bit pattern of a float, read as an integer, is a piecewise
    linear lower bound of its log2 (Schraudolph 1999).
    """
    least = functools.reduce(torch.minimum, words)
    quarter = (least >> 2).to(torch.int32).to(torch.float32)
    return torch.clamp((quarter.view(torch.int32) >> LEVEL_SHIFT) - LOWEST_PATTERN, 0, 255).to(torch.uint8)


def group_noise_levels(group, seed, step, layer, draw, *, m):
    """``noise_levels`` of a draw of groups of M."""
    return noise_levels(philox.group_words(group, m, philox.STREAM_DRAW, seed, step, layer, draw))


def ceiling(levels):
    """An upper bound of the noise of groups at those levels."""
    return HIGHEST_CEILING - levels.to(torch.float32) * NATS_PER_LEVEL


def decided(z, kept, levels):
    """(where no weight that ``kept``, the N largest of ``z``, drops can be drawn, the smallest kept of each group)."""
    largest_dropped, smallest_kept = reference.extremes(z, kept)
    return largest_dropped + ceiling(levels) < smallest_kept + LEAST_NOISE, smallest_kept


def flags(settled):
    """uint8 1 where not ``settled``, for what looks for the few ones among many bytes."""
    return torch.where(settled, 0, 1).to(torch.uint8)


def group_expected_mask(logits, levels, inv_temperature, n):
    """(kept columns of the N largest, ``flags`` where a draw might differ) of groups of logits."""
    z = reference.scaled(reference.columns(logits), inv_temperature)
    kept = reference.top_n(z, n)
    settled, _ = decided(z, kept, levels)
    return kept, flags(settled)


def expected_terms(z, levels, coef, inv_temperature, n):
    """(``reference.score_terms`` where the draw is certain, where it is), N <= EXACT_SCORE_MAX_N."""
    kept = reference.top_n(z, n)
    settled, smallest_kept = decided(z, kept, levels)
    scale = coef * inv_temperature
    # of the N largest, none is dropped above the smallest one kept
    scores = reference.exact_score(z, kept, n, centre=smallest_kept)
    return [s * scale for s in scores], settled


def group_expected_terms(logits, levels, coef, inv_temperature, *, n):
    """(columns of ``reference.score_terms`` where the draw is certain, ``flags`` elsewhere) of groups of logits."""
    z = reference.scaled(reference.columns(logits), inv_temperature)
    terms, settled = expected_terms(z, levels, coef, inv_temperature, n)
    return terms, flags(settled)


def group_expected_update(logits, levels, coef, inv_temperature, *, n):
    """(columns of ``reference.group_updated_logits`` of a draw where it is certain, else of the logits; ``flags``)."""
    xs = reference.columns(logits)
    z = reference.scaled(xs, inv_temperature)
    terms, settled = expected_terms(z, levels, coef[0], inv_temperature, n)
    new = [torch.where(settled, x - t, x) for x, t in zip(xs, terms, strict=True)]
    return new, flags(settled)
