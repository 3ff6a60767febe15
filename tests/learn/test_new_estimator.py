"""What a new way to learn takes: a class, and no other file. It runs, resumes and is known to the command."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.small_trainer import a_model, a_trainer, logits_of

from maskpro_kernels.learn.estimator import Estimator, Option, StepResult


class Momentum(Estimator):
    """Logits follow a running mean of noise, as far as losses have differed from those of the initial masks."""

    name, summary, needs_initial_losses = "momentum", "for tests alone", True
    options = (Option("speed", float, 0.5, "how far a logit moves", "S"),)

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
            with layer.moving_logits() as logits:
                mean = self.held[name].mul_(0.9).add_(torch.randn(logits.shape, generator=noise))
                logits.add_(mean * self.held["total"], alpha=self.speed)
        return StepResult(loss)

    def settings(self):
        return {"speed": self.speed}

    def tensors(self):
        return self.held


@pytest.mark.usefixtures("eager_reference")
def test_a_new_estimator_runs_and_resumes(tmp_path):
    whole, part, again = (a_trainer(a_model(), estimator=Momentum(0.5), output_dir=tmp_path / of) for of in "abb")
    losses = [record.loss for record in whole.run(6, progress=False) + part.run(4, progress=False)]
    part.close()
    assert again.resume() == 4
    assert losses[:6] == losses[6:] + [record.loss for record in again.run(2, progress=False)]
    assert_same_bits(logits_of(again.model), logits_of(whole.model))
