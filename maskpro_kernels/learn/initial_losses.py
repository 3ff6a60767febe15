"""Losses of the batches under the initial masks m_0: what the residuals of a run are taken from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property

from tqdm import tqdm

from ..ranks import Ranks
from .batches import content


class InitialLosses:
    """The loss of every batch under m_0, the same on all ranks. A batch is known again by what is in it.

    Args:
        batches: those of the run; later they may stand in another order. None: they are not known beforehand.
        ranks: of the run, which share the forwards.
        in_step: whether a forward takes all ranks at once, as in a model whose rows they share.

    Attributes:
        losses: by the index of the batch at the first step; None where they are not known, as at first and where m_0
            has become another.
    """

    def __init__(self, batches: Sequence | None, ranks: Ranks, in_step: bool = False):
        self.losses: list[float] | None = None
        self._batches = batches
        self._ranks = ranks
        self._in_step = in_step

    @cached_property
    def _contents(self) -> list[str]:
        """What tells a batch from others, by its index at the first step."""
        return self._contents_now()

    def _contents_now(self) -> list[str]:
        return [content(batch, index) for index, batch in enumerate(self._batches)]

    def computed(self, loss_of: Callable[[object], float], steps_done: int, progress: bool) -> list[float]:
        """What ``losses`` has to be, by a forward for each batch that is not the same as another.

        The ranks wait for each other's forward as for those of a step.

        Args:
            loss_of: gives the loss of a batch under the masks m_0 of now.
            steps_done: how many steps have been taken.
            progress: whether to show a bar.

        Raises:
            ValueError: if a batch of the first step is gone, or batches are not known beforehand.
            FloatingPointError: if a loss is not finite.
        """
        if self._batches is None:
            raise ValueError(
                "estimator: expected needs_initial_losses to be true of one that asks for the loss under the initial "
                "masks of batches that are no sequence, got False"
            )
        index_of = {}
        for index, name in enumerate(self._contents_now() if steps_done else self._contents):
            index_of.setdefault(name, index)
        gone = [index for index, name in enumerate(self._contents) if name not in index_of]
        if gone:
            raise ValueError(f"batches: expected those of the first step, got others in place of {gone}")
        names, world, found = list(index_of), self._ranks.world, {}
        hidden = not progress or self._ranks.rank > 0
        for first in tqdm(range(0, len(names), world), desc="initial losses", unit="batch", disable=hidden):
            by_rank = names[first : first + world]
            own = by_rank[self._ranks.rank : self._ranks.rank + 1]
            taken = own or (by_rank[:1] if self._in_step else [])
            # a rank without a batch has a part in it, too
            rows = self._ranks.gather([loss_of(self._batches[index_of[name]]) for name in taken] or [math.nan])
            found |= {name: loss for name, (loss,) in zip(by_rank, rows, strict=False)}
        losses = [found[name] for name in self._contents]
        bad = [index for index, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad:
            raise FloatingPointError(f"loss under the initial masks: expected finite numbers, batches {bad} give none")
        return losses

    def of(self, batches: Sequence, first: int) -> list[float]:
        """Losses of the batches of a step, which stand one behind the other from index ``first`` on, round and round.

        Raises:
            ValueError: if one is none of the first step's.
        """
        known = dict(zip(self._contents, self.losses, strict=True))
        found = []
        for place, batch in enumerate(batches):
            index = (first + place) % len(self._batches)
            loss = known.get(content(batch, index))
            if loss is None:
                raise ValueError(f"batches: expected those of the first step, got another one at index {index}")
            found.append(loss)
        return found
