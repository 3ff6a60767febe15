"""The journal of a run: what it takes to rebuild its logits, a checksummed record a step.

A file begins with a header, JSON of any length with its checksum; records of equal size follow, appended and synced
one by one. A record that a crash has cut short is the last one, and is cut off; one that is damaged anywhere else is
refused.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..files import write_whole

MAGIC = b"maskpro\n"
VERSION = 1
# magic, version, bytes of the JSON, its checksum
HEAD = struct.Struct("<8sIII")
# step, tokens, whether the update was skipped, loss under the initial masks; then the draws; then the checksum
STEP = struct.Struct("<QQ?d")
DRAW = struct.Struct("<Hdd")
CHECKSUM = struct.Struct("<I")


class Draw(NamedTuple):
    """One draw of a step: its id, the loss under it, and the factor of its score in the update."""

    id: int
    loss: float
    coef: float


@dataclass(frozen=True)
class Entry:
    """What one step did.

    Attributes:
        step: index of the step, from 0.
        tokens: of its batches.
        initial_loss: loss of its batches under the initial masks, weighted as those of the draws.
        draws: the draws of the step.
        skipped: whether no logits moved, since a loss was not finite.
    """

    step: int
    tokens: int
    initial_loss: float
    draws: tuple[Draw, ...]
    skipped: bool = False

    def packed(self) -> bytes:
        body = STEP.pack(self.step, self.tokens, self.skipped, self.initial_loss)
        body += b"".join(DRAW.pack(*draw) for draw in self.draws)
        return body + CHECKSUM.pack(zlib.crc32(body))

    @classmethod
    def unpacked(cls, record: bytes) -> Entry | None:
        """The entry, or None where the checksum is another."""
        body = record[: -CHECKSUM.size]
        if CHECKSUM.unpack(record[-CHECKSUM.size :]) != (zlib.crc32(body),):
            return None
        step, tokens, skipped, initial_loss = STEP.unpack(body[: STEP.size])
        return cls(
            step, tokens, initial_loss, tuple(Draw(*draw) for draw in DRAW.iter_unpack(body[STEP.size :])), skipped
        )


class Journal:
    """A journal that is open for appending; ``create`` or ``resume`` gives one.

    Attributes:
        header: what was given to ``create``.
        draws: draws a step.
        steps: how many records there are.
    """

    def __init__(self, path: Path, header: dict, draws: int, steps: int):
        self.path, self.header, self.draws, self.steps = path, header, draws, steps
        self._file = open(path, "ab", buffering=0)
        self._process, self._end = os.getpid(), os.fstat(self._file.fileno()).st_size

    @classmethod
    def create(cls, path: str | Path, header: Mapping, draws: int = 1) -> Journal:
        """Start a journal; it is on disk as a whole, or not at all.

        Args:
            path: a new file.
            header: what tells this run from others; JSON can hold it.
            draws: draws a step.

        Raises:
            ValueError: if the file exists.
            OSError: if it cannot be written.
        """
        path = Path(path)
        if path.exists():
            raise ValueError(f"path: expected a new file, got {str(path)!r}, which exists")
        text = json.dumps({"draws": draws, "run": header}, sort_keys=True).encode()
        write_whole(path, HEAD.pack(MAGIC, VERSION, len(text), zlib.crc32(text)) + text)
        return cls(path, json.loads(text)["run"], draws, 0)

    @classmethod
    def resume(cls, path: str | Path) -> tuple[Journal, list[Entry], int]:
        """(journal to append to, its entries, bytes of a last record that was cut short and is gone now).

        Raises:
            ValueError, OSError: as ``read``.
        """
        header, draws, entries, end, torn = _read(Path(path))
        if torn:
            with open(path, "r+b") as file:
                file.truncate(end)
                os.fsync(file.fileno())
        return cls(Path(path), header, draws, len(entries)), entries, torn

    def append(self, entry: Entry) -> None:
        """Write a record and wait until it is on disk.

        Raises:
            RuntimeError: if another process has opened the journal: this one was forked from it.
            ValueError: if it is not the next step, or has another number of draws, or the file does not end where the
                last record did.
            OSError: if it cannot be written; what had been written of it is then taken back.
        """
        self._check_place()
        if entry.step != self.steps or len(entry.draws) != self.draws:
            raise ValueError(
                f"entry: expected step {self.steps} with {self.draws} draws, got step {entry.step} with "
                f"{len(entry.draws)}"
            )
        record = entry.packed()
        try:
            if self._file.write(record) != len(record):
                raise OSError(f"{self.path}: the disk took a part of a record only")
            os.fsync(self._file.fileno())
        except BaseException:
            # an interrupt too: what is not known to be on disk is not there
            os.ftruncate(self._file.fileno(), self._end)
            raise
        self.steps += 1
        self._end += len(record)

    def _check_place(self) -> None:
        """Raise unless this process alone has written behind what was there."""
        if os.getpid() != self._process:
            raise RuntimeError(
                f"journal: expected process {self._process}, which has opened it, got {os.getpid()}, which was forked "
                "from it: two may not write to one run"
            )
        end = os.fstat(self._file.fileno()).st_size
        if end != self._end:
            raise ValueError(
                f"journal: expected {str(self.path)!r} to end at byte {self._end}, as this process has left it, got "
                f"{end}: something else writes to it; resume the run to have what is sound of it"
            )

    def close(self) -> None:
        self._file.close()


def read(path: str | Path) -> tuple[dict, list[Entry], int]:
    """(header, entries, bytes of a last record that was cut short) of a journal, which stays as it is.

    Raises:
        ValueError: if the file is no journal, of another version, or damaged; the message tells where.
        OSError: if it cannot be read.
    """
    header, _, entries, _, torn = _read(Path(path))
    return header, entries, torn


def _read(path: Path) -> tuple[dict, int, list[Entry], int, int]:
    """(header, draws a step, entries, where they end, bytes behind)."""
    content = path.read_bytes()
    if len(content) < HEAD.size or content[: len(MAGIC)] != MAGIC:
        raise ValueError(f"journal: expected a journal of maskpro_kernels, got {str(path)!r}")
    _, version, size, checksum = HEAD.unpack(content[: HEAD.size])
    if version != VERSION:
        raise ValueError(f"journal: expected version {VERSION}, got {version} in {str(path)!r}")
    start = HEAD.size + size
    text = content[HEAD.size : start]
    if len(text) < size or zlib.crc32(text) != checksum:
        raise ValueError(f"journal: expected a whole header, got a damaged one in {str(path)!r}")
    head = json.loads(text)
    draws = head["draws"]
    length = STEP.size + draws * DRAW.size + CHECKSUM.size
    entries = []
    for at in range(start, len(content), length):
        record = content[at : at + length]
        entry = Entry.unpacked(record) if len(record) == length else None
        if entry is None:
            if at + length < len(content):
                raise ValueError(f"journal: expected a whole record of step {len(entries)} at byte {at}, got a damaged "
                                 f"one in {str(path)!r}")  # fmt: skip
            return head["run"], draws, entries, at, len(record)
        if entry.step != len(entries):
            raise ValueError(f"journal: expected step {len(entries)} at byte {at}, got {entry.step} in {str(path)!r}")
        entries.append(entry)
    return head["run"], draws, entries, len(content), 0
