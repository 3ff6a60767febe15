"""A linear layer whose masked weight other ranks have drawn in part: it is there as a whole, and no mask beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.dispatch import without_autocast
from .checks import linear_operands
from .linear import LogitsBackward


class Slopes(NamedTuple):
    """What takes the gradient of a gathered layer to its logits.

    Attributes:
        logits: of any form; they need not have the weight's rows.
        logits_backward: called with gradient, x, masked weight and None. It gives nothing back.
        is_current: whether the weight is still under the mask of the forward.
    """

    logits: Tensor
    logits_backward: LogitsBackward
    is_current: Callable[[], bool]


def gathered_linear(x: Tensor, weight: Tensor, bias: Tensor | None, slopes: Slopes | None) -> Tensor:
    """x @ weight.T + bias of a masked weight; bits are those of ``masked_linear`` on a CPU.

    Args:
        x: [..., K], as for ``masked_linear``.
        weight: [out, K] with exact zeros.
        bias: [out] or None.
        slopes: None: no gradient reaches logits.

    Raises:
        TypeError, ValueError: x, weight or bias are not as for ``masked_linear``.
    """
    tokens, matrix, vector = linear_operands(x, weight, bias)
    with without_autocast(tokens):
        own = matrix.to(tokens.dtype), None if vector is None else vector.to(tokens.dtype)
        if slopes is None:
            y = torch.nn.functional.linear(tokens, *own)
        else:
            y = _GatheredLinear.apply(tokens, *own, slopes.logits, slopes)
    # FSDP2 warns of a view that a module gives
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


class _GatheredLinear(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias, logits, slopes):
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, _, ctx.slopes = inputs
        needs_x, _, _, needs_logits, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_logits else None, weight if needs_x or needs_logits else None)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs_x, _, needs_bias, needs_logits, _ = ctx.needs_input_grad
        if not ctx.slopes.is_current():
            raise RuntimeError(
                "weight: expected the mask of the forward in its backward, got another one: logits, seed, step or draw "
                "have changed in between"
            )
        grad = grad.contiguous()
        with without_autocast(grad):
            x_grad = grad @ weight if needs_x else None
        bias_grad = grad.sum(0) if needs_bias else None
        if needs_logits:
            ctx.slopes.logits_backward(grad, x, weight, None)
        return x_grad, None, bias_grad, None, None
