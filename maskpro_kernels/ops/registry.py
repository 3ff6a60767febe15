"""The operations as torch custom ops, with fakes and gradients.

``functional`` checks arguments, not this module: matrices are contiguous and two-dimensional, tensors of a counter
int64 on the same device. torch.library's schemas have no tuples of tensors and numbers, so operations take the parts of
a ``Counter`` or a ``MaskSource``.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import reference
from .counter import Counter, MaskSource
from .dispatch import (
    NAMESPACE,
    in_onnx_export,
    kernels,
    machine_code,
    operation,
    packed_products,
    run_reference,
    scalar,
    uses_kernels,
    uses_machine_code,
    without_autocast,
)
from .pattern import as_bitmask, code_dtype

COUNTER = "Tensor seed, Tensor step, Tensor layer, Tensor draw, int group_offset, int group_row_stride"
MASK = (
    "Tensor source, str kind, int n, int m, float inv_temperature, Tensor? seed, Tensor? step, Tensor? layer, "
    "Tensor? draw, int group_offset, int group_row_stride, Tensor? codes"
)


def _fake_codes(scores: Tensor, n: int, m: int, *_) -> Tensor:
    return scores.new_empty((scores.shape[0], scores.shape[1] // m), dtype=code_dtype(m))


def _fake_scalar(like: Tensor, *_) -> Tensor:
    return like.new_empty((), dtype=torch.float32)


@operation(f"(Tensor logits, int n, int m, float inv_temperature, {COUNTER}) -> Tensor", _fake_codes)
def sample_mask(logits, n, m, inv_temperature, *counter):
    """Group codes [rows, K / M] of a draw from logits [rows, K]."""
    counter = Counter(*counter)
    if uses_kernels(logits):
        return kernels("sampling").sample_mask(logits, n, m, inv_temperature, counter)
    return run_reference("sample_mask", logits, counter, scalar(inv_temperature, logits), n=n, m=m)


@operation("(Tensor scores, int n, int m) -> Tensor", _fake_codes)
def top_n_mask(scores, n, m):
    """Group codes [rows, K / M] of the N largest scores [rows, K], ties to the lower index."""
    if uses_kernels(scores):
        return kernels("sampling").top_n_mask(scores, n, m)
    return run_reference("top_n_mask", scores, n=n, m=m)


def codes_under(mask: MaskSource) -> Tensor:
    """Group codes [rows, K / M] of a drawn or given mask."""
    mask = mask.by_codes
    if mask.kind == "drawn":
        return sample_mask(mask.tensor, mask.n, mask.m, mask.inv_temperature, *mask.counter)
    return mask.tensor


def _reference_masked_weight(weight: Tensor, mask: MaskSource) -> Tensor:
    if mask.kind == "codes":
        return run_reference("code_masked_weight", weight, mask.tensor, n=mask.n, m=mask.m)
    drawn = mask.counter, scalar(mask.inv_temperature, weight)
    return run_reference("sample_masked_weight", weight, mask.tensor, *drawn, n=mask.n, m=mask.m)


@operation(f"(Tensor weight, {MASK}) -> Tensor", lambda weight, *_: torch.empty_like(weight))
def _masked_weight(weight, *mask):
    mask = MaskSource.unflat(*mask)
    if uses_kernels(weight):
        return kernels("sampling").masked_weight(weight, mask)
    return _reference_masked_weight(weight, mask)


def masked_weight(weight: Tensor, mask: MaskSource) -> Tensor:
    """The weight [rows, K] under a mask, with exact zeros for dropped weights."""
    return _masked_weight(weight, *mask.by_codes.flat())


def save_mask(ctx, mask: MaskSource, *tensors: Tensor | None) -> None:
    """Save tensors and a mask's source for backward, which draws the mask again."""
    parts = mask.flat()
    ctx.constants = [None if isinstance(part, Tensor) else part for part in parts]
    ctx.save_for_backward(*tensors, *(part if isinstance(part, Tensor) else None for part in parts))


