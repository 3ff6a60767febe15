"""The report page of a run: one HTML file, which needs nothing beside it.

``test perplexity`` is that of the test text, which learning never looks at. ``validation perplexity`` is that of the
validation text, which is looked at every few steps and ends a run that gets worse.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from ..files import write_whole
from . import FROZEN, better_mask, markup, parting, svg
from .step_parts import mean_parts, typical_steps

NEEDED = {"model", "pattern", "settings", "gap", "versions", "eval_tokens", "table", "validation", "better_mask",
          "groups_by_layer", "flipped_groups_by_layer", "logits", "memory", "skipped", "start", "steps",
          "weights"}  # fmt: skip
# How many of the newest flip rates of a layer are averaged
NEWEST_RATES = 5
# How many stretches of skipped steps are listed
LISTED_STRETCHES = 50


def write_html(report: Mapping, path: str | Path) -> None:
    """Write the page of a run, which is then there as a whole or not at all.

    It refers to nothing outside itself, and follows the reader's choice of a light or a dark scheme. Its curves are
    drawn by matplotlib.

    Args:
        report: what `maskpro learn` writes as report.json. Losses that are not finite are steps that were skipped;
            residual, advantage and tracker may be None, flip rates NaN, and ``flipped_groups_by_layer`` empty where the
            initial mask is not known. The layers of ``groups_by_layer`` stand in the order in which flip rates are
            taken: step i looks at layer i modulo their number. ``better_mask`` is None where no earlier mask was better
            on the validation text; its file is None where that mask was not kept.
        path: the file, overwritten.

    Raises:
        ValueError: if something is missing in the report. Nothing is written then.
        ModuleNotFoundError: if matplotlib, of the extra ``cli``, is not installed.
        OSError: if the file cannot be written.
    """
    missing = NEEDED - report.keys()
    if missing:
        raise ValueError(f"report: expected that of `maskpro learn`, got one without {', '.join(sorted(missing))}")
    write_whole(Path(path), _page(report).encode())


def command(report: Mapping) -> list[list[str]]:
    """The line that reproduces a run, into another folder beside it: the command, then each option with its value.

    Args:
        report: as for ``write_html``; its model, settings and gap are read.
    """
    settings = report["settings"] | {"model": report["model"], "output": f"{Path(report['settings']['output'])}-again"}
    if "flip_rate" not in settings:
        settings["gap"] = report["gap"]
    line = [["maskpro", "learn"]]
    for name, value in settings.items():
        # false is the default of all that are switched on
        if value is not None and value is not False:
            line.append(["--" + name.replace("_", "-"), *_words(value)])
    return line


def _words(value: object) -> list[str]:
    """A setting as the command line takes it."""
    if value is True:
        return []
    if isinstance(value, Mapping):
        return [json.dumps(value)]
    return [str(word) for word in value] if isinstance(value, list) else [str(value)]


def _page(report: Mapping) -> str:
    title = f"{report['pattern']} mask of {report['model']}"
    body = [
        _headline(report, title),
        markup.section("Test perplexity", _test_perplexity(report)),
        markup.section("Validation perplexity", _validation_perplexity(report["validation"], report["better_mask"])),
        markup.section("Loss", _losses(report["steps"]), _skipped_steps(report["steps"])),
        markup.section("Groups that moved", _moved(report)),
        markup.section("Flip rate", _flip_rates(report)),
        markup.section("Where the time goes", _step_parts(report["steps"])),
        markup.section("Run", _run(report)),
    ]
    return markup.page(title, body)


def _headline(report: Mapping, title: str) -> str:
    settings, steps, rows = report["settings"], report["steps"], {row["method"]: row for row in report["table"]}
    dense, initial, learned = report["table"][0], rows[report["start"]], report["table"][-1]
    taken, planned = report["validation"][-1]["step"], settings["steps"]
    ended = markup.count_of_steps(taken) if taken >= planned else f"{taken:,} of {markup.count_of_steps(planned)}"
    flips, groups = report["flipped_groups_by_layer"], sum(report["groups_by_layer"].values())
    # rebuilt from a journal, a step has no time
    timed = [step for step in steps if step["seconds"] > 0]
    tokens, seconds = sum(step["tokens"] for step in steps), sum(step["seconds"] for step in timed)
    figures = [
        (
            "test perplexity",
            markup.decimals(learned["perplexity"]),
            f"dense model {markup.decimals(dense['perplexity'])}",
        ),
        (
            "groups that moved",
            markup.percent(sum(flips.values()), groups) if flips else "not known",
            f"{sum(flips.values()):,} of {groups:,}" if flips else f"of {groups:,}",
        ),
        ("tokens learned from", f"{tokens:,}", f"in {ended}"),
        (
            "seconds",
            markup.decimals(learned["seconds"], 1),
            f"{sum(step['tokens'] for step in timed) / seconds:,.0f} tokens a second" if timed else "",
        ),
    ]
    tiles = "\n".join(
        f'<div><dt>{name}</dt><dd>{value}</dd><dd class="faint">{more}</dd></div>' for name, value, more in figures
    )
    early = ""
    if taken < planned:
        early = (
            "<p>The run ended early: at two evaluations in a row the validation perplexity was far above that of the "
            "initial mask, or no finite number.</p>"
        )
    changed = ""
    if report["weights"] != FROZEN:
        changed = (
            f"<p>The weights are not those of the dense model: {escape(report['weights'])}. The mask alone does not "
            "give this perplexity.</p>\n"
        )
    return (
        f"<header>\n<h1>{escape(title)}</h1>\n"
        f"<p>Learned on {escape(settings['data'])} by {escape(settings['estimator'])}. It began with "
        f"{escape(report['start'])}, whose test perplexity is {markup.decimals(initial['perplexity'])}.</p>\n"
        f'{changed}<dl class="figures">\n{tiles}\n</dl>\n{early}</header>'
    )


def _test_perplexity(report: Mapping) -> str:
    rows = report["table"]
    other = all("other_perplexity" in row for row in rows)
    head = ["mask", "test perplexity", *(["on the other text"] if other else []), "seconds from the dense model"]
    lines = []
    for row in rows:
        figures = [markup.decimals(row[name]) for name in ("perplexity", *(["other_perplexity"] if other else []))]
        figures.append(markup.decimals(row["seconds"], 1))
        name = "none (dense)" if row["method"] == "dense" else row["method"]
        lines.append((name, [markup.number_cell(figure) for figure in figures]))
    text = f"Over {report['eval_tokens']:,} tokens of the test text."
    if other:
        text += f" The other text: {escape(report['settings']['other_data'])}."
    found = parting.parting(rows)
    told = f"\n<p>{escape(_sentence(parting.told(found, report['settings']['other_data'])))}</p>" if found else ""
    return f'<p class="faint">{text}</p>\n' + markup.table(head, lines, "methods") + told


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _validation_perplexity(rows: Sequence[Mapping], better: Mapping | None) -> str:
    points = [(row["tokens"], row["perplexity"]) for row in rows]

    def draw(axes) -> None:
        svg.curve(axes, points, "validation perplexity", svg.FIRST)
        axes.set_ylabel("validation perplexity")

    if not markup.finite_points(points):
        return "<p>No finite value is known.</p>"
    first, last = (
        f"{markup.decimals(rows[at]['perplexity'])} after {markup.count_of_steps(rows[at]['step'])}" for at in (0, -1)
    )
    told = f"{first}, {last}" if len(rows) > 1 else first
    picture = svg.picture("validation", f"validation perplexity: {told}", [draw], "tokens learned from")
    return f'<p class="faint">{told}.</p>\n{_better(better)}{picture}'


def _better(better: Mapping | None) -> str:
    if better is None:
        return ""
    kept = "" if better["file"] is None else f" <code>{escape(better['file'])}</code> holds the better mask."
    return f"<p>{escape(_sentence(better_mask.told(better)))}{kept}</p>\n"


def _losses(steps: Sequence[Mapping]) -> str:
    def points(name: str) -> list[tuple]:
        return [(step["step"], step[name]) for step in steps]

    def draw_loss(axes) -> None:
        svg.curve(axes, points("loss"), "loss", svg.FIRST)
        axes.set_ylabel("loss, nats a token")

    def draw_residual(axes) -> None:
        svg.curve(axes, points("residual"), "residual", svg.FIRST, line=False)
        svg.curve(axes, points("tracker"), "tracker", svg.SECOND)
        axes.set_ylabel("nats a token")
        axes.legend(frameon=False)

    def draw_advantage(axes) -> None:
        svg.curve(axes, points("advantage"), "advantage", svg.FIRST, line=False)
        axes.axhline(0, color=svg.FAINT, linewidth=0.8)
        axes.set_ylabel("advantage, nats a token")

    if not markup.finite_points(points("loss")):
        return "<p>No step has a finite loss.</p>"
    parts, text = [draw_loss], "Loss of each step's batch under the masks drawn"
    if markup.finite_points(points("residual")):
        parts += [draw_residual, draw_advantage]
        text += "; residual: that loss less the batch's loss under the initial mask; tracker: its moving average; "
        text += "advantage: residual less tracker"
    if len(steps) > svg.MOST_POINTS:
        text += (
            f". Curves are means of {svg.MOST_POINTS} stretches, bands reach from their least to their largest value"
        )
    return f'<p class="faint">{text}.</p>\n' + svg.picture("loss", "loss over steps", parts, "step")


def _skipped_steps(steps: Sequence[Mapping]) -> str:
    skipped = [step["step"] for step in steps if not markup.is_finite(step["loss"])]
    if not skipped:
        return ""
    stretches = [
        [step for _, step in stretch] for _, stretch in groupby(enumerate(skipped), lambda pair: pair[1] - pair[0])
    ]
    told = ", ".join(f"{s[0]}" if len(s) == 1 else f"{s[0]} to {s[-1]}" for s in stretches[:LISTED_STRETCHES])
    more = sum(map(len, stretches[LISTED_STRETCHES:]))
    told += f", and {more:,} later ones" if more else ""
    count = f"{len(skipped):,} of {markup.count_of_steps(len(steps))}"
    return f"<p>{count} changed nothing, because a loss was no finite number: {told}.</p>"


def _moved(report: Mapping) -> str:
    flips = report["flipped_groups_by_layer"]
    if not flips:
        return "<p>How many groups differ from the initial mask is not known.</p>"
    shares = {name: (flips[name], groups) for name, groups in report["groups_by_layer"].items()}
    text = "Share of the groups whose learned mask is not the initial one."
    return f'<p class="faint">{text}</p>\n' + markup.by_layer(shares)


def _flip_rates(report: Mapping) -> str:
    groups = report["groups_by_layer"]
    names, known = list(groups), {}
    for step in report["steps"]:
        if markup.is_finite(step["flip_rate"]):
            known.setdefault(names[step["step"] % len(names)], []).append(step["flip_rate"])
    if not known:
        return "<p>No flip rate is known.</p>"
    newest = {name: rates[-NEWEST_RATES:] for name, rates in known.items()}
    shares = {
        name: (sum(newest[name]) / len(newest[name]) * count, count) if name in newest else None
        for name, count in groups.items()
    }
    text = (
        "Share of the groups whose draw left the most likely mask. A step looks at one layer; "
        f"shown is the mean of a layer's last {NEWEST_RATES}, or of as many as there are."
    )
    return f'<p class="faint">{text}</p>\n' + markup.by_layer(shares)


def _step_parts(steps: Sequence[Mapping]) -> str:
    parts, typical = mean_parts(steps), typical_steps(steps)
    if not parts:
        return "<p>How long the parts of the steps took is not known.</p>"
    whole, seconds = sum(parts.values()), sum(step["seconds"] for step in typical) / len(typical)
    rows = [*parts.items(), ("all parts", whole), ("a step by the wall clock", seconds)]
    lines = [
        (name, [markup.number_cell(f"{1000 * value:,.2f}"), markup.number_cell(f"{value / (whole or 1):.1%}")])
        for name, value in rows
    ]
    text = (
        f"Means over {markup.count_of_steps(len(typical))}, evaluations apart, without the first of several, which "
        "compiles. Masks that are not held are drawn within "
        "forward and backward. Straight-through of one batch a step moves the logits of a layer along with its slopes: "
        "both are in update."
    )
    return f'<p class="faint">{text}</p>\n' + markup.table(["part", "milliseconds a step", "share"], lines, "parts")


def _memory(memory: Mapping) -> dict[str, str]:
    """What a step was to take, and what the process has held at most."""
    needed, used = memory["needed"], memory["used"]
    rows = {f"{name}, estimated": size for name, size in needed.items()}
    rows |= {"all of it, estimated": sum(needed.values())} | {f"most held: {name}": size for name, size in used.items()}
    return {name: f"{size / 1e9:.2f} GB" for name, size in rows.items()}


def _run(report: Mapping) -> str:
    settings = {**report["settings"], "gap": report["gap"]}
    parts = [
        "<p>To run it again:</p>",
        # no break between an option and its value, nor within one
        f"<pre>{' '.join(f'<span>{escape(shlex.join(words))}</span>' for words in command(report))}</pre>",
        '<div class="beside">',
        markup.pairs("Settings", settings),
        markup.pairs("Versions", report["versions"]),
        markup.pairs("Memory", _memory(report["memory"])),
        markup.pairs("Layers left dense", report["skipped"]) if report["skipped"] else "",
        "</div>",
        f'<p class="faint">Digest of the logits: <code>{escape(report["logits"])}</code></p>',
    ]
    return "\n".join(parts)
