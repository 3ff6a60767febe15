"""Linear layers under a mask."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import ops
from ..counter import Counter, MaskSource
from ..pattern import NMPattern
from .checks import CounterKeywords, check_codes, check_like, check_weight, drawn_from, linear_operands

# (gradient of y [tokens, out], x [tokens, K], weight [out, K], the mask's source) -> gradient of the logits, if any
LogitsBackward = Callable[[Tensor, Tensor, Tensor, MaskSource], Tensor | None]


def masked_linear(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None = None,
    *,
    pattern: str | NMPattern,
    temperature: float = 1.0,
    log_prob: bool = True,
    **counter: Unpack[CounterKeywords],
) -> tuple[Tensor, Tensor | None]:
    """Linear layer under a drawn mask: (x @ (weight * mask).T + bias, log-probability of the mask).

    Gradients flow to x, weight, bias, and through the log-probability to the logits (the score): of first order
    and by backward only, not by ``torch.func.jvp``.

    Args:
        x: [..., K] in the weight's dtype; under autocast float32, bfloat16 or float16, and y in autocast's dtype.
        weight: float32, bfloat16 or float16 [out, K].
        logits: float32, bfloat16 or float16 [out, K].
        bias: [out] or None.
        log_prob: whether to compute the log-probability.
        The others: as for ``sample_mask``.

    Returns:
        y [..., out], and the sum over the layer of log p(S), 0-dim float32, or None if not asked for.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    pattern = NMPattern(pattern)
    check_weight(weight, pattern)
    check_like("logits", logits, "weight", weight)
    return linear_under(x, weight, bias, drawn_from(logits, pattern, temperature, counter), log_prob)


def linear_under(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: MaskSource, log_prob: bool = False
) -> tuple[Tensor, Tensor | None]:
    """``masked_linear`` under any source of a mask.

    Raises:
        TypeError, ValueError: x, weight or bias are not as for ``masked_linear``.
    """
    tokens, matrix, vector = linear_operands(x, weight, bias)
    if not log_prob:
        mask = mask._replace(tensor=mask.tensor.detach())
    y, total = ops.masked_linear(tokens, matrix, vector, log_prob, mask)
    return y.view(*x.shape[:-1], weight.shape[0]), total if log_prob else None


def straight_through_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, mask: MaskSource, curvature: float = 1.0
) -> Tensor:
    """What passes straight through a draw to its logits: the slope of the loss in the mask.

    That is w G + (1/2 - m) w^2 F, the slope halfway between kept and dropped, less its mean over every group, as a
    group's mask has a fixed sum. G is the loss's derivative in the masked weight, and F = curvature * (sum of grad^2
    over the tokens) (sum of x^2 over the tokens) its second one: of a loss that is a mean over the tokens, in nats,
    the Fisher information by K-FAC's factors (Martens and Grosse 2015, arXiv 1503.05671). With w G alone, weights
    of which any change overshoots would be dropped and kept in turn without end.

    Serves as ``logits_backward`` of ``straight_through_linear`` and of ``MaskedLinear``, which call it with their
    contiguous operands; ``functools.partial`` binds another curvature.

    Args:
        grad: gradient of y [tokens, out].
        x: [tokens, K].
        weight: [out, K].
        mask: the source of the mask under which y was computed.
        curvature: factor of F, at least 0.

    Returns:
        Tensor [out, K] in the dtype of the logits.

    Raises:
        ValueError: if ``curvature`` is below 0.
    """
    if not curvature >= 0:
        raise ValueError(f"curvature: expected a float of at least 0, got {curvature}")
    return ops.straight_through_grad(grad, x, weight, curvature, mask).to(mask.tensor.dtype)


