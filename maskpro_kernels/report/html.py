"""The page of a run: one HTML file, which needs nothing beside it."""

from __future__ import annotations

import io
import math
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from itertools import groupby, pairwise
from pathlib import Path

from ..files import write_whole

NEEDED = {"model", "pattern", "settings", "gap", "versions", "eval_tokens", "table", "validation", "groups_by_layer",
          "flipped_groups_by_layer", "logits", "skipped", "steps"}  # fmt: skip
# More points than a curve can show become means of as many stretches, with a band from least to largest
MOST_POINTS = 500
# How many of the newest flip rates of a layer are averaged
NEWEST_RATES = 5
# A block's number within a layer's name, what stands before it, and what behind
BLOCK = re.compile(r"(?P<stack>.+?)\.(?P<block>\d+)\.(?P<projection>.+)")
# Stretches of skipped steps that are listed
MOST_SKIPPED = 50
# A picture is drawn in these colours, and shown in those of the page's scheme
COLOURS = {"#010101": "var(--ink)", "#020202": "var(--faint)", "#030303": "var(--first)", "#040404": "var(--second)"}
INK, FAINT, FIRST, SECOND = COLOURS
# How many groups, of how many
Share = tuple[float, int]

STYLE = """
:root { color-scheme: light dark; --page: #fff; --card: #f6f7f9; --ink: #1c2530; --faint: #66717f; --line: #d9dee5;
  --first: #1f6fd0; --second: #c2560c; }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --card: #1d232a; --ink: #e4e9ef; --faint: #98a4b3;
  --line: #343d48; --first: #6db1ff; --second: #ff9b57; } }
body { margin: 0 auto; max-width: 64rem; padding: 2rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .5rem; font-size: 1.15rem; }
h3 { margin: 1.25rem 0 .5rem; font-size: 1rem; font-weight: 600; overflow-wrap: anywhere; }
p { margin: .5rem 0; max-width: 46rem; }
.faint { color: var(--faint); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem; margin: 1.25rem 0; }
.figures div { padding: .75rem 1rem; border-radius: .5rem; background: var(--card); }
.figures dt { color: var(--faint); font-size: .85rem; }
.figures dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.figures dd.faint { font-size: .85rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .75rem; border-bottom: 1px solid var(--line); text-align: left; font-weight: 400; }
th:first-child { padding-left: 0; }
thead th { color: var(--faint); font-size: .85rem; white-space: nowrap; }
.number { text-align: right; white-space: nowrap; }
.methods tbody tr:last-child > * { font-weight: 600; }
.heat { font-size: .85rem; }
.heat td { min-width: 3.25rem; border: 1px solid var(--page); background: rgb(226 112 26 / var(--heat, 0)); }
.beside { display: flex; flex-wrap: wrap; gap: 0 4rem; overflow-wrap: anywhere; }
svg { display: block; width: 100%; min-width: 34rem; height: auto; margin: .5rem 0; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: inherit !important; }
pre { padding: .75rem 1rem; border-radius: .5rem; background: var(--card); font-size: .85rem; white-space: pre-wrap; }
pre span { display: inline-block; max-width: 100%; overflow-wrap: anywhere; }
""".strip()


