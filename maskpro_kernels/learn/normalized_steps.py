"""Steps of logits that are as long in all layers: by the slopes over their root mean square."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..functional.checks import FLOAT32_MAX
from .number_checks import check_float


def check_slope_settings(curvature: float, max_update: float, decay: float) -> None:
    """Raise TypeError or ValueError unless these are as for ``StraightThrough``."""
    check_float("curvature", curvature, 0.0)
    check_float("max_update", max_update, 0.0, strict=True)
    check_float("decay", decay, 0.0, math.nextafter(1.0, 0.0))


def descend_by_rms(
    descend: Callable[[Tensor], Tensor], lr: float, mean_square: float | None, device: torch.device
) -> Tensor:
    """Move the logits of a layer by -lr * slope / rms, where rms is the root of ``mean_square``.

    Args:
        descend: moves them by -rate * slope and gives the mean square of the slopes, see ``ops.descend_``.
        lr: at least 0.
        mean_square: running one of the slopes; None: that of these.
        device: of the layer's weight.

    Returns:
        The mean square of these slopes, 0-dim float32. Where the one divided by is 0 or not finite, nothing has moved.
    """

    def at_rate(rate: float) -> Tensor:
        return descend(torch.full((), rate, dtype=torch.float32, device=device))

    if mean_square is None:
        # at a rate of 0 nothing moves
        mean_square = float(at_rate(0.0))
    usable = math.isfinite(mean_square) and mean_square > 0.0
    return at_rate(min(lr / math.sqrt(mean_square), FLOAT32_MAX) if usable else 0.0)


def folded(mean_square: float | None, latest: float, decay: float) -> float | None:
    """The running mean square behind a step; as it was where that of the step is 0 or not finite."""
    if not math.isfinite(latest) or latest == 0.0:
        return mean_square
    return decay * (latest if mean_square is None else mean_square) + (1.0 - decay) * latest
