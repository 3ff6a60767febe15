"""The protocol of estimators, which turn the losses of masks into updates of the logits, and of weights that learn.

The trainer and the run folder use nothing of an estimator but this protocol. To add an estimator, derive a class from
``Estimator`` and pass an object of it to ``MaskTrainer``.
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

from ..functional.checks import FLOAT32_MAX, LARGEST_GAP, describe
from ..modules import MaskedLinear, evaluating, without_gradients
from ..ops.layer_groups import Uses
from .model_masks import ModelMasks
from .step_batches import count_tokens, weighted_mean, weights_of

LossFn = Callable[[nn.Module, object], Tensor]


@dataclass(frozen=True)
class StepRecord:
    """Numbers of one step.

    Attributes:
        step: index of the step, from 0.
        loss: loss under the masks of the step, drawn or fixed: the mean over draws of the mean over batches, weighted
            by ``weights_of``.
        residual: that loss less the loss of the same batches under the initial masks; None if the estimator has none.
        advantage: the residual less the tracker, or None.
        tracker: the running mean of the residual after the step, or None.
        flip_rate: share of the groups whose draw differs from the top-N mask, in one layer, another at each step; 0
            where masks are fixed.
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
    """Result of an estimator's step.

    Attributes:
        loss: under the masks of the step. If it is not finite, the step has changed nothing.
        residual, advantage, tracker: as in ``StepRecord``.
        bad_layers: names of layers whose gradient was not finite; their logits have not moved, or only in part, and
            their weights not at all.
        refreshes: true if the top-N masks of the logits after this step become the initial masks.
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
    """Draw of a step: its id, the loss under it, and the factor of its score in the update."""

    id: int
    loss: float
    coef: float


@dataclass(frozen=True)
class Entry:
    """Journal entry of a step; it determines the update.

    Attributes:
        step: index of the step, from 0.
        tokens: of its batches.
        initial_loss: loss of its batches under the initial masks, weighted like those of the draws.
        draws: the draws of the step.
        skipped: true if no logits moved because a loss was not finite.
    """

    step: int
    tokens: int
    initial_loss: float
    draws: tuple[Draw, ...]
    skipped: bool = False


@torch.inference_mode()
def replay(masks: ModelMasks, seed: int, entry: Entry) -> None:
    """Apply the update of a step, in the step itself or to replay it; the logits must be those before the step."""
    if entry.skipped:
        return
    # in one call: all scores are taken at the logits before the step, which are rounded once
    ids, _, coefs = zip(*entry.draws, strict=True)
    masks.score_update_(coefs, draw=ids, seed=seed, step=entry.step)


class Estimator(ABC):
    """Base class of estimators, which update logits and weights from the losses of masks. An object serves one trainer.

    The definition of a class that lacks a part of the protocol raises TypeError.

    Attributes:
        name: stored in runs; a run resumes with an estimator of the same name.
        needs_gradients: whether steps run backward. Logits then require gradients, and checkpointed blocks compute
            their activations again. Each backward of several draws must run within its own ``Step.drawing``: torch
            refuses it later. False: steps run in inference mode.
        needs_flips: whether only masks that a draw has changed teach it. A gap that no draw crosses is then refused.
        needs_initial_losses: whether steps use the loss under the initial masks, computed before the first step.
        journaled: whether the journal entry of a step determines its update. Each step then passes its entry to
            ``Step.begin_update``. A resumed run rebuilds the steps after the last snapshot by ``recall``; without a
            journal it takes them again.
        draws: number of masks drawn in a step.
        steps: number of steps allowed; None: any.
        taken: whether a trainer uses it.
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
            raise TypeError(f"{cls.__name__}: expected a method recall, which runs with a journal need, got none")
        if cls.journaled and cls.tensors is not Estimator.tensors:
            raise TypeError(
                f"{cls.__name__}: expected no tensors of its own, which a journal cannot rebuild, got a method"
            )

    def begin(self, layers: Mapping[str, MaskedLinear]) -> None:  # noqa: B027
        """Prepare for a model's layers, by name: once before the first step, and again after a failed resume."""

    @abstractmethod
    def step(self, step: Step) -> StepResult:
        """Make the forwards of a step and move logits and weights, the same way on all ranks.

        Call ``step.begin_update`` right before the first of them moves. An error before that must leave them and the
        state unchanged.
        """

    @property
    def max_logit_travel(self) -> float:
        """Widest gap between a kept and a dropped logit that all steps together can cross; 0 if masks are fixed."""
        return LARGEST_GAP if self.needs_flips else math.inf

    @property
    def usual_logit_travel(self) -> float:
        """Widest gap that all steps together cross with slopes of the usual size, at most ``max_logit_travel``."""
        return self.max_logit_travel

    @abstractmethod
    def settings(self) -> dict:
        """Settings of its runs, as JSON returns them. A run resumes only with the same settings."""

    def state(self) -> dict:
        """Numbers that steps change, as JSON returns them."""
        return {}

    def load_state(self, state: Mapping) -> None:  # noqa: B027
        """Restore the ``state`` of another process; its ``tensors`` are restored before."""

    def tensors(self) -> dict[str, Tensor]:
        """Tensors other than the logits that steps change, by name. Snapshots contain them.

        ``begin`` must create them; their shapes and dtypes never change. A resumed run restores their values in place.
        An estimator with a journal has none: logits and ``state`` are enough to resume it.
        """
        return {}

    def learned_weights(self) -> dict[str, str]:
        """For each layer whose weight learns, the name of that weight in float32 among ``tensors``."""
        return {}

    def layers_without_gradient(self) -> list[str]:
        """Names of the layers that have had no finite gradient other than 0 in any step."""
        return []

    def recall(self, entry: Entry) -> StepResult:
        """Result of a step by its journal entry; changes the ``state`` as the step did, and no logits."""
        raise NotImplementedError


