"""Whether a step draws its masks once, into codes: by what each use of a mask costs, drawn and by codes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import reference
from .dispatch import uses_kernels
from .triton import tiles


class Uses(NamedTuple):
    """What takes the mask of a layer in a step, and how often.

    Attributes:
        tokens: most that a product has.
        products: of a weight under the mask, forwards and gradients of inputs.
        slopes: of straight-through, or updates by them.
        updates: by the score of this draw alone.
    """

    tokens: int
    products: int
    slopes: int = 0
    updates: int = 0


class Costs(NamedTuple):
    """Picoseconds a weight: of a draw into codes, and of each use (where it draws, where it reads codes).

    Attributes:
        draw: into codes.
        one_pass: a product that takes the mask while it runs.
        weight: a masked weight, which is written for a product.
        slope: the part of a slope, or an update by it, that takes the mask.
        update: by a score that is exact.
    """

    draw: float
    one_pass: tuple[float, float]
    weight: tuple[float, float]
    slope: tuple[float, float]
    update: tuple[float, float]


# At 2:4, with logits of float32 and weights of 16 bits at a gap of 10, as `benchmarks/mask_costs.py` tells them: of
# GPUs by a model, on a CPU measured on one core of an Intel Xeon. gfx942 takes those of an H100, of which the ratios
# matter alone: no model is there of it, and bytes bound most of these.
COSTS = {
    "sm_80": Costs(draw=2.1, one_pass=(2.9, 1.2), weight=(3.9, 2.1), slope=(2.1, 0.1), update=(3.9, 4.0)),
    "sm_90": Costs(draw=1.4, one_pass=(1.8, 0.8), weight=(2.4, 1.3), slope=(1.4, 0.1), update=(2.4, 2.5)),
    "sm_100": Costs(draw=1.1, one_pass=(1.2, 0.7), weight=(1.1, 0.5), slope=(1.1, 0.0), update=(1.8, 1.6)),
    "cpu": Costs(draw=1200, one_pass=(1630, 580), weight=(1630, 580), slope=(1200, 0), update=(2440, 1250)),
}
COSTS["gfx942"] = COSTS["sm_90"]


def draws_once(device: torch.device, n: int, uses: Uses) -> bool:
    """Whether a step with these uses of each mask costs less if it draws the masks into codes."""
    kernels = uses_kernels(torch.empty(0, device=device))
    drawn, once = picoseconds(tiles.architecture(device) if kernels else "cpu", n, uses)
    return once < drawn


def picoseconds(row: str, n: int, uses: Uses) -> tuple[float, float]:
    """What the masks of a step cost a weight: where each use draws, and where they are drawn once into codes.

    Args:
        row: of ``COSTS``.
        n: kept weights of a group.
        uses: of each mask.
    """
    costs = COSTS[row]
    of_product = costs.weight
    if row in tiles.DRAWN_TOKENS:
        limits = tiles.DRAWN_TOKENS[row], tiles.ONE_PASS_TOKENS[row]
        of_product = tuple(
            (costs.one_pass if 0 < uses.tokens <= most else costs.weight)[way] for way, most in enumerate(limits)
        )
    # by an N above, the score takes the noise of the draw
    of_update = costs.update if n <= reference.EXACT_SCORE_MAX_N else (0.0, 0.0)
    each = (uses.products, of_product), (uses.slopes, costs.slope), (uses.updates, of_update)
    drawn, by_codes = (sum(count * cost[way] for count, cost in each) for way in (0, 1))
    return drawn, costs.draw + by_codes
