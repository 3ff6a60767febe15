"""Straight-through learning: logits descend along the slope of the loss in the mask, inside the backward pass."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from .. import ops
from ..functional.checks import describe
from ..functional.linear import labelled_tokens
from ..modules import MaskedLinear, check_not_sharded
from ..ops.counter import MaskSource
from ..ranks import Ranks
from .backward import (
    BackwardPass,
    LayerUpdater,
    RunningSquares,
    ShardedPass,
    ShardUpdater,
    WeightUpdater,
    check_slope_settings,
)
from .estimator import Estimator, Step, StepResult, check_float, check_whole
from .weight_learner import WEIGHT, WeightLearner


class StraightThrough(Estimator):
    """Straight-through learning: each logit moves by the gradient of the masked weights.

    A mask is drawn, and backward computes the slope of the loss in it (``straight_through_gradient``). Every logit
    moves by -lr * slope / rms(slope), at most by ``max_update``. rms is the root mean square over the layer, a running
    one of the steps before. A layer that is used once in a step moves inside backward, and no gradient is kept. A layer
    that is used several times moves once, after backward, by the sum of its slopes. All layers do so if a process takes
    several batches a step, or if ranks do not use the same layers in a step. The process then needs a float32 slope for
    each weight, with fixed masks a gradient, and both where masks and weights learn. If ranks share the rows of layers,
    it needs only those of its rows.

    With ``train_weights`` the kept weights learn, see ``WeightLearner``, and masks are fixed: all steps use the N
    largest logits, and need no slopes. With ``masks_until`` masks learn as well in a first share of the steps: weights
    use the gradient of the same backward, and move after logits and after the layer below. The result is the mask and
    the weights.

    Args:
        lr: change of a logit whose slope equals the root mean square; falls linearly to 0 over the steps in which masks
            learn. Not used if masks are fixed from the start.
        steps: number of steps, at most; None: lr is constant.
        curvature: factor of the loss's second derivative in the slope. 1 fits losses that are a mean over tokens. A
            method ``loss_fn.labelled_tokens(batch)`` returns their number. Without it a mapping's labels other than
            -100 count, without the first of each row of input ids. Else rows of a layer with a gradient count.
        max_update: largest change of a logit in a step. Logits of a kept and a dropped weight begin the gap apart and
            change places after at least gap / (2 max_update) steps. If this is one or two steps, a few important
            weights may be dropped, because the slope is a local estimate and underestimates the loss without them.
        decay: factor of the running mean square in each step, in [0, 1); and of the squares of Fisher passes.
        fisher_every: steps from a Fisher pass to the next. The first is at the first step, repeated in each step until
            it succeeds. Passes are for a ``loss_fn`` whose gradient does not give its curvature: it has a method
            ``fisher_loss(model, batch, seed)``, see ``FisherSquares`` and ``DistillationLoss``. Layers without squares
            use their own gradient.
        train_weights: learning rate of the kept weights; falls linearly to 0 over ``steps``. None: weights do not
            change.
        masks_until: share of ``steps`` in which masks learn, in [0, 1], rounded to steps; then they are fixed. Without
            ``steps`` it is 0 or 1. None: 1, or 0 with ``train_weights``.
        weight_decay: decay of AdamW towards 0, for weights that learn.

    Raises:
        TypeError, ValueError: if an argument is not as above.
    """

    name = "straight-through"
    needs_gradients = True

    def __init__(self, lr: float = 0.3, steps: int | None = None, *, curvature: float = 1.0,
                 max_update: float = 2.0, decay: float = 0.9, fisher_every: int = 16,
                 train_weights: float | None = None, masks_until: float | None = None,
                 weight_decay: float = 0.0):  # fmt: skip
        check_whole("fisher_every", fisher_every, 1)
        check_float("lr", lr, 0.0, strict=True)
        check_slope_settings(curvature, max_update, decay)
        if steps is not None:
            check_whole("steps", steps, 1)
        if train_weights is not None:
            check_float("train_weights", train_weights, 0.0, strict=True)
        check_float("weight_decay", weight_decay, 0.0)
        if weight_decay and train_weights is None:
            raise ValueError(f"weight_decay: expected 0 where weights do not learn, got {weight_decay}")
        if masks_until is not None:
            _check_masks_until(masks_until, steps, train_weights)
        self.lr = float(lr)
        self.steps = steps
        self.fisher_every = fisher_every
        self.curvature = float(curvature)
        self.max_update = float(max_update)
        self.decay = float(decay)
        self.train_weights = None if train_weights is None else float(train_weights)
        self.masks_until = float(train_weights is None) if masks_until is None else float(masks_until)
        self.weight_decay = float(weight_decay)
        self._learners: dict[str, WeightLearner] = {}
        self._updaters: dict[str, LayerUpdater] = {}
        self._weight_updaters: dict[str, WeightUpdater] = {}
        self._squares: list[RunningSquares] = []
        self._fisher = FisherSquares({}, self.decay)

    def begin(self, layers: Mapping[str, MaskedLinear]) -> None:
        if self.train_weights is not None:
            check_not_sharded(layers, "only whole weights can learn; leave out train_weights")
            names: dict[int, str] = {}
            for name, layer in layers.items():
                other = names.setdefault(layer.weight.data_ptr(), name)
                weight = layer.weight
                if not weight.is_contiguous():
                    raise ValueError(
                        f"train_weights: expected layers with contiguous weights, got {weight.stride()} in {name}"
                    )
                if other != name and weight.numel():
                    raise ValueError(
                        f"train_weights: expected a weight of its own in each layer, got one in {other} and {name}"
                    )
            self._learners = {name: WeightLearner(layer, self.weight_decay) for name, layer in layers.items()}
        kind = LayerUpdater if next(iter(layers.values())).shard is None else ShardUpdater
        self._updaters = {name: kind(layer, self, self._learners.get(name)) for name, layer in layers.items()}
        self._weight_updaters = {
            name: WeightUpdater(layers[name], self, learner) for name, learner in self._learners.items()
        }
        self._fisher = FisherSquares(layers, self.decay)
        self._place_squares({})

    def _place_squares(self, mean_squares: Mapping[str, float]) -> None:
        """Put the running mean squares of the layers on the devices of their weights."""
        names: dict[torch.device, list[str]] = {}
        for name, updater in self._updaters.items():
            names.setdefault(updater.layer.weight.device, []).append(name)
        self._squares = [
            RunningSquares([mean_squares.get(name, 0.0) for name in on_device], device)
            for device, on_device in names.items()
        ]
        for squares, on_device in zip(self._squares, names.values(), strict=True):
            for index, name in enumerate(on_device):
                for updaters in (self._updaters, self._weight_updaters):
                    if name in updaters:
                        updaters[name].squares = squares
                        updaters[name].index = index

    def _mean_squares(self) -> dict[str, float]:
        """Running mean squares of the layers that have one."""
        values = {id(squares): squares.squares.tolist() for squares in self._squares}
        by_layer = {name: values[id(updater.squares)][updater.index] for name, updater in self._updaters.items()}
        return {name: square for name, square in by_layer.items() if square > 0.0}

    @property
    def max_logit_travel(self) -> float:
        """Largest change of a logit difference: each step moves both logits by at most ``max_update``."""
        if self.masks_until == 0.0:
            return 0.0
        return math.inf if self.steps is None else 2 * self.max_update * round(self.masks_until * self.steps)

    @property
    def usual_logit_travel(self) -> float:
        """Change of a logit difference if the slopes of both logits have the root mean square, and opposite signs."""
        if self.masks_until == 0.0 or self.steps is None:
            return self.max_logit_travel
        return 2 * sum(min(self.lr_at(step), self.max_update) for step in range(self.steps))

    def settings(self) -> dict:
        of_weights = ("train_weights", "masks_until", "weight_decay") if self.train_weights is not None else ()
        names = ("lr", "steps", "curvature", "max_update", "decay", "fisher_every", *of_weights)
        return {name: getattr(self, name) for name in names}

    def state(self) -> dict:
        """Running mean squares of the slopes of each layer, if above 0, and numbers of Fisher passes."""
        return {"mean_squares": self._mean_squares(), "fisher_passes": dict(self._fisher.passes)}

    def load_state(self, state: Mapping) -> None:
        mean_squares = state["mean_squares"]
        if unknown := sorted(mean_squares.keys() - self._updaters.keys()):
            raise ValueError(f"state: expected mean squares of the model's layers, got some of {unknown}")
        self._place_squares(mean_squares)
        self._fisher.passes.update(state["fisher_passes"])
        for learner in self._learners.values():
            learner.restore()

    def layers_without_gradient(self) -> list[str]:
        with_slopes = self._mean_squares().keys()
        # the second moment of weights whose gradient has always been 0 is 0
        with_gradients = {name for name, learner in self._learners.items() if learner.second.any()}
        return [name for name in self._updaters if name not in with_slopes | with_gradients]

    def tensors(self) -> dict[str, Tensor]:
        """Squares of Fisher passes; and weights that learn, with their moments and a count of steps."""
        learners = self._learners.items()
        tensors = {prefix + name: tensor for name, of in learners for prefix, tensor in of.tensors().items()}
        return tensors | {f"fisher/{name}": square for name, square in self._fisher.squares.items()}

    def learned_weights(self) -> dict[str, str]:
        return {name: WEIGHT + name for name in self._learners}

    def step(self, step: Step) -> StepResult:
        """Move logits by their slopes, and weights, in the last backward; there is none if the loss is not finite."""
        places = [place for _, place in step.own]
        *earlier, last = places
        masks_are_fixed = self._masks_are_fixed(step.index)
        with step.fixing() if masks_are_fixed else step.drawing():
            fisher = {} if masks_are_fixed else self._fisher_squares(step)
            with self.attached(step.index, step.ranks, len(places), fisher) as backward_pass:
                for place in earlier:
                    loss = step.forward(place)
                    equal_order = backward_pass.has_equal_order(loss)
                    tokens = labelled_tokens(step.loss_fn, step.batches[place])
                    backward_pass.backward(loss, float(step.weights[place]), equal_order, tokens)
                loss = step.forward(last)
                tokens = labelled_tokens(step.loss_fn, step.batches[last])
                (value,), equal_order = step.exchange(backward_pass.order(loss))
                if not math.isfinite(value):
                    return StepResult(value)
                step.begin_update()
                self._fisher.take(fisher)
                backward_pass.backward(loss, float(step.weights[last]), equal_order, tokens)
                bad_layers = backward_pass.bad_layers()
        return StepResult(value, bad_layers=tuple(bad_layers))

    def _masks_are_fixed(self, step: int) -> bool:
        """Return whether only weights learn in a step, under the N largest logits."""
        return self.lr_at(step) == 0.0 and self.weight_lr_at(step) > 0.0

    def _fisher_squares(self, step: Step) -> dict[str, Tensor]:
        if not hasattr(step.loss_fn, "fisher_loss"):
            return {}
        current = self._fisher.current()
        # a step whose loss is not finite has no pass, and the next may be many steps away
        return current if current and step.index % self.fisher_every else self._fisher.after_pass(step)

    def lr_at(self, step: int) -> float:
        """Learning rate of the logits in a step, counted from 0; 0 where masks are fixed."""
        if self.masks_until == 0.0:
            return 0.0
        if self.steps is None:
            return self.lr
        of_masks = round(self.masks_until * self.steps)
        return self.lr * (1.0 - step / of_masks) if step < of_masks else 0.0

    def weight_lr_at(self, step: int) -> float:
        """Learning rate of the weights in a step, counted from 0; 0 where they do not learn."""
        rate = self.train_weights or 0.0
        return rate if self.steps is None else rate * max(1.0 - step / self.steps, 0.0)

    @contextmanager
    def attached(self, step: int, ranks: Ranks, batches: int, fisher: Mapping[str, Tensor]) -> Iterator[BackwardPass]:
        """Let the backward passes of a step, ``batches`` of them on each rank, move logits and weights.

        Forwards inside it use the fixed masks, if masks are fixed in this step.

        ``fisher`` has squares by name of the layer, for their curvature, see ``FisherSquares``.
        """
        by_name = self._weight_updaters if self._masks_are_fixed(step) else self._updaters
        updaters = by_name.values()
        before = {updater.layer: updater.layer.logits_backward for updater in updaters}
        kind = BackwardPass if next(iter(before)).shard is None else ShardedPass
        backward_pass = kind(by_name, ranks, batches)
        if any(updater.squares.squares.device != updater.layer.weight.device for updater in updaters):
            # the model has moved
            self._place_squares(self._mean_squares())
        for squares in self._squares:
            squares.begin(self.lr_at(step), self.decay)
        try:
            weight_lr = self.weight_lr_at(step)
            for name, updater in by_name.items():
                updater.layer.logits.grad = None
                updater.begin(weight_lr, backward_pass, fisher.get(name))
                updater.layer.logits_backward = updater
            backward_pass.watch()
            with backward_pass.offloaded:
                yield backward_pass
        finally:
            backward_pass.unwatch()
            for layer, logits_backward in before.items():
                layer.logits_backward = logits_backward
                layer.logits.grad = None
            for updater in updaters:
                updater.end()


def _check_masks_until(masks_until: float, steps: int | None, train_weights: float | None) -> None:
    check_float("masks_until", masks_until, 0.0, 1.0)
    if train_weights is None:
        raise ValueError(f"masks_until: expected None where weights do not learn, got {masks_until}")
    if steps is None and 0.0 < masks_until < 1.0:
        raise ValueError(f"masks_until: expected 0 or 1 without steps, got {masks_until}")


class FisherSquares:
    """``row_squares`` of F of each layer, see ``ops.curvature_factors``: a running mean over Fisher passes.

    A Fisher pass is a forward and a backward of ``loss_fn.fisher_loss(model, batch, seed)``, a mean over the tokens of
    the loss, whose squared gradient has the curvature of the loss as its mean. A layer stores the mean over its rows of
    a token's squared gradients, so that batches of any size are comparable. The first passes have equal weight; later
    ones change the running mean with factor 1 - ``decay``.
    """

    def __init__(self, layers: Mapping[str, MaskedLinear], decay: float):
        self.layers = layers
        self.decay = decay
        self.squares = {
            name: torch.zeros(len(layer.weight), dtype=torch.float32, device=layer.weight.device)
            for name, layer in layers.items()
        }
        self.passes = dict.fromkeys(layers, 0)
        self._warned = False

    def current(self) -> dict[str, Tensor]:
        """Squares of layers that have had a pass."""
        return {name: square for name, square in self.squares.items() if self.passes[name]}

    def after_pass(self, step: Step) -> dict[str, Tensor]:
        """Return ``current`` after a Fisher pass over the batches of a step, within its ``drawing``; nothing moves.

        All ranks get the same. Layers without a gradient, or with a square that is not finite, do not change. Rank 0
        warns once about squares that are not finite.
        """
        totals = {name: square.new_zeros(len(square) + 1) for name, square in self.squares.items()}
        for _, place in step.own:
            for name, total in self._totals_of(step, place).items():
                totals[name] += float(step.weights[place]) * total
        # one transfer, and one collective on several ranks
        device = next(iter(totals.values())).device
        flat = torch.cat([total.to(device) for total in totals.values()])
        step.ranks.all_reduce(flat)
        rows = flat.split([len(total) for total in totals.values()])
        square_sums = [row[:-1] for row in rows]
        shares = torch.stack([row[-1] for row in rows])
        finite = torch.stack([square_sum.isfinite().all() for square_sum in square_sums])
        after = self.current()
        bad = []
        usable, reached = torch.stack([finite & (shares > 0), shares > 0]).tolist()
        for name, square_sum, share, is_usable, is_reached in zip(
            totals, square_sums, shares, usable, reached, strict=True
        ):
            if is_usable:
                squares = self.squares[name]
                weight = max(1.0 - self.decay, 1.0 / (self.passes[name] + 1))
                after[name] = squares.lerp((square_sum / share).to(squares.device), weight)
            elif is_reached:
                bad.append(name)
        if bad and step.ranks.is_main_process and not self._warned:
            self._warned = True
            warnings.warn(
                f"fisher_loss of step {step.index}: expected finite squares of gradients, got others in {bad}; these "
                "layers use earlier passes, or else their own gradient. This is the only warning",
                stacklevel=2,
            )
        return after

    def take(self, after: Mapping[str, Tensor]) -> None:
        for name, square in after.items():
            if square is not self.squares[name]:
                self.squares[name].copy_(square)
                self.passes[name] += 1

    def _totals_of(self, step: Step, place: int) -> dict[str, Tensor]:
        """``ops.token_squares`` of one batch, summed over the uses of a layer, for layers with a gradient."""
        before = {layer: layer.logits_backward for layer in self.layers.values()}
        tokens = labelled_tokens(step.loss_fn, step.batches[place])
        collectors = {name: _Collector(tokens) for name in self.layers}
        try:
            for name, layer in self.layers.items():
                layer.logits_backward = collectors[name]
            loss = step.loss_fn.fisher_loss(step.model, step.batches[place], _seed_of(step, place))
            if not (isinstance(loss, Tensor) and loss.requires_grad):
                raise ValueError(f"loss_fn: expected a fisher_loss with a gradient, got {describe(loss)}")
            torch.autograd.backward(loss, inputs=[layer.logits for layer in self.layers.values()])
        finally:
            for layer, logits_backward in before.items():
                layer.logits_backward = logits_backward
        return {name: collector.total for name, collector in collectors.items() if collector.total is not None}


def _seed_of(step: Step, place: int) -> int:
    """Seed of a batch's labels: another one for each step and batch of a run."""
    text = f"fisher labels {step.seed} {step.index} {place}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


class _Collector:
    """A ``logits_backward`` that adds up ``ops.token_squares`` of a layer."""

    # true: its sums belong to one pass, not to a compiled graph
    moves_logits = takes_shards = True

    def __init__(self, tokens: Tensor | None):
        self.tokens = tokens
        self.total: Tensor | None = None

    def __call__(self, grad: Tensor, x: Tensor, weight: Tensor, mask: MaskSource) -> None:
        of_use = ops.token_squares(grad, self.tokens)
        self.total = of_use if self.total is None else self.total + of_use
