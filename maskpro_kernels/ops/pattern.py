"""N:M patterns, and group codes, which represent masks as integers."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

GROUP_SIZES = (2, 4, 8, 16)
# Places of the two weights that a code of 2:4 keeps, two bits each, the lower place in the lower bits
PLACES = {0b0011: 0b0100, 0b0101: 0b1000, 0b1001: 0b1100, 0b0110: 0b1001, 0b1010: 0b1101, 0b1100: 0b1110}
# Rows and columns of a block of metadata
METADATA_BLOCK = 32


@dataclass(frozen=True, init=False)
class NMPattern:
    """Pattern N:M: N of every M consecutive weights along the input dimension are kept.

    Args:
        pattern: "N:M" with M in {2, 4, 8, 16} and 1 <= N < M, or another NMPattern.

    Raises:
        TypeError: if ``pattern`` is neither a str nor an NMPattern.
        ValueError: if the text is not "N:M", or N and M are out of range.
    """

    n: int
    m: int

    def __init__(self, pattern: str | NMPattern):
        if isinstance(pattern, NMPattern):
            n = pattern.n
            m = pattern.m
        elif isinstance(pattern, str):
            n, m = _parsed(pattern)
        else:
            raise TypeError(f'pattern: expected a str such as "2:4" or an NMPattern, got {type(pattern).__name__}')
        object.__setattr__(self, "n", n)
        object.__setattr__(self, "m", m)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def code_dtype(self) -> torch.dtype:
        """dtype of a group code: uint8 for M <= 8, int32 above."""
        return code_dtype(self.m)


@functools.lru_cache
def _parsed(pattern: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if match is None:
        raise ValueError(f'pattern: expected "N:M" such as "2:4", got {pattern!r}')
    n = int(match[1])
    m = int(match[2])
    if m not in GROUP_SIZES or not 1 <= n < m:
        raise ValueError(f"pattern: expected N:M with M in {GROUP_SIZES} and 1 <= N < M, got {n}:{m}")
    return n, m


def code_dtype(m: int) -> torch.dtype:
    """dtype of a group code of ``m`` weights."""
    return torch.uint8 if m <= 8 else torch.int32


def bitmask_of(codes: Tensor, m: int) -> Tensor:
    """Bitmask uint8 [rows, ceil(K / 8)] of group codes [rows, K / M]: bit j of byte b is for weight 8 b + j; else 0."""
    if m >= 8:
        # the bytes of an integer, the lowest first
        parts = codes.contiguous().view(torch.uint8).unflatten(-1, (codes.shape[-1], -1))
        return parts[..., : m // 8].flatten(-2).contiguous()
    in_byte = 8 // m
    eights = nn.functional.pad(codes, (0, -codes.shape[-1] % in_byte)).unflatten(-1, (-1, in_byte))
    shifts = torch.arange(0, 8, m, device=codes.device, dtype=torch.uint8)
    return (eights << shifts).sum(-1, dtype=torch.uint8)


def codes_of(bitmask: Tensor, k: int, m: int) -> Tensor:
    """Group codes [rows, K / M] of a bitmask uint8 [rows, ceil(K / 8)]."""
    if m == 8:
        return bitmask
    if m > 8:
        size = m // 8
        parts = bitmask.unflatten(-1, (-1, size))
        return nn.functional.pad(parts, (0, 4 - size)).contiguous().view(torch.int32).squeeze(-1)
    shifts = torch.arange(0, 8, m, device=bitmask.device, dtype=torch.uint8)
    return ((bitmask.unsqueeze(-1) >> shifts) & ((1 << m) - 1)).flatten(-2)[..., : k // m]


def metadata_of(bitmask: Tensor) -> Tensor:
    """Convert a 2:4 bitmask uint8 [rows, K / 8], K divisible by 16, to int16 metadata: two bits for each value.

    The instruction ``mma.sp`` of NVIDIA's sparse tensor cores reads them, and CUTLASS, which torch uses. They are
    [rows, K / 16], both padded to whole blocks of 32 rows and columns. A word has four groups. Blocks are ordered by
    columns, then by rows. In a block, the word of row 16 h + 8 l + b and of the columns from 16 c on is at
    8 b + 4 h + 2 c + l. PTX ISA, "Matrix Fragments for sparse mma.m16n8k32 with .f16 and .bf16 types".
    """
    words = _translated(bitmask, PLACES, 0b0100).view(torch.int16)
    rows, columns = words.shape
    # padding has no values, so any valid places will do
    words = nn.functional.pad(words, (0, columns % 2, 0, -rows % METADATA_BLOCK), value=0x4444)
    return words.view(-1, 2, 2, 8, words.shape[1] // 2, 2).permute(4, 0, 3, 1, 5, 2).reshape(words.shape)


def as_bitmask(bitmask: Tensor, k: int, rows: int) -> Tensor:
    """Convert int16 metadata back to the bitmask uint8 [rows, K / 8]; return a bitmask unchanged."""
    if bitmask.dtype == torch.uint8:
        return bitmask
    blocks = bitmask.view(bitmask.shape[1] // 2, -1, 8, 2, 2, 2).permute(1, 3, 5, 2, 0, 4).reshape(bitmask.shape)
    words = blocks[:rows, : k // 16].contiguous()
    return _translated(words.view(torch.uint8), {places: code for code, places in PLACES.items()}, 0)


def _translated(masks: Tensor, table: Mapping[int, int], other: int) -> Tensor:
    """Translate bytes of two groups each, by a table of groups."""
    groups = [table.get(group, other) for group in range(16)]
    both = torch.tensor([low | high << 4 for high in groups for low in groups], dtype=torch.uint8, device=masks.device)
    return both[masks.int()]
