"""Linear layers under a mask: the public functions, and the one backward that they share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Unpack

import torch
from torch import Tensor

from .. import ops
from ..ops.counter import NO_COUNTER, MaskSource
from ..ops.dispatch import without_autocast
from ..ops.pattern import NMPattern
from .checks import (
    FLOAT32_MAX,
    CounterKeywords,
    as_codes,
    check_like,
    check_transforms,
    check_weight,
    describe,
    drawn_from,
    in_forward_mode,
    linear_input,
    needs_gradient,
    on_device,
    readable_value,
    tokens_of,
)

# (gradient of y [tokens, out], x [tokens, K], weight [out, K], source of the mask) -> gradient of the logits or None
LogitsBackward = Callable[[Tensor, Tensor, Tensor, MaskSource], Tensor | None]


def masked_linear(x: Tensor, weight: Tensor, logits: Tensor, bias: Tensor | None = None, *,
                  pattern: str | NMPattern, temperature: float = 1.0, log_prob: bool = True,
                  **counter: Unpack[CounterKeywords]) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Linear layer under a drawn mask: (x @ (weight * mask).T + bias, log-probability of the mask).

    Gradients flow to x, weight and bias. The gradient of the log-probability flows to the logits: it is the score. Only
    first derivatives are supported, and only backward, not ``torch.func.jvp``.

    Args:
        x: [..., K] in the weight's dtype. Under autocast x may be float32, bfloat16 or float16, and y has autocast's
            dtype.
        weight: float32, bfloat16 or float16 [out, K].
        logits: float32, bfloat16 or float16 [out, K].
        bias: [out] or None.
        log_prob: whether to compute the log-probability.
        The others: as for ``sample_mask``.

    Returns:
        y [..., out], and log p(S) summed over the layer, 0-dim float32, or None without ``log_prob``.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    pattern = NMPattern(pattern)
    check_weight(weight, pattern)
    check_like("logits", logits, "weight", weight)
    return linear_under(x, weight, bias, drawn_from(logits, pattern, temperature, counter), log_prob)


def straight_through_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, mask: MaskSource, curvature: float = 1.0,
    tokens: float | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Straight-through gradient of the logits: the slope of the loss in the mask.

    The slope is w G + (1/2 - m) w^2 F, taken halfway between kept and dropped. Its mean over each group is subtracted,
    since a group's mask has a fixed sum. G is the first derivative of the loss in the masked weight. F approximates the
    second: F = curvature * T / R * (sum of grad^2) (sum of x^2), over the R rows that have a gradient. For a loss that
    is a mean over T tokens, in nats, this is the Fisher information by K-FAC's factors (Martens and Grosse 2015, arXiv
    1503.05671). With w G alone, a weight whose every change overshoots would alternate between dropped and kept.

    Pass it as ``logits_backward`` of ``straight_through_linear`` or ``MaskedLinear``. They call it with contiguous
    operands. ``functools.partial`` sets another curvature, and tokens.

    Args:
        grad: gradient of y [tokens, out].
        x: [tokens, K].
        weight: [out, K].
        mask: source of the mask that y was computed with.
        curvature: factor of F, at least 0.
        tokens: T, a finite number above 0 or a 0-dim tensor of one, of which only those on a CPU are checked; None: R,
            which is right if the loss has one term for each row.

    Returns:
        Tensor [out, K] in the dtype of the logits.

    Raises:
        TypeError, ValueError: if ``tokens`` is not as above, or ``curvature`` is below 0.
    """
    if not curvature >= 0:
        raise ValueError(f"curvature: expected a float of at least 0, got {curvature}")
    if tokens is not None:
        check_tokens(tokens)
        tokens = on_device(tokens, torch.float32, getattr(tokens, "device", grad.device))
    return ops.straight_through_grad(grad, x, weight, curvature, mask, tokens=tokens).to(mask.tensor.dtype)


def check_tokens(tokens: float | Tensor) -> None:
    if isinstance(tokens, Tensor):
        fits = tokens.dim() == 0 and tokens.dtype is not torch.bool and not tokens.is_complex()
    else:
        fits = isinstance(tokens, Real) and not isinstance(tokens, bool)
    value = readable_value(tokens) if fits else math.nan
    if value is not None and not 0 < value <= FLOAT32_MAX:
        raise (ValueError if fits else TypeError)(
            f"tokens: expected a float above 0 or a 0-dim tensor of one, got {describe(tokens)}"
        )


def labelled_tokens(loss_fn: Callable, batch) -> Tensor | None:
    """T of a batch, 0-dim float32, from its loss or its labels, see ``curvature`` of ``StraightThrough``."""
    count = loss_fn.labelled_tokens(batch) if hasattr(loss_fn, "labelled_tokens") else count_labels(batch)
    if count is None:
        return None
    is_scalar = isinstance(count, Tensor) and count.numel() == 1
    # reading it from a GPU would wait for the forward
    value = readable_value(count) if is_scalar else count
    if value is not None and not (isinstance(value, Real) and 0 <= value < math.inf):
        raise ValueError(f"loss_fn: expected labelled_tokens to return a number of at least 0, got {describe(count)}")
    # a loss without tokens has no gradient
    return (count.reshape(()) if is_scalar else torch.tensor(count, device="cpu")).float().clamp(min=1)


