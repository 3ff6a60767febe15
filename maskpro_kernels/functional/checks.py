"""Checks of arguments, and what the functions make of them."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..counter import Counter, MaskSource
from ..ops import philox
from ..pattern import NMPattern

FLOAT32_MAX = torch.finfo(torch.float32).max
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Between a kept and a dropped logit, as far as noise of 32 bits reaches
LARGEST_GAP = 26.0

Scalar = int | Tensor


def check_shard(shape: Sequence[int], pattern: NMPattern, group_offset: int, group_row_stride: int | None) -> int:
    """The groups in a row of the whole layer that a matrix [rows, K] of that shape is a shard of.

    Raises:
        TypeError, ValueError: the matrix cannot lie there.
    """
    rows, groups = shape[0], shape[1] // pattern.m
    check_int("group_offset", group_offset, philox.MAX_GROUPS)
    if group_row_stride is None:
        group_row_stride = groups
    else:
        check_int("group_row_stride", group_row_stride, philox.MAX_GROUPS)
        if group_row_stride < groups:
            raise ValueError(
                f"group_row_stride: expected at least the {groups} groups of a row of the given tensor, "
                f"got {group_row_stride}"
            )
    last = group_offset + (rows - 1) * group_row_stride + groups
    if last > philox.MAX_GROUPS:
        raise ValueError(f"group_offset: expected group indices below {philox.MAX_GROUPS}, got up to {last}")
    return group_row_stride


def check_codes(name: str, codes: Tensor, pattern: NMPattern, like: Tensor | None = None) -> None:
    """Raise unless ``codes`` are group codes of the pattern, and fit ``like`` [..., K] where it is given."""
    if not isinstance(codes, Tensor) or codes.dtype != pattern.code_dtype:
        raise TypeError(f"{name}: expected group codes of dtype {pattern.code_dtype}, got {describe(codes)}")
    check_layout(name, codes)
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


def check_gap(gap: float, dtype: torch.dtype = torch.float32) -> None:
    """Raise unless ``gap`` can stand between kept and dropped logits of ``dtype``."""
    if dtype not in LOGIT_DTYPES:
        raise TypeError(f"logits_dtype: expected float32, bfloat16 or float16, got {dtype}")
    if isinstance(gap, bool) or not isinstance(gap, (int, float)):
        raise TypeError(f"gap: expected a float, got {type(gap).__name__}")
    if not 0 <= gap <= torch.finfo(dtype).max:
        largest = torch.finfo(dtype).max
        raise ValueError(f"gap: expected a float within [0, {largest:g}], for logits in {dtype}, got {gap}")


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200


def describe(value) -> str:
    """What an argument is, in a line, however much it holds."""
    if isinstance(value, Tensor):
        kind = "a tensor" if value.layout is torch.strided else f"a tensor of layout {value.layout}"
        return f"{kind} {list(value.shape)} of {value.dtype} on {value.device}"
    return f"{type(value).__name__} {_SHORT.repr(value)}"


def check_layout(name: str, tensor: Tensor) -> None:
    """Raise TypeError if a tensor is sparse, or laid out by another library."""
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got one of layout {tensor.layout}; give its to_dense()")


def check_own_memory(name: str, tensor: Tensor) -> None:
    """Raise ValueError if elements of a tensor that is to change share memory, or may do so by its strides."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            raise ValueError(
                f"{name}: expected a tensor of its own memory for each element, got {list(tensor.shape)} with strides "
                f"{tensor.stride()}, such as an expanded one; give a contiguous copy"
            )
        reach += (size - 1) * stride


def check_groups(name: str, tensor: Tensor, pattern: NMPattern) -> None:
    if tensor.dim() == 0 or tensor.shape[-1] == 0 or tensor.shape[-1] % pattern.m:
        raise ValueError(f"{name}: expected a last dimension divisible by {pattern.m}, above 0, got {describe(tensor)}")


