"""Stochastic rounding to 16 bits, and the update that uses it."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from helpers.bits import assert_same_bits
from helpers.cases import cases, slow
from helpers.enumerated import KERNEL_DEVICE
from helpers.noise import BLOCK, without_contraction

import maskpro_kernels as mk
from maskpro_kernels.functional.checks import counter_of
from maskpro_kernels.ops import reference
from maskpro_kernels.ops.pattern import NMPattern
from maskpro_kernels.ops.triton import device as device

DTYPES = [torch.bfloat16, torch.float16]
TRITON_DTYPE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def round_kernel(x, words, out, total, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < total
    r = tl.load(words + i, mask=inside, other=0).to(tl.uint32)
    tl.store(out + i, device.round_stochastically(tl.load(x + i, mask=inside, other=0.0), r, DTYPE), mask=inside)


def kernel_round(x, words, dtype):
    x, words = torch.broadcast_tensors(x, words)
    x, words = x.contiguous().to(KERNEL_DEVICE), words.contiguous().to(KERNEL_DEVICE)
    out = torch.full_like(x, 12345.0)
    grid, constants = (triton.cdiv(out.numel(), BLOCK),), {"DTYPE": TRITON_DTYPE[dtype], "BLOCK": BLOCK}
    round_kernel[grid](x, words, out, out.numel(), **constants, **without_contraction())
    return out.cpu()


ROUTES = pytest.mark.parametrize("rounded", [reference.round_stochastically, kernel_round], ids=["reference", "kernel"])
BOTH = pytest.mark.parametrize("dtype", DTYPES)


def neighbours(x, dtype):
    """(largest value of the grid <= x, smallest >= x) of finite float32, as float64, to the largest finite."""
    largest = torch.finfo(dtype).max
    nearest = x.clamp(-largest, largest).to(dtype)
    up = torch.nextafter(nearest, torch.tensor(torch.inf, dtype=dtype)).double().clamp(max=largest)
    down = torch.nextafter(nearest, torch.tensor(-torch.inf, dtype=dtype)).double().clamp(min=-largest)
    nearest, x = nearest.double(), x.double().clamp(-largest, largest)
    return torch.where(nearest <= x, nearest, down), torch.where(nearest >= x, nearest, up)


def values(dtype):
    """float32 of both signs over the dtype's range, off its grid; for float16 down into its subnormals."""
    generator = torch.Generator().manual_seed(0)
    low, high = (-28.0, 15.9) if dtype == torch.float16 else (-100.0, 120.0)
    exponents = torch.empty(400).uniform_(low, high, generator=generator)
    signs = torch.where(torch.rand(400, generator=generator) < 0.5, -1.0, 1.0)
    return signs * torch.exp2(exponents)


def words(count, seed=1):
    return torch.randint(0, 1 << 32, (count,), generator=torch.Generator().manual_seed(seed))


@ROUTES
@BOTH
def test_only_the_two_neighbours_on_the_grid_come_out(rounded, dtype):
    x = values(dtype)
    below, above = neighbours(x, dtype)
    out = rounded(x[:, None], torch.cat([torch.tensor([0, (1 << 32) - 1]), words(998)])[None], dtype).double()
    assert ((out == below[:, None]) | (out == above[:, None])).all()
    assert torch.equal(out.to(dtype).double(), out), "not on the grid"


@ROUTES
@BOTH
def test_mean_over_all_words_is_the_value(rounded, dtype):
    """The words run through every value of their leading 16 bits: the mean errs by the bits below at most."""
    x = values(dtype)[:60]
    below, above = neighbours(x, dtype)
    every = (torch.arange(1 << 16) << 16) + (1 << 15)
    mean = rounded(x[:, None], every[None], dtype).double().mean(1)
    assert ((mean - x.double()).abs() <= (above - below) * 2.0**-16).all()


