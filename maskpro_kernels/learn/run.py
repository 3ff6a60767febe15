"""A run on disk: its folder, resume and replay.

The folder has

- ``journal``, for an estimator with one: a record a step, from which logits can be rebuilt, see ``Journal``;
- snapshots: tensors and state of a step, see ``snapshots``;
- ``metrics.jsonl``: the fields of ``StepRecord`` and their digest, a line a step;
- ``.lock``, which excludes other trainers.

Writes are atomic, and on disk before the run continues. So a run that is killed at any moment, or whose disk is full,
can be resumed, from its newest intact snapshot and the later records of the journal. Files of another ``FORMAT`` are
refused.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from ..files import append_whole, digest, digest_of_bytes, discard, make_folder, sync, unfinished, write_whole
from ..functional.checks import check_device
from ..modules import MaskedLinear, is_sharded, tensors_of_base
from ..ops.pattern import NMPattern
from ..ranks import Ranks
from ..shards import planned_parts
from .estimator import Entry, Estimator, LossFn, StepRecord, replay
from .journal import FORMAT, JOURNAL, Journal, Records, read_journal
from .model_masks import ModelMasks, ReplayedLayer
from .snapshots import (
    MANIFEST,
    SNAPSHOT,
    StoredTensors,
    digest_of_file,
    folder_aside,
    newest_snapshot,
    publish_snapshot,
    read_state,
    save_snapshot,
    snapshots_in,
    step_of,
)
from .step_batches import content

METRICS = "metrics.jsonl"
LOCK = ".lock"
# Files with temporary names until they are complete; other files in the folder belong to the user
WRITTEN = rf"{re.escape(METRICS)}|{JOURNAL}|{SNAPSHOT.pattern}|{re.escape(MANIFEST)}"
# Prefix of an estimator's tensors in a snapshot, where logits have the names of their layers
PREFIX = "estimator/"


def settings_of(model: nn.Module, layers: Mapping[str, MaskedLinear], estimator: Estimator, batches: Sequence | None,
                seed: int, accumulate: int, loss_fn: LossFn) -> dict:  # fmt: skip
    """Settings that a resumed run must share, as JSON; for a loss its ``settings()`` if it has them.

    Batches that are not a sequence, None, are not included: snapshots have a digest of those taken.
    """
    of_layers = {}
    for name, layer in layers.items():
        of_layers[name] = [layer.layer, str(layer.pattern), list(layer.logits.shape), str(layer.logits.dtype)]
        if layer.is_shard:
            of_layers[name] += [layer.group_offset, layer.group_row_stride]
    return {
        "format": FORMAT,
        "seed": seed,
        "estimator": estimator.name,
        "settings": estimator.settings(),
        "layers": of_layers,
        "device": sorted({layer.weight.device.type for layer in layers.values()}),
        "weights": digest(tensors_of_base(model)),
        # one at a time: a sequence may read them from disk
        "batches": None if batches is None else [content(batch, index) for index, batch in enumerate(batches)],
        "accumulate": accumulate,
        "loss": loss_fn.settings() if hasattr(loss_fn, "settings") else None,
    }


class SavedRun(NamedTuple):
    """A run to resume: its newest intact snapshot, and the records of the journal after it.

    Attributes:
        steps: number of steps that are done.
        tensors: of the snapshot.
        entries: of the later steps.
        state: of the estimator, after all steps.
        initial_losses: None if they must be computed, or are not needed.
        refreshed: the step whose top-N masks are the initial masks, if their losses must be computed.
        skipped: number of steps in a row, up to the last one, whose loss or gradient was not finite.
        batches: digest of the batches before the snapshot, if they are no sequence.
        unusable: snapshots that are damaged, or of steps that are taken again.
        warnings: what is damaged, incomplete or unknown.
    """

    steps: int
    tensors: StoredTensors
    entries: list[Entry]
    state: Mapping
    initial_losses: list[float] | None
    refreshed: int | None
    skipped: int
    batches: str | None
    unusable: list[Path]
    warnings: list[str]


class RunFolder:
    """The folder of a run, for one trainer at a time. Errors name the trainer's argument ``output_dir``.

    A new run begins by ``start``, and with a journal by ``start_journal``; ``resume`` continues an interrupted one.
    ``rows`` are the fields of ``StepRecord`` of each step.
    """

    def __init__(self, path: Path, estimator: Estimator):
        self.path = path
        self.estimator = estimator
        self.rows: list[dict] = []
        self._journal: Journal | None = None
        self._lock: FileLock | None = None
        # identities of the lock and the journal that this process made
        self._states: dict[Path, os.stat_result] = {}
        # settings and id
        self.run: Mapping = {}
        self._written = 0
        self._process: int | None = None

    def start(self, settings: Mapping) -> None:
        """Make the folder for a run with these ``settings_of`` and exclude other trainers."""
        self._check_new()
        make_folder(self.path)
        self._acquire()
        try:
            # again: another trainer may have used the folder since
            self._check_new()
            # files of a run that ended before its first step
            for path in (*snapshots_in(self.path), *unfinished(self.path, WRITTEN)):
                discard(path)
        except BaseException:
            self.close()
            raise
        # with a unique id: files of an equal run must not pass as files of this one
        self.run = {**settings, "id": secrets.token_hex(16)}

    def _check_new(self) -> None:
        learned = any(step_of(path) > 0 for path in snapshots_in(self.path))
        if learned or (self.path / METRICS).exists() or (self.path / JOURNAL).exists():
            raise ValueError(
                f"output_dir: expected a folder without a run, got {str(self.path)!r}; call trainer.resume() to "
                "continue its run, or use another folder for a new one"
            )

    def start_journal(self, initial_losses: Sequence[float]) -> None:
        """Start the journal; from here on the folder has a run."""
        header = {"run": self.run, "initial_losses": initial_losses}
        self._journal = Journal.create(self.path / JOURNAL, header, self.estimator.draws)
        self._states[self.path / JOURNAL] = os.stat(self.path / JOURNAL)

    def resume(self, settings: Mapping, check_batches: Callable, check_run: Callable | None) -> SavedRun:
        """Take over the folder of an interrupted run; restore folder and estimator to their state after the last step.

        After an error both are unchanged: also an error of ``check_batches``, called with the number of steps and the
        digest of their batches, or of ``check_run``, called with the id of the run.
        """
        if self.estimator.journaled and not (self.path / JOURNAL).exists():
            raise ValueError(f"output_dir: expected a folder with a {JOURNAL}, got {str(self.path)!r}")
        if not snapshots_in(self.path):
            raise ValueError(f"output_dir: expected a folder with snapshots, got {str(self.path)!r}")
        before = self.estimator.state()
        self._acquire()
        try:
            records = read_journal(self.path / JOURNAL) if self.estimator.journaled else None
            step, tensors, state, damaged = self._newest_snapshot(settings, records)
            if check_run is not None:
                check_run(state["run"]["id"])
            self._check_tensors(tensors)
            saved, rows = self._read(records, step, tensors, state, damaged)
            check_batches(saved.steps, saved.batches)
            self._take_over(state["run"], records, saved.unusable, rows)
            return saved
        except BaseException:
            self.estimator.load_state(before)
            self.close()
            raise

    def _newest_snapshot(
        self, settings: Mapping, records: Records | None
    ) -> tuple[int, StoredTensors, dict, list[Path]]:
        """``newest_snapshot`` of a run with these settings, which belongs to the journal if there is one."""
        if records is None:
            step, tensors, state, damaged = newest_snapshot(self.path)
            self._check_settings(settings, state["run"])
            _, oldest = next(filter(None, map(read_state, snapshots_in(self.path))))
            if oldest["run"] != state["run"]:
                raise ValueError(
                    f"output_dir: expected snapshots of one run in {str(self.path)!r}, got a newest one of another run "
                    "than the first; move those of the other run away"
                )
            return step, tensors, state, damaged
        run = records.header["run"]
        self._check_settings(settings, run)
        step, tensors, state, damaged = newest_snapshot(self.path, len(records.entries), run)
        # the first one is older than the journal: the run's id shows that it belongs to the run
        if step and state["record"] != records.checksums[step - 1].hex():
            raise ValueError(
                f"output_dir: expected snapshots and a {JOURNAL} of one run in {str(self.path)!r}, got a snapshot of "
                f"step {step} that belongs to other records; restore the folder from a copy, or move this "
                "snapshot away"
            )
        return step, tensors, state, damaged

    def _read(
        self, records: Records | None, step: int, tensors: StoredTensors, state: Mapping, damaged: Sequence[Path]
    ) -> tuple[SavedRun, list[dict]]:
        """(the run after the records that follow a snapshot, its ``rows``); the estimator gets the state after them."""
        estimator = self.estimator
        entries = [] if records is None else records.entries[step:]
        steps = step + len(entries)
        rows = self._read_rows(state["run"]["id"], steps)
        lost = [index for index in range(steps) if index not in rows]
        losses = state["initial_losses"]
        skipped = state["skipped"]
        estimator_state = state["estimator"]
        refreshed = None
        if records is not None:
            if step == 0:
                losses = records.header["initial_losses"]
            elif losses is None and estimator.needs_initial_losses:
                refreshed = step
            estimator.load_state(estimator_state)
            for entry in entries:
                result = estimator.recall(entry)
                skipped = skipped + 1 if entry.skipped else 0
                if result.refreshes:
                    losses = None
                    refreshed = entry.step + 1
                # a power cut may lose lines after the snapshot; records lack their flip rates and seconds
                rows.setdefault(entry.step, asdict(result.record(entry.step, entry.tokens, math.nan, math.nan)))
            estimator_state = estimator.state()
        for index in lost:
            rows.setdefault(index, asdict(StepRecord(index, math.nan, None, None, None, math.nan, math.nan, math.nan)))
        again = [path for path in snapshots_in(self.path) if step_of(path) > steps]
        unusable = list(dict.fromkeys([*damaged, *again]))
        warnings = [f"{path} is damaged or of steps that are taken again: it is set aside" for path in unusable]
        if records is not None and records.torn:
            warnings.append(f"the last record of {self.path / JOURNAL} is incomplete: its step is taken again")
        if lost:
            unknown = "figures" if math.isnan(rows[lost[0]]["tokens"]) else "flip rates and seconds"
            warnings.append(
                f"{self.path / METRICS} has no intact lines of {len(lost)} of {steps} steps, the first step "
                f"{lost[0]}: their {unknown} are unknown, nan"
            )
        saved = SavedRun(
            steps=steps,
            tensors=tensors,
            entries=entries,
            state=estimator_state,
            initial_losses=losses,
            refreshed=refreshed,
            skipped=skipped,
            batches=state["batches"],
            unusable=unusable,
            warnings=warnings,
        )
        return saved, [rows[index] for index in range(steps)]

    def _take_over(
        self, run: Mapping, records: Records | None, unusable: Sequence[Path], rows: Sequence[Mapping]
    ) -> None:
        """Write journal and metrics of the steps that are done, and remove what is unfinished."""
        for path in unfinished(self.path, WRITTEN):
            discard(path)
        if records is not None:
            self._journal = Journal.resume(self.path / JOURNAL, records)
            self._states[self.path / JOURNAL] = os.stat(self.path / JOURNAL)
        for path in unusable:
            path.rename(path.with_suffix(".aside"))
        self.run = run
        self.rows = rows
        write_whole(self.path / METRICS, self._lines(self.rows))
        self._written = len(self.rows)

    def _check_settings(self, settings: Mapping, run: Mapping) -> None:
        for name, expected in settings.items():
            stored = run.get(name)
            if expected == stored:
                continue
            if isinstance(expected, dict) and isinstance(stored, dict):
                key = next(key for key in {**expected, **stored} if expected.get(key, ...) != stored.get(key, ...))
                name = f"{name} {key}"
                expected = expected.get(key)
                stored = stored.get(key)
            # digests would not help
            is_digest = name in ("batches", "weights")
            values = "of this trainer, got others" if is_digest else f"{expected!r}, got {stored!r}"
            raise ValueError(f"output_dir: expected a run with {name} {values} in {str(self.path)!r}")

    def _check_tensors(self, stored: StoredTensors) -> None:
        expected = {PREFIX + name: (list(x.shape), x.dtype) for name, x in self.estimator.tensors().items()}
        kinds = {name: kind for name, kind in stored.kinds.items() if name.startswith(PREFIX)}
        if expected != kinds:
            raise ValueError(
                f"output_dir: expected a snapshot with the tensors of {self.estimator.name}, {expected}, got {kinds}"
            )

    def _read_rows(self, run: str, steps: int) -> dict[int, dict]:
        """Read the metrics of the first ``steps`` steps of a run, without incomplete and damaged lines."""
        rows = {}
        path = self.path / METRICS
        for line in path.read_bytes().splitlines() if path.exists() else ():
            with suppress(ValueError, KeyError, TypeError, AttributeError):
                row = json.loads(line)
                if row.pop("digest") == _digest_of_row(run, row) and row["step"] < steps:
                    rows[row["step"]] = row
        return rows

    def add_entry(self, entry: Entry | None) -> None:
        """Add the record of a step to the journal, if there is one, before its update."""
        self._check_own()
        if self._journal is not None and entry is not None:
            self._journal.append(entry)

    def add_row(self, row: Mapping) -> None:
        """Add the metrics of a step; after an error its line is written with that of the next step."""
        self.rows.append(dict(row))
        append_whole(self.path / METRICS, self._lines(self.rows[self._written :]))
        self._written = len(self.rows)

    def _lines(self, rows: Sequence[Mapping]) -> bytes:
        lines = [json.dumps({**row, "digest": _digest_of_row(self.run["id"], row)}) for row in rows]
        return "".join(line + "\n" for line in lines).encode()

    def add_snapshot(self, step: int, tensors: Mapping[str, Tensor], state: Mapping) -> None:
        save_snapshot(self.path, step, tensors, self._prepared(state))

    def folder_aside(self) -> Path:
        """Make a folder for the files of all ranks, which ``publish_snapshot`` turns into a snapshot."""
        self._check_own()
        return folder_aside(self.path)

    def publish_snapshot(self, aside: Path, step: int, digests: Mapping[str, str], state: Mapping) -> None:
        publish_snapshot(aside, step, digests, self._prepared(state))

    def _prepared(self, state: Mapping) -> dict:
        """Add the run and the checksum of its last record to the state of a snapshot."""
        self._check_own()
        if (self.path / METRICS).exists():
            # a resumed run takes up the steps after the snapshot: only this file has the figures of those before
            sync(self.path / METRICS)
            sync(self.path)
        checksum = None if self._journal is None else self._journal.checksum
        return {"run": self.run, "record": None if checksum is None else checksum.hex(), **state}

    def _acquire(self) -> None:
        self._lock = FileLock(self.path / LOCK, blocking=False)
        try:
            self._lock.acquire()
        except Timeout:
            self._lock = None
            raise ValueError(
                f"output_dir: expected a folder that no open trainer uses, got {str(self.path)!r}"
            ) from None
        self._process = os.getpid()
        self._states = {self.path / LOCK: os.stat(self.path / LOCK)}

    def _check_own(self) -> None:
        """Raise unless this process made the run and still owns the folder."""
        if self._process not in (None, os.getpid()):
            raise RuntimeError(
                f"output_dir: expected process {self._process}, whose run is in {str(self.path)!r}, got {os.getpid()}, "
                "a fork of it: two processes may not write to one run; make a trainer with another output_dir here"
            )
        for path, state in self._states.items():
            if not path.exists() or not os.path.samestat(path.stat(), state):
                raise ValueError(
                    f"output_dir: expected {str(path)!r} of this process, got another file or none; close this "
                    "trainer, restore the content of the folder, and resume the run"
                )

    def close(self) -> None:
        """Release the folder for another trainer; a fork leaves the lock of its parent alone."""
        if self._process not in (None, os.getpid()):
            return
        try:
            if self._journal is not None:
                self._journal.close()
        finally:
            # also if closing the file fails
            if self._lock is not None:
                self._lock.release()
            self._journal = None
            self._lock = None
            self._states = {}


def _digest_of_row(run: str, row: Mapping) -> str:
    return digest_of_bytes(run.encode(), json.dumps(row).encode()).hex()


def write_parts(
    folder: RunFolder | None, ranks: Ranks, step: int, tensors: Mapping[str, Tensor], state: Mapping
) -> None:
    """Add a snapshot of sharded tensors: each rank writes its rows, and rank 0 publishes them once on disk."""
    aside = ranks.run_on_main(RunFolder.folder_aside, folder)
    try:
        ranks.run_on_all(_check_seen, aside)
        part = ranks.run_on_all(_write_part, planned_parts(ranks, aside, tensors))
        digests = dict(filter(None, ranks.all_gather_object(part)))
        ranks.run_on_main(RunFolder.publish_snapshot, folder, aside, step, digests, state)
    finally:
        if ranks.is_main_process and aside.exists():
            # a resume removes the rest; raise the first error
            with suppress(OSError):
                discard(aside)


def _write_part(write: Callable[[], Path | None]) -> tuple[str, str] | None:
    """Write the file of this rank; return its name and digest, None if the rank has no rows."""
    path = write()
    return None if path is None else (path.name, digest_of_file(path))


@torch.no_grad()
def restore(
    saved: SavedRun, ranks: Ranks, layers: Mapping[str, MaskedLinear], estimator: Estimator, seed: int, refresh
) -> None:
    """Restore logits and the estimator's tensors from a snapshot, and apply the updates of later steps in the journal.

    There is no forward pass. Rank 0 reads for all ranks; for layers that are cut over ranks each reads its own rows.
    ``refresh`` is called before the step ``saved.refreshed``, to compute the losses of the initial masks.
    """
    logits = {name: layer.logits.detach() for name, layer in layers.items()}
    broadcast = {PREFIX + name: tensor for name, tensor in estimator.tensors().items()}
    if is_sharded(layers):
        ranks.run_on_all(_check_seen, saved.tensors.path)
        ranks.run_on_all(saved.tensors.read_into, logits)
    else:
        broadcast |= logits
    ranks.run_on_main(saved.tensors.read_into, broadcast)
    for tensor in broadcast.values():
        ranks.broadcast(tensor)
    masks = ModelMasks(layers)
    for entry in saved.entries:
        if entry.step == saved.refreshed:
            refresh()
        replay(masks, seed, entry)


def replay_run(folder: str | Path, steps: int | None = None, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Rebuild the logits of a run from its journal and its first snapshot, without model and batches.

    Args:
        folder: ``output_dir`` of the trainer; for `maskpro learn` the folder "progress" of the run.
        steps: number of steps to apply; None: all.
        device: device for the updates; the bits are the same on all.

    Returns:
        Logits [out, K] by name of the layer, on the CPU.

    Raises:
        ValueError: if the machine does not have the device, there is no journal, it or the first snapshot is damaged,
            or it has fewer than ``steps`` steps.
    """
    folder = Path(folder)
    check_device("device", device)
    if not (folder / JOURNAL).exists():
        raise ValueError(f"folder: expected the folder of a run with a {JOURNAL}, got {str(folder)!r}")
    records = read_journal(folder / JOURNAL)
    run = records.header["run"]
    entries = records.entries
    if steps is not None and not 0 <= steps <= len(entries):
        raise ValueError(f"steps: expected 0 to {len(entries)}, the steps of the journal, got {steps}")
    _, tensors, _, _ = newest_snapshot(folder, at_most=0, run=run)
    layers = {
        name: ReplayedLayer(tensors[name].to(device), NMPattern(pattern), layer, *place)
        for name, (layer, pattern, _, _, *place) in run["layers"].items()
    }
    masks = ModelMasks(layers)
    for entry in entries[:steps]:
        replay(masks, run["seed"], entry)
    return {name: layer.logits.cpu() for name, layer in layers.items()}


def _check_seen(path: Path) -> None:
    if not path.exists():
        raise ValueError(
            f"output_dir: expected a folder that all ranks have access to, got {str(path.parent)!r}, where this "
            f"rank does not find {path.name}"
        )
