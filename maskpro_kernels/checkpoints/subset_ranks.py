"""Group codes in as few bits as a pattern needs: a code of N:M is one of C(M, N), and those are numbered.

The number is the rank in the combinatorial number system (Knuth, The Art of Computer Programming 4A, 7.2.1.3): the kept
weights at places p_1 < ... < p_N of a group give C(p_1, 1) + ... + C(p_N, N). Several ranks are the digits of one word
of whole bytes, to the base C(M, N): at 2:4 three a byte, 2.67 bits a group where its entropy is 2.58 at most.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..pattern import NMPattern

# Of a word: what a 64-bit integer with a sign holds
MOST_BYTES = 7
# Of the weights of a group: what a table of all its codes is made for
MOST_IN_TABLES = 16


class WordSize(NamedTuple):
    """How ranks are packed: so many digits in so many bytes."""

    digits: int
    size: int


def rank_count(pattern: NMPattern) -> int:
    """How many codes a group can have."""
    return math.comb(pattern.m, pattern.n)


def word_size(pattern: NMPattern) -> WordSize:
    """The word that takes the fewest bits a group, and of those the shortest."""
    count = rank_count(pattern)
    sizes = []
    for size in range(1, MOST_BYTES + 1):
        # exactly, where a logarithm of floats could be one too many
        digits = 0
        while count ** (digits + 1) <= 1 << 8 * size:
            digits += 1
        if digits:
            sizes.append(WordSize(digits, size))
    return min(sizes, key=lambda word: (word.size / word.digits, word.size))


def ranks_of(codes: Tensor, pattern: NMPattern) -> Tensor:
    """Ranks, int64, of group codes of exactly N, of any shape, on the CPU."""
    return _ranks(codes, pattern) if pattern.m > MOST_IN_TABLES else _tables(pattern)[1][codes.to(torch.int64)]


def codes_of_ranks(ranks: Tensor, pattern: NMPattern) -> Tensor:
    """Group codes, in the pattern's dtype, of ranks below ``rank_count``, int64 of any shape."""
    return _codes(ranks, pattern) if pattern.m > MOST_IN_TABLES else _tables(pattern)[0][ranks]


@functools.cache
def _tables(pattern: NMPattern) -> tuple[Tensor, Tensor]:
    """(codes by rank, ranks by code)."""
    codes = _codes(torch.arange(rank_count(pattern), device="cpu"), pattern)
    ranks = torch.zeros(1 << pattern.m, dtype=torch.int64, device="cpu")
    ranks[codes.to(torch.int64)] = torch.arange(len(codes), device="cpu")
    return codes, ranks


def _ranks(codes: Tensor, pattern: NMPattern) -> Tensor:
    codes = codes.to(torch.int64)
    rank, count = torch.zeros_like(codes), torch.zeros_like(codes)
    for place in range(pattern.m):
        kept = codes >> place & 1
        count += kept
        rank += kept * _binomials(place, pattern.n)[count]
    return rank


def _codes(ranks: Tensor, pattern: NMPattern) -> Tensor:
    rest, left = ranks.clone(), torch.full_like(ranks, pattern.n)
    codes = torch.zeros_like(ranks)
    for place in reversed(range(pattern.m)):
        below = _binomials(place, pattern.n)[left]
        kept = (left > 0) & (rest >= below)
        rest -= torch.where(kept, below, 0)
        left -= kept.to(torch.int64)
        codes |= kept.to(torch.int64) << place
    return codes.to(pattern.code_dtype)


def _binomials(place: int, most: int) -> Tensor:
    """C(place, 0) to C(place, most)."""
    return torch.tensor([math.comb(place, count) for count in range(most + 1)], device="cpu")


def pack_ranks(ranks: Tensor, pattern: NMPattern) -> Tensor:
    """uint8 [bytes] of ranks, int64 of any shape: whole words, the lowest byte first; missing digits are 0."""
    word = word_size(pattern)
    ranks = ranks.flatten()
    digits = torch.nn.functional.pad(ranks, (0, -len(ranks) % word.digits)).view(-1, word.digits)
    words = torch.zeros(len(digits), dtype=torch.int64, device="cpu")
    for digit in reversed(digits.unbind(1)):
        words = words * rank_count(pattern) + digit
    return torch.stack([(words >> 8 * byte & 255).to(torch.uint8) for byte in range(word.size)], dim=1).flatten()


def unpack_ranks(packed: Tensor, length: int, pattern: NMPattern) -> Tensor:
    """The first ``length`` ranks, int64 [length], of what ``pack_ranks`` gave.

    Raises:
        ValueError: if these are no such bytes, or not as many.
    """
    word = word_size(pattern)
    count = -(-length // word.digits)
    if packed.dtype != torch.uint8 or packed.shape != (count * word.size,):
        raise ValueError(f"packed: expected uint8 [{count * word.size}], got {packed.dtype} {list(packed.shape)}")
    words = torch.zeros(count, dtype=torch.int64, device="cpu")
    for byte in reversed(packed.view(-1, word.size).unbind(1)):
        words = words << 8 | byte
    digits = []
    for _ in range(word.digits):
        digits.append(words % rank_count(pattern))
        words = words // rank_count(pattern)
    if words.any():
        raise ValueError(f"packed: expected words of {word.digits} ranks, got larger ones")
    return torch.stack(digits, dim=1).flatten()[:length]
