"""Straight-through learning: the slope of a loss in the mask, its kernels, and the steps that logits take by it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers.enumerated import KERNEL_DEVICE
from helpers.products import (
    COUNTER,
    DTYPES,
    INTERPRETED,
    PATTERNS,
    mask_of,
    normal,
    problems,
    small_tiles,
    within_budget,
)
from helpers.tiny_llama import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import maskpro_kernels as mk
from maskpro_kernels import ops
from maskpro_kernels.counter import MaskSource
from maskpro_kernels.modules import masked_layers
from maskpro_kernels.ops import reference
from maskpro_kernels.ops.cpu import kernels
from maskpro_kernels.ops.triton import straight_through, tiles
from maskpro_kernels.pattern import NMPattern
from maskpro_kernels.text.perplexity import causal_lm_loss

CURVATURE = 0.25


def source(logits, pattern, kind="drawn"):
    """The source of the mask that ``mask_of`` finds for the same logits."""
    counter = [torch.tensor(COUNTER[name], device=logits.device) for name in ("seed", "step")]
    shard = (COUNTER["layer"], COUNTER["draw"], 0, logits.shape[1] // pattern.m)
    return MaskSource(logits, kind, pattern.n, pattern.m, 1 / COUNTER["temperature"], *counter, *shard)


def slope(grad, x, weight, mask, m, dtype):
    """By the formula, its matrix product and the rest in ``dtype``."""
    grad, x, weight = (tensor.to(dtype) for tensor in (grad, x, weight))
    wide = torch.promote_types(dtype, torch.float32)
    first = (grad.T @ x).to(wide)
    second = torch.outer(grad.to(wide).square().sum(0), x.to(wide).square().sum(0)) * CURVATURE
    weight = weight.to(wide)
    h = weight * first + torch.where(mask, -0.5, 0.5) * weight.square() * second
    h = h.view(len(h), -1, m)
    return (h - h.mean(2, keepdim=True)).view(weight.shape)


def tensors(pattern, tokens=20, rows=24, k=96, dtype=torch.float32, logits=torch.float32):
    k -= k % pattern.m
    grad, x, weight = (normal(*s, seed=i, dtype=dtype) for i, s in enumerate(((tokens, rows), (tokens, k), (rows, k))))
    return grad, x, weight, (3 * normal(rows, k, seed=3)).to(logits)


@settings(max_examples=15)
@given(problems((2, 4, 4, 8, 16), most_tokens=200, most_rows=90, most_k=256), st.sampled_from([1, 2]))
def test_slopes_are_within_the_error_budget(problem, parts):
    _, x, weight, logits, _, pattern = problem
    x = x.reshape(-1, weight.shape[1]).contiguous()
    grad = normal(len(x), len(weight), seed=7, dtype=x.dtype)
    sizes = (len(weight), min(len(x), 128), weight.shape[1])
    whole = tiles.Tiles(*(tiles.power_above(-(-size // parts)) for size in sizes))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tiles, "INTERPRETER_TILES", whole)
        found = ops.straight_through_grad(grad, x, weight, CURVATURE, *source(logits, pattern))
    _, mask = mask_of("drawn", logits, pattern)
    by_torch, exact = (slope(grad, x, weight, mask, pattern.m, dtype) for dtype in (x.dtype, torch.float64))
    assert found.dtype == torch.float32
    within_budget(found, by_torch, exact)


def test_tiles_that_are_taken_in_groups_are_all_taken_once(monkeypatch):
    """Of a group and a part of one, three rows of tiles each."""
    pattern = NMPattern("2:4")
    count = straight_through.SHARING.value + 3
    grad, x, weight, logits = tensors(pattern, rows=40, k=32 * count)
    mask = source(logits, pattern)
    whole = ops.straight_through_grad(grad, x, weight, CURVATURE, *mask)
    monkeypatch.setattr(straight_through, "tiles_for", small_tiles)
    in_tiles = ops.straight_through_grad(grad, x, weight, CURVATURE, *mask)
    torch.testing.assert_close(in_tiles, whole, rtol=1e-4, atol=1e-4)
    rate = torch.tensor(0.5, device=KERNEL_DEVICE)
    mean_square = ops.straight_through_update_(grad, x, weight, CURVATURE, rate, 0.75, *mask)
    torch.testing.assert_close(mean_square, whole.square().mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("m", [2, 4, 8])
def test_a_slope_is_what_dropping_and_keeping_cost(m):
    """Of a loss whose derivatives those are: exactly, were it not for the mean of the group."""
    generator = torch.Generator().manual_seed(0)
    weight, grad, square = torch.randn(3, 5, m, generator=generator).abs().unbind(0)
    kept = torch.rand(5, m, generator=generator) < 0.5

    def loss_change(mask):
        step = (mask.double() - kept.double()) * weight
        return grad * step + square * step.square() / 2

    cost_of_keeping = loss_change(torch.ones(5, m)) - loss_change(torch.zeros(5, m))
    codes = sum(kept[:, i].to(torch.uint8) << i for i in range(m))
    found = reference.group_mask_slope(weight, grad, square, codes)
    expected = cost_of_keeping - cost_of_keeping.mean(1, keepdim=True)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("logits_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", INTERPRETED, ids=str)
@pytest.mark.parametrize("tiles", ["one tile", "many tiles"])
def test_fused_updates_step_by_the_slope(tiles, pattern, dtype, logits_dtype, launched, monkeypatch):
    """Bit for bit as the slope of the same tiles and the eager reference of the step."""
    if tiles == "many tiles":
        monkeypatch.setattr(straight_through, "tiles_for", small_tiles)
    grad, x, weight, logits = tensors(pattern, dtype=dtype, logits=logits_dtype)
    gradient = ops.straight_through_grad(grad, x, weight, CURVATURE, *source(logits, pattern))
    rate = torch.tensor(0.5 / float(gradient.square().mean().sqrt()), device=KERNEL_DEVICE)
    largest, shard = 0.75, (COUNTER["layer"], 0, logits.shape[1] // pattern.m)
    counter = source(logits, pattern)[5:7]
    expected = logits.cpu().clone()
    scalars = (torch.tensor(largest), *(torch.tensor(value) for value in shard))
    on_cpu = [tensor.cpu() for tensor in (gradient, rate, *counter)]
    mean_square = reference.descend_(expected, *on_cpu, *scalars, m=pattern.m)
    fused, apart = logits.clone(), logits.clone()
    found = ops.straight_through_update_(grad, x, weight, CURVATURE, rate, largest, *source(fused, pattern))
    assert launched["straight_through"] == 2
    also = ops.descend_(apart, gradient, rate, largest, pattern.m, *counter, *shard)
    assert launched["descend"] == 1
    assert torch.equal(fused.cpu(), expected) and torch.equal(apart.cpu(), expected)
    assert not torch.equal(fused, logits)
    for value in (found, also):
        torch.testing.assert_close(value.cpu(), mean_square, rtol=1e-5, atol=0)
    moved = (fused.float() - logits.float()).abs()
    # to what lies next to a logit below 16 in magnitude
    assert float(moved.max()) <= largest + 16 * torch.finfo(logits_dtype).eps


@pytest.mark.parametrize(
    ("pattern", "logits_dtype"),
    [
        pytest.param(p, d, marks=[pytest.mark.slow] if str(p) != "2:4" else [], id=f"{p}-{d}")
        for p in PATTERNS
        for d in DTYPES
    ],
)
def test_the_compiled_reference_steps_to_the_same_bits(pattern, logits_dtype):
    grad, x, weight, logits = (t.cpu() for t in tensors(pattern, rows=40, dtype=torch.bfloat16, logits=logits_dtype))
    codes, _ = mask_of("drawn", logits, pattern)
    first = (grad.T @ x).contiguous()
    square = torch.outer(grad.float().square().sum(0), x.float().square().sum(0)) * CURVATURE
    rate, largest = torch.tensor(1e-3), torch.tensor(0.75)
    counter = (torch.tensor(5), torch.tensor(6), largest, *(torch.tensor(v) for v in (3, 2, logits.shape[1])))
    ours, eager = logits.clone(), logits.clone()
    values = [
        module.straight_through_update_(into, weight, first, square, codes, rate, *counter, m=pattern.m)
        for module, into in ((kernels, ours), (reference, eager))
    ]
    assert torch.equal(ours, eager) and not torch.equal(ours, logits)
    torch.testing.assert_close(*values, rtol=1e-5, atol=0)
    slopes = [
        module.straight_through_grad(weight, first, square, codes, m=pattern.m) for module in (kernels, reference)
    ]
    assert torch.equal(*slopes)
    apart = logits.clone()
    kernels.descend_(apart, slopes[0], rate, *counter, m=pattern.m)
    assert torch.equal(apart, eager)


@pytest.mark.parametrize("rate", [math.inf, math.nan, 0.0])
def test_a_rate_that_is_not_finite_moves_nothing(rate):
    pattern = NMPattern("2:4")
    grad, x, weight, logits = tensors(pattern)
    moved = logits.clone()
    ops.straight_through_update_(
        grad, x, weight, 1.0, torch.tensor(rate, device=KERNEL_DEVICE), 1.0, *source(moved, pattern)
    )
    assert torch.equal(moved, logits)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_leave_their_logits(bad):
    pattern = NMPattern("2:4")
    grad, x, weight, logits = tensors(pattern)
    grad[3, 5] = bad
    moved = logits.clone()
    rate = torch.tensor(0.1, device=KERNEL_DEVICE)
    mean_square = ops.straight_through_update_(grad, x, weight, 1.0, rate, 1.0, *source(moved, pattern))
    assert not mean_square.isfinite()
    untouched = torch.zeros(len(logits), dtype=torch.bool)
    untouched[5] = True
    assert torch.equal(moved[untouched], logits[untouched])
    assert moved.isfinite().all() and (moved[~untouched] != logits[~untouched]).any(1).all()


def test_opcheck():
    pattern = NMPattern("2:4")
    grad, x, weight, logits = tensors(pattern, rows=4, k=16)
    rate = torch.tensor(0.1, device=KERNEL_DEVICE)
    mask = source(logits, pattern)
    torch.library.opcheck(torch.ops.maskpro.straight_through_grad.default, (grad, x, weight, 1.0, *mask))
    torch.library.opcheck(torch.ops.maskpro.straight_through_update_.default, (grad, x, weight, 1.0, rate, 1.0, *mask))
    arguments = (logits, torch.randn_like(logits), rate, 1.0, 4, mask.seed, mask.step, 0, 0, 4)
    torch.library.opcheck(torch.ops.maskpro.descend_.default, arguments)


@pytest.mark.parametrize("tokens", [20, 150])
def test_all_gradients_but_the_logits_are_those_of_masked_linear(tokens):
    pattern = NMPattern("2:4")
    grad, x, weight, logits = tensors(pattern, tokens=tokens)
    bias = normal(24, seed=5)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, logits)]
    others = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = mk.straight_through_linear(leaves[0], leaves[1], leaves[3], leaves[2], pattern=pattern, **COUNTER)
    expected, _ = mk.masked_linear(others[0], others[1], logits, others[2], pattern=pattern, log_prob=False, **COUNTER)
    assert torch.equal(y, expected)
    y.backward(grad)
    expected.backward(grad)
    for ours, theirs in zip(leaves, others, strict=False):
        assert torch.equal(ours.grad, theirs.grad)
    found = mk.straight_through_gradient(grad, x, weight, source(logits, pattern))
    assert torch.equal(leaves[3].grad, found)


def test_second_derivatives_are_refused():
    _, x, weight, logits = tensors(NMPattern("2:4"))
    logits.requires_grad_()
    y = mk.straight_through_linear(x, weight, logits, pattern="2:4", **COUNTER)
    (first,) = torch.autograd.grad(y.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_gradients_arrive_for_any_optimizer_also_under_compile():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).to(KERNEL_DEVICE)
    mk.convert(model, "2:4", targets=["0", "2"], gap=3.0)
    for layer in (model[0], model[2]):
        layer.logits_backward = mk.straight_through_gradient
    x = normal(10, 32)
    model(x).square().mean().backward()
    eager = [layer.logits.grad.clone() for layer in (model[0], model[2])]
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().mean().backward()
    assert all(torch.equal(layer.logits.grad, grad) for layer, grad in zip((model[0], model[2]), eager, strict=True))
    before = model[0].logits.detach().clone()
    torch.optim.SGD([layer.logits for layer in (model[0], model[2])], lr=1.0).step()
    assert not torch.equal(model[0].logits, before)


def a_model(gap=15.0):
    model = tiny_model()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    mk.convert(model, "2:4", gap=gap)
    return model


def batches_of_tokens(count=3):
    return list(torch.randint(0, 32, (count, 4, 16), generator=torch.Generator().manual_seed(0)))


def logits_of(model):
    return {name: m.logits.detach().clone() for name, m in model.named_modules() if isinstance(m, mk.MaskedLinear)}


def learn(model, steps=4, loss_fn=causal_lm_loss, batches=None, **options):
    estimator = mk.StraightThrough(lr=1.0, **options)
    trainer = mk.MaskTrainer(model, loss_fn, batches or batches_of_tokens(), estimator, seed=3)
    return trainer, trainer.run(steps, progress=False)


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_steps_are_those_of_the_formula(eager_reference):
    """Against slopes that arrive in logits.grad, a running mean square, and a bounded step by hand."""
    model = a_model()
    twin = copy.deepcopy(model)
    layers = [m for m in twin.modules() if isinstance(m, mk.MaskedLinear)]
    _, records = learn(model, steps=4, curvature=0.5, max_update=2.0, decay=0.75)
    layers[0].counter_state.seed.fill_(3)
    running = [None] * len(layers)
    for layer in layers:
        layer.train()
        layer.logits_backward = lambda *args: mk.straight_through_gradient(*args, curvature=0.5)
    for step, batch in enumerate((batches_of_tokens() * 2)[:4]):
        loss = causal_lm_loss(twin, batch)
        assert records[step].loss == pytest.approx(loss.item(), rel=1e-6)
        loss.backward()
        for i, layer in enumerate(layers):
            square = layer.logits.grad.square().mean()
            rms = (square if running[i] is None else running[i]).sqrt()
            running[i] = square if running[i] is None else 0.75 * running[i] + 0.25 * square
            with torch.no_grad():
                layer.logits -= (layer.logits.grad / rms).clamp(-2, 2)
            layer.logits.grad = None
        mk.advance(twin)
    for ours, theirs in zip(logits_of(model).values(), logits_of(twin).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_few_batches_do_not_change_a_mask(eager_reference):
    """Whatever their slopes: a bound of 2 takes at least 4 steps over a gap of 15."""
    model = a_model(gap=15.0)

    def masks():
        return [mk.top_n_mask(logits, "2:4") for logits in logits_of(model).values()]

    before = masks()
    trainer = mk.MaskTrainer(model, causal_lm_loss, batches_of_tokens(), mk.StraightThrough(lr=1e6), seed=3)
    trainer.run(3, progress=False)
    assert all(map(torch.equal, masks(), before))
    trainer.run(7, progress=False)
    assert not all(map(torch.equal, masks(), before))


def test_the_learning_rate_falls_to_nothing(eager_reference):
    estimator = mk.StraightThrough(lr=0.5, steps=4)
    assert [estimator.lr_at(step) for step in range(6)] == [0.5, 0.375, 0.25, 0.125, 0.0, 0.0]
    assert mk.StraightThrough(lr=0.5).lr_at(1000) == 0.5


class Twice(nn.Module):
    """A layer that is used twice, and one that is used once."""

    def __init__(self):
        super().__init__()
        self.shared, self.own = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.shared(torch.relu(self.own(torch.relu(self.shared(x)))))


def test_a_layer_that_is_used_twice_moves_once_by_the_sum(eager_reference):
    torch.manual_seed(0)
    model = Twice()
    mk.convert(model, "2:4", gap=3.0)
    before = logits_of(model)
    x = torch.randn(30, 16)
    twin = copy.deepcopy(model)
    twin.train()
    twin.shared.counter_state.seed.fill_(3)
    for layer in (twin.shared, twin.own):
        layer.logits_backward = mk.straight_through_gradient
    twin(x).square().mean().backward()
    learn(model, 1, lambda model, x: model(x).square().mean(), [x], max_update=5.0)
    for name, layer in (("shared", twin.shared), ("own", twin.own)):
        grad = layer.logits.grad
        expected = before[name] - (grad / grad.square().mean().sqrt()).clamp(-5, 5)
        torch.testing.assert_close(logits_of(model)[name], expected, rtol=1e-5, atol=1e-5)
    assert_detached(model)


def test_checkpointed_activations_give_the_same_bits(eager_reference):
    plain, checkpointed = a_model(), a_model()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    runs = []
    handle = checkpointed.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    _, first = learn(plain)
    _, second = learn(checkpointed)
    handle.remove()
    assert len(runs) == 2 * len(second), "nothing was computed anew"
    assert [record.loss for record in first] == [record.loss for record in second]
    assert same(logits_of(plain), logits_of(checkpointed))
    assert not any(module.training for module in checkpointed.modules() if not isinstance(module, mk.MaskedLinear))


class TwoLayers(nn.Module):
    """Not nn.Sequential, whose loop is no graph where a call in it is none."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 64, bias=False), nn.Linear(64, 8, bias=False)
        for i, layer in enumerate((self.first, self.second)):
            layer.weight = nn.Parameter(normal(*layer.weight.shape, seed=i), requires_grad=False)

    def forward(self, x):
        return self.second(nn.functional.silu(self.first(x)))


