"""Estimators: from losses to steps of the logits, by one scalar a step or by the gradient of the masked weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from . import ops
from .functional import FLOAT32_MAX, straight_through_gradient
from .modules import MaskedLinear
from .pattern import MaskSource

# A normalized advantage beyond it is an outlier
LARGEST_ADVANTAGE = 3.0


def _check_float(name: str, value: float, low: float, high: float, strict: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__} {value!r}")
    if not low <= value <= high or strict and value == low:
        raise ValueError(f"{name}: expected a float {'above' if strict else 'of at least'} {low:g}"
                         + (f" and at most {high:g}" if high < FLOAT32_MAX else "") + f", got {value}")  # fmt: skip


class Reinforce:
    """REINFORCE with loss residual and tracker (MaskPro, arXiv 2506.12876, section 4).

    residual r = f(m_t, batch) - f(m_0, batch); advantage = r - tracker; the logits move by
    -lr * advantage * score(m_t); tracker <- alpha * tracker + (1 - alpha) * r.

    Args:
        lr: learning rate; the paper's is 50.
        alpha: decay of the tracker in [0, 1]; the paper's is 0.99. At 1 the tracker stays 0.
        tracker: "after" updates the tracker after its use, as the paper does; "before" ahead of it, as
            the paper's published code does.
        normalize: divide the advantage by its running root mean square, of memory alpha, and bound it to +-3: lr is
            then free of the scale of the loss, and one outlier does not move the logits far. Not in the paper.

    Attributes:
        delta: the tracker, a running mean of the residual.
        mean_square: the running mean of the squared advantage, None before the first step.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    def __init__(self, lr: float = 50.0, alpha: float = 0.99, tracker: str = "after", normalize: bool = False):
        _check_float("lr", lr, 0.0, FLOAT32_MAX, strict=True)
        _check_float("alpha", alpha, 0.0, 1.0)
        if tracker not in ("after", "before"):
            raise ValueError(f'tracker: expected "after" or "before", got {tracker!r}')
        if not isinstance(normalize, bool):
            raise TypeError(f"normalize: expected a bool, got {normalize!r}")
        self.lr = float(lr)
        self.alpha = float(alpha)
        self.tracker = tracker
        self.normalize = normalize
        self.delta = 0.0
        self.mean_square: float | None = None

    def advantage(self, residual: float) -> float:
        """The advantage of a residual; moves the tracker."""
        before = self.delta
        self.delta = self.alpha * self.delta + (1.0 - self.alpha) * residual
        advantage = residual - (before if self.tracker == "after" else self.delta)
        if not self.normalize:
            return advantage
        square = advantage * advantage
        old = square if self.mean_square is None else self.mean_square
        self.mean_square = self.alpha * old + (1.0 - self.alpha) * square
        scale = math.sqrt(self.mean_square)
        return 0.0 if scale == 0.0 else min(max(advantage / scale, -LARGEST_ADVANTAGE), LARGEST_ADVANTAGE)