def saved_mask(ctx) -> tuple[MaskSource, list[Tensor | None]]:
    """(source of the mask, tensors saved with it)."""
    # read once: with checkpointing each read computes the activations again
    saved = ctx.saved_tensors
    first = len(saved) - len(ctx.constants)
    tensors = saved[:first]
    parts = saved[first:]
    return MaskSource.unflat(*(c if p is None else p for c, p in zip(ctx.constants, parts, strict=True))), tensors


def _masked_weight_backward(ctx, grad):
    mask, _ = saved_mask(ctx)
    # masking is linear in the weight
    return masked_weight(grad.contiguous(), mask), *[None] * len(ctx.constants)


torch.library.register_autograd(
    f"{NAMESPACE}::masked_weight",
    _masked_weight_backward,
    setup_context=lambda ctx, inputs, output: save_mask(ctx, MaskSource.unflat(*inputs[1:])),
)


def _fake_masked_linear(x, weight, bias, log_prob, *_):
    if in_onnx_export():
        raise ValueError(
            "model: expected masks of the N largest logits for ONNX, got drawn ones: call eval(), or export the dense "
            "model that finalize returns"
        )
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(() if log_prob else 0, dtype=torch.float32)


@operation(f"(Tensor x, Tensor weight, Tensor? bias, bool log_prob, {MASK}) -> (Tensor, Tensor)", _fake_masked_linear)
def masked_linear(x, weight, bias, log_prob, *mask):
    """(x [tokens, K] @ (weight [rows, K] * mask).T + bias, log p of the drawn mask, 0-dim, or empty).

    The product has the dtype of x; ``mask`` is flat. log p is empty without ``log_prob``. ``functional.linear`` has the
    gradients.
    """
    mask = MaskSource.unflat(*mask)
    total = None
    with without_autocast(x):
        if uses_kernels(x):
            y, total = kernels("masked_gemm").masked_linear(x, weight, bias, mask, log_prob)
        else:
            bias = None if bias is None else bias.to(x.dtype)
            y = nn.functional.linear(x, _reference_masked_weight(weight.to(x.dtype), mask), bias)
            if log_prob:
                total = mask_log_prob(mask.tensor, codes_under(mask), mask.n, mask.m, mask.inv_temperature).sum()
    return y, x.new_empty(0, dtype=torch.float32) if total is None else total


@operation(
    f"(Tensor grad, Tensor weight, {MASK}) -> Tensor",
    lambda grad, weight, *_: grad.new_empty(grad.shape[0], weight.shape[1]),
)
def _masked_linear_input_grad(grad, weight, *mask):
    mask = MaskSource.unflat(*mask)
    with without_autocast(grad):
        if uses_kernels(grad):
            return kernels("masked_gemm").masked_linear_input_grad(grad, weight, mask)
        return grad @ _reference_masked_weight(weight.to(grad.dtype), mask)


def masked_linear_input_grad(grad: Tensor, weight: Tensor, mask: MaskSource) -> Tensor:
    """grad [tokens, rows] @ (weight [rows, K] * mask), in the dtype of grad."""
    if mask.kind == "applied":
        with without_autocast(grad):
            return grad @ weight.to(grad.dtype)
    return _masked_linear_input_grad(grad, weight, *mask.by_codes.flat())


@operation(f"(Tensor grad, Tensor x, {MASK}) -> Tensor", lambda grad, x, *_: x.new_empty(grad.shape[1], x.shape[1]))
def _masked_linear_weight_grad(grad, x, *mask):
    mask = MaskSource.unflat(*mask)
    with without_autocast(grad):
        if uses_kernels(grad):
            return kernels("masked_gemm").masked_linear_weight_grad(grad, x, mask)
        return _reference_masked_weight(grad.t() @ x, mask)


def masked_linear_weight_grad(grad: Tensor, x: Tensor, mask: MaskSource) -> Tensor:
    """(grad [tokens, rows].T @ x [tokens, K]) * mask."""
    return _masked_linear_weight_grad(grad, x, *mask.by_codes.flat())


