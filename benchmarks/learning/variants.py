"""Other ways to move logits by the slopes of straight-through: schedules, a trust region, consistency, temperature."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from maskpro_kernels.learn.backward_pass import LayerUpdater
from maskpro_kernels.learn.estimator import Option, StepResult
from maskpro_kernels.learn.step import Step, value_of
from maskpro_kernels.learn.straight_through import StraightThrough
from maskpro_kernels.modules import MaskedLinear

# By the share of the steps that is done. Their mean is that of the line to 0, so that they differ in their shape alone.
SCHEDULES = {
    "constant": lambda done: 0.5,
    "cosine": lambda done: (1.0 + math.cos(math.pi * done)) / 2.0,
    # a tenth of the steps up, the others down
    "warm-up": lambda done: min(done / 0.1, (1.0 - done) / 0.9),
    "square root": lambda done: 0.75 * math.sqrt(1.0 - done),
}


class Scheduled(StraightThrough):
    """The learning rate follows one of ``SCHEDULES`` in place of the line to 0."""

    name = "scheduled"
    options = (*StraightThrough.options, Option("schedule", str, "cosine", "of the learning rate", "NAME"))

    def __init__(self, *args, schedule: str = "cosine", **settings):
        super().__init__(*args, **settings)
        self.schedule = schedule

    def _falling(self, rate: float, step: int) -> float:
        # in the middle of the step: a rate that rises from 0 would lose the first one
        return rate * SCHEDULES[self.schedule]((step + 0.5) / self.steps)

    def settings(self) -> dict:
        return super().settings() | {"schedule": self.schedule}


class Spread(StraightThrough):
    """Logits of kept and dropped weights begin ``apart`` from each other, in place of the gap of all runs."""

    name = "spread"
    options = (
        *StraightThrough.options,
        Option("apart", float, 8.0, "initial logit of a kept weight over a dropped one", "L"),
    )

    def __init__(self, *args, apart: float = 8.0, **settings):
        super().__init__(*args, **settings)
        self.apart, self.run_defaults = apart, self.run_defaults._replace(gap=apart)

    def settings(self) -> dict:
        return super().settings() | {"apart": self.apart}


class LateBatches(StraightThrough):
    """The first half of its windows comes in half batches, the second half in double ones; ``movement.py`` makes them.

    The learning rate falls with the windows that were seen, and goes with the size of a batch. So its sum is that of
    equal batches.
    """

    name = "late-batches"

    def _falling(self, rate: float, step: int) -> float:
        # half batches are four times as many as double ones of as many windows
        early = self.steps * 4 // 5
        late = step - early
        size, seen = (0.5, 0.5 * step) if late < 0 else (2.0, 0.5 * early + 2.0 * late)
        return rate * size * (1.0 - seen / (0.5 * early + 2.0 * (self.steps - early)))


class Annealed(StraightThrough):
    """Draws are ``heat`` times as hot at first, and as hot as ever at the end.

    A draw by logits over a temperature T is one by logits that lie 1 / T as far apart. So logits begin at 1 / ``heat``
    of their places. Steps, and the most that one may be, are as much shorter, and all grow evenly.
    """

    name = "annealed"
    options = (*StraightThrough.options, Option("heat", float, 2.0, "temperature of the first step", "T"))

    def __init__(self, *args, heat: float = 2.0, **settings):
        super().__init__(*args, **settings)
        self.heat = heat

    def settings(self) -> dict:
        return super().settings() | {"heat": self.heat}

    def _scale(self, step: int) -> float:
        return self.heat ** (step / max(self.steps - 1, 1) - 1.0)

    def lr_at(self, step: int) -> float:
        return super().lr_at(step) * self._scale(step)

    def begin(self, layers: Mapping[str, MaskedLinear]) -> None:
        super().begin(layers)
        self._stretch(layers, self._scale(0))

    def step(self, step: Step) -> StepResult:
        given, self.max_update = self.max_update, self.max_update * self._scale(step.index)
        try:
            result = super().step(step)
        finally:
            self.max_update = given
        if step.index + 1 < self.steps:
            self._stretch(step.layers, self._scale(step.index + 1) / self._scale(step.index))
        return result

    @torch.no_grad()
    def _stretch(self, layers: Mapping[str, MaskedLinear], factor: float) -> None:
        for layer in layers.values():
            with layer.moving_logits() as logits:
                logits.mul_(factor)


# A loss within that share of what it was has neither fallen nor risen: rounding alone moves it by as much
UNCHANGED = 1e-3


class TrustRegion(StraightThrough):
    """Steps grow while they lower the loss of their own batch, shrink where one raises it, and else stay.

    It takes a second forward of each batch.
    """

    name = "trust-region"

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.radius = 1.0

    def lr_at(self, step: int) -> float:
        return super().lr_at(step) * self.radius

    def step(self, step: Step) -> StepResult:
        result = super().step(step)
        with torch.no_grad(), step.drawing():
            behind = math.fsum(
                float(weight) * value_of(step.loss_fn(step.model, batch))
                for weight, batch in zip(step.weights, step.batches, strict=True)
            )
        if abs(behind - result.loss) > UNCHANGED * abs(result.loss):
            self.radius = min(self.radius * 1.1, 4.0) if behind < result.loss else max(self.radius / 1.1, 0.25)
        return result


class Consistent(StraightThrough):
    """A slope counts as much as its sign has held: the running mean of slopes over the root of that of their squares.

    These are the moments of Adam (Kingma and Ba 2015, arXiv 1412.6980), two float32 numbers a weight.
    """

    name = "consistent"
    # weights learn by gradients that it does not hold
    options = tuple(option for option in StraightThrough.options if option.name != "train_weights")

    def begin(self, layers: Mapping[str, MaskedLinear]) -> None:
        super().begin(layers)
        self._updaters = {name: ConsistentUpdater(layer, self) for name, layer in layers.items()}

    def tensors(self) -> dict[str, Tensor]:
        kinds = ("mean", "square")
        found = {f"{kind}/{name}": getattr(one, kind) for name, one in self._updaters.items() for kind in kinds}
        return super().tensors() | found


class ConsistentUpdater(LayerUpdater):
    # slopes are held, and moved by once the whole backward has ended
    at_once = property(lambda self: False, lambda self, value: None)
    decays = 0.9, 0.99
    eps = 1e-12

    def __init__(self, layer: MaskedLinear, how: StraightThrough):
        super().__init__(layer, how, None)
        self.mean = torch.zeros_like(layer.weight, dtype=torch.float32)
        self.square, self.steps = torch.zeros_like(self.mean), 0

    def finish(self) -> None:
        first, second = self.decays
        self.steps += 1
        self.mean.lerp_(self.slopes, 1.0 - first)
        self.square.mul_(second).addcmul_(self.slopes, self.slopes, value=1.0 - second)
        root = self.square.div(1.0 - second**self.steps).sqrt_().add_(self.eps)
        torch.div(self.mean, root.mul_(1.0 - first**self.steps), out=self.slopes)
        super().finish()
