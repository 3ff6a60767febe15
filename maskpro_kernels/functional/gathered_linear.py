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


class GatheredMask(NamedTuple):
    """The mask of a gathered weight, and what takes the gradient to its logits.

    Attributes:
        is_current: whether the weight is still under the mask of the forward.
        logits: of any form; they need not have the weight's rows. None: no gradient reaches them.
        logits_backward: called with gradient, x, masked weight and None. It gives nothing back.
    """

    is_current: Callable[[], bool]
    logits: Tensor | None = None
    logits_backward: LogitsBackward | None = None


def gathered_linear(x: Tensor, weight: Tensor, bias: Tensor | None, mask: GatheredMask) -> Tensor:
    """x @ weight.T + bias of a masked weight; bits are those of ``masked_linear`` on a CPU.

    Args:
        x: [..., K], as for ``masked_linear``.
        weight: [out, K] with exact zeros, frozen.
        bias: [out] or None.
        mask: of the weight.

    Raises:
        TypeError, ValueError: x, weight or bias are not as for ``masked_linear``, or the weight is not frozen. A
            backward raises RuntimeError where the weight has come under another mask.
    """
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "weight: expected a frozen one in a layer that fully_shard has cut, got one that requires a gradient; "
            "weights learn as wholes alone"
        )
    tokens, matrix, vector = linear_operands(x, weight, bias)
    with without_autocast(tokens):
        y = _GatheredLinear.apply(tokens, matrix, vector, mask.logits, mask)
    # FSDP2 warns of a view that a module gives
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


class _GatheredLinear(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias, logits, mask):
        return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, _, ctx.mask = inputs
        needs_x, _, _, needs_logits, _ = ctx.needs_input_grad
        # as it is gathered, whatever autocast takes: FSDP2 frees it between forward and backward
        ctx.save_for_backward(x if needs_logits else None, weight if needs_x or needs_logits else None)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs_x, _, needs_bias, needs_logits, _ = ctx.needs_input_grad
        if not ctx.mask.is_current():
            raise RuntimeError(
                "weight: expected the mask of the forward in its backward, got another one: logits, seed, step, draw "
                "or mode have changed in between"
            )
        grad = grad.contiguous()
        weight = None if weight is None else weight.to(grad.dtype)
        with without_autocast(grad):
            x_grad = grad @ weight if needs_x else None
        bias_grad = grad.sum(0) if needs_bias else None
        if needs_logits:
            ctx.mask.logits_backward(grad, x, weight, None)
        return x_grad, None, bias_grad, None, None