def compiled_two_layers():
    model = TwoLayers()
    mk.convert(model, "2:4", targets=["first", "second"], gap=2.0)
    return model, lambda model, x: model(x).square().mean(), [normal(16, 32)]


@pytest.mark.parametrize(
    ("problem", "estimator", "graphs"),
    [
        # silu, between the layers
        (compiled_two_layers, mk.StraightThrough(lr=1.0, steps=4), 1),
        # the whole under drawn masks, and under those of the start
        (compiled_two_layers, mk.Reinforce(), 2),
        (lambda: (a_model(), causal_lm_loss, batches_of_tokens()), mk.StraightThrough(lr=1.0, steps=4), None),
    ],
    ids=["slope", "scalar", "language model"],
)
def test_a_compiled_model_learns_as_an_eager_one(problem, estimator, graphs, eager_reference):
    """No graph anew for another step, and afterwards the graphs of the model as it is.

    The same bits where the backend leaves the operations as they are; it rewrites some of a language model's.
    """
    learned, losses, outputs = [], [], []
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    for compiling in (False, True):
        model, loss_fn, batches = problem()
        initial = logits_of(model)
        run = torch.compile(model, backend=counter) if compiling else model
        trainer = mk.MaskTrainer(run, loss_fn, batches, copy.deepcopy(estimator), seed=0)
        losses.append([record.loss for record in trainer.run(2, progress=False)])
        first = counter.frame_count
        losses[-1] += [record.loss for record in trainer.run(2, progress=False)]
        learned.append(logits_of(model))
        last = counter.frame_count
        outputs.append(loss_fn(run.eval(), batches[0]).item())
    assert last == first > 0 and (graphs is None or first == graphs)
    assert not same(learned[0], initial)
    if graphs is not None:
        assert losses[0] == losses[1] and same(*learned) and outputs[0] == outputs[1]
    torch.testing.assert_close((losses[1], outputs[1]), (losses[0], outputs[0]), rtol=1e-5, atol=0)
    torch.testing.assert_close(learned[1], learned[0], rtol=1e-3, atol=1e-3)