def matrix_of(name: str, tensor: Tensor, pattern: NMPattern) -> Tensor:
    """The tensor as a contiguous matrix [rows, K]."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {describe(tensor)}")
    check_layout(name, tensor)
    if tensor.dtype not in LOGIT_DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {describe(tensor)}")
    check_groups(name, tensor, pattern)
    if tensor.dim() != 2:
        tensor = tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
    return tensor.contiguous()


def check_not_distributed(name: str, tensor: Tensor) -> None:
    """Raise ValueError if a tensor is a DTensor, whose parts on several ranks no operation here puts together."""
    if hasattr(tensor, "to_local"):
        raise ValueError(
            f"{name}: expected a plain tensor, got a DTensor {list(tensor.shape)}; give its to_local() and the place "
            "that shard_counter tells, or split the dense model that finalize gives"
        )


def check_no_tangents(**tensors: Tensor | None) -> None:
    """Raise ValueError if a tensor has a forward-mode derivative, which would be lost."""
    # no promise of torch's, but asking each tensor takes longer than a small product
    if getattr(forward_ad, "_current_level", 0) < 0:
        return
    for name, tensor in tensors.items():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise ValueError(
                f"{name}: expected a tensor without a forward-mode derivative, got one with: masked and packed "
                "products have gradients alone; take the dense model that finalize gives"
            )


def check_weight(weight: Tensor, pattern: NMPattern) -> None:
    """Raise unless ``weight`` is a matrix [out, K] that the pattern divides."""
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(f"weight: expected a tensor [out, K], got {describe(weight)}")
    check_layout("weight", weight)
    check_not_distributed("weight", weight)
    if weight.dtype not in LOGIT_DTYPES:
        raise TypeError(f"weight: expected float32, bfloat16 or float16, got {describe(weight)}")
    check_groups("weight", weight, pattern)


def linear_operands(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x [tokens, K], weight, bias) of a linear layer, contiguous; x and bias checked, x in the product's dtype."""
    if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[-1] != weight.shape[1] or x.device != weight.device:
        raise ValueError(f"x: expected a tensor [..., {weight.shape[1]}] on {weight.device}, got {describe(x)}")
    check_layout("x", x)
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
    if bias is not None:
        check_layout("bias", bias)
    check_no_tangents(x=x, weight=weight, bias=bias)
    if autocast:
        x = x.to(torch.get_autocast_dtype(device))
    tokens = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()
    return tokens, weight.contiguous(), None if bias is None else bias.contiguous()


class CounterKeywords(TypedDict, total=False):
    """The keywords by which public functions take a counter. All but ``seed`` may be left out.

    Attributes:
        seed: int of 64 bits or 0-dim int64 tensor.
        step: int in [0, 2**32) or 0-dim int64 tensor; default 0. A tensor on the CPU is checked, as all of these are.
            On a device a step out of its range counts as the nearest in it; layer and draw have to be in theirs.
        layer: id in [0, 2**32), an int or 0-dim int64 tensor; default 0. Two layers of one id draw the same noise.
        draw: id in [0, 2**16) of one of several draws in a step, an int or 0-dim int64 tensor; default 0.
        group_offset: index in the whole layer of the first group, where the logits are a shard; default 0.
        group_row_stride: groups in a row of the whole layer; default: of the given logits.
    """

    seed: Scalar
    step: Scalar
    layer: Scalar
    draw: Scalar
    group_offset: int
    group_row_stride: int | None


def counter_of(
    matrix: Tensor,
    pattern: NMPattern,
    seed: Scalar,
    step: Scalar = 0,
    layer: Scalar = 0,
    draw: Scalar = 0,
    group_offset: int = 0,
    group_row_stride: int | None = None,
) -> Counter:
    """The checked counter of a draw from logits [rows, K], see ``CounterKeywords``."""
    check_scalar("seed", seed, -(1 << 63), 1 << 63)
    check_scalar("step", step, 0, philox.MAX_STEPS)
    check_scalar("layer", layer, 0, philox.MAX_LAYERS)
    check_scalar("draw", draw, 0, philox.MAX_DRAWS)
    stride = check_shard(matrix.shape, pattern, group_offset, group_row_stride)
    key = [on_device(value, torch.int64, matrix.device) for value in (seed, step, layer, draw)]
    return Counter(*key, group_offset, stride)


def check_keywords(counter: CounterKeywords) -> None:
    """Raise TypeError unless these are keywords of a counter, the seed among them."""
    known = CounterKeywords.__annotations__
    for name in counter:
        if name not in known:
            raise TypeError(f"{name}: expected no keyword but those of the counter, {', '.join(known)}, got {name!r}")
    if "seed" not in counter:
        raise TypeError("seed: expected an int or a 0-dim int64 tensor, got none")


