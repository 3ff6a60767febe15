"""Every operation in plain torch: the specification that the kernels equal bit for bit.

On the paths of draw, log-probability and score stand only correctly rounded IEEE operations
(integer operations, comparisons, float32 add, multiply, divide, conversions), sums within a group
in a fixed order, and the two polynomials below. So eager torch, compiled torch, Triton's
interpreter and every GPU give the same bits.

Logits and weights are contiguous matrices [rows, K], codes [rows, K / M]. Functions named ``group_...``
take any number of groups [..., M], and where they draw, each one's index in the whole layer. Inside,
groups are a list of M "columns", tensors [...] that hold the same position of every group.
"""

from __future__ import annotations

import functools
from math import factorial

import torch

from . import philox
from .pattern import code_dtype, codes_of

# ln(1 + t) = t + t^2 P(t) on [sqrt(1/2) - 1, sqrt(2) - 1]; degree 5, minimax in the relative error of ln: 5e-7
LN_POLYNOMIAL = (
    -0.5000084638595581,
    0.33319219946861267,
    -0.24919062852859497,
    0.20449119806289673,
    -0.18587608635425568,
    0.11949444562196732,
)
SQRT_HALF_BITS = 0x3F3504F3
LN2 = 0.6931471824645996

# e^r = 1 + r + r^2 P(r) on [-ln(2)/2, ln(2)/2]; Chebyshev fit of degree 4, relative error 1e-8
EXP_POLYNOMIAL = (0.5, 0.16666576266288757, 0.041666463017463684, 0.00836329534649849, 0.0013933823211118579)
LOG2_E = 1.4426950216293335
# ln 2 in two parts: the first has few bits, so that its product with an exponent is exact
LN2_HIGH = 0.693359375
LN2_LOW = -0.00021219444170128554
EXP_UNDERFLOW = -87.0

# y / (e^y - 1) = -y/2 + 1 + y^2/12 - y^4/720 + ... (Bernoulli numbers); below y = 1 the first term left out is 2e-8
BERNOULLI = (0.0833333358168602, -0.0013888889225199819, 3.306878113653511e-05, -8.267195881671796e-07)

TWO_POW_MINUS_32 = 2.0**-32
BFLOAT16_MAX = torch.finfo(torch.bfloat16).max
FLOAT16_MAX = torch.finfo(torch.float16).max
FLOAT16_SMALLEST_NORMAL = 2.0**-14
FLOAT16_SUBNORMAL_STEP = 2.0**-24
# Kept weights further than this above the centre are drawn first all but surely
EXPONENT_CLAMP = 20.0
# A constant on every 1 / s keeps products of N of them above the subnormals; it cancels in q / h
RECIPROCAL_SCALE = 4096.0
# Where a draw other than S has less than this probability, log p(S) is ln(1 - it)
NEAR_CERTAIN = 0.25
# Trapezoid rule in u = ln t, t the first dropped arrival: 1e-14 lie below the first node, less beyond the last
FIRST_NODE = -32.0
LAST_NODE = 5.0
# e^4.4 = 81: an arrival that is not late by any float32
LARGEST_LOG_ARRIVAL = 4.4
# (1 - e^-y) / y = 1 - y/2 + y^2/6 - ... ; below y = 1 the first term left out is 2.5e-8
ONE_MINUS_EXP = tuple((-1.0) ** k / factorial(k + 1) for k in range(1, 10))
# Up to this N the score is the exact gradient of log p(S); above it, its unbiased estimate by arrival times
EXACT_SCORE_MAX_N = 4
# Integers of so many bytes hold the bits of floats
INTEGERS = {2: torch.int16, 4: torch.int32}


def ln(x, near_one):
    """Natural logarithm of positive float32; ``near_one`` is x - 1 as the caller knows it best."""
    bits = x.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    t = torch.where(exponent == 0, near_one, (bits - (exponent << 23)).view(torch.float32) - 1.0)
    p = t * LN_POLYNOMIAL[5] + LN_POLYNOMIAL[4]
    for coefficient in LN_POLYNOMIAL[3::-1]:
        p = p * t + coefficient
    return p * t * t + t + exponent.to(torch.float32) * LN2


