"""The slope of a loss in the mask, and the step of the logits along it."""

from __future__ import annotations

import torch

from .groups import columns, decode, fixed_sum, group_index, grouped, uncolumns
from .rounding import group_round_logits


def mask_slope(weight, grad, square, kept):
    """Columns of a loss's slope in the mask, less its mean over the group: keeping N holds the sum of the mask.

    For G the derivative in the masked weight and F the second one, the loss changes by w G (m' - m) +
    w^2 F (m' - m)^2 / 2 when a weight goes from m to m'. Its slope halfway between kept and dropped, w G +
    (1/2 - m) w^2 F, is what going either way costs; w G alone is blind to a change that overshoots.
    """
    h = []
    for w, g, s, k in zip(columns(weight), columns(grad), columns(square), kept, strict=True):
        w = w.to(torch.float32)
        half = 0.5 * (w * w * s)
        h.append(w * g.to(torch.float32) + torch.where(k, 0.0 - half, half))
    mean = fixed_sum(h) * (1.0 / len(h))
    return [h_i - mean for h_i in h]


def bounded_step(gradient, rate, max_update):
    """rate * gradient within +-max_update; none where one of the two is not finite."""
    step = gradient * torch.where(rate < torch.inf, rate, 0.0)
    step = torch.maximum(torch.minimum(step, max_update), 0.0 - max_update)
    return torch.where(gradient.abs() < torch.inf, step, 0.0)


def group_mask_slope(weight, grad, square, codes):
    return uncolumns(mask_slope(weight, grad, square, decode(codes, weight.shape[-1])))


def group_descended_logits(gradient, logits, rate, max_update):
    """(float32 groups: logits less the bounded step; each group's sum of squares of the gradient)."""
    gradient = [g.to(torch.float32) for g in columns(gradient)]
    steps = [bounded_step(g, rate, max_update) for g in gradient]
    new = [x.to(torch.float32) - step for x, step in zip(columns(logits), steps, strict=True)]
    return uncolumns(new), fixed_sum([g * g for g in gradient])


def group_straight_through_logits(weight, grad, square, codes, logits, rate, max_update):
    return group_descended_logits(group_mask_slope(weight, grad, square, codes), logits, rate, max_update)


def straight_through_grad(weight, grad, square, codes, *, m):
    """The slope of a loss in the mask of ``codes`` [rows, K / M], less its mean over every group, float32 [rows, K].

    ``grad`` and ``square`` [rows, K] are the loss's first and second derivative in the masked weight.
    """
    tensors = (grouped(x, m) for x in (weight, grad, square))
    return group_mask_slope(*tensors, codes).view(weight.shape)


def straight_through_update_(logits, weight, grad, square, codes, rate, counter, max_update, *, m):
    """``descend_`` by ``straight_through_grad``."""
    gradient = straight_through_grad(weight, grad, square, codes, m=m)
    return descend_(logits, gradient, rate, counter, max_update, m=m)


def descend_(logits, gradient, rate, counter, max_update, *, m):
    """logits [rows, K] -= rate * gradient within +-max_update, in place; gives the mean square of the gradient, 0-dim.

    Where rate or gradient is not finite nothing moves. 16-bit logits are rounded stochastically, with words of the
    rounding stream.
    """
    new, squares = group_descended_logits(grouped(gradient, m), grouped(logits, m), rate, max_update)
    if logits.dtype != torch.float32:
        new = group_round_logits(new, group_index(logits, counter, m), counter.key, dtype=logits.dtype)
    logits.copy_(new.view(logits.shape))
    return squares.sum() / max(logits.numel(), 1)
