"""Pairs of 2:4 at their places, by permutations of bytes.

A group's code becomes selectors by tables: what a table holds of all six codes is eight bytes, two registers, and one
permutation reads it for the four groups of a word of codes at once. The low three bits of a code are enough for it.
"""

from __future__ import annotations

from collections.abc import Callable

import triton
import triton.language as tl

from ..tiles import INTERPRETED as _INTERPRETED

INTERPRETED: tl.constexpr = tl.constexpr(_INTERPRETED)
CODES = (0b0011, 0b0101, 0b0110, 0b1001, 0b1010, 0b1100)
# Of every group of a word its low three bits: selectors of tables
CODE_INDICES: tl.constexpr = tl.constexpr(0x7777)
# A byte of a selector names the two bytes of a value of 16 bits: of the first and the second, and of a zero behind them
_FIRST, _SECOND, _ZERO = 0x10, 0x32, 0x44


def _table(byte_of: Callable[[tuple[int, ...]], int]) -> tuple[int, int]:
    """(low, high) word of a table, of a byte for each pair of places kept."""
    table = [0] * 8
    for code in CODES:
        table[code & 7] = byte_of(tuple(i for i in range(4) if code >> i & 1))
    return int.from_bytes(table[:4], "little"), int.from_bytes(table[4:], "little")


def _placed(column: int) -> tuple[int, int]:
    """Table of the bytes that stand in a column."""
    return _table(lambda kept: (_FIRST, _SECOND)[kept.index(column)] if column in kept else _ZERO)


def _chosen(value: int) -> tuple[int, int]:
    """Table of the columns that a kept value belongs to."""
    return _table(lambda kept: _FIRST + (_SECOND - _FIRST) * kept[value])


PLACED: tl.constexpr = tl.constexpr(sum((_placed(column) for column in range(4)), ()))
CHOSEN: tl.constexpr = tl.constexpr(sum((_chosen(value) for value in range(2)), ()))


@triton.jit
def permuted_bytes(low, high, selector):
    """int32 of four bytes of eight, those of ``low`` before those of ``high``: byte k is number selector >> 4 k & 7.

    Selectors have no bit 3 of those four, which would repeat a sign. PTX ISA 9.7.9.7, prmt.
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
    """Byte g of the int32 is that of table ``NUMBER`` for group g of int32 words of four codes."""
    low = tl.full(codes.shape, TABLE[2 * NUMBER], tl.int32)
    high = tl.full(codes.shape, TABLE[2 * NUMBER + 1], tl.int32)
    return permuted_bytes(low, high, codes & CODE_INDICES)


@triton.jit
def byte_pair(low, high, AT: tl.constexpr):
    """Byte ``AT`` of ``low``, and above it that of ``high``: a selector of two values."""
    return permuted_bytes(low, high, tl.full(low.shape, AT | (AT + 4) << 4, tl.int32))


@triton.jit
def placed_pairs(words, codes):
    """8 columns of int32, two columns of the weight each, of 4 words of two values of 16 bits, under 4 codes of 2:4."""
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
    """4 columns of int32: of 8 words of two values each, the two of each group of four that 4 codes of 2:4 keep."""
    first, second = table_bytes(codes, CHOSEN, 0), table_bytes(codes, CHOSEN, 1)
    columns = ()
    for group in tl.static_range(4):
        selector = byte_pair(first, second, group)
        columns = columns + (permuted_bytes(words[2 * group], words[2 * group + 1], selector),)
    return columns
