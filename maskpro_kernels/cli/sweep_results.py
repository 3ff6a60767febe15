"""What the runs of a sweep have found together: rows of means over seeds, the best run, and what to do with it."""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..digests import digest_of_bytes
from ..files import write_whole
from ..report.step_parts import mean_parts, means
from ..report.sweep import A_STEP, FROM_DENSE, SECONDS, WALL_CLOCK, write_sweep_html
from ..text.mixture import texts_of
from .run_files import PAGE, REPORT, read_report
from .sweep_file import BASE, SEED, SweepRun
from .sweep_folder import FAILED, FINISHED, RESULTS, SweepFolder

# What is read of the report of a run beside what others read
READ = ("settings", "start", "initial_mask", "validation_digest", "learned_texts", "steps", "groups", "flipped_groups",
        "flipped_groups_by_layer")  # fmt: skip
# Of a run: what is told of each row as a mean and a spread
FIGURES = ("validation", "test", "other", "initial_test", "moved")
# Of a table, where they hold
OWN_WINDOWS = (
    "The test windows are samples that each seed draws itself: runs of other seeds are in tables of their own, and no "
    "spread is given."
)
OTHER_TEXTS = "These runs looked at several other texts, which do not compare: their column is left out."
LEARNED_TEXTS = (
    "The text that is learned from has changed between these runs: those that learned from another one are rows of "
    "their own, which end in the digest of their text."
)
STREAMED_TEXTS = "A streamed text is not read as a whole: whether it has changed between these runs is not known."
WINDOWS = (
    "The {} text has changed between these runs and those of another table, or the tokenizer has: perplexities of the "
    "two do not compare."
)


