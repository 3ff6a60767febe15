"""The operations as torch custom ops, with their fakes and gradients.

Arguments are checked in ``functional``, not here: matrices are contiguous and two-dimensional, tensors of a counter
int64 on the same device. A ``Counter`` and a ``MaskSource`` are passed whole, and flattened only for torch.library,
whose schemas know no tuples of tensors and numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..counter import NO_COUNTER, Counter, MaskSource
from ..pattern import code_dtype
from . import reference
from .dispatch import kernels, packed_products, quick_op, run_reference, scalar, uses_kernels, without_autocast
from .namespace import NAMESPACE
from .onnx_graph import refuse_in_onnx_export

COUNTER = "Tensor seed, Tensor step, Tensor layer, Tensor draw, int group_offset, int group_row_stride"
MASK = (
    "Tensor source, str kind, int n, int m, float inv_temperature, Tensor? seed, Tensor? step, Tensor? layer, "
    "Tensor? draw, int group_offset, int group_row_stride, Tensor? codes"
)


def flat(mask: MaskSource) -> tuple:
    """A mask's source as the ops take it."""
    *source, counter, codes = mask
    return *source, *(counter or NO_COUNTER), codes


def unflat(source: Tensor, kind: str, n: int, m: int, inv_temperature: float, *rest) -> MaskSource:
    """``flat`` undone."""
    *counter, codes = rest
    return MaskSource(source, kind, n, m, inv_temperature, Counter(*counter) if kind == "drawn" else None, codes)


@torch.library.custom_op(
    f"{NAMESPACE}::sample_mask",
    mutates_args=(),
    schema=f"(Tensor logits, int n, int m, float inv_temperature, {COUNTER}) -> Tensor",
)
def _sample_mask(logits, n, m, inv_temperature, *counter):
    counter = Counter(*counter)
    if uses_kernels(logits):
        return kernels("sampling").sample_mask(logits, n, m, inv_temperature, counter)
    return run_reference("sample_mask", logits, counter, scalar(inv_temperature, logits), n=n, m=m)


