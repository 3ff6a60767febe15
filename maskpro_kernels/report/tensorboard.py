"""Event files of TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..extras import require
from .scalars import Tracker


class TensorBoard(Tracker):
    """Event files of a run, each value on disk as soon as it is known.

    A folder may hold what another process wrote of the same run: this one goes on behind it, and TensorBoard hides what
    is there of steps that are taken again.

    Args:
        folder: where the event files go, made if missing.
        steps_done: how many steps the run has taken.

    Raises:
        ModuleNotFoundError: if tensorboard, of the extra of that name, is not installed.
        OSError: if the folder cannot be written.
    """

    def __init__(self, folder: str | Path, steps_done: int):
        super().__init__(steps_done)
        require("maskpro_kernels.report", "tensorboard")
        # seconds to import
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder, purge_step=steps_done)

    def write(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self, failed: bool = False) -> None:
        self._writer.close()
