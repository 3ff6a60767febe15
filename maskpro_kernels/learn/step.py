"""A step of a run: what an estimator is given for it, and what is recorded of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from numbers import Real
from operator import itemgetter

import torch
from torch import Tensor, nn

from ..fsdp import without_gradients
from ..functional.checks import describe
from ..modules import MaskedLinear, evaluating
from ..ops.layer_groups import Uses
from .batches import count_tokens, weights_of
from .journal import Entry
from .model_masks import ModelMasks
from .sharing import Sharing

LossFn = Callable[[nn.Module, object], Tensor]


@dataclass(frozen=True)
class StepRecord:
    """What one step saw.

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


class Step:
    """A step that an estimator takes: forwards under drawn masks, then one update of the logits.

    An estimator that needs no gradients calls ``losses``. Another one makes the forwards of ``sharing.own`` itself, by
    ``forward`` within ``drawing``, and ``exchange`` then gives the losses of all ranks. The backward of a loss has to
    come within the ``drawing`` of its forward: that sets the draw of all layers in place, and once it is another one,
    torch refuses the backward ("modified by an inplace operation").

    Attributes:
        index: of the step, from 0.
        seed: of the run's draws.
        batches: of the step.
        weights: of the batches' losses in their mean, by tokens.
        tokens: elements of the batches' input ids.
        model, loss_fn: those of the trainer.
        masks: of all layers, see ``ModelMasks``.
        layers: the masked layers by name.
        sharing: which forwards this rank makes.
    """

    def __init__(
        self,
        index: int,
        batches: Sequence,
        model: nn.Module,
        masks: ModelMasks,
        loss_fn: LossFn,
        *,
        seed: int,
        sharing: Sharing,
        journaled: bool,
        initial_loss: Callable[[Sequence, Sequence[Fraction]], float],
        begin_update: Callable[[Entry | None], None],
    ):
        self.index, self.seed, self.batches, self.sharing = index, seed, batches, sharing
        self.masks, self.layers = masks, masks.layers
        self.weights = weights_of(batches)
        self.tokens = sum(map(count_tokens, batches))
        self.model, self.loss_fn = model, loss_fn
        self._initial_loss, self._begin_update = initial_loss, begin_update
        self._own: list[float] = []
        self._flip_rate: float | None = None
        self._journaled, self._entries = journaled, 0

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
            for draw, pairs in groupby(self.sharing.own, key=itemgetter(0)):
                with self.drawing(draw):
                    for _, place in pairs:
                        self.forward(place)
        losses, _ = self.exchange()
        return losses

    @contextmanager
    def drawing(self, draw: int = 0) -> Iterator[None]:
        """With masked layers that make one of the step's draws, and all else in eval mode.

        The backward of a loss has to come within it as well, see ``Step``. Masks may be drawn once for all that is in
        it, so no logits move here but by that backward, behind which their layer is not used again.
        """
        # without gradients no activation is kept
        with modes_of_step(self.model, self.layers, drawing=True, checkpointing=torch.is_grad_enabled()):
            if draw:
                # that of the first one, ahead of the others
                _ = self.flip_rate
            with self.masks.drawn_for(self._uses(draw), draw):
                _ = self.flip_rate
                yield

    def _uses(self, draw: int) -> Uses:
        """What takes the masks of a draw on this rank."""
        tokens = [count_tokens(self.batches[place]) for own, place in self.sharing.own if own == draw]
        gradients = torch.is_grad_enabled()
        return Uses(
            tokens=max(tokens, default=0),
            products=len(tokens) * (2 if gradients else 1),
            slopes=len(tokens) if gradients else 0,
            updates=int(not gradients and self.sharing.draws == 1),
        )

    def forward(self, place: int) -> Tensor | float:
        """The loss of the batch at that place in the step, whose value is noted for ``exchange``.

        Raises:
            ValueError: if the loss is no number, or has no gradient where one is asked for.
        """
        loss = self.loss_fn(self.model, self.batches[place])
        if torch.is_grad_enabled() and not (isinstance(loss, Tensor) and loss.requires_grad):
            raise ValueError(f"loss_fn: expected a loss with a gradient, got {describe(loss)}")
        self._own.append(value_of(loss))
        return loss

    def exchange(self, order: float = 0.0) -> tuple[list[float], bool]:
        """(loss of every draw, whether ``order`` is the same on all ranks), once this rank has made its forwards.

        Raises:
            RuntimeError: if the ranks are not at the same step, or have not drawn the same.
        """
        own, self._own = self._own, []
        return self.sharing.exchange(self.index, own, self.weights, self.flip_rate, order)

    def begin_update(self, entry: Entry | None = None) -> None:
        """What comes right before the first logit moves.

        Args:
            entry: of an estimator with a journal, what the update follows from. It is on disk before a logit moves: a
                run that is killed in between takes the update from there.

        Raises:
            ValueError: if the estimator has a journal and gives no entry.
            OSError: if the entry cannot be written; it is not in the journal then.
        """
        # while the logits are those of the draw
        _ = self.flip_rate
        if self._journaled and entry is None:
            raise ValueError("entry: expected one from an estimator whose runs have a journal, got None")
        self._begin_update(entry)
        self._entries += 1

    def check_entries(self) -> None:
        """Raise ValueError unless the step, once it is taken, has one entry in the journal of a run that has one."""
        if self._journaled and self._entries != 1:
            raise ValueError(
                f"estimator: expected one call of begin_update in each step, since its runs have a journal, got "
                f"{self._entries} in step {self.index}"
            )


def loss_under_top_n_masks(model: nn.Module, layers: Mapping[str, MaskedLinear], loss_fn: LossFn, batch) -> float:
    """A forward under the masks that the logits have made likeliest."""
    with without_gradients(model), modes_of_step(model, layers, drawing=False):
        return value_of(loss_fn(model, batch))


@contextmanager
def modes_of_step(
    model: nn.Module, layers: Mapping[str, MaskedLinear], drawing: bool, checkpointing: bool = False
) -> Iterator[None]:
    """Masked layers draw or take their top-N masks, everything else is in eval mode; restored afterwards.

    Args:
        checkpointing: whether modules whose ``gradient_checkpointing`` is true are in training mode themselves, since
            only then they compute their activations anew in backward.
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
