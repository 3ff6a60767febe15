"""Files of measured entries: they take the place of the tables' own at import, and none that is wrong is taken."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import asdict

import pytest

from maskpro_kernels.ops.triton import tiles, tuned
from maskpro_kernels.ops.triton.tiles import Configuration, Tiles

TARGET = "sm_90"
OLD = tiles.CONFIGURATIONS["unpack", TARGET, 4]
NARROW = tiles.TILES["masked_linear", TARGET, 2][0]
RUN = tuned.Run(
    "NVIDIA H100 80GB HBM3",
    "2026-01-31",
    "c0ffee",
    "2.11.0",
    "3.6.0",
    (
        tuned.Measured("unpack", 4, asdict(OLD), asdict(Configuration(block=512, num_warps=8)), 5.0, 4.0),
        tuned.Measured("masked_linear", 2, asdict(NARROW), asdict(Tiles(out=16, tokens=16, k=128)), 9.0, 8.0),
        tuned.Measured("split_sum", None, *[asdict(tiles.ELEMENTS["split_sum", TARGET])] * 2, 2.0, 2.0),
    ),
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    return tmp_path


@pytest.fixture
def tables():
    return [dict(table) for table in tiles.TABLES]


def test_what_is_written_is_read(folder):
    later = tuned.Run("a GPU", "2026-02-01", None, "2.12", "3.7", RUN.entries[:1])
    tuned.path_of(TARGET).write_text(tuned.text_of([RUN, later]), encoding="utf-8")
    assert tuned.read(folder / "sm_90.json") == [RUN, later]


def test_entries_take_their_places_when_the_tables_are_imported(folder, monkeypatch):
    tuned.path_of(TARGET).write_text(tuned.text_of([RUN]), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("maskpro_kernels.ops.triton.tiles_again", tiles.__file__)
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, again)
    spec.loader.exec_module(again)
    assert asdict(again.CONFIGURATIONS["unpack", TARGET, 4]) == RUN.entries[0].entry
    assert asdict(again.TILES["masked_linear", TARGET, 2][0]) == RUN.entries[1].entry
    for mine, own in zip(again.TABLES, tiles.TABLES, strict=True):
        changed = {key for key in own if repr(mine[key]) != repr(own[key])}
        assert mine.keys() == own.keys()
        assert changed <= {("unpack", TARGET, 4), ("masked_linear", TARGET, 2)}


def test_later_runs_lie_over_earlier_ones(folder, tables):
    (first, *_), newest = RUN.entries, asdict(Configuration(block=128))
    later = tuned.Run("a GPU", "2026-02-01", None, "2.12", "3.7",
                      (tuned.Measured("unpack", 4, first.entry, newest, 4.0, 3.0),))  # fmt: skip
    tuned.path_of(TARGET).write_text(tuned.text_of([RUN, later]), encoding="utf-8")
    tuned.lay_files_over(tables, tuple(tiles.PROCESSORS))
    assert tables[0]["unpack", TARGET, 4] == Configuration(block=128)
    assert tables[0]["unpack", "sm_80", 4] == OLD


def as_read() -> list[dict]:
    return json.loads(json.dumps([asdict(RUN)]))


def changed(*path, value):
    """Of the file, with another value at that place of the run."""

    def change(runs):
        *way, last = path
        at = runs[0]
        for step in way:
            at = at[step]
        at[last] = value
        return runs

    return change


DAMAGED = [
    (lambda runs: {}, r"sm_90.json: expected a list, got {}"),
    (lambda runs: [3], r"run 1: expected the fields device, date, .*; got 3"),
    (changed("speed", value=3), r"run 1: expected the fields device, .*; got .*speed"),
    (changed("torch", value=2.11), r"run 1: torch: expected a string, got 2.11"),
    (changed("date", value="31.1.2026"), r"run 1: date: expected one such as 2026-01-31, got '31.1.2026'"),
    (changed("entries", value=None), r"run 1: entries: expected a list, got None"),
    (changed("entries", 1, value=[]), r"run 1, entry 2: expected the fields kernel, .*; got \[\]"),
    (changed("entries", 0, "kernel", value="conv"), r"run 1, entry 1: expected a kernel .*, got 'conv' and 4"),
    (changed("entries", 0, "kernel", value=[]), r"run 1, entry 1: expected a kernel's name and its size or null"),
    (changed("entries", 0, "size", value=3), r"run 1, entry 1: expected a kernel .* its size, got 'unpack' and 3"),
    (changed("entries", 0, "before", value=0), r"run 1, entry 1: before: expected microseconds above 0, got 0"),
    (changed("entries", 0, "entry", "out", value=16), r"entry 1, unpack: entry: expected the fields .*block.*out"),
    (changed("entries", 0, "entry", "block", value=96), r"unpack: entry: block: expected a power of two, got 96"),
    (changed("entries", 0, "entry", "block", value=True), r"unpack: entry: block: expected a power of two, got True"),
    (changed("entries", 1, "entry", "num_stages", value=0), r"num_stages: expected a positive integer, got 0"),
    (changed("entries", 0, "entry", "steps", value=2), r"unpack: entry: steps: expected 1, as the table has it, got 2"),
    (changed("entries", 0, "replaces", "block", value=64), r"unpack: replaces: expected an entry of the table"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), DAMAGED)
def test_a_damaged_file_is_refused_by_file_and_entry(change, message, folder, tables):
    (folder / "sm_90.json").write_text(json.dumps(change(as_read())))
    with pytest.raises(ValueError, match=rf"{folder}.*{message}"):
        tuned.lay_files_over(tables, tuple(tiles.PROCESSORS))


def test_a_file_that_is_none_is_refused(folder, tables):
    for name, content, message in (
        ("sm_90.json", b"[", "sm_90.json: expected JSON"),
        ("sm_90.json", b"\xff", "sm_90.json: expected JSON"),
        ("sm_86.json", b"[]", "sm_86.json: expected the name of a target of the tables, one of sm_80"),
    ):
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            tuned.lay_files_over(tables, tuple(tiles.PROCESSORS))
        (folder / name).unlink()


def test_registers_may_be_left_to_the_compiler(folder, tables):
    held = changed("entries", 0, "entry", "registers", value=128)(as_read())
    (folder / "sm_90.json").write_text(json.dumps(held))
    tuned.lay_files_over(tables, tuple(tiles.PROCESSORS))
    assert tables[0]["unpack", TARGET, 4].registers == 128
    assert tables[3]["masked_linear", TARGET, 2][0].registers is None
