"""log p(S) and the score against 60 digits, and the estimate for N > 4 against the enumeration."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.cases import cases, slow
from helpers.enumerated import (
    KERNEL_DEVICE,
    exact_log_prob,
    exact_score,
    ordered_score,
    quadrature_log_prob,
    set_probabilities,
    subset_codes,
)

import maskpro_kernels as mk
from maskpro_kernels import ops
from maskpro_kernels.functional.checks import counter_of
from maskpro_kernels.ops import philox, reference
from maskpro_kernels.ops.pattern import NMPattern
from maskpro_kernels.ops.triton.launch import launches

EXACT_PATTERNS = ["1:2", "1:4", "2:4", "3:4", "2:8", "4:8", "4:16"]
# By quadrature, for which the interpreter takes seconds
LARGE_PATTERNS = ["5:8", "7:8", "8:16"]
MOST_PATTERNS = [*EXACT_PATTERNS, *map(slow, LARGE_PATTERNS)]


def sizes(pattern):
    return NMPattern(pattern).n, NMPattern(pattern).m


def as_codes(codes, pattern):
    """Group codes of unsigned integers."""
    signed = [c - (1 << 32) if c >> 31 else c for c in codes]
    return torch.tensor(signed, dtype=NMPattern(pattern).code_dtype)


def random_code(n, m, generator):
    return sum(1 << int(i) for i in torch.randperm(m, generator=generator)[:n])


def placed(kept, dropped, code, m):
    """Logits [m] with ``kept`` where the code's bits are set and ``dropped`` elsewhere."""
    logits = torch.empty(m)
    mask = torch.tensor([bool(code >> i & 1) for i in range(m)])
    logits[mask], logits[~mask] = kept, dropped
    return logits


@cache
def wide_cases(pattern):
    """Groups up to the ends of what must hold: gaps from -30 to 30, logits to +-80, sets however improbable."""
    n, m = sizes(pattern)
    generator = torch.Generator().manual_seed(100 * n + m)
    groups, codes = [], []

    def add(kept, dropped):
        code = random_code(n, m, generator)
        groups.append(placed(kept, dropped, code, m))
        codes.append(code)

    def noise(count, scale):
        return torch.randn(count, generator=generator) * scale

    for gap in (0, 1, 2, 3, 5, 8, 10, 12, 15, 18, 21, 25, 30):
        for sign in (1, -1):
            for spread in (0.0, 0.5, 5.0):
                add(sign * gap + noise(n, spread), noise(m - n, spread))
    for scale in (3.0, 15.0, 40.0):
        for _ in range(8):
            add(noise(n, scale).clamp(-80, 80), noise(m - n, scale).clamp(-80, 80))
    for _ in range(8):
        coins = torch.where(torch.rand(m, generator=generator) < 0.5, 80.0, -80.0)
        add(coins[:n], coins[n:])
    for high, low in ((80.0, -80.0), (-80.0, 80.0), (80.0, 80.0), (-80.0, -80.0)):
        add(torch.full((n,), high), torch.full((m - n,), low))
    for first in (-80.0, 80.0, 30.0):
        add(torch.tensor([first] + [10.0] * (n - 1)), torch.zeros(m - n))
        add(torch.full((n,), 10.0), torch.tensor([-first] + [0.0] * (m - n - 1)))
    return torch.stack(groups), codes


@cache
def confident_cases(pattern):
    """Groups whose every kept weight lies up to 18 above every dropped one, so that all scores are far below 1.

    The kept ones and the dropped ones lie close together, moderately spread, or far apart.
    """
    n, m = sizes(pattern)
    generator = torch.Generator().manual_seed(200 * n + m)
    groups, codes = [], []
    for gap in (6.0, 9.0, 12.0, 15.0, 18.0):
        for kept_spread in (0.0, 1.0, gap - 4.0):
            for dropped_spread in (0.0, 1.0, 20.0):
                code = random_code(n, m, generator)
                kept = gap - kept_spread * torch.rand(n, generator=generator)
                dropped = 0.0 - dropped_spread * torch.rand(m - n, generator=generator)
                dropped[0] = 0.0
                groups.append(placed(kept, dropped, code, m))
                codes.append(code)
    return torch.stack(groups), codes


