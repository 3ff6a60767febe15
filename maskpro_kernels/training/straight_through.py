"""Straight-through learning: logits follow the slope of the loss in the mask, inside the backward pass."""

from __future__ import annotations

import collections
import hashlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .. import ops
from ..counter import MaskSource
from ..modules import MaskedLinear
from ..ranks import Ranks
from .amounts import Amount
from .estimator import Estimator, HeldBytes, Option, StepResult
from .fisher import FisherSquares
from .normalized_steps import check_slope_settings, descend_by_rms, folded
from .number_checks import check_float, check_whole
from .offloaded_logits import OffloadedLogits
from .step import Step
from .weight_learning import WeightLearner, check_weights


class StraightThrough(Estimator):
    """Straight-through learning: the gradient of the masked weights tells each logit where to go.

    A mask is drawn, and backward gives the slope of the loss in it (``straight_through_gradient``). Every logit moves
    by -lr * slope / rms(slope), by at most ``max_update``; rms is the root mean square over the layer, a running one of
    the steps before. That happens inside backward, layer by layer, where a layer is used once in a step: no gradient
    is held. A layer that is used several times moves once, after backward, by the sum of its slopes. So does every
    layer where a process takes several batches a step, and in a step whose losses do not come to the same layers on all
    ranks: a process then holds a float32 slope for each weight, and where weights learn as much again.

    With ``train_weights`` the weights that the mask of a step keeps learn as well, see ``WeightLearner``: the gradient
    is there, and they move once logits and the layer below have had theirs. The result is then mask and weights.

    Args:
        lr: how far a logit moves whose slope is the root mean square; falls linearly to 0 over ``steps``.
        steps: how many steps there will be, and no more; None: lr stays as it is.
        curvature: factor of the loss's second derivative in the slope. 1 fits losses that are a mean over tokens.
        max_update: most that a logit moves in a step. A kept and a dropped weight start the gap apart and change places
            after gap / (2 max_update) steps at the soonest. Where that is one or two steps, a few important
            weights may be dropped, because the slope is a local estimate and underestimates what that costs.
        decay: share of the running mean square that a step leaves, in [0, 1); and of the squares of Fisher passes.
        fisher_every: steps from a Fisher pass to the next, the first being at the first step, and at those behind it
            until one has given squares. A ``loss_fn`` has them whose gradient does not tell its curvature: it has a
            method ``fisher_loss(model, batch, seed)``, see ``FisherSquares`` and ``DistillationLoss``. A layer that no
            pass has reached goes by its own gradient.
        train_weights: learning rate of the kept weights, falling as ``lr`` does; None: weights stay as they are.
        weight_decay: of AdamW, of the weights that learn; it pulls them to 0.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    name = "straight-through"
    summary = "by the gradient of the masked weights, with a backward pass"
    options = (
        Option("lr", float, 0.3, "learning rate of the logits, falling to 0 over the steps", "LR"),
        Option("max_update", float, 2.0, "most that a step moves a logit", "L"),
        Option(
            "train_weights", float, None, "let the kept weights learn too, at this rate, falling as --lr does", "LR"
        ),
    )
    needs_gradients = True

    def __init__(
        self,
        lr: float = 0.3,
        steps: int | None = None,
        *,
        curvature: float = 1.0,
        max_update: float = 2.0,
        decay: float = 0.9,
        fisher_every: int = 16,
        train_weights: float | None = None,
        weight_decay: float = 0.0,
    ):
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
        self.lr = float(lr)
        self.steps = steps
        self.curvature = float(curvature)
        self.max_update = float(max_update)
        self.decay = float(decay)
        self.fisher_every = fisher_every
        self.train_weights = None if train_weights is None else float(train_weights)
        self.weight_decay = float(weight_decay)
        self._learners: dict[str, WeightLearner] = {}
        self._updaters: dict[str, LayerUpdater] = {}
        self._fisher = FisherSquares({}, self.decay)

    @classmethod
    def for_run(cls, steps: int, options: Mapping[str, object]) -> StraightThrough:
        return cls(steps=steps, **options)

    def begin(self, layers: Mapping[str, MaskedLinear]) -> None:
        if self.train_weights is not None:
            check_weights(layers)
            self._learners = {name: WeightLearner(layer, self.weight_decay) for name, layer in layers.items()}
        self._updaters = {name: LayerUpdater(layer, self, self._learners.get(name)) for name, layer in layers.items()}
        self._fisher = FisherSquares(layers, self.decay)

    def settings(self) -> dict:
        of_weights = ("train_weights", "weight_decay") if self.train_weights is not None else ()
        names = ("lr", "steps", "curvature", "max_update", "decay", "fisher_every", *of_weights)
        return {name: getattr(self, name) for name in names}

    def memory(self, weights: Sequence[Tensor], alone: bool) -> HeldBytes:
        trained = self.train_weights is not None
        count, largest = sum(map(Tensor.numel, weights)), max(weights, key=Tensor.numel)
        optimizer = stored = Amount.of(sum(map(len, weights)), "rows", 4)
        if trained:
            # moments in float32, and what 16 bits are rounded from; squares of Fisher passes
            apart = [weight.numel() for weight in weights if weight.dtype != torch.float32]
            optimizer += Amount.of(count, "weights that learn", 8) + Amount.of(sum(apart), "weights that learn", 4)
            stored += Amount.of(count, "weights that learn", 12)
        # float32 slopes, and as much of the gradients of weights that learn
        slopes = 8 if trained else 4
        gradients = Amount.of(largest.numel(), "weights of the largest layer", slopes + largest.itemsize)
        if not alone:
            gradients += Amount.of(count, "slopes", slopes)
        return HeldBytes(optimizer, gradients, stored)

    def state(self) -> dict:
        """The running mean square of the slopes of each layer that has had one above 0, and its Fisher passes."""
        squares = {name: updater.mean_square for name, updater in self._updaters.items()}
        squares = {name: square for name, square in squares.items() if square is not None}
        return {"mean_squares": squares, "fisher_passes": dict(self._fisher.passes)}

    def load_state(self, state: Mapping) -> None:
        for name, square in state["mean_squares"].items():
            self._updaters[name].mean_square = square
        self._fisher.passes.update(state["fisher_passes"])
        for learner in self._learners.values():
            learner.restore()

    def tensors(self) -> dict[str, Tensor]:
        """What Fisher passes have found; and of weights that learn themselves, their moments, and a count of steps."""
        learners = self._learners.items()
        found = {f"{kind}/{name}": tensor for name, of in learners for kind, tensor in of.tensors().items()}
        return found | {f"fisher/{name}": square for name, square in self._fisher.squares.items()}

    def step(self, step: Step) -> StepResult:
        """Move the logits by their slopes, in the last backward, which a loss that is not finite does not reach.

        Raises:
            ValueError: if a loss has no gradient, or not by the masks of the layers alone.
        """
        *others, last = places = [place for _, place in step.sharing.own]
        with step.drawing():
            fisher = self._fisher_squares(step)
            with self.attached(step.index, step.sharing.ranks, len(places), fisher) as backward_pass:
                for place in others:
                    backward_pass.backward(step.forward(place), float(step.weights[place]))
                loss = step.forward(last)
                (value,), alike = step.exchange(backward_pass.order(loss))
                if not math.isfinite(value):
                    return StepResult(value)
                step.begin_update()
                self._fisher.take(fisher)
                bad_layers = backward_pass.backward(loss, float(step.weights[last]), alike)
        return StepResult(value, bad_layers=tuple(bad_layers))

    def _fisher_squares(self, step: Step) -> dict[str, Tensor]:
        """Of the layers, by what is known and by the Fisher pass of this step where it is to have one."""
        if not hasattr(step.loss_fn, "fisher_loss"):
            return {}
        known = self._fisher.known()
        # a step whose loss is not finite takes no pass, and the next due one may be far
        return known if known and step.index % self.fisher_every else self._fisher.after_pass(step)

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self._falling(self.lr, step)

    def _falling(self, rate: float, step: int) -> float:
        return rate if self.steps is None else rate * max(1.0 - step / self.steps, 0.0)

    @contextmanager
    def attached(self, step: int, ranks: Ranks, batches: int, fisher: Mapping[str, Tensor]) -> Iterator[BackwardPass]:
        """With layers, those of ``begin``, whose logits move by the backward passes of a step, see ``BackwardPass``.

        Args:
            step: index of the step, from 0.
            ranks: over which slopes are summed.
            batches: how many passes this rank makes; others make as many.
            fisher: of layers whose curvature it tells, see ``FisherSquares``.
        """
        updaters = self._updaters.values()
        before = {updater.layer: updater.layer.logits_backward for updater in updaters}
        backward_pass = BackwardPass(self._updaters, ranks, batches)
        try:
            for name, updater in self._updaters.items():
                updater.layer.logits.grad = None
                weight_lr = self._falling(self.train_weights or 0.0, step)
                updater.begin(self.lr_at(step), weight_lr, backward_pass, fisher.get(name))
                updater.layer.logits_backward = updater
            backward_pass.watch()
            with backward_pass.offloaded:
                yield backward_pass
        finally:
            backward_pass.unwatch()
            for layer, own in before.items():
                layer.logits_backward = own
                layer.logits.grad = None
            for updater in updaters:
                updater.end()


class BackwardPass:
    """The forwards and backwards of a step, in turn; the last backward has moved all logits.

    On several ranks the slopes of a layer are summed up before it moves. Where each rank makes one pass, and all come
    to the same layers in the same order, that happens inside backward, in this order: a slope that comes ahead of its
    turn is held. All other slopes are held until backward has ended. So the slopes of two layers are never summed up
    for those of one, whichever way the backward of a rank goes.
    """

    def __init__(self, updaters: Mapping[str, LayerUpdater], ranks: Ranks, batches: int):
        self.updaters, self.ranks, self.batches, self.left = updaters, ranks, batches, batches
        self.hooks: list = []
        self.turns: collections.deque[LayerUpdater] = collections.deque()
        # backward comes by the last layers first
        self.offloaded = OffloadedLogits([updater.layer for updater in reversed(updaters.values())])
        # autograd has a thread for each device
        self.lock = threading.Lock()

    def watch(self) -> None:
        """Count how often a forward uses each layer."""
        for updater in self.updaters.values():
            updater.uses = 0
            self.hooks.append(updater.layer.register_forward_hook(updater.count))

    def unwatch(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    def order(self, loss: Tensor) -> float:
        """A number for the turns that the layers take in a backward of ``loss``: another one where they are others."""
        turns = []
        if self.ranks.world > 1 and self.batches == 1:
            reached = _reached(loss, self.updaters)
            times = collections.Counter(reached)
            turns = [name for name in reached if times[name] == 1 and self.updaters[name].uses <= 1]
        self.turns = collections.deque(self.updaters[name] for name in turns)
        # 48 bits, which a float64 holds
        return float(int.from_bytes(hashlib.blake2b(repr(turns).encode(), digest_size=6).digest(), "big"))

    def backward(self, loss: Tensor, weight: float = 1.0, alike: bool = True) -> list[str]:
        """Take the gradient of the loss of the last forward to the logits.

        Behind the last pass it gives the names of the layers in which a slope was not finite: the logits of its
        weights, and the running mean square of the layer, are as they were. Else none.

        Args:
            loss: 0-dim.
            weight: of its slopes in the sum over the passes of all ranks.
            alike: whether ``order`` has given the same on all ranks.

        Raises:
            ValueError: if no layer is reached, one is reached again after it has moved, or logits have a gradient by
                another way than their mask.
        """
        # what runs again from here on, to compute an activation anew, is no further use
        self.unwatch()
        self.left -= 1
        if not alike:
            self.turns.clear()
        for updater in self.updaters.values():
            updater.weight = weight
            updater.at_once = self.ranks.world == 1 and self.batches == 1 and updater.uses <= 1
        torch.autograd.backward(loss, inputs=[updater.layer.logits for updater in self.updaters.values()])
        if self.left:
            self.watch()
            return []
        self._finish()
        bad = _folded(self.updaters)
        elsewhere = [name for name, updater in self.updaters.items() if updater.layer.logits.grad is not None]
        if elsewhere:
            raise ValueError(f"loss_fn: expected a loss that logits reach by their masks alone, not so {elsewhere}")
        return bad

    def take_turns(self) -> None:
        """Move the layers whose turn has come."""
        with self.lock:
            while self.turns and self.turns[0].slopes is not None:
                self.turns.popleft().finish()

    def _finish(self) -> None:
        """Move the layers that backward has not moved, and that it has come to on any rank."""
        while self.turns:
            # other ranks may wait for it, though backward has not come to it on this one
            self.turns.popleft().finish()
        held = self.ranks.gather([updater.slopes is not None for updater in self.updaters.values()])
        # the last ones first, as backward comes by them, and as their logits are copied ahead
        for updater, *on_ranks in reversed(list(zip(self.updaters.values(), *held, strict=True))):
            if any(on_ranks):
                updater.finish()


def _reached(loss: Tensor, updaters: Mapping[str, LayerUpdater]) -> list[str]:
    """The layers that backward comes to, in its order, each as often as it does; of a reentrant checkpoint none."""
    names = {id(updater.layer.logits): name for name, updater in updaters.items()}
    ahead, seen, found = [loss.grad_fn], {None}, []
    while ahead:
        node = ahead.pop()
        if node in seen:
            continue
        seen.add(node)
        for source, _ in node.next_functions:
            name = names.get(id(getattr(source, "variable", None)))
            if name is None:
                ahead.append(source)
            else:
                # autograd takes what the forward did last first
                found.append((node._sequence_nr(), name))
    return [name for _, name in sorted(found, reverse=True)]


def _folded(updaters: Mapping[str, LayerUpdater]) -> list[str]:
    """Take the mean squares of a step into the running ones; names of the layers whose are not finite."""
    reached = {name: updater for name, updater in updaters.items() if updater.latest is not None}
    if not reached:
        raise ValueError(
            "loss_fn: expected a loss that a gradient takes to a masked layer, got none; checkpointed activations "
            "need use_reentrant=False"
        )
    # one transfer a device
    by_device: dict[torch.device, list[LayerUpdater]] = {}
    for updater in reached.values():
        by_device.setdefault(updater.latest.device, []).append(updater)
    for group in by_device.values():
        for updater, square in zip(group, torch.stack([d.latest for d in group]).tolist(), strict=True):
            updater.fold(square)
    return [name for name, updater in reached.items() if not updater.finite]


class LayerUpdater:
    """Moves the logits of one layer, inside backward or after it: see ``BackwardPass``.

    Attributes:
        moves_logits: see ``MaskedLinear``.
        mean_square: running mean square of the slope, None until a step has given one above 0.
        latest: that of the step, on the device; None where backward has not come by.
        uses: how often the forward of a pass has used the layer.
        fisher: of the layer, see ``FisherSquares``; None where the gradient itself tells the curvature.
        slopes: those summed up of the step, float32; None where there are none, and once the logits have moved by them.
        weight_grad: the weight's gradient, summed up likewise where the weights learn; else None.
        weight: of the slopes of a pass.
        at_once: whether the logits move by the slopes of a pass where these are computed, in one kernel.
    """

    moves_logits = True

    def __init__(self, layer: MaskedLinear, how: StraightThrough, learner: WeightLearner | None):
        self.layer, self.how, self.learner = layer, how, learner
        self.mean_square: float | None = None

    def begin(self, lr: float, weight_lr: float, backward_pass: BackwardPass, fisher: Tensor | None) -> None:
        self.lr, self.weight_lr, self.backward_pass, self.fisher = lr, weight_lr, backward_pass, fisher
        self.uses = 0
        self.latest: Tensor | None = None
        self.slopes: Tensor | None = None
        self.weight_grad: Tensor | None = None

    def count(self, layer: MaskedLinear, *_) -> None:
        # no backward comes by the logits of a dense forward
        if not layer.is_dense:
            self.uses += 1

    def __call__(self, grad: Tensor, x: Tensor, weight: Tensor, mask: MaskSource) -> None:
        how = self.how
        if self.latest is not None:
            raise ValueError(
                "loss_fn: expected a backward that comes to a layer as often as the forward uses it, got one that "
                "comes again after the layer has moved"
            )
        weight_grad = None if self.learner is None else torch.empty_like(weight, dtype=torch.float32)
        more = weight_grad, None if self.fisher is None else self.fisher / max(len(x), 1)
        if self.at_once:
            self.weight_grad = weight_grad
            of = grad, x, weight, how.curvature
            # the parameter itself: what autograd has kept may be a copy
            with self.backward_pass.offloaded.moving(self.layer) as logits:
                own = mask._replace(tensor=logits)
                self._descend(
                    logits, mask.codes, lambda rate: ops.straight_through_update_(*of, rate, how.max_update, own, *more)
                )
            return
        slope = ops.straight_through_grad(grad, x, weight, how.curvature, mask, *more)
        # of the slope, not of the loss: the curvature would take its square
        self.slopes = self._added(self.slopes, slope)
        self.weight_grad = self._added(self.weight_grad, weight_grad)
        self.backward_pass.take_turns()

    def _added(self, total: Tensor | None, of_pass: Tensor | None) -> Tensor | None:
        if of_pass is None:
            return total
        if self.weight != 1.0:
            of_pass.mul_(self.weight)
        return of_pass if total is None else total.add_(of_pass)

    def finish(self) -> None:
        """Move by the slopes that the passes of all ranks have summed up; this one may have none."""
        if self.slopes is None:
            self.slopes = torch.zeros_like(self.layer.weight, dtype=torch.float32)
            self.weight_grad = None if self.learner is None else torch.zeros_like(self.slopes)
        for total in (self.slopes, self.weight_grad):
            if total is not None:
                self.backward_pass.ranks.sum_(total)
        m, max_update, counter = self.layer.pattern.m, self.how.max_update, self.layer.counter()
        with self.backward_pass.offloaded.moving(self.layer) as logits:
            held = self.layer.held_codes
            self._descend(logits, held, lambda rate: ops.descend_(logits, self.slopes, rate, max_update, m, counter))
        self.slopes = None

    def end(self) -> None:
        """Free what a step has left, also one that broke off."""
        self.latest = self.slopes = self.weight_grad = self.backward_pass = self.fisher = None

    def _descend(self, logits: Tensor, codes: Tensor | None, descend: Callable[[Tensor], Tensor]) -> None:
        if self.learner is not None and codes is None:
            # ahead of the logits, by which the mask of the step is drawn
            of = self.layer.pattern.n, self.layer.pattern.m, 1.0, self.layer.counter()
            codes = ops.sample_mask(logits, *of)
        self.latest = descend_by_rms(descend, self.lr, self.mean_square, self.layer.weight.device)
        # a draw of the logits as they were
        self.layer.held = None
        if self.learner is not None:
            # behind the slope, which is taken at the weights of the forward
            self.learner.step(self.weight_grad, codes, self.weight_lr, self.latest)
            self.weight_grad = None

    def fold(self, square: float) -> None:
        self.finite = math.isfinite(square)
        self.mean_square = folded(self.mean_square, square, self.how.decay)
