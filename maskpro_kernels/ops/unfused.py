"""Products and slopes by torch.mm, for tables without kernels of them."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from .definitions import codes_under
from .dispatch import table
from .reference import curvature_factors, dequantized

# Most int8 values that are dequantized at a time: 64 MB of float32
DEQUANTIZED = 1 << 24


def masked_linear(x, weight, bias, log_prob, mask):
    """[x [tokens, K] @ (weight * mask).T + bias], with ``log_prob`` also log p of the drawn mask, 0-dim."""
    routines = table(x.device.type)
    bias = None if bias is None else bias.to(x.dtype)
    y = linear(x, routines.masked_weight(weight.to(x.dtype), mask), bias)
    if not log_prob:
        return [y]
    codes = codes_under(mask)
    return [y, routines.mask_log_prob(mask.tensor, codes, mask.n, mask.m, mask.inv_temperature).sum()]


def masked_linear_input_grad(grad, weight, mask):
    """grad [tokens, rows] @ (weight * mask)."""
    return grad @ table(grad.device.type).masked_weight(weight.to(grad.dtype), mask)


def masked_linear_weight_grad(grad, x, mask):
    """(grad.T @ x) * mask."""
    return table(grad.device.type).masked_weight(grad.t() @ x, mask)


def straight_through_grad(grad, x, weight, curvature, weight_grad, tokens, row_squares, mask):
    """``mask_slope`` of a layer's gradient."""
    factors = curvature_factors(grad, x, curvature, tokens, row_squares)
    first = _first_derivative(grad, x, weight_grad)
    return table(grad.device.type).mask_slope(weight, first, torch.outer(*factors), codes_under(mask), mask.m)


def straight_through_update_(
    logits, grad, x, weight, curvature, rate, max_update, weight_grad, tokens, row_squares, mask
):
    """``descend_by_slope_`` by a layer's gradient."""
    factors = curvature_factors(grad, x, curvature, tokens, row_squares)
    first = _first_derivative(grad, x, weight_grad)
    codes = codes_under(mask._replace(tensor=logits))
    descend = table(grad.device.type).descend_by_slope_
    return descend(logits, weight, first, factors, codes, rate, max_update, mask.m, mask.counter)


def int8_linear(x, values, scales, bias):
    """x [tokens, K] @ dequantized [rows, K].T + bias, by slices of rows."""
    rows, k = values.shape
    out = x.new_empty(x.shape[0], rows)
    count = max(1, DEQUANTIZED // max(k, 1))
    for first in range(0, rows, count):
        part = slice(first, first + count)
        part_bias = None if bias is None else bias[part]
        out[:, part] = linear(x, dequantized(values[part], scales[part], x.dtype), part_bias)
    return out


def _first_derivative(grad, x, weight_grad):
    """grad.T @ x, also written to ``weight_grad``."""
    if weight_grad is None:
        return grad.t() @ x
    if weight_grad.dtype == grad.dtype:
        return torch.mm(grad.t(), x, out=weight_grad)
    first = grad.t() @ x
    weight_grad.copy_(first)
    return first


def weight_gradient(grad, x):
    """grad.T @ x in float32, first rounded to the operands' dtype."""
    return (grad.t() @ x).float()