class Step:
    """One step of an estimator: forwards under drawn or fixed masks, then one update.

    Each rank makes all draws, for its share of the batches. An estimator without gradients calls ``losses``. One with
    gradients runs the forwards of ``own`` by ``forward`` within ``drawing``; ``exchange`` then returns the losses of
    all ranks. The backward of a loss must run within the ``drawing`` of its forward. ``drawing`` sets the draw of all
    layers in place, and torch refuses a backward after that ("modified by an inplace operation").

    Attributes:
        index: of the step, from 0.
        seed, model, loss_fn, ranks: those of the trainer.
        batches: of the step.
        weights: weights of the batches' losses in their mean, by tokens.
        tokens: elements of the batches' input ids.
        masks: of all layers, see ``ModelMasks``.
        layers: the masked layers by name.
        own: the forwards of this rank, as (draw, index of the batch in the step).
    """

    def __init__(self, trainer, batches: Sequence, initial_loss: Callable, begin_update: Callable):
        self.index = trainer.steps_done
        self.seed = trainer.seed
        self.ranks = trainer.ranks
        self.batches = batches
        self.model = trainer.model
        self.loss_fn = trainer.loss_fn
        self.masks = trainer.masks
        self.layers = trainer.layers
        self.weights = weights_of(batches)
        self.tokens = sum(map(count_tokens, batches))
        self._estimator = trainer.estimator
        draws = range(trainer.estimator.draws)
        ranks = trainer.ranks
        self._by_rank = []
        for rank in range(ranks.world_size):
            places = range(rank, len(batches), ranks.world_size)
            self._by_rank.append([(draw, place) for draw in draws for place in places])
        self.own = self._by_rank[ranks.rank]
        self._initial_loss = initial_loss
        self._begin_update = begin_update
        self._losses: list[float] = []
        self._flip_rate: float | None = None
        self._updates = 0

    @property
    def flip_rate(self) -> float:
        """Share of the groups whose draw differs from the top-N mask, in one layer, another at each step."""
        if self._flip_rate is None:
            self._flip_rate = self.masks.flip_rate(list(self.layers)[self.index % len(self.layers)])
        return self._flip_rate

    def initial_loss(self) -> float:
        """Loss of the step's batches under the initial masks."""
        return self._initial_loss(self.batches, self.weights)

    def losses(self) -> list[float]:
        """Loss of each draw, by forward passes alone; not finite if the loss of a batch is not."""
        with without_gradients(self.model):
            for draw, pairs in groupby(self.own, key=itemgetter(0)):
                with self.drawing(draw):
                    for _, place in pairs:
                        self.forward(place)
        losses, _ = self.exchange()
        return losses

    @contextmanager
    def drawing(self, draw: int = 0) -> Iterator[None]:
        """Set all masked layers to one of the step's draws, and other modules to eval mode; run backward within it.

        Masks may be drawn once for all uses. So inside no logits may move, except those of a layer in its last
        backward.
        """
        # without gradients no activation is kept
        with modes_of_step(self.model, self.layers, drawing=True, checkpointing=torch.is_grad_enabled()):
            if draw:
                # of the first draw, before the others
                _ = self.flip_rate
            tokens = [count_tokens(self.batches[place]) for place_draw, place in self.own if place_draw == draw]
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

    @contextmanager
    def fixing(self) -> Iterator[None]:
        """Set modes as ``drawing`` does, for masks that are not drawn: the estimator sets those of all layers."""
        self._flip_rate = 0.0
        with modes_of_step(self.model, self.layers, drawing=True, checkpointing=True):
            yield

    def forward(self, place: int) -> Tensor | float:
        """Compute the loss of the step's batch at index ``place``; its value is kept for ``exchange``."""
        loss = self.loss_fn(self.model, self.batches[place])
        if torch.is_grad_enabled() and not (isinstance(loss, Tensor) and loss.requires_grad):
            raise ValueError(f"loss_fn: expected a loss with a gradient, got {describe(loss)}")
        self._losses.append(value_of(loss))
        return loss

    def exchange(self, order: float = 0.0) -> tuple[list[float], bool]:
        """Return (loss of each draw, whether ``order`` is equal on all ranks); call it after this rank's forwards."""
        losses_of_rank = self._losses
        self._losses = []
        rows = self.ranks.all_gather_numbers([self.index, self.flip_rate, order, *losses_of_rank])
        for name, column in (("step", 0), ("flip rate", 1)):
            differing = {rank: row[column] for rank, row in enumerate(rows) if row[column] != rows[0][column]}
            if differing:
                raise RuntimeError(
                    f"ranks: expected the {name} of rank 0 on all of them, {rows[0][column]:g}, got by rank {differing}"
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

        An estimator with a journal passes the ``entry`` that determines the update. It is written to disk before a
        logit moves, so that a run that is killed in between resumes from it. OSError if it cannot be written.
        """
        # before the logits of the draw move
        _ = self.flip_rate
        if self._estimator.journaled and entry is None:
            raise ValueError("entry: expected a journal entry from an estimator with a journal, got None")
        self._begin_update(entry)
        self._updates += 1

    def check_updates(self) -> None:
        if self._estimator.journaled and self._updates != 1:
            raise ValueError(
                f"estimator: expected one call of begin_update in each step, for the journal, got "
                f"{self._updates} in step {self.index}"
            )


def top_n_loss(model: nn.Module, layers: Mapping[str, MaskedLinear], loss_fn: LossFn, batch) -> float:
    with without_gradients(model), modes_of_step(model, layers, drawing=False):
        return value_of(loss_fn(model, batch))


@contextmanager
def modes_of_step(
    model: nn.Module, layers: Mapping[str, MaskedLinear], drawing: bool, checkpointing: bool = False
) -> Iterator[None]:
    """Make masked layers draw, or use their top-N masks, and others as in ``evaluating``; restore all afterwards."""
    with evaluating(model, checkpointing):
        for layer in layers.values():
            layer.train(drawing)
            if layer.shard is not None:
                # otherwise only some ranks would gather a layer that FSDP2 keeps gathered
                layer.shard.reshard()
        yield


def value_of(loss: Tensor | float) -> float:
    """Value of a loss; ValueError unless it is a number."""
    if not (loss.numel() == 1 if isinstance(loss, Tensor) else isinstance(loss, Real)):
        raise ValueError(f"loss_fn: expected a 0-dim tensor or a number, got {describe(loss)}")
    return float(loss.detach() if isinstance(loss, Tensor) else loss)


def check_float(name: str, value: float, low: float, high: float = FLOAT32_MAX, strict: bool = False) -> None:
    """Raise TypeError or ValueError unless ``value`` is a number in [low, high], or with ``strict`` above ``low``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a float, got {describe(value)}")
    if not low <= value <= high or strict and value == low:
        least = "above" if strict else "of at least"
        most = f" and at most {high:g}" if high < FLOAT32_MAX else ""
        raise ValueError(f"{name}: expected a float {least} {low:g}{most}, got {value}")


def check_whole(name: str, value: int, low: int, high: int | None = None) -> None:
    """Raise TypeError or ValueError unless ``value`` is an int of at least ``low``, and at most ``high`` if given."""
    expected = f"of at least {low}" if high is None else f"in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int {expected}, got {describe(value)}")
    if value < low or high is not None and value > high:
        raise ValueError(f"{name}: expected an int {expected}, got {value}")
