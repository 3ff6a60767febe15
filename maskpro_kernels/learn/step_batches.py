"""Which batches a step takes: those of a sequence in turn, or one by one those of what is no sequence."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

from torch import Tensor
from tqdm import tqdm

from ..ranks import Ranks
from .batches import content
from .estimator import Estimator


class BatchCycle:
    """The batches of a sequence in their order, round and round.

    Args:
        sequence: of batches.
        accumulate: batches a step.
    """

    def __init__(self, sequence: Sequence, accumulate: int):
        self.sequence, self._accumulate = sequence, accumulate

    def of_step(self, step: int) -> list:
        """The batches of a step."""
        first = step * self._accumulate
        return [self.sequence[(first + place) % len(self.sequence)] for place in range(self._accumulate)]

    def digest_before(self, step: int) -> None:
        """None: the settings of a run tell all batches of a sequence."""

    def skip(self, steps: int, digest: None, progress: bool) -> None:
        """Nothing: each step finds its batches by its index."""


class BatchStream:
    """The batches of an iterable by steps, and a digest by which it is known whether another one gives the same.

    What can be gone through again, as a DataLoader, begins anew where it ends.

    Args:
        batches: gives them.
        accumulate: batches a step.
        ranks: all take the same batches.
    """

    sequence = None

    def __init__(self, batches: Iterable, accumulate: int, ranks: Ranks):
        self._batches, self._accumulate, self._ranks = batches, accumulate, ranks
        self._iterator: Iterator | None = None
        self._step, self._taken = -1, []
        self._count = 0
        self._before = self._after = ""

    def of_step(self, step: int) -> list:
        """The batches of a step, which is the next one, or the last one again.

        Raises:
            ValueError: if there are no more, or other ranks have others.
        """
        batches = self._ranks.all_of(lambda: self._of_step(step))
        self._ranks.agree({"batches": self._after})
        return batches

    def _of_step(self, step: int) -> list:
        if step != self._step:
            taken = [self._next() for _ in range(self._accumulate)]
            self._before, self._step, self._taken = self._after, step, taken
            for place, batch in enumerate(taken):
                name = f"{self._after} {content(batch, step * self._accumulate + place)}"
                self._after = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
        return self._taken

    def digest_before(self, step: int) -> str:
        """Of all batches in front of those of a step, which is the next one, or the last one."""
        return self._before if step == self._step else self._after

    def skip(self, steps: int, digest: str, progress: bool) -> None:
        """Take the batches of that many steps from the first on, and let them go.

        Args:
            digest: that they have to have.
            progress: whether to show a bar.

        Raises:
            ValueError: if there are fewer, or others.
        """
        for step in tqdm(range(steps), desc="batches of the steps before", unit="step", disable=not progress):
            self._of_step(step)
        if self.digest_before(steps) != digest:
            raise ValueError(
                f"batches: expected those that the run has taken in its {steps} steps, in their order, got others; "
                "give what begins where the run began, such as a DataLoader whose generator has the same seed"
            )

    def _next(self) -> object:
        for _ in range(2):
            if self._iterator is None:
                self._iterator = iter(self._batches)
            for batch in self._iterator:
                self._count += 1
                return batch
            if self._iterator is self._batches:
                raise ValueError(
                    f"batches: expected one for each step to come, got an iterator that is used up behind "
                    f"{self._count}; give what can be gone through again, such as a DataLoader"
                )
            self._iterator = None
        raise ValueError("batches: expected at least one batch, got none")


def check_batches(batches: object) -> None:
    """Raise TypeError unless it gives batches; a tensor or a mapping is one of them.

    Raises:
        ValueError: if there are none.
    """
    if not isinstance(batches, Iterable) or isinstance(batches, (str, bytes, Mapping, Tensor)):
        raise TypeError(
            f"batches: expected an iterable of batches, such as a list or a DataLoader, got {type(batches).__name__}"
        )
    if isinstance(batches, Sequence) and not len(batches):
        raise ValueError("batches: expected at least one batch, got none")


def batches_of_steps(
    batches: Iterable, estimator: Estimator, accumulate: int, ranks: Ranks
) -> BatchCycle | BatchStream:
    """Those of a sequence in turn; of another iterable one by one, or in a list where all are needed beforehand.

    Raises:
        ValueError: if it is to be a list, and how long is not known, or there are none.
    """
    if isinstance(batches, Sequence):
        return BatchCycle(batches, accumulate)
    if not (estimator.needs_initial_losses or estimator.journaled):
        return BatchStream(batches, accumulate, ranks)
    if estimator.steps is None:
        raise ValueError(
            f"estimator: expected one that tells how many steps there are, as {type(estimator).__name__}(steps=1000), "
            "since it takes the batches of all steps before the first one and these are no sequence, got steps=None"
        )
    found = list(islice(batches, estimator.steps * accumulate))
    check_batches(found)
    return BatchCycle(found, accumulate)
