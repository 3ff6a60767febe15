"""Gumbel-top-k draws."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import ln
from .constants import BOUND_AT_ZERO, LEAST_NOISE, NATS_PER_BIT_PATTERN, STREAM_DRAW, TWO_POW_MINUS_32
from .groups import encode
from .philox import group_words
from .plackett_luce import largest_dropped, smallest_kept


@triton.jit
def gumbel(r):
    """Gumbel noise of uint32 words."""
    u = (r.to(tl.float32) + 0.5) * TWO_POW_MINUS_32
    v = ((r ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * TWO_POW_MINUS_32
    e = 0.0 - ln(v, 0.0 - u)
    return 0.0 - ln(e, e - 1.0)


@triton.jit
def scaled(x, inv_temperature, M: tl.constexpr):
    """Columns less the group's largest, over the temperature."""
    largest = x[0]
    for i in tl.static_range(1, M):
        largest = tl.maximum(largest, x[i])
    z = ()
    for i in tl.static_range(M):
        z = z + ((x[i] - largest) * inv_temperature,)
    return z


@triton.jit
def drawn_keys(z, group, M: tl.constexpr, key):
    """Scaled logits plus Gumbel noise."""
    words = group_words(group, M, STREAM_DRAW, key)
    keys = ()
    for i in tl.static_range(M):
        keys = keys + (z[i] + gumbel(words[i]),)
    return keys


@triton.jit
def top_n(keys, N: tl.constexpr, M: tl.constexpr):
    """Which columns hold the N largest keys, ties to the lower index: int1 columns."""
    kept = ()
    # one column's count after the other: of all at once sm_100 holds the comparisons, more than it has registers for
    for i in tl.static_range(M):
        ahead = tl.zeros_like(keys[0]).to(tl.int32)
        for j in tl.static_range(i):
            ahead += (keys[j] >= keys[i]).to(tl.int32)
        for j in tl.static_range(i + 1, M):
            ahead += (keys[j] > keys[i]).to(tl.int32)
        kept = kept + (ahead < N,)
    return kept


@triton.jit
def determined(z, kept, words, M: tl.constexpr):
    """int1 where no noise of these words can make a dropped column overtake a kept one; see ``bounds``.

    Noise falls with its word, so the smallest word of the dropped bounds them all.
    """
    smallest = tl.full(words[0].shape, 0xFFFFFFFF, tl.uint32)
    for i in tl.static_range(M):
        smallest = tl.minimum(smallest, tl.where(kept[i], 0xFFFFFFFF, words[i]))
    quarter = (smallest >> 2).to(tl.float32)
    bound = BOUND_AT_ZERO - quarter.to(tl.int32, bitcast=True).to(tl.float32) * NATS_PER_BIT_PATTERN
    return largest_dropped(z, kept, M) + bound < smallest_kept(z, kept, M) + LEAST_NOISE


@triton.jit
def drawn_code(z, group, N: tl.constexpr, M: tl.constexpr, key):
    """int32 group codes of a draw; a block whose draws are all determined computes no noise."""
    words = group_words(group, M, STREAM_DRAW, key)
    kept = top_n(z, N, M)
    code = encode(kept, M)
    if tl.min(determined(z, kept, words, M).to(tl.int32), 0) == 0:
        keys = ()
        for i in tl.static_range(M):
            keys = keys + (z[i] + gumbel(words[i]),)
        code = encode(top_n(keys, N, M), M)
    return code
