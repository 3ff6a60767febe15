"""Probability and score of a set for any N, by quadrature over the first dropped arrival."""

from __future__ import annotations

from math import factorial

import torch

from .arithmetic import exp, ln, saturated
from .exponential_race import LARGEST_LOG_ARRIVAL, arrival_ratio, dropped_softmax
from .groups import fixed_sum
from .plackett_luce import NEAR_CERTAIN, extremes

# Trapezoid rule in u = ln t, t the first dropped arrival: 1e-14 lie below the first node, less beyond the last
FIRST_NODE = -32.0
LAST_NODE = 5.0
# Of a rate a below e^-256, 1 - exp(-a t) is a t at every node. How far below it lies does not touch the score, and
# would leave no digits to the other weights.
LOWEST_LOG_ARRIVAL = -256.0
# (1 - e^-y) / y = 1 - y/2 + y^2/6 - ... ; below y = 1 the first term left out is 2.5e-8
ONE_MINUS_EXP = tuple((-1.0) ** k / factorial(k + 1) for k in range(1, 10))


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
    """ln of the integrand t e^-t prod(1 - exp(-a_i t)) without the factors that lie in [0.63, 1]; it saturates."""
    total = u - exp(u)
    for term in torch.where(kept, torch.clamp(log_arrival + u, max=0.0), 0.0).unbind(-1):
        total = total + term
    return saturated(total)


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
    ``exact_log_prob``, the complement is summed beside it for draws that are nearly certain. z saturates first, log
    p(S) last.
    """
    z = [saturated(z_i) for z_i in z]
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
    log_prob = saturated(peak + ln(total, total - 1.0))
    return torch.where(capped < NEAR_CERTAIN, ln(1.0 - capped, 0.0 - capped), log_prob)


def quadrature_score(z, kept, n):
    """Gradient of log p(S) in the scaled logits by the same rule, any N, columns.

    Kept: the integrand's mean of y / (e^y - 1), y = a_i t; dropped as in ``exact_score``. z saturates first.
    """
    z = [saturated(z_i) for z_i in z]
    log_arrival, kept_tile = log_arrivals(z, kept)
    log_arrival = torch.clamp(log_arrival, min=LOWEST_LOG_ARRIVAL)
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
