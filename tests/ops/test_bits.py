"""Reference, compiled reference and kernel give the same bits, whatever the route."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.cases import cases, slow

from maskpro_kernels.functional.checks import counter_of
from maskpro_kernels.ops import reference
from maskpro_kernels.ops.counter import MaskSource
from maskpro_kernels.ops.cpu import kernels, loops
from maskpro_kernels.ops.cpu.loops import CompiledLoop
from maskpro_kernels.ops.pattern import NMPattern
from maskpro_kernels.ops.triton import sampling, tiles

PATTERNS = [(1, 4), (2, 4), (4, 8), (8, 16)]
OTHERS = [(n, m) for m in (2, 4, 8, 16) for n in range(1, m) if (n, m) not in PATTERNS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# No block or row divides them; the interpreter takes seconds for a million
# The larger the groups the slower the interpreter
BRIEF = [(2, 4, torch.float32, 100_003), (2, 4, torch.bfloat16, 100_003), (4, 8, torch.bfloat16, 100_003)]
INTERPRETED = pytest.mark.parametrize(
    ("n", "m", "dtype", "groups"),
    cases(
        [(*pattern, dtype, groups) for pattern in PATTERNS for dtype in DTYPES for groups in (100_003, 1_000_003)],
        slow=lambda *case: case not in BRIEF,
    ),
    ids=str,
)
# The eager reference takes seconds for a million groups of more than 4
COMPILED = [pytest.param(*pattern, marks=[] if pattern == (2, 4) else pytest.mark.slow) for pattern in PATTERNS]
# Another dtype of 16 bits is another loop of the last rounding
COMPILED_DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
SEED, STEP, LAYER, DRAW = 0x123456789ABCDEF, (1 << 32) - 3, 5, 3
TEMPERATURE = 1 / 0.7


@functools.cache
def problem(m: int, dtype: torch.dtype, groups: int):
    """Logits with gaps, ties and large values; a number of groups."""
    generator = torch.Generator().manual_seed(m)
    logits = torch.randn(groups, m, generator=generator) * 4
    logits[: groups // 4] = logits[: groups // 4].round()
    logits[groups // 4 : groups // 2] *= 8
    return logits.to(dtype).view(1, -1)


@pytest.mark.parametrize(("n", "m"), [(n, m) for m in (2, 4, 8, 16) for n in sorted({1, -(-m // 8), m // 2, m - 1})])
def test_top_n_of_ties_goes_to_the_lower_index(n, m):
    """Few distinct scores, zeros of either sign, and infinities that fill a group or part of it."""
    generator = torch.Generator().manual_seed(m)
    scores = torch.randint(-2, 3, (1000, m), generator=generator).float()
    scores[:300] *= torch.where(torch.rand(300, m, generator=generator) < 0.5, -1.0, 1.0)
    scores[300:500][scores[300:500] == 2] = torch.inf
    scores[400:600][scores[400:600] < 1] = -torch.inf
    for i, value in enumerate((0.0, 1.0, torch.inf, -torch.inf)):
        scores[i] = value
    codes = sampling.top_n_mask(scores.view(1, -1), n, m)
    # sorting is stable: equal scores stay in the order of their indices
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :n]
    expected = (1 << order.long()).sum(1).to(torch.int32).to(codes.dtype)
    assert_same_bits(codes.flatten(), expected)
    assert_same_bits(reference.top_n_mask(scores.view(1, -1), n=n, m=m), codes)


@pytest.mark.parametrize(("n", "m"), [(n, m) for m in (2, 8, 16) for n in sorted({1, m // 2, m - 1})])
def test_n_are_kept_of_a_group_with_nan(n, m):
    """Which ones is not promised; but a code keeps N, and no group of a weight turns into zeros."""
    generator = torch.Generator().manual_seed(m)
    scores = torch.randint(-2, 3, (200, m), generator=generator).float()
    scores[torch.rand(200, m, generator=generator) < 0.3] = torch.nan
    for i, column in enumerate((0, m // 2, m - 1)):
        scores[i, column] = torch.nan
    scores[3] = torch.nan
    codes = sampling.top_n_mask(scores.view(1, -1), n, m).flatten().long()
    kept = sum(codes >> i & 1 for i in range(m))
    assert (kept == n).all()


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32)


def counter(logits, n, m, draw=DRAW, row_stride=None):
    where = {"step": STEP, "layer": LAYER, "draw": draw, "group_offset": 11, "group_row_stride": row_stride}
    return counter_of(logits, NMPattern(f"{n}:{m}"), SEED, **where)


def draw(route, n, m, logits):
    return route.sample_mask(logits, n, m, TEMPERATURE, counter(logits, n, m))


def update(route, n, m, logits, draws=(DRAW,), row_stride=None):
    logits, coef = logits.clone(), torch.tensor([0.37 / (k + 1) for k in range(len(draws))])
    where = counter(logits, n, m, row_stride=row_stride)._replace(draw=torch.tensor(draws))
    route.score_update_(logits, coef, n, m, TEMPERATURE, where)
    return logits


@INTERPRETED
def test_kernel_and_reference_draw_the_same_masks(n, m, dtype, groups, launched):
    logits = problem(m, dtype, groups)
    expected = draw(reference, n, m, logits)
    assert_same_bits(draw(sampling, n, m, logits), expected)
    assert launched["sample_mask"] == 1
    kept = sum(expected.to(torch.int64) >> i & 1 for i in range(m))
    assert (kept == n).all()


@INTERPRETED
def test_kernel_and_reference_update_to_the_same_bits(n, m, dtype, groups, launched):
    logits = problem(m, dtype, groups)
    expected = update(reference, n, m, logits)
    assert not torch.equal(expected, logits)
    assert_same_bits(update(sampling, n, m, logits), expected, m)
    assert launched["score_update"] == 1


@pytest.mark.parametrize("dtype", COMPILED_DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), COMPILED)
def test_compiled_and_eager_reference_draw_the_same_masks(n, m, dtype):
    logits = problem(m, dtype, 1_000_003)
    assert_same_bits(draw(kernels, n, m, logits), draw(reference, n, m, logits))


@pytest.mark.parametrize("dtype", COMPILED_DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), COMPILED)
def test_compiled_and_eager_reference_update_to_the_same_bits(n, m, dtype):
    logits = problem(m, dtype, 1_000_003)
    assert_same_bits(update(kernels, n, m, logits), update(reference, n, m, logits), m)


@pytest.mark.parametrize("dtype", COMPILED_DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), [(2, 4), pytest.param(5, 8, marks=pytest.mark.slow)])
def test_all_routes_update_by_several_draws_of_a_shard_to_the_same_bits(n, m, dtype, launched, monkeypatch):
    """More groups than the compiled route takes at a time, in rows that lie apart."""
    monkeypatch.setattr(kernels, "COPIED_BYTES", 1 << 19)
    logits = problem(m, dtype, 100_000).view(100, -1)
    expected = update(reference, n, m, logits, draws=(DRAW, 7, 1), row_stride=1_234)
    assert not torch.equal(expected, update(reference, n, m, logits, row_stride=1_234))
    assert_same_bits(update(sampling, n, m, logits, (DRAW, 7, 1), 1_234), expected, m)
    assert launched["score_updates"] == 1
    assert_same_bits(update(kernels, n, m, logits, (DRAW, 7, 1), 1_234), expected, m)


@pytest.mark.parametrize("gap", [4.0, 10.0, slow(30.0)])
@pytest.mark.parametrize(("n", "m"), [(2, 4), *(slow(*p) for p in ((1, 2), (4, 8), (8, 16), (10, 16)))])
def test_kernel_and_reference_draw_the_same_where_blocks_are_determined(n, m, gap, monkeypatch):
    """Blocks as small as on a GPU, two a program: bounds determine the draws of most of them, not of others."""
    monkeypatch.setattr(tiles, "INTERPRETER_BLOCK", 64)
    monkeypatch.setattr(tiles, "PROGRAMS_A_PROCESSOR", 0)
    generator = torch.Generator().manual_seed(n)
    logits = torch.zeros(700, m).scatter_(1, torch.rand(700, m, generator=generator).topk(n).indices, gap)
    logits[::7] += torch.randn(logits[::7].shape, generator=generator)
    # ties of the kept and of the dropped ones
    logits[1::5] += torch.randn(logits[1::5].shape, generator=generator).round()
    logits = logits.view(1, -1)
    assert_same_bits(draw(sampling, n, m, logits), draw(reference, n, m, logits))
    assert_same_bits(update(sampling, n, m, logits), update(reference, n, m, logits))


def test_kernel_and_reference_score_the_same_where_logits_of_determined_groups_are_extreme(monkeypatch):
    """2:4, a group a block: all orders of what lies far apart, saturates, or is zero of either sign."""
    monkeypatch.setattr(tiles, "INTERPRETER_BLOCK", 1)
    top = torch.finfo(torch.float32).max
    sharp = [(top, top / 2, 0.0, -0.0), (0.0, -top, -top, -top), (0.0, -top / 4, -top, -top), (90.0, 0.0, -80, -200)]
    # by their text, since 0.0 equals -0.0
    orders = {str(order): order for group in sharp for order in itertools.permutations(group)}
    logits = torch.tensor(list(orders.values())).view(1, -1)
    assert_same_bits(update(sampling, 2, 4, logits), update(reference, 2, 4, logits))


def test_the_compiled_route_runs_a_loop_for_each_operation_whatever_the_shape(monkeypatch):
    fresh = functools.cache(loops.compiled_loop.__wrapped__)
    monkeypatch.setattr(loops, "compiled_loop", fresh)
    monkeypatch.setattr(CompiledLoop, "_eager", None)
    logits = problem(4, torch.float32, 5_003)
    assert_same_bits(draw(kernels, 2, 4, logits), draw(reference, 2, 4, logits))
    assert_same_bits(update(kernels, 2, 4, logits), update(reference, 2, 4, logits), m=4)
    assert fresh.cache_info().currsize == 2
    other = problem(4, torch.float32, 9_000).view(9, -1)
    with torch.inference_mode():
        assert_same_bits(draw(kernels, 2, 4, other), draw(reference, 2, 4, other))
    assert fresh.cache_info().currsize == 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), OTHERS)
def test_kernel_and_reference_agree_for_every_pattern(n, m, dtype):
    logits = problem(m, dtype, 1 << 14)
    assert_same_bits(draw(sampling, n, m, logits), draw(reference, n, m, logits))
    assert_same_bits(update(sampling, n, m, logits), update(reference, n, m, logits), m)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), [pytest.param(1, 2, marks=pytest.mark.slow), (2, 4)])
def test_masked_weights_are_the_weights_under_the_drawn_codes(n, m, dtype):
    logits = problem(m, torch.float32, 4_003)
    weight = torch.randn(logits.shape).to(dtype)
    weight[0, :5] = torch.tensor([-0.0, 0.0, torch.inf, -torch.inf, torch.nan]).to(dtype)
    codes = draw(sampling, n, m, logits)
    mask = (codes.to(torch.int64)[..., None] >> torch.arange(m) & 1).bool().view(weight.shape)
    expected = torch.where(mask, weight, torch.zeros((), dtype=dtype))
    drawn = MaskSource(logits, "drawn", n, m, TEMPERATURE, counter(logits, n, m))
    for route in (sampling, reference, kernels):
        for source in (drawn, MaskSource(codes, "codes", n, m, 1.0)):
            assert_same_bits(route.masked_weight(weight, source), expected, m)


@pytest.mark.parametrize(
    ("n", "m", "route"),
    [
        *((n, m, reference) for n, m in ((1, 2), (2, 4), (4, 8))),
        (2, 4, kernels),
        pytest.param(5, 8, reference, marks=pytest.mark.slow),
        pytest.param(1, 2, kernels, marks=pytest.mark.slow),
        pytest.param(4, 8, kernels, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)).split(".")[-1],
)
def test_log_prob_and_score_have_the_same_bits_on_all_routes(n, m, route):
    logits = problem(m, torch.float32, 515)
    codes = draw(reference, n, m, logits)
    grad = torch.randn(codes.shape)
    expected = sampling.mask_log_prob(logits, codes, n, m, TEMPERATURE)
    assert_same_bits(route.mask_log_prob(logits, codes, n, m, TEMPERATURE), expected)
    expected = sampling.mask_score(logits, codes, grad, n, m, TEMPERATURE)
    assert_same_bits(route.mask_score(logits, codes, grad, n, m, TEMPERATURE), expected)
