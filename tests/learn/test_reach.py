"""Runs whose steps cannot change a mask, or are not likely to: reported, or refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import small_trainer
from helpers.small_trainer import a_model, a_trainer

from maskpro_kernels.learn.model_masks import margins
from maskpro_kernels.learn.reinforce import Reinforce
from maskpro_kernels.learn.straight_through import StraightThrough
from maskpro_kernels.modules import masked_layers
from maskpro_kernels.ops.pattern import NMPattern

pytestmark = pytest.mark.usefixtures("eager_reference")


def spread(gap: float, but: float | None = None):
    """A model with that gap between kept and dropped logits; in one group, the last of all, with another."""
    model = a_model()
    with torch.no_grad():
        for layer in masked_layers(model).values():
            layer.logits.copy_((layer.logits > 0) * gap)
        if but is not None:
            layer.logits.view(-1, 4)[-1] *= but / gap
    return model


@pytest.mark.parametrize(("n", "expected"), [(1, [5.0, 3.0, 3.0]), (2, [0.5, 4.0, 3.0]), (3, [3.0, 2.0, 3.0])])
def test_margins_of_groups(n, expected):
    logits = torch.tensor([[9.0, 4.0, 3.5, 0.5], [8.0, 5.0, 1.0, -1.0], [1.0, 7.0, -2.0, 4.0]]).bfloat16()
    assert margins(logits, NMPattern(f"{n}:4")).tolist() == expected


def test_straight_through_warns_that_its_steps_are_too_few():
    """Both logits move by 2 a step at most: 3 steps cross a gap of 12."""
    reported = "all steps together can cross a gap of 12, .* 12.5; set more steps"
    with pytest.warns(UserWarning, match=reported) as caught:
        a_trainer(spread(12.5), estimator=StraightThrough(steps=3))
    # where the trainer is made
    assert caught[0].filename == small_trainer.__file__


def test_straight_through_warns_of_a_rate_that_is_too_low():
    """By 0.1 times 2, in steps at half of the rate on average: 120 cross a gap of 12.1."""
    reported = "few masks will change, if any: .* cross a gap of 12.1, .* 12.5; set a higher lr, more steps"
    with pytest.warns(UserWarning, match=reported):
        a_trainer(spread(12.5), estimator=StraightThrough(lr=0.1, steps=120))


@pytest.mark.parametrize(
    ("model", "estimator"),
    [
        (spread(12.5), StraightThrough(lr=10.0, steps=4)),
        (spread(12.5), StraightThrough(lr=0.1, steps=130)),
        (spread(12.5), StraightThrough()),
        (spread(12.5, but=11.0), StraightThrough(lr=10.0, steps=3)),
        (spread(12.5), StraightThrough(steps=3, train_weights=1e-3)),
        (spread(40.0, but=25.0), Reinforce()),
    ],
)
def test_runs_in_which_a_mask_may_change_are_not_reported(model, estimator):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        a_trainer(model, estimator=estimator)


def test_reinforce_refuses_a_gap_that_no_draw_crosses():
    with pytest.raises(ValueError, match="^model: expected .* at most 26 apart, got at least 40: noise crosses"):
        a_trainer(spread(40.0), estimator=Reinforce())
