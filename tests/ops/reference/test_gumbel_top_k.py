"""The noise and its ln and exp, in the reference and in the kernels, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.noise import exp_kernel, gumbel_kernel, in_kernel, ln_kernel

from maskpro_kernels.ops import reference

GOLDEN_WORDS = [0, 1, 255, 1 << 16, 1 << 31, (1 << 32) - 1]

LN = pytest.mark.parametrize(
    "ln", [reference.ln, lambda x, near_one: in_kernel(ln_kernel, x, near_one)], ids=["reference", "kernel"]
)
EXP = pytest.mark.parametrize("exp", [reference.exp, lambda x: in_kernel(exp_kernel, x)], ids=["reference", "kernel"])


def float64_gumbel(words):
    u = (words.numpy().astype(np.float64) + 0.5) * 2.0**-32
    return torch.from_numpy(-np.log(-np.log1p(-u)))


ROUTES = pytest.mark.parametrize(
    "gumbel", [reference.gumbel, lambda r: in_kernel(gumbel_kernel, r)], ids=["reference", "kernel"]
)


@ROUTES
def test_noise_agrees_with_float64(gumbel):
    """At golden words, at a million random ones, and in both tails."""
    generator = torch.Generator().manual_seed(0)
    near = [torch.randint(0, 1 << exponent, (100_000,), generator=generator) for exponent in (4, 10, 16, 22)]
    words = [torch.tensor(GOLDEN_WORDS), torch.randint(0, 1 << 32, (1_000_000,), generator=generator)]
    words = torch.cat([*words, *near, *((1 << 32) - 1 - x for x in near)])
    assert (gumbel(words).double() - float64_gumbel(words)).abs().max() < 3e-6


@ROUTES
def test_noise_falls_with_the_word_over_a_million_values(gumbel):
    words = torch.linspace(0, (1 << 32) - 1, 1_000_000, dtype=torch.float64).to(torch.int64)
    assert (gumbel(words).diff() <= 0).all()


def seams():
    """Words at which one of the two logarithms changes the power of two it takes out."""
    e = [0.5**0.5 * 2.0**k for k in range(-8, 6)]
    u = [1 - 0.5**0.5 * 2.0**-k for k in range(5)] + [-np.expm1(-x) for x in e]
    return sorted(int(x * 2**32) for x in u if 2**-8 < x < 1 - 2**-15)


@ROUTES
@pytest.mark.parametrize("first", [0, (1 << 32) - (1 << 16), *(seam - (1 << 15) for seam in seams())])
def test_noise_falls_from_word_to_word_in_the_tails_and_across_the_seams_of_ln(gumbel, first):
    assert (gumbel(torch.arange(first, first + (1 << 16))).diff() <= 0).all()


@ROUTES
def test_noise_spans_what_the_documentation_says(gumbel):
    largest, smallest = gumbel(torch.tensor([0, (1 << 32) - 1])).tolist()
    assert largest == pytest.approx(22.8739, abs=1e-4)
    assert smallest == pytest.approx(-3.1300, abs=1e-4)


def test_kernel_and_reference_noise_are_bit_equal():
    words = torch.randint(0, 1 << 32, (1_000_000,), generator=torch.Generator().manual_seed(1))
    words = torch.cat([words, torch.tensor(GOLDEN_WORDS), torch.arange(1 << 16), (1 << 32) - 1 - torch.arange(1 << 16)])
    assert_same_bits(in_kernel(gumbel_kernel, words), reference.gumbel(words))


def positives():
    generator = torch.Generator().manual_seed(2)
    wide = torch.exp(torch.empty(200_000, dtype=torch.float64).uniform_(-85, 85, generator=generator))
    narrow = torch.empty(200_000, dtype=torch.float64).uniform_(0.5, 2.0, generator=generator)
    return torch.cat([wide, narrow]).to(torch.float32)


@LN
def test_ln_agrees_with_float64(ln):
    x = positives()
    exact = torch.log(x.double())
    assert ((ln(x, x - 1.0).double() - exact).abs() <= 1e-6 + 1.2e-7 * exact.abs()).all()


@LN
def test_ln_keeps_the_digits_of_what_is_near_one(ln):
    t = torch.logspace(-30, -2, 2000, dtype=torch.float64).to(torch.float32)
    t = torch.cat([t, -t])
    exact = torch.log1p(t.double())
    assert ((ln(1.0 + t, t).double() - exact).abs() <= 1e-6 * exact.abs()).all()


@EXP
def test_exp_agrees_with_float64(exp):
    x = torch.empty(400_000).uniform_(-87, 88, generator=torch.Generator().manual_seed(3))
    x = torch.cat([x, torch.tensor([-87.0, -0.0, 0.0, 1.0, 88.0])])
    exact = torch.exp(x.double())
    assert ((exp(x).double() / exact - 1.0).abs() < 3e-7).all()


@EXP
def test_exp_is_zero_below_its_range(exp):
    x = torch.tensor([-87.00001, -88.0, -200.0, -1e30, -torch.inf])
    assert exp(x).tolist() == [0.0] * 5


def test_kernel_and_reference_ln_and_exp_are_bit_equal():
    x = positives()
    assert_same_bits(in_kernel(ln_kernel, x, x - 1.0), reference.ln(x, x - 1.0))
    y = torch.empty(400_000).uniform_(-100, 88, generator=torch.Generator().manual_seed(4))
    assert_same_bits(in_kernel(exp_kernel, y), reference.exp(y))
