"""What a run's steps saw, by the names under which trackers of experiments show it.

The names are those of transformers' Trainer: ``train/`` before what a step saw, ``eval/`` before what was evaluated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from ..learn.step import StepRecord


def scalars_of(record: StepRecord) -> dict[str, float]:
    """What a step saw, by name; what is None there is left out."""
    values = {
        "train/loss": record.loss,
        "train/residual": record.residual,
        "train/advantage": record.advantage,
        "train/tracker": record.tracker,
        "train/flip_rate": record.flip_rate,
        "train/tokens_per_second": record.tokens / record.seconds,
    }
    return {name: value for name, value in values.items() if value is not None}


class Tracker(ABC):
    """Takes up what the steps of a run saw; a context that closes it.

    Args:
        steps_done: how many steps the run had taken. Another process may have written of them; perplexities before are
            left out.
    """

    def __init__(self, steps_done: int):
        self._unwritten = steps_done

    def add(self, record: StepRecord, validation: Sequence[Mapping]) -> None:
        """Write what a step saw, and the validation perplexities that are new.

        Args:
            record: of the step.
            validation: all of them in order, {"step": steps taken before, "perplexity": ...} each.
        """
        self.write(scalars_of(record), record.step)
        self.add_validation(validation)

    def add_validation(self, rows: Sequence[Mapping]) -> None:
        """Write the perplexities that are new."""
        for row in rows:
            # those before were written by the process that found them, or a call ago
            if row["step"] >= self._unwritten:
                self.write({"eval/perplexity": row["perplexity"]}, row["step"])
                self._unwritten = row["step"] + 1
        self.flush()

    @abstractmethod
    def write(self, values: Mapping[str, float], step: int) -> None:
        """Take up values by name."""

    def flush(self) -> None:  # noqa: B027
        """Have what was written where it is read."""

    @abstractmethod
    def close(self, failed: bool = False) -> None:
        """Write what is left.

        Args:
            failed: whether an error has ended the run.
        """

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        self.close(failed=kind is not None)
