"""Whether the steps of a run can change a mask at all."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

from torch import Tensor

from ..modules import MaskedLinear
from ..pattern import NMPattern
from ..ranks import Ranks
from .estimator import Estimator
from .sharded_run import is_sharded

# Of logits looked at together: most runs are through with the first
ROWS = 1024


def margins(logits: Tensor, pattern: NMPattern) -> Tensor:
    """By how much the lowest kept logit of each group lies above its highest dropped one, float32 [groups].

    Args:
        logits: [rows, columns], finite.
        pattern: of their groups.
    """
    ordered = logits.detach().float().reshape(-1, pattern.m).topk(pattern.n + 1, dim=1).values
    return ordered[:, pattern.n - 1] - ordered[:, pattern.n]


def nearest_margin(layers: Mapping[str, MaskedLinear], enough: float = -math.inf) -> float:
    """The least of ``margins`` of the logits that this rank has; the first one found that is ``enough`` or less."""
    nearest = math.inf
    for layer in layers.values():
        for logits in layer.own_logits.detach().split(ROWS):
            nearest = min(nearest, float(margins(logits, layer.pattern).min()) if len(logits) else math.inf)
            if nearest <= enough:
                return nearest
    return nearest


def check_reach(estimator: Estimator, nearest: float, tell: bool = True) -> None:
    """See that a group lies within ``reach`` of an estimator.

    Args:
        nearest: ``nearest_margin`` of all logits.
        tell: whether this is the rank that warns.

    Warns:
        UserWarning: if there is none, and it learns without draws that change masks.

    Raises:
        ValueError: if there is none, and it learns from such draws alone.
    """
    reach = estimator.reach
    if nearest <= reach:
        return
    if estimator.needs_flips:
        raise ValueError(
            f"model: expected a kept and a dropped logit at most {reach:g} apart, got none nearer than {nearest:.4g}: "
            f"noise reaches no further, and {type(estimator).__name__} learns from draws that change a mask alone; "
            "give convert a smaller gap"
        )
    if tell:
        warnings.warn(
            f"no mask will change: all steps together can cross a gap of {reach:g}, and the nearest two logits are "
            f"{nearest:.4g} apart; give more steps, a greater max_update or a smaller gap",
            stacklevel=3,
        )


def agree_on_reach(ranks: Ranks, layers: Mapping[str, MaskedLinear], estimator: Estimator) -> None:
    """``check_reach`` of rows that ranks share, on all of them."""
    if not is_sharded(layers) or ranks.world == 1:
        return
    nearest = min(of_rank for (of_rank,) in ranks.gather([nearest_margin(layers, estimator.reach)]))
    check_reach(estimator, nearest, tell=ranks.rank == 0)
