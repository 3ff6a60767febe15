"""Estimators: from losses to steps of the logits, by one scalar a step or by the gradient of the masked weights."""

from __future__ import annotations

import hashlib
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from . import ops
from .functional import FLOAT32_MAX
from .modules import MaskedLinear
from .pattern import MaskSource
from .philox import MAX_DRAWS
from .ranks import Ranks

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
        draws: masks a step. Of several the advantage of each is its loss less the mean of the others', without
            residual and tracker.
        refresh: take new initial masks m_0, the top-N masks of the logits, behind a step whose loss is at most half of
            that under m_0. Each time costs a forward for every batch. With one draw.

    Attributes:
        taken: whether a trainer has it.
        delta: the tracker, a running mean of the residual.
        mean_square: the running mean of the squared advantage, None before the first step.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    def __init__(
        self,
        lr: float = 50.0,
        alpha: float = 0.99,
        tracker: str = "after",
        normalize: bool = False,
        draws: int = 1,
        refresh: bool = False,
    ):
        _check_float("lr", lr, 0.0, FLOAT32_MAX, strict=True)
        _check_float("alpha", alpha, 0.0, 1.0)
        if tracker not in ("after", "before"):
            raise ValueError(f'tracker: expected "after" or "before", got {tracker!r}')
        if not isinstance(normalize, bool):
            raise TypeError(f"normalize: expected a bool, got {normalize!r}")
        if isinstance(draws, bool) or not isinstance(draws, int) or not 1 <= draws <= MAX_DRAWS:
            raise ValueError(f"draws: expected an int in [1, {MAX_DRAWS}], got {draws!r}")
        if not isinstance(refresh, bool):
            raise TypeError(f"refresh: expected a bool, got {refresh!r}")
        if refresh and draws > 1:
            raise ValueError(f"refresh: expected False with several draws, which need no initial losses, got {refresh}")
        self.draws = draws
        self.refresh = refresh
        self.lr = float(lr)
        self.alpha = float(alpha)
        self.tracker = tracker
        self.normalize = normalize
        self.taken = False
        self.delta = 0.0
        self.mean_square: float | None = None

    def settings(self) -> dict:
        """What the class was given, as JSON can hold it."""
        return {name: getattr(self, name) for name in ("lr", "alpha", "tracker", "normalize", "draws", "refresh")}

    def advantage(self, residual: float) -> float:
        """The advantage of a residual; moves the tracker."""
        before = self.delta
        self.delta = self.alpha * self.delta + (1.0 - self.alpha) * residual
        advantage = residual - (before if self.tracker == "after" else self.delta)
        (normalized,) = self._normalized([advantage])
        return normalized

    def advantages(self, losses: Sequence[float], initial_loss: float = 0.0) -> list[float]:
        """The advantage of each of a step's draws; moves the tracker.

        Args:
            losses: under each draw, ``draws`` of them.
            initial_loss: of the same batch under the initial masks; without effect where there are several draws.
        """
        count = len(losses)
        if count == 1:
            return [self.advantage(losses[0] - initial_loss)]
        total = math.fsum(losses)
        return self._normalized([loss - (total - loss) / (count - 1) for loss in losses])

    def refreshes(self, loss: float, initial_loss: float) -> bool:
        """Whether the steps behind one with these losses are compared with new initial masks.

        Not with that step itself: a baseline that the draw decides would bias its update. Where the loss under the
        initial masks is not above 0, half of it is no less, and they stay.
        """
        return self.refresh and initial_loss > 0.0 and -math.inf < loss <= initial_loss / 2

    def _normalized(self, advantages: list[float]) -> list[float]:
        """Over their running root mean square and bounded, where asked for."""
        if not self.normalize:
            return advantages
        square = math.fsum(advantage * advantage for advantage in advantages) / len(advantages)
        old = square if self.mean_square is None else self.mean_square
        self.mean_square = self.alpha * old + (1.0 - self.alpha) * square
        scale = math.sqrt(self.mean_square)
        if scale == 0.0:
            return [0.0] * len(advantages)
        return [min(max(advantage / scale, -LARGEST_ADVANTAGE), LARGEST_ADVANTAGE) for advantage in advantages]


