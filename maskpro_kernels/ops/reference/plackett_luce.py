"""Plackett-Luce: log-probability and score of an unordered set drawn without replacement, and updates by the score.

Up to N = EXACT_SCORE_MAX_N both use recursions over the subsets of the kept weights. For larger N, a given mask needs
quadrature over the first dropped arrival. An update then treats its draw as an exponential race, which gives an
unbiased estimate of the score at linear cost.
"""

from __future__ import annotations

import functools
from math import factorial

import torch

from .arithmetic import exp, group_round_logits, ln, saturated, scalar
from .groups import columns, decode, fixed_sum, group_index, grouped, uncolumns
from .gumbel_top_k import drawn_keys, scaled, top_n

# Kept weights further than this above the centre are almost surely drawn first
EXPONENT_CLAMP = 20.0
# A factor of each 1 / s, so that products of N of them are not subnormal; it cancels in q / h
RECIPROCAL_SCALE = 4096.0
# If the probability p of all other draws is less than this, log p(S) is computed as ln(1 - p)
NEAR_CERTAIN = 0.25
# Up to this N the score is the exact gradient of log p(S); above it, its unbiased estimate by arrival times
EXACT_SCORE_MAX_N = 4
# y / (e^y - 1) = -y/2 + 1 + y^2/12 - y^4/720 + ... (Bernoulli numbers); below y = 1 the first omitted term is 2e-8
BERNOULLI = (0.0833333358168602, -0.0013888889225199819, 3.306878113653511e-05, -8.267195881671796e-07)
# e^4.4 = 81: the probability of a later arrival vanishes in float32
LARGEST_LOG_ARRIVAL = 4.4
# Trapezoid rule in u = ln t, t the first dropped arrival: 1e-14 is below the first node, less above the last, u = 5.
# The rule's error falls as |Gamma(N + 1 + 2 pi i / NODE_STEP)| / N!, below 1e-6 up to N = 16
FIRST_NODE = -32.0
NODE_COUNT = 149
NODE_STEP = 0.25
# For a rate a below e^-256, 1 - exp(-a t) is a t at every node. Smaller rates have the same score, and would cost the
# other weights their digits.
LOWEST_LOG_ARRIVAL = -256.0
# (1 - e^-y) / y = 1 - y/2 + y^2/6 - ... ; below y = 1 the first omitted term is 2.5e-8
ONE_MINUS_EXP = tuple((-1.0) ** k / factorial(k + 1) for k in range(1, 10))


def dropped_total(xs, kept):
    """Sum of the dropped columns in index order."""
    return fixed_sum([torch.where(k, 0.0, x) for x, k in zip(xs, kept, strict=True)])


def extremes(z, kept):
    """(largest dropped, smallest kept) scaled logit of each group."""
    dropped = [torch.where(k, -torch.inf, z_i) for z_i, k in zip(z, kept, strict=True)]
    held = [torch.where(k, z_i, torch.inf) for z_i, k in zip(z, kept, strict=True)]
    return functools.reduce(torch.maximum, dropped), functools.reduce(torch.minimum, held)


def kept_positions(kept):
    """Number of kept weights before each column of its group."""
    positions = [torch.zeros_like(kept[0], dtype=torch.int32)]
    for k in kept[:-1]:
        positions.append(positions[-1] + k.to(torch.int32))
    return positions


def gather_slots(xs, kept, positions, n):
    """Values of the kept columns in order: N columns."""
    slots = []
    for a in range(n):
        value = torch.zeros_like(xs[0])
        # columns that can be the a-th kept one
        columns = range(a, len(xs) - n + a + 1)
        # for the first kept column go from the last to the first, so that it overwrites all others
        for i in reversed(columns) if a == 0 else columns:
            here = kept[i] if a in (0, n - 1) else kept[i] & (positions[i] == a)
            value = torch.where(here, xs[i], value)
        slots.append(value)
    return slots


def scatter_slots(slots, dropped, kept, positions):
    """Columns with ``slots`` where kept and ``dropped`` elsewhere."""
    n = len(slots)
    m = len(kept)
    result = []
    for i in range(m):
        # slots of this column if it were kept; one is selected
        *others, last = range(max(0, i - (m - n)), min(i, n - 1) + 1)
        value = slots[last]
        for a in others:
            value = torch.where(positions[i] == a, slots[a], value)
        result.append(torch.where(kept[i], value, dropped[i]))
    return result


def members(subset, n):
    return [i for i in range(n) if subset >> i & 1]