@operation(
    "(Tensor logits, Tensor codes, Tensor grad, int n, int m, float inv_temperature) -> Tensor",
    lambda logits, *_: torch.empty_like(logits, dtype=torch.float32),
)
def mask_score(logits, codes, grad, n, m, inv_temperature):
    """grad [rows, K / M] times the gradient of log p(S) in logits, float32 [rows, K]."""
    if uses_kernels(logits):
        return kernels("sampling").mask_score(logits, codes, grad, n, m, inv_temperature)
    inverse = scalar(inv_temperature, logits)
    if n > reference.EXACT_SCORE_MAX_N:
        # unrolled nodes of the quadrature would take minutes to compile
        return reference.mask_score(logits, codes, grad, inverse, n=n, m=m)
    return run_reference("mask_score", logits, codes, grad, inverse, n=n, m=m)


@operation(
    "(Tensor logits, Tensor codes, int n, int m, float inv_temperature) -> Tensor",
    lambda logits, codes, *_: torch.empty_like(codes, dtype=torch.float32),
)
def mask_log_prob(logits, codes, n, m, inv_temperature):
    """log p(S) of the masks with given codes, float32 [rows, K / M]."""
    if uses_kernels(logits):
        return kernels("sampling").mask_log_prob(logits, codes, n, m, inv_temperature)
    inverse = scalar(inv_temperature, logits)
    if n > reference.EXACT_SCORE_MAX_N:
        return reference.mask_log_prob(logits, codes, inverse, n=n, m=m)
    return run_reference("mask_log_prob", logits, codes, inverse, n=n, m=m)


def _no_second_derivative(ctx, grad):
    raise RuntimeError("mask_score: no autograd formula, second derivatives of a log-probability are refused")


torch.library.register_autograd(f"{NAMESPACE}::mask_score", _no_second_derivative)


def _mask_log_prob_context(ctx, inputs, output):
    logits, codes, *ctx.constants = inputs
    ctx.save_for_backward(logits, codes)


def _mask_log_prob_backward(ctx, grad):
    logits, codes = ctx.saved_tensors
    return mask_score(logits, codes, grad.contiguous(), *ctx.constants).to(logits.dtype), *[None] * 4


torch.library.register_autograd(
    f"{NAMESPACE}::mask_log_prob", _mask_log_prob_backward, setup_context=_mask_log_prob_context
)


@operation(f"(Tensor(a!) logits, Tensor coef, int n, int m, float inv_temperature, {COUNTER}) -> ()", lambda *_: None)
def score_update_(logits, coef, n, m, inv_temperature, *counter):
    """logits [rows, K] -= sum over k of coef[k] * score(mask of draw k); coef and the counter's draw [draws]."""
    counter = Counter(*counter)
    if uses_kernels(logits):
        kernels("sampling").score_update_(logits, coef, n, m, inv_temperature, counter)
    else:
        run_reference("score_update_", logits, coef, counter, scalar(inv_temperature, logits), n=n, m=m)
    if not logits.is_inference():
        # what autograd has saved of them is no longer theirs
        torch.autograd.graph.increment_version(logits)


_norms = partial(torch.linalg.vector_norm, dtype=torch.float32)


def _squares(x: Tensor) -> Tensor:
    """Squares of a matrix, float32: on a CPU torch's norms of columns take ten times as long."""
    return x.square() if x.dtype == torch.float32 else x.float().square_()


# A row has a gradient if its sum of squares is above this fraction of the mean: the query of a first token has none but
# rounding errors
LEAST_SQUARE = 1e-10


