"""The steps that logits take by the slope, whatever the model does in between."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers.bits import assert_same_bits, first_difference
from helpers.cases import slow
from helpers.products import normal
from helpers.straight_through import (
    Broken,
    Twice,
    assert_detached,
    batches_of_tokens,
    learn_straight_through,
    logits_by_name,
    masked_llama,
    squares_of,
    two_masked_layers,
)
from helpers.tiny_llama import tiny_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import maskpro_kernels as mk
from maskpro_kernels.modules import masked_layers
from maskpro_kernels.text.perplexity import causal_lm_loss


def test_steps_are_those_of_the_formula(eager_reference):
    """Against slopes that arrive in logits.grad, a running mean square, and a bounded step by hand."""
    model = masked_llama()
    twin = copy.deepcopy(model)
    layers = [m for m in twin.modules() if isinstance(m, mk.MaskedLinear)]
    _, records = learn_straight_through(model, steps=4, curvature=0.5, max_update=2.0, decay=0.75)
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
    for ours, theirs in zip(logits_by_name(model).values(), logits_by_name(twin).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_learning_rate_falls_to_nothing(eager_reference):
    estimator = mk.StraightThrough(lr=0.5, steps=4)
    assert [estimator.lr_at(step) for step in range(6)] == [0.5, 0.375, 0.25, 0.125, 0.0, 0.0]
    assert mk.StraightThrough(lr=0.5).lr_at(1000) == 0.5


def test_a_layer_that_is_used_twice_moves_once_by_the_sum(eager_reference):
    torch.manual_seed(0)
    model = Twice()
    mk.convert(model, "2:4", gap=3.0)
    before = logits_by_name(model)
    x = torch.randn(30, 16)
    twin = copy.deepcopy(model)
    twin.train()
    twin.shared.counter_state.seed.fill_(3)
    for layer in (twin.shared, twin.own):
        layer.logits_backward = mk.straight_through_gradient
    twin(x).square().mean().backward()
    learn_straight_through(model, 1, lambda model, x: model(x).square().mean(), [x], max_update=5.0)
    for name, layer in (("shared", twin.shared), ("own", twin.own)):
        grad = layer.logits.grad
        expected = before[name] - (grad / grad.square().mean().sqrt()).clamp(-5, 5)
        torch.testing.assert_close(logits_by_name(model)[name], expected, rtol=1e-5, atol=1e-5)
    assert_detached(model)


@pytest.mark.parametrize("train_weights", [pytest.param(None, marks=pytest.mark.slow), 1e-3])
def test_checkpointed_activations_give_the_same_bits(train_weights, eager_reference):
    plain, checkpointed = masked_llama(), masked_llama()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    runs = []
    handle = checkpointed.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    _, first = learn_straight_through(plain, train_weights=train_weights)
    _, second = learn_straight_through(checkpointed, train_weights=train_weights)
    handle.remove()
    assert len(runs) == 2 * len(second), "nothing was computed again"
    assert [record.loss for record in first] == [record.loss for record in second]
    assert_same_bits(logits_by_name(plain), logits_by_name(checkpointed))
    for ours, theirs in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert_same_bits(ours.detach(), theirs.detach())
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


def logits_and_weights(model):
    weights = {f"{name}.weight": layer.weight.detach().clone() for name, layer in masked_layers(model).items()}
    return logits_by_name(model) | weights


def compiled_two_layers():
    model = TwoLayers()
    mk.convert(model, "2:4", targets=["first", "second"], gap=2.0)
    return model, lambda model, x: model(x).square().mean(), [normal(16, 32)]


@pytest.mark.parametrize(
    ("problem", "estimator", "graphs"),
    [
        # silu, between the layers
        slow(compiled_two_layers, mk.StraightThrough(lr=1.0, steps=4), 1),
        (compiled_two_layers, mk.StraightThrough(lr=1.0, steps=4, train_weights=0.01, masks_until=1.0), 1),
        (compiled_two_layers, mk.StraightThrough(steps=4, train_weights=0.01), 1),
        # the whole under drawn masks, and under those of the start
        (compiled_two_layers, mk.Reinforce(), 2),
        pytest.param(
            lambda: (masked_llama(), causal_lm_loss, batches_of_tokens()),
            mk.StraightThrough(lr=1.0, steps=4),
            None,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["slope", "slope and weights", "weights", "scalar", "language model"],
)
def test_a_compiled_model_learns_as_an_eager_one(problem, estimator, graphs, eager_reference):
    """No graph again for another step, and afterwards the graphs of the current model.

    Equal bits if the backend does not rewrite the operations; it rewrites some of a language model's.
    """
    learned, losses, outputs = [], [], []
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    for compiling in (False, True):
        model, loss_fn, batches = problem()
        initial = logits_and_weights(model)
        run = torch.compile(model, backend=counter) if compiling else model
        trainer = mk.MaskTrainer(run, loss_fn, batches, copy.deepcopy(estimator), seed=0)
        losses.append([record.loss for record in trainer.run(2, progress=False)])
        first = counter.frame_count
        losses[-1] += [record.loss for record in trainer.run(2, progress=False)]
        learned.append(logits_and_weights(model))
        last = counter.frame_count
        outputs.append(loss_fn(run.eval(), batches[0]).item())
    assert last == first > 0 and (graphs is None or first == graphs)
    assert first_difference(learned[0], initial)
    if graphs is not None:
        assert losses[0] == losses[1] and outputs[0] == outputs[1]
        assert_same_bits(*learned)
    torch.testing.assert_close((losses[1], outputs[1]), (losses[0], outputs[0]), rtol=1e-5, atol=0)
    torch.testing.assert_close(learned[1], learned[0], rtol=1e-3, atol=1e-3)


def test_reinforce_leaves_checkpointed_blocks_in_eval_mode(eager_reference):
    model = masked_llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    modes = []
    model.model.layers[0].register_forward_pre_hook(lambda module, _: modes.append(module.training))
    mk.MaskTrainer(model, causal_lm_loss, batches_of_tokens(), mk.Reinforce(), seed=0).run(2, progress=False)
    assert modes and not any(modes)


def test_only_logits_learn(eager_reference):
    model = tiny_model()
    mk.convert(model, "2:4", gap=15.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "logits" not in name}
    learn_straight_through(model, 2)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        if name in before:
            assert_same_bits(parameter, before[name])


@pytest.mark.parametrize("first", [0.0, math.nan, math.inf])
def test_the_first_usable_slope_sets_the_scale(first, eager_reference):
    """Whatever came before it, the step after it is that of a fresh start."""
    model, x = two_masked_layers()
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
    assert_same_bits(logits_by_name(model), logits_by_name(twin))
    assert squares_of(trainer) == [None, None]
    trainer.loss_fn = loss
    trainer.step()
    fresh = mk.MaskTrainer(twin, loss, [x], mk.StraightThrough(lr=1.0), seed=3)
    # the draw of the second step
    fresh.steps_done = 1
    fresh.step()
    assert_same_bits(logits_by_name(model), logits_by_name(twin))
    assert squares_of(trainer) == squares_of(fresh)


def test_the_parameter_moves_though_autograd_keeps_a_copy(eager_reference):
    model, x = two_masked_layers()
    twin = copy.deepcopy(model)

    def loss(model, x):
        return model(x).square().mean()

    def copied(model, x):
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
            return loss(model, x)

    learn_straight_through(model, 2, loss, [x])
    learn_straight_through(twin, 2, copied, [x])
    assert_same_bits(logits_by_name(model), logits_by_name(twin))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_slopes_of_16_bit_logits_are_summed_in_float32(dtype, eager_reference):
    """Slopes below the smallest float16 move the logits of a layer that is used twice, and as far as large ones."""
    moved = []
    for scale in (1.0, 1e-6):
        torch.manual_seed(0)
        model = Twice()
        mk.convert(model, "2:4", gap=3.0, logits_dtype=dtype)
        before = logits_by_name(model)
        x = torch.randn(30, 16)
        learn_straight_through(
            model, 1, lambda model, x, scale=scale: scale * model(x).square().mean(), [x], curvature=0.0
        )
        moved.append({name: (tensor.float() - before[name].float()) for name, tensor in logits_by_name(model).items()})
    for name in moved[0]:
        assert float(moved[0][name].abs().mean()) > 0.1
        torch.testing.assert_close(moved[0][name], moved[1][name], atol=0.05, rtol=0.01)


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"lr": 0.0}, ValueError, "lr"),
        ({"lr": "1"}, TypeError, "lr"),
        ({"steps": 0}, ValueError, "steps"),
        ({"curvature": -1.0}, ValueError, "curvature"),
        ({"max_update": 0.0}, ValueError, "max_update"),
        ({"decay": 1.0}, ValueError, "decay"),
        ({"train_weights": 0.0}, ValueError, "train_weights"),
        ({"train_weights": 0.1, "weight_decay": -1.0}, ValueError, "weight_decay"),
        ({"weight_decay": 0.1}, ValueError, "weight_decay"),
    ],
)
def test_bad_arguments(arguments, error, name):
    with pytest.raises(error, match=f"{name}: expected"):
        mk.StraightThrough(**arguments)


@pytest.mark.parametrize("pattern", [slow("1:4"), "2:4", "4:8", slow("8:16")])
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
