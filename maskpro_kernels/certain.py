"""Draws without logarithms: most groups of a sharp mask keep their N largest logits whatever the noise.

Noise lies between LEAST_NOISE and ``noise_bound``, so a draw keeps the N largest logits unless some
dropped one, with its bound added, reaches the smallest kept one with the least noise added. Rounded
addition is monotone, so the comparison holds for the rounded keys of ``reference`` as well. Functions
take groups as ``reference`` does, and say which groups are undecided: those have to be drawn.
"""

from __future__ import annotations

import torch

from . import philox, reference

# Below gumbel(2**32 - 1) = -ln(33 ln 2) = -3.13000
LEAST_NOISE = -3.1301
# -ln(2^-30) and the exponent's bias of 127, in nats, and slack for the roundings below
BOUND_AT_ZERO = 157 * reference.LN2 + 1e-3
NATS_PER_BIT_PATTERN = reference.LN2 / (1 << 23)


def noise_bound(r):
    """An upper bound of gumbel(r), r 32-bit integers in int64; within 0.1 of it for 2^7 <= r < 2^28.

    -ln(-ln(1 - u)) <= -ln(u), and the bit pattern of a float, read as an integer, is a piecewise linear
    lower bound of its log2 (Schraudolph 1999).
    """
    quarter = (r >> 2).to(torch.int32).to(torch.float32)
    return BOUND_AT_ZERO - quarter.view(torch.int32).to(torch.float32) * NATS_PER_BIT_PATTERN


def smallest_kept(z, kept):
    """The smallest kept scaled logit of each group."""
    return reference.extremes(z, kept)[1]


def decided(z, kept, words):
    """Where no weight that ``kept``, the N largest of ``z``, drops can be drawn."""
    bounds = [torch.where(k, -torch.inf, z_i + noise_bound(r)) for z_i, k, r in zip(z, kept, words, strict=True)]
    highest = bounds[0]
    for bound in bounds[1:]:
        highest = torch.maximum(highest, bound)
    return highest < smallest_kept(z, kept) + LEAST_NOISE


def flags(settled):
    """uint8 1 where not ``settled``, for what looks for the few ones among many bytes."""
    return torch.where(settled, 0, 1).to(torch.uint8)


def expected_mask(z, group, seed, step, layer, draw, n):
    """(kept columns of the N largest, where they are what is drawn)."""
    kept = reference.top_n(z, n)
    words = philox.group_words(group, len(z), philox.STREAM_DRAW, seed, step, layer, draw)
    return kept, decided(z, kept, words)


def group_expected_mask(logits, group, seed, step, inv_temperature, layer, draw, n):
    """(kept columns of the N largest, ``flags`` where a draw might differ) of groups of logits."""
    z = reference.scaled(reference.columns(logits), inv_temperature)
    kept, settled = expected_mask(z, group, seed, step, layer, draw, n)
    return kept, flags(settled)


def expected_terms(z, group, seed, step, coef, draw, inv_temperature, layer, n):
    """(``reference.score_terms`` where the draw is certain, where it is), N <= EXACT_SCORE_MAX_N."""
    kept, settled = expected_mask(z, group, seed, step, layer, draw, n)
    scale = coef * inv_temperature
    # of the N largest, none is dropped above the smallest one kept
    scores = reference.exact_score(z, kept, n, centre=smallest_kept(z, kept))
    return [s * scale for s in scores], settled


def group_expected_terms(logits, group, seed, step, coef, draw, inv_temperature, layer, *, n):
    """(columns of ``reference.score_terms`` where the draw is certain, ``flags`` elsewhere) of groups of logits."""
    z = reference.scaled(reference.columns(logits), inv_temperature)
    terms, settled = expected_terms(z, group, seed, step, coef, draw, inv_temperature, layer, n)
    return terms, flags(settled)


def group_expected_update(logits, group, seed, step, coef, draws, inv_temperature, layer, *, n):
    """(columns of ``reference.group_updated_logits`` of a draw where it is certain, else of the logits; ``flags``)."""
    xs = reference.columns(logits)
    z = reference.scaled(xs, inv_temperature)
    terms, settled = expected_terms(z, group, seed, step, coef[0], draws[0], inv_temperature, layer, n)
    new = [torch.where(settled, x - t, x) for x, t in zip(xs, terms, strict=True)]
    return new, flags(settled)
