"""Whether a mask holds on a text of another kind as well as on its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Perplexity over the dense model's may be so many times as large on the other text as on the own one
PARTED = 1.25


def parting(table: Sequence[Mapping]) -> dict | None:
    """How many times the dense model's perplexity the learned mask has, on both texts, and whether these part.

    They part where that figure is more than 1.25 times as large on the other text as on its own.

    Args:
        table: of a run: the dense model first, the learned mask last.

    Returns:
        {"own": ..., "other": ..., "parted": ...}; None where no other text was looked at.
    """
    dense, learned = table[0], table[-1]
    if not all("other_perplexity" in row for row in (dense, learned)):
        return None
    own, other = (learned[name] / dense[name] for name in ("perplexity", "other_perplexity"))
    return {"own": own, "other": other, "parted": other > PARTED * own}


def told(found: Mapping, other: str) -> str:
    """What ``parting`` has found, in words.

    Args:
        other: what the other text is called.
    """
    figures = (
        f"perplexity over the dense model's: {found['own']:.2f} on the run's own text, {found['other']:.2f} on the "
        f"other text ({other})"
    )
    if not found["parted"]:
        return figures
    return (
        f"{figures}. The mask holds less on the other text, where it is over {PARTED:g} times as far from the dense "
        "model: learn from more kinds of text, or from more of the model's own samples"
    )
