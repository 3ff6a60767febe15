"""Which N:M patterns a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..packed import PackedNM, check_bitmask
from ..pattern import GROUP_SIZES, NMPattern
from ..safetensors_files import check_parts, read_tensor, tensor_files
from .importers.compressed_tensors import COMPRESSED, decompressed_weight

# The parts that a weight is stored in by this package, with int8 values or others
PACKED = ("values", "bitmask")
SCALED = (*PACKED, "scales")


@dataclass(frozen=True)
class Survey:
    """What a weight of a checkpoint holds.

    Attributes:
        name: of the weight.
        shape: [out, K].
        density: share of its values that are not zero.
        negative_zeros: how many are -0.0.
        patterns: for each M that divides K, the smallest N:M that it follows, N < M; the tightest first.
        packed: whether it is stored packed.
        stored: the dtype that its values have in the file.
    """

    name: str
    shape: tuple[int, int]
    density: float
    negative_zeros: int
    patterns: tuple[str, ...]
    packed: bool
    stored: torch.dtype

    @property
    def alignment(self) -> int:
        """The largest power of two that divides K."""
        return self.shape[1] & -self.shape[1]


def survey(files: Iterable[Path]) -> Iterator[Survey]:
    """Of every matrix in these safetensors files, one at a time in memory; packed ones are unpacked.

    Raises:
        ValueError: if a packed weight is damaged.
    """
    where = tensor_files(files)
    for stored in sorted(where):
        name, _, part = stored.rpartition(".")
        form = _form(where, name)
        if form is None or part not in form:
            tensor = read_tensor(where[stored], stored)
            if tensor.dim() == 2 and tensor.is_floating_point():
                # floats of 8 bits know few operations
                weight = tensor.float() if tensor.itemsize == 1 else tensor
                yield _surveyed(stored, weight, packed=False, dtype=tensor.dtype)
        elif part == form[0]:
            check_parts(where, name, form)
            parts = [read_tensor(where[f"{name}.{other}"], f"{name}.{other}") for other in form]
            weight = decompressed_weight(name, *parts) if form == COMPRESSED else _unpacked(name, *parts)
            yield _surveyed(f"{name}.weight", weight, packed=True, dtype=parts[0].dtype)


def _form(where: Mapping[str, Path], name: str) -> tuple[str, ...] | None:
    """The parts that a weight is stored in, by the file of each tensor; None where it is not packed."""
    if f"{name}.compressed" in where:
        return COMPRESSED
    bitmask = f"{name}.bitmask"
    if f"{name}.values" in where and bitmask in where:
        with safe_open(where[bitmask], framework="pt") as opened:
            # other programs have tensors of these names too
            if opened.get_slice(bitmask).get_dtype() != "U8":
                return None
        with safe_open(where[f"{name}.values"], framework="pt") as opened:
            integers = opened.get_slice(f"{name}.values").get_dtype() == "I8"
        return SCALED if integers or f"{name}.scales" in where else PACKED
    return None


def _unpacked(name: str, values: Tensor, bitmask: Tensor, scales: Tensor | None = None) -> Tensor:
    """A packed weight whose pattern is not told beside it; ValueError if it is damaged."""
    if values.dim() != 2 or bitmask.dim() != 2:
        raise ValueError(
            f"checkpoint: expected matrices {name}.values and {name}.bitmask, got {list(values.shape)} and "
            f"{list(bitmask.shape)}"
        )
    pattern = _pattern_of(bitmask, values.shape[1])
    if pattern is None:
        raise ValueError(f"checkpoint: expected a bitmask in {name} that keeps N of every M for some N:M, got another")
    try:
        return PackedNM(values, bitmask, pattern, scales).check().unpack()
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint: {name}.{error}") from error


def _pattern_of(bitmask: Tensor, kept: int) -> NMPattern | None:
    """Of a bitmask with so many kept values a row: with the first M in whose groups equally many are kept."""
    for m in GROUP_SIZES:
        for k in range(8 * bitmask.shape[1], 8 * bitmask.shape[1] - 8, -1):
            n, rest = divmod(kept * m, k) if k > 0 and k % m == 0 else (0, 1)
            if rest or not 1 <= n < m:
                continue
            pattern = NMPattern(f"{n}:{m}")
            try:
                check_bitmask(bitmask, k, pattern)
            except ValueError:
                continue
            return pattern
    return None


def _surveyed(name: str, weight: Tensor, packed: bool, dtype: torch.dtype) -> Survey:
    rows, k = weight.shape
    kept = weight != 0
    patterns = []
    for m in GROUP_SIZES:
        if k and k % m == 0:
            most = int(kept.view(rows, -1, m).sum(-1).max()) if rows else 0
            if 1 <= most < m:
                patterns.append((most / m, m, f"{most}:{m}"))
    negative = int((weight.signbit() & ~kept).sum())
    density = float(kept.float().mean()) if weight.numel() else 0.0
    return Survey(name, (rows, k), density, negative, tuple(text for *_, text in sorted(patterns)), packed, dtype)