@cache
def exact_scores(cases, pattern):
    """float64 [groups, M]: what is left of 60 digits."""
    rows = [exact_score(x.tolist(), c) for x, c in zip(*cases(pattern), strict=True)]
    return torch.tensor([[float(s) for s in row] for row in rows], dtype=torch.float64)


def reference_score(logits, codes, pattern):
    n, m = sizes(pattern)
    flat = as_codes(codes, pattern)[:, None]
    return reference.mask_score(logits, flat, torch.ones(flat.shape), n, m, 1.0)


def kernel_score(logits, codes, pattern):
    n, m = sizes(pattern)
    flat = as_codes(codes, pattern)[:, None].to(KERNEL_DEVICE)
    grad = torch.ones(flat.shape, device=KERNEL_DEVICE)
    return ops.mask_score(logits.to(KERNEL_DEVICE), flat, grad, n, m, 1.0).cpu()


def kernel_gradient(logits, codes, pattern):
    logits = logits.clone().to(KERNEL_DEVICE).requires_grad_()
    mk.mask_log_prob(logits, as_codes(codes, pattern)[:, None].to(KERNEL_DEVICE), pattern).sum().backward()
    return logits.grad.cpu()


DIRECT_SCORES = pytest.mark.parametrize("score", [reference_score, kernel_score], ids=["reference", "kernel"])
SCORES = pytest.mark.parametrize(
    "score", [reference_score, kernel_score, kernel_gradient], ids=["reference", "kernel", "gradient"]
)


@SCORES
@pytest.mark.parametrize("pattern", EXACT_PATTERNS)
def test_score_is_within_1e_6_of_60_digits(score, pattern, launched):
    error = score(*wide_cases(pattern), pattern).double() - exact_scores(wide_cases, pattern)
    assert error.abs().max() < 1e-6
    assert bool(launched["mask_score"]) == (score is not reference_score)


@SCORES
@pytest.mark.parametrize("pattern", EXACT_PATTERNS)
def test_score_far_below_1_keeps_its_digits(score, pattern):
    exact = exact_scores(confident_cases, pattern)
    assert exact.abs().max() < 0.2
    error = score(*confident_cases(pattern), pattern).double() - exact
    assert (error.abs() <= 1e-5 * exact.abs()).all()


@SCORES
def test_worked_example(score):
    worked = score(torch.tensor([[10.0, 0.0, 0.0, 0.0]]), [0b0011], "2:4")
    exact = torch.tensor([exact_score([10.0, 0.0, 0.0, 0.0], 0b0011)], dtype=torch.float64)
    assert (worked.double() - exact).abs().max() < 1e-6
    assert (worked - torch.tensor([[0.0, 2 / 3, -1 / 3, -1 / 3]])).abs().max() < 1e-4


@cache
def wide_scores(score, pattern):
    """One launch for all tests: by quadrature it takes the interpreter seconds."""
    return score(*wide_cases(pattern), pattern).double()


@DIRECT_SCORES
@pytest.mark.parametrize("pattern", MOST_PATTERNS)
def test_scores_of_a_group_sum_to_zero(score, pattern):
    """log p(S) does not change when the whole group shifts."""
    assert wide_scores(score, pattern).sum(1).abs().max() < 2e-6


@DIRECT_SCORES
@pytest.mark.parametrize("pattern", MOST_PATTERNS[len(EXACT_PATTERNS) :])
def test_quadrature_score_is_within_2e_6_of_60_digits(score, pattern):
    error = wide_scores(score, pattern) - exact_scores(wide_cases, pattern)
    assert error.abs().max() < 2e-6


def reference_log_prob(logits, codes, pattern):
    n, m = sizes(pattern)
    return reference.mask_log_prob(logits, as_codes(codes, pattern)[:, None], n, m, 1.0)[:, 0]


def kernel_log_prob(logits, codes, pattern):
    codes = as_codes(codes, pattern)[:, None].to(KERNEL_DEVICE)
    return mk.mask_log_prob(logits.to(KERNEL_DEVICE), codes, pattern)[:, 0].cpu()


LOG_PROBS = pytest.mark.parametrize("log_prob", [reference_log_prob, kernel_log_prob], ids=["reference", "kernel"])


