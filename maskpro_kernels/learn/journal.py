"""The journal of a run: what it takes to rebuild its logits, a checksummed record a step.

A file begins with a header, JSON of any length with its digest; records of equal size follow, appended and synced one
by one. The digests are a chain: that of a record covers the digest before it, and the first one that of the header,
which holds the id of the run. So a record counts in its own run and at its own place alone. A record that a crash has
cut short is the last one, and is cut off; one that is damaged anywhere else is refused.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..digests import SIZE, digest_of_bytes
from ..files import write_whole

MAGIC = b"maskpro\n"
VERSION = 2
# magic, version, bytes of the JSON; then the digest of these and of the JSON; then the JSON
HEAD = struct.Struct("<8sII")
# step, tokens, whether the update was skipped, loss under the initial masks; then the draws; then the digest
STEP = struct.Struct("<QQ?d")
DRAW = struct.Struct("<Hdd")


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

    def packed(self, chain: bytes) -> bytes:
        """The record behind one with that digest; it ends in its own."""
        body = STEP.pack(self.step, self.tokens, self.skipped, self.initial_loss)
        body += b"".join(DRAW.pack(*draw) for draw in self.draws)
        return body + digest_of_bytes(chain, body)

    @classmethod
    def unpacked(cls, record: bytes, chain: bytes) -> Entry | None:
        """The entry, or None where its digest does not continue the chain."""
        body = record[:-SIZE]
        if record[-SIZE:] != digest_of_bytes(chain, body):
            return None
        step, tokens, skipped, initial_loss = STEP.unpack(body[: STEP.size])
        return cls(
            step, tokens, initial_loss, tuple(Draw(*draw) for draw in DRAW.iter_unpack(body[STEP.size :])), skipped
        )


class Records(NamedTuple):
    """What a journal holds.

    Attributes:
        header: what was given to ``Journal.create``.
        entries: of the steps.
        torn: bytes of a last record that was cut short.
        draws: draws a step.
        chain: digests at which the journal stood before the first step and after each one.
        end: where the entries end, in bytes.
    """

    header: dict
    entries: list[Entry]
    torn: int
    draws: int
    chain: list[bytes]
    end: int


class Journal:
    """A journal that is open for appending; ``create`` or ``resume`` gives one.

    Attributes:
        header: what was given to ``create``.
        draws: draws a step.
        steps: how many records there are.
        chain: the digest of the last record; before the first one that of the header.
    """

    def __init__(self, path: Path, header: dict, draws: int, steps: int, chain: bytes):
        self.path, self.header, self.draws, self.steps, self.chain = path, header, draws, steps, chain
        self._file = open(path, "a+b", buffering=0)
        self._failed = False
        self._process, self._end = os.getpid(), os.fstat(self._file.fileno()).st_size

    @classmethod
    def create(cls, path: str | Path, header: Mapping, draws: int = 1) -> Journal:
        """Start a journal; it is on disk as a whole, or not at all.

        Args:
            path: a new file.
            header: what tells this run from others, among it an id of its own; JSON can hold it.
            draws: draws a step.

        Raises:
            ValueError: if the file exists.
            OSError: if it cannot be written.
        """
        path = Path(path)
        if path.exists():
            raise ValueError(f"path: expected a new file, got {str(path)!r}, which exists")
        text = json.dumps({"draws": draws, "run": header}, sort_keys=True).encode()
        head = HEAD.pack(MAGIC, VERSION, len(text))
        chain = digest_of_bytes(head, text)
        write_whole(path, head + chain + text)
        return cls(path, json.loads(text)["run"], draws, 0, chain)

    @classmethod
    def resume(cls, path: str | Path, found: Records) -> Journal:
        """The journal to append to; of a last record that was cut short the bytes are gone now.

        Args:
            path: of the file.
            found: what ``read`` gave of it.

        Raises:
            ValueError: if its length has changed since.
            OSError: if it cannot be read or written.
        """
        path = Path(path)
        content = path.read_bytes()
        if len(content) != found.end + found.torn:
            raise ValueError(
                f"journal: expected {found.end + found.torn} bytes, as were read before, got {len(content)} in "
                f"{str(path)!r}: something else writes to it"
            )
        # anew: what another process has written may be in memory alone, where it was killed or a sync failed, and a
        # sync does not write again what the system takes for written
        write_whole(path, content[: found.end])
        return cls(path, found.header, found.draws, len(found.entries), found.chain[-1])

    def append(self, entry: Entry) -> None:
        """Write a record and wait until it is on disk.

        Raises:
            RuntimeError: if another process has opened the journal: this one was forked from it.
            ValueError: if it is not the next step, or has another number of draws, or the file does not end where the
                last record did.
            OSError: if it cannot be written; what had been written of it is then taken back. Where it was the sync that
                failed, or nothing can be taken back, no further record is taken: ``resume`` goes on.
        """
        if self._failed:
            raise OSError(f"{self.path}: the disk has failed before, and what it holds is not known: go on by a resume")
        self._check_place()
        if entry.step != self.steps or len(entry.draws) != self.draws:
            raise ValueError(
                f"entry: expected step {self.steps} with {self.draws} draws, got step {entry.step} with "
                f"{len(entry.draws)}"
            )
        record = entry.packed(self.chain)
        try:
            if self._file.write(record) != len(record):
                raise OSError(f"{self.path}: the disk took a part of a record only")
            self._sync()
        except BaseException:
            # an interrupt too: what is not known to be on disk is not there
            self._take_back()
            raise
        self.steps += 1
        self._end += len(record)
        self.chain = record[-SIZE:]

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

    def _sync(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError:
            # the system takes for written what it could not write: another sync would succeed, and write nothing
            self._failed = True
            raise

    def _take_back(self) -> None:
        """Let the file end where the last record did; the error that led to it is the one to be told."""
        try:
            os.ftruncate(self._file.fileno(), self._end)
        except OSError:
            self._failed = True

    def put_back(self) -> bool:
        """Whether another program had removed the file; it is then there again, with all its records.

        Raises:
            ValueError: if another file is in its place.
            OSError: if it cannot be written.
        """
        own = os.fstat(self._file.fileno())
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            # what was removed stays as long as it is open
            write_whole(self.path, os.pread(self._file.fileno(), own.st_size, 0))
            self._file.close()
            self._file = open(self.path, "a+b", buffering=0)
            return True
        if not os.path.samestat(own, found):
            raise ValueError(
                f"journal: expected the one that this trainer writes, got another in its place, {str(self.path)!r}"
            )
        return False

    def close(self) -> None:
        self._file.close()


def read(path: str | Path) -> Records:
    """What a journal holds, which stays as it is.

    Raises:
        ValueError: if the file is no journal, of another version, or damaged; the message tells where.
        OSError: if it cannot be read.
    """
    path = Path(path)
    content = path.read_bytes()
    head, start = _header(content, path)
    draws, chain = head["draws"], [content[HEAD.size : HEAD.size + SIZE]]
    length = STEP.size + draws * DRAW.size + SIZE
    entries: list[Entry] = []
    for at in range(start, len(content), length):
        record = content[at : at + length]
        entry = Entry.unpacked(record, chain[-1]) if len(record) == length else None
        if entry is None:
            if at + length < len(content):
                raise ValueError(f"journal: expected the record of step {len(entries)} of this run at byte {at}, got a "
                                 f"damaged one or another's in {str(path)!r}")  # fmt: skip
            return Records(head["run"], entries, len(record), draws, chain, at)
        entries.append(entry)
        chain.append(record[-SIZE:])
    return Records(head["run"], entries, 0, draws, chain, len(content))


def _header(content: bytes, path: Path) -> tuple[dict, int]:
    """(what the header of a journal holds, where it ends)."""
    if len(content) < HEAD.size or content[: len(MAGIC)] != MAGIC:
        raise ValueError(f"journal: expected a journal of maskpro_kernels, got {str(path)!r}")
    _, version, size = HEAD.unpack(content[: HEAD.size])
    if version != VERSION:
        raise ValueError(f"journal: expected version {VERSION}, got {version} in {str(path)!r}")
    text = HEAD.size + SIZE
    start = text + size
    sound = digest_of_bytes(content[: HEAD.size], content[text:start]) == content[HEAD.size : text]
    if len(content) < start or not sound:
        raise ValueError(f"journal: expected a whole header, got a damaged one in {str(path)!r}")
    return json.loads(content[text:start]), start
