"""Pictures of runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..extras import missing, require


def check_picture(name: str, path: Path) -> None:
    """Raise ValueError that begins with the name of an argument unless a picture of that file's kind can be drawn."""
    lacking = missing("matplotlib")
    if lacking:
        raise ValueError(f"{name}: a picture needs {lacking}")
    kinds = sorted(_figure().canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in kinds:
        raise ValueError(f"{name}: expected a file that ends in .{', .'.join(kinds)}, got {str(path)!r}")


def draw_perplexity(curves: Mapping[str, Sequence[Mapping]], path: Path) -> None:
    """Validation perplexity over tokens learned from, a curve for each run.

    Args:
        curves: by name of the run its rows {"tokens": ..., "perplexity": ...}.
        path: the picture to write.
    """
    figure = _figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, rows in curves.items():
        axes.plot([row["tokens"] for row in rows], [row["perplexity"] for row in rows], "o-", label=name)
    axes.set_xlabel("tokens learned from")
    axes.set_ylabel("validation perplexity")
    axes.legend()
    figure.savefig(path, dpi=120)


def draw_residual(records: Sequence[Mapping], path: Path) -> None:
    """Residual, tracker and advantage by step, from what each step of a run by REINFORCE left."""
    steps = [record["step"] for record in records]
    figure = _figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(steps, [record["residual"] for record in records], ".", label="loss residual")
    above.plot(steps, [record["tracker"] for record in records], label="tracker")
    above.set_ylabel("nats a token")
    above.legend()
    below.plot(steps, [record["advantage"] for record in records], ".", label="advantage")
    below.axhline(0, color="gray", linewidth=0.8)
    below.set_ylabel("nats a token")
    below.set_xlabel("step")
    below.legend()
    figure.savefig(path, dpi=120)


def draw_speed(rows: Sequence[Mapping], path: Path) -> None:
    """Tokens read and written a second and memory, a bar for each model.

    Args:
        rows: of each model its "model", "weight_bytes", "peak_memory" (None where it is not known), and
            "prefill_tokens_per_second" and "decode_tokens_per_second", each with "median", "low" and "high".
        path: the picture to write.
    """
    names = [row["model"] for row in rows]
    figure = _figure(figsize=(12, 1.6 + 0.5 * len(rows)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    rates = (
        ("prefill_tokens_per_second", "prompt tokens a second"),
        ("decode_tokens_per_second", "new tokens a second"),
    )
    for axes, (name, title) in zip(panels, rates, strict=False):
        medians = [row[name]["median"] for row in rows]
        spread = [[abs(row[name][end] - row[name]["median"]) for row in rows] for end in ("low", "high")]
        axes.barh(names, medians, xerr=spread, capsize=3)
        axes.set_xlabel(title)
    memory = panels[-1]
    memory.barh(names, [(row["peak_memory"] or 0) / 1e6 for row in rows], color="lightgray", label="peak memory")
    memory.barh(names, [row["weight_bytes"] / 1e6 for row in rows], height=0.4, label="weights")
    memory.set_xlabel("MB")
    memory.legend()
    # as in the table, the first on top
    memory.invert_yaxis()
    figure.savefig(path, dpi=120)


def draw_results(rows: Mapping[str, Mapping[str, float]], titles: Mapping[str, str], path: Path) -> None:
    """Figures of evaluations, a panel for each column and a bar for each result.

    Args:
        rows: by name of the result its figures by column; one may lack some.
        titles: of the columns.
        path: the picture to write.
    """
    # names are paths, which leave no room for the bars unless the picture grows with them
    names = 0.1 * max(map(len, rows))
    figure = _figure(figsize=(1 + names + 3 * len(titles), 1.2 + 0.5 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        values = [row.get(name, 0.0) for row in rows.values()]
        bars = axes.barh(list(rows), [value if math.isfinite(value) else 0.0 for value in values])
        axes.bar_label(bars, [f"{row[name]:.4g}" if name in row else "" for row in rows.values()], padding=2)
        axes.margins(x=0.2)
        axes.set_xlabel(title)
    # as in the table, the first on top
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=120)


def _figure(**how):
    """A figure of matplotlib, which takes a second to import and is optional."""
    require("maskpro_kernels.report", "matplotlib")
    from matplotlib.figure import Figure

    return Figure(**how)