def assert_detached(model):
    """Layers as before a step: nothing of it is kept in them."""
    for layer in masked_layers(model).values():
        assert layer.logits_backward is None and layer.logits.grad is None
        assert not layer._forward_hooks and "forward" not in vars(layer)


def test_reinforce_leaves_checkpointed_blocks_in_eval_mode(eager_reference):
    model = a_model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    modes = []
    model.model.layers[0].register_forward_pre_hook(lambda module, _: modes.append(module.training))
    mk.MaskTrainer(model, causal_lm_loss, batches_of_tokens(), mk.Reinforce(), seed=0).run(2, progress=False)
    assert modes and not any(modes)


def test_only_logits_learn(eager_reference):
    model = tiny_model()
    mk.convert(model, "2:4", gap=15.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "logits" not in name}
    learn(model, 2)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        if name in before:
            assert torch.equal(parameter, before[name])


class Broken(torch.autograd.Function):
    """The identity, whose gradient is ``value``."""

    @staticmethod
    def forward(ctx, x, value):
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(grad, ctx.value), None


def squares_of(trainer):
    return [descent.mean_square for descent in trainer.estimator._updaters.values()]


def test_a_gradient_that_is_not_finite_is_told_and_spoils_nothing(eager_reference):
    model = a_model()
    trainer, _ = learn(model, 1)
    before, squares, step = (
        logits_of(model),
        squares_of(trainer),
        int(next(iter(trainer.layers.values())).counter_state.step),
    )
    trainer.loss_fn = lambda model, batch: Broken.apply(causal_lm_loss(model, batch), math.nan)
    with pytest.raises(FloatingPointError, match="gradients of step 1: .*q_proj"):
        trainer.step()
    assert same(before, logits_of(model)) and squares_of(trainer) == squares
    # the draw is spent: in other layers logits may have learned from it
    assert trainer.steps_done == 2 and int(next(iter(trainer.layers.values())).counter_state.step) == step + 1
    assert_detached(model)
    assert all(d.slopes is None and d.latest is None for d in trainer.estimator._updaters.values())
    trainer.loss_fn = causal_lm_loss
    trainer.step()
    assert not same(before, logits_of(model))


