"""Group codes as numbers below C(M, N), and words of them."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskpro_kernels.checkpoints.subset_ranks import (
    codes_of_ranks,
    pack_ranks,
    rank_count,
    ranks_of,
    unpack_ranks,
    word_size,
)
from maskpro_kernels.pattern import GROUP_SIZES, NMPattern

PATTERNS = [NMPattern(f"{n}:{m}") for m in GROUP_SIZES for n in range(1, m)]


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if p.m <= 8], ids=str)
def test_every_code_has_a_rank_of_its_own(pattern):
    codes = torch.tensor([sum(1 << i for i in kept) for kept in combinations(range(pattern.m), pattern.n)])
    codes = codes.to(pattern.code_dtype)
    ranks = ranks_of(codes, pattern)
    # in colexicographic order, as combinations are numbered
    assert ranks.sort().values.tolist() == list(range(rank_count(pattern)))
    assert torch.equal(codes_of_ranks(ranks, pattern), codes)
    assert codes_of_ranks(ranks, pattern).dtype == pattern.code_dtype


@given(st.sampled_from(PATTERNS), st.integers(1, 50), st.integers(0, 2**31))
def test_codes_come_back_from_words(pattern, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(groups, pattern.m, generator=generator).argsort(1)[:, : pattern.n]
    codes = (1 << places).sum(1).to(pattern.code_dtype)
    ranks = ranks_of(codes, pattern)
    assert 0 <= ranks.min() and ranks.max() < rank_count(pattern)
    packed = pack_ranks(ranks, pattern)
    assert packed.dtype == torch.uint8
    back = unpack_ranks(packed, groups, pattern)
    assert torch.equal(back, ranks) and torch.equal(codes_of_ranks(back, pattern), codes)


def test_words_take_little_more_than_the_entropy():
    for pattern in PATTERNS:
        word, entropy = word_size(pattern), math.log2(rank_count(pattern))
        assert rank_count(pattern) ** word.digits <= 1 << 8 * word.size
        assert entropy <= 8 * word.size / word.digits < entropy + 8 / word.digits
    assert [8 * word.size / word.digits for word in map(word_size, map(NMPattern, ("1:4", "2:4", "4:8", "8:16")))] == [
        2.0,
        pytest.approx(2.667, abs=1e-3),
        pytest.approx(6.222, abs=1e-3),
        14.0,
    ]


def test_bytes_of_no_ranks_are_refused():
    pattern = NMPattern("2:4")
    with pytest.raises(ValueError, match=r"^packed: expected uint8 \[2\], got torch.uint8 \[3\]"):
        unpack_ranks(torch.zeros(3, dtype=torch.uint8), 4, pattern)
    with pytest.raises(ValueError, match="^packed: expected words of 3 ranks, got larger ones"):
        unpack_ranks(torch.tensor([216], dtype=torch.uint8), 3, pattern)
