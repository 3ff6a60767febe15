"""The journal: what is written is read, and every damage is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from maskpro_kernels.training import journal
from maskpro_kernels.training.journal import Draw, Entry, Journal

pytestmark = pytest.mark.usefixtures("eager_reference")


def entry(step: int, draws: int = 1) -> Entry:
    return Entry(step, 640, 1.5 + step, tuple(Draw(i, 0.1 * step + i, -0.5 * i) for i in range(draws)), step == 3)


def a_journal(path: Path, steps: int = 40, draws: int = 1) -> list[Entry]:
    entries = [entry(step, draws) for step in range(steps)]
    writer = Journal.create(path, {"seed": 3, "name": "ünï"}, draws)
    for one in entries:
        writer.append(one)
    writer.close()
    return entries


@pytest.mark.parametrize("draws", [1, 4])
def test_what_is_written_is_read(tmp_path, draws):
    entries = a_journal(tmp_path / "journal", 7, draws)
    assert journal.read(tmp_path / "journal") == ({"seed": 3, "name": "ünï"}, entries, 0)
    writer, read, torn = Journal.resume(tmp_path / "journal")
    assert read == entries and torn == 0 and writer.steps == 7
    writer.append(entry(7, draws))
    assert journal.read(tmp_path / "journal")[1] == [*entries, entry(7, draws)]
    for wrong in (entry(7, draws), entry(8, draws + 1)):
        with pytest.raises(ValueError, match=f"entry: expected step 8 with {draws} draws"):
            writer.append(wrong)


def test_ten_thousand_records_take_less_than_a_mebibyte(tmp_path):
    Journal.create(tmp_path / "journal", {}).close()
    record = len(entry(0).packed())
    assert (tmp_path / "journal").stat().st_size + 10_000 * record < 1 << 20


def test_every_byte_flipped_is_found(tmp_path):
    path = tmp_path / "journal"
    entries = a_journal(path)
    whole = path.read_bytes()
    record = len(entries[0].packed())
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        if at >= len(whole) - record:
            # as one that was cut short
            assert journal.read(path)[1:] == (entries[:-1], record)
        else:
            with pytest.raises(ValueError, match="journal: expected"):
                journal.read(path)


def test_a_record_cut_short_is_cut_off(tmp_path):
    path = tmp_path / "journal"
    entries = a_journal(path, 5)
    whole = path.read_bytes()
    record = len(entries[0].packed())
    for cut in range(1, record):
        path.write_bytes(whole[:-cut])
        writer, read, torn = Journal.resume(path)
        assert read == entries[:-1] and torn == record - cut
        writer.append(entries[-1])
        writer.close()
        assert path.read_bytes() == whole


def test_journals_of_others_are_refused(tmp_path):
    path = tmp_path / "journal"
    a_journal(path, 3)
    with pytest.raises(ValueError, match="path: expected a new file"):
        Journal.create(path, {})
    whole = path.read_bytes()
    record = len(entry(0).packed())
    path.write_bytes(whole[: -2 * record] + whole[-record:])
    with pytest.raises(ValueError, match="journal: expected step 1 at byte .*, got 2"):
        journal.read(path)
    path.write_text("nothing")
    with pytest.raises(ValueError, match="journal: expected a journal of maskpro_kernels"):
        journal.read(path)


def test_a_full_disk_leaves_the_journal_whole(tmp_path, monkeypatch):
    entries = a_journal(tmp_path / "journal", 3)
    writer, _, _ = Journal.resume(tmp_path / "journal")

    class Full:
        """Takes a part of a record, then no more."""

        def fileno(self):
            return file.fileno()

        def write(self, content):
            file.write(content[:10])
            raise OSError(28, "No space left on device")

    file, writer._file = writer._file, Full()
    with pytest.raises(OSError, match="No space left"):
        writer.append(entry(3))
    assert journal.read(tmp_path / "journal") == ({"seed": 3, "name": "ünï"}, entries, 0)
    writer._file = file
    writer.append(entry(3))
    assert journal.read(tmp_path / "journal")[1] == [*entries, entry(3)]