def plackett_luce_terms(z, kept, n, centre=None):
    """Terms of the recursions over the subsets T of the kept weights, T a bit set.

    Returns (e, sum R of the dropped e, exponents ln e, kept e by slot, RECIPROCAL_SCALE / s(T) by T, positions), with e
    = exp(min(z - centre, EXPONENT_CLAMP)) and s(T) = R + e(T) >= 1. The centre is the maximum of the largest dropped
    and the smallest kept z, or given. z saturates first.
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

    h(T) = (sum over i in T of h(T - i)) / s(T), h({}) = 1. It sums over the orders in which T can be drawn.
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

    D_k({k}) = R / s, D_k(T) = (sum over i != k of D_k(T - i)) / s(T); q_k(T) = (D_k(T) + sum over i != k of q_k(T - i))
    / s(T).
    """
    whole = (1 << n) - 1
    d = {}
    q = {}
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

    score_k = q_k(S) / h(S) for kept k. The scores of dropped weights are minus the sum of these, divided by softmax.
    Every term is positive, so nothing cancels, even for nearly certain draws.
    """
    e, dropped_sum, _, _, inverse, positions = plackett_luce_terms(z, kept, n, centre)
    if n == 1:
        slot_scores = [dropped_sum * inverse[1] * (1.0 / RECIPROCAL_SCALE)]
    else:
        inverse_h = (1.0 / RECIPROCAL_SCALE) / order_sum(inverse, n)
        slot_scores = [slot_score(inverse, dropped_sum, k, n) * inverse_h for k in range(n)]
    total = fixed_sum(slot_scores)
    # if all e of dropped weights are 0, their scores are 0
    present = dropped_sum > 0.0
    share = torch.where(present, total / torch.where(present, dropped_sum, 1.0), 0.0)
    return scatter_slots(slot_scores, [0.0 - e_i * share for e_i in e], kept, positions)


def exact_log_prob(z, kept, n):
    """log p(S) by the recursion over subsets, N <= EXACT_SCORE_MAX_N.

    f(T), the probability that a dropped weight is drawn before T is complete, is (R + sum over i in T of e_i f(T - i))
    / s(T). If f(S) is small, log p(S) = ln(1 - f(S)) to full precision; otherwise ln h(S) + sum of ln e_i, which
    saturates.
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


# The exponential race


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
    """(columns of exp(z - largest dropped) where dropped and 0 where kept; their sum)."""
    largest, _ = extremes(z, kept)
    e = [torch.where(k, 0.0, exp(torch.clamp(z_i - largest, max=0.0))) for z_i, k in zip(z, kept, strict=True)]
    return e, fixed_sum(e)


def exponential_race_score(z, keys, kept):
    """Unbiased estimate of the gradient of log p(S) given the keys of the draw, any N, columns.

    kappa is the largest dropped key, x_k = exp(z_k - kappa). Kept: x_k / (exp(x_k) - 1). Dropped: minus the sum of
    these, times softmax. Its mean given S is the exact score. z and kappa saturate first.
    """
    z = [saturated(z_i) for z_i in z]
    kappa = saturated(extremes(keys, kept)[0])
    largest, _ = extremes(z, kept)
    values = []
    for z_i, k in zip(z, kept, strict=True):
        # one exponential for both, since a weight is kept or dropped
        kept_exponent = torch.clamp(z_i - kappa, max=LARGEST_LOG_ARRIVAL)
        e = exp(torch.where(k, kept_exponent, torch.clamp(z_i - largest, max=0.0)))
        values.append(torch.where(k, arrival_ratio(e), e))
    total = fixed_sum([torch.where(k, v, 0.0) for v, k in zip(values, kept, strict=True)])
    share = total / dropped_total(values, kept)
    return [torch.where(k, v, 0.0 - v * share) for v, k in zip(values, kept, strict=True)]


# Quadrature over the first dropped arrival


def one_minus_exp_ratio(y):
    """(1 - e^-y) / min(1, y) for y > 0."""
    series = y * ONE_MINUS_EXP[8] + ONE_MINUS_EXP[7]
    for coefficient in ONE_MINUS_EXP[6::-1]:
        series = series * y + coefficient
    series = series * y + 1.0
    return torch.where(y < 1.0, series, 1.0 - exp(0.0 - y))


def log_arrivals(z, kept):
    """(z - ln(sum of dropped exp z), kept), each stacked to [rows, K / M, M].

    The first is the log of each weight's rate divided by the total rate of dropped weights.
    """
    largest, _ = extremes(z, kept)
    _, dropped_sum = dropped_softmax(z, kept)
    log_sum = ln(dropped_sum, dropped_sum - 1.0)
    # in this order: in groups far below the largest logit another order would lose the logarithm's digits
    return torch.stack([z_i - largest - log_sum for z_i in z], dim=-1), torch.stack(kept, dim=-1)


def nodes(device):
    """Nodes u = ln t of the quadrature, 0-dim float32 tensors."""
    return [torch.tensor(FIRST_NODE + NODE_STEP * k, dtype=torch.float32, device=device) for k in range(NODE_COUNT)]


def node_exponent(log_arrival, kept, u):
    """ln of the integrand t e^-t prod(1 - exp(-a_i t)) without factors within [0.63, 1]; it saturates."""
    total = u - exp(u)
    for term in torch.where(kept, torch.clamp(log_arrival + u, max=0.0), 0.0).unbind(-1):
        total = total + term
    return saturated(total)


def peak_exponent(log_arrival, kept):
    """Largest node_exponent over the nodes."""
    peak = torch.full_like(log_arrival[..., 0], -torch.inf)
    for u in nodes(peak.device):
        peak = torch.maximum(peak, node_exponent(log_arrival, kept, u))
    return peak


