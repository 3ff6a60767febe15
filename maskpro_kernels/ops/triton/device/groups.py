"""Tiles as columns, and group codes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split_columns(x, M: tl.constexpr):
    """The M columns, blocks [G], of a tile [G, M]."""
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
    """A tile [G, M] from its M columns, blocks [G]."""
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