def count_labels(batch, shifted: bool = True) -> Tensor | None:
    """Number of a mapping's labels other than -100; None for another batch. ``shifted``: as a language model's."""
    labels, ids = (batch.get("labels"), batch.get("input_ids")) if isinstance(batch, Mapping) else (None, None)
    if not isinstance(labels, Tensor):
        return None
    # a language model does not predict the first token of a row
    of_text = shifted and isinstance(ids, Tensor) and labels.dim() == 2 and labels.shape == ids.shape
    return (labels[:, 1:] if of_text else labels).ne(-100).sum()


def straight_through_linear(x: Tensor, weight: Tensor, logits: Tensor, bias: Tensor | None = None, *,
                            pattern: str | NMPattern, temperature: float = 1.0,
                            logits_backward: LogitsBackward = straight_through_gradient,
                            **counter: Unpack[CounterKeywords]) -> Tensor:  # fmt: skip
    """Linear layer under a drawn mask, with a gradient that passes straight through the draw to the logits.

    Gradients flow to x, weight and bias as in ``masked_linear``.

    Args:
        x, weight, logits, bias: as for ``masked_linear``.
        logits_backward: function that returns the gradient of the logits, see ``straight_through_gradient``. It is
            called after the other gradients are computed. So it may update the logits itself and return None.
        The others: as for ``sample_mask``.

    Returns:
        y [..., out].

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    pattern = NMPattern(pattern)
    check_weight(weight, pattern)
    check_like("logits", logits, "weight", weight)
    mask = drawn_from(logits, pattern, temperature, counter)
    return linear_under(x, weight, bias, mask, logits_backward=logits_backward)[0]


def codes_linear(
    x: Tensor, weight: Tensor, codes: Tensor, bias: Tensor | None = None, *, pattern: str | NMPattern
) -> Tensor:
    """Linear layer under a given mask: x @ (weight * mask).T + bias.

    Args:
        x, weight, bias: as for ``masked_linear``. Gradients flow to them.
        codes: group codes [out, K / M], such as ``top_n_mask(logits, pattern)``, which keeps the N largest logits; or a
            bool mask [out, K], which is checked to keep exactly N, so that the call waits for the device.
        pattern: "N:M" or NMPattern.

    Returns:
        y [..., out].

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    pattern = NMPattern(pattern)
    check_weight(weight, pattern)
    codes = as_codes("codes", codes, pattern, weight)
    return linear_under(x, weight, bias, MaskSource(codes.contiguous(), "codes", pattern.n, pattern.m, 1.0))[0]


