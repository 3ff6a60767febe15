"""A run on disk: its folder, journal and snapshots, resume and replay.

The folder has

- ``journal``, for an estimator with one: a record a step, from which logits can be rebuilt, see ``Journal``;
- ``snapshot-STEP-DIGEST.safetensors``: tensors and state of a step; the first one and the two newest are kept. If
  layers are cut over ranks, it is a folder with a file of each rank and a manifest of their digests;
- ``metrics.jsonl``: the fields of ``StepRecord`` and their digest, a line a step;
- ``.lock``, which excludes other trainers.

Writes are atomic, and on disk before the run continues. So a run that is killed at any moment, or whose disk is full,
can be resumed. Files of another ``FORMAT`` are refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..files import (
    SIZE,
    append_whole,
    digest,
    digest_of_bytes,
    discard,
    make_folder,
    naming_path,
    sync,
    unfinished,
    write_whole,
)
from ..modules import MaskedLinear, is_sharded, tensors_of_base
from ..ops.pattern import NMPattern
from ..ranks import Ranks
from ..shards import is_distributed, kinds_of_parts, planned_parts, read_parts
from .batches import content
from .estimator import Draw, Entry, Estimator, LossFn, StepRecord, replay
from .masks import ModelMasks, ReplayedLayer

# Format of the folder and its files; increase it when one of these changes
FORMAT = 5
JOURNAL = "journal"
METRICS = "metrics.jsonl"
LOCK = ".lock"
SNAPSHOT = re.compile(r"snapshot-(\d{10})-([0-9a-f]{32})(\.safetensors)?")
MANIFEST = "snapshot.json"
# Files with temporary names until they are complete; other files in the folder belong to the user
WRITTEN = rf"{re.escape(METRICS)}|{JOURNAL}|{SNAPSHOT.pattern}|{re.escape(MANIFEST)}"
# Snapshots to keep besides the first: if the newest is damaged, the one before is used
KEPT = 2
# Prefix of an estimator's tensors in a snapshot, where logits have the names of their layers
PREFIX = "estimator/"

MAGIC = b"maskpro\n"
# magic, format, bytes of the JSON; digest of these and of the JSON; JSON
HEAD = struct.Struct("<8sII")
# step, tokens, true if the update was skipped, loss under the initial masks; draws; digest
STEP = struct.Struct("<QQ?d")
# id, loss, factor of its score
DRAW = struct.Struct("<Hdd")


def pack_entry(entry: Entry, chain: bytes) -> bytes:
    """Pack the record of a step after a record with the digest ``chain``; it ends with its own digest."""
    body = STEP.pack(entry.step, entry.tokens, entry.skipped, entry.initial_loss)
    body += b"".join(DRAW.pack(*draw) for draw in entry.draws)
    return body + digest_of_bytes(chain, body)


def unpack_entry(record: bytes, chain: bytes) -> Entry | None:
    """Unpack the entry of a record; None if its digest does not continue the chain."""
    body = record[:-SIZE]
    if record[-SIZE:] != digest_of_bytes(chain, body):
        return None
    step, tokens, skipped, initial_loss = STEP.unpack(body[: STEP.size])
    draws = tuple(Draw(*draw) for draw in DRAW.iter_unpack(body[STEP.size :]))
    return Entry(step, tokens, initial_loss, draws, skipped)


class Records(NamedTuple):
    """Content of a journal; its entries end at byte ``end``, and ``torn`` bytes of an incomplete record follow."""

    header: dict
    entries: list[Entry]
    torn: int
    draws: int
    # digests before the first step and after each one
    chain: list[bytes]
    end: int


class Journal:
    """A journal that is open for appending; made by ``create`` or ``resume``.

    A file begins with a header, JSON with its digest. Records of equal size follow, appended and synced one by one. The
    digests are a chain: that of a record covers the digest before it, the first one that of the header, which has the
    id of the run. So a record is valid only in its own run and place. A crash can leave only the last record
    incomplete, which is then removed; damage anywhere else is refused.

    ``chain`` is the digest of the last of the ``steps`` records; before the first one that of the header.
    """

    def __init__(self, path: Path, draws: int, steps: int, chain: bytes):
        self.path = path
        self.draws = draws
        self.steps = steps
        self.chain = chain
        self._file = open(path, "a+b", buffering=0)
        self._failed = False
        self._end = os.fstat(self._file.fileno()).st_size

    @classmethod
    def create(cls, path: Path, header: Mapping, draws: int = 1) -> Journal:
        """Start a journal; its header has the unique id of the run."""
        text = json.dumps({"draws": draws, "run": header}, sort_keys=True).encode()
        head = HEAD.pack(MAGIC, FORMAT, len(text))
        chain = digest_of_bytes(head, text)
        write_whole(path, head + chain + text)
        return cls(path, draws, 0, chain)

    @classmethod
    def resume(cls, path: Path, records: Records) -> Journal:
        """Open the journal of these records, and remove an incomplete last one."""
        # write again: records of a killed process may be only in memory, and after a failed sync another one does not
        # write data that the system marks as written
        write_whole(path, path.read_bytes()[: records.end])
        return cls(path, records.draws, len(records.entries), records.chain[-1])

    def append(self, entry: Entry) -> None:
        """Write a record and wait until it is on disk; OSError if it cannot be written.

        A part of it is then removed. If the sync has failed, or removal fails, no further record is accepted: call
        ``resume``.
        """
        if self._failed:
            raise OSError(f"{self.path}: the disk has failed before, so its content is unknown: resume the run")
        if entry.step != self.steps or len(entry.draws) != self.draws:
            raise ValueError(
                f"entry: expected step {self.steps} with {self.draws} draws, got step {entry.step} with "
                f"{len(entry.draws)}"
            )
        end = os.fstat(self._file.fileno()).st_size
        if end != self._end:
            raise ValueError(
                f"journal: expected {str(self.path)!r} to end at byte {self._end}, where this process ended, got "
                f"{end}: something else writes to it; resume the run"
            )
        record = pack_entry(entry, self.chain)
        written = False
        try:
            with naming_path(self.path):
                if self._file.write(record) != len(record):
                    raise OSError(f"{self.path}: the disk took only a part of a record")
                written = True
                os.fsync(self._file.fileno())
        except BaseException as error:
            # after an interrupt too: a record counts if it is surely on disk. After a failed sync the system marks data
            # as written: another sync would succeed without a write
            self._failed = written and isinstance(error, OSError)
            try:
                os.ftruncate(self._file.fileno(), self._end)
            except OSError:
                self._failed = True
            raise
        self.steps += 1
        self._end += len(record)
        self.chain = record[-SIZE:]

    def close(self) -> None:
        self._file.close()


def read_journal(path: str | Path) -> Records:
    """Read a journal; ValueError for another file, another format, or damage."""
    content = Path(path).read_bytes()
    if len(content) < HEAD.size or content[: len(MAGIC)] != MAGIC:
        raise ValueError(f"journal: expected a journal of maskpro_kernels, got {str(path)!r}")
    _, number, size = HEAD.unpack(content[: HEAD.size])
    if number != FORMAT:
        raise ValueError(f"journal: expected format {FORMAT}, got {number}, of another version, in {str(path)!r}")
    chain = content[HEAD.size : HEAD.size + SIZE]
    text = content[HEAD.size + SIZE :][:size]
    if len(text) < size or digest_of_bytes(content[: HEAD.size], text) != chain:
        raise ValueError(f"journal: expected a whole header, got a damaged one in {str(path)!r}")
    head = json.loads(text)
    length = STEP.size + head["draws"] * DRAW.size + SIZE
    entries = []
    chains = [chain]
    start = HEAD.size + SIZE + size
    for offset in range(start, len(content), length):
        record = content[offset : offset + length]
        entry = unpack_entry(record, chains[-1]) if len(record) == length else None
        if entry is None:
            if offset + length < len(content):
                raise ValueError(
                    f"journal: expected the record of step {len(entries)} of this run at byte {offset}, got a damaged "
                    f"one or another's in {str(path)!r}"
                )
            return Records(head["run"], entries, len(record), head["draws"], chains, offset)
        entries.append(entry)
        chains.append(record[-SIZE:])
    return Records(head["run"], entries, 0, head["draws"], chains, len(content))


class StoredTensors(Mapping[str, Tensor]):
    """Tensors of a snapshot by name, read at access, and their ``kinds`` (shape, dtype)."""

    def __init__(self, path: Path):
        self.path = path
        if path.is_dir():
            self.kinds = kinds_of_parts(tensor_files(path))
        else:
            with safe_open(path, framework="pt") as file:
                # one after the other: together they are as large as the model's logits
                tensors = ((name, file.get_tensor(name)) for name in file.keys())
                self.kinds = {name: (list(tensor.shape), tensor.dtype) for name, tensor in tensors}

    def __getitem__(self, name: str) -> Tensor:
        shape, dtype = self.kinds[name]
        tensor = torch.empty(shape, dtype=dtype, device="cpu")
        self.read_into({name: tensor})
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.kinds)

    def __len__(self) -> int:
        return len(self.kinds)

    @torch.no_grad()
    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors by name; for a DTensor read only the rows of this rank."""
        if self.path.is_dir() or any(map(is_distributed, tensors.values())):
            read_parts(tensor_files(self.path), tensors)
            return
        with safe_open(self.path, framework="pt") as file:
            for name, tensor in tensors.items():
                tensor.copy_(file.get_tensor(name))


