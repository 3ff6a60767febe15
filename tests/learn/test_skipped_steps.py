"""Losses that are not finite: as many steps as may be are skipped, one more ends the run."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.small_trainer import a_trainer_in, logits_of

from maskpro_kernels.learn import journal

pytestmark = pytest.mark.usefixtures("eager_reference")


def spoiled(folder, how, bad, max_skipped=0):
    """A trainer with losses that are not finite in these steps."""
    trainer = a_trainer_in(folder, how, max_skipped=max_skipped)
    finite = trainer.loss_fn

    def loss_fn(model, batch):
        drawing = any(layer.training for layer in trainer.layers.values())
        return finite(model, batch) * (torch.nan if drawing and trainer.steps_done in bad else 1.0)

    trainer.loss_fn = loss_fn
    return trainer


def test_losses_that_are_not_finite_are_skipped_and_counted(tmp_path):
    trainer = spoiled(tmp_path, "reinforce", (2, 3), 2)
    records = trainer.run(6, progress=False)
    assert [math.isnan(record.loss) for record in records] == [False, False, True, True, False, False]
    assert [one.skipped for one in journal.read_journal(tmp_path / "journal")[1]] == [
        False,
        False,
        True,
        True,
        False,
        False,
    ]
    trainer.close()
    again = a_trainer_in(tmp_path)
    assert again.resume() == 6 and again.estimator.delta == trainer.estimator.delta
    assert_same_bits(logits_of(again.model), logits_of(trainer.model))

    other = spoiled(tmp_path / "other", "reinforce", (1, 2, 3), 1)
    with pytest.raises(FloatingPointError, match="loss of step 2: expected a finite number, got nan, after 1 others"):
        other.run(6, progress=False)
    assert other.steps_done == 3


@pytest.mark.parametrize("how", ["reinforce", "straight-through"])
def test_a_run_continues_after_a_loss_that_is_not_finite(tmp_path, how):
    """The step moves nothing and is not taken again, if the run continues, and if it ends and is resumed."""
    borne = spoiled(tmp_path / "borne", how, {2}, 1)
    borne.run(2, progress=False)
    before = logits_of(borne.model)
    assert math.isnan(borne.step().loss)
    assert_same_bits(logits_of(borne.model), before)
    records = borne.run(3, progress=False)

    ended = spoiled(tmp_path / "ended", how, {2})
    with pytest.raises(FloatingPointError, match="loss of step 2: expected a finite number, got nan$"):
        ended.run(6, progress=False)
    assert ended.steps_done == 3 and not ended.broken
    ended.close()
    again = spoiled(tmp_path / "ended", how, {2})
    assert again.resume() == 3
    assert [one.loss for one in again.run(3, progress=False)] == [one.loss for one in records]
    assert_same_bits(logits_of(again.model), logits_of(borne.model))


@pytest.mark.parametrize("how", ["reinforce", "straight-through"])
def test_a_resumed_run_counts_on_with_the_losses_that_were_not_finite(tmp_path, how):
    first = spoiled(tmp_path, how, {1, 2, 3, 4}, 2)
    first.run(3, progress=False)
    first.close()
    for step, others in ((3, 2), (4, 3)):
        again = spoiled(tmp_path, how, {1, 2, 3, 4}, 2)
        assert again.resume() == step
        with pytest.raises(FloatingPointError, match=f"loss of step {step}: .*, after {others} others in a row"):
            again.run(2, progress=False)
        again.close()
    last = spoiled(tmp_path, how, {6, 7}, 2)
    assert last.resume() == 5
    # a finite one begins a new row
    assert [math.isnan(one.loss) for one in last.run(3, progress=False)] == [False, True, True]


@pytest.mark.parametrize("how", ["reinforce", "straight-through"])
def test_a_resumed_run_counts_those_in_a_row_alone(tmp_path, how):
    first = spoiled(tmp_path, how, {0, 2}, 2)
    first.run(3, progress=False)
    first.close()
    again = spoiled(tmp_path, how, {3, 4}, 2)
    assert again.resume() == 3
    with pytest.raises(FloatingPointError, match="loss of step 4: .*, after 2 others in a row"):
        again.run(2, progress=False)