class SweepResults:
    """The figures of finished runs, read from their reports as they come.

    Args:
        folder: of the sweep.

    Attributes:
        finished: the figures of each run that has finished, by its name.

    Raises:
        ValueError: if the report of a finished run is damaged.
    """

    def __init__(self, folder: SweepFolder):
        self.folder = folder
        self.finished: dict[str, dict] = {}
        self._read()

    def _read(self) -> None:
        for run in self.folder.runs:
            name = self.folder.name(run)
            if name not in self.finished and self.folder.state(run) == FINISHED:
                self.finished[name] = _figures(read_report(self.folder.of(run) / REPORT, READ))

    def write(self) -> None:
        """Write what is known into the folder, as JSON and as a page.

        Raises:
            ValueError: see above.
            OSError: if it cannot be written.
        """
        self._read()
        found = self._all()
        write_whole(self.folder.path / RESULTS, (json.dumps(found, indent=1) + "\n").encode())
        write_sweep_html(found, self.folder.path / PAGE)

    def print(self) -> None:
        """Print the tables, the best run of each, and the commands that come next."""
        for table in self._all()["tables"]:
            _print_table(table)
            for best in table["best"]:
                for line in (best["told"], *best["next"]):
                    print(line)

    def _all(self) -> dict:
        runs = []
        for run in self.folder.runs:
            name, state = self.folder.name(run), self.folder.state(run)
            found = {"name": name, "options": dict(run.varied), "state": state}
            if state == FAILED:
                found["error"] = self.folder.errors[name]
            runs.append(found | self.finished.get(name, {}))
        by_windows: dict[tuple, list[SweepRun]] = {}
        for run in self.folder.runs:
            if self.folder.name(run) in self.finished:
                by_windows.setdefault(_comparable(self._of(run)), []).append(run)
        tables = [self._table(same) for same in by_windows.values()]
        for table, note in zip(
            tables, _changed_windows([self._of(runs[0]) for runs in by_windows.values()]), strict=True
        ):
            table["notes"] += note
        return {"options": self._options(), "tables": tables, "runs": runs, "left_alone": self.folder.others}

    def _options(self) -> dict:
        """Those that all runs are given."""
        first, *others = [run.given for run in self.folder.runs]
        return {name: value for name, value in first.items() if all(given.get(name) == value for given in others)}

    def _table(self, runs: Sequence[SweepRun]) -> dict:
        """The rows of runs whose perplexities are of the same windows and the same dense model."""
        by_row: dict[tuple, list[SweepRun]] = {}
        for run in runs:
            own = [json.dumps(self._of(run)[name]) for name in ("initial_mask", "learned_texts")]
            by_row.setdefault((run.row, *own), []).append(run)
        # the same source may be another text by now
        others = {_other_text(self._of(run)) for run in runs}
        rows = [self._row(same, len(others) == 1) for same in by_row.values()]
        first, of_rows = self._of(runs[0]), [self._of(same[0]) for same in by_row.values()]
        notes = [OWN_WINDOWS] if not first["texts"] else []
        if len(others) > 1:
            notes.append(OTHER_TEXTS)
        notes += _label(rows, of_rows)
        return {
            "model": first["model"],
            "dtype": first["dtype"],
            "texts": ", ".join(first["texts"]) or "samples of the model",
            "eval_tokens": first["eval_tokens"],
            "dense_test": first["dense_test"],
            "other_text": first["other_data"] if len(others) == 1 else None,
            "notes": notes,
            "rows": rows,
            "best": self._best(rows),
        }

    def _of(self, run: SweepRun) -> dict:
        return self.finished[self.folder.name(run)]

    def _row(self, runs: Sequence[SweepRun], one_other_text: bool) -> dict:
        """Runs that differ in their seed alone."""
        found = [self._of(run) for run in runs]
        label = ", ".join(f"{name}={_shown(value)}" for name, value in runs[0].varied.items() if name != SEED)
        row = {"label": label or BASE, "seeds": [run.seed for run in runs]}
        row["runs"] = [self.folder.name(run) for run in runs]
        for name in FIGURES:
            values = [one[name] for one in found if one[name] is not None]
            row[name] = _spread(values) if len(values) == len(found) else None
        if not one_other_text:
            row["other"] = None
        times = [one[WALL_CLOCK] for one in found]
        row[WALL_CLOCK] = {name: statistics.fmean(time[name] for time in times) for name in SECONDS}
        row[WALL_CLOCK]["parts"] = means([time["parts"] for time in times if time["parts"]])
        return row

    def _best(self, rows: Sequence[Mapping]) -> list[dict]:
        """The best row and run of each pattern, by the validation text: nothing is to be chosen by the test text."""
        by_pattern: dict[str, list[Mapping]] = {}
        for row in rows:
            by_pattern.setdefault(self.finished[row["runs"][0]]["pattern"], []).append(row)
        return [
            self._best_of(same, f" of {pattern}" if len(by_pattern) > 1 else "") for pattern, same in by_pattern.items()
        ]

    def _best_of(self, rows: Sequence[Mapping], which: str) -> dict:
        """Of one pattern: the best run, and what to do with it."""

        def of_row(row: Mapping) -> float:
            return _last_if_nan(row["validation"]["mean"])

        def of_run(name: str) -> float:
            return _last_if_nan(self.finished[name]["validation"])

        first, *others = sorted(rows, key=of_row)
        best = min(first["runs"], key=of_run)
        path = self.folder.path / best
        told = (
            f"best{which} by validation perplexity: {first['label']} ({first['validation']['mean']:.2f}), of its runs "
            f"{best} ({self.finished[best]['validation']:.2f})"
        )
        commands = [f"maskpro export {_quoted(path)} {_quoted(Path(f'{self.folder.path}-{best}'))} --to packed"]
        if others:
            other = min(others[0]["runs"], key=of_run)
            commands.append(f"maskpro compare {_quoted(path)} {_quoted(self.folder.path / other)}")
        return {"run": best, "told": told, "next": commands}


def _figures(report: Mapping) -> dict:
    """What is told of a run."""
    table, validation, steps = report["table"], report["validation"], report["steps"]
    initial = next(row for row in table if row["method"] == report["start"])
    # rebuilt from a journal, a step has no time
    seconds = [step["seconds"] for step in steps if step["seconds"] > 0]
    # the first one compiles
    seconds = seconds[1:] or seconds
    flips = report["flipped_groups_by_layer"]
    return {
        "validation": validation[-1]["perplexity"],
        "test": table[-1]["perplexity"],
        "other": table[-1].get("other_perplexity"),
        "initial_test": initial["perplexity"],
        "dense_test": table[0]["perplexity"],
        "dense_other": table[0].get("other_perplexity"),
        "other_data": report["other_data"],
        "model": report["model"],
        "texts": [name for name, _ in texts_of(report["data"])],
        "pattern": report["pattern"],
        "dtype": report["dtype"],
        "initial_mask": report["initial_mask"],
        "moved": report["flipped_groups"] / report["groups"] if flips else None,
        "steps_taken": validation[-1]["step"],
        "loss_kind": report["settings"]["loss"],
        "eval_tokens": report["eval_tokens"],
        "eval_length": report["eval_length"],
        "eval_windows": report["eval_windows"],
        "eval_digest": report["eval_digest"],
        "validation_digest": report["validation_digest"],
        "learned_texts": report["learned_texts"],
        "read_as": [report["settings"].get(name) for name in ("text_column", "stream")],
        "curve": [[row["tokens"], row["perplexity"]] for row in validation],
        "losses": [[step["step"], step["loss"]] for step in steps],
        WALL_CLOCK: {
            FROM_DENSE: table[-1]["seconds"],
            A_STEP: statistics.fmean(seconds) if seconds else math.nan,
            "parts": mean_parts(steps),
        },
    }


