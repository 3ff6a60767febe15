"""Writes docs/overview.svg, the picture of the README.

    python docs/figure.py

The mask in it is a real draw: that of the logits below at seed 0, step 0.
"""

from __future__ import annotations

from pathlib import Path

import torch

from maskpro_kernels import expand_mask, sample_mask

PICTURE = Path(__file__).parent / "overview.svg"
PATTERN = "2:4"
WEIGHT = [
    [0.9, -0.2, 0.5, -0.7, 0.1, 0.8, -0.4, 0.6],
    [-0.3, 0.7, -0.9, 0.2, 0.6, -0.1, 0.9, -0.5],
    [0.4, 0.6, -0.1, -0.8, -0.7, 0.3, 0.2, 0.9],
    [-0.6, 0.3, 0.8, 0.5, -0.2, -0.9, 0.7, 0.1],
]
LOGITS = [
    [3.0, 0.2, 0.9, 2.4, 0.1, 2.8, 0.6, 2.1],
    [0.5, 2.6, 3.0, 0.1, 2.2, 0.0, 2.9, 1.1],
    [1.0, 2.2, 0.0, 2.9, 2.5, 0.8, 0.3, 3.0],
    [2.3, 0.7, 2.8, 1.3, 0.4, 3.0, 2.4, 0.0],
]
CELL = 17
GAP = 7
WIDTH = 940
HEIGHT = 372

# By class: what it colours, on a light page, on a dark one
COLOURS = {
    "card": ("fill", "#ffffff", "#0d1117"),
    "edge": ("stroke", "#d0d7de", "#3d444d"),
    "box": ("fill", "#f6f8fa", "#151b23"),
    "weight": ("fill", "#0969da", "#4493f8"),
    "logit": ("fill", "#bc4c00", "#f0883e"),
    "kept": ("fill", "#1f2328", "#f0f6fc"),
    "line": ("stroke", "#59636e", "#9198a1"),
    "back": ("stroke", "#bc4c00", "#f0883e"),
    "head": ("fill", "#59636e", "#9198a1"),
    "title": ("fill", "#1f2328", "#f0f6fc"),
    "note": ("fill", "#59636e", "#9198a1"),
}
STYLE = """
text { font-family: -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
text { font-size: 12px; }
.title { font-size: 14px; font-weight: 600; }
.strong { font-weight: 600; }
.cell { stroke-width: 0.75; }
.line { fill: none; stroke-width: 1.5; }
.back { fill: none; stroke-width: 2; }
"""


def style() -> str:
    """CSS with both palettes: the card after everything has a colour of its own, so each is readable on any page."""
    light = "".join(f".{name} {{ {what}: {colour}; }}\n" for name, (what, colour, _) in COLOURS.items())
    dark = "".join(f"  .{name} {{ {what}: {colour}; }}\n" for name, (what, _, colour) in COLOURS.items())
    return f"{STYLE}{light}@media (prefers-color-scheme: dark) {{\n{dark}}}\n"


def text(x: float, y: float, what: str, kind: str = "note", anchor: str = "middle") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{what}</text>'


def box(x: float, y: float, width: float, height: float, *lines: tuple[str, str]) -> list[str]:
    """A rounded box with lines of (text, kind) in its middle."""
    first = y + height / 2 - 9 * (len(lines) - 1) + 5
    drawn = [f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" class="box edge"/>']
    return drawn + [text(x + width / 2, first + 18 * i, what, kind) for i, (what, kind) in enumerate(lines)]


def grid(x: float, y: float, kind: str, opacities: torch.Tensor) -> list[str]:
    """Cells [rows, 8] in two groups of four; where the opacity is 0 a cell is empty."""
    cells = []
    for row, values in enumerate(opacities.tolist()):
        for column, opacity in enumerate(values):
            at = f'x="{x + CELL * column + GAP * (column // 4)}" y="{y + CELL * row}" width="{CELL}" height="{CELL}"'
            cells.append(f'<rect {at} class="cell edge box"/>')
            if opacity:
                cells.append(f'<rect {at} class="cell edge {kind}" fill-opacity="{opacity:.2f}"/>')
    return cells


def arrow(points: str, back: bool = False) -> str:
    line, head = ("back", "logit") if back else ("line", "head")
    return f'<polyline points="{points}" class="{line}" marker-end="url(#{head})"/>'


def picture() -> str:
    weight = torch.tensor(WEIGHT)
    logits = torch.tensor(LOGITS)
    mask = expand_mask(sample_mask(logits, PATTERN, seed=0), PATTERN)
    strength = 0.15 + 0.8 * weight.abs()
    marker = '<marker id="{0}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    marker += '<path d="M0,0 L8,4 L0,8 z" class="{0}"/></marker>'
    parts = [
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="12" class="card edge"/>',
        # the weight, and what is learned
        text(101, 38, "weight", "title"),
        text(101, 54, "frozen"),
        *grid(30, 64, "weight", strength),
        text(101, 194, "logits", "title"),
        text(101, 210, "one a weight, learned", "logit strong"),
        *grid(30, 220, "logit", 0.08 + 0.3 * logits),
        # the draw
        arrow("180,254 218,254"),
        *box(222, 217, 168, 74, ("draw", "title"), ("Gumbel-top-k: keeps", "note"), ("2 of every 4", "note")),
        text(306, 310, "noise from a counter:"),
        text(306, 326, "seed, step, layer, group"),
        # the mask, and the masked weight
        arrow("390,254 428,254"),
        text(503, 194, "mask", "title"),
        text(503, 210, "2 bits a weight, or drawn again"),
        *grid(432, 220, "kept", mask * 0.75),
        arrow("180,98 428,98"),
        text(306, 90, "kept where the mask is set"),
        arrow("503,178 503,142"),
        text(503, 38, "masked weight", "title"),
        text(503, 54, "exact zeros"),
        *grid(432, 64, "weight", strength * mask),
        # what it is for
        arrow("582,98 630,98"),
        *box(634, 64, 124, 68, ("product", "title"), ("in every Linear", "note")),
        arrow("758,98 792,98"),
        *box(796, 64, 114, 68, ("loss", "title"), ("of the model", "note")),
        # and back
        arrow("853,132 853,346 101,346 101,296", back=True),
        text(843, 222, "straight-through: the slope of the loss", "note", "end"),
        text(843, 238, "in each mask, inside backward", "note", "end"),
        text(843, 268, "REINFORCE: one number a step,", "note", "end"),
        text(843, 284, "times the score of the mask", "note", "end"),
        text(843, 334, "the logits move", "logit strong", "end"),
    ]
    label = "Weight and logits give a drawn N:M mask; the masked weight gives the loss; the loss moves the logits."
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">\n'
        f"<style>{style()}</style>\n<defs>{marker.format('head')}{marker.format('logit')}</defs>\n"
        + "\n".join(parts)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
