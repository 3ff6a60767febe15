"""Curves as an SVG element of the page: drawn by matplotlib, shown in the page's colours and font."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise

from ..extras import require
from .markup import finite_points

# A longer curve is drawn as means of so many stretches, with a band from the least to the largest value of each
MOST_POINTS = 500
# matplotlib draws in these colours, and the page shows them in those of its scheme
COLOURS = {"#010101": "var(--ink)", "#020202": "var(--faint)", "#030303": "var(--first)", "#040404": "var(--second)"}
INK, FAINT, FIRST, SECOND = COLOURS


def picture(name: str, label: str, parts: Sequence[Callable], below: str, height: float = 2.6) -> str:
    """Axes one below another as an SVG element; each part draws into its own.

    Args:
        name: begins its ids, so that they differ from those of the page's other pictures.
        label: for readers who do not see it.
        parts: called with axes each.
        below: what the shared horizontal axis shows, whole numbers.
        height: of each part, in inches.
    """
    require("maskpro_kernels.report", "matplotlib")
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
        figure = Figure(figsize=(9, 0.6 + height * len(parts)), layout="constrained")
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


def curve(axes, points: Sequence[tuple], label: str, colour: str, line: bool = True) -> None:
    """Points (x, y) that are finite, thinned out where they are many."""
    points = finite_points(points)
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
