"""Each operation of this package, defined once: schema, shapes of the results, gradients.

``functional`` checks arguments, not this module: matrices are contiguous and two-dimensional, tensors of a counter
int64 on the same device. ``dispatch`` says which code runs an operation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .counter import Counter, MaskSource
from .dispatch import NAMESPACE, in_onnx_export, operation, table, without_autocast
from .pattern import as_bitmask, code_dtype


@operation("(Tensor logits, int n, int m, float inv_temperature) -> Tensor", last=Counter)
def sample_mask(logits, n, m, inv_temperature, counter):
    """Group codes [rows, K / M] of a draw from logits [rows, K]."""
    return logits.new_empty((logits.shape[0], logits.shape[1] // m), dtype=code_dtype(m))


@operation("(Tensor scores, int n, int m) -> Tensor")
def top_n_mask(scores, n, m):
    """Group codes [rows, K / M] of the N largest scores [rows, K], ties to the lower index."""
    return scores.new_empty((scores.shape[0], scores.shape[1] // m), dtype=code_dtype(m))


def codes_under(mask: MaskSource) -> Tensor:
    """Group codes [rows, K / M] of a drawn or given mask."""
    mask = mask.by_codes
    if mask.kind == "drawn":
        return sample_mask(mask.tensor, mask.n, mask.m, mask.inv_temperature, mask.counter)
    return mask.tensor


@operation("(Tensor weight) -> Tensor", last=MaskSource)
def masked_weight(weight, mask):
    """The weight [rows, K] under a mask, with exact zeros for dropped weights."""
    return torch.empty_like(weight)


def save_mask(ctx, mask: MaskSource, *tensors: Tensor | None) -> None:
    """Save tensors and a mask's source for backward, which draws the mask again."""
    arguments = mask.flat()
    ctx.constants = [None if isinstance(argument, Tensor) else argument for argument in arguments]
    ctx.save_for_backward(*tensors, *(argument if isinstance(argument, Tensor) else None for argument in arguments))


def saved_mask(ctx) -> tuple[MaskSource, list[Tensor | None]]:
    """(source of the mask, tensors saved with it)."""
    # read once: with checkpointing each read computes the activations again
    saved = ctx.saved_tensors
    first = len(saved) - len(ctx.constants)
    arguments = [
        constant if tensor is None else tensor for constant, tensor in zip(ctx.constants, saved[first:], strict=True)
    ]
    return MaskSource.unflat(*arguments), saved[:first]


def _masked_weight_backward(ctx, grad):
    mask, _ = saved_mask(ctx)
    # masking is linear in the weight
    return masked_weight(grad.contiguous(), mask), *[None] * len(ctx.constants)


torch.library.register_autograd(
    f"{NAMESPACE}::masked_weight",
    _masked_weight_backward,
    setup_context=lambda ctx, inputs, output: save_mask(ctx, MaskSource.unflat(*inputs[1:])),
)


@operation("(Tensor x, Tensor weight, Tensor? bias, bool log_prob) -> Tensor[]", last=MaskSource)
def masked_linear(x, weight, bias, log_prob, mask):
    """[x [tokens, K] @ (weight [rows, K] * mask).T + bias], with ``log_prob`` also log p of the drawn mask, 0-dim.

    The product has the dtype of x. ``functional.linear`` has the gradients.
    """
    if in_onnx_export():
        raise ValueError(
            "model: expected masks of the N largest logits for ONNX, got drawn ones: call eval(), or export the dense "
            "model that finalize returns"
        )
    y = x.new_empty(x.shape[0], weight.shape[0])
    return [y, x.new_empty((), dtype=torch.float32)] if log_prob else [y]


@operation("(Tensor grad, Tensor weight) -> Tensor", last=MaskSource)
def masked_linear_input_grad(grad, weight, mask):
    """grad [tokens, rows] @ (weight [rows, K] * mask), in the dtype of grad."""
    return grad.new_empty(grad.shape[0], weight.shape[1])


