"""Straight-through as an optimizer of torch: the steps of the trainer, in loops that call backward themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.cases import slow
from helpers.in_ranks import all_in_ranks
from helpers.small_trainer import a_model, logits_of, loss_fn, some_batches
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.modules import masked_layers

pytestmark = pytest.mark.usefixtures("eager_reference")

SEED = 11


def optimizer_of(model: nn.Module, **arguments) -> mk.MaskOptimizer:
    model.train()
    # as a trainer has it
    model[1].eval()
    masked_layers(model)["0"].counter_state.seed.fill_(SEED)
    return mk.MaskOptimizer(model, **arguments)


def steps(model: nn.Module, optimizer: mk.MaskOptimizer, batches, scale: float = 1.0, accumulate: int = 1) -> None:
    for first in range(0, len(batches), accumulate):
        for batch in batches[first : first + accumulate]:
            (loss_fn(model, batch) * scale).backward()
        optimizer.step()
        optimizer.zero_grad()


def by_the_trainer(batches, accumulate: int = 1) -> list[torch.Tensor]:
    model = a_model()
    how = mk.StraightThrough(lr=0.3)
    trainer = mk.MaskTrainer(model, loss_fn, batches, how, seed=SEED, accumulate=accumulate)
    trainer.run(len(batches) // accumulate, progress=False)
    return logits_of(model)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_are_those_of_the_trainer(accumulate):
    batches, model = some_batches(6), a_model()
    steps(model, optimizer_of(model, loss_scale=1 / accumulate), batches, 1 / accumulate, accumulate)
    torch.testing.assert_close(logits_of(model), by_the_trainer(batches, accumulate), rtol=1e-5, atol=1e-5)
    assert not torch.equal(logits_of(model)[0], logits_of(a_model())[0])


def test_a_scaled_loss_gives_the_same_steps():
    """Without its scale the curvature would count as much more."""
    batches, models = some_batches(), [a_model(), a_model(), a_model()]
    scales = (1.0, 1.0), (64.0, 64.0), (64.0, 1.0)
    for model, (scale, reported) in zip(models, scales, strict=True):
        steps(model, optimizer_of(model, loss_scale=reported), batches, scale)
    plain, right, wrong = map(logits_of, models)
    torch.testing.assert_close(right, plain, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(wrong[0], plain[0], rtol=1e-2)


def test_a_gradient_scaler_skips_what_is_not_finite():
    model, batches = a_model(), some_batches()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = optimizer_of(model, loss_scale=scaler.get_scale)
    steps_before = int(masked_layers(model)["0"].counter_state.step)
    for index, batch in enumerate([batches[0], batches[1] * torch.inf, *batches[1:]]):
        scaler.scale(loss_fn(model, batch)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (256.0 if index == 0 else 128.0)
        optimizer.zero_grad()
    assert int(masked_layers(model)["0"].counter_state.step) == steps_before + 3
    torch.testing.assert_close(logits_of(model), by_the_trainer(batches), rtol=1e-5, atol=1e-5)


def test_slopes_that_are_not_finite_leave_their_logits_and_are_reported():
    model, (batch, *_) = a_model(), some_batches()
    optimizer = optimizer_of(model)
    before = logits_of(model)
    loss_fn(model, batch).backward()
    model[0].logits.grad.fill_(torch.nan)
    with pytest.warns(UserWarning, match="slopes are not finite in 0: their logits stay"):
        optimizer.step()
    assert_same_bits(logits_of(model)[0], before[0])
    assert not torch.equal(logits_of(model)[1], before[1])


def test_a_schedule_and_a_closure_are_those_of_any_optimizer():
    model, (batch, *_) = a_model(), some_batches()
    optimizer = optimizer_of(model, lr=0.4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)

    def closure():
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    schedule.step()
    before = logits_of(model)
    optimizer.step(closure)
    assert_same_bits(logits_of(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_continues_from_its_state(dtype):
    def new():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.5), nn.Linear(8, 4))
        mk.convert(model, "2:4", gap=1.0, logits_dtype=dtype)
        return model, optimizer_of(model)

    batches = some_batches(6)
    whole, optimizer = new()
    steps(whole, optimizer, batches)
    model, first = new()
    steps(model, first, batches[:3])
    saved = copy.deepcopy((model.state_dict(), first.state_dict()))
    model, second = new()
    model.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    steps(model, second, batches[3:])
    assert_same_bits(logits_of(model), logits_of(whole))
    assert second.moved() == optimizer.moved() > 0
    assert second.flip_rate() == optimizer.flip_rate() > 0


def test_what_gives_no_slopes_is_refused():
    optimizer = optimizer_of(model := a_model())
    with pytest.raises(ValueError, match="model: expected logits with a gradient, got none"):
        optimizer.step()
    with pytest.raises(ValueError, match="model: expected a model with MaskedLinear layers"):
        mk.MaskOptimizer(nn.Linear(4, 4))
    for bad in ({"lr": -1.0}, {"decay": 1.0}, {"loss_scale": 0.0}, {"max_update": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}: expected a float"):
            mk.MaskOptimizer(a_model(), **bad)
    optimizer.detach()
    assert all(layer.logits_backward is None for layer in masked_layers(model).values())


def on_a_rank(rank: int, ranks: int) -> list[torch.Tensor]:
    model = a_model()
    optimizer = optimizer_of(model)
    of_all = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    batches = some_batches(6)
    for step in range(3):
        own = batches[2 * step : 2 * step + 2] if ranks == 1 else [batches[2 * step + rank]]
        if ranks == 1:
            optimizer.slopes.loss_scale = 1 / len(own)
        for batch in own:
            (loss_fn(of_all, batch) / len(own)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return logits_of(model)


def test_data_parallel_ranks_take_the_steps_of_one_process():
    first, second = all_in_ranks(2, on_a_rank, ranks=2)
    assert_same_bits(first, second)
    (alone,) = all_in_ranks(1, on_a_rank, ranks=1)
    torch.testing.assert_close(first, alone, rtol=1e-5, atol=1e-5)


def test_a_gradient_that_leaves_masks_alone_is_reported():
    model, (batch, *_) = a_model(), some_batches()
    model.train()
    with pytest.warns(UserWarning, match="MaskedLinear: this backward gives the logits no gradient"):
        loss_fn(model, batch.requires_grad_()).backward()


@pytest.mark.filterwarnings("error:MaskedLinear")
def test_who_learns_otherwise_is_not_reported():
    model, (batch, *_) = a_model(), some_batches()
    batch.requires_grad_()
    loss_fn(model.eval(), batch).backward()
    model.train()
    (loss_fn(model, batch).item() * mk.log_prob(model)).backward()
    steps(model, optimizer_of(model), [batch])
    for layer in masked_layers(model).values():
        layer.logits_backward = None
        layer.logits.requires_grad_(False)
    loss_fn(model, batch).backward()


@pytest.mark.parametrize("loss_scale", [0.5, slow(lambda: 0.5)])
def test_a_model_compiled_for_dynamic_sizes_learns_the_same_bits(loss_scale):
    learned = []
    for compiled in (False, True):
        model = a_model()
        optimizer = optimizer_of(model, loss_scale=loss_scale)
        torch._dynamo.reset()
        run = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True) if compiled else model
        steps(run, optimizer, [batch[: 3 + place] for place, batch in enumerate(some_batches(2))])
        learned.append(logits_of(model))
    assert_same_bits(*learned)


@pytest.mark.parametrize("kind", ["number", "tensor", "function"])
def test_tokens_are_those_of_each_step_in_a_compiled_model(kind):
    """A number and a tensor stay in one graph; a function runs outside of graphs."""
    learned = []
    for compiled in (False, True):
        model, count = a_model(), torch.tensor(40.0)
        tokens = {"number": 40.0, "tensor": count, "function": lambda count=count: count.item()}[kind]
        optimizer = optimizer_of(model, tokens=tokens)
        torch._dynamo.reset()
        run = torch.compile(model, backend="aot_eager", fullgraph=kind != "function") if compiled else model
        for number, batch in zip((4.0, 400.0), some_batches(2), strict=True):
            count.fill_(number)
            steps(run, optimizer, [batch])
        learned.append(logits_of(model))
    assert_same_bits(*learned)
