"""The score as an exponential race."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import exp, saturated
from .constants import BERNOULLI, LARGEST_LOG_ARRIVAL
from .plackett_luce import dropped_total, largest_dropped


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
def exponential_race_score(z, keys, kept, M: tl.constexpr):
    """Unbiased estimate of the gradient of log p(S) given the keys of the draw, any N; columns."""
    kappa = saturated(largest_dropped(keys, kept, M))
    largest = saturated(largest_dropped(z, kept, M))
    values = ()
    for i in tl.static_range(M):
        least, most = tl.where(kept[i], kappa, largest), tl.where(kept[i], LARGEST_LOG_ARRIVAL, 0.0)
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