class StraightThrough:
    """Straight-through learning: the gradient of the masked weights tells each logit where to go.

    A mask is drawn, and backward gives the slope of the loss in it (``straight_through_gradient``). Every logit moves
    by -lr * slope / rms(slope), by at most ``largest``; rms is the root mean square over the layer, a running one of
    the steps before. That happens inside backward, layer by layer, where a layer is used once in a step: no gradient
    is held. A layer that is used several times moves once, after backward, by the sum of its slopes. So does every
    layer where a process takes several batches a step, and in a step whose losses do not come to the same layers on all
    ranks: a process then holds a float32 slope for each weight.

    Args:
        lr: how far a logit moves whose slope is the root mean square; falls linearly to 0 over ``steps``.
        steps: how many steps there will be, and no more; None: lr stays as it is.
        curvature: factor of the loss's second derivative in the slope. 1 fits losses that are a mean over tokens.
        largest: most that a logit moves in a step. A kept and a dropped weight start the gap apart, and change places
            after gap / (2 largest) steps at the soonest. Where that is one or two steps, a few weights with massive
            activations are dropped on the word of slopes that do not see how far the loss bends there.
        memory: share of the running mean square that a step leaves, in [0, 1).

    Attributes:
        taken: whether a trainer has it.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    def __init__(
        self,
        lr: float = 0.1,
        steps: int | None = None,
        *,
        curvature: float = 1.0,
        largest: float = 2.0,
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
        self.taken = False
        self._descents: dict[MaskedLinear, _Descent] = {}

    def settings(self) -> dict:
        """What the class was given, as JSON can hold it."""
        names = ("lr", "steps", "curvature", "largest", "memory")
        return {name: getattr(self, name) for name in names}

    def mean_squares(self, layers: Mapping[str, MaskedLinear]) -> dict[str, float]:
        """Running mean squares of the slopes by name of the layer, those that a step has given."""
        found = {name: self._descents[layer].mean_square for name, layer in layers.items() if layer in self._descents}
        return {name: square for name, square in found.items() if square is not None}

    def set_mean_squares(self, layers: Mapping[str, MaskedLinear], squares: Mapping[str, float]) -> None:
        """Go on with the ``mean_squares`` of another process."""
        for name, square in squares.items():
            self._descents.setdefault(layers[name], _Descent(layers[name], self)).mean_square = square

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self.lr if self.steps is None else self.lr * max(1.0 - step / self.steps, 0.0)

    @contextmanager
    def attached(self, layers: Mapping[str, MaskedLinear], step: int, ranks: Ranks, batches: int) -> Iterator[Passes]:
        """With layers whose logits move by the backward passes of a step, see ``Passes``.

        Args:
            layers: by name.
            step: index of the step, from 0.
            ranks: over which slopes are summed.
            batches: how many passes this rank makes; others make as many.
        """
        descents = {name: self._descents.setdefault(layer, _Descent(layer, self)) for name, layer in layers.items()}
        before = {layer: layer.logits_backward for layer in layers.values()}
        passes = Passes(descents, ranks, batches)
        try:
            for layer, descent in zip(layers.values(), descents.values(), strict=True):
                layer.logits.grad = None
                descent.begin(self.lr_at(step), passes)
                layer.logits_backward = descent
            passes.watch()
            yield passes
        finally:
            passes.unwatch()
            for layer, own in before.items():
                layer.logits_backward = own
                layer.logits.grad = None
            for descent in descents.values():
                descent.end()


class Passes:
    """The forward and backward passes of a step, in turn; the last backward has moved all logits.

    On several ranks the slopes of a layer are summed up before it moves. Where each rank makes one pass, and all come
    to the same layers in the same order, that happens inside backward, in this order: a slope that comes ahead of its
    turn is held. All other slopes are held until backward has ended. So the slopes of two layers are never summed up
    for those of one, whichever way the backward of a rank goes.
    """

    def __init__(self, descents: Mapping[str, _Descent], ranks: Ranks, batches: int):
        self.descents, self.ranks, self.batches, self.left = descents, ranks, batches, batches
        self.counters: list = []
        self.turns: deque[_Descent] = deque()
        # autograd has a thread for each device
        self.lock = threading.Lock()

    def watch(self) -> None:
        """Count how often a forward uses each layer."""
        for descent in self.descents.values():
            descent.uses = 0
            self.counters.append(descent.layer.register_forward_hook(descent.count))

    def unwatch(self) -> None:
        for counter in self.counters:
            counter.remove()
        self.counters.clear()

    def way(self, loss: Tensor) -> float:
        """A number for the turns that the layers take in a backward of ``loss``: another one where they are others."""
        turns = []
        if self.ranks.world > 1 and self.batches == 1:
            reached = _reached(loss, self.descents)
            times = Counter(reached)
            turns = [name for name in reached if times[name] == 1 and self.descents[name].uses <= 1]
        self.turns = deque(self.descents[name] for name in turns)
        # 48 bits, which a float64 holds
        return float(int.from_bytes(hashlib.blake2b(repr(turns).encode(), digest_size=6).digest(), "big"))

    def backward(self, loss: Tensor, weight: float = 1.0, alike: bool = True) -> list[str]:
        """Take the gradient of the loss of the last forward to the logits.

        Behind the last pass it gives the names of the layers in which a slope was not finite: the logits of its
        weights, and the running mean square of the layer, are as they were. Else none.

        Args:
            loss: 0-dim.
            weight: of its slopes in the sum over the passes of all ranks.
            alike: whether ``way`` has given the same on all ranks.

        Raises:
            ValueError: if no layer is reached, one is reached again after it has moved, or logits have a gradient by
                another way than their mask.
        """
        # what runs again from here on, to compute an activation anew, is no further use
        self.unwatch()
        self.left -= 1
        if not alike:
            self.turns.clear()
        for descent in self.descents.values():
            descent.weight = weight
            descent.at_once = self.ranks.world == 1 and self.batches == 1 and descent.uses <= 1
        torch.autograd.backward(loss, inputs=[descent.layer.logits for descent in self.descents.values()])
        if self.left:
            self.watch()
            return []
        self._finish()
        bad = _folded(self.descents)
        elsewhere = [name for name, descent in self.descents.items() if descent.layer.logits.grad is not None]
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
        held = self.ranks.gather([descent.slopes is not None for descent in self.descents.values()])
        for descent, *on_ranks in zip(self.descents.values(), *held, strict=True):
            if any(on_ranks):
                descent.finish()


def _reached(loss: Tensor, descents: Mapping[str, _Descent]) -> list[str]:
    """The layers that backward comes to, in its order, each as often as it does; of a reentrant checkpoint none."""
    names = {id(descent.layer.logits): name for name, descent in descents.items()}
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


def _folded(descents: Mapping[str, _Descent]) -> list[str]:
    """Take the mean squares of a step into the running ones; names of the layers whose are not finite."""
    reached = {name: descent for name, descent in descents.items() if descent.latest is not None}
    if not reached:
        raise ValueError(
            "loss_fn: expected a loss that a gradient takes to a masked layer, got none; checkpointed activations "
            "need use_reentrant=False"
        )
    # one transfer a device
    by_device: dict[torch.device, list[_Descent]] = {}
    for descent in reached.values():
        by_device.setdefault(descent.latest.device, []).append(descent)
    for group in by_device.values():
        for descent, square in zip(group, torch.stack([d.latest for d in group]).tolist(), strict=True):
            descent.fold(square)
    return [name for name, descent in reached.items() if not descent.finite]


class _Descent:
    """Moves the logits of one layer, inside backward or after it: see ``Passes``.

    Attributes:
        moves_logits: see ``MaskedLinear``.
        mean_square: running mean square of the slope, None until a step has given one above 0.
        latest: that of the step, on the device; None where backward has not come by.
        uses: how often the forward of a pass has used the layer.
        slopes: those summed up of the step, float32; None where there are none, and once the logits have moved by them.
        weight: of the slopes of a pass.
        at_once: whether the logits move by the slopes of a pass where these are computed, in one kernel.
    """

    moves_logits = True

    def __init__(self, layer: MaskedLinear, how: StraightThrough):
        self.layer = layer
        self.how = how
        self.mean_square: float | None = None

    def begin(self, lr: float, passes: Passes) -> None:
        self.lr, self.passes = lr, passes
        self.uses = 0
        self.latest: Tensor | None = None
        self.slopes: Tensor | None = None

    def count(self, *_) -> None:
        self.uses += 1

    def __call__(self, grad: Tensor, x: Tensor, weight: Tensor, mask: MaskSource) -> None:
        how = self.how
        if self.latest is not None:
            raise ValueError(
                "loss_fn: expected a backward that comes to a layer as often as the forward uses it, got one that "
                "comes again after the layer has moved"
            )
        if self.at_once:
            # the parameter itself: what autograd has kept may be a copy
            with self.layer.moving_logits() as logits:
                mask = mask._replace(tensor=logits)
                self._descend(
                    lambda rate: ops.straight_through_update_(grad, x, weight, how.curvature, rate, how.largest, *mask)
                )
            return
        slope = ops.straight_through_grad(grad, x, weight, how.curvature, *mask)
        if self.weight != 1.0:
            # of the slope, not of the loss: the curvature would take its square
            slope.mul_(self.weight)
        self.slopes = slope if self.slopes is None else self.slopes.add_(slope)
        self.passes.take_turns()

    def finish(self) -> None:
        """Move by the slopes that the passes of all ranks have summed up; this one may have none."""
        if self.slopes is None:
            self.slopes = torch.zeros_like(self.layer.weight, dtype=torch.float32)
        self.passes.ranks.sum_(self.slopes)
        counter = self.layer.counter()
        m, largest, seed_and_step = self.layer.pattern.m, self.how.largest, (counter["seed"], counter["step"])
        shard = (counter["layer"], counter["group_offset"], counter["group_row_stride"])
        with self.layer.moving_logits() as logits:
            self._descend(lambda rate: ops.descend_(logits, self.slopes, rate, largest, m, *seed_and_step, *shard))
        self.slopes = None

    def end(self) -> None:
        """Free what a step has left, also one that broke off."""
        self.latest = self.slopes = self.passes = None

    def _descend(self, descend: Callable[[Tensor], Tensor]) -> None:
        def at_rate(rate: float) -> Tensor:
            return descend(torch.full((), rate, dtype=torch.float32, device=self.layer.weight.device))

        square = self.mean_square
        if square is None:
            # at a rate of 0 nothing moves
            square = float(at_rate(0.0))
        usable = math.isfinite(square) and square > 0.0
        self.latest = at_rate(min(self.lr / math.sqrt(square), FLOAT32_MAX) if usable else 0.0)

    def fold(self, square: float) -> None:
        self.finite = math.isfinite(square)
        if not self.finite or square == 0.0:
            return
        old = square if self.mean_square is None else self.mean_square
        self.mean_square = self.how.memory * old + (1.0 - self.how.memory) * square
