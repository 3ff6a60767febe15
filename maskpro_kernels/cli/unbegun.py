"""What a run leaves that ended before its first step: known as such, it makes room for the same command again."""

from __future__ import annotations

import re
from pathlib import Path

from filelock import FileLock, Timeout

from ..files import discard, unfinished, unfinished_tensors
from ..learn.journal import read as read_journal
from ..learn.run_folder import JOURNAL, LOCK, METRICS
from ..learn.snapshots import snapshots_in, step_of
from .run_files import INITIAL_MASK, PROGRESS, SETTINGS, START_WEIGHTS, TEACHER, VALIDATION
from .run_samples import SAMPLES


def ended_unbegun(output: Path) -> bool:
    """Whether a folder holds nothing but what a run leaves that ended before its first step."""
    progress, left = output / PROGRESS, set(output.rglob("*"))
    teacher = progress / TEACHER
    known = {progress, progress / SAMPLES, *_unresumable(output), teacher, *teacher.rglob("*")}
    return progress in left and left <= known and not _holds_a_run(output)


def clear_unbegun(output: Path) -> None:
    """Remove what ``begin`` of a run has left that ended before its first step. Samples and the dense model's logits
    stay, they are gone on with.

    A folder that holds a run, or that another process is at, stays as it is.
    """
    progress = output / PROGRESS
    if not progress.is_dir():
        return
    try:
        with FileLock(progress / LOCK, blocking=False):
            if not _holds_a_run(output):
                for left in filter(Path.exists, _unresumable(output)):
                    discard(left)
    except Timeout:
        return


def _holds_a_run(output: Path) -> bool:
    """Whether a run in the folder can be resumed, or has learned something."""
    progress = output / PROGRESS
    if (output / SETTINGS).exists() or (progress / METRICS).exists():
        return True
    if any(step_of(path) > 0 for path in snapshots_in(progress)):
        return True
    try:
        return (progress / JOURNAL).exists() and bool(read_journal(progress / JOURNAL).entries)
    except ValueError:
        # damaged: what it held is not known
        return True


def _unresumable(output: Path) -> list[Path]:
    """The files that are of no use without the settings, which are written behind them, and halves of them."""
    progress = output / PROGRESS
    files = [progress / name for name in (JOURNAL, LOCK, VALIDATION, START_WEIGHTS, INITIAL_MASK)]
    halves = [*unfinished(progress), *unfinished_tensors(progress)]
    # of the folder itself, in which a user may have files of any name, the settings alone come that early
    return [*snapshots_in(progress), *files, *halves, *unfinished(output, re.escape(SETTINGS))]
