"""Plackett-Luce: score and log-probability of a drawn set, N <= 4."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import exp, exp_in_range, ln, saturated, saturated_columns, scaled_reciprocal
from .constants import EXPONENT_CLAMP, INVERSE_RECIPROCAL_SCALE, NEAR_CERTAIN, RECIPROCAL_SCALE, SMALLEST_NORMAL


@triton.jit
def largest_dropped(z, kept, M: tl.constexpr):
    value = tl.full(z[0].shape, float("-inf"), tl.float32)
    for i in tl.static_range(M):
        value = tl.maximum(value, tl.where(kept[i], float("-inf"), z[i]))
    return value


@triton.jit
def smallest_kept(z, kept, M: tl.constexpr):
    value = tl.full(z[0].shape, float("inf"), tl.float32)
    for i in tl.static_range(M):
        value = tl.minimum(value, tl.where(kept[i], z[i], float("inf")))
    return value


@triton.jit
def dropped_total(e, kept, M: tl.constexpr):
    """Sum of the dropped columns in index order."""
    total = tl.where(kept[0], 0.0, e[0])
    for i in tl.static_range(1, M):
        total += tl.where(kept[i], 0.0, e[i])
    return total


@triton.jit
def kept_positions(kept, M: tl.constexpr):
    """How many weights of its group are kept before each column."""
    position = tl.zeros_like(kept[0]).to(tl.int32)
    positions = ()
    for i in tl.static_range(M):
        positions = positions + (position,)
        position = position + kept[i].to(tl.int32)
    return positions


@triton.jit
def gather_slots(x, kept, positions, N: tl.constexpr, M: tl.constexpr):
    """The kept columns' values, in order: N columns."""
    slots = ()
    for a in tl.static_range(N):
        value = tl.zeros_like(x[0])
        for i in tl.static_range(a, M - N + a + 1):
            value = tl.where(kept[i] & (positions[i] == a), x[i], value)
        slots = slots + (value,)
    return slots


@triton.jit
def scatter_slots(slots, dropped, kept, positions, N: tl.constexpr, M: tl.constexpr):
    """Columns that hold ``slots`` where kept and ``dropped`` elsewhere."""
    columns = ()
    for i in tl.static_range(M):
        value = dropped[i]
        for a in tl.static_range(N):
            if i >= a and i <= M - N + a:
                value = tl.where(kept[i] & (positions[i] == a), slots[a], value)
        columns = columns + (value,)
    return columns


@triton.jit
def plackett_luce_terms(z, kept, N: tl.constexpr, M: tl.constexpr):
    """(e, sum of dropped e, ln e, kept e by slot, RECIPROCAL_SCALE / s(T) by subset T, positions)."""
    z = saturated_columns(z, M)
    centre = tl.maximum(largest_dropped(z, kept, M), smallest_kept(z, kept, M))
    exponents = ()
    e = ()
    for i in tl.static_range(M):
        exponents = exponents + (tl.minimum(z[i] - centre, EXPONENT_CLAMP),)
        e = e + (exp(exponents[i]),)
    dropped_sum = dropped_total(e, kept, M)
    positions = kept_positions(kept, M)
    slots = gather_slots(e, kept, positions, N, M)
    sums = (dropped_sum,)
    for a in tl.static_range(N):
        for subset in tl.static_range(1 << a):
            sums = sums + (sums[subset] + slots[a],)
    inverse = (dropped_sum,)
    for subset in tl.static_range(1, 1 << N):
        inverse = inverse + (tl.div_rn(tl.full(dropped_sum.shape, RECIPROCAL_SCALE, tl.float32), sums[subset]),)
    return e, dropped_sum, exponents, slots, inverse, positions


@triton.jit
def add_term(total, term, FIRST: tl.constexpr):
    """total + term, or the term alone where it is the first."""
    if FIRST:
        result = term
    else:
        result = total + term
    return result


@triton.jit
def order_sum(inverse, N: tl.constexpr):
    """h(S) without its last factor 1 / s(S), for N >= 2."""
    h = (inverse[0],)
    for subset in tl.static_range(1, 1 << N):
        value = inverse[subset]
        if (subset & (subset - 1)) != 0:
            for i in tl.static_range(N):
                if (subset >> i) & 1:
                    value = add_term(value, h[subset ^ (1 << i)], (subset & ((1 << i) - 1)) == 0)
            if subset != (1 << N) - 1:
                value = value * inverse[subset]
        h = h + (value,)
    return h[(1 << N) - 1]


@triton.jit
def slot_score(inverse, dropped_sum, K: tl.constexpr, N: tl.constexpr):
    """q_K(S) without its last factor 1 / s(S)."""
    d = (dropped_sum,)
    q = (dropped_sum,)
    for subset in tl.static_range(1, 1 << N):
        d_value = dropped_sum
        q_value = dropped_sum
        if (subset >> K) & 1:
            for i in tl.static_range(N):
                if ((subset >> i) & 1) != 0 and i != K:
                    d_value = add_term(d_value, d[subset ^ (1 << i)], (subset & ~(1 << K) & ((1 << i) - 1)) == 0)
            d_value = d_value * inverse[subset]
            q_value = d_value
            for i in tl.static_range(N):
                if ((subset >> i) & 1) != 0 and i != K:
                    q_value = q_value + q[subset ^ (1 << i)]
            if subset != (1 << N) - 1:
                q_value = q_value * inverse[subset]
        d = d + (d_value,)
        q = q + (q_value,)
    return q[(1 << N) - 1]


