"""The score as an exponential race, an unbiased estimate of linear cost for any N."""

from __future__ import annotations

import torch

from .arithmetic import exp, saturated
from .groups import fixed_sum
from .plackett_luce import dropped_total, extremes

# y / (e^y - 1) = -y/2 + 1 + y^2/12 - y^4/720 + ... (Bernoulli numbers); below y = 1 the first term left out is 2e-8
BERNOULLI = (0.0833333358168602, -0.0013888889225199819, 3.306878113653511e-05, -8.267195881671796e-07)
# e^4.4 = 81: an arrival that is not late by any float32
LARGEST_LOG_ARRIVAL = 4.4


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


def exponential_race_score(z, keys, kept):
    """Unbiased estimate of the gradient of log p(S) given the keys of the draw, any N, columns.

    kappa is the largest dropped key, x_k = exp(z_k - kappa): kept x_k / (exp(x_k) - 1), dropped minus
    their softmax share of the kept ones' sum. Its mean given S is the exact score. z and kappa saturate first.
    """
    z = [saturated(z_i) for z_i in z]
    kappa = saturated(extremes(keys, kept)[0])
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