def test_a_run_bears_gradients_that_are_not_finite(eager_reference, tmp_path):
    """Each of as many as it may is told; one more ends the run, and is not taken again where it is resumed."""

    def a_trainer():
        arguments = {"seed": 3, "output_dir": tmp_path, "max_skipped": 1}
        return mk.MaskTrainer(a_model(), causal_lm_loss, batches_of_tokens(), mk.StraightThrough(), **arguments)

    trainer = a_trainer()
    trainer.step()
    before, squares = logits_of(trainer.model), squares_of(trainer)
    trainer.loss_fn = lambda model, batch: Broken.apply(causal_lm_loss(model, batch), math.nan)
    with pytest.warns(UserWarning, match="^gradients of step 1: .*q_proj.*; the logits of their weights are as before"):
        assert math.isfinite(trainer.step().loss)
    with pytest.raises(FloatingPointError, match="gradients of step 2: .*q_proj.*, after 1 others in a row"):
        trainer.run(1, progress=False)
    assert same(before, logits_of(trainer.model)) and squares_of(trainer) == squares
    trainer.close()
    again = a_trainer()
    assert again.resume() == 3
    assert same(before, logits_of(again.model)) and squares_of(again) == squares
    again.step()
    assert not same(before, logits_of(again.model))


def two_layers(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    mk.convert(model, "2:4", gap=3.0, **options)
    return model, torch.randn(30, 16)


def test_a_layer_learns_though_another_ones_gradient_is_not_finite(eager_reference):
    model, x = two_layers()
    before = logits_of(model)

    def loss(model, x):
        hidden = Broken.apply(model[0](x), math.nan)
        return model[2](torch.relu(hidden)).square().mean()

    with pytest.raises(FloatingPointError, match=r"got others in \['0'\]"):
        learn(model, 1, loss, [x])
    after = logits_of(model)
    assert torch.equal(before["0"], after["0"]) and not torch.equal(before["2"], after["2"])


@pytest.mark.parametrize("first", [0.0, math.nan, math.inf])
def test_the_first_usable_slope_sets_the_scale(first, eager_reference):
    """Whatever came before it, the step after it is that of a fresh start."""
    model, x = two_layers()
    twin = copy.deepcopy(model)

    def loss(model, x):
        return model(x).square().mean()

    trainer = mk.MaskTrainer(model, loss, [x], mk.StraightThrough(lr=1.0), seed=3)
    trainer.loss_fn = lambda model, x: Broken.apply(loss(model, x), first)
    if math.isfinite(first):
        trainer.step()
    else:
        with pytest.raises(FloatingPointError):
            trainer.step()
    assert same(logits_of(model), logits_of(twin)) and squares_of(trainer) == [None, None]
    trainer.loss_fn = loss
    trainer.step()
    fresh = mk.MaskTrainer(twin, loss, [x], mk.StraightThrough(lr=1.0), seed=3)
    # the draw of the second step
    fresh.steps_done = 1
    fresh.step()
    assert same(logits_of(model), logits_of(twin)) and squares_of(trainer) == squares_of(fresh)


def test_the_parameter_moves_though_autograd_keeps_a_copy(eager_reference):
    model, x = two_layers()
    twin = copy.deepcopy(model)

    def loss(model, x):
        return model(x).square().mean()

    def copied(model, x):
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
            return loss(model, x)

    learn(model, 2, loss, [x])
    learn(twin, 2, copied, [x])
    assert same(logits_of(model), logits_of(twin))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_slopes_of_16_bit_logits_are_summed_in_float32(dtype, eager_reference):
    """Slopes below the smallest float16 move the logits of a layer that is used twice, and as far as large ones."""
    moved = []
    for scale in (1.0, 1e-6):
        torch.manual_seed(0)
        model = Twice()
        mk.convert(model, "2:4", gap=3.0, logits_dtype=dtype)
        before = logits_of(model)
        x = torch.randn(30, 16)
        learn(model, 1, lambda model, x, scale=scale: scale * model(x).square().mean(), [x], curvature=0.0)
        moved.append({name: (tensor.float() - before[name].float()) for name, tensor in logits_of(model).items()})
    for name in moved[0]:
        assert float(moved[0][name].abs().mean()) > 0.1
        torch.testing.assert_close(moved[0][name], moved[1][name], atol=0.05, rtol=0.01)


def test_losses_that_gradients_do_not_take_to_the_masks(eager_reference):
    model, x = two_layers()
    before = logits_of(model)

    def reentrant(model, x):
        x = x.clone().requires_grad_()
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=True).square().mean()

    with pytest.raises(ValueError, match="loss_fn: .*use_reentrant=False"):
        learn(model, 1, reentrant, [x])
    assert same(before, logits_of(model))
    assert_detached(model)

    def regularised(model, x):
        return model(x).square().mean() + 1e-3 * mk.log_prob(model)

    with pytest.raises(ValueError, match=r"loss_fn: .*by their masks alone, not so \['0', '2'\]"):
        learn(model, 1, regularised, [x])
    assert_detached(model)
    model[2].logits.requires_grad_(False)
    with pytest.raises(ValueError, match="model: expected logits that require a gradient, got frozen ones in 2"):
        learn(model, 1, regularised, [x])
    model[2].logits.requires_grad_(True).data = model[2].logits.data.t().contiguous().t()
    with pytest.raises(ValueError, match="model: expected contiguous logits, got .* in 2"):
        learn(model, 1, regularised, [x])