@triton.jit
def exact_score(z, kept, N: tl.constexpr, M: tl.constexpr):
    """Gradient of log p(S) in the scaled logits, N <= EXACT_SCORE_MAX_N; columns."""
    e, dropped_sum, exponents, slots, inverse, positions = plackett_luce_terms(z, kept, N, M)
    scores = ()
    if N == 1:
        total = dropped_sum * inverse[1] * INVERSE_RECIPROCAL_SCALE
        scores = (total,)
    else:
        scale = tl.full(dropped_sum.shape, INVERSE_RECIPROCAL_SCALE, tl.float32)
        inverse_h = tl.div_rn(scale, order_sum(inverse, N))
        total = dropped_sum
        for k in tl.static_range(N):
            score = slot_score(inverse, dropped_sum, k, N) * inverse_h
            scores = scores + (score,)
            total = add_term(total, score, k == 0)
    present = dropped_sum > 0.0
    share = tl.where(present, tl.div_rn(total, tl.where(present, dropped_sum, 1.0)), 0.0)
    dropped = ()
    for i in tl.static_range(M):
        dropped = dropped + (0.0 - e[i] * share,)
    return scatter_slots(scores, dropped, kept, positions, N, M)


@triton.jit
def score_of_largest_2_of_4(x, ordered, inv_temperature):
    """``exact_score`` of the two largest of four float32 logits; columns, from those that ``descending`` gives too.

    Void of equal second and third ones. What a column gets depends on its logit and on which of the two kept ones comes
    first. So the arithmetic is done once for each place in the order; the second one is the centre, and its e is 1.
    """
    centre = saturated((ordered[1] - ordered[0]) * inv_temperature)
    first = exp_in_range(tl.minimum(0.0 - centre, EXPONENT_CLAMP))
    third = exp(saturated((ordered[2] - ordered[0]) * inv_temperature) - centre)
    fourth = exp(saturated((ordered[3] - ordered[0]) * inv_temperature) - centre)
    dropped_sum = third + fourth
    with_first, with_second = dropped_sum + first, dropped_sum + 1.0
    # in the order of columns
    first_leads = (x[0] >= ordered[0]) | (x[1] >= ordered[0]) & (x[0] < ordered[1])
    first_leads |= (x[2] >= ordered[0]) & (x[3] >= ordered[1])
    with_both = tl.where(first_leads, with_first + 1.0, with_second + first)
    inverse_first = scaled_reciprocal(with_first, RECIPROCAL_SCALE)
    inverse_second = scaled_reciprocal(with_second, RECIPROCAL_SCALE)
    inverse_both = scaled_reciprocal(with_both, RECIPROCAL_SCALE)
    inverse_h = scaled_reciprocal(inverse_first + inverse_second, INVERSE_RECIPROCAL_SCALE)
    d_first, d_second = dropped_sum * inverse_first, dropped_sum * inverse_second
    score_first = (d_first * inverse_both + d_first * inverse_first) * inverse_h
    score_second = (d_second * inverse_both + d_second * inverse_second) * inverse_h
    # without a dropped one above 0, both scores are 0
    share = tl.div_rn(score_first + score_second, tl.maximum(dropped_sum, SMALLEST_NORMAL))
    score_third, score_fourth = 0.0 - third * share, 0.0 - fourth * share
    # Always so. But ptxas would compare ahead of the divisions, and hold more outcomes than it has registers for such
    known = share >= 0.0
    largest, dropped = tl.where(known, ordered[0], 0.0), tl.where(known, ordered[2], 0.0)
    scores = ()
    for i in tl.static_range(4):
        of_kept = tl.where(x[i] == largest, score_first, score_second)
        of_dropped = tl.where(x[i] == dropped, score_third, score_fourth)
        scores = scores + (tl.where(x[i] > dropped, of_kept, of_dropped),)
    return scores


@triton.jit
def exact_log_prob(z, kept, N: tl.constexpr, M: tl.constexpr):
    """log p(S) by the recursion over subsets, N <= EXACT_SCORE_MAX_N."""
    e, dropped_sum, exponents, slots, inverse, positions = plackett_luce_terms(z, kept, N, M)
    f = (tl.zeros_like(dropped_sum),)
    for subset in tl.static_range(1, 1 << N):
        value = dropped_sum
        for i in tl.static_range(N):
            if (subset >> i) & 1:
                value = value + slots[i] * f[subset ^ (1 << i)]
        f = f + (value * inverse[subset] * INVERSE_RECIPROCAL_SCALE,)
    missed = f[(1 << N) - 1]
    h = inverse[(1 << N) - 1]
    if N > 1:
        h = h * order_sum(inverse, N)
    for _ in tl.static_range(N):
        h = h * INVERSE_RECIPROCAL_SCALE
    log_prob = ln(h, h - 1.0)
    for i in tl.static_range(M):
        log_prob = log_prob + tl.where(kept[i], exponents[i], 0.0)
    capped = tl.minimum(missed, NEAR_CERTAIN)
    return tl.where(missed < NEAR_CERTAIN, ln(1.0 - capped, 0.0 - capped), saturated(log_prob))