def node_weight(log_arrival, kept, u, peak):
    """(the integrand over its e^peak, y = a_i t) at u = ln t."""
    y = exp(torch.clamp(log_arrival + u, max=LARGEST_LOG_ARRIVAL))
    weight = exp(node_exponent(log_arrival, kept, u) - peak)
    for factor in torch.where(kept, one_minus_exp_ratio(y), 1.0).unbind(-1):
        weight = weight * factor
    return weight, y


def quadrature_log_prob(z, kept):
    """log p(S), any N: the integral over the first dropped arrival t of e^-t prod(1 - exp(-a_i t)).

    a_i is a kept weight's rate divided by the total rate of dropped weights. Trapezoid rule in ln t. As in
    ``exact_log_prob``, nearly certain draws use the complement, which is summed as well. z saturates first, log p(S)
    last.
    """
    z = [saturated(z_i) for z_i in z]
    log_arrival, kept = log_arrivals(z, kept)
    peak = peak_exponent(log_arrival, kept)
    total = torch.zeros_like(peak)
    missed = torch.zeros_like(peak)
    for u in nodes(peak.device):
        weight, y = node_weight(log_arrival, kept, u, peak)
        late = torch.zeros_like(peak)
        for x in torch.where(kept, exp(0.0 - y), 0.0).unbind(-1):
            late = late + (1.0 - late) * x
        total = total + weight
        missed = missed + exp(u - exp(u)) * late
    total = total * NODE_STEP
    capped = torch.clamp(missed * NODE_STEP, max=NEAR_CERTAIN)
    log_prob = saturated(peak + ln(total, total - 1.0))
    return torch.where(capped < NEAR_CERTAIN, ln(1.0 - capped, 0.0 - capped), log_prob)


def quadrature_score(z, kept):
    """Gradient of log p(S) in the scaled logits by the same rule, any N, columns.

    Kept: the integrand's mean of y / (e^y - 1), y = a_i t; dropped as in ``exact_score``. z saturates first.
    """
    z = [saturated(z_i) for z_i in z]
    log_arrival, kept_tile = log_arrivals(z, kept)
    log_arrival = torch.clamp(log_arrival, min=LOWEST_LOG_ARRIVAL)
    peak = peak_exponent(log_arrival, kept_tile)
    total = torch.zeros_like(peak)
    sums = torch.zeros_like(log_arrival)
    for u in nodes(peak.device):
        weight, y = node_weight(log_arrival, kept_tile, u, peak)
        total = total + weight
        sums = sums + weight[..., None] * arrival_ratio(y)
    e, dropped_sum = dropped_softmax(z, kept)
    means = torch.where(kept_tile, sums / total[..., None], 0.0).unbind(-1)
    share = fixed_sum(means) / dropped_sum
    return [torch.where(k, mean, 0.0 - e_i * share) for mean, e_i, k in zip(means, e, kept, strict=True)]


# Functions of logits and group codes


def group_mask_log_prob(logits, codes, inv_temperature, *, n):
    z = scaled(columns(logits), inv_temperature)
    kept = decode(codes, len(z))
    return exact_log_prob(z, kept, n) if n <= EXACT_SCORE_MAX_N else quadrature_log_prob(z, kept)


def group_mask_score(logits, codes, grad, inv_temperature, *, n):
    z = scaled(columns(logits), inv_temperature)
    kept = decode(codes, len(z))
    scores = exact_score(z, kept, n) if n <= EXACT_SCORE_MAX_N else quadrature_score(z, kept)
    scale = grad * inv_temperature
    return uncolumns([s * scale for s in scores])


def score_terms(z, group, coef, key, inv_temperature, n):
    """Columns of coef * score(mask of a draw); the score is the gradient in the logits, not in z."""
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


def mask_log_prob(logits, codes, n, m, inv_temperature):
    """log p(S) of the masks with given codes, float32 [rows, K / M]."""
    return group_mask_log_prob(grouped(logits, m), codes, scalar(inv_temperature, logits), n=n)


def mask_score(logits, codes, grad, n, m, inv_temperature):
    """Gradient of sum(grad * log p(S)) in the logits, float32 [rows, K]; grad float32 [rows, K / M]."""
    inverse = scalar(inv_temperature, logits)
    return group_mask_score(grouped(logits, m), codes, grad, inverse, n=n).view(logits.shape)


def score_update_(logits, coef, n, m, inv_temperature, counter):
    """logits [rows, K] -= sum over k of coef[k] * score(mask of draw draw[k]), in place.

    All scores are taken at the given logits; coef float32 [K], the counter's draw int64 [K]. 16-bit logits are rounded
    stochastically, once, with words of the rounding stream of the first draw's id.
    """
    group = group_index(logits, counter, m)
    inverse = scalar(inv_temperature, logits)
    new = group_updated_logits(grouped(logits, m), group, coef, counter.key, inverse, n=n)
    if logits.dtype != torch.float32:
        new = group_round_logits(new, group, counter._replace(draw=counter.draw[0]).key, dtype=logits.dtype)
    logits.copy_(new.view(logits.shape))