@ROUTES
@BOTH
def test_values_on_the_grid_stay(rounded, dtype):
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    grid = bits.view(dtype)
    # subnormals of bfloat16 are subnormals of float32, which hardware may flush
    tiny = torch.finfo(torch.bfloat16).tiny if dtype == torch.bfloat16 else 0.0
    grid = grid[torch.isfinite(grid) & ((grid == 0) | (grid.float().abs() >= tiny))].float()
    for seed in range(3):
        assert_same_bits(rounded(grid, words(len(grid), seed), dtype), grid)
    assert_same_bits(rounded(grid, torch.full((len(grid),), (1 << 32) - 1), dtype), grid)


@ROUTES
@BOTH
def test_rounding_is_odd_in_the_value(rounded, dtype):
    x, r = values(dtype), words(400)
    # but for the sign of a zero
    assert torch.equal(rounded(-x, r, dtype), -rounded(x, r, dtype))


@ROUTES
def test_float16_subnormals_have_their_own_grid(rounded):
    """Steps of 2^-24, and half a step goes up half the time, however small the value."""
    x = torch.tensor([2.5, 100.25, 1023.75, 0.5, 0.001, -0.75]) * 2.0**-24
    count = 1 << 16
    steps = rounded(x[:, None], words(count, 2)[None], torch.float16).double() * 2.0**24
    assert_same_bits(steps, steps.round())
    whole = torch.tensor([2.0, 100.0, 1023.0, 0.0, 0.0, 0.0])
    assert ((steps.abs() == whole[:, None]) | (steps.abs() == whole[:, None] + 1)).all()
    share = (steps.abs() - whole[:, None]).mean(1)
    p = torch.tensor([0.5, 0.25, 0.75, 0.5, 0.001, 0.75], dtype=torch.float64)
    assert ((share - p).abs() <= 4 * (p * (1 - p) / count).sqrt()).all()


@ROUTES
@BOTH
def test_overflow_saturates_at_the_largest_finite_value(rounded, dtype):
    largest = torch.finfo(dtype).max
    float32_largest = torch.finfo(torch.float32).max
    beyond = [float32_largest, torch.nextafter(torch.tensor(largest), torch.tensor(torch.inf)).item()]
    if dtype == torch.float16:
        beyond += [65520.0, 65536.0, 1e10]
    x = torch.tensor(beyond + [-b for b in beyond])
    for word in (0, 1 << 31, (1 << 32) - 1):
        out = rounded(x, torch.full((len(x),), word), dtype)
        assert_same_bits(out, torch.where(x > 0, largest, -largest))


@ROUTES
@BOTH
def test_zeros_keep_their_sign_and_what_is_not_finite_passes(rounded, dtype):
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])
    for word in (0, 1 << 31, (1 << 32) - 1):
        out = rounded(x, torch.full((5,), word), dtype)
        assert out[:4].tolist() == [0.0, 0.0, torch.inf, -torch.inf] and out[4].isnan()
        assert torch.signbit(out[:2]).tolist() == [False, True]


@BOTH
def test_kernel_and_reference_round_to_the_same_bits(dtype):
    x = torch.cat([values(dtype), torch.tensor([0.0, -0.0, torch.inf, 3e38, 65519.9, 2.0**-14, 2.0**-25])])
    r = words(256)[None]
    bits = [f(x[:, None], r, dtype).view(torch.int32) for f in (reference.round_stochastically, kernel_round)]
    assert_same_bits(*bits)


def eager_update(logits, coefs, draws, n, m, seed=1, step=2, layer=3):
    moved = logits.clone()
    counter = counter_of(logits, NMPattern(f"{n}:{m}"), seed, step, layer)._replace(draw=torch.tensor(draws))
    reference.score_update_(moved, torch.tensor(coefs), n, m, 1.0, counter)
    return moved


def kernel_update(logits, coefs, draws, n, m, seed=1, step=2, layer=3):
    moved = logits.clone().to(KERNEL_DEVICE)
    mk.score_update_(moved, coefs, pattern=f"{n}:{m}", seed=seed, step=step, layer=layer, draw=draws)
    return moved.cpu()


