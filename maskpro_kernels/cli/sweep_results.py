"""What the runs of a sweep have found together: rows of means over seeds, the best run, and what to do with it."""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..files import write_whole
from ..report.step_parts import mean_parts
from ..report.sweep import A_STEP, FROM_DENSE, SECONDS, WALL_CLOCK, write_sweep_html
from ..text.mixture import texts_of
from .run_files import PAGE, REPORT, read_report
from .sweep_file import SEED, SweepRun
from .sweep_folder import FAILED, FINISHED, RESULTS, SweepFolder

# What is read of the report of a run beside what others read
READ = ("settings", "start", "steps", "groups", "flipped_groups", "flipped_groups_by_layer")
# Of a run: what is told of each row as a mean and a spread
FIGURES = ("validation", "test", "other", "initial_test", "moved")


class SweepResults:
    """The figures of finished runs, read from their reports as they come.

    Args:
        folder: of the sweep.

    Raises:
        ValueError: if the report of a finished run is damaged.
    """

    def __init__(self, folder: SweepFolder):
        self.folder = folder
        self._found: dict[str, dict] = {}
        self._read()

    def _read(self) -> None:
        for run in self.folder.runs:
            name = self.folder.name(run)
            if name not in self._found and self.folder.state(run) == FINISHED:
                self._found[name] = _figures(read_report(self.folder.of(run) / REPORT, READ))

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
            for line in (table["best_is"], *table["next"]):
                print(line)

    def _all(self) -> dict:
        runs = []
        for run in self.folder.runs:
            name, state = self.folder.name(run), self.folder.state(run)
            found = {"name": name, "options": dict(run.varied), "state": state}
            if state == FAILED:
                found["error"] = self.folder.errors[name]
            runs.append(found | self._found.get(name, {}))
        by_texts: dict[tuple, list[SweepRun]] = {}
        for run in self.folder.runs:
            if self.folder.name(run) in self._found:
                by_texts.setdefault(_texts(run), []).append(run)
        tables = [self._table(same) for same in by_texts.values()]
        return {"tables": tables, "runs": runs, "left_alone": self.folder.others}

    def _table(self, runs: Sequence[SweepRun]) -> dict:
        """The rows of runs whose perplexities are of the same texts."""
        by_row: dict[str, list[SweepRun]] = {}
        for run in runs:
            by_row.setdefault(run.row, []).append(run)
        rows = [self._row(same) for same in by_row.values()]
        first = self._of(runs[0])
        table = {
            "model": runs[0].settings["model"],
            "texts": ", ".join(name for name, _ in texts_of(runs[0].settings["data"])) or "samples of the model",
            "eval_tokens": first["eval_tokens"],
            "same_windows": len({self._of(run)["eval_digest"] for run in runs}) == 1,
            "dense_test": first["dense_test"],
            "rows": rows,
        }
        return table | self._best(rows, runs)

    def _of(self, run: SweepRun) -> dict:
        return self._found[self.folder.name(run)]

    def _row(self, runs: Sequence[SweepRun]) -> dict:
        """Runs that differ in their seed alone."""
        found = [self._of(run) for run in runs]
        label = ", ".join(f"{name}={_shown(value)}" for name, value in runs[0].varied.items() if name != SEED)
        row = {"label": label or "all", "seeds": [run.settings[SEED] for run in runs]}
        row["runs"] = [self.folder.name(run) for run in runs]
        for name in FIGURES:
            values = [one[name] for one in found if one[name] is not None]
            row[name] = _spread(values) if len(values) == len(found) else None
        times = [one[WALL_CLOCK] for one in found]
        row[WALL_CLOCK] = {name: statistics.fmean(time[name] for time in times) for name in SECONDS}
        # each run as one step of its means
        row[WALL_CLOCK]["parts"] = mean_parts(times)
        return row

    def _best(self, rows: Sequence[Mapping], runs: Sequence[SweepRun]) -> dict:
        """The best row and run, by the validation text: the test text is to stay one that nothing was chosen by."""

        def of_row(row: Mapping) -> float:
            return _last_if_nan(row["validation"]["mean"])

        def of_run(name: str) -> float:
            return _last_if_nan(self._found[name]["validation"])

        ranked = sorted(rows, key=of_row)
        best = min(ranked[0]["runs"], key=of_run)
        patterns = {self.folder.name(run): run.settings["pattern"] for run in runs}
        path = self.folder.path / best
        told = (
            f"best by validation perplexity: {ranked[0]['label']} ({ranked[0]['validation']['mean']:.2f}), of its runs "
            f"{best} ({self._found[best]['validation']:.2f})"
        )
        commands = [f"maskpro export {_quoted(path)} {_quoted(Path(f'{self.folder.path}-best'))} --to packed"]
        # of one pattern alone runs compare
        others = [row for row in ranked[1:] if patterns[row["runs"][0]] == patterns[best]]
        if others:
            other = min(others[0]["runs"], key=of_run)
            commands.append(f"maskpro compare {_quoted(path)} {_quoted(self.folder.path / other)}")
        return {"best": best, "best_is": told, "next": commands}


def _figures(report: Mapping) -> dict:
    """What is told of a run."""
    table, validation, steps = report["table"], report["validation"], report["steps"]
    initial = next(row for row in table if row["method"] == report["start"])
    # rebuilt from a journal, a step has no time
    seconds = [step["seconds"] for step in steps if step["seconds"] > 0]
    flips = report["flipped_groups_by_layer"]
    return {
        "validation": validation[-1]["perplexity"],
        "test": table[-1]["perplexity"],
        "other": table[-1].get("other_perplexity"),
        "initial_test": initial["perplexity"],
        "dense_test": table[0]["perplexity"],
        "moved": report["flipped_groups"] / report["groups"] if flips else None,
        "steps_taken": validation[-1]["step"],
        "loss_kind": report["settings"]["loss"],
        "eval_tokens": report["eval_tokens"],
        "eval_digest": report["eval_digest"],
        "curve": [[row["tokens"], row["perplexity"]] for row in validation],
        "losses": [[step["step"], step["loss"]] for step in steps],
        WALL_CLOCK: {
            FROM_DENSE: table[-1]["seconds"],
            A_STEP: statistics.fmean(seconds) if seconds else math.nan,
            "parts": mean_parts(steps),
        },
    }


def _texts(run: SweepRun) -> tuple:
    """What the perplexities of two runs have in common that may be compared."""
    settings = run.settings
    return settings["model"], texts_of(settings["data"]), settings["eval_windows"], settings["eval_length"]


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
    columns = {name: title for name, title in columns.items() if all(row[name] is not None for row in rows)}
    width = max(len("options"), *(len(row["label"]) for row in rows))
    print(f"{'options':<{width}}  seeds" + "".join(f"  {title:>21}" for title in columns.values()))
    for row in rows:
        figures = [_told(row[name]) for name in columns]
        print(f"{row['label']:<{width}}  {len(row['seeds']):>5}" + "".join(f"  {figure:>21}" for figure in figures))


def _told(figure: Mapping) -> str:
    spread = "" if figure["spread"] is None else f" +- {figure['spread']:.2f}"
    return f"{figure['mean']:.2f}{spread}"
