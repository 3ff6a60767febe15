"""Draws follow the enumerated set probabilities, and keep exactly N whatever the logits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.cases import cases, slow
from helpers.enumerated import KERNEL_DEVICE, chi_square_p, code_counts, set_probabilities, subset_codes
from hypothesis import given, settings
from hypothesis import strategies as st

import maskpro_kernels as mk
from maskpro_kernels.functional.checks import counter_of
from maskpro_kernels.ops import dispatch, reference
from maskpro_kernels.ops.cpu import kernels as cpu_kernels
from maskpro_kernels.ops.pattern import GROUP_SIZES, NMPattern

PATTERNS = ["2:4", "1:4", "4:8", "2:8", "8:16"]
ROWS, GROUPS = 1000, 1000
P_VALUE = 1e-4


def group_logits(kind, m):
    """One group's logits, float32 [m]."""
    if kind == "normal":
        return torch.randn(m, generator=torch.Generator().manual_seed(m))
    if kind == "ramp":
        return torch.linspace(-2.5, 2.5, m)
    half = torch.arange(m) % 2 == 0
    return torch.where(half, 3.0, 0.0) + 0.25 * torch.randn(m, generator=torch.Generator().manual_seed(m + 1))


LOGITS = ["normal", "ramp", "gap"]
TEMPERATURES = [1.0, 0.6]


def reference_codes(logits, n, m, temperature, seed, step=0, route=reference):
    counter = counter_of(logits, NMPattern(f"{n}:{m}"), seed, step)
    return route.sample_mask(logits, n, m, 1.0 / temperature, counter)


def kernel_codes(logits, n, m, temperature, seed):
    return mk.sample_mask(logits.to(KERNEL_DEVICE), f"{n}:{m}", temperature=temperature, seed=seed).cpu()


def p_value(draw, pattern, kind, temperature, seed):
    """p-value of a million groups against the enumeration."""
    n, m = NMPattern(pattern).n, NMPattern(pattern).m
    logits = group_logits(kind, m)
    codes = draw(logits.repeat(ROWS, GROUPS), n, m, temperature, seed)
    probabilities = set_probabilities(logits.double() / temperature, n)
    return chi_square_p(code_counts(codes, n, m), probabilities.numpy())


def compiled_codes(logits, n, m, temperature, seed, step=0):
    """Of the compiled loop where there is a compiler, which takes a tenth of the reference's time."""
    route = cpu_kernels if dispatch.compiler_available() else reference
    return reference_codes(logits, n, m, temperature, seed, step, route)


CASES = list(itertools.product(LOGITS, TEMPERATURES))


@pytest.mark.parametrize("kind, temperature", CASES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_compiled_draws_match_the_enumerated_probabilities(pattern, kind, temperature):
    assert p_value(compiled_codes, pattern, kind, temperature, seed=19) > P_VALUE


# The bits of all routes are the same (tests/ops/test_bits.py), and the larger the groups the slower the interpreter
@pytest.mark.parametrize(
    "draw, pattern, kind, temperature",
    [
        (reference_codes, "4:8", "ramp", 0.6),
        (kernel_codes, "2:4", "ramp", 0.6),
        slow(kernel_codes, "4:8", "normal", 1.0),
    ],
)
def test_other_routes_draw_as_enumerated(draw, pattern, kind, temperature, launched):
    assert p_value(draw, pattern, kind, temperature, seed=21) > P_VALUE
    assert launched["sample_mask"] == (draw is kernel_codes)


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_the_chi_square_notices_a_temperature_off_by_two_percent(pattern):
    n, m = NMPattern(pattern).n, NMPattern(pattern).m
    logits = group_logits("ramp", m)
    counts = code_counts(compiled_codes(logits.repeat(ROWS, GROUPS), n, m, 1.02, seed=20), n, m)
    assert chi_square_p(counts, set_probabilities(logits, n).numpy()) < P_VALUE


def test_rare_sets_at_gap_12_appear_at_their_rate():
    """1e8 groups; each of four sets has probability 4.6e-6."""
    logits = torch.tensor([12.0, 12.0, 0.0, 0.0])
    tile = logits.repeat(ROWS, GROUPS)
    steps = 100
    counts = np.zeros(16, dtype=np.int64)
    for step in range(steps):
        codes = compiled_codes(tile, 2, 4, 1.0, seed=22, step=step).flatten()
        counts += np.bincount(codes[codes != 0b0011].numpy(), minlength=16)
    total = steps * ROWS * GROUPS
    counts[0b0011] = total - counts.sum()
    assert counts[subset_codes(2, 4)].sum() == total
    probabilities = set_probabilities(logits, 2).numpy()
    expected = dict(zip(subset_codes(2, 4).tolist(), probabilities * total, strict=True))
    for code in (0b0101, 0b1001, 0b0110, 0b1010):
        assert 400 < expected[code] < 500
        assert abs(counts[code] - expected[code]) < 4 * expected[code] ** 0.5
    assert chi_square_p(counts[subset_codes(2, 4)], probabilities) > P_VALUE


def test_no_two_steps_layers_draws_or_seeds_draw_the_same_masks():
    logits = torch.zeros(16, 64, device=KERNEL_DEVICE)
    counters = [{"seed": 0}, {"seed": 1 << 32}, {"seed": 0, "step": 1}, {"seed": 0, "layer": 1}, {"seed": 0, "draw": 1}]
    drawn = {tuple(mk.sample_mask(logits, "2:4", **c).flatten().tolist()) for c in counters}
    assert len(drawn) == len(counters)


def eager_codes(logits, pattern, temperature=1.0, seed=0, step=0, layer=0, draw=0):
    """The eager reference on logits of any shape."""
    matrix = logits.reshape(-1, logits.shape[-1]).contiguous()
    counter = counter_of(matrix, pattern, seed, step, layer, draw)
    codes = reference.sample_mask(matrix, pattern.n, pattern.m, 1.0 / temperature, counter)
    return codes.view(*logits.shape[:-1], -1)


def kept_counts(codes, pattern):
    return mk.expand_mask(codes, pattern).unflatten(-1, (-1, pattern.m)).sum(-1)


@pytest.mark.parametrize(
    "pattern, dtype",
    cases(
        itertools.product(["1:4", "2:4", "4:8", "8:16", "15:16"], [torch.float32, torch.float16]),
        slow=lambda pattern, _: pattern == "15:16",
    ),
)
def test_an_integer_shift_of_a_group_gives_the_same_bits(pattern, dtype):
    pattern = NMPattern(pattern)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-512, 512, (64, 32, pattern.m), generator=generator) / 64
    shift = torch.randint(-16, 16, (64, 32, 1), generator=generator)
    moved = (logits + shift).to(dtype)
    assert torch.equal(moved.double(), logits.double() + shift), "the shift must be exact"
    arguments = {"temperature": 0.7, "seed": 3, "layer": 4}
    plain, shifted = (x.to(dtype).flatten(1) for x in (logits, moved))
    for draw in (eager_codes, lambda x, *a, **k: mk.sample_mask(x.to(KERNEL_DEVICE), *a, **k).cpu()):
        assert_same_bits(draw(plain, pattern, **arguments), draw(shifted, pattern, **arguments))


