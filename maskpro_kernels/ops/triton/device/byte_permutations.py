"""Placement of the pairs of 2:4 by permutations of bytes.

Tables convert codes of groups to selectors. A table for all six codes has eight bytes, two registers, and one
permutation reads it for the four groups of a word of codes. The low three bits of a code are its index.
"""

from __future__ import annotations

from collections.abc import Callable

import triton
import triton.language as tl

from ..tiles import INTERPRETED as _INTERPRETED

INTERPRETED: tl.constexpr = tl.constexpr(_INTERPRETED)
CODES = (0b0011, 0b0101, 0b0110, 0b1001, 0b1010, 0b1100)
# Mask of the low three bits of each group of a word: selectors of tables
CODE_INDICES: tl.constexpr = tl.constexpr(0x7777)
# A byte of a selector names the two bytes of a 16-bit value: of the first, of the second, and of a zero after them
_FIRST = 0x10
_SECOND = 0x32
_ZERO = 0x44


def _table(byte_of: Callable[[tuple[int, ...]], int]) -> tuple[int, int]:
    """(low, high) word of a table with a byte for each kept pair."""
    table = [0] * 8
    for code in CODES:
        table[code & 7] = byte_of(tuple(i for i in range(4) if code >> i & 1))
    return int.from_bytes(table[:4], "little"), int.from_bytes(table[4:], "little")


def _placed(column: int) -> tuple[int, int]:
    """Table of the bytes for a column."""
    return _table(lambda kept: (_FIRST, _SECOND)[kept.index(column)] if column in kept else _ZERO)


def _chosen(value: int) -> tuple[int, int]:
    """Table of the columns of a kept value."""
    return _table(lambda kept: _FIRST + (_SECOND - _FIRST) * kept[value])


PLACED: tl.constexpr = tl.constexpr(sum((_placed(column) for column in range(4)), ()))
CHOSEN: tl.constexpr = tl.constexpr(sum((_chosen(value) for value in range(2)), ()))


@triton.jit
def permuted_bytes(low, high, selector):
    """Select four of eight bytes, ``low`` before ``high``, into an int32: byte k is number selector >> 4 k & 7.

    Bit 3 of a selector's four bits, which would repeat a sign, must be 0. PTX ISA 9.7.9.7, prmt.
    """
    if INTERPRETED:
        both = high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32 | low.to(tl.uint32, bitcast=True).to(tl.uint64)
        permuted = tl.zeros_like(selector).to(tl.uint32)
        for k in tl.static_range(4):
            number = (selector >> 4 * k) & 7
            permuted |= ((both >> (8 * number).to(tl.uint64)) & 0xFF).to(tl.uint32) << 8 * k
        return permuted.to(tl.int32, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def table_bytes(codes, TABLE: tl.constexpr, NUMBER: tl.constexpr):
    """Look up table ``NUMBER`` for int32 words of four codes; byte g of the int32 is for group g."""
    low = tl.full(codes.shape, TABLE[2 * NUMBER], tl.int32)
    high = tl.full(codes.shape, TABLE[2 * NUMBER + 1], tl.int32)
    return permuted_bytes(low, high, codes & CODE_INDICES)


@triton.jit
def byte_pair(low, high, AT: tl.constexpr):
    """Selector of two values: byte ``AT`` of ``low``, and above it byte ``AT`` of ``high``."""
    return permuted_bytes(low, high, tl.full(low.shape, AT | (AT + 4) << 4, tl.int32))


@triton.jit
def placed_pairs(words, codes):
    """8 int32 columns of two weights each, from 4 words of two 16-bit values and 4 codes of 2:4."""
    zero = tl.zeros_like(codes)
    bytes_ = ()
    for column in tl.static_range(4):
        bytes_ = bytes_ + (table_bytes(codes, PLACED, column),)
    columns = ()
    for group in tl.static_range(4):
        for half in tl.static_range(2):
            selector = byte_pair(bytes_[2 * half], bytes_[2 * half + 1], group)
            columns = columns + (permuted_bytes(words[group], zero, selector),)
    return columns


@triton.jit
def chosen_pairs(words, codes):
    """4 int32 columns of two values each: of 8 words of two values, those that 4 codes of 2:4 keep."""
    first = table_bytes(codes, CHOSEN, 0)
    second = table_bytes(codes, CHOSEN, 1)
    columns = ()
    for group in tl.static_range(4):
        selector = byte_pair(first, second, group)
        columns = columns + (permuted_bytes(words[2 * group], words[2 * group + 1], selector),)
    return columns
