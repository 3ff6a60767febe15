"""``metrics.jsonl``, the file of what each step saw: a line a step, with a digest of its own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..checked_json import rows_of, sealed_line
from ..files import append_whole, sync, write_whole

# Of a record what the line of its step alone tells: no journal knows it
MEASURED = ("flip_rate", "seconds")


class Metrics:
    """The rows of a run, here and in their file.

    Args:
        path: of the file.
        run: the id of the run, whose lines alone count.

    Attributes:
        rows: of the steps that were taken, the fields of ``StepRecord``.
    """

    def __init__(self, path: Path, run: str):
        self.path, self._run = path, run
        self.rows: list[dict] = []
        self._written = self._size = 0

    def add(self, row: Mapping) -> None:
        """Add the row of a step to the file.

        Where that fails the file ends as before, and the line comes with that of the next step. A file that another
        program has changed or removed is written again, with a warning.

        Raises:
            OSError: if it cannot be written.
        """
        self.rows.append(dict(row))
        if self.is_as_left():
            lines = self._lines(self.rows[self._written :])
            append_whole(self.path, lines)
            self._size += len(lines)
        else:
            warnings.warn(
                f"{self.path} was changed or removed while the run went on: it is written again", stacklevel=2
            )
            self._write()
        self._written = len(self.rows)

    def sync(self) -> None:
        """Wait until the file is on disk, and its name, where it is there."""
        if self.path.exists():
            sync(self.path)
            sync(self.path.parent)

    def is_as_left(self) -> bool:
        """Whether the file has the length that it was given last."""
        return (self.path.stat().st_size if self.path.exists() else 0) == self._size

    def mended(self, steps: int, known: Sequence[Mapping] | None, torn: bool) -> tuple[list[dict], list[str]]:
        """(the rows of a run that goes on, what of its file was damaged or lost); nothing is written.

        Args:
            steps: that are taken.
            known: of a run with a journal the rows of all steps, but for what is MEASURED; else None.
            torn: whether the journal has lost its last record, which is told elsewhere.
        """
        found, damaged = rows_of(self.path.read_bytes(), self._run) if self.path.exists() else ([], 0)
        lines = {row["step"]: row for row in found}
        beyond = max(lines, default=-1) - steps + 1
        told = []
        if damaged:
            of = "left out" if known is None else "written again, but for flip rates and times"
            told.append(f"of the lines in {self.path} {damaged} are damaged, cut short or another run's: they are {of}")
        if known is not None and beyond > torn:
            told.append(f"the journal lacks {beyond} steps that {self.path} tells of: they are taken again")
        for row in known or ():
            line = lines.get(row["step"], {})
            lines[row["step"]] = {**row, **{name: line[name] for name in MEASURED if name in line}}
        lacking = [step for step in range(steps) if step not in lines]
        if lacking:
            told.append(f"{self.path} lacks the lines of {len(lacking)} steps, such as step {lacking[0]}")
        return [lines[step] for step in sorted(lines) if step < steps], told

    def write(self, rows: Sequence[Mapping]) -> None:
        """Write the file anew, with these rows."""
        self.rows = [dict(row) for row in rows]
        self._write()
        self._written = len(self.rows)

    def _write(self) -> None:
        content = self._lines(self.rows)
        write_whole(self.path, content)
        self._size = len(content)

    def _lines(self, rows: Sequence[Mapping]) -> bytes:
        return b"".join(sealed_line(row, self._run) for row in rows)