@cache
def exact_log_probs(cases, pattern):
    rows = [exact_log_prob(x.tolist(), c) for x, c in zip(*cases(pattern), strict=True)]
    return torch.tensor([float(row) for row in rows], dtype=torch.float64)


@cache
def found_log_probs(log_prob, pattern):
    """Of the wide and of the confident cases, by one launch."""
    wide, confident = wide_cases(pattern), confident_cases(pattern)
    launches.clear()
    found = log_prob(torch.cat([wide[0], confident[0]]), wide[1] + confident[1], pattern).double()
    assert launches["mask_log_prob"] == (log_prob is kernel_log_prob)
    return found.split([len(wide[1]), len(confident[1])])


@LOG_PROBS
@pytest.mark.parametrize("pattern", MOST_PATTERNS)
def test_log_prob_is_exact(log_prob, pattern):
    exact = exact_log_probs(wide_cases, pattern)
    error = (found_log_probs(log_prob, pattern)[0] - exact).abs()
    assert (error <= 2e-6 * exact.abs().clamp(min=1.0)).all()


@LOG_PROBS
@pytest.mark.parametrize("pattern", MOST_PATTERNS)
def test_log_prob_near_certainty_keeps_its_digits(log_prob, pattern):
    exact = exact_log_probs(confident_cases, pattern)
    error = (found_log_probs(log_prob, pattern)[1] - exact).abs()
    assert (error <= 1e-5 * exact.abs()).all()


@cache
def huge_cases(pattern):
    """Near certain, likely, random and improbable sets of patterns too large for the subsets of S."""
    n, m = sizes(pattern)
    generator = torch.Generator().manual_seed(300 * n + m)
    groups, codes = [], []
    for kept, scale in ((12.0, 0.5), (3.0, 1.0), (0.0, 2.0), (0.0, 15.0), (-10.0, 1.0), (-40.0, 20.0)):
        code = random_code(n, m, generator)
        noise = torch.randn(m, generator=generator) * scale
        groups.append(placed(kept + noise[:n], noise[n:], code, m).clamp(-80, 80))
        codes.append(code)
    return torch.stack(groups), codes


@cache
def exact_huge_log_probs(pattern):
    rows = [quadrature_log_prob(x.tolist(), c) for x, c in zip(*huge_cases(pattern), strict=True)]
    return torch.tensor([float(row) for row in rows], dtype=torch.float64)


@pytest.mark.slow
@LOG_PROBS
@pytest.mark.parametrize("pattern", ["5:8", "8:16", "15:16"])
def test_log_prob_is_exact_up_to_15_of_16(log_prob, pattern):
    exact = exact_huge_log_probs(pattern)
    error = (log_prob(*huge_cases(pattern), pattern).double() - exact).abs()
    assert (error <= 2e-6 * exact.abs().clamp(min=1.0)).all()


def test_the_two_high_precision_formulas_agree():
    logits, codes = wide_cases("5:8")
    for x, code in list(zip(logits, codes, strict=True))[::12]:
        exact = exact_log_prob(x.tolist(), code)
        assert abs(quadrature_log_prob(x.tolist(), code) - exact) < 1e-20 * max(1, abs(exact))


def test_high_precision_and_enumeration_agree():
    logits = torch.randn(8, generator=torch.Generator().manual_seed(7), dtype=torch.float64).requires_grad_()
    p = set_probabilities(logits, 4)
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-12)
    (gradient,) = torch.autograd.grad(p[33].log(), logits)
    code = int(subset_codes(4, 8)[33])
    assert float(exact_log_prob(logits.tolist(), code)) == pytest.approx(float(p[33].log()), abs=1e-12)
    assert [float(s) for s in exact_score(logits.tolist(), code)] == pytest.approx(gradient.tolist(), abs=1e-12)


# Scores this much larger than the logits lose none of their digits when they are added to them
AMPLIFIED = 2.0**20


def reference_update(logits, pattern, seed, temperature=1.0):
    n, m = sizes(pattern)
    moved = logits.clone()
    counter = counter_of(logits, NMPattern(pattern), seed)._replace(draw=torch.tensor([0]))
    reference.score_update_(moved, torch.tensor([-AMPLIFIED]), n, m, 1.0 / temperature, counter)
    return (moved.double() - logits) / AMPLIFIED