def gradient_squares(grad: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of squares of each column, float32; mask of the rows that have a gradient) of grad [tokens, rows]."""
    if grad.is_cpu:
        squares = _squares(grad)
        of_columns = squares.sum(0)
        of_rows = squares.sum(1)
    else:
        of_columns, of_rows = (_norms(grad, dim=over).square() for over in (0, 1))
    # a row that is not finite has a gradient
    least = LEAST_SQUARE * of_rows.nan_to_num(0.0, 0.0).mean()
    return of_columns, ~(of_rows <= least)


# Columns of x copied at a time: a copy of all of x may be as large as the weight
COLUMNS = 4096


def token_squares(grad: Tensor, tokens: Tensor | None) -> Tensor:
    """Sum over rows of (T * grad)^2 [rows], followed by R [1]; operands as for ``curvature_factors``."""
    squares, used = gradient_squares(grad)
    count = used.sum(dtype=torch.float32)
    tokens = count if tokens is None else tokens.to(grad.device, non_blocking=not grad.is_cpu)
    return torch.cat([tokens.square() * squares, count[None]])


def curvature_factors(grad, x, curvature, tokens, row_squares) -> tuple[Tensor, Tensor]:
    """Factors [rows] and [K]; their outer product is F, the second derivative of the loss in the masked weight.

    F = curvature * T / R * (sum of grad^2) (sum of x^2) over the R rows of grad [tokens, rows] and x [tokens, K] that
    have a gradient. For a loss that is a mean over T tokens, F is the Fisher information if tokens, rows and columns
    are independent (K-FAC; Martens and Grosse 2015, arXiv 1503.05671). T is ``tokens``, 0-dim float32; None: R.
    ``row_squares`` float32 [rows] replaces T^2 / R * (sum of grad^2), if another gradient gives the curvature.
    """
    of_outputs, used = gradient_squares(grad)
    if row_squares is not None:
        # a divergence has no gradient at its minimum, but a curvature
        used = used | ~used.any()
    count = used.sum(dtype=torch.float32).clamp(min=1)
    tokens = count if tokens is None else tokens.to(grad.device, non_blocking=not grad.is_cpu)
    first = tokens / count * of_outputs if row_squares is None else row_squares / tokens
    unused = ~used
    of_inputs = []
    unused_rows = unused.nonzero().flatten() if x.is_cpu else None
    for piece in x.split(COLUMNS, 1):
        if x.is_cpu:
            # few rows: cheaper than a masked copy of x
            of_inputs.append(_squares(piece).index_fill_(0, unused_rows, 0.0).sum(0))
        else:
            of_inputs.append(_norms(piece.masked_fill(unused[:, None], 0.0), dim=0).square())
    return curvature * first, torch.cat(of_inputs)


def _first_derivative(grad: Tensor, x: Tensor, weight_grad: Tensor | None) -> Tensor:
    """grad.T @ x, also written to ``weight_grad``."""
    if weight_grad is None:
        return grad.t() @ x
    if weight_grad.dtype == grad.dtype:
        return torch.mm(grad.t(), x, out=weight_grad)
    first = grad.t() @ x
    weight_grad.copy_(first)
    return first


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad [tokens, rows].T @ x [tokens, K], float32; without kernels it is first rounded to the operands' dtype."""
    with without_autocast(grad):
        if uses_kernels(grad):
            return kernels("straight_through").weight_gradient(grad, x, None)
        return (grad.t() @ x).float()


@torch.library.custom_op(
    f"{NAMESPACE}::straight_through_grad",
    mutates_args=("weight_grad",),
    schema=f"(Tensor grad, Tensor x, Tensor weight, float curvature, Tensor(a!)? weight_grad, Tensor? tokens, "
    f"Tensor? row_squares, {MASK}) -> Tensor",
)
def _straight_through_grad(grad, x, weight, curvature, weight_grad, tokens, row_squares, *mask):
    mask = MaskSource.unflat(*mask)
    with without_autocast(grad):
        factors = curvature_factors(grad, x, curvature, tokens, row_squares)
        if uses_kernels(grad):
            return kernels("straight_through").straight_through_grad(grad, x, weight, *factors, mask, weight_grad)
        first = _first_derivative(grad, x, weight_grad)
        codes = codes_under(mask)
        return run_reference("straight_through_grad", weight, first, torch.outer(*factors), codes, m=mask.m)


_straight_through_grad.register_fake(lambda grad, x, weight, *_: torch.empty_like(weight, dtype=torch.float32))


def straight_through_grad(
    grad, x, weight, curvature, mask: MaskSource, weight_grad=None, tokens=None, row_squares=None
) -> Tensor:
    """Slope of a loss in the mask, less its mean over each group, float32 [rows, K]: ``reference.group_mask_slope``.

    G = grad [tokens, rows].T @ x [tokens, K]; F is that of ``curvature_factors``. ``weight_grad`` [rows, K] is set to
    G, for kept and dropped weights: float32, or without kernels also in the dtype of grad.
    """
    more = weight_grad, tokens, row_squares
    return _straight_through_grad(grad, x, weight, curvature, *more, *mask.by_codes.flat())