def _comparable(found: Mapping) -> tuple:
    """What two runs have in common whose perplexities may be compared."""
    # other weights at the same path are told by the dense model's perplexity, but not another machine's rounding
    names = ("model", "dtype", "texts", "eval_digest", "validation_digest", "eval_tokens", "eval_length")
    return *(str(found[name]) for name in names), f"{found['dense_test']:.6g}"


def _label(rows: Sequence[dict], of_rows: Sequence[Mapping]) -> list[str]:
    """Have labels tell apart rows of the same options; gives what is to be told of the texts learned from.

    Args:
        of_rows: the figures of a run of each row.
    """
    by_source: dict[str, set[str]] = {}
    for found in of_rows:
        by_source.setdefault(str(found["read_as"]), set()).add(json.dumps(found["learned_texts"]))
    for row, found in zip(rows, of_rows, strict=True):
        if len(by_source[str(found["read_as"])]) > 1:
            row["label"] += f" (text {_digest_of_texts(found)})"
    labels = [row["label"] for row in rows]
    for row, found in zip(rows, of_rows, strict=True):
        if labels.count(row["label"]) > 1:
            row["label"] += f" (mask {found['initial_mask']['digest'][:8]})"
    notes = [LEARNED_TEXTS] if any(len(texts) > 1 for texts in by_source.values()) else []
    if any(None in found["learned_texts"] for found in of_rows):
        notes.append(STREAMED_TEXTS)
    return notes


def _digest_of_texts(found: Mapping) -> str:
    """Of one text its own, short."""
    digests = found["learned_texts"]
    return (digests[0] if len(digests) == 1 else digest_of_bytes(json.dumps(digests).encode()).hex())[:8]


def _changed_windows(tables: Sequence[Mapping]) -> list[list[str]]:
    """By table what is to be told of windows that other tables of the same texts have otherwise.

    Args:
        tables: the figures of a run of each.
    """
    asked = [
        str([found[name] for name in ("model", "texts", "read_as", "eval_windows", "eval_length")]) for found in tables
    ]
    notes = []
    for found, key in zip(tables, asked, strict=True):
        alike = [other for other, its in zip(tables, asked, strict=True) if its == key]
        names = {"test": "eval_digest", "validation": "validation_digest"}
        which = [kind for kind, name in names.items() if len({other[name] for other in alike}) > 1]
        # samples of the model are others with each seed
        notes.append([WINDOWS.format(" and the ".join(which))] if which and found["texts"] else [])
    return notes


def _other_text(found: Mapping) -> tuple:
    dense = found["dense_other"]
    return found["other_data"], None if dense is None else f"{dense:.6g}"


def _spread(values: Sequence[float]) -> dict:
    """Mean and sample standard deviation; of one value there is none."""
    return {
        "mean": statistics.fmean(values),
        "spread": statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None,
    }


def _last_if_nan(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _shown(value: object) -> str:
    return "default" if value is None else value if isinstance(value, str) else json.dumps(value)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _print_table(table: Mapping) -> None:
    """Rows with means and spreads, to stdout."""
    rows = table["rows"]
    columns = {"validation": "validation perplexity", "test": "test perplexity", "other": "on the other text"}
    columns["initial_test"] = "test, initial mask"
    columns = {name: title for name, title in columns.items() if all(row[name] is not None for row in rows)}
    width = max(len("options"), *(len(row["label"]) for row in rows))
    print(
        f"{table['texts']}: {table['eval_tokens']:,} tokens of the test text, dense model {table['dense_test']:.2f}, "
        f"{table['model']} in {table['dtype']}"
    )
    for note in table["notes"]:
        print(note)
    print(f"{'options':<{width}}  seeds" + "".join(f"  {title:>21}" for title in columns.values()))
    for row in rows:
        figures = [_told(row[name]) for name in columns]
        print(f"{row['label']:<{width}}  {len(row['seeds']):>5}" + "".join(f"  {figure:>21}" for figure in figures))


def _told(figure: Mapping) -> str:
    spread = "" if figure["spread"] is None else f" +- {figure['spread']:.2f}"
    return f"{figure['mean']:.2f}{spread}"
