"""The protocol of estimators: an estimator turns the losses of drawn masks into updates of the logits, step by step.

The trainer and the run folder know estimators by this protocol alone. A new one is a class that derives from
``Estimator``, and ``MaskTrainer`` takes its objects.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from numbers import Real
from operator import itemgetter
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..fsdp import without_gradients
from ..functional.checks import FLOAT32_MAX, LARGEST_GAP, describe
from ..modules import MaskedLinear, evaluating
from ..ops.layer_groups import Uses
from .batches import count_tokens, weighted_mean, weights_of
from .masks import ModelMasks

LossFn = Callable[[nn.Module, object], Tensor]


@dataclass(frozen=True)
class StepRecord:
    """The numbers of one step.

    Attributes:
        step: index of the step, from 0.
        loss: loss under the drawn masks: of several batches the mean by ``weights_of``, of several draws their mean.
        residual: that loss less the loss of the same batches under the initial masks.
        advantage: the residual less the tracker.
        tracker: the running mean of the residual after the step. Each of the three is None where the estimator gives
            none.
        flip_rate: share of the groups of one layer, another at each step, whose draw left the top-N mask.
        tokens: elements of the batches' input ids.
        seconds: wall-clock time of the step.
    """

    step: int
    loss: float
    residual: float | None
    advantage: float | None
    tracker: float | None
    flip_rate: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class StepResult:
    """The result of an estimator's step.

    Attributes:
        loss: under the drawn masks. Where it is not finite, the step has moved nothing.
        residual, advantage, tracker: as in ``StepRecord``.
        bad_layers: names of layers whose gradient was not finite; their logits have not moved, or in part.
        refreshes: true where the initial masks become those of the logits that the step has left.
    """

    loss: float
    residual: float | None = None
    advantage: float | None = None
    tracker: float | None = None
    bad_layers: tuple[str, ...] = ()
    refreshes: bool = False

    def record(self, step: int, tokens: int, flip_rate: float, seconds: float) -> StepRecord:
        return StepRecord(step, self.loss, self.residual, self.advantage, self.tracker, flip_rate, tokens, seconds)


class Draw(NamedTuple):
    """A draw of a step: its id, the loss under it, and the factor of its score in the update."""

    id: int
    loss: float
    coef: float


@dataclass(frozen=True)
class Entry:
    """The entry of a step in the journal, from which its update follows.

    Attributes:
        step: index of the step, from 0.
        tokens: of its batches.
        initial_loss: loss of its batches under the initial masks, weighted as those of the draws.
        draws: the draws of the step.
        skipped: true where no logits moved, since a loss was not finite.
    """

    step: int
    tokens: int
    initial_loss: float
    draws: tuple[Draw, ...]
    skipped: bool = False


@torch.inference_mode()
def replay(masks: ModelMasks, seed: int, entry: Entry) -> None:
    """Move the logits by the update of a step, in the step itself or again; they are as they were then."""
    if entry.skipped:
        return
    # together: all scores are those of the logits before the step, and they are rounded once
    ids, _, coefs = zip(*entry.draws, strict=True)
    masks.score_update_(coefs, draw=ids, seed=seed, step=entry.step)


class Estimator(ABC):
    """How the logits move by the losses of drawn masks. An object serves one trainer.

    A class that lacks a part of the protocol raises TypeError as it is defined.

    Attributes:
        name: of its runs; one that is resumed has the same.
        needs_gradients: whether steps run backward. Logits then require gradients, and blocks whose activations are
            checkpointed compute them anew. Of several draws, each backward has to come within its own ``Step.drawing``:
            behind it torch refuses the backward. Else steps run in inference mode.
        needs_flips: whether it learns from masks alone that a draw has changed. A gap that no draw crosses is refused.
        needs_initial_losses: whether steps ask for the loss under the initial masks; it is computed before the first.
        journaled: whether the update of a step follows from its entry in the journal. Every step then gives one to
            ``Step.begin_update``. Where a run goes on, the steps behind the last snapshot are rebuilt by ``recall``;
            without a journal they are taken again.
        draws: masks drawn in a step.
        steps: how many steps there may be; None: any number.
        taken: whether a trainer has it.
    """

    name: ClassVar[str]
    needs_gradients: ClassVar[bool] = False
    needs_flips: ClassVar[bool] = False
    journaled: ClassVar[bool] = False
    needs_initial_losses: bool = False
    draws: int = 1
    steps: int | None = None
    taken: bool = False

    def __init_subclass__(cls, **arguments) -> None:
        super().__init_subclass__(**arguments)
        if not hasattr(cls, "name"):
            raise TypeError(f"{cls.__name__}: expected a name, got none")
        if cls.journaled and cls.recall is Estimator.recall:
            raise TypeError(f"{cls.__name__}: expected a method recall, since its runs have a journal, got none")
        if cls.journaled and cls.tensors is not Estimator.tensors:
            raise TypeError(
                f"{cls.__name__}: expected no tensors of its own, since a journal rebuilds none, got a method"
            )

    def begin(self, layers: Mapping[str, MaskedLinear]) -> None:  # noqa: B027
        """Prepare for the layers of a model, by name: once before the first step, and anew where resuming failed."""

    @abstractmethod
    def step(self, step: Step) -> StepResult:
        """Make the forwards of a step and move the logits, the same way on all ranks.

        It calls ``step.begin_update`` right before the first logit moves. What it raises before that leaves logits and
        state as they were.
        """

    @property
    def max_logit_travel(self) -> float:
        """The widest gap between a kept and a dropped logit across which its steps, all together, change a mask."""
        return LARGEST_GAP if self.needs_flips else math.inf

    @abstractmethod
    def settings(self) -> dict:
        """The settings of its runs, as JSON gives them back. A run goes on with the same ones alone."""

    def state(self) -> dict:
        """The numbers that steps have left, as JSON gives them back."""
        return {}

    def load_state(self, state: Mapping) -> None:  # noqa: B027
        """Go on with the ``state`` of another process, whose ``tensors`` are there by then."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that steps change beside the logits, by name. Snapshots hold them.

        Where a run goes on, they get their values back in place. They have to be there after ``begin``, of the shapes
        and dtypes that they keep. An estimator with a journal has none: it goes on by logits and ``state`` alone.
        """
        return {}

    def recall(self, entry: Entry) -> StepResult:
        """The result of a step, by its entry in the journal; moves the ``state`` as the step did, and no logits."""
        raise NotImplementedError


class Step:
    """A step that an estimator takes: forwards under drawn masks, then one update of the logits.

    Each rank makes all draws, for its share of the batches. An estimator that needs no gradients calls ``losses``.
    Another one makes the forwards of ``own`` itself, by ``forward`` within ``drawing``, and ``exchange`` then gives the
    losses of all ranks. The backward of a loss has to come within the ``drawing`` of its forward: that sets the draw of
    all layers in place, and once it is another one, torch refuses the backward ("modified by an inplace operation").

    Attributes:
        index: of the step, from 0.
        seed, model, loss_fn, ranks: those of the trainer.
        batches: of the step.
        weights: of the batches' losses in their mean, by tokens.
        tokens: elements of the batches' input ids.
        masks: of all layers, see ``ModelMasks``.
        layers: the masked layers by name.
        own: the forwards that this rank makes, as (draw, which of the step's batches).
    """

    def __init__(self, trainer, batches: Sequence, initial_loss: Callable, begin_update: Callable):
        self.index, self.seed, self.ranks, self.batches = trainer.steps_done, trainer.seed, trainer.ranks, batches
        self.model, self.loss_fn, self.masks = trainer.model, trainer.loss_fn, trainer.masks
        self.layers, self.weights, self.tokens = trainer.layers, weights_of(batches), sum(map(count_tokens, batches))
        self._estimator, draws, ranks = trainer.estimator, range(trainer.estimator.draws), trainer.ranks
        self._by_rank = [
            [(draw, place) for draw in draws for place in range(rank, len(batches), ranks.world)]
            for rank in range(ranks.world)
        ]
        self.own = self._by_rank[ranks.rank]
        self._initial_loss, self._begin_update = initial_loss, begin_update
        self._losses: list[float] = []
        self._flip_rate: float | None = None
        self._updates = 0

    @property
    def flip_rate(self) -> float:
        """Share of the groups whose draw leaves the top-N mask, in the layer whose turn it is."""
        if self._flip_rate is None:
            self._flip_rate = self.masks.flip_rate(list(self.layers)[self.index % len(self.layers)])
        return self._flip_rate

    def initial_loss(self) -> float:
        """The loss of the step's batches under the initial masks."""
        return self._initial_loss(self.batches, self.weights)

    def losses(self) -> list[float]:
        """The loss of each draw, by forward passes alone; not finite where that of a batch is not."""
        with without_gradients(self.model):
            for draw, pairs in groupby(self.own, key=itemgetter(0)):
                with self.drawing(draw):
                    for _, place in pairs:
                        self.forward(place)
        losses, _ = self.exchange()
        return losses

    @contextmanager
    def drawing(self, draw: int = 0) -> Iterator[None]:
        """With masked layers that make one of the step's draws, and all else in eval mode; backward comes within it.

        Masks may be drawn once for all uses, so no logits move here but by that backward, behind which their layer is
        not used again.
        """
        # without gradients no activation is kept
        with modes_of_step(self.model, self.layers, drawing=True, checkpointing=torch.is_grad_enabled()):
            if draw:
                # that of the first one, ahead of the others
                _ = self.flip_rate
            tokens = [count_tokens(self.batches[place]) for own, place in self.own if own == draw]
            gradients = torch.is_grad_enabled()
            uses = Uses(
                tokens=max(tokens, default=0),
                products=len(tokens) * (2 if gradients else 1),
                slopes=len(tokens) if gradients else 0,
                updates=int(not gradients and self._estimator.draws == 1),
            )
            with self.masks.drawn(draw, uses):
                _ = self.flip_rate
                yield

    def forward(self, place: int) -> Tensor | float:
        """The loss of the batch at that place in the step, whose value is noted for ``exchange``."""
        loss = self.loss_fn(self.model, self.batches[place])
        if torch.is_grad_enabled() and not (isinstance(loss, Tensor) and loss.requires_grad):
            raise ValueError(f"loss_fn: expected a loss with a gradient, got {describe(loss)}")
        self._losses.append(value_of(loss))
        return loss

    def exchange(self, order: float = 0.0) -> tuple[list[float], bool]:
        """(loss of every draw, true where ``order`` is the same on all ranks), once this rank has made its forwards."""
        own, self._losses = self._losses, []
        rows = self.ranks.gather([self.index, self.flip_rate, order, *own])
        for name, at in (("step", 0), ("flip rate", 1)):
            others = {rank: row[at] for rank, row in enumerate(rows) if row[at] != rows[0][at]}
            if others:
                raise RuntimeError(
                    f"ranks: expected the {name} of rank 0 on all of them, {rows[0][at]:g}, got by rank {others}"
                )
        losses = {}
        for pairs, (_, _, _, *row) in zip(self._by_rank, rows, strict=True):
            losses |= zip(pairs, row, strict=True)
        means = [
            weighted_mean([losses[draw, place] for place in range(len(self.batches))], self.weights)
            for draw in range(self._estimator.draws)
        ]
        return means, all(row[2] == order for row in rows)

    def begin_update(self, entry: Entry | None = None) -> None:
        """Prepare for the update, right before the first logit moves.

        An estimator with a journal gives the ``entry`` that the update follows from. It is on disk before a logit
        moves: a run that is killed in between takes the update from there. OSError if it cannot be written.
        """
        # while the logits are those of the draw
        _ = self.flip_rate
        if self._estimator.journaled and entry is None:
            raise ValueError("entry: expected one from an estimator whose runs have a journal, got None")
        self._begin_update(entry)
        self._updates += 1

    def check_updates(self) -> None:
        if self._estimator.journaled and self._updates != 1:
            raise ValueError(
                f"estimator: expected one call of begin_update in each step, since its runs have a journal, got "
                f"{self._updates} in step {self.index}"
            )


def top_n_loss(model: nn.Module, layers: Mapping[str, MaskedLinear], loss_fn: LossFn, batch) -> float:
    with without_gradients(model), modes_of_step(model, layers, drawing=False):
        return value_of(loss_fn(model, batch))


@contextmanager
def modes_of_step(
    model: nn.Module, layers: Mapping[str, MaskedLinear], drawing: bool, checkpointing: bool = False
) -> Iterator[None]:
    """Masked layers draw or take their top-N masks, everything else is in eval mode; restored afterwards.

    With ``checkpointing`` modules whose ``gradient_checkpointing`` is true are in training mode themselves: only then
    they compute their activations anew in backward.
    """
    with evaluating(model):
        for layer in layers.values():
            layer.train(drawing)
            if layer.shard is not None:
                # else a layer that FSDP2 keeps gathered would be gathered anew where it is used, by some ranks alone
                layer.shard.reshard()
        for module in model.modules():
            if checkpointing and getattr(module, "gradient_checkpointing", False):
                module.training = True
        yield


def value_of(loss: Tensor | float) -> float:
    """The number that a ``loss_fn`` gives; ValueError unless it is one."""
    if not (loss.numel() == 1 if isinstance(loss, Tensor) else isinstance(loss, Real)):
        raise ValueError(f"loss_fn: expected a 0-dim tensor or a number, got {describe(loss)}")
    return float(loss.detach() if isinstance(loss, Tensor) else loss)


def check_float(name: str, value: float, low: float, high: float = FLOAT32_MAX, strict: bool = False) -> None:
    """Raise TypeError or ValueError unless ``value`` is a number in [low, high], or with ``strict`` above ``low``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__} {value!r}")
    if not low <= value <= high or strict and value == low:
        least, most = "above" if strict else "of at least", f" and at most {high:g}" if high < FLOAT32_MAX else ""
        raise ValueError(f"{name}: expected a float {least} {low:g}{most}, got {value}")


def check_whole(name: str, value: int, low: int, high: int | None = None) -> None:
    """Raise TypeError or ValueError unless ``value`` is an int of at least ``low``, and at most ``high`` if given."""
    expected = f"of at least {low}" if high is None else f"in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int {expected}, got {type(value).__name__} {value!r}")
    if value < low or high is not None and value > high:
        raise ValueError(f"{name}: expected an int {expected}, got {value}")
