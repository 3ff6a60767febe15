"""Log-probability and score for any N, by quadrature."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import exp, ln, saturated, saturated_columns
from .constants import FIRST_NODE, LARGEST_LOG_ARRIVAL, LOWEST_LOG_ARRIVAL, NEAR_CERTAIN, ONE_MINUS_EXP
from .exponential_race import arrival_ratio, dropped_softmax
from .groups import decode, decode_tile, join_columns, split_columns
from .plackett_luce import largest_dropped


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
    """ln of the integrand at u = ln t without the factors that lie in [0.63, 1], saturated; tiles [G, M]."""
    terms = split_columns(tl.where(kept, tl.minimum(log_arrival + u, 0.0), 0.0), M)
    total = u - exp(u)
    for i in tl.static_range(M):
        total = total + terms[i]
    return saturated(total)


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