def write_html(report: Mapping, path: str | Path) -> None:
    """Write the page of a run, which is then there as a whole or not at all.

    It refers to nothing outside itself, and follows the reader's choice of a light or a dark scheme. Its curves are
    drawn by matplotlib.

    Args:
        report: what `maskpro learn` writes as report.json. Losses that are not finite are steps that were skipped;
            residual, advantage and tracker may be None, flip rates NaN, and ``flipped_groups_by_layer`` empty where the
            initial mask is not known. The layers of ``groups_by_layer`` stand in the order in which flip rates are
            taken: step i looks at layer i modulo their number.
        path: the file, overwritten.

    Raises:
        ValueError: if something is missing in the report. Nothing is written then.
        ModuleNotFoundError: if matplotlib, of the extra ``demo``, is not installed.
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
    if settings.get("draws", 1) != 1:
        # without effect there, and refused
        settings.pop("alpha", None)
    line = [["maskpro", "learn"]]
    for name, value in settings.items():
        if value is not None:
            line.append(["--" + name.replace("_", "-"), *([] if value is True else [str(value)])])
    return line


def _page(report: Mapping) -> str:
    title = f"{report['pattern']} mask of {report['model']}"
    body = [
        _headline(report, title),
        _section("Perplexity", _methods(report)),
        _section("Held-out perplexity", _held_out(report["validation"])),
        _section("Loss", _losses(report["steps"]), _skipped_steps(report["steps"])),
        _section("Groups that moved", _moved(report)),
        _section("Flip rate", _flip_rates(report)),
        _section("Run", _run(report)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n" + "\n".join(body) + "\n"
        "</body>\n</html>\n"
    )


def _section(title: str, *parts: str) -> str:
    return "\n".join([f"<section>\n<h2>{title}</h2>", *filter(None, parts), "</section>"])


def _headline(report: Mapping, title: str) -> str:
    settings, steps, rows = report["settings"], report["steps"], {row["method"]: row for row in report["table"]}
    dense, initial, learned = report["table"][0], rows[settings["init"]], report["table"][-1]
    taken, planned = report["validation"][-1]["step"], settings["steps"]
    ended = _steps(taken) if taken >= planned else f"{taken:,} of {_steps(planned)}"
    flips, groups = report["flipped_groups_by_layer"], sum(report["groups_by_layer"].values())
    # rebuilt from a journal, a step has no time
    timed = [step for step in steps if step["seconds"] > 0]
    tokens, seconds = sum(step["tokens"] for step in steps), sum(step["seconds"] for step in timed)
    figures = [
        ("perplexity", _decimals(learned["perplexity"]), f"dense model {_decimals(dense['perplexity'])}"),
        (
            "groups that moved",
            _percent(sum(flips.values()), groups) if flips else "not known",
            f"{sum(flips.values()):,} of {groups:,}" if flips else f"of {groups:,}",
        ),
        ("tokens learned from", f"{tokens:,}", f"in {ended}"),
        (
            "seconds",
            _decimals(learned["seconds"], 1),
            f"{sum(step['tokens'] for step in timed) / seconds:,.0f} tokens a second" if timed else "",
        ),
    ]
    tiles = "\n".join(
        f'<div><dt>{name}</dt><dd>{value}</dd><dd class="faint">{more}</dd></div>' for name, value, more in figures
    )
    early = ""
    if taken < planned:
        early = "<p>The run ended early: the perplexity of the validation text rose above that of the initial mask.</p>"
    return (
        f"<header>\n<h1>{escape(title)}</h1>\n"
        f"<p>Learned on {escape(settings['data'])} by {escape(settings['estimator'])} from the "
        f"{escape(settings['init'])} mask, whose perplexity is {_decimals(initial['perplexity'])}.</p>\n"
        f'<dl class="figures">\n{tiles}\n</dl>\n{early}</header>'
    )


def _methods(report: Mapping) -> str:
    table = report["table"]
    other = all("other_perplexity" in row for row in table)
    head = ["mask", "perplexity", *(["other text"] if other else []), "seconds from the dense model"]
    lines = []
    for row in table:
        perplexities = [row["perplexity"], *([row["other_perplexity"]] if other else [])]
        name = "none (dense)" if row["method"] == "dense" else row["method"]
        lines.append((name, [*map(_number, map(_decimals, perplexities)), _number(_decimals(row["seconds"], 1))]))
    text = f"Over {report['eval_tokens']:,} tokens of the test text."
    if other:
        text += f" The other text: {escape(report['settings']['other_data'])}."
    return f'<p class="faint">{text}</p>\n' + _table(head, lines, "methods")


def _held_out(rows: Sequence[Mapping]) -> str:
    points = [(row["tokens"], row["perplexity"]) for row in rows]

    def draw(axes) -> None:
        _curve(axes, points, "perplexity", FIRST)
        axes.set_ylabel("perplexity of the validation text")

    if not _finite(points):
        return "<p>No finite value is known.</p>"
    first, last = (f"{_decimals(rows[at]['perplexity'])} after {_steps(rows[at]['step'])}" for at in (0, -1))
    told = f"{first}, {last}" if len(rows) > 1 else first
    return f'<p class="faint">Of the validation text: {told}.</p>\n' + _picture(
        "held-out", told, [draw], "tokens learned from"
    )


def _losses(steps: Sequence[Mapping]) -> str:
    def points(name: str) -> list[tuple]:
        return [(step["step"], step[name]) for step in steps]

    def draw_loss(axes) -> None:
        _curve(axes, points("loss"), "loss", FIRST)
        axes.set_ylabel("loss, nats a token")

    def draw_residual(axes) -> None:
        _curve(axes, points("residual"), "residual", FIRST, line=False)
        _curve(axes, points("tracker"), "tracker", SECOND)
        axes.set_ylabel("nats a token")
        axes.legend(frameon=False)

    def draw_advantage(axes) -> None:
        _curve(axes, points("advantage"), "advantage", FIRST, line=False)
        axes.axhline(0, color=FAINT, linewidth=0.8)
        axes.set_ylabel("advantage, nats a token")

    if not _finite(points("loss")):
        return "<p>No step has a finite loss.</p>"
    parts, text = [draw_loss], "Loss of each step's batch under the masks drawn"
    if _finite(points("residual")):
        parts += [draw_residual, draw_advantage]
        text += "; residual: that loss less the batch's loss under the initial mask; tracker: its moving average; "
        text += "advantage: residual less tracker"
    if len(steps) > MOST_POINTS:
        text += f". Curves are means of {MOST_POINTS} stretches, bands reach from their least to their largest value"
    return f'<p class="faint">{text}.</p>\n' + _picture("loss", "loss over steps", parts, "step")


def _skipped_steps(steps: Sequence[Mapping]) -> str:
    skipped = [step["step"] for step in steps if not _is_finite(step["loss"])]
    if not skipped:
        return ""
    stretches = [
        [step for _, step in stretch] for _, stretch in groupby(enumerate(skipped), lambda pair: pair[1] - pair[0])
    ]
    told = ", ".join(f"{s[0]}" if len(s) == 1 else f"{s[0]} to {s[-1]}" for s in stretches[:MOST_SKIPPED])
    more = sum(map(len, stretches[MOST_SKIPPED:]))
    told += f", and {more:,} later ones" if more else ""
    return f"<p>{len(skipped):,} of {_steps(len(steps))} moved nothing, as a loss was no finite number: {told}.</p>"


def _moved(report: Mapping) -> str:
    flips = report["flipped_groups_by_layer"]
    if not flips:
        return "<p>How many groups differ from the initial mask is not known.</p>"
    shares = {name: (flips[name], groups) for name, groups in report["groups_by_layer"].items()}
    text = "Share of the groups whose learned mask is not the initial one."
    return f'<p class="faint">{text}</p>\n' + _by_layer(shares)


def _flip_rates(report: Mapping) -> str:
    groups = report["groups_by_layer"]
    names, known = list(groups), {}
    for step in report["steps"]:
        if _is_finite(step["flip_rate"]):
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
    return f'<p class="faint">{text}</p>\n' + _by_layer(shares)


def _run(report: Mapping) -> str:
    settings = {**report["settings"], "gap": report["gap"]}
    parts = [
        "<p>To run it again:</p>",
        # no break between an option and its value, nor within one
        f"<pre>{' '.join(f'<span>{escape(shlex.join(words))}</span>' for words in command(report))}</pre>",
        '<div class="beside">',
        _pairs("Settings", settings),
        _pairs("Versions", report["versions"]),
        _pairs("Layers left dense", report["skipped"]) if report["skipped"] else "",
        "</div>",
        f'<p class="faint">Digest of the logits: <code>{escape(report["logits"])}</code></p>',
    ]
    return "\n".join(parts)


def _by_layer(shares: Mapping[str, Share | None]) -> str:
    """Heat maps by block and projection, a stack of blocks each; and a table of the layers that are in none.

    Args:
        shares: by layer (how many, of how many), or None where that is not known.
    """
    most = max((part / whole for part, whole in filter(None, shares.values())), default=0.0)
    stacks, others = {}, {}
    for name, share in shares.items():
        found = BLOCK.fullmatch(name)
        if found is None:
            others[name] = share
        else:
            # an expert's number is no projection: those of a block share a cell
            words = [word for word in found["projection"].split(".") if not word.isdigit()]
            projection = ".".join(words) or found["projection"]
            cells = stacks.setdefault(found["stack"], {}).setdefault(projection, {})
            cells.setdefault(int(found["block"]), []).append(share)
    parts = []
    for stack, columns in stacks.items():
        if len(stacks) > 1:
            parts.append(f"<h3>{escape(stack)}</h3>")
        last = [name.rsplit(".", 1)[-1] for name in columns]
        short = last if len(set(last)) == len(last) else list(columns)
        rows = []
        for block in sorted({block for column in columns.values() for block in column}):
            rows.append((str(block), [_heat(column.get(block, []), most) for column in columns.values()]))
        parts.append(_table(["block", *short], rows, "heat"))
    if others:
        rows = [(name, [_heat([share], most)]) for name, share in others.items()]
        parts.append(_table(["layer", "share"], rows, "heat"))
    return "\n".join(parts)


def _heat(shares: Sequence[Share | None], most: float) -> str:
    """A cell that is the stronger coloured the nearer it is to the largest share."""
    known = [share for share in shares if share is not None]
    if not known:
        return _number("–")
    part, whole = (sum(numbers) for numbers in zip(*known, strict=True))
    # never as strong as to hide the number
    heat = 0.75 * min(part / whole / most, 1.0) if most else 0.0
    return f'<td class="number" style="--heat: {heat:.2f}">{_percent(part, whole)}</td>'


def _number(text: str) -> str:
    return f'<td class="number">{text}</td>'


def _table(head: Sequence[str], rows: Iterable[tuple[str, list[str]]], style: str) -> str:
    """A table of rows (name, cells)."""
    first, *others = map(escape, head)
    lines = [f'<div class="wide"><table class="{style}">', f'<thead><tr><th scope="col">{first}</th>']
    lines += [f'<th scope="col" class="number">{name}</th>' for name in others]
    lines.append("</tr></thead>\n<tbody>")
    lines += [f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>' for name, cells in rows]
    lines.append("</tbody></table></div>")
    return "\n".join(lines)


def _pairs(title: str, values: Mapping) -> str:
    lines = [
        f'<tr><th scope="row" class="faint">{escape(name)}</th><td>{escape(str(value))}</td></tr>'
        for name, value in values.items()
    ]
    return "\n".join([f"<div>\n<h3>{title}</h3>\n<table><tbody>", *lines, "</tbody></table>\n</div>"])


def _picture(name: str, label: str, parts: Sequence[Callable], below: str) -> str:
    """Axes one below another as an SVG element; each part draws into its own.

    Args:
        name: begins its ids, so that they differ from those of the page's other pictures.
        label: for readers who do not see it.
        parts: called with axes each.
        below: what the shared horizontal axis shows, whole numbers.
    """
    import matplotlib
    from matplotlib.figure import Figure

    settings = {
        # the text is the page's: selectable, and in its font
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 10,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": FAINT,
        "grid.alpha": 0.25,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(9, 0.6 + 2.6 * len(parts)), layout="constrained")
        rows = figure.subplots(len(parts), 1, sharex=True, squeeze=False)[:, 0]
        for axes, draw in zip(rows, parts, strict=True):
            draw(axes)
        rows[-1].set_xlabel(below)
        rows[-1].locator_params(axis="x", integer=True, min_n_ticks=1)
        rows[-1].xaxis.set_major_formatter("{x:,.0f}")
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    drawn = file.getvalue()
    box = re.search(r'viewBox="[^"]*"', drawn)[0]
    # behind the opening tag and the style, which the page has of its own
    inside = drawn[drawn.index("</defs>") + len("</defs>") :].replace("xlink:href", "href")
    inside = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\g<1>{name}-", inside)
    for drawn_in, shown_in in COLOURS.items():
        inside = inside.replace(drawn_in, shown_in)
    return f'<div class="wide"><svg {box} role="img" aria-label="{escape(label)}">{inside.rstrip()}</div>'


def _curve(axes, points: Sequence[tuple], label: str, colour: str, line: bool = True) -> None:
    """Points (x, y) that are finite, thinned out where they are many."""
    points = _finite(points)
    if len(points) <= MOST_POINTS:
        style = {"linestyle": "-" if line else "none", "linewidth": 1, "marker": "o", "markersize": 2.5}
        axes.plot([x for x, _ in points], [y for _, y in points], color=colour, label=label, **style)
        return
    ends = [len(points) * at // MOST_POINTS for at in range(MOST_POINTS + 1)]
    parts = [points[start:end] for start, end in pairwise(ends)]
    x = [sum(x for x, _ in part) / len(part) for part in parts]
    values = [[y for _, y in part] for part in parts]
    axes.fill_between(x, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.2, linewidth=0)
    axes.plot(x, [sum(ys) / len(ys) for ys in values], color=colour, label=label, linewidth=1)


def _finite(points: Iterable[tuple]) -> list[tuple]:
    return [(x, y) for x, y in points if _is_finite(y)]


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _steps(count: int) -> str:
    return f"{count:,} step{'s' if count != 1 else ''}"


def _decimals(value: float, digits: int = 2) -> str:
    return f"{value:,.{digits}f}"


def _percent(part: float, whole: int) -> str:
    """Markup of a percentage: 0 and what is too small for its digits are told apart."""
    share = 100 * part / whole
    if not share:
        return "0"
    return f"{share:.3f}%" if share >= 0.001 else "&lt;0.001%"
