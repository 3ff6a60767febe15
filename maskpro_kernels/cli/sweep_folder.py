"""The folder of a sweep: the folders of its runs, where each run stands, and the errors of those that failed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..checked_json import load_json, read_sealed, sealed
from ..files import check_output, clear_unfinished, make_folder, unfinished, write_whole
from ..learn.run_folder import LOCK
from .run_files import PAGE, REPORT, goes_on
from .shared_work import SHARED
from .sweep_file import SweepRun

# What tells that a folder is a sweep's: which runs have failed, and what all have found
STATE, RESULTS = "state.json", "results.json"
# Of the results
ENTRIES = {"tables", "runs", "left_alone"}
FINISHED, FAILED, BEGUN, NEW = "finished", "failed", "begun", "new"


class SweepFolder:
    """A sweep's folder, which need not be there yet.

    Args:
        path: of the folder.
        runs: of the FILE as it is now.

    Attributes:
        errors: of the runs that failed, by the name of their folder.

    Raises:
        ValueError: if the folder holds something else, or its state is damaged.
        OSError: if it cannot be read.
    """

    def __init__(self, path: Path, runs: Sequence[SweepRun]):
        self.path, self.runs = path, runs
        self.errors: dict[str, str] = {}
        if (path / RESULTS).is_file() and not _is_of_a_sweep(path / RESULTS):
            raise ValueError(
                f"output: expected the folder of a sweep, or a new or empty one, got {str(path)!r}, whose {RESULTS} no "
                "sweep has written; give another --output"
            )
        if (path / STATE).is_file():
            self.errors = _read(path / STATE)
        elif not (path / RESULTS).is_file() and not self._ended_unbegun():
            check_output(path)
        there = sorted(each.name for each in path.iterdir() if each.is_dir()) if path.is_dir() else []
        self._names = {run.digest: self._name_of(run, there) for run in runs}
        names = set(self._names.values())
        self.others = [name for name in there if name not in names and _holds_a_run(path / name)]

    def _name_of(self, run: SweepRun, there: Sequence[str]) -> str:
        """Of its folder: a run keeps its folder where other options are varied since."""
        if run.name in there:
            return run.name
        of_it = [name for name in there if name.rpartition("_")[2] == run.digest]
        if len(of_it) > 1:
            raise ValueError(
                f"output: expected one folder of the run {run.name} in {str(self.path)!r}, got {', '.join(of_it)}; "
                "move the copies out of it"
            )
        return of_it[0] if of_it else run.name

    def _ended_unbegun(self) -> bool:
        """Whether nothing is there but what a process leaves that was killed before the state was written."""
        halves = unfinished(self.path, re.escape(STATE))
        return self.path.is_dir() and set(self.path.iterdir()) <= {self.path / LOCK, *halves}

    def name(self, run: SweepRun) -> str:
        return self._names[run.digest]

    def of(self, run: SweepRun) -> Path:
        return self.path / self.name(run)

    def has_begun(self, run: SweepRun) -> bool:
        """Whether a run has begun to learn, and perhaps ended: its folder then tells where things are."""
        return _holds_a_run(self.of(run))

    def state(self, run: SweepRun) -> str:
        if (self.of(run) / REPORT).exists():
            return FINISHED
        if self.name(run) in self.errors:
            return FAILED
        return BEGUN if goes_on(self.of(run)) else NEW

    def to_take(self) -> list[SweepRun]:
        """The runs that are left. Failed ones are tried again once no other is."""
        unfinished_runs = [run for run in self.runs if self.state(run) != FINISHED]
        others = [run for run in unfinished_runs if self.state(run) != FAILED]
        return others or unfinished_runs

    @contextmanager
    def held(self) -> Iterator[None]:
        """With the folder, made if missing, kept from other processes.

        Raises:
            ValueError: if another process is at it.
            OSError: if it cannot be written.
        """
        make_folder(self.path)
        try:
            with FileLock(self.path / LOCK, blocking=False):
                for half in unfinished(self.path, "|".join(map(re.escape, (STATE, RESULTS, PAGE)))):
                    half.unlink()
                clear_unfinished(self.path / SHARED)
                self.keep(self.errors)
                yield
        except Timeout:
            raise ValueError(
                f"output: expected a sweep that no other process is at, got {str(self.path)!r}; wait for the other, or "
                "end it"
            ) from None

    def keep(self, errors: dict[str, str]) -> None:
        """Have these errors in the state, on disk."""
        self.errors = errors
        write_whole(self.path / STATE, json.dumps(sealed({"failed": errors}), indent=1).encode())


def _is_of_a_sweep(results: Path) -> bool:
    """Whether a file of that name is a sweep's: other programs write such too."""
    try:
        found = load_json(results.read_bytes())
    except ValueError:
        return False
    return isinstance(found, dict) and found.keys() >= ENTRIES


def _holds_a_run(folder: Path) -> bool:
    return goes_on(folder) or (folder / REPORT).exists()


def _read(path: Path) -> dict[str, str]:
    """The errors of runs in the state of a sweep."""
    try:
        found, changed = read_sealed(path.read_bytes())
        errors = found["failed"]
        if changed or not isinstance(errors, dict) or not all(isinstance(error, str) for error in errors.values()):
            raise ValueError("changed since it was written")
        return errors
    except (ValueError, KeyError, TypeError) as error:
        # where no results of a sweep stand beside it, it may be another program's
        of_a_sweep = (path.parent / RESULTS).is_file()
        cure = "move it away: failed runs are then tried again" if of_a_sweep else "give another --output"
        raise ValueError(f"output: expected the state of a sweep in {str(path)!r}, got {error!r}; {cure}") from error