@_sample_mask.register_fake
def _(logits, n, m, *_):
    return logits.new_empty((logits.shape[0], logits.shape[1] // m), dtype=code_dtype(m))


def sample_mask(logits: Tensor, n: int, m: int, inv_temperature: float, counter: Counter) -> Tensor:
    """Group codes [rows, K / M] of a draw from logits [rows, K]."""
    return _sample_mask(logits, n, m, inv_temperature, *counter)


@torch.library.custom_op(f"{NAMESPACE}::top_n_mask", mutates_args=())
def top_n_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Group codes [rows, K / M] of the N largest scores [rows, K], ties to the lower index."""
    if uses_kernels(scores):
        return kernels("sampling").top_n_mask(scores, n, m)
    return run_reference("top_n_mask", scores, n=n, m=m)


@top_n_mask.register_fake
def _(scores, n, m):
    return scores.new_empty((scores.shape[0], scores.shape[1] // m), dtype=code_dtype(m))


def codes_under(mask: MaskSource) -> Tensor:
    """Group codes [rows, K / M] of a mask of any kind."""
    mask = mask.known
    if mask.kind == "drawn":
        return sample_mask(mask.tensor, mask.n, mask.m, mask.inv_temperature, mask.counter)
    return mask.tensor


MASKED_WEIGHT = {"drawn": "sample_masked_weight", "codes": "code_masked_weight"}


def _reference_masked_weight(weight: Tensor, mask: MaskSource) -> Tensor:
    drawn = (mask.counter, scalar(mask.inv_temperature, weight)) if mask.kind == "drawn" else ()
    return run_reference(MASKED_WEIGHT[mask.kind], weight, mask.tensor, *drawn, n=mask.n, m=mask.m)


@quick_op("masked_weight", f"(Tensor weight, {MASK}) -> Tensor")
def _masked_weight(weight, *mask):
    mask = unflat(*mask)
    if uses_kernels(weight):
        return kernels("sampling").masked_weight(weight, mask)
    return _reference_masked_weight(weight, mask)


@torch.library.register_fake(f"{NAMESPACE}::masked_weight")
def _(weight, *_):
    return torch.empty_like(weight)


def masked_weight(weight: Tensor, mask: MaskSource) -> Tensor:
    """The weight [rows, K] under a mask, exact zeros elsewhere."""
    return _masked_weight(weight, *flat(mask.known))


def _masked_weight_context(ctx, inputs, output):
    _, *mask = inputs
    _save_mask(ctx, mask)


def _save_mask(ctx, mask, *tensors):
    """Keep references to tensors and the mask's source for backward, where the mask is drawn again."""
    source, kind, n, m, inv_temperature, *key, group_offset, group_row_stride, codes = mask
    ctx.save_for_backward(source, *key, codes, *tensors)
    ctx.constants = (kind, n, m, inv_temperature), (group_offset, group_row_stride)


def _saved_mask(ctx):
    """(the mask's source, the other tensors that were saved with it)."""
    source, *saved = ctx.saved_tensors
    key, codes, tensors = saved[:4], saved[4], saved[5:]
    constants, shard = ctx.constants
    return unflat(source, *constants, *key, *shard, codes), tensors


def _masked_weight_backward(ctx, grad):
    mask, _ = _saved_mask(ctx)
    # masking is linear in the weight
    return masked_weight(grad.contiguous(), mask), *[None] * len(flat(mask))


torch.library.register_autograd(
    f"{NAMESPACE}::masked_weight", _masked_weight_backward, setup_context=_masked_weight_context
)


@quick_op("masked_linear", f"(Tensor x, Tensor weight, Tensor? bias, bool log_prob, {MASK}) -> (Tensor, Tensor)")
def _masked_linear(x, weight, bias, log_prob, *mask):
    mask, total = unflat(*mask), None
    with without_autocast(x):
        if uses_kernels(x):
            y, total = kernels("masked_gemm").masked_linear(x, weight, bias, mask, log_prob)
        else:
            bias = None if bias is None else bias.to(x.dtype)
            y = torch.nn.functional.linear(x, _reference_masked_weight(weight.to(x.dtype), mask), bias)
            if log_prob:
                total = mask_log_prob(mask.tensor, codes_under(mask), mask.n, mask.m, mask.inv_temperature).sum()
    return y, x.new_empty(0, dtype=torch.float32) if total is None else total


@torch.library.register_fake(f"{NAMESPACE}::masked_linear")
def _(x, weight, bias, log_prob, *_):
    refuse_in_onnx_export()
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(() if log_prob else 0, dtype=torch.float32)


def masked_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, log_prob: bool, mask: MaskSource
) -> tuple[Tensor, Tensor]:
    """(x [tokens, K] @ (weight [rows, K] * mask).T + bias, log p of the drawn mask, 0-dim, or empty if not asked for).

    The product runs in the dtype of x.
    """
    # a log-probability takes the logits
    return _masked_linear(x, weight, bias, log_prob, *flat(mask if log_prob else mask.known))


def _masked_linear_context(ctx, inputs, output):
    x, weight, bias, _, *mask = inputs
    needs_x, needs_weight, needs_bias, _, needs_logits, *_ = ctx.needs_input_grad
    ctx.set_materialize_grads(False)
    if not (needs_x or needs_weight or needs_bias):
        # logits alone: the loss needs no graph, only the log-probability does
        ctx.mark_non_differentiable(output[0])
    ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
    if not (needs_x or needs_weight or needs_logits):
        mask = [None if isinstance(part, Tensor) else part for part in mask]
    _save_mask(ctx, mask, x if needs_weight else None, weight if needs_x else None)


def _masked_linear_backward(ctx, grad, log_prob_grad):
    mask, (x, weight) = _saved_mask(ctx)
    needs_x, needs_weight, needs_bias, _, needs_logits, *_ = ctx.needs_input_grad
    weight_dtype, bias_dtype = ctx.dtypes
    x_grad = weight_grad = bias_grad = logits_grad = None
    if grad is not None:
        grad = grad.contiguous()
        x_grad = masked_linear_input_grad(grad, weight, mask) if needs_x else None
        weight_grad = masked_linear_weight_grad(grad, x, mask).to(weight_dtype) if needs_weight else None
        bias_grad = grad.sum(0).to(bias_dtype) if needs_bias else None
    if needs_logits and log_prob_grad is not None:
        codes = codes_under(mask)
        each = log_prob_grad.expand(codes.shape).contiguous()
        score = mask_score(mask.tensor, codes, each, mask.n, mask.m, mask.inv_temperature)
        logits_grad = score.to(mask.tensor.dtype)
    return x_grad, weight_grad, bias_grad, None, logits_grad, *[None] * (len(flat(mask)) - 1)


torch.library.register_autograd(
    f"{NAMESPACE}::masked_linear", _masked_linear_backward, setup_context=_masked_linear_context
)


@torch.library.custom_op(
    f"{NAMESPACE}::masked_linear_input_grad", mutates_args=(), schema=f"(Tensor grad, Tensor weight, {MASK}) -> Tensor"
)
def _masked_linear_input_grad(grad, weight, *mask):
    mask = unflat(*mask)
    with without_autocast(grad):
        if uses_kernels(grad):
            return kernels("masked_gemm").masked_linear_input_grad(grad, weight, mask)
        return grad @ _reference_masked_weight(weight.to(grad.dtype), mask)


@_masked_linear_input_grad.register_fake
def _(grad, weight, *_):
    return grad.new_empty(grad.shape[0], weight.shape[1])


def masked_linear_input_grad(grad: Tensor, weight: Tensor, mask: MaskSource) -> Tensor:
    """grad [tokens, rows] @ (weight [rows, K] * mask), in the dtype of grad."""
    return _masked_linear_input_grad(grad, weight, *flat(mask.known))


@torch.library.custom_op(
    f"{NAMESPACE}::masked_linear_weight_grad", mutates_args=(), schema=f"(Tensor grad, Tensor x, {MASK}) -> Tensor"
)
def _masked_linear_weight_grad(grad, x, *mask):
    mask = unflat(*mask)
    with without_autocast(grad):
        if uses_kernels(grad):
            return kernels("masked_gemm").masked_linear_weight_grad(grad, x, mask)
        return _reference_masked_weight(grad.t() @ x, mask)


@_masked_linear_weight_grad.register_fake
def _(grad, x, *_):
    return x.new_empty(grad.shape[1], x.shape[1])


def masked_linear_weight_grad(grad: Tensor, x: Tensor, mask: MaskSource) -> Tensor:
    """(grad [tokens, rows].T @ x [tokens, K]) * mask."""
    return _masked_linear_weight_grad(grad, x, *flat(mask.known))


@torch.library.custom_op(f"{NAMESPACE}::mask_score", mutates_args=())
def mask_score(logits: Tensor, codes: Tensor, grad: Tensor, n: int, m: int, inv_temperature: float) -> Tensor:
    """grad [rows, K / M] times the gradient of log p(S) in logits, float32 [rows, K]."""
    if uses_kernels(logits):
        return kernels("sampling").mask_score(logits, codes, grad, n, m, inv_temperature)
    inverse = scalar(inv_temperature, logits)
    if n > reference.EXACT_SCORE_MAX_N:
        # the quadrature's nodes would be unrolled into a loop that takes minutes to compile
        return reference.mask_score(logits, codes, grad, inverse, n=n, m=m)
    return run_reference("mask_score", logits, codes, grad, inverse, n=n, m=m)


@mask_score.register_fake
def _(logits, *_):
    return torch.empty_like(logits, dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::mask_log_prob", mutates_args=())
def mask_log_prob(logits: Tensor, codes: Tensor, n: int, m: int, inv_temperature: float) -> Tensor:
    """log p(S) of the masks with those codes, float32 [rows, K / M]."""
    if uses_kernels(logits):
        return kernels("sampling").mask_log_prob(logits, codes, n, m, inv_temperature)
    inverse = scalar(inv_temperature, logits)
    if n > reference.EXACT_SCORE_MAX_N:
        return reference.mask_log_prob(logits, codes, inverse, n=n, m=m)
    return run_reference("mask_log_prob", logits, codes, inverse, n=n, m=m)


@mask_log_prob.register_fake
def _(logits, codes, *_):
    return torch.empty_like(codes, dtype=torch.float32)


def _mask_log_prob_context(ctx, inputs, output):
    logits, codes, *ctx.constants = inputs
    ctx.save_for_backward(logits, codes)


def _mask_log_prob_backward(ctx, grad):
    logits, codes = ctx.saved_tensors
    return mask_score(logits, codes, grad.contiguous(), *ctx.constants).to(logits.dtype), *[None] * 4


mask_log_prob.register_autograd(_mask_log_prob_backward, setup_context=_mask_log_prob_context)


@quick_op("score_update_", f"(Tensor(a!) logits, Tensor coef, int n, int m, float inv_temperature, {COUNTER}) -> ()")
def _score_update_(logits, coef, n, m, inv_temperature, *counter):
    counter = Counter(*counter)
    if uses_kernels(logits):
        kernels("sampling").score_update_(logits, coef, n, m, inv_temperature, counter)
    else:
        run_reference("score_update_", logits, coef, counter, scalar(inv_temperature, logits), n=n, m=m)
    if not logits.is_inference():
        # what autograd has saved of them is no longer theirs
        torch.autograd.graph.increment_version(logits)


@torch.library.register_fake(f"{NAMESPACE}::score_update_")
def _(logits, *_):
    return None


def score_update_(logits: Tensor, coef: Tensor, n: int, m: int, inv_temperature: float, counter: Counter) -> None:
    """logits [rows, K] -= sum over k of coef[k] * score(mask of draw k); coef and the counter's draw [draws]."""
    _score_update_(logits, coef, n, m, inv_temperature, *counter)


@torch.library.custom_op(f"{NAMESPACE}::best_swaps", mutates_args=())
def best_swaps(weight: Tensor, product: Tensor, codes: Tensor, blocks: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """(change of the reconstruction error, code of the two weights) of the best swap of every group [rows, K / M].

    weight and product are [rows, M, K / M], see ``reference.best_swaps``.
    """
    if uses_kernels(weight):
        return kernels("adamw_and_swaps").best_swaps(weight, product, codes, blocks, n, m)
    return reference.best_swaps(weight, product, codes, blocks, m=m)


@best_swaps.register_fake
def _(weight, product, codes, *_):
    return torch.empty_like(codes, dtype=torch.float32), torch.empty_like(codes)


@torch.library.custom_op(f"{NAMESPACE}::unpack_nm", mutates_args=())
def unpack_nm(values: Tensor, bitmask: Tensor, n: int, m: int) -> Tensor:
    """The weight [rows, K] of its values [rows, K N / M] and bitmask [rows, ceil(K / 8)], exact zeros elsewhere."""
    if uses_kernels(values):
        return kernels("packed").unpack_nm(values, bitmask, n, m)
    return run_reference("unpack_nm", values.contiguous(), bitmask.contiguous(), n=n, m=m)


@unpack_nm.register_fake
def _(values, bitmask, n, m):
    return values.new_empty(values.shape[0], values.shape[1] // n * m)


def _packed_part(dense: Tensor, bitmask: Tensor, n: int, m: int) -> Tensor:
    return reference.packed_part(dense, bitmask, n=n, m=m)


def _unpack_context(ctx, inputs, output):
    _, bitmask, n, m = inputs
    ctx.save_for_backward(bitmask)
    ctx.pattern = n, m


def _unpack_backward(ctx, grad):
    return _packed_part(grad, ctx.saved_tensors[0], *ctx.pattern), None, None, None


unpack_nm.register_autograd(_unpack_backward, setup_context=_unpack_context)


@quick_op(
    "nm_linear", "(Tensor x, Tensor values, Tensor bitmask, Tensor? scales, Tensor? bias, int n, int m) -> Tensor"
)
def nm_linear(x, values, bitmask, scales, bias, n, m):
    """x [tokens, K] @ unpacked [rows, K].T + bias, in the dtype of x.

    That is the dtype of values and bias, or of scales [rows, blocks] and bias beside int8 values.
    """
    with without_autocast(x):
        if uses_kernels(x):
            return kernels("packed").nm_linear(x, values, bitmask, scales, bias, n, m)
        parts = tuple(part if part is None else part.contiguous() for part in (values, bitmask, scales, bias))
        return packed_products(x).nm_linear(x.contiguous(), parts[:3], parts[3], n, m)


@torch.library.register_fake(f"{NAMESPACE}::nm_linear")
def _(x, values, *_):
    return x.new_empty(x.shape[0], values.shape[0])


def _nm_linear_context(ctx, inputs, output):
    x, values, bitmask, scales, _, n, m = inputs
    ctx.save_for_backward(values, bitmask, scales, x if ctx.needs_input_grad[1] else None)
    ctx.pattern = n, m


def _nm_linear_backward(ctx, grad):
    values, bitmask, scales, x = ctx.saved_tensors
    needs_x, needs_values, _, _, needs_bias, _, _ = ctx.needs_input_grad
    x_grad = nm_linear_input_grad(grad.contiguous(), values, bitmask, scales, *ctx.pattern) if needs_x else None
    with without_autocast(grad):
        values_grad = _packed_part(grad.t() @ x, bitmask, *ctx.pattern) if needs_values else None
    return x_grad, values_grad, None, None, grad.sum(0) if needs_bias else None, None, None


torch.library.register_autograd(f"{NAMESPACE}::nm_linear", _nm_linear_backward, setup_context=_nm_linear_context)


@quick_op(
    "nm_linear_input_grad", "(Tensor grad, Tensor values, Tensor bitmask, Tensor? scales, int n, int m) -> Tensor"
)
def nm_linear_input_grad(grad, values, bitmask, scales, n, m):
    """grad [tokens, rows] @ unpacked [rows, K], in the dtype of grad."""
    with without_autocast(grad):
        if uses_kernels(grad):
            return grad @ unpacked(values, bitmask, scales, n, m)
        parts = tuple(part if part is None else part.contiguous() for part in (values, bitmask, scales))
        return packed_products(grad).input_grad(grad.contiguous(), parts, n, m)


@torch.library.register_fake(f"{NAMESPACE}::nm_linear_input_grad")
def _(grad, values, _bitmask, _scales, n, m):
    return grad.new_empty(grad.shape[0], values.shape[1] // n * m)


def _input_grad_context(ctx, inputs, output):
    grad, values, bitmask, scales, *ctx.pattern = inputs
    ctx.save_for_backward(values, bitmask, scales, grad if ctx.needs_input_grad[1] else None)


def _input_grad_backward(ctx, upstream):
    values, bitmask, scales, grad = ctx.saved_tensors
    needs_grad, needs_values, *_ = ctx.needs_input_grad
    upstream = upstream.contiguous()
    # the gradient in x is linear in that of y, by the weight's transpose
    own = nm_linear(upstream, values, bitmask, scales, None, *ctx.pattern) if needs_grad else None
    with without_autocast(upstream):
        values_grad = _packed_part(grad.t() @ upstream, bitmask, *ctx.pattern) if needs_values else None
    return own, values_grad, *[None] * 4


torch.library.register_autograd(
    f"{NAMESPACE}::nm_linear_input_grad", _input_grad_backward, setup_context=_input_grad_context
)


def unpacked(values: Tensor, bitmask: Tensor, scales: Tensor | None, n: int, m: int) -> Tensor:
    """The weight [rows, K], of the dtype of values, or of scales beside int8 values."""
    if scales is not None:
        values = reference.dequantized(values, scales, scales.dtype)
    return unpack_nm(values, bitmask, n, m)
