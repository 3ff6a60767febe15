"""Measured entries of the launch tables: one JSON file for each target, which ``benchmarks/tune.py`` writes.

``tuned/sm_90.json`` is a list of runs of the tuner, on a GPU whose target is sm_90. A run says when, where and of what
code it was, and holds a ``Measured`` for each entry of a table that it has timed. ``tiles.py`` lays them over its own
entries when it is imported, in their order.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("tuned")
# Fields of entries that need not be powers of two
COUNTS = ("num_stages", "registers", "steps")

# Entries by (kernel, target) and, where it has several, the size: one, or a tuple of those to choose among
Table = dict[tuple, Any]


@dataclass(frozen=True)
class Measured:
    """What a run has found for one entry of a table.

    Attributes:
        kernel: its name in the table.
        size: M of a kernel over groups, bytes of an operand of a product, None of other kernels.
        replaces: fields of the entry that stood in the table.
        entry: fields of the fastest one; the same where no candidate was faster.
        before, microseconds: of one call of each, summed over the cases in which the table takes the entry.
    """

    kernel: str
    size: int | None
    replaces: dict[str, int | None]
    entry: dict[str, int | None]
    before: float
    microseconds: float

    @property
    def changed(self) -> bool:
        return self.entry != self.replaces


@dataclass(frozen=True)
class Run:
    """Where and when entries were measured.

    Attributes:
        device: name of the GPU.
        date: ISO 8601.
        commit: of the code, marked where files differ from it; None outside a repository.
        torch, triton: versions.
    """

    device: str
    date: str
    commit: str | None
    torch: str
    triton: str
    entries: tuple[Measured, ...] = ()


def path_of(target: str) -> Path:
    """The package's file for a target."""
    return FOLDER / f"{target}.json"


def read(path: Path) -> list[Run]:
    """The runs of a file, oldest first.

    Raises:
        ValueError: if it is none; names the file and the entry.
    """
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from None
    return [_run(run, f"{path}, run {i}") for i, run in enumerate(_list(runs, f"{path}"), 1)]


def text_of(runs: Sequence[Run]) -> str:
    """What a file of these holds; each entry is one line."""
    texts = []
    for run in runs:
        head = {name: value for name, value in dataclasses.asdict(run).items() if name != "entries"}
        lines = ",\n".join(f"    {json.dumps(dataclasses.asdict(measured))}" for measured in run.entries)
        texts.append(f'  {json.dumps(head)[:-1]}, "entries": [\n{lines}\n  ]}}')
    return "[\n" + ",\n".join(texts) + "\n]\n"


def lay_files_over(tables: Sequence[Table], targets: Sequence[str]) -> None:
    """Put the entries of all files of the folder into the tables, which have these ``targets``.

    Raises:
        ValueError: if a file is malformed, or names a target, kernel, field or entry that the tables do not have.
    """
    for path in sorted(FOLDER.glob("*.json")):
        if path.stem not in targets:
            raise ValueError(f"{path}: expected the name of a target of the tables, one of {', '.join(targets)}")
        lay_over(tables, path.stem, path)


def lay_over(tables: Sequence[Table], target: str, path: Path) -> None:
    """Put the entries of one file into the tables, as those of ``target``; raises as ``lay_files_over``."""
    for i, run in enumerate(read(path), 1):
        for j, measured in enumerate(run.entries, 1):
            where = f"{path}, run {i}, entry {j}"
            key = key_of(measured.kernel, target, measured.size)
            table = next((table for table in tables if key in table), None)
            if table is None:
                raise ValueError(
                    f"{where}: expected a kernel of the launch tables and its size, "
                    f"got {measured.kernel!r} and {measured.size!r}"
                )
            table[key] = _replaced(table[key], measured, f"{where}, {measured.kernel}")


def key_of(kernel: str, target: str, size: int | None) -> tuple:
    """That of a table."""
    return (kernel, target) if size is None else (kernel, target, size)


def exchanged(entries, old, new):
    """What a table holds, with ``new`` in the place of ``old``: one entry, or a tuple of them."""
    if not isinstance(entries, tuple):
        return new
    return tuple(new if entry == old else entry for entry in entries)


def _replaced(entries, measured: Measured, where: str):
    present = entries if isinstance(entries, tuple) else (entries,)
    old, new = (_entry(type(present[0]), getattr(measured, name), f"{where}: {name}") for name in ("replaces", "entry"))
    if old not in present:
        raise ValueError(
            f"{where}: replaces: expected an entry of the table, got {old}; the table has changed since, so take out "
            "what was measured of this kernel, and tune it again"
        )
    # a kernel of a single step would leave groups out
    if getattr(old, "steps", 1) == 1 and getattr(new, "steps", 1) != 1:
        raise ValueError(f"{where}: entry: steps: expected 1, as the table has it, got {new.steps}")
    return exchanged(entries, old, new)


def _entry(kind: type, values: Any, where: str):
    """An entry of a table by its fields."""
    for name, value in _fields(kind, values, where).items():
        if name == "registers" and value is None:
            continue
        whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if not whole or (name not in COUNTS and value & (value - 1)):
            expected = "a positive integer" if name in COUNTS else "a power of two"
            raise ValueError(f"{where}: {name}: expected {expected}, got {value!r}")
    return kind(**values)


def _run(values: Any, where: str) -> Run:
    run = Run(**_fields(Run, values, where))
    for name in ("device", "date", "torch", "triton"):
        if not isinstance(getattr(run, name), str):
            raise ValueError(f"{where}: {name}: expected a string, got {getattr(run, name)!r}")
    try:
        datetime.date.fromisoformat(run.date)
    except ValueError:
        raise ValueError(f"{where}: date: expected one such as 2026-01-31, got {run.date!r}") from None
    entries = enumerate(_list(run.entries, f"{where}: entries"), 1)
    return dataclasses.replace(run, entries=tuple(_measured(entry, f"{where}, entry {i}") for i, entry in entries))


def _measured(values: Any, where: str) -> Measured:
    measured = Measured(**_fields(Measured, values, where))
    if not isinstance(measured.kernel, str) or not isinstance(measured.size, int | None):
        raise ValueError(
            f"{where}: expected a kernel's name and its size or null, got {measured.kernel!r} and {measured.size!r}"
        )
    for name in ("before", "microseconds"):
        value = getattr(measured, name)
        if not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"{where}: {name}: expected microseconds above 0, got {value!r}")
    return measured


def _list(values: Any, where: str) -> list:
    if not isinstance(values, list):
        raise ValueError(f"{where}: expected a list, got {values!r:.80}")
    return values


def _fields(kind: type, values: Any, where: str) -> Mapping[str, Any]:
    expected = [field.name for field in dataclasses.fields(kind)]
    if not isinstance(values, dict) or values.keys() != set(expected):
        found = ", ".join(values) if isinstance(values, dict) else f"{values!r:.80}"
        raise ValueError(f"{where}: expected the fields {', '.join(expected)}; got {found}")
    return values
