"""The update of a step, from its record in the journal: what a run does at each step, and what rebuilds its logits."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..functional.masks import score_update_
from ..modules import MaskedLinear
from ..pattern import NMPattern
from .journal import Entry


@dataclass(frozen=True)
class ReplayedLayer:
    """The parts of a MaskedLinear that a replay needs: its logits, its layer id, and where a shard lies."""

    logits: Tensor
    pattern: NMPattern
    layer: int
    group_offset: int = 0
    group_row_stride: int | None = None

    def moving_logits(self) -> AbstractContextManager[Tensor]:
        return nullcontext(self.logits)


@torch.inference_mode()
def replay(layers: Mapping[str, MaskedLinear | ReplayedLayer], seed: int, entry: Entry) -> None:
    """Move the logits by the update of a step; they are as they were then."""
    if entry.skipped:
        return
    for layer in layers.values():
        # together: all scores are those of the logits before the step, and they are rounded once
        ids, _, coefs = zip(*entry.draws, strict=True)
        counter = {"seed": seed, "step": entry.step, "layer": layer.layer}
        place = {"group_offset": layer.group_offset, "group_row_stride": layer.group_row_stride}
        with layer.moving_logits() as logits:
            score_update_(logits, coefs, pattern=layer.pattern, draw=ids, **counter, **place)