def linear_under(x: Tensor, weight: Tensor, bias: Tensor | None, mask: MaskSource, log_prob: bool = False,
                 logits_backward: LogitsBackward | None = None,
                 is_current: Callable[[], bool] | None = None) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``masked_linear`` under a mask of any source; x and bias are checked here.

    Backward raises if ``is_current()`` is false: an applied mask is then no longer that of the forward.
    """
    transformed = check_transforms("Vmap", "a masked layer has one grad, vjp or jacrev at a time, so no hessian")
    operand = linear_input(x, bias, weight.shape, weight.dtype, weight.device)
    tokens = tokens_of(operand)
    matrix = weight.contiguous()
    vector = None if bias is None else bias.contiguous()
    if not log_prob and logits_backward is None and mask.kind != "applied":
        # the product needs no more than the codes, if there are any
        mask = mask.by_codes
        mask = mask._replace(tensor=mask.tensor.detach())
    # in forward mode the function refuses tangents
    if transformed or in_forward_mode() or needs_gradient(tokens, matrix, vector, mask.tensor):
        inputs = tokens, matrix, vector, mask.tensor, mask._replace(tensor=None), log_prob, logits_backward, is_current
        outputs = (_TransformedMaskedLinear if transformed else _MaskedLinear).apply(*inputs)
        y, total = outputs if log_prob else (outputs, None)
    else:
        y, total = _product(tokens, matrix, vector, mask, log_prob)
    # FSDP2 warns if a module returns a view
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0]), total


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: MaskSource, log_prob: bool
) -> tuple[Tensor, Tensor | None]:
    """(x [tokens, K] @ (weight * mask).T + bias, log p of the drawn mask or None), without gradients."""
    if mask.kind == "applied":
        return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)), None
    mask = mask.on(x.device)
    if log_prob:
        y, total = ops.masked_linear(x, weight, bias, True, mask)
        return y, total
    # a log-probability alone needs the logits
    (y,) = ops.masked_linear(x, weight, bias, False, mask.by_codes)
    return y, None


def _forward(ctx, x, weight, bias, source, mask, log_prob, *for_backward):
    y, total = _product(x, weight, bias, mask._replace(tensor=source), log_prob)
    output = (y, total) if log_prob else y
    if ctx is not None:
        _save(ctx, (x, weight, bias, source, mask, log_prob, *for_backward), output)
    return output


def _save(ctx, inputs, output):
    x, weight, bias, source, mask, log_prob, ctx.logits_backward, ctx.is_current = inputs
    needs_x, needs_weight, needs_bias, needs_logits, *_ = ctx.needs_input_grad
    slopes = needs_logits and ctx.logits_backward is not None
    ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
    if not torch.compiler.is_compiling():
        # dynamo does not support this call, and fills in zeros
        ctx.set_materialize_grads(False)
    if log_prob and not (needs_x or needs_weight or needs_bias):
        # only the log-probability needs a graph
        ctx.mark_non_differentiable(output[0])
    if not (needs_x or needs_weight or needs_logits and (log_prob or slopes)):
        mask = mask._replace(counter=NO_COUNTER, codes=None)
    elif mask.kind != "applied":
        mask = mask._replace(tensor=source)
    # save the given weight, not autocast's copy: FSDP2 frees the weight between forward and backward
    operands = x if needs_weight or slopes else None, weight if needs_x or slopes else None
    ops.save_mask(ctx, mask, *operands)


def _input_grad(grad: Tensor, weight: Tensor, mask: MaskSource) -> Tensor:
    """grad [tokens, rows] @ (weight * mask), in the dtype of grad."""
    if mask.kind == "applied":
        with without_autocast(grad.device.type):
            return grad @ weight.to(grad.dtype)
    return ops.masked_linear_input_grad(grad, weight, mask.by_codes)


class _MaskedLinear(torch.autograd.Function):
    """x [tokens, K] @ (weight * mask).T + bias, or with ``log_prob`` (that, log p of the drawn mask).

    ``source`` is the mask's tensor. It is an argument of its own because autograd finds tensors only there. Backward
    draws the mask again, so no tensor of the weight's size is saved but weight and logits.
    """

    forward = staticmethod(_forward)

    @staticmethod
    def backward(ctx, grad, log_prob_grad=None):
        if ctx.is_current is not None and not ctx.is_current():
            raise RuntimeError(
                "weight: expected the mask of the forward in its backward, got another one: logits, seed, step, draw "
                "or mode have changed since"
            )
        if grad is None and log_prob_grad is None:
            return (None,) * 8
        mask, (x, weight) = ops.saved_mask(ctx)
        source = mask.tensor
        mask = mask.on((log_prob_grad if grad is None else grad).device)
        needs_x, needs_weight, needs_bias, needs_logits, *_ = ctx.needs_input_grad
        x_grad = weight_grad = bias_grad = logits_grad = None
        with torch.no_grad():
            if grad is not None:
                dense = grad.contiguous()
                x_grad = _input_grad(dense, weight, mask) if needs_x else None
                weight_grad = (
                    ops.masked_linear_weight_grad(dense, x, mask.by_codes).to(ctx.dtypes[0]) if needs_weight else None
                )
                bias_grad = dense.sum(0).to(ctx.dtypes[1]) if needs_bias else None
            if needs_logits and log_prob_grad is not None:
                codes = ops.codes_under(mask)
                each = log_prob_grad.expand(codes.shape).contiguous()
                logits_grad = ops.mask_score(mask.tensor, codes, each, mask.n, mask.m, mask.inv_temperature)
            if needs_logits and ctx.logits_backward is not None and grad is not None:
                # last: moved logits would draw another mask
                logits_grad = ctx.logits_backward(dense, x, weight, mask)
            if logits_grad is not None:
                logits_grad = logits_grad.to(source)
        gradients = x_grad, weight_grad, bias_grad, logits_grad
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            inputs = grad, log_prob_grad, x, weight, source
            gradients = [
                None if gradient is None else _FirstDerivative.apply(gradient, *inputs) for gradient in gradients
            ]
        return *gradients, None, None, None, None


class _TransformedMaskedLinear(_MaskedLinear):
    """``_MaskedLinear`` for transforms and compilers, which need ``setup_context``.

    torch binds the arguments of such a function at each call, which doubles the host time of a small layer.
    """

    setup_context = staticmethod(_save)

    # dynamo counts the parameters
    @staticmethod
    def forward(x, weight, bias, source, mask, log_prob, logits_backward, is_current):
        return _forward(None, x, weight, bias, source, mask, log_prob)


class _FirstDerivative(torch.autograd.Function):
    """A gradient whose derivative in ``inputs`` raises; torch's ``once_differentiable`` has no edges to them: zeros."""

    generate_vmap_rule = True
    forward = staticmethod(lambda gradient, *inputs: gradient.clone())
    setup_context = staticmethod(lambda ctx, inputs, output: None)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError("grad: expected none for second derivatives, which a masked layer has not; finalize it")
