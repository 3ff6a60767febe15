"""Whether an earlier mask of a run was better on the validation text than its last one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

# An end that is higher than the lowest one by less than this factor is not told
HIGHER = 1.01


def lowest(validation: Sequence[Mapping]) -> Mapping:
    """The row with the lowest perplexity, the first of several; one that is no finite number is the highest."""
    return min(validation, key=lambda row: row["perplexity"] if math.isfinite(row["perplexity"]) else math.inf)


def better_mask(validation: Sequence[Mapping]) -> dict | None:
    """{"step": ..., "perplexity": ..., "last": ...} of the lowest row, and the last perplexity.

    None where the last perplexity is at most 1% above the lowest.

    Args:
        validation: rows of a run with "step" and "perplexity", the initial mask's first, which is finite.
    """
    best, last = lowest(validation), validation[-1]["perplexity"]
    if last <= HIGHER * best["perplexity"]:
        return None
    return {"step": best["step"], "perplexity": best["perplexity"], "last": last}


def told(found: Mapping) -> str:
    """What ``better_mask`` has found, in words."""
    if found["step"] == 0:
        return (
            f"the mask is worse than the initial one: its validation perplexity is {found['last']:.2f}, that of the "
            f"initial one {found['perplexity']:.2f}; more text or a lower --lr may help"
        )
    return (
        f"the validation perplexity was lowest at step {found['step']}, {found['perplexity']:.2f}, and is "
        f"{found['last']:.2f} at the end; fewer --steps, more text or a lower --lr may end lower"
    )
