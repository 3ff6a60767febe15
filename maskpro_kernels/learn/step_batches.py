"""Batches of a run: digests of their content, the batches of a step, and losses under the initial masks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cached_property

import numpy as np
from torch import Tensor
from tqdm import tqdm

from ..files import SIZE, digest
from ..ranks import Ranks


def content(batch, index: int) -> str:
    """Digest of tensors, arrays, None, strings, bytes and numbers, in lists and mappings by strings or ints.

    For a batch with other objects: a digest of its tensors, and its index.
    """
    tensors = []
    descriptions = []

    def plain(part) -> bool:
        """Add the content of a part; return whether all of it can be compared."""
        if isinstance(part, Mapping):
            names = sorted(part, key=str)
            descriptions.append(f"mapping {names!r}")
            return all([plain(part[name]) and isinstance(name, (str, int)) for name in names])
        if isinstance(part, (tuple, list)):
            # the length, so that [1, [2]] and [[1], 2] differ
            descriptions.append(f"list {len(part)}")
            return all([plain(element) for element in part])
        if isinstance(part, (np.ndarray, np.generic)) and not part.dtype.hasobject:
            values = hashlib.blake2b(part.tobytes(), digest_size=SIZE).hexdigest()
            descriptions.append(f"array {part.dtype.str} {part.shape} {values}")
            return True
        if isinstance(part, Tensor):
            tensors.append(part)
            descriptions.append("tensor")
            return True
        is_plain = part is None or isinstance(part, (str, bytes, int, float))
        descriptions.append(repr(part) if is_plain else "")
        return is_plain

    is_plain = plain(batch)
    of_tensors = digest(tensors)
    if not is_plain:
        return f"batch {index} {of_tensors}"
    return hashlib.blake2b(" ".join([of_tensors, *descriptions]).encode(), digest_size=SIZE).hexdigest()


def weights_of(batches: Sequence) -> list[Fraction]:
    """Weights of the losses of a step's batches: shares of their ``loss_tokens``, or equal weights without tokens."""
    tokens = [loss_tokens(batch) for batch in batches] if len(batches) > 1 else [1]
    if not any(tokens):
        tokens = [1] * len(batches)
    return [Fraction(count, sum(tokens)) for count in tokens]


def weighted_mean(losses: Sequence[float], weights: Sequence[Fraction]) -> float:
    """Mean, rounded correctly and so the same in any order; NaN if one of several losses is not finite."""
    if len(losses) == 1:
        return losses[0]
    if not all(map(math.isfinite, losses)):
        return math.nan
    return float(sum(Fraction(loss) * weight for loss, weight in zip(losses, weights, strict=True)))


def loss_tokens(batch) -> int:
    """Number of tokens in a batch's mean loss: labels other than -100, ones of the attention mask, or all tokens."""
    if isinstance(batch, Mapping):
        if isinstance(batch.get("labels"), Tensor):
            return int((batch["labels"] != -100).sum())
        if isinstance(batch.get("attention_mask"), Tensor):
            return int((batch["attention_mask"] != 0).sum())
    return count_tokens(batch)


def count_tokens(batch) -> int:
    """Number of a batch's input ids: elements of the tensor, of "input_ids", or of the first element."""
    if isinstance(batch, Mapping):
        batch = batch["input_ids"] if "input_ids" in batch else next(iter(batch.values()), None)
    elif isinstance(batch, (tuple, list)):
        batch = batch[0] if batch else None
    return batch.numel() if isinstance(batch, Tensor) else 0


class BatchCycle:
    """Batches of a sequence in order and again from the start, ``accumulate`` a step."""

    def __init__(self, sequence: Sequence, accumulate: int):
        self.sequence = sequence
        self._accumulate = accumulate

    def of_step(self, step: int) -> list:
        first = step * self._accumulate
        return [self.sequence[(first + place) % len(self.sequence)] for place in range(self._accumulate)]

    def digest_before(self, step: int) -> None:
        """None: the settings of a run have digests of all batches of a sequence."""

    def skip(self, steps: int, digest: None, progress: bool) -> None:
        """Do nothing: the index of a step gives its batches."""


