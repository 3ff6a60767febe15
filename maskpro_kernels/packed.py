"""Packed N:M weights: kept values and a bitmask, products and modules with them; a module with int8 weights."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import ops
from .functional.checks import (
    LOGIT_DTYPES,
    check_cast,
    check_exactly_n,
    check_floats,
    check_not_distributed,
    check_one_of,
    check_transforms,
    check_weight,
    describe,
    in_forward_mode,
    in_transform,
    linear_input,
    needs_gradient,
    tokens_of,
)
from .functional.masks import expand_mask
from .modules import MaskedLinear
from .ops.dispatch import holds_metadata, in_onnx_export
from .ops.pattern import METADATA_BLOCK, NMPattern, as_bitmask, bitmask_of, codes_of, metadata_of
from .ops.reference import INT4_GROUPS, INTEGERS, SCALED, dequantized, kept_values, scaled_group
from .shards import local

# Name of the quantization in the config of a checkpoint
METHOD = "maskpro"
# How values are stored: unchanged, or as integers with scales
KEEP, INT8, INT4 = VALUE_KINDS = ("keep", "int8", "int4")
# How the output layer beside packed layers is stored
OUTPUT_LAYERS = (KEEP, INT8)
INTEGER_KINDS = {torch.int8: INT8, torch.uint8: INT4}
# Divisors of a block's largest value for the scales of int4: they put it at either end, or beyond, where it is clipped
INT4_DIVISORS = [end * 20 / (12 + step) for step in range(10) for end in (-8, 7)]
# Asks Linux to move memory into huge pages at once; Linux before 6.1 refuses
MADV_COLLAPSE = 25
HUGE_PAGE = 2 << 20


@dataclass(frozen=True, eq=False, repr=False)
class PackedNM:
    """A weight [out, K], with N of every M consecutive values stored.

    Attributes:
        values: float32, bfloat16, float16 or int8 [out, K N / M], contiguous: the kept values in order. For int4 uint8
            [out, K N / M / 2]: two values a byte, the first in the lower four bits, in two's complement.
        bitmask: uint8 [out, ceil(K / 8)], contiguous: bit j of byte b is set where weight 8 b + j is kept. On NVIDIA's
            GPUs from compute capability 8.0 on a 2:4 weight of 16 bits with K divisible by 16 holds in its place, of
            as many bytes for whole blocks of 32, the int16 metadata of sparse tensor cores: either is taken, and
            converted here, once. ``save_pretrained`` and ``state_dict`` give the bitmask.
        pattern: "N:M" or NMPattern.
        scales: float32, bfloat16 or float16 [out, ceil(K N / M / group)], contiguous: a factor for each ``group``
            values of a row, which are 128 for int8, and for int4, where factors may be negative, 32, 64 or 128. None
            for other values.

    Raises:
        TypeError, ValueError: shapes or dtypes are not as above. ``check`` tests the bits of the bitmask, this does
            not unless it converts them.
    """

    values: Tensor
    bitmask: Tensor
    pattern: NMPattern
    scales: Tensor | None = None

    def __post_init__(self):
        object.__setattr__(self, "pattern", NMPattern(self.pattern))
        values = self.values
        scales = self.scales
        pattern = self.pattern
        metadata = getattr(self.bitmask, "dtype", None) == torch.int16 and has_metadata(values, pattern)
        tensors = [("values", values, (*LOGIT_DTYPES, *INTEGER_KINDS))]
        tensors.append(("bitmask", self.bitmask, (torch.int16 if metadata else torch.uint8,)))
        if scales is not None:
            tensors.append(("scales", scales, LOGIT_DTYPES))
        for name, tensor, dtypes in tensors:
            if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes:
                raise TypeError(f"{name}: expected a tensor of {' or '.join(map(str, dtypes))}, got {describe(tensor)}")
            if tensor.dim() != 2 or not tensor.is_contiguous():
                raise ValueError(f"{name}: expected a contiguous matrix, got {describe(tensor)}")
        rows = len(values)
        count = kept_values(values)
        if count == 0 or count % pattern.n:
            raise ValueError(f"values: expected rows of a multiple of {pattern.n} values, got {describe(values)}")
        if (scales is None) == (values.dtype in INTEGER_KINDS):
            raise ValueError(f"scales: expected them beside int8 or int4 values and no others, got {describe(scales)}")
        expected = {"bitmask": [rows, -(-(count // pattern.n * pattern.m) // 8)]}
        if scales is not None:
            # where no size of a group fits, name the default
            default = SCALED if self.kind == INT8 else INT4_GROUPS[0]
            expected["scales"] = [rows, -(-count // (self.group or default))]
        if metadata:
            expected["bitmask"] = [-(-rows // METADATA_BLOCK) * METADATA_BLOCK, -(-count // 16) * 2]
        for name, tensor, _ in tensors[1:]:
            if list(tensor.shape) != expected[name] or tensor.device != values.device:
                raise ValueError(
                    f"{name}: expected {expected[name]} on {values.device} beside {pattern} values "
                    f"{list(values.shape)}, got {describe(tensor)}"
                )
        bitmask = bitmask_for_device(self.bitmask, values, pattern)
        if bitmask.dtype == torch.int16 and not metadata:
            self._check_codes()
        object.__setattr__(self, "bitmask", bitmask)

    @property
    def shape(self) -> torch.Size:
        """[out, K]."""
        return torch.Size((len(self.values), kept_values(self.values) // self.pattern.n * self.pattern.m))

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weight: that of the scales, or without them of the values."""
        return (self.values if self.scales is None else self.scales).dtype

    @property
    def kind(self) -> str:
        """Storage of the values: one of VALUE_KINDS."""
        return INTEGER_KINDS.get(self.values.dtype, KEEP)

    @property
    def group(self) -> int | None:
        """Number of values of a row that share a scale; None without scales."""
        return None if self.scales is None else scaled_group(self.values, self.scales)

    @property
    def nbytes(self) -> int:
        """Bytes of values, bitmask and scales."""
        return self.values.nbytes + self.bitmask.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def __repr__(self) -> str:
        return (
            f"PackedNM(shape={list(self.shape)}, pattern={self.pattern}, values={self.kind}, dtype={self.dtype}, "
            f"device={self.values.device}, nbytes={self.nbytes})"
        )

    def to(self, *args, **kwargs) -> PackedNM:
        """Move the weight to another device or dtype; return itself if nothing changes.

        A dtype changes the scales of integers alone, as in ``NMLinear``.

        Args:
            args, kwargs: as for ``torch.Tensor.to``.

        Raises:
            TypeError: if the dtype is not float32, bfloat16 or float16, or ``torch.Tensor.to`` refuses the arguments.
            ValueError: if a weight is larger than the dtype's largest number.
        """
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None and dtype not in LOGIT_DTYPES:
            raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
        check_range(self.values, self.scales, dtype or self.dtype)
        values = self.values
        bitmask = self.bitmask.to(device, None, non_blocking)
        if self.scales is None:
            values = values.to(device, dtype, non_blocking)
            scales = None
        else:
            values = values.to(device, None, non_blocking)
            scales = self.scales.to(device, dtype, non_blocking)
        unchanged = values is self.values and scales is self.scales
        return self if unchanged else PackedNM(values, bitmask, self.pattern, scales)

    def stored_as(self, values: str, group: int = 64) -> PackedNM:
        """Store the values as ``pack_nm`` would: integers are quantized, "keep" gives them the weight's dtype.

        Raises:
            ValueError: as in ``pack_nm``, for ``values``, ``group`` and values to quantize.
        """
        check_values(values, group)
        count = kept_values(self.values)
        if values == self.kind and (values != INT4 or self.scales.shape[1] == -(-count // group)):
            return self
        kept = self.values if self.kind == KEEP else dequantized(self.values, self.scales, self.dtype)
        if values == KEEP:
            return PackedNM(kept, self.bitmask, self.pattern)
        integers, scales = quantized(kept, SCALED if values == INT8 else group, values)
        return PackedNM(integers, self.bitmask, self.pattern, scales)

    def check(self) -> PackedNM:
        """Check that the bitmask keeps N of every M, and scales: finite, of int8 not negative; return itself.

        Raises:
            ValueError: if the bitmask or the scales are not so.
        """
        self._check_codes()
        if self.kind == INT8:
            check_int8_scales(self.scales)
        if self.kind == INT4 and not self.scales.isfinite().all():
            raise ValueError("scales: expected finite numbers, got others")
        return self

    def _check_codes(self) -> None:
        rows, k = self.shape
        bitmask = as_bitmask(self.bitmask, k, rows)
        check_exactly_n("bitmask", codes_of(bitmask, k, self.pattern.m), self.pattern)
        if k % 8 and (bitmask[:, -1] >> k % 8).any():
            raise ValueError(f"bitmask: expected no bits beyond the {k} weights of a row, got some")

    def unpack(self) -> Tensor:
        """Unpack the weight [out, K] of ``dtype``, with +0.0 for dropped weights."""
        return ops.unpacked(self.values, self.bitmask, self.scales, self.pattern.n, self.pattern.m)


def check_int8_scales(scales: Tensor) -> None:
    """Raise ValueError unless scales are finite and not negative."""
    if not scales.is_meta and not (scales.isfinite() & (scales >= 0)).all():
        raise ValueError("scales: expected finite numbers of at least 0, got others")


def check_range(values: Tensor, scales: Tensor | None, dtype: torch.dtype) -> None:
    """Raise ValueError if a finite value, or an integer times its scale, is not finite in a dtype."""
    name, tensor = ("values", local(values.detach())) if scales is None else ("scales", scales)
    largest = torch.finfo(dtype).max
    # integers are at most 127, and their products take memory
    if tensor.is_meta or largest >= torch.finfo(tensor.dtype).max or not (tensor.abs() > largest / 256).any():
        return
    weights = tensor
    converted = tensor.to(dtype)
    if scales is not None:
        weights = dequantized(values, tensor, torch.float32)
        converted = dequantized(values, converted, dtype)
    overflowed = weights[weights.isfinite() & ~converted.isfinite()]
    if len(overflowed):
        raise ValueError(
            f"{name}: expected weights within {largest:g}, the largest number of {dtype}, got up to "
            f"{overflowed.abs().max():g}"
        )


def check_values(values: str, group: int) -> None:
    """Raise ValueError unless these are settings of ``pack_nm``."""
    check_one_of("values", values, VALUE_KINDS)
    if not isinstance(group, int) or group not in INT4_GROUPS:
        raise ValueError(f"group: expected one of {', '.join(map(str, sorted(INT4_GROUPS)))}, got {group!r}")


def pack_nm(weight: Tensor, pattern: str | NMPattern, values: str = KEEP, group: int = 64) -> PackedNM:
    """Pack a weight in which at most N of every M consecutive values are not zero.

    If fewer are not zero, zeros fill the N values, -0.0 before +0.0. A -0.0 that is not stored unpacks as +0.0.

    Args:
        weight: float32, bfloat16 or float16 [out, K], K divisible by M.
        pattern: "N:M" or NMPattern.
        values: "keep" stores them unchanged. "int8" rounds them to integers from -127 to 127 times a scale for each
            block of 128 values of a row. The scale is the smallest number of the weight's dtype with which the block's
            largest value fits. "int4" rounds them to integers from -8 to 7 times a scale for each ``group`` values. Of
            20 scales, which put the largest value near -8 or 7 or beyond, that of the least squared error is chosen.
        group: 32, 64 or 128 int4 values.

    Raises:
        TypeError, ValueError: an argument is not as above, more than N of a group are not zero, a value to quantize
            is not finite, or a row has an odd number of int4 values.
    """
    pattern = NMPattern(pattern)
    check_values(values, group)
    check_weight(weight, pattern)
    weight = weight.detach().contiguous()
    rows, k = weight.shape
    counts = (weight != 0).view(rows, k // pattern.m, pattern.m).sum(-1)
    if (counts > pattern.n).any():
        full = (counts > pattern.n).nonzero()
        row, index = full[0].tolist()
        first = index * pattern.m
        raise ValueError(
            f"weight: expected at most {pattern.n} nonzero of every {pattern.m} values, got "
            f"{int(counts[row, index])} in row {row}, columns {first} to {first + pattern.m - 1} ({len(full)} groups "
            "have too many)"
        )
    # keep nonzero values first, then -0.0, then +0.0
    scores = ((weight != 0).to(torch.bfloat16) * 2).add_(weight.signbit() & (weight == 0))
    codes = ops.top_n_mask(scores, pattern.n, pattern.m)
    kept = weight[expand_mask(codes, pattern)].view(rows, k // pattern.m * pattern.n)
    return PackedNM(kept, bitmask_of(codes, pattern.m), pattern).stored_as(values, group)


def has_metadata(values: Tensor, pattern: NMPattern) -> bool:
    """Return whether metadata exist for a pattern and values [rows, K N / M]: for 2:4 and K divisible by 16."""
    matrix = isinstance(values, Tensor) and values.dim() == 2
    return matrix and (pattern.n, pattern.m) == (2, 4) and kept_values(values) % 8 == 0


def bitmask_for_device(bitmask: Tensor, values: Tensor, pattern: NMPattern) -> Tensor:
    """Convert a bitmask or metadata to the form for the device of its values."""
    metadata = has_metadata(values, pattern) and values.itemsize == 2 and holds_metadata(values.device)
    if not metadata:
        return as_bitmask(bitmask, kept_values(values) // pattern.n * pattern.m, len(values))
    return bitmask if bitmask.dtype == torch.int16 else metadata_of(bitmask)


def quantized(values: Tensor, group: int = SCALED, kind: str = INT8) -> tuple[Tensor, Tensor]:
    """Quantize values [rows, values] into (integers, scales); ValueError if one is not finite."""
    count = values.shape[1]
    if not values.isfinite().all():
        raise ValueError(f"weight: expected finite values for {kind}, got others")
    if kind == INT4 and count % 2:
        raise ValueError(f"weight: expected an even number of kept values in a row for int4, got {count}")
    blocks = nn.functional.pad(values.float(), (0, -count % group)).unflatten(1, (-1, group))
    if kind == INT4:
        scales = least_squares_scales(blocks, values.dtype)
    else:
        largest = blocks.abs().amax(-1)
        scales = (largest / 127).to(values.dtype)
        # a scale that was rounded down is too small for the largest value; take the next number, with bits one more
        too_small = scales.float() * 127 < largest
        bits = scales.view(INTEGERS[scales.itemsize]) + too_small
        # near the largest number of the dtype 127 times a scale is infinite, and the number before serves
        too_large = bits.view(values.dtype).float() * 127 > torch.finfo(values.dtype).max
        scales = (bits - too_large.to(bits.dtype)).view(values.dtype)
    numbers = nearest_integers(blocks, scales, kind).flatten(1)[:, :count]
    return (packed_int4(numbers) if kind == INT4 else numbers.contiguous()), scales


def nearest_integers(blocks: Tensor, scales: Tensor, kind: str) -> Tensor:
    """int8 [..., values]: float32 blocks in units of their scales [...], from -127 to 127, of INT4 from -8 to 7."""
    numbers = (blocks / scales.float().unsqueeze(-1)).nan_to_num_(0.0).round_()
    least, most = (-8, 7) if kind == INT4 else (-127, 127)
    return numbers.clamp_(least, most).to(torch.int8)


def least_squares_scales(blocks: Tensor, dtype: torch.dtype, weights: Tensor | float = 1.0) -> Tensor:
    """Scales [...] of a dtype for the int4 values of float32 blocks [..., values], see ``pack_nm``.

    ``weights``, of the shape of the blocks, multiply the squared error of each value.
    """
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)).squeeze(-1)
    # a power of two, which changes no rounding, so that squares neither overflow nor underflow
    unit = (largest.frexp().mantissa / largest).nan_to_num_(1.0).clamp_(2.0**-126, 2.0**126)
    blocks = blocks * unit.unsqueeze(-1)
    best = (largest / INT4_DIVISORS[0]).to(dtype)
    least_error = torch.full_like(largest, torch.inf)
    for divisor in INT4_DIVISORS:
        scales = (largest / divisor).to(dtype)
        scales_in_units = scales.float() * unit
        error = nearest_integers(blocks, scales_in_units, INT4) * scales_in_units.unsqueeze(-1) - blocks
        error = error.square_().mul_(weights).sum(-1)
        best = torch.where(error < least_error, scales, best)
        least_error = torch.minimum(error, least_error)
    return best


def packed_int4(numbers: Tensor) -> Tensor:
    """int4 values of ``PackedNM``, uint8 [rows, values / 2], from int8 [rows, values] between -8 and 7."""
    numbers = numbers.view(torch.uint8)
    return numbers[:, ::2] & 15 | numbers[:, 1::2] << 4


def nm_linear(x: Tensor, packed: PackedNM, bias: Tensor | None = None) -> Tensor:
    """Compute x @ weight.T + bias with a packed weight.

    Two routes: a product that reads the packed values, or one after the weight, or a block of its rows, is unpacked.
    The first runs on most CPUs, and on a GPU for up to 64 tokens of 16 bits and 2:4, 1:4, 4:8 and 8:16 with K divisible
    by 16 (1:4: 32). docs/serving.md has the table.

    Args:
        x: [..., K] of the weight's dtype, under autocast of any dtype. Gradients flow to it.
        packed: from ``pack_nm``. Gradients flow to its values if they require one.
        bias: [out] of the weight's dtype. Gradients flow to it.

    Returns:
        [..., out].

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    if not isinstance(packed, PackedNM):
        raise TypeError(f"packed: expected a PackedNM, got {describe(packed)}")
    return packed_linear(x, packed.values, packed.bitmask, packed.scales, bias, packed.pattern)


def packed_linear(
    x: Tensor, values: Tensor, bitmask: Tensor, scales: Tensor | None, bias: Tensor | None, pattern: NMPattern
) -> Tensor:
    """``nm_linear`` with the parts of a packed weight."""
    check_not_distributed("values", values)
    rows = values.shape[0]
    k = kept_values(values) // pattern.n * pattern.m
    # numbers of the weight's dtype
    if scales is None:
        floats = values
        check_floats("values", values)
    else:
        floats = scales
        check_floats("scales", scales)
    for name, part in (("bitmask", bitmask), ("scales", scales)):
        if part is not None and part.device != values.device:
            raise ValueError(f"{name}: expected a tensor on the values' device {values.device}, got {describe(part)}")
    transformed = check_transforms("Grad", "a packed layer has jacobian, hessian and hvp of torch.autograd.functional")
    x = linear_input(x, bias, (rows, k), floats.dtype, values.device)
    if in_forward_mode():
        for name, part in (("x", x), ("values", values), ("scales", scales), ("bias", bias)):
            if part is not None and forward_ad.unpack_dual(part).tangent is not None:
                raise ValueError(
                    f"{name}: expected a tensor without a forward-mode derivative, got one with it: packed products "
                    "support backward alone; use the dense model that finalize returns"
                )
    if x.dtype != floats.dtype:
        # under autocast
        bias = None if bias is None else bias.to(x.dtype)
        if scales is None:
            values = values.to(x.dtype)
        else:
            scales = scales.to(x.dtype)
    if in_onnx_export():
        values = values if scales is None else dequantized(values, scales, scales.dtype)
        return nn.functional.linear(x, _onnx_weight(values, as_bitmask(bitmask, k, rows), pattern.n, pattern.m), bias)
    tensors = [None if tensor is None else tensor.contiguous() for tensor in (values, bitmask, scales, bias)]
    product = ops.differentiable_nm_linear if transformed or needs_gradient(x, values, bias) else ops.nm_linear
    y = product(tokens_of(x), *tensors, pattern.n, pattern.m)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], rows)


def _onnx_weight(values: Tensor, bitmask: Tensor, n: int, m: int) -> Tensor:
    """Unpack values [out, K N / M] and bitmask [out, ceil(K / 8)] to [out, K], by operations that ONNX has."""
    k = values.shape[1] // n * m
    powers = 2 ** torch.arange(8, device=bitmask.device, dtype=torch.int32)
    # ONNX shifts only unsigned integers
    bits = torch.remainder(torch.div(bitmask.to(torch.int32).unsqueeze(-1), powers, rounding_mode="floor"), 2)
    kept = bits.flatten(-2)[:, :k].unflatten(-1, (-1, m))
    index = (kept.to(torch.int64).cumsum(-1) - 1).clamp(min=0)
    return torch.where(kept != 0, values.unflatten(-1, (-1, n)).gather(2, index), 0.0).flatten(-2)


def pack_24(weight: Tensor) -> PackedNM:
    """``pack_nm`` with the pattern 2:4."""
    return pack_nm(weight, "2:4")


def sparse24_linear(x: Tensor, packed: PackedNM, bias: Tensor | None = None) -> Tensor:
    """``nm_linear`` with a 2:4 weight."""
    return nm_linear(x, packed, bias)


class NMLinear(nn.Module):
    """nn.Linear with a packed N:M weight: for 2:4, half of the values and a bit for each weight.

    Gradients flow to the input, and to bias and values if they require one, which by default they do not. Integers are
    a buffer and never change: ``to(dtype)`` converts their scales, and ``requires_grad_()`` affects the bias alone. If
    a model's cast is refused because of one layer, the layers before it have been cast.
    The state_dict contains ``values``, ``bitmask``, ``bias``, and ``scales`` of integers. ``weight`` is read-only.

    Args:
        packed: the weight, see ``pack_nm``.
        bias: [out] of the weight's dtype, or None.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    def __init__(self, packed: PackedNM, bias: Tensor | None = None):
        super().__init__()
        if not isinstance(packed, PackedNM):
            raise TypeError(f"packed: expected a PackedNM, got {describe(packed)}")
        self.pattern = packed.pattern
        self.out_features, self.in_features = packed.shape
        if packed.scales is not None:
            # a buffer: as a parameter of integers it would make the model's requires_grad_() fail
            self.register_buffer("values", packed.values)
        else:
            self.values = nn.Parameter(packed.values.detach(), requires_grad=False)
        self.register_buffer("bitmask", packed.bitmask)
        self.register_buffer("scales", packed.scales)
        dtype = packed.dtype
        device = packed.values.device
        shape = (self.out_features,)
        if bias is not None and (getattr(bias, "shape", None) != shape or bias.dtype != dtype or bias.device != device):
            raise ValueError(f"bias: expected {list(shape)} of {dtype} on {device}, got {describe(bias)}")
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @classmethod
    def from_dense(cls, linear: nn.Linear, pattern: str | NMPattern, values: str = KEEP, group: int = 64) -> NMLinear:
        """Pack an nn.Linear in which at most N of every M consecutive weights are not zero, see ``pack_nm``.

        Raises:
            TypeError, ValueError: ``linear`` is not an nn.Linear, or as in ``pack_nm``.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected nn.Linear, got {type(linear).__name__}")
        return cls(pack_nm(linear.weight, pattern, values, group), linear.bias).train(linear.training)

    @classmethod
    def from_masked(cls, layer: MaskedLinear, values: str = KEEP, group: int = 64) -> NMLinear:
        """Pack the weight of a MaskedLinear under the N largest logits of every group, see ``pack_nm``.

        Raises:
            TypeError, ValueError: ``layer`` is not a MaskedLinear, is cut over ranks, or as in ``pack_nm``.
        """
        if not isinstance(layer, MaskedLinear):
            raise TypeError(f"layer: expected MaskedLinear, got {type(layer).__name__}")
        return cls(pack_nm(layer.top_n_weight(), layer.pattern, values, group), layer.bias).train(layer.training)

    @property
    def weight(self) -> Tensor:
        """The weight [out, K], unpacked at each access, for code that reads a module's weight or its dtype.

        Gradients flow to values that require one. Writes into the result have no effect on the module.
        """
        return ops.unpacked(self.values, self.bitmask, self.scales, self.pattern.n, self.pattern.m)

    @property
    def kind(self) -> str:
        """Storage of the values: one of VALUE_KINDS."""
        return INTEGER_KINDS.get(self.values.dtype, KEEP)

    @property
    def packed(self) -> PackedNM:
        return PackedNM(self.values.detach(), self.bitmask, self.pattern, self.scales)

    def forward(self, input: Tensor) -> Tensor:
        """y [..., out] of input [..., K]."""
        pattern = self.pattern
        try:
            # faster than attributes, which torch looks for in three other places first
            parameters = self._parameters
            buffers = self._buffers
            scales = buffers["scales"]
            values = (parameters if scales is None else buffers)["values"]
            parts = values, buffers["bitmask"], scales, parameters["bias"]
        except KeyError:
            # DataParallel and FSDP replace parameters by plain attributes
            parts = self.values, self.bitmask, self.scales, self.bias
        return packed_linear(input, *parts, pattern)

    def convert_bitmask(self) -> None:
        """Convert the bitmask to the form for its device, see ``PackedNM``."""
        self._buffers["bitmask"] = bitmask_for_device(self.bitmask, self.values, self.pattern)

    def _apply(self, fn, recurse: bool = True) -> NMLinear:
        check_range(self.values, self.scales, check_cast(fn, self.values if self.scales is None else self.scales))
        super()._apply(fn, recurse)
        self.convert_bitmask()
        return self

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        self.convert_bitmask()

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        bitmask = as_bitmask(destination[f"{prefix}bitmask"], self.in_features, self.out_features)
        destination[f"{prefix}bitmask"] = bitmask

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        *_, errors = args
        current = {"values": self.values, "bitmask": self.bitmask, "scales": self.scales}
        loaded = {name: state_dict.get(f"{prefix}{name}", tensor) for name, tensor in current.items()}
        dtypes = LOGIT_DTYPES if self.scales is None else (self.values.dtype,)
        if loaded["values"].dtype not in dtypes:
            expected = " or ".join(map(str, dtypes))
            errors.append(f"state_dict: {prefix}values: expected {expected}, got {describe(loaded['values'])}")
            return
        if any(f"{prefix}{name}" in state_dict for name in current) and not loaded["bitmask"].is_meta:
            try:
                PackedNM(**loaded, pattern=self.pattern).check()
            except (TypeError, ValueError) as error:
                errors.append(f"state_dict: {prefix}{error}")
                return
            if loaded["bitmask"].dtype != self.bitmask.dtype:
                bitmask = as_bitmask(loaded["bitmask"], self.in_features, self.out_features)
                bitmask = metadata_of(bitmask) if self.bitmask.dtype == torch.int16 else bitmask
                state_dict = {**state_dict, f"{prefix}bitmask": bitmask}
        super()._load_from_state_dict(state_dict, prefix, *args)
        # the tensors may have been assigned, from another device
        self.convert_bitmask()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"pattern={self.pattern}" + (f", values={self.kind}" if self.scales is not None else "")
        )


class Sparse24Linear(NMLinear):
    """``NMLinear`` with the pattern 2:4."""

    @classmethod
    def from_dense(
        cls, linear: nn.Linear, pattern: str | NMPattern = "2:4", values: str = KEEP, group: int = 64
    ) -> Sparse24Linear:
        return super().from_dense(linear, pattern, values, group)


class Int8Linear(nn.Module):
    """nn.Linear with a weight of int8 values, for the output layer beside packed layers.

    A block of 128 values of a row shares a scale, see ``pack_nm``. Gradients flow to the input, and to the bias if it
    requires one. ``to(dtype)`` converts scales and bias. The state_dict contains ``values``, ``scales`` and ``bias``.
    ``weight`` is read-only.

    Args:
        values: int8 [out, K].
        scales: float32, bfloat16 or float16 [out, ceil(K / 128)], not negative.
        bias: [out] of the scales' dtype, or None.

    Raises:
        TypeError, ValueError: an argument is not as above; ``check`` tests the scales.
    """

    def __init__(self, values: Tensor, scales: Tensor, bias: Tensor | None = None):
        super().__init__()
        for name, tensor, dtypes in (("values", values, (torch.int8,)), ("scales", scales, LOGIT_DTYPES)):
            if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes:
                raise TypeError(f"{name}: expected a tensor of {' or '.join(map(str, dtypes))}, got {describe(tensor)}")
        if values.dim() != 2 or not values.numel():
            raise ValueError(f"values: expected a matrix [out, K], got {describe(values)}")
        self.out_features, self.in_features = values.shape
        shapes = {"scales": (self.out_features, -(-self.in_features // SCALED)), "bias": (self.out_features,)}
        for name, tensor in (("scales", scales), ("bias", bias)):
            if tensor is not None and (
                getattr(tensor, "shape", None) != shapes[name]
                or tensor.dtype != scales.dtype
                or tensor.device != values.device
            ):
                raise ValueError(
                    f"{name}: expected {list(shapes[name])} of {scales.dtype} on {values.device}, got "
                    f"{describe(tensor)}"
                )
        # buffers, as in ``NMLinear``
        self.register_buffer("values", values.contiguous())
        self.register_buffer("scales", scales.contiguous())
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @classmethod
    def from_dense(cls, linear: nn.Linear) -> Int8Linear:
        """Round the weight of an nn.Linear to the nearest int8 values.

        Raises:
            TypeError, ValueError: ``linear`` is not an nn.Linear, or a weight is not finite.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected nn.Linear, got {type(linear).__name__}")
        return cls(*quantized(linear.weight.detach()), linear.bias).train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The weight [out, K], dequantized at each access, for code that reads a module's weight or its dtype."""
        return dequantized(self.values, self.scales, self.scales.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scales.nbytes

    def check(self) -> Int8Linear:
        """Check that the scales are finite and not negative; return itself.

        Raises:
            ValueError: if the scales are not so.
        """
        check_int8_scales(self.scales)
        return self

    def forward(self, input: Tensor) -> Tensor:
        """y [..., out] of input [..., K]."""
        values = self.values
        scales = self.scales
        bias = self.bias
        check_not_distributed("values", values)
        x = linear_input(input, bias, values.shape, scales.dtype, values.device)
        if x.dtype != scales.dtype:
            # under autocast
            scales = scales.to(x.dtype)
            bias = None if bias is None else bias.to(x.dtype)
        transformed = in_forward_mode() or not torch.compiler.is_compiling() and in_transform()
        if transformed or in_onnx_export() or needs_gradient(x, bias):
            # torch has the derivatives of each kind
            return nn.functional.linear(x, dequantized(values, scales, x.dtype), bias)
        y = ops.int8_linear(tokens_of(x), values, scales, bias)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn, recurse: bool = True) -> Int8Linear:
        check_range(self.values, self.scales, check_cast(fn, self.scales))
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        *_, errors = args
        values = state_dict.get(f"{prefix}values", self.values)
        scales = state_dict.get(f"{prefix}scales", self.scales)
        for name, tensor, dtypes in (("values", values, (torch.int8,)), ("scales", scales, LOGIT_DTYPES)):
            if tensor.dtype not in dtypes:
                expected = " or ".join(map(str, dtypes))
                errors.append(f"state_dict: {prefix}{name}: expected {expected}, got {describe(tensor)}")
                return
        try:
            check_int8_scales(scales)
        except ValueError as error:
            errors.append(f"state_dict: {prefix}{error}")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


# Layers that drop weights
SPARSE = (MaskedLinear, NMLinear)
# Layers in place of an nn.Linear
REPLACING = (*SPARSE, Int8Linear)


def dense_layer(layer: MaskedLinear | NMLinear | Int8Linear) -> nn.Linear:
    """Make an nn.Linear with exact zeros for dropped weights; a MaskedLinear keeps its N largest logits."""
    if isinstance(layer, MaskedLinear) and layer.shard is not None:
        return layer.as_linear_of_shards()
    if isinstance(layer, MaskedLinear):
        weight = layer.top_n_weight()
        trained = layer.weight.requires_grad
    elif isinstance(layer, Int8Linear):
        weight = layer.weight
        trained = False
    else:
        weight = layer.packed.unpack()
        trained = layer.values.requires_grad
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=trained)
    linear.bias = layer.bias
    return linear.train(layer.training)


def bits_a_weight(layers: Iterable[NMLinear]) -> float:
    """Bits that packed layers store for each weight, dropped weights included."""
    weights = [layer.packed for layer in layers]
    return 8 * sum(packed.nbytes for packed in weights) / sum(packed.shape.numel() for packed in weights)


def packed_class(pattern: str | NMPattern) -> type[NMLinear]:
    """Class of the layers with packed weights of a pattern."""
    return Sparse24Linear if NMPattern(pattern) == NMPattern("2:4") else NMLinear


def hold_in_huge_pages(model: nn.Module) -> None:
    """Ask Linux to move a model's packed and int8 weights on a CPU into huge pages; do nothing if it cannot.

    The bandwidth of memory bounds decoding. A CPU prefetches sequential memory only up to the end of a page. Weights of
    vLLM's layers are moved without this call. It moves the memory of the process, not the mapped file of a checkpoint
    that transformers loads in its own dtype: copy such a model before.
    """
    layers = [module for module in model.modules() if isinstance(module, (NMLinear, Int8Linear))]
    tensors = (getattr(layer, name, None) for layer in layers for name in ("values", "bitmask", "scales"))
    move_into_huge_pages(tensor for tensor in tensors if tensor is not None)


def page_ranges(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Whole pages [start, end) of tensors: neighbours joined, ranges that are mostly other memory left out."""
    spans = sorted((x.data_ptr(), x.nbytes) for x in tensors if x.numel())
    joined: list[tuple[int, int, int]] = []
    for start, nbytes in spans:
        end = start + nbytes
        if joined and start - joined[-1][1] < HUGE_PAGE:
            first, last, filled = joined[-1]
            joined[-1] = first, max(last, end), filled + nbytes
        else:
            joined.append((start, end, nbytes))
    size = mmap.PAGESIZE
    return [
        (start // size * size, -(-end // size) * size)
        for start, end, filled in joined
        if end - start >= HUGE_PAGE and 2 * filled >= end - start
    ]


def move_into_huge_pages(tensors: Iterable[Tensor]) -> None:
    """Ask Linux to move tensors on the CPU into huge pages, without a copy; small neighbours share a page."""
    madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
    for start, end in page_ranges(x for x in tensors if x.device.type == "cpu") if madvise is not None else ():
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_COLLAPSE)
