"""What a run's steps saw, for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..training.step import StepRecord


class Scalars:
    """Event files of a run, each value on disk as soon as it is known.

    A folder may hold what another process wrote of the same run: this one goes on behind it, and TensorBoard hides what
    is there of steps that are taken again.

    Args:
        folder: where the event files go, made if missing.
        steps_done: how many steps the run has taken.
        held_out: the held-out perplexities so far, see ``add``.

    Raises:
        ModuleNotFoundError: if tensorboard, of the extra of that name, is not installed.
        OSError: if the folder cannot be written.
    """

    def __init__(self, folder: str | Path, steps_done: int, held_out: Sequence[Mapping]):
        # seconds to import, and optional
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder, purge_step=steps_done)
        self._unwritten = steps_done
        self._add_held_out(held_out)

    def add(self, record: StepRecord, held_out: Sequence[Mapping]) -> None:
        """Write what a step saw, and the held-out perplexities that are new.

        Args:
            record: of the step; what is None there is left out.
            held_out: all of them in order, {"step": steps taken before, "perplexity": ...} each.
        """
        values = {
            "loss": record.loss,
            "residual": record.residual,
            "advantage": record.advantage,
            "tracker": record.tracker,
            "flip_rate": record.flip_rate,
            "tokens_per_second": record.tokens / record.seconds,
        }
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, record.step)
        self._add_held_out(held_out)

    def close(self) -> None:
        self._writer.close()

    def _add_held_out(self, rows: Sequence[Mapping]) -> None:
        for row in rows:
            # those before were written by the process that found them, or a call ago
            if row["step"] >= self._unwritten:
                self._writer.add_scalar("held_out_perplexity", row["perplexity"], row["step"])
                self._unwritten = row["step"] + 1
        self._writer.flush()
