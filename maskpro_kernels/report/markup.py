"""Tables, heat maps and numbers of the page as HTML."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources

# A block's number within a layer's name, what stands before it, and what behind
BLOCK = re.compile(r"(?P<stack>.+?)\.(?P<block>\d+)\.(?P<projection>.+)")
# How many groups, of how many
Share = tuple[float, int]


def page(title: str, body: Sequence[str]) -> str:
    """A whole page, which needs nothing beside it."""
    style = resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8").strip()
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}\n</style>\n</head>\n<body>\n" + "\n".join(body) + "\n"
        "</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    return "\n".join([f"<section>\n<h2>{title}</h2>", *filter(None, parts), "</section>"])


def by_layer(shares: Mapping[str, Share | None]) -> str:
    """A heat map by block and projection for each stack of blocks, and a table of the layers that are in none.

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
            rows.append((str(block), [heat_cell(column.get(block, []), most) for column in columns.values()]))
        parts.append(table(["block", *short], rows, "heat"))
    if others:
        rows = [(name, [heat_cell([share], most)]) for name, share in others.items()]
        parts.append(table(["layer", "share"], rows, "heat"))
    return "\n".join(parts)


def heat_cell(shares: Sequence[Share | None], most: float) -> str:
    """A cell of some shares together; the nearer it is to the largest share, the stronger its colour."""
    known = [share for share in shares if share is not None]
    if not known:
        return number_cell("–")
    part, whole = (sum(numbers) for numbers in zip(*known, strict=True))
    # never as strong as to hide the number
    heat = 0.75 * min(part / whole / most, 1.0) if most else 0.0
    return f'<td class="number" style="--heat: {heat:.2f}">{percent(part, whole)}</td>'


def number_cell(text: str) -> str:
    """A cell whose text stands at its right."""
    return f'<td class="number">{text}</td>'


def table(head: Sequence[str], rows: Iterable[tuple[str, list[str]]], style: str) -> str:
    """A table of rows (name, cells), in the CSS class ``style``."""
    first, *others = map(escape, head)
    lines = [f'<div class="wide"><table class="{style}">', f'<thead><tr><th scope="col">{first}</th>']
    lines += [f'<th scope="col" class="number">{name}</th>' for name in others]
    lines.append("</tr></thead>\n<tbody>")
    lines += [f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>' for name, cells in rows]
    lines.append("</tbody></table></div>")
    return "\n".join(lines)


def pairs(title: str, values: Mapping) -> str:
    """A table of names and values under a heading."""
    lines = [
        f'<tr><th scope="row" class="faint">{escape(name)}</th><td>{escape(str(value))}</td></tr>'
        for name, value in values.items()
    ]
    return "\n".join([f"<div>\n<h3>{title}</h3>\n<table><tbody>", *lines, "</tbody></table>\n</div>"])


def finite_points(points: Iterable[tuple]) -> list[tuple]:
    """The points (x, y) whose y is a finite number."""
    return [(x, y) for x, y in points if is_finite(y)]


def is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def count_of_steps(count: int) -> str:
    return f"{count:,} step{'s' if count != 1 else ''}"


def decimals(value: float, digits: int = 2) -> str:
    return f"{value:,.{digits}f}"


def percent(part: float, whole: int) -> str:
    """Markup of a percentage: 0 and what is too small for its digits are told apart."""
    share = 100 * part / whole
    if not share:
        return "0"
    return f"{share:.3f}%" if share >= 0.001 else "&lt;0.001%"