@operation("(Tensor grad, Tensor x) -> Tensor", last=MaskSource)
def masked_linear_weight_grad(grad, x, mask):
    """(grad [tokens, rows].T @ x [tokens, K]) * mask, in the dtype of grad."""
    return x.new_empty(grad.shape[1], x.shape[1])


@operation("(Tensor logits, Tensor codes, Tensor grad, int n, int m, float inv_temperature) -> Tensor")
def mask_score(logits, codes, grad, n, m, inv_temperature):
    """grad [rows, K / M] times the gradient of log p(S) in logits, float32 [rows, K]."""
    return torch.empty_like(logits, dtype=torch.float32)


def _no_second_derivative(ctx, grad):
    raise RuntimeError("mask_score: no autograd formula, second derivatives of a log-probability are refused")


torch.library.register_autograd(f"{NAMESPACE}::mask_score", _no_second_derivative)


@operation("(Tensor logits, Tensor codes, int n, int m, float inv_temperature) -> Tensor")
def mask_log_prob(logits, codes, n, m, inv_temperature):
    """log p(S) of the masks with given codes, float32 [rows, K / M]."""
    return torch.empty_like(codes, dtype=torch.float32)


def _mask_log_prob_context(ctx, inputs, output):
    logits, codes, *ctx.constants = inputs
    ctx.save_for_backward(logits, codes)


def _mask_log_prob_backward(ctx, grad):
    logits, codes = ctx.saved_tensors
    return mask_score(logits, codes, grad.contiguous(), *ctx.constants).to(logits.dtype), *[None] * 4


torch.library.register_autograd(
    f"{NAMESPACE}::mask_log_prob", _mask_log_prob_backward, setup_context=_mask_log_prob_context
)


@operation("(Tensor(a!) logits, Tensor coef, int n, int m, float inv_temperature) -> ()", last=Counter)
def score_update_(logits, coef, n, m, inv_temperature, counter):
    """logits [rows, K] -= sum over k of coef[k] * score(mask of draw k); coef and the counter's draw [draws]."""


@operation("(Tensor grad, Tensor x, float curvature, Tensor? tokens, Tensor? row_squares) -> (Tensor, Tensor)")
def curvature_factors(grad, x, curvature, tokens, row_squares):
    """Factors [rows] and [K] of F, float32, by grad [tokens, rows] and x [tokens, K]: the reference has the formula."""
    return grad.new_empty(grad.shape[1], dtype=torch.float32), x.new_empty(x.shape[1], dtype=torch.float32)


@operation(
    "(Tensor grad, Tensor x, Tensor weight, float curvature, Tensor(a!)? weight_grad, Tensor? tokens, "
    "Tensor? row_squares) -> Tensor",
    last=MaskSource,
)
def _straight_through_grad(grad, x, weight, curvature, weight_grad, tokens, row_squares, mask):
    return torch.empty_like(weight, dtype=torch.float32)


