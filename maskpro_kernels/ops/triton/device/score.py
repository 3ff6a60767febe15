"""Score and log-probability of a drawn set: exact for N <= 4, as an exponential race, and by quadrature for any N."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import (
    BERNOULLI,
    EXPONENT_CLAMP,
    FIRST_NODE,
    INVERSE_RECIPROCAL_SCALE,
    LARGEST_LOG_ARRIVAL,
    LOWEST_LOG_ARRIVAL,
    NEAR_CERTAIN,
    ONE_MINUS_EXP,
    RECIPROCAL_SCALE,
    SMALLEST_NORMAL,
    STREAM_DRAW,
    exp,
    exp_in_range,
    ln,
    saturated,
    saturated_columns,
    scaled_reciprocal,
)
from .gumbel_top_k import decode, decode_tile, descending, expected, join_columns, noisy_code, scaled, split_columns
from .philox import group_words


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
    """Number of kept weights before each column of its group."""
    position = tl.zeros_like(kept[0]).to(tl.int32)
    positions = ()
    for i in tl.static_range(M):
        positions = positions + (position,)
        position = position + kept[i].to(tl.int32)
    return positions


@triton.jit
def gather_slots(x, kept, positions, N: tl.constexpr, M: tl.constexpr):
    """Values of the kept columns in order: N columns."""
    slots = ()
    for a in tl.static_range(N):
        value = tl.zeros_like(x[0])
        for i in tl.static_range(a, M - N + a + 1):
            value = tl.where(kept[i] & (positions[i] == a), x[i], value)
        slots = slots + (value,)
    return slots


@triton.jit
def scatter_slots(slots, dropped, kept, positions, N: tl.constexpr, M: tl.constexpr):
    """Columns with ``slots`` where kept and ``dropped`` elsewhere."""
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
    """total + term; for the first term the term alone."""
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
    """``exact_score`` of the two largest of four float32 logits; columns. ``ordered`` comes from ``descending``.

    Undefined if the second and third are equal. The result of a column depends on its logit, and on which of the two
    kept weights has the lower index. So it is computed for the sorted logits; the second is the centre, and its e is 1.
    """
    centre = saturated((ordered[1] - ordered[0]) * inv_temperature)
    first = exp_in_range(tl.minimum(0.0 - centre, EXPONENT_CLAMP))
    third = exp(saturated((ordered[2] - ordered[0]) * inv_temperature) - centre)
    fourth = exp(saturated((ordered[3] - ordered[0]) * inv_temperature) - centre)
    dropped_sum = third + fourth
    with_first = dropped_sum + first
    with_second = dropped_sum + 1.0
    # in the order of columns
    first_leads = (x[0] >= ordered[0]) | (x[1] >= ordered[0]) & (x[0] < ordered[1])
    first_leads |= (x[2] >= ordered[0]) & (x[3] >= ordered[1])
    with_both = tl.where(first_leads, with_first + 1.0, with_second + first)
    inverse_first = scaled_reciprocal(with_first, RECIPROCAL_SCALE)
    inverse_second = scaled_reciprocal(with_second, RECIPROCAL_SCALE)
    inverse_both = scaled_reciprocal(with_both, RECIPROCAL_SCALE)
    inverse_h = scaled_reciprocal(inverse_first + inverse_second, INVERSE_RECIPROCAL_SCALE)
    d_first = dropped_sum * inverse_first
    d_second = dropped_sum * inverse_second
    score_first = (d_first * inverse_both + d_first * inverse_first) * inverse_h
    score_second = (d_second * inverse_both + d_second * inverse_second) * inverse_h
    # if all dropped ones are 0, both scores are 0
    share = tl.div_rn(score_first + score_second, tl.maximum(dropped_sum, SMALLEST_NORMAL))
    score_third = 0.0 - third * share
    score_fourth = 0.0 - fourth * share
    # always true; it keeps ptxas from comparing before the divisions, which would take more predicate registers than
    # exist
    true = share >= 0.0
    largest = tl.where(true, ordered[0], 0.0)
    dropped = tl.where(true, ordered[2], 0.0)
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


@triton.jit
def drawn_score_2_of_4(x, group, inv_temperature, key):
    """``exact_score`` of a draw of 2:4; columns. Faster for a block with only determined draws."""
    words = group_words(group, 4, STREAM_DRAW, key)
    ordered = descending(x, 4)
    kept, determined = expected(x, ordered, inv_temperature, words, 2, 4)
    if tl.min(determined.to(tl.int32), 0) == 0:
        code = noisy_code(x, words, inv_temperature, 2, 4)
        scores = exact_score(scaled(x, inv_temperature, 4), decode(code, 4), 2, 4)
    else:
        scores = score_of_largest_2_of_4(x, ordered, inv_temperature)
    return scores


@triton.jit
def arrival_ratio(y):
    """y / (e^y - 1) for y >= 0."""
    square = y * y
    series = square * BERNOULLI[3] + BERNOULLI[2]
    series = series * square + BERNOULLI[1]
    series = series * square + BERNOULLI[0]
    series = series * square + 1.0 - y * 0.5
    capped = tl.minimum(tl.maximum(y, 1.0), 87.0)
    return tl.where(y < 1.0, series, tl.div_rn(capped, exp(capped) - 1.0))


@triton.jit
def dropped_softmax(z, kept, M: tl.constexpr):
    """(columns of exp(z - largest dropped) where dropped and 0 where kept; their sum)."""
    largest = largest_dropped(z, kept, M)
    e = ()
    for i in tl.static_range(M):
        e = e + (tl.where(kept[i], 0.0, exp(tl.minimum(z[i] - largest, 0.0))),)
    total = e[0]
    for i in tl.static_range(1, M):
        total += e[i]
    return e, total


@triton.jit
def exponential_race_score(z, keys, kept, M: tl.constexpr):
    """Unbiased estimate of the gradient of log p(S) given the keys of the draw, any N; columns."""
    kappa = saturated(largest_dropped(keys, kept, M))
    largest = saturated(largest_dropped(z, kept, M))
    values = ()
    for i in tl.static_range(M):
        least = tl.where(kept[i], kappa, largest)
        most = tl.where(kept[i], LARGEST_LOG_ARRIVAL, 0.0)
        e = exp(tl.minimum(saturated(z[i]) - least, most))
        values = values + (tl.where(kept[i], arrival_ratio(e), e),)
    total = tl.where(kept[0], values[0], 0.0)
    for i in tl.static_range(1, M):
        total += tl.where(kept[i], values[i], 0.0)
    share = tl.div_rn(total, dropped_total(values, kept, M))
    scores = ()
    for i in tl.static_range(M):
        scores = scores + (tl.where(kept[i], values[i], 0.0 - values[i] * share),)
    return scores


@triton.jit
def one_minus_exp_ratio(y):
    """(1 - e^-y) / min(1, y) for y > 0."""
    series = y * ONE_MINUS_EXP[8] + ONE_MINUS_EXP[7]
    for k in tl.static_range(7):
        series = series * y + ONE_MINUS_EXP[6 - k]
    series = series * y + 1.0
    return tl.where(y < 1.0, series, 1.0 - exp(0.0 - y))


@triton.jit
def log_arrivals(z, kept, M: tl.constexpr):
    """z - ln(sum of dropped exp z), a tile [G, M]."""
    e, dropped_sum = dropped_softmax(z, kept, M)
    log_sum = ln(dropped_sum, dropped_sum - 1.0)
    largest = largest_dropped(z, kept, M)
    result = ()
    for i in tl.static_range(M):
        result = result + (z[i] - largest - log_sum,)
    return join_columns(result, M)


@triton.jit
def node_exponent(log_arrival, kept, u, M: tl.constexpr):
    """ln of the integrand at u = ln t without factors within [0.63, 1], saturated; tiles [G, M]."""
    terms = split_columns(tl.where(kept, tl.minimum(log_arrival + u, 0.0), 0.0), M)
    total = u - exp(u)
    for i in tl.static_range(M):
        total = total + terms[i]
    return saturated(total)


@triton.jit
def peak_exponent(log_arrival, kept, COUNT: tl.constexpr, STEP: tl.constexpr, M: tl.constexpr):
    """Largest node_exponent over the nodes."""
    peak = tl.full((log_arrival.shape[0],), float("-inf"), tl.float32)
    for node in range(COUNT):
        peak = tl.maximum(peak, node_exponent(log_arrival, kept, node * STEP + FIRST_NODE, M))
    return peak


@triton.jit
def node_weight(log_arrival, kept, u, peak, M: tl.constexpr):
    """(the integrand over its e^peak [G], y = a_i t [G, M]) at u = ln t."""
    y = exp(tl.minimum(log_arrival + u, LARGEST_LOG_ARRIVAL))
    weight = exp(node_exponent(log_arrival, kept, u, M) - peak)
    factors = split_columns(tl.where(kept, one_minus_exp_ratio(y), 1.0), M)
    for i in tl.static_range(M):
        weight = weight * factors[i]
    return weight, y


@triton.jit
def quadrature_log_prob(z, code, COUNT: tl.constexpr, STEP: tl.constexpr, M: tl.constexpr):
    """log p(S) by the trapezoid rule over the first dropped arrival, any N."""
    z = saturated_columns(z, M)
    log_arrival = log_arrivals(z, decode(code, M), M)
    kept = decode_tile(code, M)
    peak = peak_exponent(log_arrival, kept, COUNT, STEP, M)
    total = tl.zeros_like(peak)
    missed = tl.zeros_like(peak)
    for node in range(COUNT):
        u = node * STEP + FIRST_NODE
        weight, y = node_weight(log_arrival, kept, u, peak, M)
        waits = split_columns(tl.where(kept, exp(0.0 - y), 0.0), M)
        late = tl.zeros_like(peak)
        for i in tl.static_range(M):
            late = late + (1.0 - late) * waits[i]
        total = total + weight
        missed = missed + exp(u - exp(u)) * late
    total = total * STEP
    capped = tl.minimum(missed * STEP, NEAR_CERTAIN)
    near = ln(1.0 - capped, 0.0 - capped)
    return tl.where(capped < NEAR_CERTAIN, near, saturated(peak + ln(total, total - 1.0)))


@triton.jit
def quadrature_score(z, code, COUNT: tl.constexpr, STEP: tl.constexpr, M: tl.constexpr):
    """Gradient of log p(S) in the scaled logits by the same rule, any N; columns."""
    z = saturated_columns(z, M)
    kept_columns = decode(code, M)
    log_arrival = tl.maximum(log_arrivals(z, kept_columns, M), LOWEST_LOG_ARRIVAL)
    kept = decode_tile(code, M)
    peak = peak_exponent(log_arrival, kept, COUNT, STEP, M)
    total = tl.zeros_like(peak)
    sums = tl.zeros_like(log_arrival)
    for node in range(COUNT):
        weight, y = node_weight(log_arrival, kept, node * STEP + FIRST_NODE, peak, M)
        total = total + weight
        sums = sums + weight[:, None] * arrival_ratio(y)
    e, dropped_sum = dropped_softmax(z, kept_columns, M)
    means = split_columns(tl.where(kept, tl.div_rn(sums, tl.broadcast_to(total[:, None], sums.shape)), 0.0), M)
    kept_sum = means[0]
    for i in tl.static_range(1, M):
        kept_sum += means[i]
    share = tl.div_rn(kept_sum, dropped_sum)
    scores = ()
    for i in tl.static_range(M):
        scores = scores + (tl.where(kept_columns[i], means[i], 0.0 - e[i] * share),)
    return scores
