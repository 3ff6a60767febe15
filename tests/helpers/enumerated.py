"""Exact draws and scores, by enumeration and in high precision, which tests compare with.

Nothing here comes from the package: a mistake there must not be repeated here.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations

import mpmath
import numpy as np
import torch

# Where the public functions reach the kernels: a GPU, or Triton's interpreter
KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

DIGITS = 60
SMALLEST_CELL = 10.0


@cache
def subset_codes(n: int, m: int) -> np.ndarray:
    """All codes with n of m bits set, ascending, as unsigned integers."""
    return np.array(sorted(sum(1 << i for i in kept) for kept in combinations(range(m), n)), dtype=np.int64)


@cache
def _layers(n: int, m: int) -> list[list[tuple[int, torch.Tensor, torch.Tensor]]]:
    """For each number of drawn weights k < n: (i, sets of k without i, those sets with i)."""
    layers = []
    for k in range(n):
        sets = torch.from_numpy(subset_codes(k, m))
        layers.append([(i, free, free | 1 << i) for i in range(m) for free in [sets[(sets >> i & 1) == 0]]])
    return layers


def set_probabilities(logits: torch.Tensor, n: int) -> torch.Tensor:
    """Probability of every set in the order of ``subset_codes``: float64, differentiable in the logits [M].

    By the subset dynamic program over what has been drawn so far. What has not been drawn is summed,
    never subtracted from the whole.
    """
    m = len(logits)
    z = logits.to(torch.float64)
    e = torch.exp(z - z.max().detach())
    subsets = torch.arange(1 << m)
    remaining = torch.zeros(1 << m, dtype=torch.float64)
    for i in range(m):
        remaining = remaining + torch.where((subsets >> i & 1) == 0, e[i], 0.0)
    p = torch.zeros(1 << m, dtype=torch.float64)
    p[0] = 1.0
    for layer in _layers(n, m):
        grown = torch.zeros_like(p)
        for i, free, with_i in layer:
            grown = grown.index_add(0, with_i, p[free] * e[i] / remaining[free])
        p = grown
    return p[torch.from_numpy(subset_codes(n, m))]


def code_counts(codes: torch.Tensor, n: int, m: int) -> np.ndarray:
    """Count the draws of each set of ``subset_codes``; a code of any other set is an error."""
    assert m <= 16
    counts = np.bincount(codes.cpu().flatten().to(torch.int64).numpy(), minlength=1 << m)
    expected = subset_codes(n, m)
    assert counts[expected].sum() == codes.numel(), f"a group does not keep exactly {n} of {m}"
    return counts[expected]


def chi_square_p(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """p-value of Pearson's test; cells that expect fewer than SMALLEST_CELL are pooled into one."""
    expected = probabilities * counts.sum()
    small = expected < SMALLEST_CELL
    observed_cells, expected_cells = counts[~small].astype(np.float64), expected[~small]
    pooled_observed, pooled_expected = counts[small].sum(), expected[small].sum()
    if pooled_expected >= SMALLEST_CELL:
        observed_cells = np.append(observed_cells, pooled_observed)
        expected_cells = np.append(expected_cells, pooled_expected)
    elif small.any():
        smallest = expected_cells.argmin()
        observed_cells[smallest] += pooled_observed
        expected_cells[smallest] += pooled_expected
    assert len(expected_cells) > 1, "nothing to test: one cell holds every draw"
    statistic = ((observed_cells - expected_cells) ** 2 / expected_cells).sum()
    return float(mpmath.gammainc((len(expected_cells) - 1) / 2, a=statistic / 2, regularized=True))


def kept_of(code: int, m: int) -> list[int]:
    return [i for i in range(m) if code >> i & 1]


def _weights(logits) -> list[mpmath.mpf]:
    return [mpmath.exp(mpmath.mpf(float(x))) for x in logits]


