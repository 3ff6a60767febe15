"""Plackett-Luce: probability and score of an unordered set that is drawn without replacement, N <= 4."""

from __future__ import annotations

import functools

import torch

from .arithmetic import exp, ln, saturated
from .groups import fixed_sum

# Kept weights further than this above the centre are drawn first all but surely
EXPONENT_CLAMP = 20.0
# A constant on every 1 / s keeps products of N of them above the subnormals; it cancels in q / h
RECIPROCAL_SCALE = 4096.0
# Where a draw other than S has less than this probability, log p(S) is ln(1 - it)
NEAR_CERTAIN = 0.25
# Up to this N the score is the exact gradient of log p(S); above it, its unbiased estimate by arrival times
EXACT_SCORE_MAX_N = 4


def dropped_total(xs, kept):
    """Sum of the dropped columns in index order."""
    return fixed_sum([torch.where(k, 0.0, x) for x, k in zip(xs, kept, strict=True)])


def extremes(z, kept):
    """(largest dropped, smallest kept) scaled logit of each group."""
    dropped = [torch.where(k, -torch.inf, z_i) for z_i, k in zip(z, kept, strict=True)]
    held = [torch.where(k, z_i, torch.inf) for z_i, k in zip(z, kept, strict=True)]
    return functools.reduce(torch.maximum, dropped), functools.reduce(torch.minimum, held)


def kept_positions(kept):
    """How many weights of its group are kept before each column."""
    position = torch.zeros_like(kept[0], dtype=torch.int32)
    positions = []
    for k in kept:
        positions.append(position)
        position = position + k.to(torch.int32)
    return positions


def slot_columns(slot, n, m):
    """The columns that can be the ``slot``-th kept one of N."""
    return range(slot, m - n + slot + 1)


def gather_slots(xs, kept, positions, n):
    """The kept columns' values, in order: N columns."""
    slots = []
    for a in range(n):
        value = torch.zeros_like(xs[0])
        columns = slot_columns(a, n, len(xs))
        # the first kept column is the one that stays when all are taken from the last on
        for i in reversed(columns) if a == 0 else columns:
            here = kept[i] if a in (0, n - 1) else kept[i] & (positions[i] == a)
            value = torch.where(here, xs[i], value)
        slots.append(value)
    return slots


def scatter_slots(slots, dropped, kept, positions):
    """Columns that hold ``slots`` where kept and ``dropped`` elsewhere."""
    n, m = len(slots), len(kept)
    result = []
    for i in range(m):
        # the slots that this column can be, of which one is chosen as if it were kept
        *others, last = [a for a in range(n) if i in slot_columns(a, n, m)]
        value = slots[last]
        for a in others:
            value = torch.where(positions[i] == a, slots[a], value)
        result.append(torch.where(kept[i], value, dropped[i]))
    return result


def members(subset, n):
    return [i for i in range(n) if subset >> i & 1]


def plackett_luce_terms(z, kept, n, centre=None):
    """What the recursions over the subsets T of the kept weights need, T a bit set.

    Returns (e, sum R of the dropped e, exponents ln e, kept e by slot, RECIPROCAL_SCALE / s(T) by T,
    positions), with e = exp(min(z - centre, EXPONENT_CLAMP)) and s(T) = R + e(T) >= 1. The centre is the largest
    dropped or the smallest kept z, whichever is larger; a caller that knows it may give it. z saturates first.
    """
    z = [saturated(z_i) for z_i in z]
    if centre is None:
        largest, smallest = extremes(z, kept)
        centre = torch.maximum(largest, smallest)
    exponents = [torch.clamp(z_i - centre, max=EXPONENT_CLAMP) for z_i in z]
    e = [exp(x) for x in exponents]
    dropped_sum = dropped_total(e, kept)
    positions = kept_positions(kept)
    slots = gather_slots(e, kept, positions, n)
    sums = [dropped_sum]
    for slot in slots:
        sums += [s + slot for s in sums]
    inverse = [None] + [RECIPROCAL_SCALE / s for s in sums[1:]]
    return e, dropped_sum, exponents, slots, inverse, positions