def mask_slope(weight: Tensor, first: Tensor, second: Tensor, codes: Tensor, m: int) -> Tensor:
    """``straight_through_grad`` from both derivatives in the masked weight, each float32 [rows, K]."""
    return run_reference("straight_through_grad", weight, first, second, codes, m=m)


@torch.library.custom_op(
    f"{NAMESPACE}::straight_through_update_",
    mutates_args=("weight_grad", "source"),
    schema=f"(Tensor grad, Tensor x, Tensor weight, float curvature, Tensor rate, float max_update, "
    f"Tensor(a!)? weight_grad, Tensor? tokens, Tensor? row_squares, "
    f"{MASK.replace('Tensor source', 'Tensor(b!) source')}) -> Tensor",
)
def _straight_through_update_(grad, x, weight, curvature, rate, max_update, weight_grad, tokens, row_squares, *mask):
    mask = MaskSource.unflat(*mask)
    with without_autocast(grad):
        factors = curvature_factors(grad, x, curvature, tokens, row_squares)
        if uses_kernels(grad):
            update_ = kernels("straight_through").straight_through_update_
            return update_(grad, x, weight, *factors, rate, max_update, mask, weight_grad)
        first = _first_derivative(grad, x, weight_grad)
        codes = codes_under(mask)
        step = (rate, mask.counter, scalar(max_update, weight))
        return run_reference("straight_through_update_", mask.tensor, weight, first, factors, codes, *step, m=mask.m)


_straight_through_update_.register_fake(_fake_scalar)


def straight_through_update_(grad, x, weight, curvature, rate: Tensor, max_update: float, mask: MaskSource,
                             weight_grad=None, tokens=None, row_squares=None) -> Tensor:  # fmt: skip
    """``descend_`` of a drawn mask's logits by ``straight_through_grad``, which a GPU never writes to memory."""
    operands = grad, x, weight, curvature, rate, max_update, weight_grad, tokens, row_squares
    return _straight_through_update_(*operands, *mask.flat())


@torch.library.custom_op(
    f"{NAMESPACE}::descend_",
    mutates_args=("logits",),
    schema=f"(Tensor(a!) logits, Tensor gradient, Tensor rate, float max_update, int m, {COUNTER}) -> Tensor",
)
def descend_(logits, gradient, rate, max_update, m, *counter):
    """logits [rows, K] -= rate * gradient, clamped to +-max_update; returns the gradient's mean square, 0-dim."""
    counter = Counter(*counter)
    if uses_kernels(logits):
        return kernels("straight_through").descend_(logits, gradient, rate, max_update, m, counter)
    return run_reference("descend_", logits, gradient, rate, counter, scalar(max_update, logits), m=m)


descend_.register_fake(_fake_scalar)


@torch.library.custom_op(f"{NAMESPACE}::adamw_", mutates_args=("weight", "master", "first", "second"))
def adamw_(weight: Tensor, master: Tensor, first: Tensor, second: Tensor, gradient: Tensor, codes: Tensor,
           scalars: Tensor, m: int) -> None:  # fmt: skip
    """Take a step of AdamW in place, for weights that the codes [rows, K / M] keep.

    ``master``, the moments ``first`` and ``second`` and the gradient are float32 [rows, K]; ``weight`` is ``master``,
    rounded. Without kernels the gradient may have 16 bits. ``scalars`` are from ``reference.adamw_scalars``.
    """
    if uses_kernels(master):
        kernels("adamw_and_swaps").adamw_(weight, master, first, second, gradient, codes, scalars, m)
    else:
        run_reference("adamw_", weight, master, first, second, gradient, codes, scalars, m=m)


adamw_.register_fake(lambda *_: None)


@operation(
    "(Tensor weight, Tensor product, Tensor codes, Tensor blocks, int n, int m) -> (Tensor, Tensor)",
    lambda weight, product, codes, *_: (torch.empty_like(codes, dtype=torch.float32), torch.empty_like(codes)),
)
def best_swaps(weight, product, codes, blocks, n, m):
    """(change of the reconstruction error, code of the two weights) for the best swap of each group [rows, K / M].

    weight and product are [rows, M, K / M], see ``reference.best_swaps``.
    """
    codes = codes.contiguous()
    if uses_kernels(weight):
        return kernels("adamw_and_swaps").best_swaps(weight, product, codes, blocks, n, m)
    return run_reference("best_swaps", weight, product, codes, blocks, m=m)