def drawn_from(logits: Tensor, pattern: NMPattern, temperature: float, counter: CounterKeywords) -> MaskSource:
    """The checked source of a mask that is drawn from logits [..., K]."""
    check_keywords(counter)
    matrix = matrix_of("logits", logits, pattern)
    inverse = inverse_of(temperature)
    return MaskSource(matrix, "drawn", pattern.n, pattern.m, inverse, counter_of(matrix, pattern, **counter))


def check_like(name: str, tensor: Tensor, other: str, like: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.shape != like.shape or tensor.device != like.device:
        raise ValueError(
            f"{name}: expected a tensor like {other}, {list(like.shape)} on {like.device}, got {describe(tensor)}"
        )


def check_int(name: str, value: int, limit: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {describe(value)}")
    if not 0 <= value < limit:
        raise ValueError(f"{name}: expected an int in [0, {limit}), got {value}")


def inverse_of(temperature: float) -> float:
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature: expected a float, got {describe(temperature)}")
    if not 1e-30 <= temperature <= 1e30:
        raise ValueError(f"temperature: expected a positive float in [1e-30, 1e30], got {temperature}")
    return 1.0 / temperature


def on_device(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A 0-dim tensor; a Python number is filled on the device, which neither copies nor synchronises."""
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=dtype, device=device)
    # what ``to`` and ``detach`` cost where they change nothing is much to a small layer
    if value.dtype != dtype or value.device != device:
        value = value.to(device=device, dtype=dtype)
    return value.detach() if value.requires_grad else value


def stacked(values: Sequence[float | Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A 1-dim tensor of the values; a single one takes no launch but its own."""
    tensors = [on_device(value, dtype, device) for value in values]
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0].view(1)


def known_value(value: Tensor) -> float | int | None:
    """That of a 0-dim tensor, where it can be had without waiting for a device and not in a graph that is traced."""
    if torch.compiler.is_compiling() or type(value) not in (Tensor, nn.Parameter) or value.device.type != "cpu":
        return None
    return value.item()


def check_known(name: str, value: Tensor, low: int, high: int) -> None:
    """Raise ValueError if a 0-dim int64 tensor's value is known and not in [low, high)."""
    known = known_value(value)
    if known is not None and not low <= known < high:
        raise ValueError(f"{name}: expected a value in [{low}, {high}), got {known}")


def check_step(step: Tensor) -> None:
    """Raise ValueError if a counter's step is known and none of those that draws have."""
    check_known("step", step, 0, philox.MAX_STEPS)


def check_scalar(name: str, value: Scalar, low: int, high: int) -> None:
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.dtype != torch.int64:
            raise TypeError(f"{name}: expected an int or a 0-dim int64 tensor, got {describe(value)}")
        check_known(name, value, low, high)
    elif isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int or a 0-dim int64 tensor, got {describe(value)}")
    elif not low <= value < high:
        raise ValueError(f"{name}: expected an int in [{low}, {high}), got {value}")


def coefs_and_draws(coef, draw, inverse_temperature: float) -> tuple[list, list[Scalar]]:
    """The checked coefficients and draw ids of an update, one each for every draw."""
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
    total = 0.0
    for c in coefs:
        if isinstance(c, Tensor):
            if c.dim() != 0 or not c.dtype.is_floating_point:
                raise ValueError(f"coef: expected a float or a 0-dim floating-point tensor, got {describe(c)}")
        elif isinstance(c, bool) or not isinstance(c, (int, float)):
            raise TypeError(f"coef: expected a float or a 0-dim tensor, got {describe(c)}")
        known = known_value(c) if isinstance(c, Tensor) else c
        if known is None:
            continue
        if not max(abs(known), abs(known) * inverse_temperature) <= FLOAT32_MAX:
            raise ValueError(f"coef: expected a number finite in float32, also over the temperature, got {known}")
        total += abs(known)
    if not max(total, total * inverse_temperature) <= FLOAT32_MAX:
        raise ValueError(
            f"coef: expected numbers whose sum is finite in float32, also over the temperature, got {len(coefs)} whose "
            f"absolute values sum up to {total:g}"
        )
    for i in draws:
        check_scalar("draw", i, 0, philox.MAX_DRAWS)
    ids = [known_value(i) if isinstance(i, Tensor) else i for i in draws]
    if None not in ids and len(set(ids)) != len(ids):
        raise ValueError(f"draw: expected distinct ids, got {ids}")
    return coefs, draws