class StraightThrough:
    """Straight-through learning: the gradient of the masked weights tells each logit where to go.

    A mask is drawn, and backward gives the slope of the loss in it (``straight_through_gradient``). Every logit moves
    by -lr * slope / rms(slope), by at most ``largest``; rms is the root mean square over the layer, a running one of
    the steps before. That happens inside backward, layer by layer, where a layer is used once in a step: no gradient
    is held. A layer that is used several times moves once, after backward, by the sum of its slopes.

    Args:
        lr: how far a logit moves whose slope is the root mean square; falls linearly to 0 over ``steps``.
        steps: how many steps there will be; None: lr stays as it is.
        curvature: factor of the loss's second derivative in the slope. 1 fits losses that are a mean over tokens.
        largest: most that a logit moves in a step.
        memory: share of the running mean square that a step leaves, in [0, 1).

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    def __init__(
        self,
        lr: float = 0.1,
        steps: int | None = None,
        *,
        curvature: float = 1.0,
        largest: float = 5.0,
        memory: float = 0.9,
    ):
        _check_float("lr", lr, 0.0, FLOAT32_MAX, strict=True)
        _check_float("curvature", curvature, 0.0, FLOAT32_MAX)
        _check_float("largest", largest, 0.0, FLOAT32_MAX, strict=True)
        _check_float("memory", memory, 0.0, math.nextafter(1.0, 0.0))
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ValueError(f"steps: expected an int of at least 1 or None, got {steps!r}")
        self.lr = float(lr)
        self.steps = steps
        self.curvature = float(curvature)
        self.largest = float(largest)
        self.memory = float(memory)
        self._descents: dict[MaskedLinear, _Descent] = {}

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self.lr if self.steps is None else self.lr * max(1.0 - step / self.steps, 0.0)

    @contextmanager
    def attached(self, layers: Mapping[str, MaskedLinear], step: int) -> Iterator[Callable[[Tensor], None]]:
        """With layers whose backward moves their logits; gives the function to call with the loss.

        It takes backward, and raises FloatingPointError where a slope was not finite: those weights' logits and
        the running mean squares of their layers are then as they were.
        """
        descents = {name: self._descents.setdefault(layer, _Descent(layer, self)) for name, layer in layers.items()}
        before = {layer: layer.logits_backward for layer in layers.values()}
        counters = []

        def backward(loss: Tensor) -> None:
            # what runs again from here on, to compute an activation anew, is no further use
            for counter in counters:
                counter.remove()
            torch.autograd.backward(loss, inputs=[layer.logits for layer in layers.values()])
            for descent in descents.values():
                descent.finish()
            reached = {name: descent.latest for name, descent in descents.items() if descent.latest is not None}
            finite = torch.stack([value.cpu() for value in reached.values()]).isfinite() if reached else []
            bad = [name for name, good in zip(reached, finite, strict=True) if not good]
            if bad:
                raise FloatingPointError(f"gradients of step {step}: expected finite numbers, got others in {bad}")

        try:
            for layer, descent in zip(layers.values(), descents.values(), strict=True):
                descent.begin(self.lr_at(step))
                layer.logits_backward = descent
                counters.append(layer.register_forward_hook(descent.count))
            yield backward
        finally:
            for counter in counters:
                counter.remove()
            for layer, own in before.items():
                layer.logits_backward = own


class _Descent:
    """Moves the logits of one layer: inside backward, or after it where the layer was used several times."""

    def __init__(self, layer: MaskedLinear, how: StraightThrough):
        self.layer = layer
        self.how = how
        self.mean_square: Tensor | None = None

    def begin(self, lr: float) -> None:
        self.lr = lr
        self.uses = 0
        self.latest: Tensor | None = None
        self.layer.logits.grad = None

    def count(self, *_) -> None:
        self.uses += 1

    def __call__(self, grad: Tensor, x: Tensor, weight: Tensor, mask: MaskSource) -> Tensor | None:
        if self.uses > 1:
            return straight_through_gradient(grad, x, weight, mask, self.how.curvature)
        how = self.how

        def descend(rate: Tensor) -> Tensor:
            return ops.straight_through_update_(grad, x, weight, how.curvature, rate, how.largest, *mask)

        return self._take(descend)

    def finish(self) -> None:
        """Move by the gradients that have been summed up, where they were."""
        logits = self.layer.logits
        if logits.grad is None:
            return
        gradient, logits.grad = logits.grad.contiguous(), None
        m, counter = self.layer.pattern.m, self.layer.counter()
        shard = (counter["layer"], 0, logits.shape[1] // m)

        def descend(rate: Tensor) -> Tensor:
            with torch.no_grad():
                return ops.descend_(
                    logits, gradient, rate, self.how.largest, m, counter["seed"], counter["step"], *shard
                )

        self._take(descend)

    def _take(self, descend: Callable[[Tensor], Tensor]) -> None:
        if self.mean_square is None:
            # at a rate of 0 nothing moves
            self.mean_square = descend(torch.zeros((), device=self.layer.logits.device))
        self.latest = descend(self.lr / self.mean_square.sqrt())
        running = torch.lerp(self.latest, self.mean_square, self.how.memory)
        running = torch.where(self.mean_square.isfinite(), running, self.latest)
        self.mean_square = torch.where(self.latest.isfinite(), running, self.mean_square)