def kernel_update(logits, pattern, seed, temperature=1.0):
    moved = logits.clone().to(KERNEL_DEVICE)
    mk.score_update_(moved, -AMPLIFIED, pattern=pattern, seed=seed, temperature=temperature)
    return (moved.cpu().double() - logits) / AMPLIFIED


# The eager reference takes seconds for what the kernel does at once; that both have the same bits is tested elsewhere
DRAWS = {reference_update: 1 << 15, kernel_update: 1 << 16}
UPDATES = pytest.mark.parametrize("update", [reference_update, kernel_update], ids=["reference", "kernel"])
ESTIMATED = pytest.mark.parametrize(
    "pattern, update",
    cases(itertools.product(["5:8", "8:16"], DRAWS), slow=lambda *case: case == ("8:16", kernel_update)),
)


def drawn_scores(update, group, pattern, seed, count, temperature=1.0):
    """(codes [count], scores float64 [count, M]) of ``count`` draws of one group."""
    m = NMPattern(pattern).m
    logits = group.repeat(16, count // 16)
    codes = mk.sample_mask(logits.to(KERNEL_DEVICE), pattern, seed=seed, temperature=temperature).cpu()
    return codes.flatten().to(torch.int64), update(logits, pattern, seed, temperature).view(-1, m)


def assert_mean(values, expected, errors=4.0):
    """The mean over rows is within some standard errors of what is expected."""
    mean, error = values.mean(0), values.std(0) / len(values) ** 0.5
    assert ((mean - expected).abs() <= errors * error).all(), ((mean - expected) / error).tolist()


def steep_group(m):
    """The first half above the second: one set in several draws, and hundreds of others."""
    return torch.where(torch.arange(m) < m // 2, 4.0, 0.0) + torch.linspace(0.5, -0.5, m)


@ESTIMATED
def test_mean_estimate_given_the_set_is_the_exact_score(update, pattern):
    group = steep_group(NMPattern(pattern).m)
    codes, scores = drawn_scores(update, group, pattern, seed=31, count=DRAWS[update])
    drawn, counts = codes.unique(return_counts=True)
    for i in counts.argsort(descending=True)[:4].tolist():
        assert counts[i] > 100
        code = int(drawn[i])
        exact = torch.tensor([float(s) for s in exact_score(group.tolist(), code)], dtype=torch.float64)
        assert_mean(scores[codes == code], exact)


@pytest.mark.parametrize(
    "pattern, temperature, update",
    cases(
        itertools.product(["2:4", "5:8", "8:16"], [1.0, 2.0], DRAWS),
        slow=lambda pattern, temperature, update: (
            pattern == "8:16" and (temperature, update) != (1.0, reference_update)
        ),
    ),
)
def test_mean_reward_times_score_is_the_enumerated_gradient(update, pattern, temperature):
    n, m = sizes(pattern)
    group = steep_group(m)
    reward = torch.randn(1 << m, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    codes, scores = drawn_scores(update, group, pattern, seed=32, count=DRAWS[update], temperature=temperature)
    logits = group.double().requires_grad_()
    sets = torch.from_numpy(subset_codes(n, m))
    expected = (set_probabilities(logits / temperature, n) * reward[sets]).sum()
    (gradient,) = torch.autograd.grad(expected, logits)
    assert_mean(reward[codes][:, None] * scores, gradient)


@ESTIMATED
def test_estimate_at_gap_10_varies_far_less_than_the_score_of_the_drawn_order(update, pattern):
    n, m = sizes(pattern)
    group = torch.where(torch.arange(m) < n, 10.0, 0.0)
    count = DRAWS[update]
    codes, scores = drawn_scores(update, group, pattern, seed=33, count=count)
    key = [torch.tensor(i) for i in (33, 0, 0, 0)]
    words = philox.group_words(torch.arange(count), m, philox.STREAM_DRAW, key)
    keys = group - group.max() + reference.gumbel(torch.stack(words, dim=1))
    ordered = ordered_score(group, keys, n)
    kept = mk.expand_mask(codes.to(NMPattern(pattern).code_dtype)[:, None], pattern)
    assert_same_bits(keys.argsort(dim=1, descending=True)[:, :n].sort(1)[0], kept.nonzero()[:, 1].view(-1, n))
    assert scores.var(0).sum() < ordered.var(0).sum() / 20


@UPDATES
@pytest.mark.parametrize("temperature", [0.5, slow(0.8), 3.0])
@pytest.mark.parametrize("pattern", ["1:4", "2:4", "4:8"])
def test_temperature_enters_the_update_as_in_the_enumeration(update, pattern, temperature):
    """Finite differences of the enumerated log p(S) of logits / temperature, in the logits."""
    n, m = sizes(pattern)
    group = torch.linspace(0.9, -0.9, m)
    codes, scores = drawn_scores(update, group, pattern, seed=34, count=256, temperature=temperature)
    step = 1e-5
    nudges = torch.eye(m, dtype=torch.float64) * step
    up = torch.stack([set_probabilities((group.double() + d) / temperature, n).log() for d in nudges])
    down = torch.stack([set_probabilities((group.double() - d) / temperature, n).log() for d in nudges])
    differences = ((up - down) / (2 * step)).T
    row = {int(code): i for i, code in enumerate(subset_codes(n, m))}
    expected = differences[[row[c] for c in codes.tolist()]]
    assert len(codes.unique()) > 3
    assert (scores - expected).abs().max() < 3e-6


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_temperature_enters_the_gradient_of_masked_linear(temperature):
    group = torch.linspace(0.9, -0.9, 4)
    _, scores = drawn_scores(kernel_update, group, "2:4", seed=35, count=256, temperature=temperature)
    logits = group.repeat(16, 16).to(KERNEL_DEVICE).requires_grad_()
    weight, x = torch.ones(16, 64, device=KERNEL_DEVICE), torch.ones(2, 64, device=KERNEL_DEVICE)
    _, log_prob = mk.masked_linear(x, weight, logits, pattern="2:4", seed=35, temperature=temperature)
    log_prob.backward()
    assert (logits.grad.cpu().double().view(-1, 4) - scores).abs().max() < 1e-6


ACCURACIES = [(torch.float32, 1e-6), (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)]


# 60 digits of 5:8 take seconds
@pytest.mark.parametrize(
    "pattern, dtype, accuracy",
    cases(
        [(pattern, *accuracy) for pattern in ("2:4", "4:8", "5:8") for accuracy in ACCURACIES],
        slow=lambda pattern, *_: pattern == "5:8",
    ),
)
def test_gradient_of_log_prob_has_the_dtype_of_the_logits(pattern, dtype, accuracy):
    n, m = sizes(pattern)
    generator = torch.Generator().manual_seed(9)
    values = (torch.randn(12, m, generator=generator) * 2).to(dtype)
    codes = [random_code(n, m, generator) for _ in values]
    logits = values.to(KERNEL_DEVICE).requires_grad_()
    log_prob = mk.mask_log_prob(logits, as_codes(codes, pattern)[:, None].to(KERNEL_DEVICE), pattern)
    weights = torch.linspace(-2, 2, 12, device=KERNEL_DEVICE)[:, None]
    assert log_prob.dtype == torch.float32
    (log_prob * weights).sum().backward()
    assert logits.grad.dtype == dtype
    rows = [[float(s) for s in exact_score(x.tolist(), c)] for x, c in zip(values, codes, strict=True)]
    exact = torch.tensor(rows, dtype=torch.float64) * weights.cpu()
    assert ((logits.grad.cpu().double() - exact).abs() <= 4e-6 + accuracy * exact.abs()).all()


@pytest.mark.parametrize("pattern", ["2:4", pytest.param("5:8", marks=pytest.mark.slow)])
def test_a_second_derivative_is_refused_with_a_clear_error(pattern):
    n, m = sizes(pattern)
    logits = torch.zeros(1, m, device=KERNEL_DEVICE, requires_grad=True)
    codes = as_codes([(1 << n) - 1], pattern)[:, None].to(KERNEL_DEVICE)
    log_prob = mk.mask_log_prob(logits, codes, pattern)
    (gradient,) = torch.autograd.grad(log_prob.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="mask_score.*no autograd formula"):
        gradient.square().sum().backward()
