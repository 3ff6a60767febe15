"""Bounds on the noise, with which most groups of a sharp mask are determined without logarithms.

A draw keeps the N largest logits if the largest dropped logit plus the most noise of the dropped stays below the
smallest kept logit plus the least noise of the kept. Noise falls with its word. So the smallest word of the dropped and
the largest word of the kept bound both. With u = (r + 1/2) / 2^32 for a word r:

- gumbel(r) = -ln(-ln(1 - u)) <= -ln(u) <= ``minus_log(r)``, for -ln(1 - u) >= u.
- 1 - u is u of the word's complement, so E = -ln(1 - u) <= minus_log(~r). The logarithm is concave and lies below its
  tangent at 2: ln(E) <= ln(2) - 1 + E / 2. So gumbel(r) >= ``least_gumbel(r)`` = 1 - ln(2) - minus_log(~r) / 2.

The smallest noise of all is -3.13. But noise is below -1.02 only for words above 0xF0000000, one in 16. With a bound by
the words, a tenth as many groups are left undetermined as with -3.13. The tangent at 2 leaves the fewest, within 3%, if
two weights are kept. Rounded addition is monotone, so the bounds also hold for the rounded keys of ``reference``.

Kernels bound the noise of each group by both functions. On a CPU a byte a group, its level, bounds their sum over all
words of the group, the ``spread``. Functions take groups like those of ``reference``, and flag groups that the bounds
do not determine: these must be drawn.
"""

from __future__ import annotations

import functools
import operator

import torch

from . import philox, reference

# -ln(2^-32) and the exponent's bias of 127, in nats, plus slack for the rounding of both sides, which is below 1e-4
MINUS_LOG_AT_ZERO = 159 * reference.LN2 + 1e-3
NATS_PER_BIT_PATTERN = reference.LN2 / (1 << 23)
TANGENT = 1 - reference.LN2

# Right shift of a float's bit pattern that leaves its exponent and three bits of its mantissa
LEVEL_SHIFT = 20
NATS_PER_LEVEL = reference.LN2 / 8
# For a word shifted right by two, which fits into 31 bits, and for the largest such word
QUARTER_AT_ZERO = MINUS_LOG_AT_ZERO - 2 * reference.LN2
HIGHEST_PATTERN = (127 + 30) * 8
# Patterns of both words together, the second halved, at level 0
LOWEST_LEVEL = HIGHEST_PATTERN + HIGHEST_PATTERN // 2 - 255
SPREAD_AT_ZERO = 1.5 * QUARTER_AT_ZERO - TANGENT - LOWEST_LEVEL * NATS_PER_LEVEL
# A spread bounds by how much noise narrows a gap, and each key is rounded by up to 2^-24 of itself. No noise lifts a
# dropped key that is lower than twice the kept one by more than 64. Otherwise both roundings together are below 2^-20
# of the kept one plus the slack.
ROUNDING = 1 + 2.0**-20


def minus_log(words):
    """Upper bound of -ln(u), float32, for 32-bit integers in int64.

    The bit pattern of a float, read as an integer, is a piecewise linear lower bound of its log2 (Schraudolph 1999).
    """
    pattern = words.to(torch.float32).view(torch.int32).to(torch.float32)
    return MINUS_LOG_AT_ZERO - pattern * NATS_PER_BIT_PATTERN


def least_gumbel(words):
    """Lower bound of the noise, float32, for 32-bit integers in int64."""
    return TANGENT - minus_log(words ^ philox.WORD) * 0.5


def spread_levels(words):
    """Level of each group's spread, uint8; ``words`` are columns of 32-bit integers in int64."""
    least = functools.reduce(torch.minimum, words)
    most = functools.reduce(torch.maximum, words)
    level = _coarse_pattern(least) + (_coarse_pattern(most ^ philox.WORD) >> 1)
    return torch.clamp(level - LOWEST_LEVEL, 0, 255).to(torch.uint8)


def _coarse_pattern(words):
    return (words >> 2).to(torch.int32).to(torch.float32).view(torch.int32) >> LEVEL_SHIFT


def group_spread_levels(group, key, *, m):
    """``spread_levels`` for a draw of groups of M."""
    return spread_levels(philox.group_words(group, m, philox.STREAM_DRAW, key))


def spread(levels):
    """Upper bound of the difference in noise of two weights of a group, by level; level 0 means no bound."""
    return SPREAD_AT_ZERO - levels.to(torch.float32) * NATS_PER_LEVEL


def descending(xs):
    """Columns with the values of each group in descending order, by Batcher's odd-even merge sort (1968).

    A group with NaN has no defined order.
    """
    xs = list(xs)
    count = len(xs)
    sorted_ = 1
    while sorted_ < count:
        distance = sorted_
        while distance:
            for start in range(distance % sorted_, count - distance, 2 * distance):
                for i in range(start, min(start + distance, count - distance)):
                    j = i + distance
                    if i // (2 * sorted_) == j // (2 * sorted_):
                        swap = xs[i] < xs[j]
                        xs[i], xs[j] = torch.where(swap, xs[j], xs[i]), torch.where(swap, xs[i], xs[j])
            distance //= 2
        sorted_ *= 2
    return xs