def _sums_of_remaining(weights, kept):
    """s(T) for every subset T of the kept: the dropped weights and T."""
    sums = [mpmath.fsum(w for i, w in enumerate(weights) if i not in kept)]
    for i in kept:
        sums += [s + weights[i] for s in sums]
    return sums


def exact_log_prob(logits, code: int) -> mpmath.mpf:
    """log p(S) by the sum over orders, for every N whose 2^N subsets are few enough."""
    with mpmath.workdps(DIGITS):
        weights, kept = _weights(logits), kept_of(code, len(logits))
        sums = _sums_of_remaining(weights, kept)
        h = [mpmath.mpf(1)]
        for subset in range(1, 1 << len(kept)):
            h.append(sum(h[subset ^ 1 << a] for a in range(len(kept)) if subset >> a & 1) / sums[subset])
        return mpmath.log(h[-1]) + mpmath.fsum(mpmath.mpf(float(logits[i])) for i in kept)


def exact_score(logits, code: int) -> list[mpmath.mpf]:
    """Gradient of log p(S) in the logits by the derivative of the same recursion.

    d h(T) / d l_k = (sum of d h(T - i) / d l_k - h(T) d s(T) / d l_k) / s(T), d s(T) / d l_k being exp l_k
    where k has not been drawn. Subtractions cost up to some 30 of the 60 digits.
    """
    with mpmath.workdps(DIGITS):
        weights, kept = _weights(logits), kept_of(code, len(logits))
        n, m = len(kept), len(weights)
        slots = [kept.index(k) if k in kept else None for k in range(m)]
        sums = _sums_of_remaining(weights, kept)
        h, dh = [mpmath.mpf(1)], [[mpmath.mpf(0)] * m]
        for subset in range(1, 1 << n):
            smaller = [subset ^ 1 << a for a in range(n) if subset >> a & 1]
            h.append(sum(h[t] for t in smaller) / sums[subset])
            row = []
            for k in range(m):
                remains = slots[k] is None or subset >> slots[k] & 1
                grown = sum(dh[t][k] for t in smaller)
                row.append((grown - (h[subset] * weights[k] if remains else 0)) / sums[subset])
            dh.append(row)
        return [(1 if k in kept else 0) + dh[-1][k] / h[-1] for k in range(m)]


def quadrature_log_prob(logits, code: int) -> mpmath.mpf:
    """log p(S) for N too large for the subsets: integral over u = ln t of t e^-t prod(1 - exp(-a_i t)).

    t is the first dropped arrival, a_i a kept weight's rate in units of all the dropped ones'. The
    trapezoid rule with step 1/16 errs far less for such an integrand than what lies beyond the ends, 1e-26
    of the whole.
    """
    with mpmath.workdps(DIGITS):
        weights, kept = _weights(logits), kept_of(code, len(logits))
        rest = mpmath.fsum(w for i, w in enumerate(weights) if i not in kept)
        rates = [weights[i] / rest for i in kept]
        step = mpmath.mpf(1) / 16
        total = mpmath.mpf(0)
        for node in range(-60 * 16, 7 * 16):
            t = mpmath.exp(node * step)
            total += t * mpmath.exp(-t) * mpmath.fprod(-mpmath.expm1(-a * t) for a in rates)
        return mpmath.log(total * step)


def ordered_score(logits: torch.Tensor, keys: torch.Tensor, n: int) -> torch.Tensor:
    """Score of the order in which N weights were drawn (Plackett-Luce), float64 [groups, M]."""
    e = torch.exp(logits.to(torch.float64) - logits.max()).expand(keys.shape[0], -1).clone()
    order = keys.argsort(dim=1, descending=True)[:, :n]
    score = torch.zeros(keys.shape, dtype=torch.float64)
    for drawn in order.unbind(1):
        score -= e / e.sum(1, keepdim=True)
        score.scatter_add_(1, drawn[:, None], torch.ones(len(drawn), 1, dtype=torch.float64))
        e.scatter_(1, drawn[:, None], 0.0)
    return score
