"""The report page of a sweep: curves of all its runs, means and spreads over seeds, and how long they took."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import cycle, product
from pathlib import Path
from urllib.parse import quote

from ..files import write_whole
from . import markup, svg

# The entry of what depends on the machine and its moment, of a run and of a row
WALL_CLOCK = "wall_clock"
SECONDS = FROM_DENSE, A_STEP = "seconds from the dense model", "seconds a step"
# Seen on light and on dark pages; where there are more rows, lines of other styles
HUES = ("#2f80d0", "#d9702b", "#3f9e5a", "#c74a72", "#8a68c9", "#a5832a", "#2a9d9d", "#858c96")
STYLES = ("-", "--", ":", "-.")
# A longer curve of losses is drawn as means of so many stretches
STRETCHES = 60
# The largest perplexity over the least from which their axis is logarithmic: one bad run would flatten the others
LOG_FROM = 5.0
# Inches of a picture that a row takes in its legend
LEGEND_ROW = 0.19
# Characters of a label in it
LABEL_LENGTH = 40


def write_sweep_html(results: Mapping, path: str | Path) -> None:
    """Write the page of a sweep, which is then there as a whole or not at all.

    All that depends on the machine and its moment stands in the section "Wall clock": the rest of the page is the same
    for a sweep that was broken off and gone on with.

    Args:
        results: what `maskpro sweep` writes as results.json.
        path: the file, overwritten.

    Raises:
        ModuleNotFoundError: if matplotlib, of the extra ``cli``, is not installed.
        OSError: if the file cannot be written.
    """
    runs, tables = results["runs"], results["tables"]
    known = {run["name"]: run for run in runs}
    finished = sum("curve" in run for run in runs)
    body = [f"<header>\n<h1>Sweep of {len(runs)} runs</h1>\n<p>{finished} of them have finished.</p>\n</header>"]
    for number, table in enumerate(tables, start=1):
        # by which the wall clock names it
        which = f"Table {number}: perplexity" if len(tables) > 1 else "Perplexity"
        title = f"{which} of {escape(table['texts'])}"
        body.append(markup.section(title, *_table(table, known), *_curves(table, known, number)))
    body += [_finished(runs), _unfinished(runs), _options(results["options"]), _left_alone(results["left_alone"])]
    body.append(_wall_clock(tables))
    write_whole(Path(path), markup.page(f"sweep of {len(runs)} runs", [part for part in body if part]).encode())


def _table(table: Mapping, known: Mapping[str, Mapping]) -> list[str]:
    head = {"validation": "validation perplexity", "test": "test perplexity", "other": "on the other text"}
    head["initial_test"] = "test, initial mask"
    head = {name: title for name, title in head.items() if all(row[name] is not None for row in table["rows"])}
    rows = []
    for row in table["rows"]:
        figures = [_figure(row[name]) for name in head]
        taken = sorted({known[name]["steps_taken"] for name in row["runs"]})
        steps = f"{taken[0]:,}" if len(taken) == 1 else f"{taken[0]:,} to {taken[-1]:,}"
        moved = "–" if row["moved"] is None else markup.percent(row["moved"]["mean"], 1)
        cells = [", ".join(map(str, row["seeds"])), steps, *figures, moved]
        rows.append((row["label"], list(map(markup.number_cell, cells))))
    text = (
        f"Of {escape(table['model'])} in {table['dtype']}, over {table['eval_tokens']:,} tokens of the test text; the "
        f"dense model has {markup.decimals(table['dense_test'])}. Runs that differ in their seed alone are one row: "
        "mean ± sample standard deviation over the seeds."
    )
    if "other" in head:
        text += f" The other text is {escape(str(table['other_text']))}."
    told = [
        f"<p>{escape(best['told'][0].upper() + best['told'][1:])}. The test text has chosen nothing.</p>\n"
        f"<pre>{chr(10).join(map(escape, best['next']))}</pre>"
        for best in table["best"]
    ]
    return [
        f'<p class="faint">{" ".join([text, *table["notes"]])}</p>',
        markup.table(["options", "seeds", "steps", *head.values(), "moved"], rows, "rows"),
        *told,
    ]


def _figure(figure: Mapping) -> str:
    spread = "" if figure["spread"] is None else f" ± {markup.decimals(figure['spread'])}"
    return markup.decimals(figure["mean"]) + spread


def _in_legend(labels: Sequence[str]) -> list[str]:
    """Labels that leave room for the axes: of a long one its end, behind its place in the table."""
    return [
        label if len(label) <= LABEL_LENGTH else f"{place}: …{label[-LABEL_LENGTH:]}"
        for place, label in enumerate(labels, start=1)
    ]


def _curves(table: Mapping, known: Mapping[str, Mapping], number: int) -> list[str]:
    labels = _in_legend([row["label"] for row in table["rows"]])
    looks = list(zip(table["rows"], labels, cycle(product(STYLES, HUES)), strict=False))
    runs = [known[name] for row in table["rows"] for name in row["runs"]]

    def draw(axes, name: str, marker: str, points_of: Callable[[Mapping], Sequence]) -> None:
        for row, told, (style, colour) in looks:
            how = {"linestyle": style, "color": colour, "linewidth": 1, "marker": marker, "markersize": 3}
            for place, run in enumerate(row["runs"]):
                finite = markup.finite_points(points_of(known[run]))
                # between two of these matplotlib reads a formula
                label = "_nolegend_" if place else told.replace("$", r"\$")
                axes.plot([x for x, _ in finite], [y for _, y in finite], label=label, **how)
        axes.set_ylabel(name)

    def draw_validation(axes) -> None:
        draw(axes, "validation perplexity", "o", lambda run: run["curve"])
        found = [y for run in runs for _, y in markup.finite_points(run["curve"])]
        if max(found) > LOG_FROM * min(found):
            axes.set_yscale("log")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)

    def drawing_losses(kind: str) -> Callable:
        def points_of(run: Mapping) -> Sequence:
            return _means(run["losses"]) if run["loss_kind"] == kind else ()

        return lambda axes: draw(axes, f"loss ({kind}), nats a token", "", points_of)

    kinds = sorted({run["loss_kind"] for run in runs})
    height = max(3.0, 0.6 + LEGEND_ROW * len(looks))
    label, below = "validation perplexity of all runs", "tokens learned from"
    return [
        "<h3>Validation perplexity</h3>",
        svg.picture(f"validation-{number}", label, [draw_validation], below, height),
        "<h3>Loss</h3>",
        f'<p class="faint">Loss of the steps under the masks drawn, at most {STRETCHES} means of each run, in the '
        "lines above.</p>",
        svg.picture(f"loss-{number}", "loss of all runs over steps", list(map(drawing_losses, kinds)), "step"),
    ]


def _means(points: Sequence[Sequence]) -> list[tuple]:
    """Means of stretches of what is finite."""
    points = markup.finite_points(points)
    count = min(len(points), STRETCHES)
    parts = [points[len(points) * at // count : len(points) * (at + 1) // count] for at in range(count)]
    return [tuple(sum(values) / len(part) for values in zip(*part, strict=True)) for part in parts]


def _finished(runs: Sequence[Mapping]) -> str:
    """Each run that has finished, with the way to its own page."""
    rows = []
    for run in runs:
        if "curve" in run:
            figures = [markup.number_cell(markup.decimals(run[name])) for name in ("validation", "test")]
            # the page of a run stands in its folder, beside this one
            rows.append(
                (run["name"], [*figures, f'<td><a href="{quote(run["name"], safe="=+")}/report.html">report</a></td>'])
            )
    head = ["run", "validation perplexity", "test perplexity", "page"]
    return markup.section("Runs", markup.table(head, rows, "rows")) if rows else ""


def _options(options: Mapping) -> str:
    rows = [(name, [f"<td>{escape(json.dumps(value))}</td>"]) for name, value in options.items()]
    text = '<p class="faint">As the file has them. Options that it does not name are at their defaults.</p>'
    return markup.section("Options of all runs", text, markup.table(["option", "value"], rows, "rows")) if rows else ""


def _unfinished(runs: Sequence[Mapping]) -> str:
    """The runs that have not finished."""
    left = [run for run in runs if "curve" not in run]
    if not left:
        return ""
    rows = [(run["name"], [f"<td>{run['state']}</td>", f"<td>{escape(run.get('error', ''))}</td>"]) for run in left]
    return markup.section("Runs that have not finished", markup.table(["run", "state", "error"], rows, "rows"))


def _left_alone(names: Sequence[str]) -> str:
    if not names:
        return ""
    listed = ", ".join(map(escape, names))
    return markup.section("Runs that the file no longer has", f"<p>They are left alone: {listed}.</p>")


def _wall_clock(tables: Sequence[Mapping]) -> str:
    rows = [(number, row) for number, table in enumerate(tables, start=1) for row in table["rows"]]
    if not rows:
        return ""
    parts = list(dict.fromkeys(name for _, row in rows for name in row[WALL_CLOCK]["parts"]))
    lines = []
    for number, row in rows:
        times, whole = row[WALL_CLOCK], sum(row[WALL_CLOCK]["parts"].values()) or 1
        cells = [f"{times[name]:,.3f}" for name in SECONDS]
        cells += [f"{times['parts'].get(name, 0.0) / whole:.1%}" for name in parts]
        label = f"table {number}: {row['label']}" if len(tables) > 1 else row["label"]
        lines.append((label, list(map(markup.number_cell, cells))))
    text = (
        "Means over the steps and the seeds, on the machine that took each run, and the shares of the parts of a step. "
        "The first of several steps, which compiles, is left out of seconds a step and of the shares. A run that took "
        "its initial mask from an earlier one counts the seconds that it took there; drawing samples is counted in "
        "none. What a run had done after its last snapshot when it was broken off is not counted."
    )
    titles = ["options", *SECONDS, *parts]
    return markup.section("Wall clock", f'<p class="faint">{text}</p>', markup.table(titles, lines, "rows"))
