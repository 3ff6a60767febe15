"""Kernels of straight-through learning: slopes within an error budget, steps bit by bit."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.enumerated import KERNEL_DEVICE
from helpers.products import DRAW, DTYPES, mask_of, normal, problems, small_tiles, tiled_cases, within_budget
from helpers.slopes import CURVATURE, slope_in, slope_operands, source_of
from hypothesis import given, settings
from hypothesis import strategies as st

from maskpro_kernels import ops
from maskpro_kernels.functional.checks import counter_of
from maskpro_kernels.ops import reference
from maskpro_kernels.ops.pattern import NMPattern
from maskpro_kernels.ops.reference import curvature
from maskpro_kernels.ops.triton import slopes, tiles


@settings(max_examples=6)
@given(problems((2, 4, 4, 8, 16), most_tokens=200, most_rows=90, most_k=256), st.sampled_from([1, 2]))
def test_slopes_are_within_the_error_budget(problem, parts):
    _, x, weight, logits, _, pattern = problem
    x = x.reshape(-1, weight.shape[1]).contiguous()
    grad = normal(len(x), len(weight), seed=7, dtype=x.dtype)
    sizes = (len(weight), min(len(x), 128), weight.shape[1])
    whole = tiles.Tiles(*(tiles.power_above(-(-size // parts)) for size in sizes))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tiles, "INTERPRETER_TILES", whole)
        found = ops.straight_through_grad(grad, x, weight, CURVATURE, source_of(logits, pattern))
    _, mask = mask_of("drawn", logits, pattern)
    by_torch, exact = (slope_in(grad, x, weight, mask, pattern.m, dtype) for dtype in (x.dtype, torch.float64))
    assert found.dtype == torch.float32
    within_budget(found, by_torch, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_of_a_weight_is_summed_in_float32(dtype):
    """Where kernels run; a sum of 16 bits would lose the small ones."""
    grad, x = (
        torch.ones(300, 4, dtype=dtype, device=KERNEL_DEVICE),
        torch.ones(300, 8, dtype=dtype, device=KERNEL_DEVICE),
    )
    grad[0] = 512.0
    found = ops.weight_gradient(grad, x)
    assert found.dtype == torch.float32 and (found == 811.0).all()


class OnGpu(torch.Tensor):
    """A tensor that names a GPU as its device."""

    device = torch.device("cuda")


@pytest.mark.parametrize(
    ("hip", "dtype", "keywords"), [("7.0", torch.float32, {"out"}), (None, torch.bfloat16, {"out", "out_dtype"})]
)
def test_on_rocm_operands_are_float32_before_the_product(hip, dtype, keywords, monkeypatch):
    products = []
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch, "mm", lambda grad, x, **named: products.append((grad.dtype, x.dtype, named.keys())))
    grad, x = (torch.ones(300, size, dtype=torch.bfloat16).as_subclass(OnGpu) for size in (4, 8))
    slopes.weight_gradient(grad, x, torch.empty(4, 8))
    assert products == [(dtype, dtype, keywords)]


@pytest.fixture
def by_torch(monkeypatch):
    """The product is torch's, whatever the tokens, and a kernel takes what follows in many tiles."""
    monkeypatch.setattr(slopes, "fused_tokens", lambda *_: 0)
    monkeypatch.setattr(slopes, "tiles_for", small_tiles)


