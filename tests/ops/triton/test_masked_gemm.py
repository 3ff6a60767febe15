"""Masked products by the kernels: against float64 within an error budget, on both routes, for all sources of masks."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.cases import cases, slow
from helpers.enumerated import KERNEL_DEVICE
from helpers.products import (
    COUNTER,
    DTYPES,
    INTERPRETED,
    KINDS,
    PATTERNS,
    TEMPERATURE,
    mask_of,
    normal,
    operands,
    problems,
    small_tiles,
    tiled_cases,
    within_budget,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import maskpro_kernels as mk
from maskpro_kernels.ops import reference
from maskpro_kernels.ops.counter import MaskSource
from maskpro_kernels.ops.pattern import NMPattern
from maskpro_kernels.ops.triton import masked_gemm, tiles


def product(kind, x, weight, logits, codes, bias, pattern):
    if kind == "drawn":
        return mk.masked_linear(x, weight, logits, bias, pattern=pattern, log_prob=False, **COUNTER)[0]
    return mk.codes_linear(x, weight, codes, bias, pattern=pattern)


def check_mask(kind, logits, codes, mask, pattern):
    """The mask bit by bit, 16 columns a token: sums of distinct powers of 2 below 2^16 are exact in float32."""
    rows, k = logits.shape
    columns = torch.arange(k, device=logits.device)
    weight = (2.0 ** (columns % 16)).expand(rows, k)
    x = (torch.arange(-(-k // 16), device=logits.device)[:, None] == columns // 16).float()
    y = product(kind, x, weight, logits, codes, None, pattern)
    assert_same_bits(y, nn.functional.linear(x, torch.where(mask, weight, 0)))


def check_product(kind, x, weight, logits, bias, pattern):
    codes, mask = mask_of(kind, logits, pattern)
    check_mask(kind, logits, codes, mask, pattern)
    y = product(kind, x, weight, logits, codes, bias, pattern)
    assert y.shape == (*x.shape[:-1], weight.shape[0]) and y.dtype == x.dtype
    masked = torch.where(mask, weight, 0)
    wide = None if bias is None else bias.double()
    exact = nn.functional.linear(x.double(), masked.double(), wide)
    within_budget(y, nn.functional.linear(x, masked, bias), exact)


# the larger the groups the slower the interpreter
PROBLEMS = problems((2, 4, 4, 8, 8, 16), most_tokens=300, most_rows=300, most_k=512)


def check_product_in_parts(problem, parts):
    """With tiles of one part in so many of the rows, the tokens and K."""
    _, x, weight, *_ = problem
    # no fewer than the check of the mask takes, or each of its tokens would draw the mask again
    tokens = max(x.numel(), weight.shape[1] ** 2 // 16) // weight.shape[1]
    sizes = (weight.shape[0], min(tokens, 128), weight.shape[1])
    whole = tiles.Tiles(*(tiles.power_above(-(-size // parts)) for size in sizes))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tiles, "INTERPRETER_TILES", whole)
        check_product(*problem)


@settings(max_examples=6)
@given(PROBLEMS, st.sampled_from([1, 2]))
def test_products_are_within_the_error_budget(problem, parts):
    check_product_in_parts(problem, parts)


@pytest.mark.slow
@settings(max_examples=300)
@given(PROBLEMS, st.sampled_from([1, 2, 3]))
def test_many_products_are_within_the_error_budget(problem, parts):
    check_product_in_parts(problem, parts)


@pytest.fixture(params=["one pass", "transient weight"])
def route(request, monkeypatch):
    most = 0 if request.param == "transient weight" else 1 << 20
    monkeypatch.setattr(masked_gemm, "ONE_PASS_TOKENS", most)
    monkeypatch.setattr(masked_gemm, "one_pass_tokens", lambda *_: most)
    return request.param


@pytest.mark.parametrize(
    ("kind", "pattern"),
    cases(
        itertools.product(KINDS, [*PATTERNS, NMPattern("1:2")]),
        slow=lambda kind, pattern: pattern.m == 16 and kind == "drawn",
    ),
    ids=str,
)
def test_the_mask_is_that_of_the_reference(kind, pattern, monkeypatch, launched):
    monkeypatch.setattr(masked_gemm, "tiles_for", lambda *_: tiles.Tiles(out=16, tokens=64, k=64))
    monkeypatch.setattr(masked_gemm, "one_pass_tokens", lambda *_: tiles.ONE_PASS_TOKENS)
    k = 48 if pattern.m == 16 else 40
    logits, weight = 3 * normal(19, k), torch.ones(19, k, device=KERNEL_DEVICE)
    codes, mask = mask_of(kind, logits, pattern)
    identity = torch.eye(k, device=KERNEL_DEVICE)
    y = product(kind, identity, weight, logits, codes, None, pattern)
    assert_same_bits(y.T != 0, mask)
    assert launched["masked_linear"] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_one_pass_takes_one_block_of_tokens(dtype, launched):
    pattern, one_pass = "8:16", tiles.ONE_PASS_TOKENS
    for tokens in (one_pass, one_pass + 1):
        launched.clear()
        x, weight, scores = normal(tokens, 64, dtype=dtype), normal(16, 64, dtype=dtype), normal(16, 64)
        mask = MaskSource(mk.top_n_mask(scores, pattern), "codes", 8, 16, 1.0)
        (y,) = masked_gemm.masked_linear(x, weight, None, False, mask)
        masked_gemm.masked_linear_input_grad(y, weight, mask)
        inside = tokens <= one_pass
        assert launched["masked_linear"] == launched["masked_linear_input_grad"] == inside
        assert launched["masked_weight"] == 2 * (not inside)
    for product, target in itertools.product(("masked_linear", "masked_linear_input_grad"), tiles.TARGETS):
        of_product = tiles.tiles_of(product, target, dtype.itemsize)
        assert max(tile.tokens for tile in of_product) == one_pass


def log_probs_in_float64(logits, mask, pattern):
    """log p(S) of each group by a fine quadrature over the arrival time of the first dropped weight."""
    z = logits.double().view(-1, pattern.m) / TEMPERATURE
    kept = mask.view(-1, pattern.m)
    rest = torch.logsumexp(z.masked_fill(kept, -torch.inf), dim=1, keepdim=True)
    rates = (z - rest)[kept].view(-1, 1, pattern.n).exp()
    u = torch.arange(-40, 7, 1 / 16, dtype=torch.float64, device=z.device)
    arrived = torch.log(-torch.expm1(-rates * u.exp()[:, None])).sum(2)
    return torch.logsumexp(u - u.exp() + arrived, dim=1) + torch.log(torch.tensor(1 / 16, dtype=torch.float64))


@pytest.mark.parametrize("pattern", INTERPRETED, ids=str)
def test_gradients_to_logits_are_those_of_float64(pattern, route):
    x, weight, logits, _ = operands(pattern, rows=5, k=32, bias=False)
    _, log_prob = mk.masked_linear(x, weight, logits, pattern=pattern, **COUNTER)
    (2 * log_prob).backward()
    wide = logits.detach().double().requires_grad_()
    exact = log_probs_in_float64(wide, mask_of("drawn", logits, pattern)[1], pattern).sum()
    (2 * exact).backward()
    torch.testing.assert_close(log_prob.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("tiles", "pattern", "dtype"), tiled_cases(DTYPES, fast=torch.bfloat16), ids=str)
def test_gradients_are_within_the_error_budget(tiles, pattern, dtype, route, launched, monkeypatch):
    if tiles == "many tiles":
        monkeypatch.setattr(masked_gemm, "tiles_for", small_tiles)
    x, weight, logits, bias = operands(pattern, dtype=dtype)
    upstream = normal(20, 48, seed=4, dtype=dtype)
    y, _ = mk.masked_linear(x, weight, logits, bias, pattern=pattern, log_prob=False, **COUNTER)
    _, mask = mask_of("drawn", logits, pattern)
    y.backward(upstream)
    assert launched["masked_weight"] == (3 if route == "transient weight" else 0)

    def gradients(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
        plain = nn.functional.linear(leaves[0], torch.where(mask, leaves[1], 0), leaves[2])
        (plain * upstream.to(dtype)).sum().backward()
        return [leaf.grad for leaf in leaves]

    for ours, by_torch, exact in zip((x, weight, bias), gradients(dtype), gradients(torch.float64), strict=True):
        assert ours.grad.dtype == dtype
        within_budget(ours.grad, by_torch, exact)
    assert (weight.grad[~mask] == 0).all()
    assert logits.grad is None


def test_gradients_under_a_given_mask(route):
    pattern = NMPattern("2:4")
    x, weight, logits, bias = operands(pattern)
    codes, mask = mask_of("codes", logits, pattern)
    y = product("codes", x, weight, logits, codes, bias, pattern)
    upstream = normal(*y.shape, seed=4)
    y.backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ torch.where(mask, weight, 0))
    torch.testing.assert_close(weight.grad, torch.where(mask, upstream.T @ x, 0))
    torch.testing.assert_close(bias.grad, upstream.sum(0))
    assert logits.grad is None


@pytest.mark.parametrize(
    "pattern", [PATTERNS[1], *(slow(p) for p in (PATTERNS[0], PATTERNS[2], NMPattern("5:8")))], ids=str
)
def test_log_prob_is_the_sum_over_the_groups_whatever_the_blocks_of_tokens(pattern, route, monkeypatch):
    monkeypatch.setattr(masked_gemm, "tiles_for", small_tiles)
    x, weight, logits, _ = operands(pattern, tokens=40, rows=21, k=40, bias=False)
    codes, _ = mask_of("drawn", logits, pattern)
    groups = reference.mask_log_prob(logits.detach().cpu(), codes.cpu(), pattern.n, pattern.m, 1 / TEMPERATURE)
    _, log_prob = mk.masked_linear(x, weight, logits, pattern=pattern, **COUNTER)
    torch.testing.assert_close(log_prob.cpu(), groups.double().sum().float(), rtol=1e-6, atol=0)


VIEWS = {"detach", "view", "reshape", "slice", "as_strided", "set_", "to", "empty", "new_empty"}
# the fixture poisons what is allocated, the interpreter copies what it reads
OF_THE_TEST = {"fill_", "copy_"}
# a step on the CPU is read and checked, one on a GPU is not waited for
OF_THE_CHECKS = {"item", "_local_scalar_dense"} if KERNEL_DEVICE == "cpu" else set()


def test_few_tokens_are_one_launch(launched):
    x, weight, logits, bias = (t.detach() for t in operands(NMPattern("2:4"), tokens=16))
    # numbers would be filled into tensors first
    counter = dict(zip(("seed", "step", "layer", "draw"), torch.arange(4, device=KERNEL_DEVICE), strict=True))
    with torch.profiler.profile() as profile:
        mk.masked_linear(x, weight, logits, bias, pattern="2:4", log_prob=False, **counter)
    assert launched == {"masked_linear": 1}
    by_torch = {event.key.removeprefix("aten::") for event in profile.key_averages() if event.key[:6] == "aten::"}
    assert by_torch <= VIEWS | OF_THE_TEST | OF_THE_CHECKS, by_torch - VIEWS
    mk.masked_linear(x, weight, logits, bias, pattern="2:4", seed=0)
    assert launched == {"masked_linear": 2}


def test_layers_ask_for_no_log_probability(monkeypatch):
    asked, launch_tiles = [], masked_gemm.launch_tiles

    def launch(*args, **constants):
        asked.append(constants["LOG_PROB"])
        launch_tiles(*args, **constants)

    monkeypatch.setattr(masked_gemm, "launch_tiles", launch)
    layer = mk.MaskedLinear.from_linear(nn.Linear(32, 8), "2:4").to(KERNEL_DEVICE)
    layer.train()(normal(3, 32))
    assert asked == [False]


@pytest.mark.parametrize(
    ("kind", "tokens", "kernel"),
    [
        # the table of an H100
        ("drawn", 32, "masked_linear"),
        ("drawn", 33, "masked_weight"),
        ("codes", 128, "masked_linear"),
        ("codes", 129, "masked_weight"),
    ],
)
def test_many_tokens_find_the_mask_once(kind, tokens, kernel, launched):
    pattern = NMPattern("2:4")
    x, weight, logits, bias = (t.detach() for t in operands(pattern, tokens=tokens, rows=8, k=32))
    codes, _ = mask_of(kind, logits, pattern)
    product(kind, x, weight, logits, codes, bias, pattern)
    assert launched == {kernel: 1}


@pytest.mark.parametrize(("tokens", "rows"), [(0, 8), (3, 0), (0, 0)])
def test_empty_products(tokens, rows, route):
    x, weight = normal(tokens, 8).requires_grad_(), normal(rows, 8, seed=1).requires_grad_()
    logits = normal(rows, 8, seed=2).requires_grad_()
    y, log_prob = mk.masked_linear(x, weight, logits, pattern="2:4", seed=0)
    assert y.shape == (tokens, rows)
    (y.sum() + log_prob).backward()
    assert (x.grad == 0).all() and x.grad.shape == x.shape
    assert (weight.grad == 0).all() and weight.grad.shape == weight.shape
    assert logits.grad.shape == logits.shape


def test_only_what_needs_a_gradient_is_kept_for_backward():
    x, weight, logits, _ = operands(NMPattern("2:4"), bias=False)
    y, log_prob = mk.masked_linear(x.detach(), weight.detach(), logits, pattern="2:4", seed=0)
    assert not y.requires_grad and log_prob.requires_grad
    log_prob.backward()
    assert logits.grad.abs().sum() > 0
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mk.masked_linear(x, weight, logits, pattern="2:4", seed=0)
    owned = {t.data_ptr() for t in (x, weight, logits)}
    assert all(t.data_ptr() in owned or t.dim() == 0 for t in saved)


@pytest.mark.parametrize("moved", ["logits", "step"])
def test_a_mask_that_moved_before_backward_is_refused(moved):
    x, weight, logits, _ = operands(NMPattern("2:4"), bias=False)
    step = torch.tensor(3, device=KERNEL_DEVICE)
    y, log_prob = mk.masked_linear(x, weight, logits, pattern="2:4", seed=0, step=step)
    with torch.no_grad():
        {"logits": logits, "step": step}[moved].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_gradient_to_the_bias_alone_keeps_no_mask():
    x, weight, logits, bias = operands(NMPattern("2:4"))
    step = torch.tensor(3, device=KERNEL_DEVICE)
    y, _ = mk.masked_linear(x.detach(), weight.detach(), logits, bias, pattern="2:4", log_prob=False, seed=0, step=step)
    step.add_(1)
    y.sum().backward()
    assert (bias.grad == len(x)).all()


def test_a_second_derivative_is_refused_with_a_clear_error():
    x, weight, logits, _ = operands(NMPattern("2:4"), bias=False)
    y, _ = mk.masked_linear(x, weight, logits, pattern="2:4", seed=0)
    first = torch.autograd.grad(y.square().sum(), [x, weight], create_graph=True)
    assert_same_bits(first, torch.autograd.grad(y.square().sum(), [x, weight], retain_graph=True))
    for gradient in first:
        for leaf in (x, weight):
            # the other path to the leaf would hide a derivative that is cut
            with pytest.raises(RuntimeError, match="expected none for second derivatives"):
                torch.autograd.grad(gradient.sum() + leaf.square().sum(), leaf, retain_graph=True)


def test_autocast_multiplies_in_its_dtype():
    x, weight, logits, bias = operands(NMPattern("2:4"))
    with torch.autocast(KERNEL_DEVICE, torch.bfloat16):
        y, _ = mk.masked_linear(x, weight, logits, bias, pattern="2:4", seed=0)
        expected = nn.functional.linear(x, mk.sample_masked_weight(weight, logits, "2:4", seed=0), bias)
    assert y.dtype == expected.dtype == torch.bfloat16
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    mask = mk.expand_mask(mk.sample_mask(logits.detach(), "2:4", seed=0), "2:4")
    exact = nn.functional.linear(leaves[0], torch.where(mask, leaves[1], 0), leaves[2])
    within_budget(y, expected, exact)
    upstream = normal(*y.shape, seed=4, dtype=torch.bfloat16)
    ours, theirs = (torch.autograd.grad(out, (x, weight, bias), upstream) for out in (y, expected))
    true = torch.autograd.grad(exact, leaves, upstream.double())
    for gradient, by_torch, exact in zip(ours, theirs, true, strict=True):
        assert gradient.dtype == torch.float32
        within_budget(gradient, by_torch, exact)


def test_autocast_keeps_the_weight_itself_for_backward():
    x, weight, logits, bias = operands(NMPattern("2:4"))
    saved = []
    with (
        torch.autocast(KERNEL_DEVICE, torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        mk.masked_linear(x, weight.detach(), logits, bias, pattern="2:4", log_prob=False, seed=0)
    assert {t.data_ptr() for t in saved if t.shape == weight.shape} == {weight.data_ptr(), logits.data_ptr()}


def test_a_backward_inside_of_autocast_runs_in_the_dtype_of_its_forward(route):
    x, weight, logits, bias = operands(NMPattern("2:4"))
    upstream = normal(20, 48, seed=4)
    expected, inside = (
        mk.masked_linear(x, weight, logits, bias, pattern="2:4", log_prob=False, seed=0)[0] for _ in range(2)
    )
    expected = torch.autograd.grad(expected, (x, weight), upstream)
    with torch.autocast(KERNEL_DEVICE, torch.bfloat16):
        gradients = torch.autograd.grad(inside, (x, weight), upstream)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert_same_bits(ours, theirs)


def test_double_precision_is_refused_by_name_under_autocast_too():
    x, weight, logits, _ = operands(NMPattern("2:4"), bias=False)
    with torch.autocast(KERNEL_DEVICE, torch.bfloat16), pytest.raises(TypeError, match="^x: expected .*float64"):
        mk.masked_linear(x.double(), weight, logits, pattern="2:4", seed=0)


def test_meta_tensors_give_shapes():
    x, weight, logits, bias = (t.detach().to("meta") for t in operands(NMPattern("2:4")))
    y, log_prob = mk.masked_linear(x, weight, logits, bias, pattern="2:4", seed=0)
    assert y.is_meta and y.shape == (20, 48) and log_prob.shape == ()


def test_a_tied_weight_gets_the_gradients_of_both_layers():
    x, weight, logits, _ = operands(NMPattern("2:4"), rows=96, bias=False)
    first, second = ({"pattern": "2:4", "log_prob": False, "seed": 0, "layer": i} for i in (0, 1))
    y, _ = mk.masked_linear(mk.masked_linear(x, weight, logits, **first)[0], weight, logits, **second)
    y.sum().backward()
    masks = [mk.expand_mask(mk.sample_mask(logits.detach(), "2:4", seed=0, layer=i), "2:4") for i in (0, 1)]
    plain = weight.detach().requires_grad_()
    nn.functional.linear(nn.functional.linear(x, plain * masks[0]), plain * masks[1]).sum().backward()
    torch.testing.assert_close(weight.grad, plain.grad, rtol=1e-4, atol=1e-4)


def test_weights_of_any_layout():
    x, weight, logits, _ = operands(NMPattern("2:4"), bias=False)
    expected = mk.masked_linear(x, weight, logits, pattern="2:4", log_prob=False, seed=0)[0]
    strided = [t.detach().T.contiguous().T for t in (x, weight, logits)]
    assert not any(t.is_contiguous() for t in strided)
    assert_same_bits(mk.masked_linear(*strided, pattern="2:4", log_prob=False, seed=0)[0], expected)


# The graphs are the same whoever compiles them
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("training", [True, slow(False)], ids=["drawn", "top-N"])
def test_a_compiled_model_is_one_graph_for_all_steps_and_numbers_of_tokens(training, backend):
    counter = CompileCounterWithBackend(backend)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).to(KERNEL_DEVICE)
    mk.convert(model, "2:4", gap=1.0)
    model.train(training)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    outputs, frames = [], 0
    for tokens, seed in [(5, 0), (9, 0), (130, 0), (9, 7)]:
        model[0].counter_state.seed.fill_(seed)
        mk.advance(model)
        x = normal(2, tokens, 16)
        outputs.append(compiled(x))
        # the backend may be called twice for the first graph: dynamo restarts where it meets a float
        frames = frames or counter.frame_count
        torch.testing.assert_close(outputs[-1], model(x))
    assert training != torch.equal(outputs[1], outputs[3])
    assert counter.frame_count == frames
    compiled(normal(1, 1, 16))
    assert counter.frame_count <= frames + 1


def test_a_compiled_training_step_gives_the_eager_gradients():
    x, weight, logits, bias = operands(NMPattern("2:4"))

    def loss(x, weight, logits, bias, step):
        y, log_prob = mk.masked_linear(x, weight, logits, bias, pattern="2:4", seed=0, step=step)
        return y.square().mean() + 0.1 * log_prob

    step = torch.tensor(3, device=KERNEL_DEVICE)
    expected = torch.autograd.grad(loss(x, weight, logits, bias, step), (x, weight, logits, bias))
    value = torch.compile(loss, fullgraph=True)(x, weight, logits, bias, step)
    for ours, eager in zip(torch.autograd.grad(value, (x, weight, logits, bias)), expected, strict=True):
        torch.testing.assert_close(ours, eager)


def test_tiles_hold_the_tokens_and_leave_no_processor_idle(monkeypatch):
    monkeypatch.setattr(tiles, "INTERPRETED", False)

    def tile(tokens, rows, k=4096, product="masked_linear", m=4, dtype=torch.bfloat16):
        chosen = tiles.tiles_for(product, m, dtype, tokens, rows, k, "sm_90")
        return chosen.out, chosen.tokens, chosen.k

    # sums are split, so that as few programs as of large tiles are enough
    assert tile(1, 4096) == tile(16, 4096) == (16, 16, 64)
    assert tile(17, 4096) == (32, 32, 64)
    by_warps = tiles.multiplies_by_warps("sm_90")
    assert tile(128, 8) == tile(128, 4096) == ((32, 128, 64) if by_warps else (128, 128, 32))
    assert tile(64, 8, dtype=torch.float32) == (16, 64, 32)
    # 133 programs of 32 rows keep 132 processors busy
    assert tile(64, 32 * 131, dtype=torch.float32) == (16, 64, 32)
    assert tile(64, 32 * 133, dtype=torch.float32) == (32, 64, 16)
    assert tile(16, 8, product="masked_linear_input_grad") == (32, 16, 32)
    assert tile(16, 8, product="straight_through_step", m=16) == (16, 1, 64)
