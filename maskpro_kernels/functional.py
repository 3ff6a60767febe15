"""The public functions: arguments are checked once, here, before anything happens."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops, philox
from .pattern import MaskSource, NMPattern

FLOAT32_MAX = torch.finfo(torch.float32).max
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Scalar = int | Tensor


def sample_mask(
    logits: Tensor,
    pattern: str | NMPattern,
    *,
    temperature: float = 1.0,
    seed: Scalar,
    step: Scalar = 0,
    layer: int = 0,
    draw: int = 0,
    group_offset: int = 0,
    group_row_stride: int | None = None,
) -> Tensor:
    """Draw N of every M weights without replacement from softmax(logits / temperature).

    Gumbel-top-N: the N largest logit / temperature + noise are kept. The draw is a pure function of
    the logits and of (seed, step, layer, draw, group index), whatever the device. Noise spans
    [-3.13, 22.87]: no draw crosses a gap above 26, and rates are exact to 1% up to a gap of 21.

    Args:
        logits: float32, bfloat16 or float16 [..., K], K divisible by M, finite.
        pattern: "N:M" or NMPattern.
        temperature: positive; at most 1e30 and at least 1e-30.
        seed: int or 0-dim int64 tensor.
        step: int in [0, 2**32) or 0-dim int64 tensor.
        layer: id in [0, 2**32). Two layers with the same id draw the same noise.
        draw: id in [0, 2**16) of one of several draws in a step.
        group_offset: index in the whole layer of the first group, where ``logits`` is a shard.
        group_row_stride: groups in a row of the whole layer; default: of the given logits.

    Returns:
        Group codes [..., K / M]: bit i is set where weight i of the group is kept; uint8 for M <= 8,
        int32 above.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    pattern = NMPattern(pattern)
    mask = _drawn(logits, pattern, temperature, seed, step, layer, draw, group_offset, group_row_stride)
    source, _, *counter = mask
    codes = ops.sample_mask(source, *counter)
    return codes.view(*logits.shape[:-1], logits.shape[-1] // pattern.m)


def sample_masked_weight(
    weight: Tensor,
    logits: Tensor,
    pattern: str | NMPattern,
    *,
    temperature: float = 1.0,
    seed: Scalar,
    step: Scalar = 0,
    layer: int = 0,
    draw: int = 0,
    group_offset: int = 0,
    group_row_stride: int | None = None,
) -> Tensor:
    """The weight under the mask that ``sample_mask`` draws from the same arguments, exact zeros elsewhere.

    Args:
        weight: float32, bfloat16 or float16, shaped and placed like ``logits``. Gradients flow to it.
        logits and the others: as for ``sample_mask``.

    Returns:
        Tensor like ``weight``, contiguous.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    pattern = NMPattern(pattern)
    mask = _drawn(logits, pattern, temperature, seed, step, layer, draw, group_offset, group_row_stride)
    _check_like("weight", weight, "logits", logits)
    return ops.masked_weight(_matrix("weight", weight, pattern), mask.tensor.detach(), *mask[1:]).view(weight.shape)


def shard_counter(pattern: str | NMPattern, in_features: int, *, row: int = 0, column: int = 0) -> dict[str, int]:
    """Where a shard lies in its layer, as the keywords of the functions that draw and of ``MaskedLinear``.

    Args:
        pattern: "N:M" or NMPattern.
        in_features: K of the whole layer, divisible by M.
        row: of the whole layer, where the shard's first one stands.
        column: of the whole layer, where the shard's first one stands; divisible by M.

    Returns:
        ``group_offset`` and ``group_row_stride``.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    pattern = NMPattern(pattern)
    _check_int("in_features", in_features, philox.MAX_GROUPS * pattern.m + 1)
    if in_features == 0 or in_features % pattern.m:
        raise ValueError(f"in_features: expected an int divisible by {pattern.m}, above 0, got {in_features}")
    _check_int("row", row, philox.MAX_GROUPS)
    _check_int("column", column, in_features)
    if column % pattern.m:
        raise ValueError(f"column: expected an int divisible by {pattern.m}, or groups are torn, got {column}")
    stride = in_features // pattern.m
    return {"group_offset": row * stride + column // pattern.m, "group_row_stride": stride}


def check_shard(shape: Sequence[int], pattern: NMPattern, group_offset: int, group_row_stride: int | None) -> int:
    """The groups in a row of the whole layer that a matrix [rows, K] of that shape is a shard of.

    Raises:
        TypeError, ValueError: the matrix cannot lie there.
    """
    rows, groups = shape[0], shape[1] // pattern.m
    _check_int("group_offset", group_offset, philox.MAX_GROUPS)
    if group_row_stride is None:
        group_row_stride = groups
    else:
        _check_int("group_row_stride", group_row_stride, philox.MAX_GROUPS)
        if group_row_stride < groups:
            raise ValueError(
                f"group_row_stride: expected at least the {groups} groups of a row of the given tensor, "
                f"got {group_row_stride}"
            )
    last = group_offset + (rows - 1) * group_row_stride + groups
    if last > philox.MAX_GROUPS:
        raise ValueError(f"group_offset: expected group indices below {philox.MAX_GROUPS}, got up to {last}")
    return group_row_stride


def top_n_mask(scores: Tensor, pattern: str | NMPattern) -> Tensor:
    """Group codes of the N largest scores of every group, ties to the lower index.

    Args:
        scores: float32, bfloat16 or float16 [..., K], K divisible by M, no NaN.
        pattern: "N:M" or NMPattern.

    Returns:
        Group codes [..., K / M].

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    pattern = NMPattern(pattern)
    codes = ops.top_n_mask(_matrix("scores", scores, pattern), pattern.n, pattern.m)
    return codes.view(*scores.shape[:-1], scores.shape[-1] // pattern.m)


def pack_mask(mask: Tensor, pattern: str | NMPattern) -> Tensor:
    """Group codes [..., K / M] of a bool mask [..., K].

    Raises:
        TypeError: if ``mask`` is not a bool tensor.
        ValueError: if K is not divisible by M, or a group does not keep exactly N.
    """
    pattern = NMPattern(pattern)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask: expected a bool tensor, got {describe(mask)}")
    _check_groups("mask", mask, pattern)
    groups = mask.unflatten(-1, (-1, pattern.m))
    code = torch.zeros(groups.shape[:-1], dtype=torch.int32, device=mask.device)
    for i in range(pattern.m):
        code |= groups[..., i].to(torch.int32) << i
    code = code.to(pattern.code_dtype)
    check_exactly_n("mask", code, pattern)
    return code


def expand_mask(codes: Tensor, pattern: str | NMPattern) -> Tensor:
    """bool mask [..., K] of group codes [..., K / M].

    Raises:
        TypeError: if ``codes`` does not have the pattern's code dtype.
        ValueError: if ``codes`` has no dimension.
    """
    pattern = NMPattern(pattern)
    check_codes("codes", codes, pattern)
    bits = torch.arange(pattern.m, device=codes.device, dtype=codes.dtype)
    return (codes[..., None] >> bits & 1).to(torch.bool).flatten(-2)


def mask_log_prob(logits: Tensor, codes: Tensor, pattern: str | NMPattern) -> Tensor:
    """log p(S) of drawing each group's mask S from softmax(logits), in any order; differentiable in the logits.

    Exact without cancellation: up to N = 4 by recursion over the subsets of S, above by quadrature over
    the first dropped arrival (150 to 300 nodes: slow, meant for checks rather than for training).

    Args:
        logits: float32, bfloat16 or float16 [..., K], K divisible by M, finite.
        codes: group codes [..., K / M] that keep exactly N, which is not checked: it would wait for the device.
        pattern: "N:M" or NMPattern.

    Returns:
        float32 [..., K / M].

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    pattern = NMPattern(pattern)
    matrix = _matrix("logits", logits, pattern)
    check_codes("codes", codes, pattern, logits)
    flat = codes.reshape(matrix.shape[0], matrix.shape[1] // pattern.m).contiguous()
    return ops.mask_log_prob(matrix, flat, pattern.n, pattern.m, 1.0).view(codes.shape)


def score_update_(
    logits: Tensor,
    coef: float | Tensor | Sequence[float | Tensor],
    *,
    pattern: str | NMPattern,
    temperature: float = 1.0,
    seed: Scalar,
    step: Scalar = 0,
    layer: int = 0,
    draw: int | Sequence[int] = 0,
    group_offset: int = 0,
    group_row_stride: int | None = None,
) -> Tensor:
    """logits -= sum of coef * score, in place; the masks are drawn again from their counters.

    The score is the gradient of log p(S) in the logits at the temperature of the draw. Up to N = 4 it
    is exact; above, it is the unbiased estimate from the arrival times of the draw, whose mean given S
    is the exact score. All scores are taken at the logits as given, which are read once and written
    once. 16-bit logits are rounded stochastically, once, so small updates are right on average.

    Args:
        logits: float32, bfloat16 or float16 [..., K], K divisible by M; changed.
        coef: float or 0-dim tensor, or a sequence of K of them with ``draw`` a sequence of K ids.
        pattern, temperature, seed, step, layer, draw, group_offset, group_row_stride: as they were
            given to ``sample_mask``.

    Returns:
        ``logits``.

    Raises:
        TypeError, ValueError: an argument is not as above; the logits are then untouched.
    """
    pattern = NMPattern(pattern)
    matrix = _matrix("logits", logits, pattern).detach()
    spans = zip(logits.shape, logits.stride(), strict=True)
    if not logits.is_contiguous() and any(size > 1 and stride == 0 for size, stride in spans):
        raise ValueError("logits: expected a tensor of its own memory for each element, got an expanded one")
    # dynamo does not trace the question, and refuses such a tensor itself
    if not torch.compiler.is_compiling() and logits.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError("logits: expected a tensor that may change, got one of inference mode outside of it")
    inverse = _inverse_temperature(temperature)
    coefs, draws = _coefs_and_draws(coef, draw, inverse)
    seed, step = _counter_tensors(logits.device, seed, step)
    with torch.no_grad():
        device = logits.device
        coef_tensor = _stacked(coefs, torch.float32, device)
        draw_tensor = _stacked(draws, torch.int64, device)
        layer, offset, stride = _shard(matrix, pattern, layer, None, group_offset, group_row_stride)
        ops.score_update_(
            matrix, coef_tensor, pattern.n, pattern.m, inverse, seed, step, layer, draw_tensor, offset, stride
        )
        if not logits.is_contiguous():
            logits.copy_(matrix.view(logits.shape))
    return logits


def masked_linear(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None = None,
    *,
    pattern: str | NMPattern,
    temperature: float = 1.0,
    log_prob: bool = True,
    seed: Scalar,
    step: Scalar = 0,
    layer: int = 0,
    draw: int = 0,
    group_offset: int = 0,
    group_row_stride: int | None = None,
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
    tokens, matrix, vector = _linear_operands(x, weight, bias, pattern)
    _check_like("logits", logits, "weight", weight)
    mask = _drawn(logits, pattern, temperature, seed, step, layer, draw, group_offset, group_row_stride)
    source = mask.tensor if log_prob else mask.tensor.detach()
    y, total = ops.masked_linear(tokens, matrix, vector, log_prob, source, *mask[1:])
    return y.view(*x.shape[:-1], weight.shape[0]), total if log_prob else None


def straight_through_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, mask: MaskSource, curvature: float = 1.0
) -> Tensor:
    """What passes straight through a draw to its logits: the slope of the loss in the mask.

    That is w G + (1/2 - m) w^2 F, the slope halfway between kept and dropped, less its mean over every group, as a
    group's mask has a fixed sum. G is the loss's derivative in the masked weight, and F = curvature * (sum of grad^2
    over the tokens) (sum of x^2 over the tokens) its second one: of a loss that is a mean over the tokens, in nats,
    the Fisher information by K-FAC's factors (Martens and Grosse 2015, arXiv 1503.05671). With w G alone, weights
    of which any change overshoots would come and go for ever.

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
    return ops.straight_through_grad(grad, x, weight, curvature, *mask).to(mask.tensor.dtype)


def straight_through_linear(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None = None,
    *,
    pattern: str | NMPattern,
    temperature: float = 1.0,
    logits_backward: Callable[[Tensor, Tensor, Tensor, MaskSource], Tensor | None] = straight_through_gradient,
    seed: Scalar,
    step: Scalar = 0,
    layer: int = 0,
    draw: int = 0,
    group_offset: int = 0,
    group_row_stride: int | None = None,
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
    tokens, matrix, vector = _linear_operands(x, weight, bias, pattern)
    _check_like("logits", logits, "weight", weight)
    mask = _drawn(logits, pattern, temperature, seed, step, layer, draw, group_offset, group_row_stride)
    y = _StraightThroughLinear.apply(tokens, matrix, vector, logits_backward, *mask)
    return y.view(*x.shape[:-1], weight.shape[0])


class _StraightThroughLinear(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias, logits_backward, *mask):
        y, _ = ops.masked_linear(x, weight, bias, False, *mask)
        return y

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, ctx.logits_backward, *mask = inputs
        logits, *ctx.constants, seed, step, layer, draw, offset, stride = mask
        ctx.counter = (layer, draw, offset, stride)
        ctx.bias_dtype = None if bias is None else bias.dtype
        needs_x, needs_weight, _, _, needs_logits, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if needs_weight or needs_logits else None, weight if needs_x or needs_logits else None, logits, seed, step
        )
        ctx.weight_dtype = weight.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, logits, seed, step = ctx.saved_tensors
        mask = MaskSource(logits, *ctx.constants, seed, step, *ctx.counter)
        needs_x, needs_weight, needs_bias, _, needs_logits, *_ = ctx.needs_input_grad
        grad = grad.contiguous()
        x_grad = ops.masked_linear_input_grad(grad, weight, *mask) if needs_x else None
        weight_grad = ops.masked_linear_weight_grad(grad, x, *mask).to(ctx.weight_dtype) if needs_weight else None
        bias_grad = grad.sum(0).to(ctx.bias_dtype) if needs_bias else None
        # last: logits that have moved would draw another mask
        logits_grad = ctx.logits_backward(grad, x, weight, mask) if needs_logits else None
        return x_grad, weight_grad, bias_grad, None, logits_grad, *[None] * (len(mask) - 1)


def top_n_linear(
    x: Tensor, weight: Tensor, logits: Tensor, bias: Tensor | None = None, *, pattern: str | NMPattern
) -> Tensor:
    """Linear layer under the mask of the N largest logits of every group: x @ (weight * mask).T + bias.

    Args:
        x, weight, logits, bias: as for ``masked_linear``. Gradients flow to x, weight and bias.
        pattern: "N:M" or NMPattern.

    Returns:
        y [..., out].

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    pattern = NMPattern(pattern)
    tokens, matrix, vector = _linear_operands(x, weight, bias, pattern)
    _check_like("logits", logits, "weight", weight)
    mask = MaskSource(_matrix("logits", logits.detach(), pattern), "top_n", pattern.n, pattern.m)
    y, _ = ops.masked_linear(tokens, matrix, vector, False, *mask)
    return y.view(*x.shape[:-1], weight.shape[0])


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
    tokens, matrix, vector = _linear_operands(x, weight, bias, pattern)
    check_codes("codes", codes, pattern, weight)
    mask = MaskSource(codes.contiguous(), "codes", pattern.n, pattern.m)
    y, _ = ops.masked_linear(tokens, matrix, vector, False, *mask)
    return y.view(*x.shape[:-1], weight.shape[0])


def check_codes(name: str, codes: Tensor, pattern: NMPattern, like: Tensor | None = None) -> None:
    """Raise unless ``codes`` are group codes of the pattern, and fit ``like`` [..., K] where it is given."""
    if not isinstance(codes, Tensor) or codes.dtype != pattern.code_dtype:
        raise TypeError(f"{name}: expected group codes of dtype {pattern.code_dtype}, got {describe(codes)}")
    if codes.dim() == 0:
        raise ValueError(f"{name}: expected group codes [..., K / M], got a 0-dim tensor")
    if like is None:
        return
    expected = (*like.shape[:-1], like.shape[-1] // pattern.m)
    if tuple(codes.shape) != expected:
        raise ValueError(f"{name}: expected shape {expected} for {pattern}, got {tuple(codes.shape)}")
    if codes.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got one on {codes.device}")


def check_exactly_n(name: str, codes: Tensor, pattern: NMPattern) -> None:
    """Raise unless every code keeps exactly N of M; waits for the device."""
    value = codes.to(torch.int64)
    kept = sum(value >> i & 1 for i in range(pattern.m))
    if pattern.m < 32:
        # bits beyond the group count as too many
        kept = kept + (value >> pattern.m != 0) * pattern.m
    wrong = (kept != pattern.n).nonzero()
    if len(wrong):
        where = tuple(wrong[0].tolist())
        raise ValueError(
            f"{name}: expected exactly {pattern.n} of every {pattern.m} kept, "
            f"got code {int(codes[where]):#x} in group {where} ({len(wrong)} groups differ)"
        )


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200


def describe(value) -> str:
    """What an argument is, in a line, however much it holds."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype} on {value.device}"
    return f"{type(value).__name__} {_SHORT.repr(value)}"


def _check_groups(name: str, tensor: Tensor, pattern: NMPattern) -> None:
    if tensor.dim() == 0 or tensor.shape[-1] == 0 or tensor.shape[-1] % pattern.m:
        raise ValueError(f"{name}: expected a last dimension divisible by {pattern.m}, above 0, got {describe(tensor)}")


def _matrix(name: str, tensor: Tensor, pattern: NMPattern) -> Tensor:
    """The tensor as a contiguous matrix [rows, K]."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {describe(tensor)}")
    if tensor.dtype not in LOGIT_DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {describe(tensor)}")
    _check_groups(name, tensor, pattern)
    if tensor.dim() != 2:
        tensor = tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
    return tensor.contiguous()


def _linear_operands(
    x: Tensor, weight: Tensor, bias: Tensor | None, pattern: NMPattern
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x [tokens, K], weight, bias) of a linear layer, checked and contiguous; x in the dtype of the product."""
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(f"weight: expected a tensor [out, K], got {describe(weight)}")
    if weight.dtype not in LOGIT_DTYPES:
        raise TypeError(f"weight: expected float32, bfloat16 or float16, got {describe(weight)}")
    if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[-1] != weight.shape[1] or x.device != weight.device:
        raise ValueError(f"x: expected a tensor [..., {weight.shape[1]}] on {weight.device}, got {describe(x)}")
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if x.dtype != weight.dtype and not (autocast and x.dtype in LOGIT_DTYPES):
        raise TypeError(f"x: expected the weight's dtype {weight.dtype}, got {describe(x)}")
    if bias is not None and (
        not isinstance(bias, Tensor)
        or bias.shape != weight.shape[:1]
        or bias.dtype != weight.dtype
        or bias.device != weight.device
    ):
        raise ValueError(
            f"bias: expected a tensor [{weight.shape[0]}] of {weight.dtype} on {weight.device}, got {describe(bias)}"
        )
    if autocast:
        x = x.to(torch.get_autocast_dtype(device))
    tokens = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()
    return tokens, _matrix("weight", weight, pattern), None if bias is None else bias.contiguous()


def _drawn(logits, pattern: NMPattern, temperature, seed, step, layer, draw, offset, stride) -> MaskSource:
    """The checked arguments of a draw."""
    matrix = _matrix("logits", logits, pattern)
    inverse = _inverse_temperature(temperature)
    seed, step = _counter_tensors(logits.device, seed, step)
    _check_int("draw", draw, philox.MAX_DRAWS)
    shard = _shard(matrix, pattern, layer, draw, offset, stride)
    return MaskSource(matrix, "drawn", pattern.n, pattern.m, inverse, seed, step, *shard)


def _check_like(name: str, tensor: Tensor, other: str, like: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.shape != like.shape or tensor.device != like.device:
        raise ValueError(
            f"{name}: expected a tensor like {other}, {list(like.shape)} on {like.device}, got {describe(tensor)}"
        )


def _check_int(name: str, value: int, limit: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {describe(value)}")
    if not 0 <= value < limit:
        raise ValueError(f"{name}: expected an int in [0, {limit}), got {value}")


def _inverse_temperature(temperature: float) -> float:
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature: expected a float, got {describe(temperature)}")
    if not 1e-30 <= temperature <= 1e30:
        raise ValueError(f"temperature: expected a positive float in [1e-30, 1e30], got {temperature}")
    return 1.0 / temperature


def _on_device(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A 0-dim tensor; a Python number is filled on the device, which neither copies nor synchronises."""
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=dtype, device=device)
    # what ``to`` and ``detach`` cost where they change nothing is much to a small layer
    if value.dtype != dtype or value.device != device:
        value = value.to(device=device, dtype=dtype)
    return value.detach() if value.requires_grad else value


def _stacked(values: Sequence[float | Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A 1-dim tensor of the values; a single one takes no launch but its own."""
    tensors = [_on_device(value, dtype, device) for value in values]
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0].view(1)


def _counter_tensors(device: torch.device, seed: Scalar, step: Scalar) -> tuple[Tensor, Tensor]:
    for name, value, low, high in (("seed", seed, -(1 << 63), 1 << 63), ("step", step, 0, philox.MAX_STEPS)):
        if isinstance(value, Tensor):
            if value.dim() != 0 or value.dtype != torch.int64:
                raise TypeError(f"{name}: expected an int or a 0-dim int64 tensor, got {describe(value)}")
        elif isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int or a 0-dim int64 tensor, got {describe(value)}")
        elif not low <= value < high:
            raise ValueError(f"{name}: expected an int in [{low}, {high}), got {value}")
    return _on_device(seed, torch.int64, device), _on_device(step, torch.int64, device)


def _shard(matrix: Tensor, pattern: NMPattern, layer, draw, offset, stride) -> tuple[int, ...]:
    """(layer, draw, offset, row stride) checked; without the draw where it is None."""
    _check_int("layer", layer, philox.MAX_LAYERS)
    stride = check_shard(matrix.shape, pattern, offset, stride)
    return (layer, offset, stride) if draw is None else (layer, draw, offset, stride)


def _coefs_and_draws(coef, draw, inverse_temperature: float) -> tuple[list, list[int]]:
    several = isinstance(draw, Sequence)
    draws = list(draw) if several else [draw]
    if isinstance(coef, str):
        raise TypeError(f"coef: expected a float, a 0-dim tensor or a sequence of them, got {describe(coef)}")
    listed = isinstance(coef, Sequence) or (isinstance(coef, Tensor) and coef.dim() == 1)
    if listed != several:
        raise ValueError(f"coef: expected a sequence exactly where draw is one, got {coef!r} for draw {draw!r}")
    coefs = list(coef) if listed else [coef]
    if len(coefs) != len(draws) or not coefs:
        raise ValueError(f"coef: expected one for each of the {len(draws)} draws, at least one, got {len(coefs)}")
    for c in coefs:
        if isinstance(c, Tensor):
            if c.dim() != 0 or not c.dtype.is_floating_point:
                raise ValueError(f"coef: expected a float or a 0-dim floating-point tensor, got {describe(c)}")
        elif isinstance(c, bool) or not isinstance(c, (int, float)):
            raise TypeError(f"coef: expected a float or a 0-dim tensor, got {describe(c)}")
        elif not max(abs(c), abs(c) * inverse_temperature) <= FLOAT32_MAX:
            raise ValueError(f"coef: expected a number finite in float32, also over the temperature, got {c}")
    for i in draws:
        _check_int("draw", i, philox.MAX_DRAWS)
    if len(set(draws)) != len(draws):
        raise ValueError(f"draw: expected distinct ids, got {draws}")
    return coefs, draws
