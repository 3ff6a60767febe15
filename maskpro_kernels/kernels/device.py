"""The pieces kernels are built of: Philox, ln, exp, draw, log-probability, score.

The operations of ``reference``, whose docstrings give the formulas, with its bits for all that is
not NaN. A group is a tuple of M blocks, one a position; "columns" below. Launch every kernel with
``enable_fp_fusion=False``: a contracted multiply-add rounds once where the specification rounds twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import certain as _certain
from .. import philox as _philox
from .. import reference as _reference

LN: tl.constexpr = tl.constexpr(_reference.LN_POLYNOMIAL)
SQRT_HALF_BITS: tl.constexpr = tl.constexpr(_reference.SQRT_HALF_BITS)
LN2: tl.constexpr = tl.constexpr(_reference.LN2)
EXP: tl.constexpr = tl.constexpr(_reference.EXP_POLYNOMIAL)
LOG2_E: tl.constexpr = tl.constexpr(_reference.LOG2_E)
LN2_HIGH: tl.constexpr = tl.constexpr(_reference.LN2_HIGH)
LN2_LOW: tl.constexpr = tl.constexpr(_reference.LN2_LOW)
EXP_UNDERFLOW: tl.constexpr = tl.constexpr(_reference.EXP_UNDERFLOW)
BERNOULLI: tl.constexpr = tl.constexpr(_reference.BERNOULLI)
ONE_MINUS_EXP: tl.constexpr = tl.constexpr(_reference.ONE_MINUS_EXP)
TWO_POW_MINUS_32: tl.constexpr = tl.constexpr(_reference.TWO_POW_MINUS_32)
EXPONENT_CLAMP: tl.constexpr = tl.constexpr(_reference.EXPONENT_CLAMP)
RECIPROCAL_SCALE: tl.constexpr = tl.constexpr(_reference.RECIPROCAL_SCALE)
INVERSE_RECIPROCAL_SCALE: tl.constexpr = tl.constexpr(1.0 / _reference.RECIPROCAL_SCALE)
EXACT_SCORE_MAX_N: tl.constexpr = tl.constexpr(_reference.EXACT_SCORE_MAX_N)
NEAR_CERTAIN: tl.constexpr = tl.constexpr(_reference.NEAR_CERTAIN)
FIRST_NODE: tl.constexpr = tl.constexpr(_reference.FIRST_NODE)
LARGEST_LOG_ARRIVAL: tl.constexpr = tl.constexpr(_reference.LARGEST_LOG_ARRIVAL)
BFLOAT16_MAX: tl.constexpr = tl.constexpr(_reference.BFLOAT16_MAX)
FLOAT16_MAX: tl.constexpr = tl.constexpr(_reference.FLOAT16_MAX)
FLOAT16_SMALLEST_NORMAL: tl.constexpr = tl.constexpr(_reference.FLOAT16_SMALLEST_NORMAL)
FLOAT16_SUBNORMAL_STEP: tl.constexpr = tl.constexpr(_reference.FLOAT16_SUBNORMAL_STEP)

LEAST_NOISE: tl.constexpr = tl.constexpr(_certain.LEAST_NOISE)
BOUND_AT_ZERO: tl.constexpr = tl.constexpr(_certain.BOUND_AT_ZERO)
NATS_PER_BIT_PATTERN: tl.constexpr = tl.constexpr(_certain.NATS_PER_BIT_PATTERN)

MULTIPLIERS: tl.constexpr = tl.constexpr(_philox.MULTIPLIERS)
KEY_STEPS: tl.constexpr = tl.constexpr(_philox.KEY_STEPS)
ROUNDS: tl.constexpr = tl.constexpr(_philox.ROUNDS)
STREAM_DRAW: tl.constexpr = tl.constexpr(_philox.STREAM_DRAW)
STREAM_ROUNDING: tl.constexpr = tl.constexpr(_philox.STREAM_ROUNDING)


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Four uint32 words for a counter and key of uint32 words."""
    for _ in tl.static_range(ROUNDS):
        product0 = tl.mul(c0.to(tl.uint64), MULTIPLIERS[0], sanitize_overflow=False)
        product1 = tl.mul(c2.to(tl.uint64), MULTIPLIERS[1], sanitize_overflow=False)
        low0, high0 = product0.to(tl.uint32), (product0 >> 32).to(tl.uint32)
        low1, high1 = product1.to(tl.uint32), (product1 >> 32).to(tl.uint32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = tl.add(k0, KEY_STEPS[0], sanitize_overflow=False)
        k1 = tl.add(k1, KEY_STEPS[1], sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def group_words(group, M: tl.constexpr, STREAM: tl.constexpr, seed, step, layer, draw):
    """M uint32 columns of random words for uint32 group indices; the other arguments are int64 scalars."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    c1 = layer.to(tl.uint32)
    c2 = step.to(tl.uint32)
    words = ()
    for block in tl.static_range((M + 3) // 4):
        c3 = (draw << 16 | (STREAM << 8 | block)).to(tl.uint32)
        w0, w1, w2, w3 = philox4x32(group, c1, c2, c3, k0, k1)
        if M == 2:
            words = words + (w0, w1)
        else:
            words = words + (w0, w1, w2, w3)
    return words


@triton.jit
def ln(x, near_one):
    """Natural logarithm of positive float32; near_one is x - 1 as the caller knows it best."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    t = tl.where(exponent == 0, near_one, (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0)
    p = t * LN[5] + LN[4]
    p = p * t + LN[3]
    p = p * t + LN[2]
    p = p * t + LN[1]
    p = p * t + LN[0]
    return p * t * t + t + exponent.to(tl.float32) * LN2


@triton.jit
def exp(x):
    """e^x of float32 up to 88; 0 below -87, so that no subnormal arises."""
    clamped = tl.maximum(x, EXP_UNDERFLOW)
    exponent = (clamped * LOG2_E + 128.5).to(tl.int32) - 128
    scale = exponent.to(tl.float32)
    r = clamped - scale * LN2_HIGH - scale * LN2_LOW
    p = r * EXP[4] + EXP[3]
    p = p * r + EXP[2]
    p = p * r + EXP[1]
    p = p * r + EXP[0]
    p = p * r * r + r + 1.0
    power = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < EXP_UNDERFLOW, 0.0, p * power)


@triton.jit
def gumbel(r):
    """Gumbel noise of uint32 words."""
    u = (r.to(tl.float32) + 0.5) * TWO_POW_MINUS_32
    v = ((r ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * TWO_POW_MINUS_32
    e = 0.0 - ln(v, 0.0 - u)
    return 0.0 - ln(e, e - 1.0)


@triton.jit
def split_columns(x, M: tl.constexpr):
    """The M columns, blocks [G], of a tile [G, M]."""
    if M == 2:
        even, odd = tl.split(x)
        columns = (even, odd)
    else:
        even, odd = tl.split(tl.reshape(x, (x.shape[0], M // 2, 2)))
        evens = split_columns(even, M // 2)
        odds = split_columns(odd, M // 2)
        columns = ()
        for i in tl.static_range(M // 2):
            columns = columns + (evens[i], odds[i])
    return columns


@triton.jit
def join_columns(columns, M: tl.constexpr):
    """A tile [G, M] from its M columns, blocks [G]."""
    if M == 2:
        tile = tl.join(columns[0], columns[1])
    else:
        evens = ()
        odds = ()
        for i in tl.static_range(M // 2):
            evens = evens + (columns[2 * i],)
            odds = odds + (columns[2 * i + 1],)
        even = join_columns(evens, M // 2)
        odd = join_columns(odds, M // 2)
        tile = tl.reshape(tl.join(even, odd), (even.shape[0], M))
    return tile


@triton.jit
def scaled(x, inv_temperature, M: tl.constexpr):
    """Columns less the group's largest, over the temperature."""
    largest = x[0]
    for i in tl.static_range(1, M):
        largest = tl.maximum(largest, x[i])
    z = ()
    for i in tl.static_range(M):
        z = z + ((x[i] - largest) * inv_temperature,)
    return z


@triton.jit
def drawn_keys(z, group, M: tl.constexpr, seed, step, layer, draw):
    """Scaled logits plus Gumbel noise."""
    words = group_words(group, M, STREAM_DRAW, seed, step, layer, draw)
    keys = ()
    for i in tl.static_range(M):
        keys = keys + (z[i] + gumbel(words[i]),)
    return keys


@triton.jit
def top_n(keys, N: tl.constexpr, M: tl.constexpr):
    """Which columns hold the N largest keys, ties to the lower index: int1 columns."""
    kept = ()
    # one column's count after the other: of all at once sm_100 holds the comparisons, more than it has registers for
    for i in tl.static_range(M):
        ahead = tl.zeros_like(keys[0]).to(tl.int32)
        for j in tl.static_range(i):
            ahead += (keys[j] >= keys[i]).to(tl.int32)
        for j in tl.static_range(i + 1, M):
            ahead += (keys[j] > keys[i]).to(tl.int32)
        kept = kept + (ahead < N,)
    return kept


@triton.jit
def certain(z, kept, words, M: tl.constexpr):
    """int1 where no noise of these words can make a dropped column overtake a kept one; see ``certain``.

    Noise falls with its word, so the smallest word of the dropped bounds them all.
    """
    smallest = tl.full(words[0].shape, 0xFFFFFFFF, tl.uint32)
    for i in tl.static_range(M):
        smallest = tl.minimum(smallest, tl.where(kept[i], 0xFFFFFFFF, words[i]))
    quarter = (smallest >> 2).to(tl.float32)
    bound = BOUND_AT_ZERO - quarter.to(tl.int32, bitcast=True).to(tl.float32) * NATS_PER_BIT_PATTERN
    return largest_dropped(z, kept, M) + bound < smallest_kept(z, kept, M) + LEAST_NOISE


@triton.jit
def drawn_code(z, group, N: tl.constexpr, M: tl.constexpr, seed, step, layer, draw):
    """int32 group codes of a draw; a block whose draws are all certain computes no noise."""
    words = group_words(group, M, STREAM_DRAW, seed, step, layer, draw)
    kept = top_n(z, N, M)
    code = encode(kept, M)
    if tl.min(certain(z, kept, words, M).to(tl.int32), 0) == 0:
        keys = ()
        for i in tl.static_range(M):
            keys = keys + (z[i] + gumbel(words[i]),)
        code = encode(top_n(keys, N, M), M)
    return code


@triton.jit
def encode(kept, M: tl.constexpr):
    """int32 group codes from int1 columns."""
    code = kept[0].to(tl.int32)
    for i in tl.static_range(1, M):
        code |= kept[i].to(tl.int32) << i
    return code


@triton.jit
def decode(code, M: tl.constexpr):
    """int1 columns from int32 group codes."""
    kept = ()
    for i in tl.static_range(M):
        kept = kept + (((code >> i) & 1) != 0,)
    return kept


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
def urn(z, kept, N: tl.constexpr, M: tl.constexpr):
    """(e, sum of dropped e, ln e, kept e by slot, RECIPROCAL_SCALE / s(T) by subset T, positions)."""
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
    e, dropped_sum, exponents, slots, inverse, positions = urn(z, kept, N, M)
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
    """(exp(z - largest dropped) where dropped and 0 where kept, columns; their sum)."""
    largest = largest_dropped(z, kept, M)
    e = ()
    for i in tl.static_range(M):
        e = e + (tl.where(kept[i], 0.0, exp(tl.minimum(z[i] - largest, 0.0))),)
    total = e[0]
    for i in tl.static_range(1, M):
        total += e[i]
    return e, total


@triton.jit
def arrival_score(z, keys, kept, M: tl.constexpr):
    """Unbiased estimate of the gradient of log p(S) given the keys of the draw, any N; columns."""
    kappa = largest_dropped(keys, kept, M)
    largest = largest_dropped(z, kept, M)
    values = ()
    for i in tl.static_range(M):
        exponent = tl.where(kept[i], tl.minimum(z[i] - kappa, LARGEST_LOG_ARRIVAL), tl.minimum(z[i] - largest, 0.0))
        e = exp(exponent)
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
def exact_log_prob(z, kept, N: tl.constexpr, M: tl.constexpr):
    """log p(S) by the urn's subsets, N <= EXACT_SCORE_MAX_N."""
    e, dropped_sum, exponents, slots, inverse, positions = urn(z, kept, N, M)
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
    return tl.where(missed < NEAR_CERTAIN, ln(1.0 - capped, 0.0 - capped), log_prob)


@triton.jit
def one_minus_exp_ratio(y):
    """(1 - e^-y) / min(1, y) for y > 0."""
    series = y * ONE_MINUS_EXP[8] + ONE_MINUS_EXP[7]
    for k in tl.static_range(7):
        series = series * y + ONE_MINUS_EXP[6 - k]
    series = series * y + 1.0
    return tl.where(y < 1.0, series, 1.0 - exp(0.0 - y))


@triton.jit
def decode_tile(code, M: tl.constexpr):
    """int1 [G, M] from int32 group codes."""
    return ((code[:, None] >> tl.arange(0, M)[None, :]) & 1) != 0


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
    """ln of the integrand at u = ln t without the factors that lie in [0.63, 1]; tiles [G, M]."""
    terms = split_columns(tl.where(kept, tl.minimum(log_arrival + u, 0.0), 0.0), M)
    total = u - exp(u)
    for i in tl.static_range(M):
        total = total + terms[i]
    return total


@triton.jit
def peak_exponent(log_arrival, kept, COUNT: tl.constexpr, STEP: tl.constexpr, M: tl.constexpr):
    """The largest node_exponent over the nodes."""
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
    return tl.where(capped < NEAR_CERTAIN, near, peak + ln(total, total - 1.0))


@triton.jit
def quadrature_score(z, code, COUNT: tl.constexpr, STEP: tl.constexpr, M: tl.constexpr):
    """Gradient of log p(S) in the scaled logits by the same rule, any N; columns."""
    kept_columns = decode(code, M)
    log_arrival = log_arrivals(z, kept_columns, M)
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


@triton.jit
def round_stochastically(x, r, dtype: tl.constexpr):
    """float32 rounded up or down to a 16-bit dtype's grid with probability by distance; r uint32 words.

    Finite values stay finite, others pass through.
    """
    if dtype == tl.bfloat16:
        # the sign of a zero is not defined through a bit cast, so zeros step aside
        bits = tl.where(x == 0.0, 1.0, x).to(tl.int32, bitcast=True)
        grid = ((bits + (r >> 16).to(tl.int32)) & -65536).to(tl.float32, bitcast=True)
        rounded = tl.minimum(tl.maximum(grid, 0.0 - BFLOAT16_MAX), BFLOAT16_MAX)
    else:
        magnitude = tl.abs(x)
        normal = magnitude >= FLOAT16_SMALLEST_NORMAL
        bits = tl.where(normal, x, 1.0).to(tl.int32, bitcast=True)
        grid = ((bits + (r >> 19).to(tl.int32)) & -8192).to(tl.float32, bitcast=True)
        steps = tl.where(normal, 0.0, magnitude * (1.0 / FLOAT16_SUBNORMAL_STEP))
        whole = steps.to(tl.int32).to(tl.float32)
        up = ((r >> 8).to(tl.float32) * (1.0 / 16777216.0)) < (steps - whole)
        small = (whole + tl.where(up, 1.0, 0.0)) * FLOAT16_SUBNORMAL_STEP
        rounded = tl.where(normal, grid, tl.where(x < 0.0, 0.0 - small, small))
        rounded = tl.minimum(tl.maximum(rounded, 0.0 - FLOAT16_MAX), FLOAT16_MAX)
    finite = tl.abs(x) < float("inf")
    return tl.where(finite & (x != 0.0), rounded, x)


@triton.jit
def round_group(x, group, M: tl.constexpr, seed, step, layer, draw, dtype: tl.constexpr):
    """Columns rounded to a 16-bit dtype with words of the rounding stream."""
    words = group_words(group, M, STREAM_ROUNDING, seed, step, layer, draw)
    rounded = ()
    for i in tl.static_range(M):
        rounded = rounded + (round_stochastically(x[i], words[i], dtype),)
    return rounded
