"""Checks of arguments, done once, in the public functions. Operations below trust their arguments."""

from __future__ import annotations

import math
import reprlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..ops import philox
from ..ops.counter import Counter, MaskSource
from ..ops.pattern import NMPattern
from ..ops.triton.tiles import architecture

FLOAT32_MAX = torch.finfo(torch.float32).max
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Oldest driver of NVIDIA's GPUs by major release of CUDA, see
# docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
DRIVERS = {"12": 525, "13": 580}
# The largest gap between a kept and a dropped logit that noise of 32 bits can cross
LARGEST_GAP = 26.0

Scalar = int | Tensor
_transforms = getattr(getattr(torch._C, "_functorch", None), "get_interpreter_stack", tuple)  # a private name

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200


def describe(value) -> str:
    """Describe an argument in one short line."""
    if isinstance(value, Tensor):
        kind = "a tensor" if value.layout is torch.strided else f"a tensor of layout {value.layout}"
        return f"{kind} {list(value.shape)} of {value.dtype} on {value.device}"
    return f"{type(value).__name__} {in_a_line(value)}"


def in_a_line(value) -> str:
    """``repr`` of a value, also of an array, shortened and without line breaks."""
    return " ".join(_SHORT.repr(value).split())


def check_one_of(name: str, value: str, choices: Iterable[str]) -> None:
    # ``in`` would compare each element of an array
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {in_a_line(value)}")


def check_floats(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.dtype not in LOGIT_DTYPES:
        raise TypeError(f"{name}: expected a dense tensor of float32, bfloat16 or float16, got {describe(tensor)}")


def check_groups(name: str, tensor: Tensor, pattern: NMPattern) -> None:
    if tensor.dim() == 0 or tensor.shape[-1] == 0 or tensor.shape[-1] % pattern.m:
        raise ValueError(f"{name}: expected a last dimension divisible by {pattern.m}, above 0, got {describe(tensor)}")


def matrix_of(name: str, tensor: Tensor, pattern: NMPattern) -> Tensor:
    """Check a tensor [..., K] and return it as a contiguous matrix [rows, K]."""
    check_floats(name, tensor)
    check_groups(name, tensor, pattern)
    return tokens_of(tensor)


def check_no_overlap(name: str, tensor: Tensor) -> None:
    """Raise if two elements may share memory: a stride must exceed the extent of the dimensions with smaller ones."""
    last = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= last:
            raise ValueError(f"{name}: expected elements that share no memory, got strides {tensor.stride()}")
        last += stride * (size - 1)


def tokens_of(x: Tensor) -> Tensor:
    """Reshape x [..., K] to a contiguous matrix [tokens, K]."""
    return (x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])).contiguous()


def check_weight(weight: Tensor, pattern: NMPattern, name: str = "weight", whole: bool = True) -> None:
    """Raise unless a weight is a matrix [out, K], K divisible by M, and with ``whole`` not a DTensor."""
    check_floats(name, weight)
    if whole:
        check_not_distributed(name, weight)
    if weight.dim() != 2:
        raise ValueError(f"{name}: expected a tensor [out, K], got {describe(weight)}")
    check_groups(name, weight, pattern)


