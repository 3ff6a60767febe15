"""Runs of Weights & Biases, named and configured as those of transformers' Trainer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ..extras import require
from ..files import make_folder, write_whole
from .scalars import Tracker

STEP = "train/global_step"


def check_login() -> None:
    """Log in where runs go online, which may ask for a key on a terminal; ValueError if that fails."""
    require("maskpro_kernels.report", "wandb")
    import wandb

    if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
        return
    cure = "run `wandb login`, or set WANDB_MODE=offline"
    try:
        logged_in = wandb.login()
    except wandb.Error as error:
        raise ValueError(f"expected a key that Weights & Biases takes, got none: {error}; {cure}") from error
    if not logged_in:
        raise ValueError(f"expected a key that Weights & Biases takes, got none; {cure}")


class WandB(Tracker):
    """A run of Weights & Biases. Another process that goes on with the run goes on with the same one there.

    The environment variables of wandb hold, such as WANDB_PROJECT, by default "huggingface", WANDB_NAME and WANDB_MODE.

    Args:
        folder: of the run; wandb keeps its files in ``wandb`` in it, with the id of its run.
        settings: of the run, shown beside it.
        steps_done: how many steps the run has taken.

    Raises:
        ModuleNotFoundError: if wandb, of the extra of that name, is not installed.
        OSError: if the folder cannot be written, or wandb cannot begin.
    """

    def __init__(self, folder: str | Path, settings: Mapping, steps_done: int):
        super().__init__(steps_done)
        require("maskpro_kernels.report", "wandb")
        import wandb

        known = Path(folder) / "wandb" / "run-id"
        again = {"resume": "allow", "id": known.read_text(encoding="utf-8")} if known.is_file() else {}
        try:
            self._run = wandb.init(
                project=os.getenv("WANDB_PROJECT", "huggingface"), dir=str(folder), config=dict(settings), **again
            )
        except wandb.Error as error:
            raise OSError(f"expected Weights & Biases to begin a run, got: {error}") from error
        if not again:
            make_folder(known.parent)
            write_whole(known, self._run.id.encode())
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP, step_sync=True)

    def write(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, STEP: step})

    def close(self, failed: bool = False) -> None:
        self._run.finish(exit_code=int(failed))
