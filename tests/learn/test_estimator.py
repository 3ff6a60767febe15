"""A new estimator needs a class, and no other file. One that breaks the protocol is refused."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.small_trainer import a_model, a_trainer, a_trainer_in, logits_of

import maskpro_kernels as mk
from maskpro_kernels.learn.estimator import Estimator, StepResult

pytestmark = pytest.mark.usefixtures("eager_reference")


class Momentum(Estimator):
    """Logits follow a running mean of noise, as far as losses have differed from those of the initial masks."""

    name, needs_initial_losses = "momentum", True

    def __init__(self, speed):
        self.speed = speed

    def begin(self, layers):
        self.held = {name: torch.zeros_like(layer.logits.detach()) for name, layer in layers.items()}
        self.held["total"] = torch.zeros(())

    def step(self, step):
        loss, noise = step.losses()[0], torch.Generator().manual_seed(step.index)
        self.held["total"] += abs(loss - step.initial_loss())
        step.begin_update()
        for name, layer in step.layers.items():
            mean = self.held[name].mul_(0.9).add_(torch.randn(layer.logits.shape, generator=noise))
            layer.logits.detach().add_(mean * self.held["total"], alpha=self.speed)
        return StepResult(loss)

    def settings(self):
        return {"speed": self.speed}

    def tensors(self):
        return self.held


def test_a_new_estimator_runs_and_resumes(tmp_path):
    whole, part, again = (a_trainer(a_model(), estimator=Momentum(0.5), output_dir=tmp_path / of) for of in "abb")
    losses = [record.loss for record in whole.run(6, progress=False) + part.run(4, progress=False)]
    part.close()
    assert again.resume() == 4
    assert losses[:6] == losses[6:] + [record.loss for record in again.run(2, progress=False)]
    assert_same_bits(logits_of(again.model), logits_of(whole.model))


class Faulty(mk.Reinforce):
    """Estimator whose second step does not pass its journal entry."""

    def __init__(self, fault):
        super().__init__(lr=2.0, alpha=0.75)
        self.fault = fault

    def step(self, step):
        if step.index == 1:
            return self.fault(step)
        return super().step(step)


def without_entry(step):
    step.begin_update()


def without_update(step):
    return StepResult(step.losses()[0])


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (without_entry, "^entry: expected a journal entry from an estimator with a journal, got None"),
        (without_update, "^estimator: expected one call of begin_update in each step, .* got 0 in step 1"),
    ],
)
def test_a_step_that_is_not_in_the_journal_is_refused(tmp_path, fault, message, folder):
    trainer = a_trainer(estimator=Faulty(fault), output_dir=tmp_path / "run" if folder else None)
    trainer.step()
    before, files = logits_of(trainer.model), {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    with pytest.raises(ValueError, match=message):
        trainer.step()
    assert_same_bits(logits_of(trainer.model), before)
    assert (trainer.steps_done, {path: path.read_bytes() for path in tmp_path.rglob("*.*")}) == (1, files)
    trainer.close()
    if folder:
        again = a_trainer_in(tmp_path / "run")
        assert again.resume() == 1
        assert_same_bits(logits_of(again.model), before)


def test_a_journal_does_not_go_with_tensors():
    with pytest.raises(TypeError, match="^Both: expected no tensors of its own, which a journal cannot rebuild"):

        class Both(mk.Reinforce):
            def tensors(self):
                return {}


class Holding(Estimator):
    """Estimator with tensors that its settings do not name."""

    name = "holding"

    def __init__(self, held):
        self.held = held

    def step(self, step):
        loss = step.losses()[0]
        step.begin_update()
        return StepResult(loss)

    def settings(self):
        return {}

    def tensors(self):
        return self.held


@pytest.mark.parametrize(
    "other",
    [{}, {"sum": torch.ones(3)}, {"sum": torch.ones(2).double()}, {"sum": torch.ones(2), "more": torch.ones(1)}],
)
def test_other_tensors_of_an_estimator_are_refused(tmp_path, other):
    trainer = a_trainer_in(tmp_path, estimator=Holding({"sum": torch.zeros(2)}))
    trainer.run(2, progress=False)
    trainer.close()
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    again = a_trainer_in(tmp_path, model=a_model(gap=1.0), estimator=Holding(other))
    before = logits_of(again.model)
    with pytest.raises(ValueError, match="^output_dir: expected a snapshot with the tensors of holding"):
        again.resume()
    assert_same_bits(logits_of(again.model), before)
    assert all(bool((tensor == 1).all()) for tensor in other.values())
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
