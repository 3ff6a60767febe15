"""A step of AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) on the weights that a mask keeps."""

from __future__ import annotations

import torch

from .groups import decode, grouped, uncolumns

# Common for language models. A weight that comes into the mask late has moments of 0, which the layer's bias correction
# does not know. By a steady gradient it then moves at most 1.1 times the learning rate in a step; with 0.95 replaced by
# torch's 0.999 it would move up to 6.5 times that
BETA, BETA_OF_SQUARES = 0.9, 0.95
EPSILON = 1e-8


def adamw_scalars(usable, count, rate, decay):
    """What a step has in common for all weights, float32 [4] on the device of ``count``.

    Args:
        usable: bool, 0-dim; where false nothing moves.
        count: which step of the layer it is, from 1, 0-dim float32.
        rate, decay: learning rate and weight decay.

    Returns:
        (1 where usable, what decay leaves of a weight, the rate over the first moment's bias correction, the inverse
        root of the second one's).
    """
    step = rate / (1.0 - BETA**count)
    return torch.stack([usable.float(), torch.full_like(step, 1.0 - rate * decay), step,
                        (1.0 - BETA_OF_SQUARES**count).rsqrt()])  # fmt: skip


def group_adamw(gradient, master, first, second, codes, usable, remaining, step, correction, *, dtype):
    """New (master, first, second) of groups [groups, M], where the codes keep a weight; and the weight in ``dtype``."""
    kept = uncolumns(decode(codes, master.shape[-1])) & (usable > 0.0)
    new_first = first + (gradient - first) * (1.0 - BETA)
    new_second = second + (gradient * gradient - second) * (1.0 - BETA_OF_SQUARES)
    # torch's root of a float32 is not always the nearest one. That of a negative number, which no moment is, would be
    # NaN of one sign or the other
    root = new_second.clamp_min(0.0).to(torch.float64).sqrt().to(torch.float32)
    spread = root * correction + EPSILON
    moved = torch.where(kept, master * remaining - step * (new_first / spread), master)
    return moved, torch.where(kept, new_first, first), torch.where(kept, new_second, second), moved.to(dtype)


def adamw_(weight, master, first, second, gradient, codes, scalars, *, m):
    """Step ``master``, ``first`` and ``second`` [rows, K] in place, and round ``weight`` from master."""
    groups = (grouped(x, m) for x in (gradient, master, first, second))
    results = group_adamw(*groups, codes, *scalars.unbind(), dtype=weight.dtype)
    for held, new in zip((master, first, second, weight), results, strict=True):
        held.copy_(new.view(held.shape))
