"""The journal of a run: a record with a checksum for each step.

The logits before the first step and the records determine the logits after each one, see ``estimator.replay``.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..files import SIZE, digest_of_bytes, naming_path, write_whole
from .estimator import Draw, Entry

# Format of the folder of a run and its files; increase it when one of these changes
FORMAT = 6
JOURNAL = "journal"

MAGIC = b"maskpro\n"
# magic, format, bytes of the JSON; digest of these and of the JSON; JSON
HEAD = struct.Struct("<8sII")
# step, tokens, true if the update was skipped, loss under the initial masks; draws; checksum
STEP = struct.Struct("<QQ?d")
# id, loss, factor of its score
DRAW = struct.Struct("<Hdd")


def pack_entry(entry: Entry, header_digest: bytes) -> bytes:
    """Pack the record of a step; its checksum covers it and the digest of the journal's header."""
    body = STEP.pack(entry.step, entry.tokens, entry.skipped, entry.initial_loss)
    body += b"".join(DRAW.pack(*draw) for draw in entry.draws)
    return body + digest_of_bytes(header_digest, body)


def unpack_entry(record: bytes, header_digest: bytes) -> Entry | None:
    """Unpack the entry of a record; None if its checksum differs."""
    body = record[:-SIZE]
    if record[-SIZE:] != digest_of_bytes(header_digest, body):
        return None
    step, tokens, skipped, initial_loss = STEP.unpack(body[: STEP.size])
    draws = tuple(Draw(*draw) for draw in DRAW.iter_unpack(body[STEP.size :]))
    return Entry(step, tokens, initial_loss, draws, skipped)


class Records(NamedTuple):
    """Content of a journal.

    Attributes:
        header: as ``Journal.create`` got it.
        entries: of the steps, from 0.
        torn: bytes of an incomplete record after them.
        draws: number of draws a step.
        checksums: of the records.
        header_digest: digest of the header.
        end: byte where the last complete record ends.
    """

    header: dict
    entries: list[Entry]
    torn: int
    draws: int
    checksums: list[bytes]
    header_digest: bytes
    end: int


class Journal:
    """A journal that is open for appending; made by ``create`` or ``resume``.

    A file begins with a header, JSON with its digest. Records of equal size follow, appended and synced one by one.
    The checksum of a record covers its step and the header, which has the id of the run. So a record is valid only in
    its own run and place. A crash can leave only the last record incomplete, which is then removed; damage anywhere
    else is refused.

    Attributes:
        steps: number of the records.
        checksum: of the last record; None before the first one.
    """

    def __init__(self, path: Path, draws: int, header_digest: bytes, steps: int, checksum: bytes | None):
        self.path = path
        self.draws = draws
        self.header_digest = header_digest
        self.steps = steps
        self.checksum = checksum
        self._file = open(path, "a+b", buffering=0)
        self._failed = False
        self._end = os.fstat(self._file.fileno()).st_size

    @classmethod
    def create(cls, path: Path, header: Mapping, draws: int = 1) -> Journal:
        """Start a journal; its header has the unique id of the run."""
        text = json.dumps({"draws": draws, "run": header}, sort_keys=True).encode()
        head = HEAD.pack(MAGIC, FORMAT, len(text))
        header_digest = digest_of_bytes(head, text)
        write_whole(path, head + header_digest + text)
        return cls(path, draws, header_digest, 0, None)

    @classmethod
    def resume(cls, path: Path, records: Records) -> Journal:
        """Open the journal of these records, and remove an incomplete last one."""
        # write again: records of a killed process may be only in memory, and after a failed sync another one does not
        # write data that the system marks as written
        write_whole(path, path.read_bytes()[: records.end])
        checksum = records.checksums[-1] if records.checksums else None
        return cls(path, records.draws, records.header_digest, len(records.entries), checksum)

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
        record = pack_entry(entry, self.header_digest)
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
        self.checksum = record[-SIZE:]

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
    header_digest = content[HEAD.size : HEAD.size + SIZE]
    text = content[HEAD.size + SIZE :][:size]
    if len(text) < size or digest_of_bytes(content[: HEAD.size], text) != header_digest:
        raise ValueError(f"journal: expected a whole header, got a damaged one in {str(path)!r}")
    header = json.loads(text)
    length = STEP.size + header["draws"] * DRAW.size + SIZE
    entries = []
    checksums = []
    torn = 0
    end = HEAD.size + SIZE + size
    while end < len(content):
        record = content[end : end + length]
        entry = unpack_entry(record, header_digest) if len(record) == length else None
        if entry is None or entry.step != len(entries):
            if end + length < len(content):
                raise ValueError(
                    f"journal: expected the record of step {len(entries)} of this run at byte {end}, got a damaged "
                    f"one or another's in {str(path)!r}"
                )
            torn = len(record)
            break
        entries.append(entry)
        checksums.append(record[-SIZE:])
        end += length
    return Records(header["run"], entries, torn, header["draws"], checksums, header_digest, end)