class InParts(torch.autograd.Function):
    """A layer whose use the forward hides from its hooks, and which backward comes to in two parts."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        ctx.save_for_backward(x)
        return layer.forward(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            for part, grad_of_part in zip(x.chunk(2), grad.chunk(2), strict=True):
                ctx.layer.forward(part.detach()).backward(grad_of_part)
        return torch.zeros_like(x), None


def test_a_layer_that_is_come_to_again_after_it_has_moved_is_told(eager_reference):
    model, x = two_layers()

    def loss(model, x):
        return model[2](InParts.apply(torch.relu(model[0](x)), model[2])[:, :1].expand(-1, 16)).square().mean()

    with pytest.raises(ValueError, match="loss_fn: .* comes again after the layer has moved"):
        learn(model, 1, loss, [x])
    assert_detached(model)


def test_losses_that_cannot_be_learned_from(eager_reference):
    model = a_model()
    before = logits_of(model)
    for loss_fn, error, message in (
        (lambda model, batch: causal_lm_loss(model, batch).item(), ValueError, "loss_fn: expected a loss with a grad"),
        (
            lambda model, batch: causal_lm_loss(model, batch).detach(),
            ValueError,
            "loss_fn: expected a loss with a grad",
        ),
        (
            lambda model, batch: causal_lm_loss(model, batch) * torch.ones(2),
            ValueError,
            r"loss_fn: expected a 0-dim tensor or a number, got a tensor \[2\]",
        ),
        (lambda model, batch: causal_lm_loss(model, batch) * torch.inf, FloatingPointError, "loss of step 0"),
        (lambda model, batch: 1 / (causal_lm_loss(model, batch).item() * 0), ZeroDivisionError, "division"),
    ):
        with pytest.raises(error, match=message):
            learn(model, 1, loss_fn)
        assert same(before, logits_of(model))
        assert_detached(model)


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"lr": 0.0}, ValueError, "lr"),
        ({"lr": math.inf}, ValueError, "lr"),
        ({"lr": "1"}, TypeError, "lr"),
        ({"steps": 0}, ValueError, "steps"),
        ({"steps": 1.5}, ValueError, "steps"),
        ({"curvature": -1.0}, ValueError, "curvature"),
        ({"max_update": 0.0}, ValueError, "max_update"),
        ({"decay": 1.0}, ValueError, "decay"),
        ({"decay": None}, TypeError, "decay"),
    ],
)
def test_bad_arguments(arguments, error, name):
    with pytest.raises(error, match=f"{name}: expected"):
        mk.StraightThrough(**arguments)


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "4:8", "8:16"])
def test_a_planted_mask_is_found(pattern, eager_reference):
    """A linear teacher under a hidden mask; the student starts from another one."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 64, generator=generator).sign()
    planted, start = (mk.top_n_mask(torch.rand(8, 64, generator=generator), pattern) for _ in range(2))
    teacher = weight * mk.expand_mask(planted, pattern)
    model = nn.Sequential(nn.Linear(64, 8, bias=False))
    model[0].weight = nn.Parameter(weight)
    mk.convert(model, pattern, init={"0": start}, gap=3.0)
    batches = [(x, x @ teacher.T) for x in torch.randn(8, 256, 64, generator=generator)]

    # of Gaussian noise as large as the start's error: a likelihood, whose curvature is its Fisher information
    variance = float((batches[0][0] @ (weight * mk.expand_mask(start, pattern)).T - batches[0][1]).var())

    def loss(model, batch):
        return nn.functional.mse_loss(model(batch[0]), batch[1]) / (2 * variance)

    def found():
        return float((mk.top_n_mask(model[0].logits.detach(), pattern) == planted).float().mean())

    assert found() < 0.5
    mk.MaskTrainer(model, loss, batches, mk.StraightThrough(lr=0.3, steps=100), seed=0).run(100, progress=False)
    assert found() == 1.0