def straight_through_grad(
    grad: Tensor, x: Tensor, weight: Tensor, curvature: float, mask: MaskSource, weight_grad: Tensor | None = None,
    tokens: Tensor | None = None, row_squares: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Slope of a loss in the mask, less its mean over each group, float32 [rows, K]: ``reference.group_mask_slope``.

    G = grad [tokens, rows].T @ x [tokens, K]; F is that of ``curvature_factors``. ``weight_grad`` [rows, K]
    is set to G, for kept and dropped weights: float32, or without kernels also in the dtype of grad.
    """
    return _straight_through_grad(grad, x, weight, curvature, weight_grad, tokens, row_squares, mask.by_codes)


@operation(
    "(Tensor(a!) logits, Tensor grad, Tensor x, Tensor weight, float curvature, Tensor rate, float max_update, "
    "Tensor(b!)? weight_grad, Tensor? tokens, Tensor? row_squares) -> Tensor",
    last=MaskSource,
)
def _straight_through_update_(
    logits, grad, x, weight, curvature, rate, max_update, weight_grad, tokens, row_squares, mask
):
    return logits.new_empty((), dtype=torch.float32)


def straight_through_update_(
    grad: Tensor, x: Tensor, weight: Tensor, curvature: float, rate: Tensor, max_update: float, mask: MaskSource,
    weight_grad: Tensor | None = None, tokens: Tensor | None = None, row_squares: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``descend_`` of a drawn mask's logits by ``straight_through_grad``, which a GPU never writes to memory."""
    # a schema can mark only an argument of its own as changed, not a part of the mask
    logits = mask.tensor
    mask = mask._replace(tensor=None)
    return _straight_through_update_(
        logits, grad, x, weight, curvature, rate, max_update, weight_grad, tokens, row_squares, mask
    )


@operation("(Tensor(a!) logits, Tensor gradient, Tensor rate, float max_update, int m) -> Tensor", last=Counter)
def descend_(logits, gradient, rate, max_update, m, counter):
    """logits [rows, K] -= rate * gradient, clamped to +-max_update; returns the gradient's mean square, 0-dim."""
    return logits.new_empty((), dtype=torch.float32)


@operation(
    "(Tensor(a!) weight, Tensor(b!) master, Tensor(c!) first, Tensor(d!) second, Tensor gradient, Tensor codes, "
    "Tensor scalars, int m) -> ()"
)
def adamw_(weight, master, first, second, gradient, codes, scalars, m):
    """Take a step of AdamW in place, for weights that the codes [rows, K / M] keep.

    ``master``, the moments ``first`` and ``second`` and the gradient are float32 [rows, K]; ``weight`` is ``master``,
    rounded. Without kernels the gradient may have 16 bits. ``scalars`` are from ``reference.adamw_scalars``.
    """


@operation("(Tensor weight, Tensor product, Tensor codes, Tensor blocks, int n, int m) -> (Tensor, Tensor)")
def best_swaps(weight, product, codes, blocks, n, m):
    """(change of the reconstruction error, code of the two weights) for the best swap of each group [rows, K / M].

    weight and product are [rows, M, K / M], see ``reference.best_swaps``.
    """
    return torch.empty_like(codes, dtype=torch.float32), torch.empty_like(codes)


@operation("(Tensor values, Tensor bitmask, int n, int m) -> Tensor")
def unpack_nm(values, bitmask, n, m):
    """Unpack values [rows, K N / M] to the weight [rows, K] with exact zeros.

    ``bitmask`` is uint8 [rows, ceil(K / 8)], or for 2:4 int16 metadata, see ``metadata_of``; here and below.
    """
    return values.new_empty(values.shape[0], values.shape[1] // n * m)


def _unpack_context(ctx, inputs, output):
    _, bitmask, *ctx.pattern = inputs
    ctx.save_for_backward(bitmask)


def packed_part(dense: Tensor, bitmask: Tensor, n: int, m: int) -> Tensor:
    """Part of a matrix [rows, K] that the bitmask keeps, [rows, K N / M]."""
    return reference.packed_part(dense, as_bitmask(bitmask, dense.shape[1], len(dense)), n=n, m=m)


def _unpack_backward(ctx, grad):
    return packed_part(grad, *ctx.saved_tensors, *ctx.pattern), None, None, None


torch.library.register_autograd(f"{NAMESPACE}::unpack_nm", _unpack_backward, setup_context=_unpack_context)


def unpacked(values: Tensor, bitmask: Tensor, scales: Tensor | None, n: int, m: int) -> Tensor:
    """Unpack the weight [rows, K], in the dtype of the scales of integers, or of the values."""
    if scales is not None:
        values = reference.dequantized(values, scales, scales.dtype)
    return unpack_nm(values.contiguous(), bitmask.contiguous(), n, m)


@operation("(Tensor x, Tensor values, Tensor bitmask, Tensor? scales, Tensor? bias, int n, int m) -> Tensor")
def nm_linear(x, values, bitmask, scales, bias, n, m):
    """x [tokens, K] @ unpacked [rows, K].T + bias, in the dtype of x.

    Values and bias have this dtype too; for int8 and int4 values scales [rows, blocks] and bias. All are contiguous.
    ``differentiable_nm_linear`` has the gradients.
    """
    return x.new_empty(x.shape[0], values.shape[0])


@torch.library.custom_op(f"{NAMESPACE}::differentiable_nm_linear", mutates_args=())
def differentiable_nm_linear(
    x: Tensor, values: Tensor, bitmask: Tensor, scales: Tensor | None, bias: Tensor | None, n: int, m: int
) -> Tensor:
    """``nm_linear`` with gradients of x, values and bias.

    It is an operation of its own because one with gradients takes longer than a small product, also where no gradient
    is needed.
    """
    return nm_linear(x, values, bitmask, scales, bias, n, m)


def _product_context(ctx, inputs, output):
    operand, values, bitmask, scales, *others = inputs
    ctx.pattern = others[-2:]
    ctx.save_for_backward(values, bitmask, scales, operand if ctx.needs_input_grad[1] else None)


def _nm_linear_backward(ctx, grad):
    values, bitmask, scales, x = ctx.saved_tensors
    needs_x, needs_values, _, _, needs_bias, _, _ = ctx.needs_input_grad
    x_grad = None
    values_grad = None
    bias_grad = None
    if needs_x:
        x_grad = nm_linear_input_grad(grad.contiguous(), values, bitmask, scales, *ctx.pattern)
    if needs_values:
        with without_autocast(grad.device.type):
            values_grad = packed_part(grad.t() @ x, bitmask, *ctx.pattern)
    if needs_bias:
        bias_grad = grad.sum(0)
    return x_grad, values_grad, None, None, bias_grad, None, None


differentiable_nm_linear.register_fake(lambda x, values, *_: x.new_empty(x.shape[0], values.shape[0]))
differentiable_nm_linear.register_autograd(_nm_linear_backward, setup_context=_product_context)


@operation("(Tensor grad, Tensor values, Tensor bitmask, Tensor? scales, int n, int m) -> Tensor")
def nm_linear_input_grad(grad, values, bitmask, scales, n, m):
    """grad [tokens, rows] @ unpacked [rows, K], in the dtype of grad; all are contiguous."""
    return grad.new_empty(grad.shape[0], reference.kept_values(values) // n * m)


def _input_grad_backward(ctx, upstream):
    values, bitmask, scales, grad = ctx.saved_tensors
    needs_grad, needs_values, *_ = ctx.needs_input_grad
    upstream = upstream.contiguous()
    grad_grad = None
    values_grad = None
    if needs_grad:
        # the gradient of x is linear in that of y, by the weight's transpose
        grad_grad = differentiable_nm_linear(upstream, values, bitmask, scales, None, *ctx.pattern)
    if needs_values:
        with without_autocast(upstream.device.type):
            values_grad = packed_part(grad.t() @ upstream, bitmask, *ctx.pattern)
    return grad_grad, values_grad, *[None] * 4


torch.library.register_autograd(
    f"{NAMESPACE}::nm_linear_input_grad", _input_grad_backward, setup_context=_product_context
)


@operation("(Tensor x, Tensor values, Tensor scales, Tensor? bias) -> Tensor")
def int8_linear(x, values, scales, bias):
    """x [tokens, K] @ dequantized [rows, K].T + bias, in the dtype of x: int8 values of all columns.

    Scales [rows, ceil(K / 128)] and bias have the dtype of x. All are contiguous. It has no gradients.
    """
    return x.new_empty(x.shape[0], values.shape[0])


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad [tokens, rows].T @ x [tokens, K], float32; without kernels it is first rounded to the operands' dtype."""
    with without_autocast(grad.device.type):
        return table(grad.device.type).weight_gradient(grad, x)


def mask_slope(weight: Tensor, first: Tensor, second: Tensor, codes: Tensor, m: int) -> Tensor:
    """``straight_through_grad`` from both derivatives in the masked weight, each float32 [rows, K]."""
    return table(weight.device.type).mask_slope(weight, first, second, codes, m)
