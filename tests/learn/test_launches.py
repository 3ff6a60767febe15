"""How many launches a step of a model of many layers makes. A launcher that runs nothing counts them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from helpers.captured_step import CapturedStep
from helpers.routes import take_route
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels import modules
from maskpro_kernels.ops.triton import curvature, launch, masked_gemm, sampling, slopes

LAYERS = 210


@pytest.fixture
def launched(monkeypatch):
    """Names of launches. What a kernel would write is all ones."""
    take_route(monkeypatch, "kernels")
    names = Counter()

    def count(kernel, name, grid, device, args, options, **constants):
        names[name] += 1
        given = dict(zip(kernel.arg_names, args, strict=False))
        for written in ("out", "partial", "flips"):
            if isinstance(given.get(written), torch.Tensor):
                # not by torch, whose operations a test counts
                given[written].numpy().fill(1)

    monkeypatch.setattr(launch, "_launch", count)
    return names


def a_model(layers: int = LAYERS, patterns=("2:4",)) -> nn.Sequential:
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(layers)))
    with pytest.MonkeyPatch.context() as patched:
        take_route(patched, "eager")
        for i, pattern in enumerate(patterns):
            mk.convert(model, pattern, targets=[str(at) for at in range(i, layers, len(patterns))], init="magnitude")
    if len(patterns) > 1:
        for id_, layer in enumerate(model):
            layer.layer, layer.counter_state = id_, model[0].counter_state
    return model


def steps_of(model: nn.Module, estimator, launched: Counter, loss_fn=None, steps: int = 2, **how) -> Counter:
    """Launches of the last of some steps."""
    batches = [torch.ones(2, 16)] * how.get("accumulate", 1)
    loss_fn = loss_fn or (lambda model, batch: model(batch).mean())
    trainer = mk.MaskTrainer(model, loss_fn, batches, estimator, seed=0, **how)
    for _ in range(steps):
        launched.clear()
        trainer.step()
    return Counter(launched)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_reinforce_step_makes_two_beside_its_products(accumulate, launched):
    found = steps_of(a_model(), mk.Reinforce(), launched, accumulate=accumulate)
    # of one batch the products draw, and the flips of one layer are counted
    assert found == {"masked_linear": accumulate * LAYERS, "sample_masks": 1, "score_update_of_layers": 1}


def test_several_draws_of_a_step_are_updated_by_one_launch(launched):
    found = steps_of(a_model(), mk.Reinforce(draws=3), launched, accumulate=2)
    products = found.pop("masked_linear")
    # each draw is taken by two forwards
    assert products == 6 * LAYERS and found == {"sample_masks": 3, "score_updates_of_layers": 1}


def test_a_straight_through_step_makes_five_a_layer(launched):
    found = steps_of(a_model(), mk.StraightThrough(), launched)
    # the input of the first layer has no gradient
    products = {"masked_linear": LAYERS, "masked_linear_input_grad": LAYERS - 1}
    curvature = {"gradient_squares": LAYERS, "curvature_factors": LAYERS}
    assert found == products | curvature | {"straight_through": LAYERS, "sample_masks": 1}
    assert sum(found.values()) == 5 * LAYERS


def test_straight_through_steps_of_two_batches_move_each_layer_once(launched):
    found = steps_of(a_model(), mk.StraightThrough(), launched, accumulate=2)
    products = {"masked_linear": 2 * LAYERS, "masked_linear_input_grad": 2 * (LAYERS - 1)}
    curvature = {"gradient_squares": 2 * LAYERS, "curvature_factors": 2 * LAYERS}
    assert found == products | curvature | {"straight_through": 2 * LAYERS, "descend": LAYERS, "sample_masks": 1}


# Operations of torch without work of a device; what ``to`` copies is another one
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "as_strided", "view", "_unsafe_view", "reshape", "expand",
        "detach", "select", "slice", "t", "transpose", "unsqueeze", "squeeze", "alias", "resize_", "unbind", "split",
        "lift_fresh", "view_as", "to", "resolve_conj", "resolve_neg"}  # fmt: skip


def operations_of(call) -> Counter:
    """Operations of torch in a call by name, each a launch on a GPU; not those that others are made of."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()

    def is_work(event) -> bool:
        return event.name.startswith("aten::") and event.name.removeprefix("aten::") not in FREE

    def is_part(event) -> bool:
        event = event.cpu_parent
        return event is not None and (is_work(event) or is_part(event))

    counted = (event for event in profile.events() if is_work(event) and not is_part(event))
    return Counter(event.name.removeprefix("aten::") for event in counted)


@pytest.mark.parametrize("tokens", [2, 300])
def test_a_straight_through_step_makes_at_most_ten_operations_a_layer(tokens, launched, monkeypatch):
    """Launches and what torch does beside them, with torch's products for many tokens and the loss of the model."""
    for module in (curvature, masked_gemm, sampling, slopes):
        # not the one that fills what it allocates
        monkeypatch.setattr(module, "torch", torch)
    model = a_model()
    batches = [torch.zeros(tokens, 16)]
    trainer = mk.MaskTrainer(model, lambda model, batch: model(batch).mean(), batches, mk.StraightThrough(), seed=0)
    # before its first step a layer has no running mean square
    trainer.step()
    launched.clear()
    found = operations_of(trainer.step)
    # of a step on the CPU alone: whether it is in range
    del found["item"]
    assert launched.total() + found.total() <= 10 * LAYERS, (launched, found)


@pytest.mark.parametrize(("train_weights", "kernel"), [(None, "straight_through"), (1e-3, "adamw")])
def test_a_straight_through_step_reads_nothing_from_the_device(train_weights, kernel, launched, monkeypatch):
    """Neither values nor numbers of rows, which a CUDA graph could not wait for; from its second step on."""
    # it reads steps that are on the CPU
    monkeypatch.setattr(modules, "check_scalar", lambda *_: None)
    with pytest.MonkeyPatch.context() as patched:
        take_route(patched, "eager")
        step = CapturedStep("cpu", "2:4", train_weights)
    found = operations_of(step)
    reading = {"item", "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "unique", "equal"}
    assert launched[kernel] and not reading & found.keys(), found


def test_weights_that_learn_take_the_masks_of_the_step(launched):
    found = steps_of(a_model(), mk.StraightThrough(train_weights=1e-3, masks_until=1.0), launched)
    assert found["sample_masks"] == 1 and "sample_mask" not in found


def test_fixed_masks_need_neither_draws_nor_slopes(launched):
    found = steps_of(a_model(), mk.StraightThrough(train_weights=1e-3), launched)
    assert found["adamw"] == LAYERS
    assert not {"sample_masks", "sample_mask", "straight_through", "straight_through_step"} & found.keys(), found


def test_each_kind_of_layer_takes_a_launch(launched):
    found = steps_of(a_model(patterns=("2:4", "1:4", "4:8")), mk.Reinforce(), launched)
    assert found == {"masked_linear": LAYERS, "sample_masks": 1, "score_update_of_layers": 3}