def straight_through_linear(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None = None,
    *,
    pattern: str | NMPattern,
    temperature: float = 1.0,
    logits_backward: LogitsBackward = straight_through_gradient,
    **counter: Unpack[CounterKeywords],
) -> Tensor:
    """Linear layer under a drawn mask, with a gradient that passes straight through the draw to the logits.

    Gradients flow to x, weight and bias as in ``masked_linear``.

    Args:
        x, weight, logits, bias: as for ``masked_linear``.
        logits_backward: gives the gradient of the logits, see ``straight_through_gradient``. It is called after the
            other gradients are computed, so it may move the logits itself, and then returns None.
        The others: as for ``sample_mask``.

    Returns:
        y [..., out].

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    pattern = NMPattern(pattern)
    check_weight(weight, pattern)
    check_like("logits", logits, "weight", weight)
    return straight_through_under(x, weight, bias, drawn_from(logits, pattern, temperature, counter), logits_backward)


def straight_through_under(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: MaskSource, logits_backward: LogitsBackward
) -> Tensor:
    """``straight_through_linear`` under the source of a drawn mask.

    Raises:
        TypeError, ValueError: x, weight or bias are not as for ``masked_linear``.
    """
    tokens, matrix, vector = linear_operands(x, weight, bias)
    y = _StraightThroughLinear.apply(tokens, matrix, vector, logits_backward, mask.tensor, mask)
    return y.view(*x.shape[:-1], weight.shape[0])


class _StraightThroughLinear(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias, logits_backward, logits, mask):
        y, _ = ops.masked_linear(x, weight, bias, False, mask._replace(tensor=logits))
        return y

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, ctx.logits_backward, logits, mask = inputs
        ctx.bias_dtype, ctx.weight_dtype = None if bias is None else bias.dtype, weight.dtype
        needs_x, needs_weight, _, _, needs_logits, _ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if needs_weight or needs_logits else None,
            weight if needs_x or needs_logits else None,
            logits,
            mask.codes,
            *mask.counter.key,
        )
        ctx.mask, ctx.shard = mask._replace(tensor=None, counter=None, codes=None), mask.counter[4:]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, logits, codes, *key = ctx.saved_tensors
        mask = ctx.mask._replace(tensor=logits, counter=Counter(*key, *ctx.shard), codes=codes)
        needs_x, needs_weight, needs_bias, _, needs_logits, _ = ctx.needs_input_grad
        grad = grad.contiguous()
        x_grad = ops.masked_linear_input_grad(grad, weight, mask) if needs_x else None
        weight_grad = ops.masked_linear_weight_grad(grad, x, mask).to(ctx.weight_dtype) if needs_weight else None
        bias_grad = grad.sum(0).to(ctx.bias_dtype) if needs_bias else None
        # last: logits that have moved would draw another mask
        logits_grad = ctx.logits_backward(grad, x, weight, mask) if needs_logits else None
        if logits_grad is not None:
            # they may live elsewhere, where their mask was drawn before
            logits_grad = logits_grad.to(logits.device)
        return x_grad, weight_grad, bias_grad, None, logits_grad, None


def codes_linear(
    x: Tensor, weight: Tensor, codes: Tensor, bias: Tensor | None = None, *, pattern: str | NMPattern
) -> Tensor:
    """Linear layer under a given mask: x @ (weight * mask).T + bias.

    Args:
        x, weight, bias: as for ``masked_linear``. Gradients flow to them.
        codes: group codes [out, K / M].
        pattern: "N:M" or NMPattern.

    Returns:
        y [..., out].

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    pattern = NMPattern(pattern)
    check_weight(weight, pattern)
    check_codes("codes", codes, pattern, weight)
    y, _ = linear_under(x, weight, bias, MaskSource(codes.contiguous(), "codes", pattern.n, pattern.m))
    return y


def telling_of_lost_slopes(y: Tensor) -> Tensor:
    """The output of a layer under a drawn mask, whose backward warns that the logits get no gradient from it."""
    if y.requires_grad and not torch.compiler.is_compiling():
        y.register_hook(_tell_of_lost_slopes)
    return y


def _tell_of_lost_slopes(grad: Tensor) -> None:
    warnings.warn(
        "MaskedLinear: a backward came through masks that do not learn from it, only other parameters do. Take "
        "MaskTrainer, MaskOptimizer, or in transformers' Trainer the callback MaskCallback. If masks are to stay as "
        "they are, call requires_grad_(False) of their logits",
        stacklevel=2,
    )