class Expected:
    """Top-N mask of groups, given as columns of float32 logits, and the groups for which noise cannot change it.

    Attributes:
        determined: groups whose draw must keep the N largest. Results for other groups are undefined.
        ordered: groups without NaN, whose N largest logits differ by finite float32 numbers.
        kept: whether a weight is among the N largest.
    """

    def __init__(self, xs, levels, inv_temperature, n):
        self.xs = xs
        self.inv_temperature = inv_temperature
        self.n = n
        self.descending = descending(xs)
        numbers = functools.reduce(operator.and_, [x == x for x in xs])
        # rounded subtraction and multiplication are monotone
        self.smallest_kept, largest_dropped = self._scaled(self.descending[n - 1 : n + 1])
        self.ordered = numbers & (self.smallest_kept > -torch.inf)
        apart = largest_dropped + spread(levels) < self.smallest_kept * ROUNDING
        self.determined = numbers & (levels != 0) & apart
        self.kept = [x >= self.descending[n - 1] for x in xs]

    def _scaled(self, xs):
        return [(x - self.descending[0]) * self.inv_temperature for x in xs]

    def flags(self):
        """uint8 1 for groups that are not determined, so that code can search bytes for them."""
        return torch.where(self.determined, 0, 1).to(torch.uint8)

    def score(self):
        """``reference.exact_score`` of the kept weights, N <= EXACT_SCORE_MAX_N."""
        if (self.n, len(self.xs)) == (2, 4):
            return self._score_2_of_4()
        # no dropped logit is above the smallest kept one
        return reference.exact_score(self._scaled(self.xs), self.kept, self.n, centre=self.smallest_kept)

    def _score_2_of_4(self):
        """``exact_score`` for 2:4 with sorted logits: the second one is the centre, so its e is 1.

        The result of a column depends on its logit, and on which of the two kept weights has the lower index.
        """
        xs = self.xs
        kept = self.kept
        centre = self.smallest_kept
        largest, _, third, _ = self.descending
        first_e = reference.exp(torch.clamp(0.0 - centre, max=reference.EXPONENT_CLAMP))
        dropped_e = [reference.exp(reference.saturated(z) - centre) for z in self._scaled(self.descending[2:])]
        dropped_sum = dropped_e[0] + dropped_e[1]
        is_largest = [x == largest for x in xs]
        largest_first = is_largest[0] | (~kept[0] & (is_largest[1] | (~kept[1] & is_largest[2])))
        sums = [dropped_sum + first_e, dropped_sum + 1.0]
        inverse = [reference.RECIPROCAL_SCALE / total for total in sums]
        # both are summed in the order of columns
        inverse_both = reference.RECIPROCAL_SCALE / torch.where(largest_first, sums[0] + 1.0, sums[1] + first_e)
        inverse_h = (1.0 / reference.RECIPROCAL_SCALE) / (inverse[0] + inverse[1])
        scores = []
        for i in inverse:
            drawn_first = dropped_sum * i
            scores.append((drawn_first * inverse_both + drawn_first * i) * inverse_h)
        # if all dropped ones are 0, both scores are 0
        share = (scores[0] + scores[1]) / torch.clamp(dropped_sum, min=reference.SMALLEST_NORMAL)
        dropped = [0.0 - e * share for e in dropped_e]
        return [
            torch.where(k, torch.where(top, *scores), torch.where(x == third, *dropped))
            for x, k, top in zip(xs, kept, is_largest, strict=True)
        ]


def group_expected_mask(logits, levels, inv_temperature, n):
    """(mask columns of the N largest, ``Expected.flags``) of groups of logits."""
    expected = Expected(_float_columns(logits), levels, inv_temperature, n)
    return expected.kept, expected.flags()


def group_expected_terms(logits, levels, coef, inv_temperature, *, n):
    """(``reference.group_score_terms``, valid for determined groups; ``Expected.flags``)."""
    expected = Expected(_float_columns(logits), levels, inv_temperature, n)
    scale = coef * inv_temperature
    return reference.uncolumns([s * scale for s in expected.score()]), expected.flags()


def group_expected_update(logits, levels, coef, inv_temperature, *, n):
    """(``reference.group_updated_logits`` for determined groups, logits for others; ``Expected.flags``)."""
    xs = _float_columns(logits)
    expected = Expected(xs, levels, inv_temperature, n)
    scale = coef[0] * inv_temperature
    new = [torch.where(expected.determined, x - s * scale, x) for x, s in zip(xs, expected.score(), strict=True)]
    return reference.uncolumns(new), expected.flags()


def _float_columns(logits):
    return [x.to(torch.float32) for x in reference.columns(logits)]