@operation(
    "(Tensor values, Tensor bitmask, int n, int m) -> Tensor",
    lambda values, bitmask, n, m: values.new_empty(values.shape[0], values.shape[1] // n * m),
)
def unpack_nm(values, bitmask, n, m):
    """Unpack values [rows, K N / M] to the weight [rows, K] with exact zeros.

    ``bitmask`` is uint8 [rows, ceil(K / 8)], or for 2:4 int16 metadata, see ``metadata_of``; here and below.
    """
    values = values.contiguous()
    bitmask = bitmask.contiguous()
    if uses_kernels(values):
        return kernels("packed").unpack_nm(values, bitmask, n, m)
    bitmask = as_bitmask(bitmask, values.shape[1] // n * m, len(values))
    return run_reference("unpack_nm", values, bitmask, n=n, m=m)


def _unpack_context(ctx, inputs, output):
    _, bitmask, *ctx.pattern = inputs
    ctx.save_for_backward(bitmask)


def _packed_part(dense, bitmask, n, m):
    return reference.packed_part(dense, as_bitmask(bitmask, dense.shape[1], len(dense)), n=n, m=m)


def _unpack_backward(ctx, grad):
    return _packed_part(grad, *ctx.saved_tensors, *ctx.pattern), None, None, None


torch.library.register_autograd(f"{NAMESPACE}::unpack_nm", _unpack_backward, setup_context=_unpack_context)


def unpacked(values: Tensor, bitmask: Tensor, scales: Tensor | None, n: int, m: int) -> Tensor:
    """Unpack the weight [rows, K], in the dtype of the scales of integers, or of the values."""
    if scales is not None:
        values = reference.dequantized(values, scales, scales.dtype)
    return unpack_nm(values, bitmask, n, m)


@operation(
    "(Tensor x, Tensor values, Tensor bitmask, Tensor? scales, Tensor? bias, int n, int m) -> Tensor",
    lambda x, values, *_: x.new_empty(x.shape[0], values.shape[0]),
)
def nm_linear(x, values, bitmask, scales, bias, n, m):
    """x [tokens, K] @ unpacked [rows, K].T + bias, in the dtype of x.

    Values and bias have this dtype too; for int8 and int4 values scales [rows, blocks] and bias.
    """
    x, *parts, bias = (part if part is None else part.contiguous() for part in (x, values, bitmask, scales, bias))
    with without_autocast(x):
        if uses_kernels(x):
            return kernels("packed").nm_linear(x, *parts, bias, n, m)
        parts[1] = as_bitmask(parts[1], x.shape[1], len(values))
        return packed_products(x).nm_linear(x, tuple(parts), bias, n, m)


def _packed_product_context(ctx, inputs, output):
    operand, values, bitmask, scales, *rest = inputs
    ctx.pattern = rest[-2:]
    ctx.save_for_backward(values, bitmask, scales, operand if ctx.needs_input_grad[1] else None)


def _nm_linear_backward(ctx, grad):
    values, bitmask, scales, x = ctx.saved_tensors
    needs_x, needs_values, _, _, needs_bias, _, _ = ctx.needs_input_grad
    x_grad = nm_linear_input_grad(grad.contiguous(), values, bitmask, scales, *ctx.pattern) if needs_x else None
    with without_autocast(grad):
        values_grad = _packed_part(grad.t() @ x, bitmask, *ctx.pattern) if needs_values else None
    return x_grad, values_grad, None, None, grad.sum(0) if needs_bias else None, None, None


torch.library.register_autograd(f"{NAMESPACE}::nm_linear", _nm_linear_backward, setup_context=_packed_product_context)


@operation(
    "(Tensor grad, Tensor values, Tensor bitmask, Tensor? scales, int n, int m) -> Tensor",
    lambda grad, values, bitmask, scales, n, m: grad.new_empty(grad.shape[0], reference.kept_values(values) // n * m),
)
def nm_linear_input_grad(grad, values, bitmask, scales, n, m):
    """grad [tokens, rows] @ unpacked [rows, K], in the dtype of grad."""
    with without_autocast(grad):
        if uses_kernels(grad):
            return grad @ unpacked(values, bitmask, scales, n, m)
        bitmask = as_bitmask(bitmask, reference.kept_values(values) // n * m, len(values))
        parts = tuple(part if part is None else part.contiguous() for part in (values, bitmask, scales))
        return packed_products(grad).input_grad(grad.contiguous(), parts, n, m)


def _input_grad_backward(ctx, upstream):
    values, bitmask, scales, grad = ctx.saved_tensors
    needs_grad, needs_values, *_ = ctx.needs_input_grad
    upstream = upstream.contiguous()
    # the gradient of x is linear in that of y, by the weight's transpose
    own = nm_linear(upstream, values, bitmask, scales, None, *ctx.pattern) if needs_grad else None
    with without_autocast(upstream):
        values_grad = _packed_part(grad.t() @ upstream, bitmask, *ctx.pattern) if needs_values else None
    return own, values_grad, *[None] * 4


torch.library.register_autograd(
    f"{NAMESPACE}::nm_linear_input_grad", _input_grad_backward, setup_context=_packed_product_context
)


try:
    _modes = torch._C._len_torch_dispatch_stack
    _function_modes = torch._C._len_torch_function_stack
    _transforms = torch._C._functorch.peek_interpreter_stack
    _tracer = torch._C._get_tracing_state
    _derivatives = forward_ad._current_level < 0
except AttributeError:
    # private names of torch: without one of them, all calls go through the dispatcher
    _derivatives = False

PLAIN = (Tensor, nn.Parameter)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled
_autocast = torch.is_autocast_enabled


def undispatched(x: Tensor, *parts: Tensor | None) -> bool:
    """Return whether torch's dispatcher, which takes longer than a small product, has nothing to do for a call.

    It has for a gradient, a graph, a mode, a transform, a subclass of Tensor, or an error about devices.
    """
    # dynamo needs the first check; the others are in the order of how often they apply
    if _compiling() or type(x) is not Tensor or not (x.is_cpu or x.is_cuda) or not _derivatives:
        return False
    device = x.device
    needed = _grad_enabled()
    if needed and x.requires_grad:
        return False
    # code that reads addresses needs plain memory
    for part in parts:
        if part is None:
            continue
        if type(part) not in PLAIN or part.device != device or not part.is_contiguous():
            return False
        if needed and part.requires_grad:
            return False
    if _modes() or _function_modes() or forward_ad._current_level >= 0:
        return False
    return _transforms() is None and _tracer() is None and x.is_contiguous() and not x.is_neg()


def direct_masked_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, log_prob: bool, mask: MaskSource
) -> tuple[Tensor, Tensor | None] | None:
    """``masked_linear`` by a kernel without torch's dispatcher; None if there is no kernel, or it is needed."""
    if not undispatched(x, weight, bias, mask.tensor) or not uses_kernels(x):
        return None
    with without_autocast(x):
        return kernels("masked_gemm").masked_linear(x, weight, bias, mask, log_prob)


def direct_nm_linear(
    x: Tensor, values: Tensor, bitmask: Tensor, scales: Tensor | None, bias: Tensor | None, n: int, m: int
) -> Tensor | None:
    """``nm_linear`` of x [..., K] without torch's dispatcher; None if it is needed, for autocast, or for an error."""
    if not undispatched(x, values, bitmask, scales, bias):
        return None
    dtype = x.dtype
    if dtype not in DTYPES or (values if scales is None else scales).dtype != dtype or _autocast(x.device.type):
        return None
    kept = values.shape[1] if scales is None else reference.kept_values(values)
    if not x.dim() or x.shape[-1] * n != kept * m:
        return None
    if bias is not None and (bias.dtype != dtype or bias.shape != values.shape[:1]):
        return None
    if uses_kernels(x):
        tokens = x if x.dim() == 2 else x.view(x.numel() // x.shape[-1], x.shape[-1])
        y = kernels("packed").nm_linear(tokens, values, bitmask, scales, bias, n, m)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])
    if bitmask.dtype != torch.uint8 or not uses_machine_code(x):
        return None
    return machine_code("packed.products").nm_linear(x, (values, bitmask, scales), bias, n, m)
