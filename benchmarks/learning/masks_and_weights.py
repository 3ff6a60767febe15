"""Straight-through learning of masks and weights, each in its own share of the steps.

Weights that the mask drops keep their values by default, as with ``maskpro learn --train-weights``. ``dropped`` lets
them learn too: by the gradient of the masked weight ("gradient"), as SR-STE does; or by that gradient plus F w
("corrected"), with the curvature F of the logits' slopes, which is the gradient that the loss would have if the weight
were kept: it moves a dropped weight towards the value that lowers the loss most.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from maskpro_kernels import ops
from maskpro_kernels.functional.checks import check_one_of
from maskpro_kernels.functional.masks import expand_mask
from maskpro_kernels.learn.backward import LayerUpdater
from maskpro_kernels.learn.estimator import check_float
from maskpro_kernels.learn.straight_through import StraightThrough
from maskpro_kernels.learn.weight_learner import WeightLearner
from maskpro_kernels.modules import MaskedLinear
from maskpro_kernels.ops.counter import MaskSource

STILL = "still"
GRADIENT = "gradient"
CORRECTED = "corrected"


class MasksAndWeights(StraightThrough):
    """Straight-through with weights that learn.

    Args:
        steps: how many there will be.
        lr: of the logits; falls linearly to 0 over the first ``masks_until`` of the steps.
        train_weights: learning rate of the weights, 0 over the first ``weights_from`` of the steps; then it falls
            linearly to 0.
        masks_until, weights_from: shares of the steps, the second at most the first. Where the first has passed, masks
            are fixed.
        dropped: "still"; or "gradient" or "corrected", with ``masks_until`` 1. See the module.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    name = "masks and weights"

    def __init__(
        self,
        steps: int,
        lr: float = 0.1,
        train_weights: float = 6e-4,
        masks_until: float = 1.0,
        weights_from: float = 0.0,
        dropped: str = STILL,
    ):
        super().__init__(lr, steps, train_weights=train_weights, masks_until=masks_until)
        check_float("weights_from", weights_from, 0.0, 1.0)
        if weights_from > masks_until:
            raise ValueError(
                f"weights_from: expected at most masks_until, {masks_until}, so that masks or weights learn in each "
                f"step, got {weights_from}"
            )
        check_one_of("dropped", dropped, (STILL, GRADIENT, CORRECTED))
        if dropped != STILL and masks_until < 1.0:
            raise ValueError(f"masks_until: expected 1 with dropped {dropped!r}, got {masks_until}")
        self.weights_from = float(weights_from)
        self.dropped = dropped

    def settings(self) -> dict:
        return super().settings() | {"weights_from": self.weights_from, "dropped": self.dropped}

    def begin(self, layers: Mapping[str, MaskedLinear]) -> None:
        super().begin(layers)
        if self.dropped == STILL:
            return
        updater_kind = Corrected if self.dropped == CORRECTED else LayerUpdater
        self._learners = {name: AllWeights(layer, self.weight_decay) for name, layer in layers.items()}
        self._updaters = {name: updater_kind(layer, self, self._learners[name]) for name, layer in layers.items()}
        self._place_squares({})

    def weight_lr_at(self, step: int) -> float:
        start = self.weights_from * self.steps
        if step < start:
            return 0.0
        return self.train_weights * (self.steps - step) / (self.steps - start)


class AllWeights(WeightLearner):
    """AdamW on kept and dropped weights.

    Attributes:
        factors: [out] and [K] of the curvature F of the step; None: dropped weights learn by the gradient alone.
    """

    factors: tuple[Tensor, Tensor] | None = None

    def step(self, gradient: Tensor, codes: Tensor, rate: float, norm: Tensor) -> None:
        m = self.layer.pattern.m
        if self.factors is not None:
            rows, columns = self.factors
            dropped = self.master * ~expand_mask(codes, self.layer.pattern)
            gradient = gradient.float() + dropped.mul_(rows[:, None]).mul_(columns)
            norm = norm + torch.linalg.vector_norm(gradient)
        super().step(gradient, torch.full_like(codes, (1 << m) - 1), rate, norm)


class Corrected(LayerUpdater):
    """Gives the curvature of a layer to its ``AllWeights``; for one use of the layer and one batch in a step."""

    def __call__(self, grad: Tensor, x: Tensor, weight: Tensor, mask: MaskSource) -> None:
        self.learner.factors = ops.curvature_factors(grad, x, self.estimator.curvature, self.tokens, self.fisher)
        super().__call__(grad, x, weight, mask)