def exp(x):
    """e^x of float32 up to 88; 0 below -87, so that no subnormal arises."""
    underflow = x < EXP_UNDERFLOW
    clamped = torch.where(underflow, EXP_UNDERFLOW, x)
    # + 128 keeps the argument positive, where conversion to integer rounds down
    exponent = (clamped * LOG2_E + 128.5).to(torch.int32) - 128
    scale = exponent.to(torch.float32)
    r = clamped - scale * LN2_HIGH - scale * LN2_LOW
    p = r * EXP_POLYNOMIAL[4] + EXP_POLYNOMIAL[3]
    for coefficient in EXP_POLYNOMIAL[2::-1]:
        p = p * r + coefficient
    p = p * r * r + r + 1.0
    power = ((exponent + 127) << 23).view(torch.float32)
    return torch.where(underflow, 0.0, p * power)


def gumbel(r):
    """Gumbel noise -ln(-ln(1 - u)), u = (r + 1/2) 2^-32, of 32-bit integers held in int64.

    1 - u is formed from the complement of r, so the rare large values are resolved to 2^-32.
    """
    u = (r.to(torch.float32) + 0.5) * TWO_POW_MINUS_32
    v = ((r ^ philox.WORD).to(torch.float32) + 0.5) * TWO_POW_MINUS_32
    e = 0.0 - ln(v, 0.0 - u)
    return 0.0 - ln(e, e - 1.0)