def check_like(name: str, tensor: Tensor, other: str, like: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.shape != like.shape or tensor.device != like.device:
        raise ValueError(
            f"{name}: expected a tensor like {other}, {list(like.shape)} on {like.device}, got {describe(tensor)}"
        )


def linear_input(x: Tensor, bias: Tensor | None, shape: Sequence[int], dtype: torch.dtype, device) -> Tensor:
    """Check x [..., K] and bias; return x in the dtype of the product: autocast's or that of the weight [out, K]."""
    if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[-1] != shape[1] or x.device != device:
        raise ValueError(f"x: expected a tensor [..., {shape[1]}] on {device}, got {describe(x)}")
    check_floats("x", x)
    autocast = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    if not autocast and x.dtype != dtype:
        raise TypeError(f"x: expected the weight's dtype {dtype}, got {describe(x)}")
    if bias is not None:
        check_floats("bias", bias)
        if bias.shape != (shape[0],) or bias.dtype != dtype or bias.device != device:
            raise ValueError(f"bias: expected a tensor [{shape[0]}] of {dtype} on {device}, got {describe(bias)}")
    return x.to(torch.get_autocast_dtype(device.type)) if autocast else x


def check_not_distributed(name: str, tensor: Tensor) -> None:
    """Raise ValueError for a DTensor: no operation here gathers its parts from several ranks."""
    if hasattr(tensor, "to_local"):
        raise ValueError(
            f"{name}: expected a plain tensor, got a DTensor {list(tensor.shape)}; pass its to_local() with the "
            "keywords of shard_counter, or shard the dense model that finalize returns"
        )


def check_in_memory(
    argument: str, layer: nn.Module, name: str = "weight", weight: Tensor | None = None, sharded: bool = False
) -> None:
    """Raise ValueError unless a layer's weight is a whole tensor in memory, or with ``sharded`` a DTensor."""
    weight = layer.weight if weight is None else weight
    if weight.is_meta:
        offloads = getattr(getattr(layer, "_hf_hook", None), "offload", False)
        cure = "accelerate offloads it, give it a device in device_map" if offloads else "load it first"
        raise ValueError(f"{argument}: expected weights in memory, got {name} on meta: {cure}")
    if hasattr(weight, "to_local") and not sharded:
        raise ValueError(
            f"{argument}: expected plain tensors as weights, got a DTensor in {name}; for a sharded model use "
            "the refit of convert, and MaskTrainer"
        )


def check_no_flat_parameters(argument: str, model: nn.Module) -> None:
    """Raise ValueError if FSDP1 has flattened the parameters of a module."""
    for name, module in model.named_modules():
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
            raise ValueError(
                f"{argument}: expected plain parameters or those of fully_shard, got the flat ones of "
                f"FullyShardedDataParallel (FSDP1) in {name or 'the model itself'}"
            )


def check_codes(name: str, codes: Tensor, pattern: NMPattern, like: Tensor | None = None) -> None:
    """Raise unless ``codes`` are group codes of the pattern; they must fit ``like`` [..., K] if it is given."""
    if not isinstance(codes, Tensor) or codes.dtype != pattern.code_dtype:
        raise TypeError(f"{name}: expected group codes of dtype {pattern.code_dtype}, got {describe(codes)}")
    if codes.layout is not torch.strided or codes.dim() == 0:
        raise ValueError(f"{name}: expected dense group codes [..., K / M], got {describe(codes)}")
    expected = None if like is None else [*like.shape[:-1], like.shape[-1] // pattern.m]
    if like is not None and (list(codes.shape) != expected or codes.device != like.device):
        raise ValueError(f"{name}: expected shape {expected} for {pattern} on {like.device}, got {describe(codes)}")


def as_codes(name: str, mask: Tensor, pattern: NMPattern, like: Tensor) -> Tensor:
    """Check a mask of ``like`` [..., K], bool or as group codes, and return the codes.

    Only of a bool mask it checks, and waits for it, that groups keep N; ``check_exactly_n`` checks codes.
    """
    if not isinstance(mask, Tensor) or mask.dtype not in (torch.bool, pattern.code_dtype):
        raise TypeError(f"{name}: expected group codes of {pattern.code_dtype} or a bool mask, got {describe(mask)}")
    if mask.dtype != torch.bool:
        check_codes(name, mask, pattern, like)
        return mask
    if mask.layout is not torch.strided or mask.shape != like.shape or mask.device != like.device:
        raise ValueError(f"{name}: expected a mask {list(like.shape)} on {like.device}, got {describe(mask)}")
    check_groups(name, mask, pattern)
    bits = 1 << torch.arange(pattern.m, device=mask.device, dtype=pattern.code_dtype)
    codes = (mask.unflatten(-1, (-1, pattern.m)) * bits).sum(-1, dtype=pattern.code_dtype)
    check_exactly_n(name, codes, pattern)
    return codes


def check_cast(cast: Callable[[Tensor], Tensor], weight: Tensor) -> torch.dtype:
    """Return the dtype that ``cast``, an argument of ``Module._apply``, gives a weight; TypeError without products."""
    dtype = cast(torch.empty(0, dtype=weight.dtype, device=weight.device)).dtype
    if dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"dtype: expected float32, bfloat16 or float16, got {dtype}; finalize gives layers of any dtype"
        )
    return dtype


def check_transforms(refused: str, works: str) -> bool:
    """Raise ValueError within transforms of torch.func of the kind ``refused``, or several of kind "Grad".

    Returns whether a transform or a compiler sees the call.
    """
    compiling = torch.compiler.is_compiling()
    levels = None if compiling else _transforms()
    if not levels:
        return compiling
    kinds = [level.key().name for level in levels]
    if refused in kinds or kinds.count("Grad") > 1:
        raise ValueError(f"x: expected none within torch.func's {kinds}: {works}; a dense model has them all")
    return True


def in_transform() -> bool:
    """Return whether a transform of torch.func sees the call."""
    return bool(_transforms())


def in_forward_mode() -> bool:
    """Return whether tensors may have forward-mode derivatives."""
    # a private variable of torch: asking each tensor takes longer than a small product
    return getattr(forward_ad, "_current_level", 0) >= 0


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Return whether autograd records a call with these arguments."""
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def check_exactly_n(name: str, codes: Tensor, pattern: NMPattern) -> None:
    """Raise unless every code keeps exactly N of M; waits for the device."""
    value = codes.to(torch.int64)
    # a bit beyond the group counts as M kept weights, so the check fails
    kept = sum(value >> i & 1 for i in range(pattern.m)) + (value >> pattern.m != 0) * pattern.m
    wrong = (kept != pattern.n).nonzero()
    if len(wrong):
        where = tuple(wrong[0].tolist())
        raise ValueError(
            f"{name}: expected exactly {pattern.n} of every {pattern.m} kept, got code {int(codes[where]):#x} in group "
            f"{where} ({len(wrong)} groups differ)"
        )


def check_gap(gap: float, dtype: torch.dtype = torch.float32) -> None:
    """Raise unless ``gap`` is a finite gap of logits of ``dtype``, at least 0."""
    if not isinstance(dtype, torch.dtype) or dtype not in LOGIT_DTYPES:
        raise TypeError(f"logits_dtype: expected float32, bfloat16 or float16, got {in_a_line(dtype)}")
    if isinstance(gap, bool) or not isinstance(gap, (int, float)):
        raise TypeError(f"gap: expected a float, got {describe(gap)}")
    largest = torch.finfo(dtype).max
    if not 0 <= gap <= largest:
        raise ValueError(f"gap: expected a float within [0, {largest:g}], for logits in {dtype}, got {gap}")


def check_device(name: str, device: torch.device | str | int) -> torch.device:
    """Return the device of this machine that an argument names, a GPU with its index.

    ValueError if the machine does not have it, if it has no memory, or if the kernels do not run on it.
    """
    is_gpu = False
    try:
        named = torch.device(device)
        is_gpu = named.type == "cuda"
        if named.type == "meta":
            raise RuntimeError("it has no memory")
        found = torch.empty(0, device=named).device
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        devices = ", ".join(["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))])
        reason = (missing_gpu() if is_gpu else None) or str(error).partition("\n")[0]
        raise ValueError(f"{name}: expected one of {devices}, got {in_a_line(device)}: {reason}") from error
    if is_gpu:
        try:
            architecture(found)
        except ValueError as error:
            raise ValueError(str(error).replace("device:", f"{name}:", 1)) from None
    return found


def missing_gpu() -> str | None:
    """Reason that torch finds no GPU on this machine; None if it finds one."""
    with warnings.catch_warnings():
        # the same reason
        warnings.simplefilter("ignore")
        if torch.cuda.is_available():
            return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition(". ")[0]
    else:
        reason = "torch finds no GPU"
    driver = None if torch.version.cuda is None else DRIVERS.get(torch.version.cuda.partition(".")[0])
    if "driver" in reason and driver is not None:
        reason += f"; CUDA {torch.version.cuda}, for which torch is built, needs driver {driver} or newer"
    return reason


def check_int(name: str, value: int, limit: int, low: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {describe(value)}")
    if not low <= value < limit:
        raise ValueError(f"{name}: expected an int in [{low}, {limit}), got {value}")


def check_scalar(name: str, value: Scalar, low: int, high: int) -> None:
    """Raise unless ``value`` is an int in [low, high) or a 0-dim int64 tensor; only a CPU tensor's value is checked."""
    if not isinstance(value, Tensor):
        check_int(name, value, high, low)
        return
    if value.dim() or value.dtype != torch.int64:
        raise TypeError(f"{name}: expected an int or a 0-dim int64 tensor, got {describe(value)}")
    number = readable_value(value)
    if number is not None and not low <= number < high:
        raise ValueError(f"{name}: expected a value in [{low}, {high}), got {number}")


def readable_value(value: float | Tensor) -> float | int | None:
    """Value of a number or 0-dim tensor; None if reading would wait for a device or break a traced graph."""
    if not isinstance(value, Tensor):
        return value
    if torch.compiler.is_compiling() or type(value) not in (Tensor, nn.Parameter) or value.device.type != "cpu":
        return None
    return value.item()


def inverse_of(temperature: float) -> float:
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature: expected a float, got {describe(temperature)}")
    if not 1e-30 <= temperature <= 1e30:
        raise ValueError(f"temperature: expected a positive float in [1e-30, 1e30], got {temperature}")
    return 1.0 / temperature


def on_device(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make a 0-dim tensor on the device; a Python number is filled in without a copy or a synchronisation."""
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=dtype, device=device)
    # ``to`` and ``detach`` take time even if they change nothing, much for a small layer
    if value.dtype != dtype or value.device != device:
        value = value.to(device=device, dtype=dtype)
    return value.detach() if value.requires_grad else value


def stacked(values: Sequence[float | Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make a 1-dim tensor of the values; a single value takes one launch."""
    tensors = [on_device(value, dtype, device) for value in values]
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0].view(1)


class CounterKeywords(TypedDict, total=False):
    """Keywords of a counter in public functions, see ``sample_mask``. Only ``seed`` is required."""

    seed: Scalar
    step: Scalar
    layer: Scalar
    draw: Scalar
    group_offset: int
    group_row_stride: int | None


def counter_of(matrix: Tensor, pattern: NMPattern, /, seed: Scalar | None = None, step: Scalar = 0, layer: Scalar = 0,
               draw: Scalar = 0, group_offset: int = 0, group_row_stride: int | None = None,
               **unknown) -> Counter:  # fmt: skip
    """Check the counter of a draw from logits [rows, K] and return it."""
    if unknown:
        name = next(iter(unknown))
        expected = ", ".join(CounterKeywords.__annotations__)
        raise TypeError(f"{name}: expected keywords of the function or of its counter, {expected}, got {name!r}")
    if seed is None:
        raise TypeError("seed: expected an int or a 0-dim int64 tensor, got none")
    check_scalar("seed", seed, -(1 << 63), 1 << 63)
    check_scalar("step", step, 0, philox.MAX_STEPS)
    check_scalar("layer", layer, 0, philox.MAX_LAYERS)
    check_scalar("draw", draw, 0, philox.MAX_DRAWS)
    stride = check_shard(matrix.shape, pattern, group_offset, group_row_stride)
    key = [on_device(value, torch.int64, matrix.device) for value in (seed, step, layer, draw)]
    return Counter(*key, group_offset, stride)


def check_shard(shape: Sequence[int], pattern: NMPattern, group_offset: int, group_row_stride: int | None) -> int:
    """Check the place of a shard of shape [rows, K]; return the groups in a row of the whole layer."""
    rows = shape[0]
    groups = shape[1] // pattern.m
    check_int("group_offset", group_offset, philox.MAX_GROUPS)
    stride = groups if group_row_stride is None else group_row_stride
    check_int("group_row_stride", stride, philox.MAX_GROUPS)
    if stride < groups:
        raise ValueError(
            f"group_row_stride: expected at least {groups}, the groups in a row of the shard, got {stride}"
        )
    last = group_offset + (rows - 1) * stride + groups
    if last > philox.MAX_GROUPS:
        raise ValueError(f"group_offset: expected group indices below {philox.MAX_GROUPS}, got up to {last}")
    return stride


def drawn_from(logits: Tensor, pattern: NMPattern, temperature: float, counter: CounterKeywords) -> MaskSource:
    """Check the arguments of a draw from logits [..., K] and return the source of its mask."""
    matrix = matrix_of("logits", logits, pattern)
    inverse = inverse_of(temperature)
    return MaskSource(matrix, "drawn", pattern.n, pattern.m, inverse, counter_of(matrix, pattern, **counter))


def coefs_and_draws(coef, draw, inverse_temperature: float) -> tuple[list, list[Scalar]]:
    """Check the coefficients and draw ids of an update; return both as lists, one element for each draw."""
    several = isinstance(draw, Sequence)
    draws = list(draw) if several else [draw]
    for i in draws:
        check_scalar("draw", i, 0, philox.MAX_DRAWS)
    listed = isinstance(coef, Sequence) and not isinstance(coef, str) or isinstance(coef, Tensor) and coef.dim() == 1
    coefs = list(coef) if listed else [coef]
    for c in coefs:
        number = isinstance(c, int | float) and not isinstance(c, bool)
        if not number and not (isinstance(c, Tensor) and c.dim() == 0 and c.dtype.is_floating_point):
            raise TypeError(
                f"coef: expected a float or a 0-dim floating-point tensor, or a sequence of them, got {describe(c)}"
            )
    if listed != several or len(coefs) != len(draws) or not coefs:
        raise ValueError(
            f"coef: expected one for each draw, a sequence exactly if draw is one, got {coef!r} for draw {draw!r}"
        )
    total = sum(abs(c) for c in map(readable_value, coefs) if c is not None)
    if not max(total, total * inverse_temperature) <= FLOAT32_MAX:
        raise ValueError(
            "coef: expected numbers whose absolute values, divided by the temperature, sum to a finite float32, "
            f"got {total:g}"
        )
    ids = [readable_value(i) for i in draws]
    if None not in ids and len(set(ids)) != len(ids):
        raise ValueError(f"draw: expected distinct ids, got {ids}")
    return coefs, draws
