"""The update of a step, from its record in the journal: what a run does at each step, and what rebuilds its logits."""

from __future__ import annotations

import torch

from .journal import Entry
from .model_masks import ModelMasks


@torch.inference_mode()
def replay(masks: ModelMasks, seed: int, entry: Entry) -> None:
    """Move the logits by the update of a step; they are as they were then."""
    if entry.skipped:
        return
    # together: all scores are those of the logits before the step, and they are rounded once
    ids, _, coefs = zip(*entry.draws, strict=True)
    masks.score_update_(coefs, draw=ids, seed=seed, step=entry.step)
