"""``assert_same_bits`` finds every difference and reports its place."""

from __future__ import annotations

import re

import pytest
import torch

from helpers.bits import assert_same_bits, first_difference

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.bool,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_counts(dtype):
    expected = torch.arange(24).view(2, 12).to(dtype)
    assert_same_bits(expected.clone(), expected, m=4)
    for bit in range(8 * dtype.itemsize):
        actual = expected.clone()
        word = actual.view(torch.uint8)
        word[1, (5 * dtype.itemsize) + bit // 8] ^= 1 << bit % 8
        if not actual[1, 5].isnan():
            with pytest.raises(AssertionError, match=r"^group \(1, 1\) has .*; 1 of 6 differ"):
                assert_same_bits(actual, expected, m=4)


def test_the_first_group_and_both_bit_patterns_are_named():
    expected = torch.tensor([[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]])
    actual = expected.clone()
    actual[0, 2], actual[1, 1] = torch.tensor(2.0).nextafter(torch.tensor(3.0)), -5.0
    reported = "group (0, 1) has 40000001 40400000 (2.00000024, 3), expected 40000000 40400000 (2, 3); 2 of 4 differ"
    assert first_difference(actual, expected, m=2) == reported
    assert first_difference(torch.tensor(3), torch.tensor(-1)).startswith(
        "group () has 0000000000000003 (3), expected f"
    )


def test_zeros_of_either_sign_differ_and_nans_do_not():
    with pytest.raises(AssertionError, match=re.escape("80000000 (-0), expected 00000000 (0)")):
        assert_same_bits(torch.tensor([-0.0]), torch.tensor([0.0]))
    one, other = (torch.tensor(bits, dtype=torch.int32).view(torch.float32) for bits in ([0x7FC00000], [-1]))
    assert_same_bits(one, other)
    with pytest.raises(AssertionError, match="nan"):
        assert_same_bits(one, torch.tensor([torch.inf]))


@pytest.mark.parametrize(
    ("actual", "expected", "reported"),
    [
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32), "dtype: expected torch.int32, got torch.float32"),
        (torch.zeros(2, 1), torch.zeros(2), "shape: expected torch.Size([2]), got torch.Size([2, 1])"),
        ([torch.zeros(2)], [torch.zeros(2)] * 2, "expected [0, 1], got [0]"),
        ({"a": torch.zeros(2)}, {"b": torch.zeros(2)}, "expected ['b'], got ['a']"),
        ({"a": [torch.zeros(2)]}, {"a": [torch.ones(2)]}, "'a': 0: group (0,) has 00000000 (0), expected 3f800000 (1)"),
    ],
)
def test_what_is_compared_must_be_alike(actual, expected, reported):
    with pytest.raises(AssertionError, match=re.escape(reported)):
        assert_same_bits(actual, expected)


def test_tensors_of_any_layout_and_without_elements():
    expected = torch.arange(12.0).view(3, 4)
    assert_same_bits(expected.t().contiguous().t(), expected, m=4)
    assert_same_bits(torch.zeros(0, 4), torch.zeros(0, 4), m=4)
    assert_same_bits(expected.clone().requires_grad_(), expected)
    assert first_difference({}, {}) is None