UPDATES = pytest.mark.parametrize("update", [eager_update, kernel_update], ids=["reference", "kernel"])
# Sets of 5 take the interpreter seconds
SEVERAL = pytest.mark.parametrize(
    "n, m, update",
    cases(
        [(n, m, update) for n, m in ((1, 4), (2, 4), (4, 8), (5, 8)) for update in (eager_update, kernel_update)],
        slow=lambda n, m, update: (n, m) != (2, 4) and (n, m, update) != (5, 8, eager_update),
    ),
)
COEFS, DRAWS = [0.5, -1.25, 3.0, -0.75], [0, 7, 1, 65535]


@SEVERAL
def test_several_draws_add_up_to_the_bit_where_the_logits_are_zero(update, n, m, launched):
    """From zero a single update is the exact negative of its term."""
    logits = torch.zeros(8, 16 * m)
    together = update(logits, COEFS, DRAWS, n, m)
    assert launched["score_updates"] == (update is kernel_update)
    total = torch.zeros_like(logits)
    for coef, draw in zip(COEFS, DRAWS, strict=True):
        total = total + update(logits, [coef], [draw], n, m)
    assert_same_bits(together, total)


@SEVERAL
def test_several_draws_are_all_taken_at_the_old_logits(update, n, m):
    logits = torch.randn(8, 16 * m, generator=torch.Generator().manual_seed(3)) * 2
    together = update(logits, COEFS, DRAWS, n, m).double() - logits
    singles = [update(logits, [c], [d], n, m).double() - logits for c, d in zip(COEFS, DRAWS, strict=True)]
    assert (together - sum(singles)).abs().max() < 4e-6
    chained = logits
    for coef, draw in zip(COEFS, DRAWS, strict=True):
        chained = update(chained, [coef], [draw], n, m)
    assert (chained.double() - logits - together).abs().max() > 0.1, "updates one after the other are another thing"


def test_one_draw_in_a_sequence_is_the_single_update():
    logits = torch.randn(4, 32, generator=torch.Generator().manual_seed(4)).to(KERNEL_DEVICE)
    arguments = {"pattern": "2:4", "seed": 5}
    listed = mk.score_update_(logits.clone(), [0.5], draw=[3], **arguments)
    tensor = mk.score_update_(logits.clone(), torch.tensor(0.5), draw=3, **arguments)
    single = mk.score_update_(logits.clone(), 0.5, draw=3, **arguments)
    assert_same_bits([listed, tensor], [single, single])


@UPDATES
@BOTH
@pytest.mark.parametrize("n, m", [(2, 4), slow(5, 8)])
def test_a_16_bit_update_rounds_the_float32_update_once(update, dtype, n, m):
    logits = (torch.randn(16, 64 * m, generator=torch.Generator().manual_seed(5)) * 2).to(dtype)
    narrow = update(logits, COEFS, DRAWS, n, m)
    assert narrow.dtype == dtype
    below, above = neighbours(update(logits.float(), COEFS, DRAWS, n, m), dtype)
    assert ((narrow.double() == below) | (narrow.double() == above)).all()


@UPDATES
@BOTH
@pytest.mark.parametrize("coef", [1.0, 1e-4], ids=["large", "below the grid"])
@pytest.mark.parametrize("n, m", [(2, 4), pytest.param(5, 8, marks=pytest.mark.slow)])
def test_a_16_bit_update_is_the_float32_update_in_the_mean(update, dtype, coef, n, m):
    """Many groups with the same logits: the difference from the float32 update averages out."""
    group = torch.linspace(1.7, -1.3, m).to(dtype)
    logits = group.repeat(64, 512)
    exact = update(logits.float(), [coef], [0], n, m).double()
    narrow = update(logits, [coef], [0], n, m).double()
    error = (narrow - exact).view(-1, m)
    assert (error.mean(0).abs() <= 4 * error.std(0) / len(error) ** 0.5).all()
    if coef < 1e-3:
        assert (narrow == logits).double().mean() > 0.5, "most updates are smaller than a step of the grid"


@UPDATES
@BOTH
def test_16_bit_updates_that_cancel_the_score_leave_the_logits(update, dtype):
    logits = (torch.randn(16, 64, generator=torch.Generator().manual_seed(6)) * 2).to(dtype)
    assert_same_bits(update(logits, [0.0], [0], 2, 4), logits)