@pytest.mark.parametrize(
    ("pattern", "dtype", "kind"),
    [("2:4", torch.bfloat16, "drawn"), ("2:4", torch.float32, "codes"), ("4:8", torch.bfloat16, "codes")],
    ids=str,
)
def test_slopes_by_torchs_product(pattern, dtype, kind, by_torch, launched):
    """Of drawn and of given masks; the weight's gradient, in float32, is handed over where it is asked for."""
    pattern = NMPattern(pattern)
    grad, x, weight, logits = slope_operands(pattern, rows=21, k=40, dtype=dtype)
    codes, mask = mask_of("drawn", logits, pattern)
    source = source_of(codes if kind == "codes" else logits, pattern, kind)
    weight_grad = torch.full(weight.shape, math.nan, device=KERNEL_DEVICE)
    for out in (None, weight_grad):
        found = ops.straight_through_grad(grad, x, weight, CURVATURE, source, out)
        by_same, exact = (slope_in(grad, x, weight, mask, pattern.m, wide) for wide in (dtype, torch.float64))
        within_budget(found, by_same, exact)
    assert launched["straight_through_step"] == 2 and not launched["straight_through"]
    within_budget(weight_grad, grad.float().t() @ x.float(), grad.double().t() @ x.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_updates_by_torchs_product_step_by_the_slope(dtype, by_torch, launched):
    """Bit for bit, logits of every dtype."""
    pattern, rate, max_update = NMPattern("2:4"), torch.tensor(0.1, device=KERNEL_DEVICE), 0.75
    grad, x, weight, logits = slope_operands(pattern, rows=21, k=40, dtype=torch.bfloat16, logits=dtype)
    gradient = ops.straight_through_grad(grad, x, weight, CURVATURE, source_of(logits, pattern))
    expected = logits.cpu().clone()
    on_cpu = gradient.cpu(), rate.cpu(), max_update, pattern.m, counter_of(expected, pattern, **DRAW)
    mean_square = reference.descend_(expected, *on_cpu)
    moved = logits.clone()
    found = ops.straight_through_update_(grad, x, weight, CURVATURE, rate, max_update, source_of(moved, pattern))
    assert_same_bits([moved], [expected], pattern.m)
    assert not torch.equal(moved, logits)
    torch.testing.assert_close(found.cpu(), mean_square, rtol=1e-5, atol=0)
    assert launched["straight_through_step"] == 2 and not launched["descend"]


@pytest.mark.parametrize(
    ("target", "kind", "most"), [("sm_90", "drawn", 256), ("sm_100", "drawn", 32), ("sm_100", "codes", 96)]
)
def test_who_multiplies_goes_by_tokens_and_by_the_kind_of_mask(target, kind, most, launched, monkeypatch):
    """A draw that has been made already is known by its codes."""
    monkeypatch.setattr(slopes, "architecture", lambda device: target)
    pattern = NMPattern("2:4")
    for tokens, kernel in ((most, "straight_through"), (most + 1, "straight_through_step")):
        grad, x, weight, logits = slope_operands(pattern, tokens=tokens, rows=4, k=16)
        codes, _ = mask_of("drawn", logits, pattern)
        source = source_of(logits, pattern)._replace(codes=codes if kind == "codes" else None)
        launched.clear()
        ops.straight_through_grad(grad, x, weight, CURVATURE, source)
        assert {name for name in launched if name.startswith("straight_through")} == {kernel}


@pytest.mark.slow
def test_tiles_that_are_taken_in_groups_are_all_taken_once(monkeypatch):
    """Of a group and a part of one, three rows of tiles each."""
    pattern = NMPattern("2:4")
    count = slopes.SHARING.value + 3
    grad, x, weight, logits = slope_operands(pattern, rows=40, k=32 * count)
    mask = source_of(logits, pattern)
    whole = ops.straight_through_grad(grad, x, weight, CURVATURE, mask)
    monkeypatch.setattr(slopes, "tiles_for", small_tiles)
    in_tiles = ops.straight_through_grad(grad, x, weight, CURVATURE, mask)
    torch.testing.assert_close(in_tiles, whole, rtol=1e-4, atol=1e-4)
    rate = torch.tensor(0.5, device=KERNEL_DEVICE)
    mean_square = ops.straight_through_update_(grad, x, weight, CURVATURE, rate, 0.75, mask)
    torch.testing.assert_close(mean_square, whole.square().mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("tiles", "pattern", "dtypes"),
    tiled_cases(
        list(itertools.product((torch.float32, torch.bfloat16), DTYPES)), fast=(torch.bfloat16, torch.bfloat16)
    ),
    ids=str,
)
def test_fused_updates_step_by_the_slope(tiles, pattern, dtypes, launched, monkeypatch):
    """Bit for bit as the slope of the same tiles and the eager reference of the step."""
    dtype, logits_dtype = dtypes
    if tiles == "many tiles":
        monkeypatch.setattr(slopes, "tiles_for", small_tiles)
    grad, x, weight, logits = slope_operands(pattern, dtype=dtype, logits=logits_dtype)
    gradient = ops.straight_through_grad(grad, x, weight, CURVATURE, source_of(logits, pattern))
    rate = torch.tensor(0.5 / float(gradient.square().mean().sqrt()), device=KERNEL_DEVICE)
    max_update, counter, expected = 0.75, source_of(logits, pattern).counter, logits.cpu().clone()
    on_cpu = gradient.cpu(), rate.cpu(), max_update, pattern.m, counter_of(expected, pattern, **DRAW)
    mean_square = reference.descend_(expected, *on_cpu)
    fused, apart = logits.clone(), logits.clone()
    found = ops.straight_through_update_(grad, x, weight, CURVATURE, rate, max_update, source_of(fused, pattern))
    assert launched["straight_through"] == 2
    also = ops.descend_(apart, gradient, rate, max_update, pattern.m, counter)
    assert launched["descend"] == 1
    assert_same_bits([fused, apart], [expected, expected], pattern.m)
    assert not torch.equal(fused, logits)
    for value in (found, also):
        torch.testing.assert_close(value.cpu(), mean_square, rtol=1e-5, atol=0)
    moved = (fused.float() - logits.float()).abs()
    # to what lies next to a logit below 16 in magnitude
    assert float(moved.max()) <= max_update + 16 * torch.finfo(logits_dtype).eps


@pytest.mark.parametrize(
    ("pattern", "dtype"),
    [
        *(pytest.param(pattern, torch.float32, marks=pytest.mark.slow) for pattern in ("1:4", "2:4", "4:8", "8:16")),
        ("2:4", torch.bfloat16),
        pytest.param("2:4", torch.float16, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_gradient_of_the_weight_comes_with_the_slope(pattern, dtype, launched, monkeypatch):
    """Of kept and dropped weights; slope, logits and mean square keep their bits."""
    pattern = NMPattern(pattern)
    monkeypatch.setattr(slopes, "tiles_for", small_tiles)
    grad, x, weight, logits = slope_operands(pattern, dtype=dtype)
    rate = torch.tensor(0.1, device=KERNEL_DEVICE)
    found, alike = [], []
    for asked in (False, True):
        moved = logits.clone()
        grads = [torch.full_like(weight, math.nan, dtype=torch.float32) for _ in range(2)] if asked else [None, None]
        slope = ops.straight_through_grad(grad, x, weight, CURVATURE, source_of(logits, pattern), grads[0])
        square = ops.straight_through_update_(
            grad, x, weight, CURVATURE, rate, 0.75, source_of(moved, pattern), grads[1]
        )
        alike.append([slope, square, moved])
        found = grads
    assert launched["straight_through"] == 4
    assert_same_bits(*alike)
    assert_same_bits(*found)
    within_budget(found[0], grad.T @ x, grad.double().T @ x.double())


@pytest.mark.parametrize("rate", [math.inf, math.nan, 0.0])
def test_a_rate_that_is_not_finite_moves_nothing(rate):
    pattern = NMPattern("2:4")
    grad, x, weight, logits = slope_operands(pattern)
    moved = logits.clone()
    ops.straight_through_update_(
        grad, x, weight, 1.0, torch.tensor(rate, device=KERNEL_DEVICE), 1.0, source_of(moved, pattern)
    )
    assert_same_bits(moved, logits)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_leave_their_logits(bad):
    pattern = NMPattern("2:4")
    grad, x, weight, logits = slope_operands(pattern)
    grad[3, 5] = bad
    moved = logits.clone()
    rate = torch.tensor(0.1, device=KERNEL_DEVICE)
    mean_square = ops.straight_through_update_(grad, x, weight, 1.0, rate, 1.0, source_of(moved, pattern))
    assert not mean_square.isfinite()
    untouched = torch.zeros(len(logits), dtype=torch.bool)
    untouched[5] = True
    assert_same_bits(moved[untouched], logits[untouched])
    assert moved.isfinite().all() and (moved[~untouched] != logits[~untouched]).any(1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_given_squares_take_the_place_of_the_gradients_own(dtype):
    pattern = NMPattern("2:4")
    grad, x, weight, logits = slope_operands(pattern, tokens=16, dtype=dtype)
    mask, rate = source_of(logits, pattern), torch.tensor(0.1, device=KERNEL_DEVICE)
    squares = curvature.gradient_squares(grad)[0]
    assert squares.dtype == torch.float32 and squares.shape == (len(weight),)
    assert_same_bits(ops.token_squares(grad, None), torch.cat([256 * squares, squares.new_tensor([16.0])]))
    expected = torch.cat([1024 * squares, squares.new_tensor([16.0])])
    assert_same_bits(ops.token_squares(grad, torch.tensor(32.0)), expected)
    # in the kernel's order of sums
    own = 16 * ops.curvature_factors(grad, x, 1.0, None, None)[0]
    torch.testing.assert_close(own, 16 * squares)

    def slopes(row_squares, curvature=CURVATURE, tokens=None):
        of = grad, x, weight, curvature, mask
        return ops.straight_through_grad(*of, tokens=tokens, row_squares=row_squares)

    def moved(row_squares):
        logits_now = logits.clone()
        now = mask._replace(tensor=logits_now)
        ops.straight_through_update_(grad, x, weight, CURVATURE, rate, 1.0, now, row_squares=row_squares)
        return logits_now

    assert_same_bits(slopes(own), slopes(None))
    assert_same_bits(moved(own), moved(None))
    # a power of two is exact
    assert_same_bits(slopes(4 * own), slopes(None, 4 * CURVATURE))
    assert_same_bits(slopes(None, tokens=torch.tensor(64.0)), slopes(None, 4 * CURVATURE))
    assert_same_bits(slopes(4 * own, tokens=torch.tensor(64.0)), slopes(own))
    assert_same_bits(slopes(torch.zeros_like(own)), slopes(None, 0.0))
    assert not torch.equal(moved(4 * own), moved(own))


def test_opcheck():
    pattern = NMPattern("2:4")
    grad, x, weight, logits = slope_operands(pattern, rows=4, k=16)
    rate = torch.tensor(0.1, device=KERNEL_DEVICE)
    mask, squares = source_of(logits, pattern), torch.rand(4, device=KERNEL_DEVICE)
    tokens = torch.tensor(3.0)
    for more in ((None, None, None), (torch.empty_like(weight), tokens, squares)):
        of = (grad, x, weight, 1.0)
        torch.library.opcheck(torch.ops.maskpro.straight_through_grad.default, (*of, *more, *mask.flat()))
        update = torch.ops.maskpro.straight_through_update_.default
        torch.library.opcheck(update, (logits, *of, rate, 1.0, *more, *mask._replace(tensor=None).flat()))
    arguments = (logits, torch.randn_like(logits), rate, 1.0, 4, *source_of(logits, pattern).counter)
    torch.library.opcheck(torch.ops.maskpro.descend_.default, arguments)
