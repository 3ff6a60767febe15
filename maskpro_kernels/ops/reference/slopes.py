"""Steps by a gradient: of logits along the slope of a loss in the mask, and AdamW on the weights that a mask keeps."""

from __future__ import annotations

import torch

from .arithmetic import group_round_logits, scalar
from .groups import columns, decode, fixed_sum, group_index, grouped, uncolumns

# Common for language models. A weight that enters the mask late has moments of 0, which the layer's bias correction
# does not take into account. With a steady gradient it moves at most 1.1 times the learning rate in a step; with
# torch's 0.999 instead of 0.95 it would move up to 6.5 times the rate
BETA = 0.9
BETA_OF_SQUARES = 0.95
EPSILON = 1e-8


def group_mask_slope(weight, grad, square, codes):
    """Slope of a loss in the mask, less its mean over the group, since the sum of a group's mask is fixed.

    With first and second derivatives G and F in the masked weight, the loss changes by w G (m' - m) + w^2 F (m' - m)^2
    / 2 if a weight's mask goes from m to m'. The slope halfway between kept and dropped, w G + (1/2 - m) w^2 F, is the
    cost of the change in either direction. w G alone ignores a change that overshoots.
    """
    h = []
    kept = decode(codes, weight.shape[-1])
    for w, g, s, k in zip(columns(weight), columns(grad), columns(square), kept, strict=True):
        w = w.to(torch.float32)
        half = 0.5 * (w * w * s)
        h.append(w * g.to(torch.float32) + torch.where(k, 0.0 - half, half))
    mean = fixed_sum(h) * (1.0 / len(h))
    return uncolumns([h_i - mean for h_i in h])


def group_descended_logits(gradient, logits, rate, max_update):
    """(float32 groups of logits less the clamped step; sum of squares of each group's gradient)."""
    gradient = [g.to(torch.float32) for g in columns(gradient)]
    new = []
    for x, g in zip(columns(logits), gradient, strict=True):
        step = g * torch.where(rate < torch.inf, rate, 0.0)
        step = torch.maximum(torch.minimum(step, max_update), 0.0 - max_update)
        new.append(x.to(torch.float32) - torch.where(g.abs() < torch.inf, step, 0.0))
    return uncolumns(new), fixed_sum([g * g for g in gradient])


def group_straight_through_logits(weight, grad, square, codes, logits, rate, max_update):
    return group_descended_logits(group_mask_slope(weight, grad, square, codes), logits, rate, max_update)


def mask_slope(weight, first, second, codes, m):
    """Slope of a loss in the mask of ``codes`` [rows, K / M], less its mean over each group, float32 [rows, K].

    ``first`` and ``second`` [rows, K] are the loss's derivatives in the masked weight.
    """
    tensors = (grouped(x, m) for x in (weight, first, second))
    return group_mask_slope(*tensors, codes).view(weight.shape)


def descend_by_slope_(logits, weight, first, factors, codes, rate, max_update, m, counter):
    """``descend_`` by ``mask_slope``; the second derivative is the outer product of ``factors`` [rows] and [K]."""
    gradient = mask_slope(weight, first, torch.outer(*factors), codes, m)
    return descend_(logits, gradient, rate, max_update, m, counter)


def descend_(logits, gradient, rate, max_update, m, counter):
    """logits [rows, K] -= rate * gradient, clamped to +-max_update; returns the gradient's mean square, 0-dim.

    A step that is not finite moves nothing. 16-bit logits are rounded stochastically, with words of the rounding
    stream.
    """
    new, squares = group_descended_logits(grouped(gradient, m), grouped(logits, m), rate, scalar(max_update, logits))
    if logits.dtype != torch.float32:
        new = group_round_logits(new, group_index(logits, counter, m), counter.key, dtype=logits.dtype)
    logits.copy_(new.view(logits.shape))
    return squares.sum() / max(logits.numel(), 1)


def adamw_scalars(usable, count, rate, decay):
    """Numbers of a step that all weights share, float32 [4] on the device of ``count``.

    Args:
        usable: bool, 0-dim; if false nothing moves.
        count: number of the layer's step, from 1, 0-dim float32.
        rate, decay: learning rate and weight decay.

    Returns:
        (1 if usable, factor of a weight by its decay, rate divided by the first moment's bias correction, inverse root
        of the second moment's bias correction).
    """
    step = rate / (1.0 - BETA**count)
    return torch.stack([usable.float(), torch.full_like(step, 1.0 - rate * decay), step,
                        (1.0 - BETA_OF_SQUARES**count).rsqrt()])  # fmt: skip


def group_adamw(gradient, master, first, second, codes, usable, remaining, step, correction, *, dtype):
    """New (master, first, second) of groups [groups, M] for kept weights, and the weight in ``dtype``."""
    kept = uncolumns(decode(codes, master.shape[-1])) & (usable > 0.0)
    gradient = gradient.to(torch.float32)
    new_first = first + (gradient - first) * (1.0 - BETA)
    new_second = second + (gradient * gradient - second) * (1.0 - BETA_OF_SQUARES)
    # torch's float32 root is not always rounded correctly. A negative number, which no moment is, would give NaN of
    # either sign
    root = new_second.clamp_min(0.0).to(torch.float64).sqrt().to(torch.float32)
    spread = root * correction + EPSILON
    moved = torch.where(kept, master * remaining - step * (new_first / spread), master)
    return moved, torch.where(kept, new_first, first), torch.where(kept, new_second, second), moved.to(dtype)


def adamw_(weight, master, first, second, gradient, codes, scalars, m):
    """Update ``master``, ``first`` and ``second`` [rows, K] in place, and round ``master`` to ``weight``."""
    groups = (grouped(x, m) for x in (gradient, master, first, second))
    results = group_adamw(*groups, codes, *scalars.unbind(), dtype=weight.dtype)
    for held, new in zip((master, first, second, weight), results, strict=True):
        held.copy_(new.view(held.shape))
