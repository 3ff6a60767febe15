"""MaskPro's 2:4 step as its formulas read, one torch operation after another: what the kernels are timed against."""

from __future__ import annotations

import torch
from torch import Tensor

M = 4
N = 2
SMALLEST_PROBABILITY = 1e-10


def draw(weight: Tensor, logits: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """(bool mask of a draw without replacement from softmax(logits) by group, the weight under it)."""
    probabilities = torch.softmax(logits.view(-1, M), dim=-1).clamp_(min=SMALLEST_PROBABILITY)
    indices = torch.multinomial(probabilities, N, replacement=False, generator=generator)
    mask = torch.zeros_like(probabilities, dtype=torch.bool).scatter_(1, indices, True).view(weight.shape)
    return mask, weight * mask


def score(logits: Tensor, mask: Tensor) -> Tensor:
    """Gradient of log p(S) in the logits.

    log p({a, b}) = ln p_a + ln p_b + ln(u_a + u_b) with u = 1 / (1 - p), so p times its derivative in p
    is 1 + p u^2 / (u_a + u_b) for a kept weight and 0 for a dropped one; the softmax's Jacobian takes
    from each its p times their sum.
    """
    p = torch.softmax(logits.view(-1, M), dim=-1)
    kept = mask.view(-1, M)
    u = (1.0 - p).clamp_(min=SMALLEST_PROBABILITY).reciprocal_() * kept
    through_p = u.square().mul_(p).div_(u.sum(-1, keepdim=True)).add_(kept)
    return through_p.addcmul_(p, through_p.sum(-1, keepdim=True), value=-1).view(logits.shape)


def update_(logits: Tensor, mask: Tensor, coef: float) -> Tensor:
    """logits -= coef * score(mask), in place."""
    return logits.sub_(score(logits, mask), alpha=coef)
