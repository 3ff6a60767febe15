"""Draws from probabilities by the inverse of their cumulative sums (Devroye 1986, Non-Uniform Random Variate
Generation, chapter III.2)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Probabilities that are summed first
BLOCK = 256
BELOW_ONE = math.nextafter(1.0, 0.0)


def drawn_indices(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """For each row the index at which the sum of the probabilities up to it passes a uniform number.

    First the block of probabilities, then the one in it: a sum over a vocabulary one by one takes longer than a small
    model's forward takes for its widest layer. Sums are cumulated in float64 on the CPU, since float32 ones would lose
    rare indices, and those of a GPU have no fixed order.

    Args:
        probabilities: float32 [rows, n]. A row need not sum to 1. One that holds NaN gives some index.
        uniform: float64 [rows], in [0, 1).

    Returns:
        int64 [rows], on the device of the probabilities.
    """
    rows, count = probabilities.shape
    lacking = -count % BLOCK
    blocks = (F.pad(probabilities, (0, lacking)) if lacking else probabilities).unflatten(1, (-1, BLOCK))
    block, rest = _passed(blocks.sum(-1), uniform.cpu()[:, None])
    row = torch.arange(rows, device=blocks.device)
    inside, _ = _passed(blocks[row, block.to(blocks.device)], rest)
    return (block * BLOCK + inside).clamp(max=count - 1).to(probabilities.device)


def _passed(weights: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
    """(index [rows], what part of its weight lies before it [rows, 1]), where a part of the sum of weights is passed.

    Args:
        weights: [rows, columns], not negative.
        part: float64 [rows, 1], in [0, 1), on the CPU.
    """
    weights = weights.cpu().double()
    sums = weights.cumsum(-1)
    sought = part * sums[:, -1:]
    # right: a weight of 0 has no place between two sums
    index = torch.searchsorted(sums, sought, right=True).clamp(max=weights.shape[1] - 1)
    own = weights.gather(-1, index)
    rest = (sought - (sums.gather(-1, index) - own)) / own
    return index[:, 0], rest.clamp(0.0, BELOW_ONE)
