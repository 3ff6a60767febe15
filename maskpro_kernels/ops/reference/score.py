"""Log-probability, score, and the update of the logits by it."""

from __future__ import annotations

import torch

from .exponential_race import exponential_race_score
from .groups import columns, decode, group_index, grouped, uncolumns
from .gumbel_top_k import drawn_keys, scaled, top_n
from .plackett_luce import EXACT_SCORE_MAX_N, exact_log_prob, exact_score
from .quadrature import quadrature_log_prob, quadrature_score
from .rounding import group_round_logits


def group_mask_log_prob(logits, codes, inv_temperature, *, n):
    z = scaled(columns(logits), inv_temperature)
    kept = decode(codes, len(z))
    return exact_log_prob(z, kept, n) if n <= EXACT_SCORE_MAX_N else quadrature_log_prob(z, kept, n)


def group_mask_score(logits, codes, grad, inv_temperature, *, n):
    z = scaled(columns(logits), inv_temperature)
    kept = decode(codes, len(z))
    scores = exact_score(z, kept, n) if n <= EXACT_SCORE_MAX_N else quadrature_score(z, kept, n)
    scale = grad * inv_temperature
    return uncolumns([s * scale for s in scores])


def score_terms(z, group, coef, key, inv_temperature, n):
    """Columns of coef * score(mask of a draw), the score in the logits, not in z."""
    keys = drawn_keys(z, group, key)
    kept = top_n(keys, n)
    scores = exact_score(z, kept, n) if n <= EXACT_SCORE_MAX_N else exponential_race_score(z, keys, kept)
    # d z / d logits is 1 / temperature
    scale = coef * inv_temperature
    return [s * scale for s in scores]


def group_score_terms(logits, group, coef, key, inv_temperature, *, n):
    z = scaled(columns(logits), inv_temperature)
    return uncolumns(score_terms(z, group, coef, key, inv_temperature, n))


def group_updated_logits(logits, group, coef, key, inv_temperature, *, n):
    """float32 groups: logits less the sum over k of coef[k] * score(mask of draw draw[k])."""
    xs = [x.to(torch.float32) for x in columns(logits)]
    z = scaled(xs, inv_temperature)
    seed, step, layer, draw = key
    delta = None
    for k in range(coef.shape[0]):
        terms = score_terms(z, group, coef[k], (seed, step, layer, draw[k]), inv_temperature, n)
        delta = terms if delta is None else [d + t for d, t in zip(delta, terms, strict=True)]
    return uncolumns([x - d for x, d in zip(xs, delta, strict=True)])


def mask_log_prob(logits, codes, inv_temperature, *, n, m):
    """log p(S) of the masks with those codes, float32 [rows, K / M]."""
    return group_mask_log_prob(grouped(logits, m), codes, inv_temperature, n=n)


def mask_score(logits, codes, grad, inv_temperature, *, n, m):
    """Gradient of sum(grad * log p(S)) in the logits, float32 [rows, K]; grad float32 [rows, K / M]."""
    return group_mask_score(grouped(logits, m), codes, grad, inv_temperature, n=n).view(logits.shape)


def score_update_(logits, coef, counter, inv_temperature, *, n, m):
    """logits [rows, K] -= sum over k of coef[k] * score(mask of draw draw[k]), in place.

    All scores are taken at the given logits; coef float32 [K], the counter's draw int64 [K]. 16-bit logits
    are rounded stochastically, once, with words of the rounding stream under the first draw's id.
    """
    group = group_index(logits, counter, m)
    new = group_updated_logits(grouped(logits, m), group, coef, counter.key, inv_temperature, n=n)
    if logits.dtype != torch.float32:
        new = group_round_logits(new, group, counter._replace(draw=counter.draw[0]).key, dtype=logits.dtype)
    logits.copy_(new.view(logits.shape))
