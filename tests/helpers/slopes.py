"""Operands of a slope, and the source of their mask."""

from __future__ import annotations

import torch

from helpers.products import DRAW, TEMPERATURE, normal
from maskpro_kernels.functional.checks import counter_of
from maskpro_kernels.ops.counter import MaskSource

CURVATURE = 0.25


def source_of(logits, pattern, kind="drawn"):
    """The source of the mask that ``mask_of`` finds for the same logits."""
    return MaskSource(logits, kind, pattern.n, pattern.m, 1 / TEMPERATURE, counter_of(logits, pattern, **DRAW))


def slope_in(grad, x, weight, mask, m, dtype):
    """By the formula, its matrix product and the rest in ``dtype``."""
    grad, x, weight = (tensor.to(dtype) for tensor in (grad, x, weight))
    wide = torch.promote_types(dtype, torch.float32)
    first = (grad.T @ x).to(wide)
    second = torch.outer(grad.to(wide).square().sum(0), x.to(wide).square().sum(0)) * CURVATURE
    weight = weight.to(wide)
    h = weight * first + torch.where(mask, -0.5, 0.5) * weight.square() * second
    h = h.view(len(h), -1, m)
    return (h - h.mean(2, keepdim=True)).view(weight.shape)


def slope_operands(pattern, tokens=20, rows=24, k=96, dtype=torch.float32, logits=torch.float32):
    k -= k % pattern.m
    grad, x, weight = (normal(*s, seed=i, dtype=dtype) for i, s in enumerate(((tokens, rows), (tokens, k), (rows, k))))
    return grad, x, weight, (3 * normal(rows, k, seed=3)).to(logits)
