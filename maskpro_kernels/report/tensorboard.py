"""What a run's steps saw, for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..extras import require
from ..training.step import StepRecord


class Scalars:
    """Event files of a run, each value on disk as soon as it is known.

    A folder may hold what another process wrote of the same run: this one goes on behind it, and TensorBoard hides what
    is there of steps that are taken again.

    Args:
        folder: where the event files go, made if missing.
        steps_done: how many steps the run has taken.
        validation: the validation perplexities so far, see ``add``.

    Raises:
        ModuleNotFoundError: if tensorboard, of the extra of that name, is not installed.
        OSError: if the folder cannot be written.
    """

    def __init__(self, folder: str | Path, steps_done: int, validation: Sequence[Mapping]):
        require("maskpro_kernels.report", "tensorboard")
        # seconds to import
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder, purge_step=steps_done)
        self._unwritten = steps_done
        self._add_validation(validation)

    def add(self, record: StepRecord, validation: Sequence[Mapping]) -> None:
        """Write what a step saw, and the validation perplexities that are new.

        Args:
            record: of the step; what is None there is left out.
            validation: all of them in order, {"step": steps taken before, "perplexity": ...} each.
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
        self._add_validation(validation)

    def close(self) -> None:
        self._writer.close()

    def _add_validation(self, rows: Sequence[Mapping]) -> None:
        for row in rows:
            # those before were written by the process that found them, or a call ago
            if row["step"] >= self._unwritten:
                self._writer.add_scalar("validation_perplexity", row["perplexity"], row["step"])
                self._unwritten = row["step"] + 1
        self._writer.flush()
