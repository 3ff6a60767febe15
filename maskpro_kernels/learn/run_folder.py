"""The folder of a run: which trainer may have it, what tells its run from others, and what that leaves in it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from ..digests import digest
from ..files import discard, make_folder, unfinished, write_whole
from ..modules import MaskedLinear
from .batches import content, tensors_of
from .estimator import Estimator
from .journal import Entry, Journal, Records
from .journal import read as read_journal
from .metrics import Metrics
from .snapshots import (
    MANIFEST,
    NAME,
    StoredTensors,
    files_of,
    folder_aside,
    newest_snapshot,
    of_other_runs,
    publish_snapshot,
    save_snapshot,
    snapshots_in,
    step_of,
)
from .step import LossFn

PACKAGE = __name__.partition(".")[0]

METRICS, JOURNAL, LOCK = "metrics.jsonl", "journal", ".lock"
# Names of files that are first written under others; whatever else is in the folder is not ours
WRITTEN = rf"{re.escape(METRICS)}|{JOURNAL}|{NAME.pattern}|{re.escape(MANIFEST)}"
# Folder of the losses under refreshed initial masks, in snapshots of the steps that are the first to need them
INITIAL_LOSSES = "initial-losses"


def settings_of(
    layers: Mapping[str, MaskedLinear],
    estimator: Estimator,
    batches: Sequence | None,
    seed: int,
    accumulate: int,
    loss_fn: LossFn,
) -> dict:
    """The settings that identify a run, as JSON.

    Of a batch with objects that ``content`` cannot compare, the tensors alone; of batches that are no sequence, None,
    nothing: snapshots tell which were taken; of a loss what its ``settings()`` tell if it has them.
    """
    known = None
    if batches is not None:
        # one after the other: a sequence may read them from disk
        known = [(digest(tensors_of(batch)), content(batch, index)) for index, batch in enumerate(batches)]
    return {
        "seed": seed,
        "estimator": _identity(type(estimator)),
        "settings": estimator.settings(),
        "layers": {name: _settings_of_layer(layer) for name, layer in layers.items()},
        "device": sorted({layer.weight.device.type for layer in layers.values()}),
        "weights": digest(layer.weight for layer in layers.values()),
        "batches": known and [tensors for tensors, _ in known],
        "batch_contents": known and [contents for _, contents in known],
        "accumulate": accumulate,
        "loss": loss_fn.settings() if hasattr(loss_fn, "settings") else None,
    }


def _identity(kind: type[Estimator]) -> str:
    """What tells runs of one estimator from those of another; a class without a name of its own is its parent."""
    named = next((base for base in kind.__mro__ if "name" in vars(base)), kind)
    # classes of other packages may be called alike
    own = named.__module__.startswith(f"{PACKAGE}.")
    return named.__qualname__ if own else f"{named.__module__}.{named.__qualname__}"


def _settings_of_layer(layer: MaskedLinear) -> list:
    """Layer id, pattern, shape and dtype of the logits, and of a shard where it lies in the whole layer."""
    settings = [layer.layer, str(layer.pattern), list(layer.logits.shape), str(layer.logits.dtype)]
    return [*settings, layer.group_offset, layer.group_row_stride] if layer.is_shard else settings


def _continues(records: Records | None, step: int, state: Mapping) -> bool:
    """Whether a snapshot was taken behind the record of the journal that has its step.

    The first one was taken before the journal was there: that it is of the run, the run's id tells.
    """
    return records is None or step == 0 or state.get("chain") == records.chain[step].hex()


class SavedRun(NamedTuple):
    """What a folder holds of a run.

    Attributes:
        steps: how many can be had again.
        records: what its journal holds; None where it has none.
        snapshot_step: how many steps had been taken at the newest sound snapshot.
        tensors: of that snapshot.
        state: of that snapshot.
        unusable: snapshots that are damaged, or of steps that are taken again.
        warnings: what of it is damaged.
    """

    steps: int
    records: Records | None
    snapshot_step: int
    tensors: StoredTensors
    state: dict
    unusable: set[Path]
    warnings: list[str]

    @property
    def entries(self) -> list[Entry]:
        """Those of the journal; none where there is no journal."""
        return [] if self.records is None else self.records.entries

    @property
    def initial_losses(self) -> list[float] | None:
        """Those that the first step was compared with; None where there is no journal."""
        return None if self.records is None else self.records.header["initial_losses"]


class RunFolder:
    """What a run leaves on disk, for one trainer at a time. Nothing is computed here.

    A new run begins by ``start``, and ``start_journal`` where it has a journal; an interrupted one continues by
    ``take_over``, ``read`` and ``go_on``. Errors name the trainer's argument ``output_dir``.

    Args:
        path: of the folder; ``start`` makes it.
        journaled: whether the run has a journal.

    Attributes:
        journal: what the records of steps are appended to; None before it is there, and where there is none.
        metrics: what steps saw; None before the run has begun or goes on.
        lost: whether another trainer has taken the folder; nothing more is written into it.
    """

    def __init__(self, path: Path, journaled: bool):
        self.path, self.journaled = path, journaled
        self.journal: Journal | None = None
        self.metrics: Metrics | None = None
        self.lost = False
        self._lock: FileLock | None = None
        self._lock_file: tuple[int, int] | None = None
        self._run: Mapping | None = None
        self._newest: Path | None = None
        self._newest_files: list[Path] = []
        self._process: int | None = None

    @property
    def run_id(self) -> str | None:
        """What tells the run from all others; None before it has begun or goes on."""
        return None if self._run is None else self._run["id"]

    @property
    def rows(self) -> list[dict]:
        """The metrics of the steps that were taken."""
        return [] if self.metrics is None else self.metrics.rows

    def start(self, run: Mapping) -> None:
        """Make the folder and keep other trainers out of it.

        Args:
            run: what tells the run from others, as JSON can hold it.

        Raises:
            ValueError: if the folder holds a run, or another trainer has it.
        """
        self._check_new()
        make_folder(self.path)
        self._acquire()
        try:
            # again: another trainer may have had the folder since
            self._check_new()
            # of a run that had not begun
            left = [*snapshots_in(self.path), *snapshots_in(self.path / INITIAL_LOSSES), *self._unfinished()]
            for path in left:
                discard(path)
        except BaseException:
            self.close()
            raise
        # an id of its own: what another run has left is none of this one, however alike they are
        self._run = {**run, "id": secrets.token_hex(16)}
        self.metrics = Metrics(self.path / METRICS, self._run["id"])

    def _check_new(self) -> None:
        """Raise ValueError if the folder holds a run, or of one whose other files are lost what it has learned."""
        learned = any(step_of(path) > 0 for path in snapshots_in(self.path))
        if learned or (self.path / METRICS).exists() or (self.path / JOURNAL).exists():
            raise ValueError(
                f"output_dir: expected a folder without a run, got {str(self.path)!r}; trainer.resume() goes on with "
                "its run, and another folder begins a new one"
            )

    def _unfinished(self) -> list[Path]:
        """What a process that was killed had written or removed a part of."""
        return [path for folder in (self.path, self.path / INITIAL_LOSSES) for path in unfinished(folder, WRITTEN)]

    def start_journal(self, initial_losses: Sequence[float], draws: int) -> None:
        """Start the journal of a run with that many draws a step; from here on the folder holds a run."""
        header = {"run": self._run, "initial_losses": initial_losses}
        self.journal = Journal.create(self.path / JOURNAL, header, draws)

    def take_over(self) -> None:
        """Keep other trainers out of a folder that holds a run.

        Raises:
            ValueError: if it holds none, or another trainer has it.
        """
        if self.journaled and not (self.path / JOURNAL).exists():
            raise ValueError(f"output_dir: expected a folder with a {JOURNAL}, got {str(self.path)!r}")
        if not snapshots_in(self.path):
            raise ValueError(f"output_dir: expected a folder with snapshots, got {str(self.path)!r}")
        self._acquire()

    def read(self, settings: Mapping) -> SavedRun:
        """What the folder holds of a run; it stays as it is.

        Args:
            settings: that the run has to have, see ``settings_of``.

        Raises:
            ValueError: if the run has other settings, its journal or all its snapshots are damaged, or they contradict
                each other.
        """
        records, told, path = None, [], self.path / JOURNAL
        if self.journaled:
            records = read_journal(path)
            self._check_settings(settings, records.header["run"])
            if records.torn:
                told.append(f"the last record of {path} was cut short: its step is taken again")
        at_most, run = (None, None) if records is None else (len(records.entries), records.header["run"])
        snapshot_step, tensors, state, damaged = newest_snapshot(self.path, at_most, run)
        self._check_settings(settings, state["run"])
        self._check_one_run(state["run"])
        if not _continues(records, snapshot_step, state):
            raise ValueError(
                f"output_dir: expected snapshots and a {JOURNAL} of one run in {str(self.path)!r}, got a snapshot of "
                f"step {snapshot_step} that was taken beside other records; restore the folder from a copy, or move "
                "that snapshot away"
            )
        steps = snapshot_step if records is None else len(records.entries)
        unusable = {*damaged, *(path for path in snapshots_in(self.path) if step_of(path) > steps)}
        told += [f"{path} is damaged or of steps that are taken again: it is set aside" for path in unusable]
        return SavedRun(steps, records, snapshot_step, tensors, state, unusable, told)

    def _check_settings(self, settings: Mapping, run: Mapping) -> None:
        """Raise ValueError unless a run has these settings."""
        for name, own in settings.items():
            if run.get(name) != own:
                other = run.get(name)
                if isinstance(own, dict) and isinstance(other, dict):
                    # the first entry that differs
                    key = next(key for key in {**own, **other} if own.get(key) != other.get(key))
                    name, own, other = f"{name} {key}", own.get(key), other.get(key)
                # the digests of batches say nothing
                values = "of this trainer, got others" if name.startswith("batch") else f"{own!r}, got {other!r}"
                raise ValueError(f"output_dir: expected a run with {name} {values} in {str(self.path)!r}")

    def _check_one_run(self, run: Mapping) -> None:
        """Raise ValueError unless a run has an id, and without a journal all sound snapshots are of it.

        With a journal those of another run are passed over. Without one nothing tells which run is the folder's.
        """
        if "id" not in run:
            told = f"got one of an earlier version in {str(self.path)!r}"
            raise ValueError(f"output_dir: expected a run with an id, {told}")
        others = [] if self.journaled else of_other_runs(self.path, run["id"])
        if others:
            raise ValueError(
                f"output_dir: expected snapshots of one run, got {str(others[0])!r} of another; move away what does "
                "not belong there"
            )

    def initial_losses(self, saved: SavedRun, step: int) -> list[float] | None:
        """Those of ``add_initial_losses`` at a step; None where they are to be computed, since that step is the next.

        Raises:
            ValueError: if they are missing or damaged, and steps have been compared with them.
        """
        folder = self.path / INITIAL_LOSSES
        with contextlib.suppress(ValueError):
            newest, tensors, state, _ = newest_snapshot(folder, step, saved.state["run"])
            if newest == step and _continues(saved.records, step, state):
                return tensors["losses"].tolist()
        if step == saved.steps:
            return None
        raise ValueError(
            f"output_dir: expected the initial losses from step {step} on in {str(folder)!r}, got none or damaged ones"
        )

    def go_on(self, saved: SavedRun, rows: Sequence[Mapping]) -> None:
        """Remove, set aside or mend what is damaged: the next step finds the folder as the last would have left it.

        What was lost of the metrics is added to ``saved.warnings``.

        Args:
            saved: what ``read`` has given.
            rows: metrics of steps, for those without a line.
        """
        run = saved.state["run"]
        metrics = Metrics(self.path / METRICS, run["id"])
        torn = saved.records is not None and saved.records.torn > 0
        mended, told = metrics.mended(saved.steps, rows if self.journaled else None, torn)
        for path in self._unfinished():
            discard(path)
        if self.journaled:
            self.journal = Journal.resume(self.path / JOURNAL, saved.records)
        for path in snapshots_in(self.path / INITIAL_LOSSES):
            # anew, as the journal: where a sync has failed, they may be in memory alone
            write_whole(path, path.read_bytes())
        for path in saved.unusable:
            path.rename(path.with_suffix(".aside"))
        self._note_newest(snapshots_in(self.path)[-1])
        metrics.write(mended)
        self._run, self.metrics = run, metrics
        saved.warnings.extend(told)

    def add_entry(self, entry: Entry | None) -> None:
        """Add the record of a step to the journal, where the run has one, ahead of its update.

        What another program has removed of the folder meanwhile is put back first, with a warning.

        Raises:
            RuntimeError: see ``check_process``.
            ValueError: if another trainer has had the folder since, or another file is in the journal's place. The
                folder is lost then.
            OSError: if something cannot be written.
        """
        self.check_process()
        try:
            self._keep_hold()
        except ValueError:
            self.lost = True
            self.close()
            raise
        if self.journal is not None and entry is not None:
            self.journal.append(entry)

    def _keep_hold(self) -> None:
        if not self.path.is_dir():
            # the lock would make it
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path))
        if self._id_of_lock() != self._lock_file:
            self._lock.release()
            self._acquire()
            if not self.metrics.is_as_left():
                raise ValueError(
                    f"output_dir: expected what this trainer has left in {str(self.path)!r}, got something else: "
                    f"{LOCK} was removed while it ran, and another trainer may have had the folder"
                )
            warnings.warn(f"{self.path / LOCK} was removed while the run went on: it is put back", stacklevel=2)
        if self.journal is not None and self.journal.put_back():
            warnings.warn(f"{self.journal.path} was removed while the run went on: it is put back", stacklevel=2)

    def add_snapshot(self, step: int, tensors: Mapping[str, Tensor], state: Mapping) -> None:
        """Add a snapshot, with arguments as for ``save_snapshot``."""
        self._sync_metrics()
        self._note_newest(save_snapshot(self.path, step, tensors, {**self._place(), **state}))

    def folder_aside(self) -> Path:
        """Where ranks write what ``publish_snapshot`` makes a snapshot of."""
        self.check_process()
        return folder_aside(self.path)

    def publish_snapshot(self, aside: Path, step: int, digests: Mapping[str, str], state: Mapping) -> None:
        """Add a snapshot of the files of ranks, with arguments as for the function of that name."""
        self._sync_metrics()
        self._note_newest(publish_snapshot(aside, step, digests, {**self._place(), **state}))

    def _sync_metrics(self) -> None:
        self.check_process()
        if not self.journaled:
            # the steps before are not taken again, and nothing else knows what they saw
            self.metrics.sync()

    def _note_newest(self, snapshot: Path) -> None:
        self._newest, self._newest_files = snapshot, files_of(snapshot)

    def lacks_snapshot(self) -> bool:
        """Whether another program has removed files of the newest snapshot, of which a warning tells.

        Another one is due then. Without any the run could not be resumed.
        """
        if all(file.exists() for file in self._newest_files):
            return False
        warnings.warn(
            f"{self._newest} was removed while the run went on: a snapshot of the present step takes its place",
            stacklevel=2,
        )
        return True

    def _place(self) -> dict:
        """What tells a snapshot's place: the run, and the record of the journal that it stands at."""
        return {"run": self._run, "chain": None if self.journal is None else self.journal.chain.hex()}

    def add_initial_losses(self, step: int, losses: Sequence[float]) -> None:
        """Add the losses of all batches under refreshed initial masks, which this step is the first to need."""
        self.check_process()
        folder = self.path / INITIAL_LOSSES
        make_folder(folder)
        tensors = {"losses": torch.tensor(losses, dtype=torch.float64, device="cpu")}
        save_snapshot(folder, step, tensors, self._place())

    def _acquire(self) -> None:
        """Keep other trainers out, in this process and in others."""
        self._lock = FileLock(self.path / LOCK, blocking=False)
        try:
            self._lock.acquire()
        except Timeout:
            self._lock = None
            raise ValueError(
                f"output_dir: expected a folder that no other trainer holds, or one that is closed, got "
                f"{str(self.path)!r}"
            ) from None
        self._lock_file = self._id_of_lock()
        self._process = os.getpid()

    def check_process(self) -> None:
        """Raise RuntimeError in a process that was forked while a trainer had the folder: it is its parent's."""
        if self._process not in (None, os.getpid()):
            raise RuntimeError(
                f"output_dir: expected process {self._process}, whose run is in {str(self.path)!r}, got {os.getpid()}, "
                "which was forked from it: two may not write to one run; make a trainer with another output_dir here"
            )

    def _id_of_lock(self) -> tuple[int, int] | None:
        """What tells the file of the lock from another in its place; None where there is none."""
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(self.path / LOCK)
            return found.st_dev, found.st_ino

    def close(self) -> None:
        """Let another trainer have the folder; a forked process lets go of nothing that its parent holds."""
        if self._process not in (None, os.getpid()):
            return
        try:
            if self.journal is not None:
                self.journal.close()
        finally:
            # also where the disk refuses to close the file
            if self._lock is not None:
                self._lock.release()
            self.journal = self._lock = None
