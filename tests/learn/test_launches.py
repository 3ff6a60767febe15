"""How many launches a step of a model of many layers makes. A launcher that runs nothing counts them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from helpers.routes import take_route
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.ops.triton import launch

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
                given[written].fill_(1)

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


def test_a_straight_through_step_makes_three_a_layer(launched):
    found = steps_of(a_model(), mk.StraightThrough(), launched)
    # the input of the first layer has no gradient
    products = {"masked_linear": LAYERS, "masked_linear_input_grad": LAYERS - 1}
    assert found == products | {"straight_through": LAYERS, "sample_masks": 1}
    assert sum(found.values()) == 3 * LAYERS


def test_straight_through_steps_of_two_batches_move_each_layer_once(launched):
    found = steps_of(a_model(), mk.StraightThrough(), launched, accumulate=2)
    products = {"masked_linear": 2 * LAYERS, "masked_linear_input_grad": 2 * (LAYERS - 1)}
    assert found == products | {"straight_through": 2 * LAYERS, "descend": LAYERS, "sample_masks": 1}


def test_weights_that_learn_take_the_masks_of_the_step(launched):
    found = steps_of(a_model(), mk.StraightThrough(train_weights=1e-3), launched)
    assert found["sample_masks"] == 1 and "sample_mask" not in found


def test_each_kind_of_layer_takes_a_launch(launched):
    found = steps_of(a_model(patterns=("2:4", "1:4", "4:8")), mk.Reinforce(), launched)
    assert found == {"masked_linear": LAYERS, "sample_masks": 1, "score_update_of_layers": 3}