class BatchStream:
    """Batches of an iterable, ``accumulate`` a step, and a digest of those taken; the same on all ranks.

    An iterable that can start again, such as a DataLoader, does so at its end.
    """

    sequence = None

    def __init__(self, batches: Iterable, accumulate: int, ranks: Ranks):
        self._batches = batches
        self._accumulate = accumulate
        self._ranks = ranks
        self._iterator: Iterator | None = None
        self._step = -1
        self._taken = []
        self._count = 0
        self._before = self._after = ""

    def of_step(self, step: int) -> list:
        """Batches of the next step, or of the last one again; ValueError if there are no more."""
        batches = self._ranks.run_on_all(self._of_step, step)
        self._ranks.agree({"batches": self._after})
        return batches

    def _of_step(self, step: int) -> list:
        if step != self._step:
            taken = [self._next() for _ in range(self._accumulate)]
            self._before = self._after
            self._step = step
            self._taken = taken
            for place, batch in enumerate(taken):
                name = f"{self._after} {content(batch, step * self._accumulate + place)}"
                self._after = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
        return self._taken

    def digest_before(self, step: int) -> str:
        """Digest of all batches before those of a step, the next or the last one."""
        return self._before if step == self._step else self._after

    def skip(self, steps: int, digest: str, progress: bool) -> None:
        """Skip the batches of the first ``steps`` steps; ValueError if their digest is another."""
        for step in tqdm(range(steps), desc="skipped batches", unit="step", disable=not progress):
            self._of_step(step)
        if self.digest_before(steps) != digest:
            raise ValueError(
                f"batches: expected those of the run's first {steps} steps, in order, got others; pass an iterable "
                "that starts with the same batches, such as a DataLoader whose generator has the same seed"
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
                    f"batches: expected one for each step, got an iterator that ended after {self._count}; pass an "
                    "iterable that can start again, such as a DataLoader"
                )
            self._iterator = None
        raise ValueError("batches: expected at least one batch, got none")


class InitialLosses:
    """Loss of each batch under the initial masks m_0, the same on all ranks. Batches are compared by ``content``.

    ``losses`` are in the order of the batches at the first step; None until they are computed for the current m_0. With
    ``together`` all ranks take part in each forward, as in a model whose rows are cut over them.
    """

    def __init__(self, batches: Sequence | None, ranks: Ranks, together: bool):
        self.losses: list[float] | None = None
        self._batches = batches
        self._ranks = ranks
        self._together = together

    @cached_property
    def _contents(self) -> list[str]:
        return [content(batch, index) for index, batch in enumerate(self._batches)]

    def compute(self, loss_of: Callable[[object], float], steps_done: int, progress: bool) -> list[float]:
        """Compute ``losses``, by ``loss_of`` once for each distinct batch."""
        if self._batches is None:
            raise ValueError(
                "estimator: expected needs_initial_losses=True, since it asks for the loss under the initial masks and "
                "batches are not a sequence, got False"
            )
        names = self._contents
        if steps_done:
            # their order may have changed
            names = [content(batch, index) for index, batch in enumerate(self._batches)]
        index_of = {}
        for index, name in enumerate(names):
            index_of.setdefault(name, index)
        gone = [index for index, name in enumerate(self._contents) if name not in index_of]
        if gone:
            raise ValueError(f"batches: expected those of the first step, got others instead of {gone}")
        names = list(index_of)
        world = self._ranks.world_size
        by_content = {}
        hidden = not progress or not self._ranks.is_main_process
        for first in tqdm(range(0, len(names), world), desc="initial losses", unit="batch", disable=hidden):
            by_rank = names[first : first + world]
            names_of_rank = by_rank[self._ranks.rank : self._ranks.rank + 1]
            # a rank without a batch takes part in the forwards of the others
            taken = names_of_rank or (by_rank[:1] if self._together else [])
            losses_of_rank = [loss_of(self._batches[index_of[name]]) for name in taken]
            rows = self._ranks.all_gather_numbers(losses_of_rank or [math.nan])
            by_content |= {name: loss for name, (loss,) in zip(by_rank, rows, strict=False)}
        losses = [by_content[name] for name in self._contents]
        bad = [index for index, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad:
            raise FloatingPointError(
                f"loss under the initial masks: expected finite numbers, got others of batches {bad}"
            )
        return losses

    def of(self, batches: Sequence, first: int) -> list[float]:
        """Losses of the batches of a step, which start at index ``first`` of the sequence."""
        by_content = dict(zip(self._contents, self.losses, strict=True))
        losses = []
        for place, batch in enumerate(batches, first):
            index = place % len(self._batches)
            losses.append(by_content.get(content(batch, index)))
            if losses[-1] is None:
                raise ValueError(f"batches: expected those of the first step, got another one at index {index}")
        return losses
