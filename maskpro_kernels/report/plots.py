"""Pictures of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path


def check_pictures(name: str, path: Path | None = None) -> None:
    """Raise ValueError that begins with the name of an argument unless pictures can be drawn, of that file's kind."""
    if find_spec("matplotlib") is None:
        raise ValueError(
            f"{name}: pictures need the package matplotlib, which is not installed "
            "(pip install 'maskpro-kernels[demo]')"
        )
    if path is not None:
        from matplotlib.figure import Figure

        kinds = sorted(Figure().canvas.get_supported_filetypes())
        if path.suffix.removeprefix(".").lower() not in kinds:
            raise ValueError(f"{name}: expected a file that ends in .{', .'.join(kinds)}, got {str(path)!r}")


def draw_perplexity(curves: Mapping[str, Sequence[Mapping]], path: Path) -> None:
    """Perplexity over tokens: by name of the run the rows of its held-out checks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, held_out in curves.items():
        axes.plot([row["tokens"] for row in held_out], [row["perplexity"] for row in held_out], "o-", label=name)
    axes.set_xlabel("tokens")
    axes.set_ylabel("perplexity of the validation text")
    axes.legend()
    figure.savefig(path, dpi=120)


def draw_residual(records: Sequence[Mapping], path: Path) -> None:
    """Residual, tracker and advantage by step, from what each step of a run by REINFORCE left."""
    from matplotlib.figure import Figure

    steps = [record["step"] for record in records]
    figure = Figure(figsize=(8, 6), layout="constrained")
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
