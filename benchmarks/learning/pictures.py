"""Pictures of measurements, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@contextmanager
def picture(path: Path) -> Iterator[Axes]:
    """Yield empty axes, and write them to a file in the format of its suffix; the same curves give the same SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        try:
            yield axes
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        finally:
            plt.close(figure)
