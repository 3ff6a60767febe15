"""The journal: what is written is read, and every damage is found."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from maskpro_kernels.learn.estimator import Draw, Entry
from maskpro_kernels.learn.journal import Journal, pack_entry, read_journal

pytestmark = pytest.mark.usefixtures("eager_reference")


def entry(step: int, draws: int = 1) -> Entry:
    return Entry(step, 640, 1.5 + step, tuple(Draw(i, 0.1 * step + i, -0.5 * i) for i in range(draws)), step == 3)


HEADER = {"seed": 3, "name": "ünï", "id": "a run"}
# Bytes of a record with one draw
RECORD = len(pack_entry(entry(0), b""))


def a_journal(path: Path, steps: int = 40, draws: int = 1, header=HEADER) -> list[Entry]:
    entries = [entry(step, draws) for step in range(steps)]
    writer = Journal.create(path, header, draws)
    for one in entries:
        writer.append(one)
    writer.close()
    return entries


@pytest.mark.parametrize("draws", [1, 4])
def test_what_is_written_is_read(tmp_path, draws):
    entries = a_journal(tmp_path / "journal", 7, draws)
    found = read_journal(tmp_path / "journal")
    assert found[:4] == (HEADER, entries, 0, draws)
    writer, before = Journal.resume(tmp_path / "journal", found), found.checksums
    assert writer.steps == 7 and writer.checksum == found.checksums[6]
    writer.append(entry(7, draws))
    found = read_journal(tmp_path / "journal")
    assert found.entries == [*entries, entry(7, draws)] and found.checksums == [*before, writer.checksum]
    for wrong in (entry(7, draws), entry(8, draws + 1)):
        with pytest.raises(ValueError, match=f"entry: expected step 8 with {draws} draws"):
            writer.append(wrong)


def test_every_byte_flipped_is_found(tmp_path):
    path = tmp_path / "journal"
    entries = a_journal(path, 12)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        if at >= len(whole) - RECORD:
            # as one that was cut short
            assert read_journal(path)[1:3] == (entries[:-1], RECORD)
        else:
            with pytest.raises(ValueError, match="journal: expected"):
                read_journal(path)


def test_a_record_cut_short_is_cut_off(tmp_path):
    path = tmp_path / "journal"
    entries = a_journal(path, 5)
    whole = path.read_bytes()
    for cut in range(1, RECORD):
        path.write_bytes(whole[:-cut])
        found = read_journal(path)
        writer = Journal.resume(path, found)
        assert found.entries == entries[:-1] and found.torn == RECORD - cut
        writer.append(entries[-1])
        writer.close()
        assert path.read_bytes() == whole


def test_journals_of_others_are_refused(tmp_path):
    path = tmp_path / "journal"
    a_journal(path, 3)
    content = path.read_bytes()
    path.write_bytes(content[:8] + b"\x02" + content[9:])
    with pytest.raises(ValueError, match="journal: expected format 6, got 2, of another version"):
        read_journal(path)
    path.write_text("nothing")
    with pytest.raises(ValueError, match="journal: expected a journal of maskpro_kernels"):
        read_journal(path)


def test_records_count_in_their_own_run_and_place_alone(tmp_path):
    """Each of them is sound by itself."""
    own, other = tmp_path / "own", tmp_path / "other"
    a_journal(own, 8)
    a_journal(other, 8, header=HEADER | {"id": "b run"})
    content, foreign = own.read_bytes(), other.read_bytes()
    start = len(content) - 8 * RECORD

    def record(of: bytes, step: int) -> bytes:
        return of[start + step * RECORD :][:RECORD]

    records = [record(content, step) for step in range(8)]
    mixed = {
        "of another run": [*records[:3], record(foreign, 3), *records[4:]],
        "all of another run": [record(foreign, step) for step in range(8)],
        "missing": [*records[:3], *records[4:]],
        "twice": [*records[:4], *records[3:]],
        "in another order": [*records[:3], records[4], records[3], *records[5:]],
    }
    for name, chosen in mixed.items():
        own.write_bytes(content[:start] + b"".join(chosen))
        with pytest.raises(ValueError, match=r"journal: expected the record of step \d of this run at byte"):
            pytest.fail(f"{name}: {len(read_journal(own).entries)} steps")
    # the header of the other with these records
    own.write_bytes(foreign[:start] + content[start:])
    with pytest.raises(ValueError, match="journal: expected the record of step 0 of this run"):
        read_journal(own)


class FullDisk:
    """An open file that takes a part of a record, then no more."""

    def __init__(self, file):
        self.file, self.fileno, self.close = file, file.fileno, file.close

    def write(self, content: bytes):
        self.file.write(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_journal_whole(tmp_path):
    entries = a_journal(tmp_path / "journal", 3)
    before = read_journal(tmp_path / "journal")
    writer = Journal.resume(tmp_path / "journal", before)
    file, writer._file = writer._file, FullDisk(writer._file)
    with pytest.raises(OSError, match="No space left"):
        writer.append(entry(3))
    assert read_journal(tmp_path / "journal") == before
    writer._file = file
    writer.append(entry(3))
    assert read_journal(tmp_path / "journal").entries == [*entries, entry(3)]


@pytest.mark.parametrize("failing", ["fsync", "ftruncate"])
def test_after_an_error_that_leaves_the_disk_unknown_no_record_is_taken(tmp_path, monkeypatch, failing):
    """A sync that is asked for again would succeed without a write; after a half no record would be found."""
    path = tmp_path / "journal"
    entries = a_journal(path, 3)
    writer = Journal.resume(path, read_journal(path))
    file = writer._file

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, failing, fail)
        if failing == "ftruncate":
            writer._file = FullDisk(file)
        # the first error is reported
        with pytest.raises(OSError, match="Input/output error" if failing == "fsync" else "No space left"):
            writer.append(entry(3))
    writer._file = file
    size = path.stat().st_size
    with pytest.raises(OSError, match="the disk has failed before, so its content is unknown: resume the run"):
        writer.append(entry(3))
    assert path.stat().st_size == size
    writer.close()
    found = read_journal(path)
    again = Journal.resume(path, found)
    assert found.entries == entries
    again.append(entry(3))
    again.close()
    assert read_journal(path).entries == [*entries, entry(3)]


def test_what_is_read_is_on_disk(tmp_path, monkeypatch):
    """A record of a process that was killed may be in memory alone, and counts from here on."""
    path = tmp_path / "journal"
    a_journal(path, 3)
    before, synced, sync = path.stat().st_ino, [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_ino), sync(file)))
    writer = Journal.resume(path, read_journal(path))
    assert path.stat().st_ino != before and path.stat().st_ino in synced
    writer.close()
