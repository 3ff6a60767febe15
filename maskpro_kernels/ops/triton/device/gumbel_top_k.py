"""Tiles as columns, group codes, and Gumbel-top-k draws."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import MINUS_LOG_AT_ZERO, NATS_PER_BIT_PATTERN, STREAM_DRAW, TANGENT, TWO_POW_MINUS_32, ln
from .philox import group_words


@triton.jit
def split_columns(x, M: tl.constexpr):
    """Split a tile [G, M] into M columns, blocks [G]."""
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
    """Join M columns, blocks [G], to a tile [G, M]."""
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
def decode_tile(code, M: tl.constexpr):
    """int1 [G, M] from int32 group codes."""
    return ((code[:, None] >> tl.arange(0, M)[None, :]) & 1) != 0


@triton.jit
def gumbel(r):
    """Gumbel noise of uint32 words."""
    u = (r.to(tl.float32) + 0.5) * TWO_POW_MINUS_32
    v = ((r ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * TWO_POW_MINUS_32
    e = 0.0 - ln(v, 0.0 - u)
    return 0.0 - ln(e, e - 1.0)


@triton.jit
def scaled(x, inv_temperature, M: tl.constexpr):
    """Columns less the group's largest, divided by the temperature."""
    largest = x[0]
    for i in tl.static_range(1, M):
        largest = tl.maximum(largest, x[i])
    z = ()
    for i in tl.static_range(M):
        z = z + ((x[i] - largest) * inv_temperature,)
    return z


@triton.jit
def keys_of(z, words, M: tl.constexpr):
    """Scaled logits plus Gumbel noise from given words."""
    keys = ()
    for i in tl.static_range(M):
        keys = keys + (z[i] + gumbel(words[i]),)
    return keys


@triton.jit
def drawn_keys(z, group, M: tl.constexpr, key):
    """Scaled logits plus Gumbel noise."""
    return keys_of(z, group_words(group, M, STREAM_DRAW, key), M)


@triton.jit
def top_n_of_4(keys, N: tl.constexpr):
    """``top_n`` of four: compare each pair once, and combine the three results of a column by logic."""
    over01 = keys[0] >= keys[1]
    over02 = keys[0] >= keys[2]
    over03 = keys[0] >= keys[3]
    over12 = keys[1] >= keys[2]
    over13 = keys[1] >= keys[3]
    over23 = keys[2] >= keys[3]
    wins = (
        (over01, over02, over03),
        (~over01, over12, over13),
        (~over02, ~over12, over23),
        (~over03, ~over13, ~over23),
    )
    kept = ()
    for i in tl.static_range(4):
        a, b, c = wins[i]
        if N == 1:
            kept = kept + (a & b & c,)
        elif N == 2:
            kept = kept + ((a & b) | (c & (a | b)),)
        else:
            kept = kept + (a | b | c,)
    return kept


@triton.jit
def top_n(keys, N: tl.constexpr, M: tl.constexpr):
    """int1 columns of the N largest keys of each group, ties to the lower index."""
    if M == 2:
        first = keys[0] >= keys[1]
        kept = (first, ~first)
    elif M == 4:
        kept = top_n_of_4(keys, N)
    else:
        # at M = 16 half of the instructions of comparing all pairs
        threshold = descending(keys, M)[N - 1]
        above = ()
        ahead = tl.zeros_like(keys[0]).to(tl.int32)
        for i in tl.static_range(M):
            above = above + (keys[i] > threshold,)
            if N > 1:
                ahead += above[i].to(tl.int32)
        kept = ()
        for i in tl.static_range(M):
            # with NaN, such as from infinite logits, all are tied, so that N are still kept
            tied = ~(above[i] | (keys[i] < threshold))
            kept = kept + (above[i] | (tied & (ahead < N)),)
            ahead += tied.to(tl.int32)
    return kept


@triton.jit
def larger(a, b):
    """Maximum; NaN if one is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def smaller(a, b):
    """Minimum; NaN if one is NaN."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def every_other(columns, FIRST: tl.constexpr, K: tl.constexpr):
    """Every second one of K columns, from FIRST on."""
    chosen = ()
    for i in tl.static_range(FIRST, K, 2):
        chosen = chosen + (columns[i],)
    return chosen