def save_snapshot(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping) -> Path:
    """Write the snapshot after a step; of those up to it keep the first and those of the two newest steps."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = save(on_cpu, metadata={"step": str(step), "state": json.dumps(state)})
    path = folder / f"snapshot-{step:010}-{digest_of_bytes(content).hex()}.safetensors"
    write_whole(path, content)
    _remove_old_snapshots(path)
    return path


def publish_snapshot(aside: Path, step: int, digests: Mapping[str, str], state: Mapping) -> Path:
    """Make a snapshot of the folder ``aside``, where ranks have written files with these digests by name."""
    manifest = json.dumps({"step": step, "state": state, "files": digests}).encode()
    path = aside.with_name(f"snapshot-{step:010}-{digest_of_bytes(manifest).hex()}")
    write_whole(aside / MANIFEST, manifest)
    if _read_state(path) is not None:
        # the same bits, as at the end of a run whose last step wrote a snapshot
        discard(aside)
    else:
        if path.exists():
            discard(path)
        os.rename(aside, path)
    sync(path.parent)
    _remove_old_snapshots(path)
    return path


def _remove_old_snapshots(newest: Path) -> None:
    older = [path for path in snapshots_in(newest.parent) if step_of(path) < step_of(newest)]
    # the order of entries in a file is random, and so is its digest
    same = [path for path in snapshots_in(newest.parent) if step_of(path) == step_of(newest) and path != newest]
    for old in (*older[1 : 1 - KEPT], *same):
        discard(old)


def newest_snapshot(
    folder: Path, at_most: int | None = None, run: Mapping | None = None
) -> tuple[int, StoredTensors, dict, list[Path]]:
    """(step, tensors, state, unusable newer snapshots) of the newest intact snapshot; ValueError if there is none.

    If given, it has at most ``at_most`` steps, and a state whose "run" is ``run``.
    """
    passed = []
    for path in reversed(snapshots_in(folder)):
        if at_most is not None and step_of(path) > at_most:
            continue
        step, state = _read_state(path) or (None, {})
        if step == step_of(path) and (run is None or state.get("run") == run):
            return step, StoredTensors(path), state, passed
        passed.append(path)
    reason = f", {len(passed)} are damaged or of another run" if passed else ""
    raise ValueError(f"snapshot: expected an intact one in {str(folder)!r}, got none{reason}")


def _read_state(path: Path) -> tuple[int, dict] | None:
    """(step, state) of a snapshot; None if it is damaged."""
    named = SNAPSHOT.fullmatch(path.name)[2]
    try:
        if not path.is_dir():
            if digest_of_file(path) != named:
                return None
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
            return int(metadata["step"]), json.loads(metadata["state"])
        manifest = (path / MANIFEST).read_bytes()
        if digest_of_bytes(manifest).hex() != named:
            return None
        content = json.loads(manifest)
        files = {file.name: file for file in tensor_files(path)}
        with ThreadPoolExecutor() as threads:
            digests = dict(zip(files, threads.map(digest_of_file, files.values()), strict=True))
        return (content["step"], content["state"]) if digests == content["files"] else None
    except OSError:
        return None


def tensor_files(snapshot: Path) -> list[Path]:
    return sorted(snapshot.glob("*.safetensors")) if snapshot.is_dir() else [snapshot]


def digest_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=SIZE)).hexdigest()


def step_of(snapshot: Path) -> int:
    return int(SNAPSHOT.fullmatch(snapshot.name)[1])


def snapshots_in(folder: Path) -> list[Path]:
    """Files and folders of snapshots, by step."""
    return sorted(path for path in folder.glob("snapshot-*") if SNAPSHOT.fullmatch(path.name))


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
    """A run to resume.

    Attributes:
        tensors: of the newest intact snapshot.
        entries: of the journal after this snapshot.
        state: of the estimator.
        initial_losses: None if they must be computed.
        refreshed: the step of the last refresh of the initial masks, if any.
    """

    steps: int
    tensors: StoredTensors
    entries: list[Entry]
    state: Mapping
    initial_losses: list[float] | None
    refreshed: int | None
    skipped: int
    batches: str | None
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
            return self._resume(settings, check_batches, check_run)
        except BaseException:
            self.estimator.load_state(before)
            self.close()
            raise

    def _resume(self, settings: Mapping, check_batches: Callable, check_run: Callable | None) -> SavedRun:
        estimator = self.estimator
        records = None
        refreshed = None
        run = None
        entries = []
        at_most = None
        if estimator.journaled:
            records = read_journal(self.path / JOURNAL)
            run = records.header["run"]
            entries = records.entries
            at_most = len(records.entries)
            self._check_settings(settings, run)
        snapshot_step, tensors, state, damaged = newest_snapshot(self.path, at_most, run)
        run = state["run"]
        self._check_settings(settings, run)
        if records is None and next(filter(None, map(_read_state, snapshots_in(self.path))))[1]["run"] != run:
            raise ValueError(
                f"output_dir: expected snapshots of one run in {str(self.path)!r}, got a newest one of another run "
                "than the first; move those of the other run away"
            )
        # the first one is older than the journal: the run's id shows that it belongs to the run
        if records is not None and snapshot_step and state.get("chain") != records.chain[snapshot_step].hex():
            raise ValueError(
                f"output_dir: expected snapshots and a {JOURNAL} of one run in {str(self.path)!r}, got a snapshot of "
                f"step {snapshot_step} that belongs to other records; restore the folder from a copy, or move this "
                "snapshot away"
            )
        if check_run is not None:
            check_run(run["id"])
        self._check_tensors(tensors)
        steps = snapshot_step if records is None else len(entries)
        results = list(map(estimator.recall, entries))
        rows = self._read_rows(run["id"], steps)
        unrecorded = [step for step in range(steps) if step not in rows]
        if records is None:
            kept = state["estimator"]
            losses = state["initial_losses"]
            skipped = state["skipped"]
        else:
            kept = estimator.state()
            losses = records.header["initial_losses"]
            skipped = len(list(takewhile(lambda entry: entry.skipped, reversed(entries))))
            for entry, result in zip(entries, results, strict=True):
                refreshed = entry.step + 1 if result.refreshes else refreshed
                # a power cut may lose lines of steps in the journal, which lacks their flip rates and seconds
                rows.setdefault(entry.step, asdict(result.record(entry.step, entry.tokens, math.nan, math.nan)))
            if refreshed is not None:
                losses = state["initial_losses"] if refreshed <= snapshot_step else None
        for step in unrecorded if records is None else ():
            rows[step] = asdict(StepRecord(step, math.nan, None, None, None, math.nan, math.nan, math.nan))
        batches = state["batches"]
        check_batches(steps, batches)

        for path in unfinished(self.path, WRITTEN):
            discard(path)
        if records is not None:
            self._journal = Journal.resume(self.path / JOURNAL, records)
            self._states[self.path / JOURNAL] = os.stat(self.path / JOURNAL)
        unusable = {*damaged, *(path for path in snapshots_in(self.path) if step_of(path) > steps)}
        for path in unusable:
            path.rename(path.with_suffix(".aside"))
        self.run = run
        self.rows = [rows[step] for step in sorted(rows)]
        write_whole(self.path / METRICS, self._lines(self.rows))
        self._written = len(self.rows)
        warnings = [f"{path} is damaged or of steps that are taken again: it is set aside" for path in unusable]
        if records is not None and records.torn:
            warnings.append(f"the last record of {self.path / JOURNAL} is incomplete: its step is taken again")
        if unrecorded:
            unknown = "figures" if records is None else "flip rates and seconds"
            warnings.append(
                f"{self.path / METRICS} has no intact lines of {len(unrecorded)} of {steps} steps, the first step "
                f"{unrecorded[0]}: their {unknown} are unknown, nan"
            )
        return SavedRun(steps, tensors, entries[snapshot_step:], kept, losses, refreshed, skipped, batches, warnings)

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
        # the name marks it as unfinished for a resumed run
        path = self.path / f"{MANIFEST}.{secrets.token_hex(8)}.tmp"
        path.mkdir()
        return path

    def publish_snapshot(self, aside: Path, step: int, digests: Mapping[str, str], state: Mapping) -> None:
        publish_snapshot(aside, step, digests, self._prepared(state))

    def _prepared(self, state: Mapping) -> dict:
        """Add the run and the current record of the journal to the state of a snapshot."""
        self._check_own()
        if not self.estimator.journaled and (self.path / METRICS).exists():
            # earlier steps are not taken again, and only this file has their losses
            sync(self.path / METRICS)
            sync(self.path)
        return {"run": self.run, "chain": None if self._journal is None else self._journal.chain.hex(), **state}

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
    aside = ranks.run_on_main(lambda: folder.folder_aside())
    try:
        ranks.run_on_all(lambda: _check_seen(aside))
        write = planned_parts(ranks, aside, tensors)

        def write_and_digest() -> tuple[str, str] | None:
            path = write()
            return None if path is None else (path.name, digest_of_file(path))

        digests = dict(filter(None, ranks.all_gather_object(ranks.run_on_all(write_and_digest))))
        ranks.run_on_main(lambda: folder.publish_snapshot(aside, step, digests, state))
    finally:
        if ranks.is_main_process and aside.exists():
            # a resume removes the rest; raise the first error
            with suppress(OSError):
                discard(aside)


@torch.no_grad()
def restore(
    saved: SavedRun, ranks: Ranks, layers: Mapping[str, MaskedLinear], estimator: Estimator, seed: int, refresh
) -> None:
    """Restore logits and the estimator's tensors from a snapshot, and apply the updates of later steps in the journal.

    There is no forward pass. Rank 0 reads for all ranks; for layers that are cut over ranks each reads its own rows.
    ``refresh`` is called if initial masks were refreshed and their losses are missing.
    """
    logits = {name: layer.logits.detach() for name, layer in layers.items()}
    spread = {PREFIX + name: tensor for name, tensor in estimator.tensors().items()}
    if is_sharded(layers):
        ranks.run_on_all(lambda: _check_seen(saved.tensors.path))
        ranks.run_on_all(lambda: saved.tensors.read_into(logits))
    else:
        spread |= logits
    ranks.run_on_main(lambda: saved.tensors.read_into(spread))
    for tensor in spread.values():
        ranks.broadcast(tensor)
    masks = ModelMasks(layers)
    for entry in saved.entries:
        if entry.step == saved.refreshed and saved.initial_losses is None:
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
        ValueError: if there is no journal, it or the first snapshot is damaged, or it has fewer than ``steps`` steps.
    """
    folder = Path(folder)
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
