"""Whether the steps of a run can change a mask at all."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from ..modules import MaskedLinear
from ..pattern import NMPattern
from .estimator import Estimator

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


@torch.no_grad()
def check_reach(layers: Mapping[str, MaskedLinear], estimator: Estimator) -> None:
    """See that a group lies within ``reach`` of an estimator.

    Warns:
        UserWarning: if there is none, and it learns without draws that change masks.

    Raises:
        ValueError: if there is none, and it learns from such draws alone.
    """
    reach, nearest = estimator.reach, float("inf")
    if reach == float("inf"):
        return
    for layer in layers.values():
        for logits in layer.own_logits.split(ROWS):
            nearest = min(nearest, float(margins(logits, layer.pattern).min()))
            if nearest <= reach:
                return
    told = f"a kept and a dropped logit at most {reach:g} apart, got none nearer than {nearest:.4g}"
    if estimator.needs_flips:
        raise ValueError(
            f"model: expected {told}: noise reaches no further, and {type(estimator).__name__} learns from draws that "
            "change a mask alone; give convert a smaller gap"
        )
    warnings.warn(
        f"no mask will change: all steps together can cross a gap of {reach:g}, and the nearest two logits are "
        f"{nearest:.4g} apart; give more steps, a greater max_update or a smaller gap",
        stacklevel=3,
    )