def extreme_logits(m):
    """Groups of equal logits, of +-80 in every mixture, and of one logit apart from the rest."""
    generator = torch.Generator().manual_seed(m)
    equal = torch.tensor([-80.0, -1.5, 0.0, 7.25, 80.0])[:, None].expand(5, m)
    mixed = torch.where(torch.rand(64, m, generator=generator) < 0.5, 80.0, -80.0)
    alone = torch.eye(m) * 160 - 80
    return torch.cat([equal, mixed, alone, -alone])


@pytest.mark.parametrize(
    "pattern, temperature",
    cases(
        itertools.product(["1:2", "1:4", "2:4", "3:4", "4:8", "8:16", "1:16", "15:16"], [1.0, 1e-3, 1e3]),
        slow=lambda pattern, temperature: pattern in ("1:16", "15:16") and (pattern, temperature) != ("15:16", 1e3),
    ),
)
def test_extreme_and_equal_logits_draw_exactly_n(pattern, temperature):
    pattern = NMPattern(pattern)
    logits = extreme_logits(pattern.m)
    codes = mk.sample_mask(logits.to(KERNEL_DEVICE), pattern, temperature=temperature, seed=5).cpu()
    assert (kept_counts(codes, pattern) == pattern.n).all()
    assert_same_bits(codes, eager_codes(logits, pattern, temperature, seed=5))


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_no_draw_crosses_a_gap_above_26(pattern):
    pattern = NMPattern(pattern)
    group = torch.where(torch.arange(pattern.m) < pattern.n, 26.1, 0.0)
    codes = compiled_codes(group.repeat(ROWS, GROUPS), pattern.n, pattern.m, 1.0, seed=6)
    assert (codes == (1 << pattern.n) - 1).all()


@st.composite
def draws(draw):
    """Logits of one to four dimensions, a pattern, and a counter."""
    m = draw(st.sampled_from(GROUP_SIZES))
    pattern = NMPattern(f"{draw(st.integers(1, m - 1))}:{m}")
    leading = draw(st.lists(st.integers(1, 4), max_size=3))
    shape = (*leading, draw(st.integers(1, 6)) * pattern.m)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    scale = draw(st.sampled_from([0.0, 0.01, 1.0, 10.0, 40.0]))
    logits = torch.randn(shape, generator=generator) * scale
    if draw(st.booleans()):
        # ties before the noise
        logits = logits.round()
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    counter = {
        "seed": draw(st.integers(-(1 << 63), (1 << 63) - 1)),
        "step": draw(st.integers(0, (1 << 32) - 1)),
        "layer": draw(st.integers(0, (1 << 32) - 1)),
        "draw": draw(st.integers(0, (1 << 16) - 1)),
    }
    return logits.to(dtype), pattern, draw(st.floats(0.05, 20.0)), counter


# Interpreting the kernel of 32 columns takes a quarter of a second
@settings(max_examples=8)
@given(draws())
def test_any_draw_keeps_exactly_n_and_kernel_and_reference_agree(case):
    logits, pattern, temperature, counter = case
    codes = mk.sample_mask(logits.to(KERNEL_DEVICE), pattern, temperature=temperature, **counter).cpu()
    assert codes.shape == (*logits.shape[:-1], logits.shape[-1] // pattern.m)
    assert codes.dtype == pattern.code_dtype
    assert (kept_counts(codes, pattern) == pattern.n).all()
    assert_same_bits(codes, eager_codes(logits, pattern, temperature, **counter))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 4)])
def test_no_groups_give_no_codes(shape):
    codes = mk.sample_mask(torch.empty(shape, device=KERNEL_DEVICE), "2:4", seed=0)
    assert codes.shape == (*shape[:-1], shape[-1] // 4)
