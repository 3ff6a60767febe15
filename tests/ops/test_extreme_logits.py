"""Finite logits of any distance from each other, and subnormal ones: what all routes make of them, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.cases import cases
from helpers.enumerated import exact_log_prob, exact_score, subset_codes
from helpers.products import DTYPES
from helpers.routes import take_route
from helpers.slopes import CURVATURE, slope_operands, source_of

import maskpro_kernels as mk
from maskpro_kernels import ops
from maskpro_kernels.ops import reference
from maskpro_kernels.ops.counter import NO_COUNTER
from maskpro_kernels.ops.pattern import NMPattern

# differences that overflow are what is tested
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

ROUTES = ["eager", "compiled", "kernels"]
# 5:8 and 8:16 have the score as an exponential race, and by quadrature
PATTERNS = ["1:2", "1:4", "2:4", "3:4", "4:8", "5:8", "8:16"]
LOWEST = torch.finfo(torch.float32).min
COUNTER = {"seed": 11, "step": 3, "layer": 2}
GROUPS = 96
EVERY = list(itertools.product(PATTERNS, DTYPES))


def slow(pattern, dtype):
    return pattern not in ("2:4", "4:8") or (pattern != "2:4" and dtype != torch.float32)


def spread(pattern: str, dtype: torch.dtype) -> torch.Tensor:
    """Logits of which many groups hold both ends of the dtype, some their halves, and some ordinary values."""
    top = torch.finfo(dtype).max
    values = torch.tensor([top, -top, top / 2, -top / 2, 1e4, -1e4, 10.0, 1.0, 0.0, -1.0], dtype=dtype)
    m, generator = NMPattern(pattern).m, torch.Generator().manual_seed(5)
    logits = values[torch.randint(len(values), (GROUPS, m), generator=generator)]
    logits[:20] = values[torch.randint(2, (20, m), generator=generator)]
    return logits.view(4, -1)


def some_codes(pattern: str, count: int = GROUPS) -> torch.Tensor:
    """Codes of any sets, however improbable."""
    n, m = NMPattern(pattern).n, NMPattern(pattern).m
    every = torch.from_numpy(subset_codes(n, m))
    chosen = every[torch.randint(len(every), (count,), generator=torch.Generator().manual_seed(6))]
    return chosen.to(NMPattern(pattern).code_dtype).view(4 if count == GROUPS else 8, -1)


def log_prob_and_score(logits, codes, pattern):
    logits = logits.clone().requires_grad_()
    log_prob = mk.mask_log_prob(logits, codes, pattern)
    log_prob.sum().backward()
    return log_prob.detach(), logits.grad


def everything(logits, pattern, temperature=0.5, coef=0.75):
    """All that depends on distances between logits."""
    draw = {"temperature": temperature, **COUNTER}
    codes = mk.sample_mask(logits, pattern, **draw)
    one, several = logits.clone(), logits.clone()
    mk.score_update_(one, coef, pattern=pattern, **draw)
    mk.score_update_(several, [coef, -2 * coef], draw=[0, 5], pattern=pattern, **draw)
    weight = torch.ones(logits.shape)
    return {
        "draw": codes,
        "masked weight": mk.sample_masked_weight(weight, logits, pattern, **draw),
        "of the draw": log_prob_and_score(logits, codes, pattern),
        "of any set": log_prob_and_score(logits, some_codes(pattern, codes.numel()), pattern),
        "update": [one, several],
    }


def on_routes(monkeypatch, routes, function, *arguments):
    results = []
    for route in routes:
        take_route(monkeypatch, route)
        results.append(function(*arguments))
    return results


def assert_finite(results):
    for result in results.values() if isinstance(results, dict) else results:
        if isinstance(result, torch.Tensor):
            assert result.isfinite().all()
        else:
            assert_finite(result)


@pytest.mark.parametrize(
    ("pattern", "dtype", "route"),
    # loops take seconds to compile
    cases(
        [(*case, route) for case in EVERY for route in ROUTES[1:]],
        slow=lambda pattern, dtype, route: slow(pattern, dtype) or (route == "compiled" and pattern != "2:4"),
    ),
    ids=str,
)
def test_routes_give_the_same_finite_results_however_far_apart_logits_lie(pattern, dtype, route, monkeypatch):
    logits = spread(pattern, dtype)
    expected, found = on_routes(monkeypatch, ("eager", route), everything, logits, pattern)
    assert_finite(expected)
    assert_same_bits(found, expected)
    kept = mk.expand_mask(expected["draw"], pattern).view(GROUPS, -1)
    assert (kept.sum(1) == NMPattern(pattern).n).all()


@pytest.mark.parametrize("pattern", ["2:4", pytest.param("5:8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("temperature", [1e-30, 1e30])
def test_ends_of_the_temperature_spread_ordinary_logits_as_far(pattern, temperature, monkeypatch):
    logits = spread(pattern, torch.float16).float() * 1e5
    expected, *found = on_routes(monkeypatch, ROUTES, everything, logits, pattern, temperature, 1e-8)
    assert_finite(expected)
    assert_same_bits(found, [expected] * 2)


@pytest.mark.parametrize(("pattern", "dtype"), cases(EVERY, slow), ids=str)
@pytest.mark.usefixtures("eager_reference")
def test_log_probability_and_score_are_those_of_exact_arithmetic_on_saturated_distances(pattern, dtype):
    logits, codes = spread(pattern, dtype), some_codes(pattern)
    log_prob, score = log_prob_and_score(logits, codes, pattern)
    groups = logits.double().view(GROUPS, -1)
    saturated = (groups - groups.amax(1, keepdim=True)).clamp(min=LOWEST)
    # the recursion over 2^8 subsets in high precision takes its time
    count = GROUPS if NMPattern(pattern).m < 16 else 8
    rows = list(zip(saturated.tolist(), codes.flatten().tolist(), strict=True))[:count]
    exact = torch.tensor([max(float(exact_log_prob(*row)), LOWEST) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(log_prob.flatten()[:count].double(), exact, rtol=2e-6, atol=2e-6)
    exact = torch.tensor([[float(x) for x in exact_score(*row)] for row in rows], dtype=torch.float64)
    # that of 16-bit logits is rounded to theirs
    score = score.view(GROUPS, -1)[:count].double()
    torch.testing.assert_close(score, exact, rtol=0, atol=max(2e-4, 4 * torch.finfo(dtype).eps))


@pytest.mark.parametrize("route", ROUTES)
def test_what_is_certain_is_certain(route, monkeypatch):
    """The probability is 1 or 0, the score 0, and no draw gives anything else."""
    take_route(monkeypatch, route)
    top = 3e38
    logits = torch.tensor([[top, top, -top, -top], [-top, top, -top, top], [top, 0.9 * top, -top, -0.9 * top]])
    certain, hopeless = torch.tensor([[0b0011], [0b1010], [0b0011]]).byte(), torch.tensor([[12], [5], [12]]).byte()
    log_prob, score = log_prob_and_score(logits, certain, "2:4")
    assert (log_prob == 0).all() and (score == 0).all()
    log_prob, score = log_prob_and_score(logits, hopeless, "2:4")
    assert (log_prob == LOWEST).all()
    assert score[:2].tolist() == [[-1, -1, 1, 1], [1, -1, 1, -1]]
    for seed in range(20):
        assert_same_bits(mk.sample_mask(logits, "2:4", seed=seed), certain)
    moved = logits.clone()
    mk.score_update_(moved, 1e30, pattern="2:4", seed=0)
    assert_same_bits(moved, logits)


@pytest.mark.parametrize("route", ROUTES)
def test_weights_that_tie_below_share_what_is_left(route, monkeypatch):
    take_route(monkeypatch, route)
    logits, code = torch.tensor([[3e38, -3e38, -3e38, -3e38]]), torch.tensor([[0b0011]]).byte()
    log_prob, score = log_prob_and_score(logits, code, "2:4")
    torch.testing.assert_close(log_prob, torch.tensor([[1 / 3]]).log(), rtol=1e-6, atol=0)
    torch.testing.assert_close(score, torch.tensor([[0, 2 / 3, -1 / 3, -1 / 3]]), rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_and_products_under_extreme_logits_are_those_under_their_draw(dtype):
    pattern = NMPattern("2:4")
    grad, x, weight, _ = slope_operands(pattern, rows=4, k=96)
    logits = spread("2:4", dtype).contiguous()
    mask = source_of(logits, pattern)
    codes = reference.sample_mask(logits, 2, 4, mask.inv_temperature, mask.counter)
    given = mask._replace(tensor=codes, kind="codes", counter=NO_COUNTER)
    slope = ops.straight_through_grad(grad, x, weight, CURVATURE, mask)
    assert_same_bits(slope, ops.straight_through_grad(grad, x, weight, CURVATURE, given))
    moved, expected = logits.clone(), logits.clone()
    rate, most = torch.tensor(0.5), 0.75
    ops.straight_through_update_(grad, x, weight, CURVATURE, rate, most, mask._replace(tensor=moved))
    reference.descend_(expected, slope, rate, most, 4, mask.counter)
    assert moved.isfinite().all()
    assert_same_bits(moved, expected)
    y, log_prob = mk.masked_linear(x, weight, logits, pattern=pattern, seed=1)
    codes = mk.sample_mask(logits, pattern, seed=1)
    assert_same_bits(y, mk.codes_linear(x, weight, codes, pattern=pattern))
    torch.testing.assert_close(log_prob, mk.mask_log_prob(logits, codes, pattern).sum(), rtol=1e-6, atol=1e-6)


def test_subnormal_logits_of_bfloat16_count(monkeypatch):
    """In the interpreter by ``helpers.interpreter``: as Triton ships it, it takes them for other numbers or zeros."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 15), 1 << 15, (8, 4096), generator=generator, dtype=torch.int32)
    # all signs, mantissas and exponents of 0
    logits = (bits & 0x807F).to(torch.int16).view(torch.bfloat16)
    assert ((logits != 0) & (logits.float().abs() < torch.finfo(torch.bfloat16).tiny)).float().mean() > 0.9
    # a temperature that brings them up to ordinary distances
    expected, *found = on_routes(monkeypatch, ROUTES, everything, logits, "2:4", 1e-30)
    assert_same_bits(found, [expected] * 2)
    top, *found = on_routes(monkeypatch, ROUTES, mk.top_n_mask, logits, "2:4")
    assert_same_bits(found, [top] * 2)
    order = logits.double().view(-1, 4).sort(dim=1, descending=True, stable=True).indices[:, :2]
    assert_same_bits(top.flatten(), (1 << order).sum(1).byte())