def order_sum(inverse, n):
    """h(S) without its last factor 1 / s(S), for N >= 2.

    h(T) = sum over i in T of h(T - i), over s(T); h({}) = 1: the orders in which T can be drawn.
    """
    whole = (1 << n) - 1
    h = [None]
    for subset in range(1, whole + 1):
        smaller = [h[subset ^ (1 << i)] for i in members(subset, n) if subset != 1 << i]
        if not smaller:
            h.append(inverse[subset])
        elif subset == whole:
            h.append(fixed_sum(smaller))
        else:
            h.append(fixed_sum(smaller) * inverse[subset])
    return h[whole]


def slot_score(inverse, dropped_sum, k, n):
    """q_k(S) without its last factor 1 / s(S).

    D_k({k}) = R / s, D_k(T) = sum over i != k of D_k(T - i), over s(T);
    q_k(T) = (D_k(T) + sum over i != k of q_k(T - i)) / s(T).
    """
    whole = (1 << n) - 1
    d, q = {}, {}
    for subset in range(1, whole + 1):
        if subset >> k & 1:
            smaller = [subset ^ (1 << i) for i in members(subset, n) if i != k]
            d[subset] = (fixed_sum([d[t] for t in smaller]) if smaller else dropped_sum) * inverse[subset]
            total = fixed_sum([d[subset]] + [q[t] for t in smaller])
            q[subset] = total if subset == whole else total * inverse[subset]
    return q[whole]


def exact_score(z, kept, n, centre=None):
    """Gradient of log p(S) in the scaled logits, columns; N <= EXACT_SCORE_MAX_N.

    ``centre`` as in ``plackett_luce_terms``.

    score_k = q_k(S) / h(S) for kept k; dropped weights share minus the sum of those by their softmax.
    Every term is positive, so nothing cancels however certain the draw.
    """
    e, dropped_sum, _, _, inverse, positions = plackett_luce_terms(z, kept, n, centre)
    if n == 1:
        slot_scores = [dropped_sum * inverse[1] * (1.0 / RECIPROCAL_SCALE)]
    else:
        inverse_h = (1.0 / RECIPROCAL_SCALE) / order_sum(inverse, n)
        slot_scores = [slot_score(inverse, dropped_sum, k, n) * inverse_h for k in range(n)]
    total = fixed_sum(slot_scores)
    # dropped weights so far below that all their e are 0 share a score of 0
    present = dropped_sum > 0.0
    share = torch.where(present, total / torch.where(present, dropped_sum, 1.0), 0.0)
    return scatter_slots(slot_scores, [0.0 - e_i * share for e_i in e], kept, positions)


def exact_log_prob(z, kept, n):
    """log p(S) by the recursion over subsets, N <= EXACT_SCORE_MAX_N.

    f(T), the probability that something dropped is drawn before T is complete, is
    (R + sum over i in T of e_i f(T - i)) / s(T). Where f(S) is small, log p(S) = ln(1 - f(S)) to full
    precision; elsewhere ln h(S) + sum of ln e_i, which saturates.
    """
    _, dropped_sum, exponents, slots, inverse, _ = plackett_luce_terms(z, kept, n)
    whole = (1 << n) - 1
    f = [torch.zeros_like(dropped_sum)]
    for subset in range(1, whole + 1):
        total = dropped_sum
        for i in members(subset, n):
            total = total + slots[i] * f[subset ^ (1 << i)]
        f.append(total * inverse[subset] * (1.0 / RECIPROCAL_SCALE))
    h = inverse[whole]
    if n > 1:
        h = h * order_sum(inverse, n)
    for _ in range(n):
        h = h * (1.0 / RECIPROCAL_SCALE)
    log_prob = ln(h, h - 1.0)
    for x, k in zip(exponents, kept, strict=True):
        log_prob = log_prob + torch.where(k, x, 0.0)
    capped = torch.clamp(f[whole], max=NEAR_CERTAIN)
    return torch.where(f[whole] < NEAR_CERTAIN, ln(1.0 - capped, 0.0 - capped), saturated(log_prob))