@triton.jit
def merged(first, second, K: tl.constexpr):
    """Merge K and K columns in descending order to 2 K."""
    if K == 1:
        result = (larger(first[0], second[0]), smaller(first[0], second[0]))
    else:
        evens = merged(every_other(first, 0, K), every_other(second, 0, K), K // 2)
        odds = merged(every_other(first, 1, K), every_other(second, 1, K), K // 2)
        result = (evens[0],)
        for i in tl.static_range(K - 1):
            result = result + (larger(odds[i], evens[i + 1]), smaller(odds[i], evens[i + 1]))
        result = result + (odds[K - 1],)
    return result


@triton.jit
def descending(x, M: tl.constexpr):
    """Columns with the values of each group in descending order, by Batcher's odd-even merge sort (1968).

    Each column depends on all, so all are NaN if one is.
    """
    if M == 1:
        result = x
    else:
        first = ()
        second = ()
        for i in tl.static_range(M // 2):
            first = first + (x[i],)
            second = second + (x[M // 2 + i],)
        result = merged(descending(first, M // 2), descending(second, M // 2), M // 2)
    return result


@triton.jit
def minus_log(r):
    """Upper bound of -ln((r + 1/2) / 2^32) for uint32 words; see ``bounds.minus_log``."""
    pattern = r.to(tl.float32).to(tl.int32, bitcast=True).to(tl.float32)
    return MINUS_LOG_AT_ZERO - pattern * NATS_PER_BIT_PATTERN


@triton.jit
def expected(x, ordered, inv_temperature, words, N: tl.constexpr, M: tl.constexpr):
    """(int1 columns of the N largest logits; int1 for groups whose draw with these words keeps them); see ``bounds``.

    ``ordered`` are the logits in descending order. The columns of other groups are undefined. Noise falls with its
    word: the smallest word of the dropped and the largest of the kept bound it.
    """
    least = tl.full(words[0].shape, 0xFFFFFFFF, tl.uint32)
    most = tl.full(words[0].shape, 0, tl.uint32)
    kept = ()
    for i in tl.static_range(M):
        kept = kept + (x[i] >= ordered[N - 1],)
        least = tl.minimum(least, tl.where(kept[i], 0xFFFFFFFF, words[i]))
        most = tl.maximum(most, tl.where(kept[i], words[i], 0))
    smallest_kept = (ordered[N - 1] - ordered[0]) * inv_temperature
    largest_dropped = (ordered[N] - ordered[0]) * inv_temperature
    floor = TANGENT - minus_log(most ^ 0xFFFFFFFF) * 0.5
    # a tie at the N-th largest would keep more than N
    determined = (ordered[N] < ordered[N - 1]) & (largest_dropped + minus_log(least) < smallest_kept + floor)
    return kept, determined


@triton.jit
def flipped(x, kept, M: tl.constexpr):
    """int32 1 for groups whose mask differs from the N largest logits, ties to the lower index."""
    least = tl.full(x[0].shape, float("inf"), tl.float32)
    most = tl.full(x[0].shape, float("-inf"), tl.float32)
    for i in tl.static_range(M):
        least = tl.minimum(least, tl.where(kept[i], x[i], float("inf")))
        most = tl.maximum(most, tl.where(kept[i], float("-inf"), x[i]))
    # of equal logits, a dropped one before a kept one
    passed_over = tl.zeros(x[0].shape, tl.int1)
    tied = tl.zeros(x[0].shape, tl.int1)
    for i in tl.static_range(M):
        tied = tied | (kept[i] & (x[i] == most) & passed_over)
        passed_over = passed_over | (~kept[i] & (x[i] == most))
    return ((most > least) | tied).to(tl.int32)


@triton.jit
def noisy_code(x, words, inv_temperature, N: tl.constexpr, M: tl.constexpr):
    """int32 group codes of a draw with given words."""
    keys = keys_of(scaled(x, inv_temperature, M), words, M)
    return encode(top_n(keys, N, M), M)


@triton.jit
def drawn_code(x, group, inv_temperature, N: tl.constexpr, M: tl.constexpr, key):
    """int32 group codes of a draw from columns of float32 logits.

    A block with only determined draws computes no noise.
    """
    code, _ = drawn_code_and_flips(x, group, inv_temperature, N, M, key)
    return code


@triton.jit
def drawn_code_and_flips(x, group, inv_temperature, N: tl.constexpr, M: tl.constexpr, key):
    """(``drawn_code``, int32 1 where it differs from the N largest logits)."""
    words = group_words(group, M, STREAM_DRAW, key)
    kept, determined = expected(x, descending(x, M), inv_temperature, words, N, M)
    code = encode(kept, M)
    flips = tl.zeros_like(code)
    if tl.min(determined.to(tl.int32), 0) == 0:
        code = noisy_code(x, words, inv_temperature, N, M)
        flips = flipped(x, decode(code, M), M)
    return code, flips
