"""Packed N:M weights: the kept values and a bitmask, products with them, and the modules that hold them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import ops
from .functional.checks import LOGIT_DTYPES, check_exactly_n, check_not_distributed, describe
from .functional.masks import expand_mask
from .modules import MaskedLinear
from .ops.onnx_graph import in_onnx_export, unpacked_weight
from .pattern import NMPattern, bitmask_of, codes_of


@dataclass(frozen=True, eq=False)
class PackedNM:
    """A weight [out, K] of which N of every M consecutive values are stored.

    Attributes:
        values: float32, bfloat16 or float16 [out, K N / M], contiguous: the kept values in order.
        bitmask: uint8 [out, ceil(K / 8)], contiguous: bit j of byte b is set where weight 8 b + j is kept.
        pattern: "N:M" or NMPattern.

    Raises:
        TypeError, ValueError: shapes or dtypes are not as above. That the bitmask keeps N of every M is not checked
            here, see ``check``.
    """

    values: Tensor
    bitmask: Tensor
    pattern: NMPattern

    def __post_init__(self):
        object.__setattr__(self, "pattern", NMPattern(self.pattern))
        check_shapes(self.values, self.bitmask, self.pattern)

    @property
    def shape(self) -> torch.Size:
        """[out, K]."""
        return torch.Size((self.values.shape[0], self.values.shape[1] // self.pattern.n * self.pattern.m))

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return self.values.nbytes + self.bitmask.nbytes

    def check(self) -> PackedNM:
        """Itself, if the bitmask keeps N of every M.

        Raises:
            ValueError: if it does not.
        """
        check_bitmask(self.bitmask, self.shape[1], self.pattern)
        return self

    def unpack(self) -> Tensor:
        """The weight [out, K], +0.0 where nothing is stored."""
        return ops.unpack_nm(self.values, self.bitmask, self.pattern.n, self.pattern.m)


def check_shapes(values: Tensor, bitmask: Tensor, pattern: NMPattern) -> None:
    """Raise TypeError or ValueError unless these can be a packed weight."""
    for name, tensor, dtypes in (("values", values, LOGIT_DTYPES), ("bitmask", bitmask, (torch.uint8,))):
        if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes:
            raise TypeError(f"{name}: expected a tensor of {' or '.join(map(str, dtypes))}, got {describe(tensor)}")
        if tensor.dim() != 2 or not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous matrix, got {describe(tensor)}")
    if values.shape[1] == 0 or values.shape[1] % pattern.n:
        raise ValueError(f"values: expected a last dimension divisible by {pattern.n}, got {describe(values)}")
    expected = [values.shape[0], -(-(values.shape[1] // pattern.n * pattern.m) // 8)]
    if list(bitmask.shape) != expected or bitmask.device != values.device:
        raise ValueError(
            f"bitmask: expected {expected} on {values.device} beside {pattern} values {list(values.shape)}, "
            f"got {describe(bitmask)}"
        )


def check_bitmask(bitmask: Tensor, k: int, pattern: NMPattern) -> None:
    """Raise ValueError unless the bitmask of a weight [rows, K] keeps N of every M, and nothing beyond K."""
    check_exactly_n("bitmask", codes_of(bitmask, k, pattern.m), pattern)
    if k % 8 and (bitmask[:, -1] >> k % 8).any():
        raise ValueError(f"bitmask: expected no bits beyond the {k} weights of a row, got some")


def pack_nm(weight: Tensor, pattern: str | NMPattern) -> PackedNM:
    """Pack a weight in which at most N of every M consecutive values are not zero.

    Where fewer are, zeros are stored as well, -0.0 before +0.0. A -0.0 for which no room is left comes back as +0.0.

    Args:
        weight: float32, bfloat16 or float16 [out, K], K divisible by M.
        pattern: "N:M" or NMPattern.

    Raises:
        TypeError, ValueError: an argument is not as above, or more than N of a group are not zero.
    """
    pattern = NMPattern(pattern)
    if not isinstance(weight, Tensor) or weight.dtype not in LOGIT_DTYPES:
        raise TypeError(f"weight: expected float32, bfloat16 or float16, got {describe(weight)}")
    if weight.dim() != 2 or weight.shape[1] == 0 or weight.shape[1] % pattern.m:
        raise ValueError(f"weight: expected [out, K] with K divisible by {pattern.m}, above 0, got {describe(weight)}")
    weight = weight.detach().contiguous()
    rows, k = weight.shape
    counts = (weight != 0).view(rows, k // pattern.m, pattern.m).sum(-1)
    if (counts > pattern.n).any():
        row, group = (counts > pattern.n).nonzero()[0].tolist()
        raise ValueError(
            f"weight: expected at most {pattern.n} of every {pattern.m} values that are not zero, "
            f"got {int(counts[row, group])} in row {row}, columns {group * pattern.m} to "
            f"{group * pattern.m + pattern.m - 1} ({int((counts > pattern.n).sum())} groups have too many)"
        )
    # a value that is not zero before -0.0, and that before +0.0
    worth = ((weight != 0).to(torch.bfloat16) * 2).add_(weight.signbit() & (weight == 0))
    codes = ops.top_n_mask(worth, pattern.n, pattern.m)
    values = weight[expand_mask(codes, pattern)].view(rows, k // pattern.m * pattern.n)
    return PackedNM(values, bitmask_of(codes, pattern.m), pattern)


def nm_linear(x: Tensor, packed: PackedNM, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias of a packed weight.

    On a GPU, 16-bit values of 2:4, 1:4, 4:8 and 8:16 with K divisible by 16 (1:4: 32) are unpacked inside the
    product for up to 64 tokens. Otherwise the weight is unpacked into a transient one first.

    Args:
        x: [..., K] of the values' dtype, or under autocast of any. Gradients flow to it.
        packed: from ``pack_nm``. Gradients flow to its values where they require one.
        bias: [out] of the values' dtype. Gradients flow to it.

    Returns:
        [..., out].

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    if not isinstance(packed, PackedNM):
        raise TypeError(f"packed: expected a PackedNM, got {describe(packed)}")
    return packed_linear(x, packed.values, packed.bitmask, bias, packed.pattern)


def packed_linear(x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None, pattern: NMPattern) -> Tensor:
    """``nm_linear`` of the parts of a packed weight."""
    check_not_distributed("values", values)
    rows, k = values.shape[0], values.shape[1] // pattern.n * pattern.m
    if values.dtype not in LOGIT_DTYPES:
        raise TypeError(f"values: expected float32, bfloat16 or float16, got {describe(values)}")
    if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[-1] != k or x.device != values.device:
        raise ValueError(f"x: expected a tensor [..., {k}] on {values.device}, got {describe(x)}")
    if bias is not None and (
        not isinstance(bias, Tensor)
        or bias.shape != (rows,)
        or bias.dtype != values.dtype
        or bias.device != values.device
    ):
        raise ValueError(f"bias: expected a tensor [{rows}] of {values.dtype} on {values.device}, got {describe(bias)}")
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype in LOGIT_DTYPES:
        dtype = torch.get_autocast_dtype(device)
        x, values, bias = x.to(dtype), values.to(dtype), None if bias is None else bias.to(dtype)
    elif x.dtype != values.dtype:
        raise TypeError(f"x: expected the values' dtype {values.dtype}, got {describe(x)}")
    if in_onnx_export():
        return nn.functional.linear(x, unpacked_weight(values, bitmask, pattern.n, pattern.m), bias)
    tokens = x.reshape(math.prod(x.shape[:-1]), k).contiguous()
    bias = None if bias is None else bias.contiguous()
    y = ops.nm_linear(tokens, values, bitmask, bias, pattern.n, pattern.m)
    return y.view(*x.shape[:-1], rows)


def pack_24(weight: Tensor) -> PackedNM:
    """``pack_nm`` of 2:4."""
    return pack_nm(weight, "2:4")


def sparse24_linear(x: Tensor, packed: PackedNM, bias: Tensor | None = None) -> Tensor:
    """``nm_linear`` of a 2:4 weight.

    Raises:
        ValueError: if ``packed`` is of another pattern.
        TypeError, ValueError: as ``nm_linear``.
    """
    if isinstance(packed, PackedNM) and packed.pattern != NMPattern("2:4"):
        raise ValueError(f"packed: expected 2:4, got {packed.pattern}")
    return nm_linear(x, packed, bias)


class NMLinear(nn.Module):
    """nn.Linear with a packed N:M weight: half the values of 2:4, and a bit for each weight.

    Gradients flow to the input, and to bias and values where they require one. At first they do not. The state_dict
    holds ``values``, ``bitmask`` and ``bias``; ``weight`` can only be read.

    Args:
        packed: the weight, see ``pack_nm``.
        bias: [out] of the values' dtype, or None.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    def __init__(self, packed: PackedNM, bias: Tensor | None = None):
        super().__init__()
        if not isinstance(packed, PackedNM):
            raise TypeError(f"packed: expected a PackedNM, got {describe(packed)}")
        self.pattern = packed.pattern
        self.out_features, self.in_features = packed.shape
        self.values = nn.Parameter(packed.values.detach(), requires_grad=False)
        self.register_buffer("bitmask", packed.bitmask)
        values = packed.values
        if bias is not None and (
            bias.shape != (self.out_features,) or bias.dtype != values.dtype or bias.device != values.device
        ):
            raise ValueError(
                f"bias: expected [{self.out_features}] of {values.dtype} on {values.device}, got {describe(bias)}"
            )
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_dense(cls, linear: nn.Linear, pattern: str | NMPattern) -> NMLinear:
        """Pack an nn.Linear in which at most N of every M consecutive weights are not zero.

        Raises:
            TypeError, ValueError: ``linear`` is no nn.Linear, or as ``pack_nm``.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected nn.Linear, got {type(linear).__name__}")
        return cls(pack_nm(linear.weight, pattern), linear.bias).train(linear.training)

    @classmethod
    def from_masked(cls, layer: MaskedLinear) -> NMLinear:
        """Pack the weight of a MaskedLinear under the N largest logits of every group.

        Raises:
            TypeError: if ``layer`` is no MaskedLinear.
        """
        if not isinstance(layer, MaskedLinear):
            raise TypeError(f"layer: expected MaskedLinear, got {type(layer).__name__}")
        return cls(pack_nm(layer.top_n_weight(), layer.pattern), layer.bias).train(layer.training)

    @property
    def weight(self) -> Tensor:
        """The weight [out, K], unpacked at each use: for code that reads it past the module, or asks for its dtype.

        A gradient flows to values that require one. What is written into it is lost.
        """
        return ops.unpack_nm(self.values, self.bitmask, self.pattern.n, self.pattern.m)

    @property
    def packed(self) -> PackedNM:
        return PackedNM(self.values.detach(), self.bitmask, self.pattern)

    def forward(self, input: Tensor) -> Tensor:
        """y [..., out] of input [..., K]."""
        return packed_linear(input, self.values, self.bitmask, self.bias, self.pattern)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        *_, errors = args
        values, bitmask = (state_dict.get(f"{prefix}{name}") for name in ("values", "bitmask"))
        if bitmask is not None and not bitmask.is_meta:
            try:
                check_shapes(self.values if values is None else values, bitmask, self.pattern)
                check_bitmask(bitmask, self.in_features, self.pattern)
            except (TypeError, ValueError) as error:
                errors.append(f"state_dict: {prefix}{error}")
                return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"pattern={self.pattern}"
        )


class Sparse24Linear(NMLinear):
    """``NMLinear`` of 2:4.

    Raises:
        ValueError: if ``packed`` is of another pattern.
        TypeError, ValueError: as ``NMLinear``.
    """

    def __init__(self, packed: PackedNM, bias: Tensor | None = None):
        if isinstance(packed, PackedNM) and packed.pattern != NMPattern("2:4"):
            raise ValueError(f"packed: expected 2:4, got {packed.pattern}")
        super().__init__(packed, bias)

    @classmethod
    def from_dense(cls, linear: nn.Linear, pattern: str | NMPattern = "2:4") -> Sparse24Linear:
        """``NMLinear.from_dense`` of 2:4."""
        return super().from_dense(linear, pattern)


def packed_class(pattern: str | NMPattern) -> type[NMLinear]:
    """The class of layers with packed weights of a pattern."""
    return Sparse24Linear if NMPattern(pattern) == NMPattern("2:4") else NMLinear
