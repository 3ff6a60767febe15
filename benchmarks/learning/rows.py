"""Rows of a comparison: a JSON line each, appended at once, and their table."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from maskpro_kernels.files import write_whole

ROWS = "rows.jsonl"
TABLE = "table.md"
# How a row with learned or refitted weights is called after the name of its method
WITH_WEIGHTS = ", its weights"


class Rows:
    """The rows in a folder. The first line of the file has common values, such as model and texts.

    Args:
        folder: made if missing.
        shared: what the rows share.

    Raises:
        ValueError: if the folder holds rows of a comparison that shares something else, or a line is damaged.
    """

    def __init__(self, folder: Path, shared: Mapping):
        self.path = folder / ROWS
        # as it comes back from the file
        self.shared = shared = json.loads(json.dumps(shared))
        folder.mkdir(parents=True, exist_ok=True)
        lines = _read(self.path) if self.path.exists() else []
        if not lines:
            lines = [{"shared": shared}]
            self._append(lines)
        first, *rows = lines
        self.rows = _newest(rows)
        if not self.rows and first["shared"] != shared:
            # of a call that ended before it had a row
            first = {"shared": shared}
            write_whole(self.path, json.dumps(first).encode() + b"\n")
        if first["shared"] != shared:
            names = dict.fromkeys((*shared, *first["shared"]))
            differing = [name for name in names if first["shared"].get(name) != shared.get(name)]
            raise ValueError(
                f"output: expected the rows of a comparison with the same {', '.join(differing)}, got others in "
                f"{str(self.path)!r}; give another folder"
            )

    def find(self, method: str, settings: Mapping, steps: int) -> dict | None:
        """The row of a method with these settings and as many steps; None where there is none."""
        key = _key({"method": method, "settings": dict(settings), "steps": steps})
        return next((row for row in self.rows if _key(row) == key), None)

    def add(self, rows: Sequence[Mapping]) -> None:
        """Keep rows that belong together, and renew the table.

        A process may be killed between two of them. So the one that is asked for comes last, and a row that is there
        already gives way.
        """
        self._append(rows)
        self.rows = _newest([*self.rows, *map(dict, rows)])
        write_whole(self.path.parent / TABLE, table(self.rows).encode())

    def _append(self, rows: Sequence[Mapping]) -> None:
        with open(self.path, "ab") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())


def _key(row: Mapping) -> str:
    return json.dumps([row[name] for name in ("method", "settings", "steps")], sort_keys=True)


def _newest(rows: Sequence[dict]) -> list[dict]:
    """Without those that a later row of the same method, settings and steps takes the place of."""
    return list({_key(row): row for row in rows}.values())


def _read(path: Path) -> list[dict]:
    """The lines of a file, without one that a process that was killed has begun."""
    *complete, remainder = path.read_bytes().split(b"\n")
    try:
        lines = [json.loads(line) for line in complete]
        for row in lines[:1]:
            row["shared"]
        for row in lines[1:]:
            row["method"], row["settings"], row["steps"], row["validation"], row["perplexity"], row["score"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"output: expected rows of a comparison in {str(path)!r}, got {error!r}") from error
    if remainder:
        write_whole(path, b"".join(line + b"\n" for line in complete))
    return lines


def score(perplexities: Mapping[str, float], dense: Mapping[str, float]) -> float:
    """Geometric mean over the texts of the perplexity over that of the dense model."""
    logs = [math.log(perplexities[text] / dense[text]) for text in dense]
    return math.exp(math.fsum(logs) / len(logs))


def best(rows: Sequence[Mapping], method: str, steps: int) -> Mapping | None:
    """The row of a method with as many steps whose perplexity of validation text is lowest; None if there is none."""
    candidates = (row for row in rows if (row["method"], row["steps"]) == (method, steps))
    return min(candidates, key=lambda row: finite(row["validation"]), default=None)


def finite(value: float) -> float:
    """A figure for min(), which would return a NaN in the first place."""
    return value if math.isfinite(value) else math.inf


def settings_text(settings: Mapping) -> str:
    pairs = ((name, value) for name, value in settings.items() if value is not None)
    return ", ".join(f"{name} {value if isinstance(value, str) else format(value, 'g')}" for name, value in pairs)


def spread(values: Sequence[float], digits: int = 3, unit: str = "") -> str:
    """The mean and, of several finite values, their sample standard deviation."""
    mean = f"{statistics.fmean(values):.{digits}f}{unit}"
    if len(values) == 1 or not all(map(math.isfinite, values)):
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table(rows: Sequence[Mapping]) -> str:
    """Markdown, by steps and then by score; of each method and number of steps the settings that are best are bold."""
    texts = list(rows[0]["perplexity"])
    costs = ["score", "groups off the initial mask", "state, bytes a weight", "seconds"]
    heads = ["method", "settings", "steps", "kept weights", "validation", *texts, *costs]
    lines = [heads, ["---", "---", "---:", "---", *["---:"] * (len(texts) + 1 + len(costs))]]
    for row in sorted(rows, key=lambda row: (row["steps"], row["score"])):
        settings = settings_text(row["settings"])
        # with its own weights a method is judged by its mask
        chosen = best(rows, row["method"].removesuffix(WITH_WEIGHTS), row["steps"])
        if settings and chosen is not None and row["settings"] == chosen["settings"]:
            settings = f"**{settings}**"
        figures = [row["validation"], *(row["perplexity"][text] for text in texts)]
        changed = f"{row['changed_groups']:,}"
        state = f"{row['state_bytes_per_weight']:.1f}"
        cost = [f"{row['score']:.3f}", changed, state, f"{row['seconds']:.0f}"]
        lines.append(
            [row["method"], settings, str(row["steps"]), row["weights"], *(f"{x:.2f}" for x in figures), *cost]
        )
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
