"""The gap between kept and dropped logits, and the flip rate that it gives."""

from __future__ import annotations

import math

from ..functional.checks import LARGEST_GAP
from ..pattern import NMPattern


def flip_rate(gap: float, pattern: str | NMPattern) -> float:
    """Probability that a draw leaves the initial mask of its group: N logits at ``gap``, M - N at 0.

    p(stay) = prod over k < N of (N - k) e^gap / ((N - k) e^gap + M - N).
    """
    pattern = NMPattern(pattern)
    dropped = (pattern.m - pattern.n) * math.exp(-gap)
    return -math.expm1(-sum(math.log1p(dropped / k) for k in range(1, pattern.n + 1)))


def gap_for_flip_rate(rate: float, pattern: str | NMPattern) -> float:
    """The gap at which a share ``rate`` of the groups leaves the initial mask in a draw.

    Raises:
        ValueError: if ``rate`` lies outside what gaps from 0 to 26 give.
    """
    low, high = 0.0, LARGEST_GAP
    rarest, commonest = flip_rate(high, pattern), flip_rate(low, pattern)
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not rarest <= rate <= commonest:
        raise ValueError(f"flip_rate: expected a float in [{rarest:.2g}, {commonest:.4g}] for {pattern}, got {rate!r}")
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if flip_rate(middle, pattern) > rate else (low, middle)
    return (low + high) / 2