def grouped(x, m):
    """[rows, K] as [rows, K / M, M]."""
    return x.view(x.shape[0], x.shape[1] // m, m)


def columns(x):
    """The M columns of groups [..., M]."""
    return list(x.unbind(-1))


def uncolumns(xs):
    """Groups [..., M] from their columns."""
    return torch.stack(xs, dim=-1)


def scaled(xs, inv_temperature):
    """Logits in float32, less the group's largest, over the temperature."""
    xs = [x.to(torch.float32) for x in xs]
    largest = xs[0]
    for x in xs[1:]:
        largest = torch.maximum(largest, x)
    return [(x - largest) * inv_temperature for x in xs]


def top_n(keys, n):
    """Which columns hold the N largest keys of their group, ties to the lower index: bool columns."""
    m = len(keys)
    wins = [0] * m
    for i in range(m):
        for j in range(i + 1, m):
            ahead = (keys[i] >= keys[j]).to(torch.int32)
            wins[i] = wins[i] + ahead
            wins[j] = wins[j] + (1 - ahead)
    return [w >= m - n for w in wins]


def encode(kept, dtype):
    """Group codes from bool columns."""
    code = kept[0].to(torch.int32)
    for i in range(1, len(kept)):
        code = code | kept[i].to(torch.int32) << i
    return code.to(dtype)


def decode(codes, m):
    """Bool columns from group codes."""
    code = codes.to(torch.int32)
    return [(code >> i & 1) != 0 for i in range(m)]


def drawn_keys(z, group, seed, step, layer, draw):
    """Scaled logits plus Gumbel noise."""
    words = philox.group_words(group, len(z), philox.STREAM_DRAW, seed, step, layer, draw)
    return [z_i + gumbel(r) for z_i, r in zip(z, words, strict=True)]


def group_drawn(logits, group, seed, step, inv_temperature, layer, draw, n):
    """Kept columns of a draw."""
    z = scaled(columns(logits), inv_temperature)
    return top_n(drawn_keys(z, group, seed, step, layer, draw), n)


def masked(weight, kept):
    """Groups of the weight where kept, exact zeros elsewhere."""
    zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
    return uncolumns([torch.where(k, w, zero) for w, k in zip(columns(weight), kept, strict=True)])


def fixed_sum(xs):
    """Sum in index order."""
    total = xs[0]
    for x in xs[1:]:
        total = total + x
    return total


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


def urn(z, kept, n, centre=None):
    """What the recursions over the subsets T of the kept weights need, T a bit set.

    Returns (e, sum R of the dropped e, exponents ln e, kept e by slot, RECIPROCAL_SCALE / s(T) by T,
    positions), with e = exp(min(z - centre, EXPONENT_CLAMP)) and s(T) = R + e(T) >= 1. The centre is the largest
    dropped or the smallest kept z, whichever is larger; a caller that knows it may give it.
    """
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
    """Gradient of log p(S) in the scaled logits, N <= EXACT_SCORE_MAX_N, columns; ``centre`` as in ``urn``.

    score_k = q_k(S) / h(S) for kept k; dropped weights share minus the sum of those by their softmax.
    Every term is positive, so nothing cancels however certain the draw.
    """
    e, dropped_sum, _, _, inverse, positions = urn(z, kept, n, centre)
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


def arrival_ratio(y):
    """y / (e^y - 1) for y >= 0."""
    square = y * y
    series = square * BERNOULLI[3] + BERNOULLI[2]
    for coefficient in BERNOULLI[1::-1]:
        series = series * square + coefficient
    series = series * square + 1.0 - y * 0.5
    capped = torch.clamp(y, 1.0, 87.0)
    return torch.where(y < 1.0, series, capped / (exp(capped) - 1.0))


def dropped_softmax(z, kept):
    """(exp(z - largest dropped) where dropped and 0 where kept, columns; their sum)."""
    largest, _ = extremes(z, kept)
    e = [torch.where(k, 0.0, exp(torch.clamp(z_i - largest, max=0.0))) for z_i, k in zip(z, kept, strict=True)]
    return e, fixed_sum(e)


def arrival_score(z, keys, kept):
    """Unbiased estimate of the gradient of log p(S) given the keys of the draw, any N, columns.

    kappa is the largest dropped key, x_k = exp(z_k - kappa): kept x_k / (exp(x_k) - 1), dropped minus
    their softmax share of the kept ones' sum. Its mean given S is the exact score.
    """
    kappa, _ = extremes(keys, kept)
    largest, _ = extremes(z, kept)
    values = []
    for z_i, k in zip(z, kept, strict=True):
        # one exponential serves both: a weight is kept or dropped
        kept_exponent = torch.clamp(z_i - kappa, max=LARGEST_LOG_ARRIVAL)
        e = exp(torch.where(k, kept_exponent, torch.clamp(z_i - largest, max=0.0)))
        values.append(torch.where(k, arrival_ratio(e), e))
    total = fixed_sum([torch.where(k, v, 0.0) for v, k in zip(values, kept, strict=True)])
    share = total / dropped_total(values, kept)
    return [torch.where(k, v, 0.0 - v * share) for v, k in zip(values, kept, strict=True)]


def exact_log_prob(z, kept, n):
    """log p(S) by the urn's subsets, N <= EXACT_SCORE_MAX_N.

    f(T), the probability that something dropped is drawn before T is complete, is
    (R + sum over i in T of e_i f(T - i)) / s(T). Where f(S) is small, log p(S) = ln(1 - f(S)) to full
    precision; elsewhere ln h(S) + sum of ln e_i.
    """
    _, dropped_sum, exponents, slots, inverse, _ = urn(z, kept, n)
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
    return torch.where(f[whole] < NEAR_CERTAIN, ln(1.0 - capped, 0.0 - capped), log_prob)


def quadrature_grid(n):
    """(number of nodes, step) from FIRST_NODE to LAST_NODE.

    The rule's error falls as |Gamma(N + 1 + 2 pi i / step)| / N!: below 1e-6 with step 1/4 up to N = 16,
    for larger N with step 1/8.
    """
    step = 0.25 if n <= 16 else 0.125
    return int((LAST_NODE - FIRST_NODE) / step) + 1, step


def one_minus_exp_ratio(y):
    """(1 - e^-y) / min(1, y) for y > 0."""
    series = y * ONE_MINUS_EXP[8] + ONE_MINUS_EXP[7]
    for coefficient in ONE_MINUS_EXP[6::-1]:
        series = series * y + coefficient
    series = series * y + 1.0
    return torch.where(y < 1.0, series, 1.0 - exp(0.0 - y))


def log_arrivals(z, kept):
    """(z - ln(sum of dropped exp z), kept), each stacked to [rows, K / M, M].

    That is the log of each weight's rate in units of all the dropped ones'.
    """
    largest, _ = extremes(z, kept)
    _, dropped_sum = dropped_softmax(z, kept)
    log_sum = ln(dropped_sum, dropped_sum - 1.0)
    # in this order: groups far below the largest logit would lose the logarithm's digits
    return torch.stack([z_i - largest - log_sum for z_i in z], dim=-1), torch.stack(kept, dim=-1)


def nodes(n, device):
    """The quadrature's nodes u = ln t, 0-dim float32 tensors."""
    count, step = quadrature_grid(n)
    return [torch.tensor(FIRST_NODE + step * k, dtype=torch.float32, device=device) for k in range(count)]


def node_exponent(log_arrival, kept, u):
    """ln of the integrand t e^-t prod(1 - exp(-a_i t)) without the factors that lie in [0.63, 1]."""
    total = u - exp(u)
    for term in torch.where(kept, torch.clamp(log_arrival + u, max=0.0), 0.0).unbind(-1):
        total = total + term
    return total


def peak_exponent(log_arrival, kept, n):
    """The largest node_exponent over the nodes."""
    peak = torch.full_like(log_arrival[..., 0], -torch.inf)
    for u in nodes(n, peak.device):
        peak = torch.maximum(peak, node_exponent(log_arrival, kept, u))
    return peak


def node_weight(log_arrival, kept, u, peak):
    """(the integrand over its e^peak, y = a_i t) at u = ln t."""
    y = exp(torch.clamp(log_arrival + u, max=LARGEST_LOG_ARRIVAL))
    weight = exp(node_exponent(log_arrival, kept, u) - peak)
    for factor in torch.where(kept, one_minus_exp_ratio(y), 1.0).unbind(-1):
        weight = weight * factor
    return weight, y


def quadrature_log_prob(z, kept, n):
    """log p(S), any N: the integral over the first dropped arrival t of e^-t prod(1 - exp(-a_i t)).

    a_i is a kept weight's rate in units of all the dropped ones'. Trapezoid rule in ln t. As in
    ``exact_log_prob``, the complement is summed beside it for draws that are nearly certain.
    """
    log_arrival, kept = log_arrivals(z, kept)
    peak = peak_exponent(log_arrival, kept, n)
    total = torch.zeros_like(peak)
    missed = torch.zeros_like(peak)
    for u in nodes(n, peak.device):
        weight, y = node_weight(log_arrival, kept, u, peak)
        late = torch.zeros_like(peak)
        for x in torch.where(kept, exp(0.0 - y), 0.0).unbind(-1):
            late = late + (1.0 - late) * x
        total = total + weight
        missed = missed + exp(u - exp(u)) * late
    _, step = quadrature_grid(n)
    total = total * step
    capped = torch.clamp(missed * step, max=NEAR_CERTAIN)
    return torch.where(capped < NEAR_CERTAIN, ln(1.0 - capped, 0.0 - capped), peak + ln(total, total - 1.0))


def quadrature_score(z, kept, n):
    """Gradient of log p(S) in the scaled logits by the same rule, any N, columns.

    Kept: the integrand's mean of y / (e^y - 1), y = a_i t; dropped as in ``exact_score``.
    """
    log_arrival, kept_tile = log_arrivals(z, kept)
    peak = peak_exponent(log_arrival, kept_tile, n)
    total = torch.zeros_like(peak)
    sums = torch.zeros_like(log_arrival)
    for u in nodes(n, peak.device):
        weight, y = node_weight(log_arrival, kept_tile, u, peak)
        total = total + weight
        sums = sums + weight[..., None] * arrival_ratio(y)
    e, dropped_sum = dropped_softmax(z, kept)
    means = torch.where(kept_tile, sums / total[..., None], 0.0).unbind(-1)
    share = fixed_sum(means) / dropped_sum
    return [torch.where(k, mean, 0.0 - e_i * share) for mean, e_i, k in zip(means, e, kept, strict=True)]


def round_stochastically(x, r, dtype):
    """float32 rounded up or down to a 16-bit dtype's grid with probability by distance, still float32.

    Finite values stay finite, others pass through; ``r`` holds 32-bit words in int64.
    """
    if dtype == torch.bfloat16:
        # the sign of a zero is not defined through a bit cast, so zeros step aside
        bits = torch.where(x == 0.0, 1.0, x).view(torch.int32)
        grid = ((bits + (r >> 16).to(torch.int32)) & -65536).view(torch.float32)
        rounded = torch.clamp(grid, -BFLOAT16_MAX, BFLOAT16_MAX)
    else:
        magnitude = x.abs()
        normal = magnitude >= FLOAT16_SMALLEST_NORMAL
        bits = torch.where(normal, x, 1.0).view(torch.int32)
        grid = ((bits + (r >> 19).to(torch.int32)) & -8192).view(torch.float32)
        steps = torch.where(normal, 0.0, magnitude * (1.0 / FLOAT16_SUBNORMAL_STEP))
        whole = steps.to(torch.int32).to(torch.float32)
        up = (r >> 8).to(torch.float32) * 2.0**-24 < steps - whole
        small = (whole + up.to(torch.float32)) * FLOAT16_SUBNORMAL_STEP
        rounded = torch.where(normal, grid, torch.where(x < 0.0, 0.0 - small, small))
        rounded = torch.clamp(rounded, -FLOAT16_MAX, FLOAT16_MAX)
    return torch.where((x.abs() < torch.inf) & (x != 0.0), rounded, x)


def group_sample_mask(logits, group, seed, step, inv_temperature, layer, draw, *, n):
    kept = group_drawn(logits, group, seed, step, inv_temperature, layer, draw, n)
    return encode(kept, code_dtype(logits.shape[-1]))


def group_sample_masked_weight(weight, logits, group, seed, step, inv_temperature, layer, draw, *, n):
    return masked(weight, group_drawn(logits, group, seed, step, inv_temperature, layer, draw, n))


def group_top_n_mask(scores, *, n):
    return encode(top_n(columns(scores), n), code_dtype(scores.shape[-1]))


def group_top_n_masked_weight(weight, scores, *, n):
    return masked(weight, top_n(columns(scores), n))


def group_code_masked_weight(weight, codes):
    return masked(weight, decode(codes, weight.shape[-1]))


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


def score_terms(z, group, seed, step, coef, draw, inv_temperature, layer, n):
    """Columns of coef * score(mask of a draw), the score in the logits, not in z."""
    keys = drawn_keys(z, group, seed, step, layer, draw)
    kept = top_n(keys, n)
    scores = exact_score(z, kept, n) if n <= EXACT_SCORE_MAX_N else arrival_score(z, keys, kept)
    # d z / d logits is 1 / temperature
    scale = coef * inv_temperature
    return [s * scale for s in scores]


def group_score_terms(logits, group, seed, step, coef, draw, inv_temperature, layer, *, n):
    z = scaled(columns(logits), inv_temperature)
    return uncolumns(score_terms(z, group, seed, step, coef, draw, inv_temperature, layer, n))


def group_updated_logits(logits, group, seed, step, coef, draws, inv_temperature, layer, *, n):
    """float32 groups: logits less the sum over k of coef[k] * score(mask of draw draws[k])."""
    xs = [x.to(torch.float32) for x in columns(logits)]
    z = scaled(xs, inv_temperature)
    delta = None
    for k in range(coef.shape[0]):
        terms = score_terms(z, group, seed, step, coef[k], draws[k], inv_temperature, layer, n)
        delta = terms if delta is None else [d + t for d, t in zip(delta, terms, strict=True)]
    return uncolumns([x - d for x, d in zip(xs, delta, strict=True)])


def group_round_logits(x, group, seed, step, draws, layer, *, dtype):
    """float32 groups rounded stochastically to a 16-bit dtype with words under the first draw's id."""
    words = philox.group_words(group, x.shape[-1], philox.STREAM_ROUNDING, seed, step, layer, draws[0])
    rounded = [round_stochastically(x_i, r, dtype) for x_i, r in zip(columns(x), words, strict=True)]
    return uncolumns(rounded).to(dtype)


def mask_slope(weight, grad, square, kept):
    """Columns of a loss's slope in the mask, less its mean over the group: keeping N holds the sum of the mask.

    For G the derivative in the masked weight and F the second one, the loss changes by w G (m' - m) +
    w^2 F (m' - m)^2 / 2 when a weight goes from m to m'. Its slope halfway between kept and dropped, w G +
    (1/2 - m) w^2 F, is what going either way costs; w G alone is blind to a change that overshoots.
    """
    h = []
    for w, g, s, k in zip(columns(weight), columns(grad), columns(square), kept, strict=True):
        w = w.to(torch.float32)
        half = 0.5 * (w * w * s)
        h.append(w * g.to(torch.float32) + torch.where(k, 0.0 - half, half))
    mean = fixed_sum(h) * (1.0 / len(h))
    return [h_i - mean for h_i in h]


def bounded_step(gradient, rate, largest):
    """rate * gradient within +-largest; none where one of the two is not finite."""
    step = gradient * torch.where(rate < torch.inf, rate, 0.0)
    step = torch.maximum(torch.minimum(step, largest), 0.0 - largest)
    return torch.where(gradient.abs() < torch.inf, step, 0.0)


def group_mask_slope(weight, grad, square, codes):
    return uncolumns(mask_slope(weight, grad, square, decode(codes, weight.shape[-1])))


def group_descended_logits(gradient, logits, rate, largest):
    """(float32 groups: logits less the bounded step; each group's sum of squares of the gradient)."""
    gradient = [g.to(torch.float32) for g in columns(gradient)]
    steps = [bounded_step(g, rate, largest) for g in gradient]
    new = [x.to(torch.float32) - step for x, step in zip(columns(logits), steps, strict=True)]
    return uncolumns(new), fixed_sum([g * g for g in gradient])


def group_straight_through_logits(weight, grad, square, codes, logits, rate, largest):
    return group_descended_logits(group_mask_slope(weight, grad, square, codes), logits, rate, largest)


def group_unpacked(values, codes, *, m):
    """[..., M]: the N values [..., N] of each group in order where its code keeps, zeros elsewhere."""
    values, kept = columns(values), decode(codes, m)
    n = len(values)
    before = torch.zeros_like(kept[0], dtype=torch.int32)
    out = []
    for i in range(m):
        # so many of the values stand before: all that lie behind have to find room as well
        fewest, most = max(0, i - (m - n)), min(i, n - 1)
        value = values[fewest]
        for count in range(fewest + 1, most + 1):
            value = torch.where(before >= count, values[count], value)
        out.append(torch.where(kept[i], value, 0))
        before = before + kept[i].to(torch.int32)
    return uncolumns(out)


def group_index(x, group_offset, group_row_stride, m):
    """Index in the whole layer of every group of a matrix [rows, K], int64 [rows, K / M]."""
    return philox.group_index(x.shape[0], x.shape[1] // m, group_offset, group_row_stride, x.device)


def sample_mask(logits, seed, step, inv_temperature, layer, draw, group_offset, group_row_stride, *, n, m):
    """Group codes [rows, K / M] of a draw."""
    group = group_index(logits, group_offset, group_row_stride, m)
    return group_sample_mask(grouped(logits, m), group, seed, step, inv_temperature, layer, draw, n=n)


def sample_masked_weight(
    weight, logits, seed, step, inv_temperature, layer, draw, group_offset, group_row_stride, *, n, m
):
    """The weight [rows, K] under the mask that ``sample_mask`` draws, exact zeros elsewhere."""
    group = group_index(logits, group_offset, group_row_stride, m)
    return group_sample_masked_weight(
        grouped(weight, m), grouped(logits, m), group, seed, step, inv_temperature, layer, draw, n=n
    ).view(weight.shape)


def top_n_mask(scores, *, n, m):
    """Group codes [rows, K / M] of the N largest scores, ties to the lower index."""
    return group_top_n_mask(grouped(scores, m), n=n)


def top_n_masked_weight(weight, scores, *, n, m):
    """The weight [rows, K] where its score is among the N largest of its group, exact zeros elsewhere."""
    return group_top_n_masked_weight(grouped(weight, m), grouped(scores, m), n=n).view(weight.shape)


def code_masked_weight(weight, codes, *, n, m):
    """The weight [rows, K] where its group code [rows, K / M] keeps it, exact zeros elsewhere."""
    return group_code_masked_weight(grouped(weight, m), codes).view(weight.shape)


def mask_log_prob(logits, codes, inv_temperature, *, n, m):
    """log p(S) of the masks with those codes, float32 [rows, K / M]."""
    return group_mask_log_prob(grouped(logits, m), codes, inv_temperature, n=n)


def mask_score(logits, codes, grad, inv_temperature, *, n, m):
    """Gradient of sum(grad * log p(S)) in the logits, float32 [rows, K]; grad float32 [rows, K / M]."""
    return group_mask_score(grouped(logits, m), codes, grad, inv_temperature, n=n).view(logits.shape)


def score_update_(logits, coef, seed, step, draws, inv_temperature, layer, group_offset, group_row_stride, *, n, m):
    """logits [rows, K] -= sum over k of coef[k] * score(mask of draw draws[k]), in place.

    All scores are taken at the given logits; coef float32 [draws], draws int64 [draws]. 16-bit logits
    are rounded stochastically, once, with words of the rounding stream under the first draw's id.
    """
    group = group_index(logits, group_offset, group_row_stride, m)
    counter = (group, seed, step)
    new = group_updated_logits(grouped(logits, m), *counter, coef, draws, inv_temperature, layer, n=n)
    if logits.dtype != torch.float32:
        new = group_round_logits(new, *counter, draws, layer, dtype=logits.dtype)
    logits.copy_(new.view(logits.shape))


def straight_through_grad(weight, grad, square, codes, *, m):
    """The slope of a loss in the mask of ``codes`` [rows, K / M], less its mean over every group, float32 [rows, K].

    ``grad`` and ``square`` [rows, K] are the loss's first and second derivative in the masked weight.
    """
    tensors = (grouped(x, m) for x in (weight, grad, square))
    return group_mask_slope(*tensors, codes).view(weight.shape)


def straight_through_update_(
    logits, weight, grad, square, codes, rate, seed, step, largest, layer, group_offset, group_row_stride, *, m
):
    """``descend_`` by ``straight_through_grad``."""
    gradient = straight_through_grad(weight, grad, square, codes, m=m)
    return descend_(logits, gradient, rate, seed, step, largest, layer, group_offset, group_row_stride, m=m)


def descend_(logits, gradient, rate, seed, step, largest, layer, group_offset, group_row_stride, *, m):
    """logits [rows, K] -= rate * gradient within +-largest, in place; returns the mean square of the gradient, 0-dim.

    Where rate or gradient is not finite nothing moves. 16-bit logits are rounded stochastically, with words of the
    rounding stream under draw 0.
    """
    new, squares = group_descended_logits(grouped(gradient, m), grouped(logits, m), rate, largest)
    if logits.dtype != torch.float32:
        group = group_index(logits, group_offset, group_row_stride, m)
        draws = torch.zeros(1, dtype=torch.int64, device=logits.device)
        new = group_round_logits(new, group, seed, step, draws, layer, dtype=logits.dtype)
    logits.copy_(new.view(logits.shape))
    return squares.sum() / max(logits.numel(), 1)


def unpack_nm(values, bitmask, *, n, m):
    """[rows, K] of values [rows, K N / M] and their bitmask, bit for bit."""
    k = values.shape[1] // n * m
    as_integers = values.view(INTEGERS[values.itemsize])
    return group_unpacked(grouped(as_integers, n), codes_of(bitmask, k, m), m=m).flatten(1).view(values.dtype)


def best_swaps(weight, product, codes, blocks, *, m):
    """The swap of a kept with a dropped weight in every group that lowers the reconstruction error most.

    The error of a row is E = d H d^T, d = weight * mask - weight. With R = d H, and c_i = -2 w_i R_i + w_i^2 H_ii
    for a kept weight and +2 w_j R_j + w_j^2 H_jj for a dropped one, a swap changes it by c_i + c_j - 2 w_i w_j H_ij.

    Args:
        weight, product: w and R, float32 [rows, M, K / M]: weights that stand at the same place of their groups
            lie together.
        codes: [rows, K / M].
        blocks: the diagonal blocks of H, float32 [M, M, K / M].

    Returns:
        (change of E, float32 [rows, K / M]; codes of the two weights, whose exclusive or with the mask's is the
        swapped mask); on a tie the pair with the lower indices.
    """
    w, r = weight.unbind(1), product.unbind(1)
    kept = decode(codes, m)
    costs = []
    for i in range(m):
        pull = 2.0 * w[i] * r[i]
        costs.append(torch.where(kept[i], 0.0 - pull, pull) + w[i] * w[i] * blocks[i, i])
    best = torch.full_like(costs[0], torch.inf)
    swap = torch.zeros_like(codes)
    for i in range(m):
        for j in range(i + 1, m):
            change = costs[i] + costs[j] - 2.0 * (w[i] * w[j]) * blocks[i, j]
            better = (kept[i] != kept[j]) & (change < best)
            best = torch.where(better, change, best)
            swap = torch.where(better, pair_code(i, j, m), swap)
    return best, swap


def pair_code(i, j, m):
    """Group code of two weights, as a signed integer where M = 32."""
    code = 1 << i | 1 << j
    return code - (1 << 32) if m == 32 and j == 31 else code
