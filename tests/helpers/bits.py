"""Equality of tensors bit by bit, and where they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Tensors, or lists and dicts of them
Tensors = Tensor | Sequence["Tensors"] | Mapping[str, "Tensors"]


def assert_same_bits(actual: Tensors, expected: Tensors, m: int = 1) -> None:
    """Every element has the bits of the other; only a NaN equals another one of any bits.

    Args:
        actual, expected: tensors of any dtype and device, or lists or dicts of as many.
        m: elements of the last dimension in a group, which an error shows together: M of weights and logits, 1 of
            group codes.

    Raises:
        AssertionError: names the first group that differs by its index, and shows the bits of both.
    """
    difference = first_difference(actual, expected, m)
    assert difference is None, difference


def first_difference(actual: Tensors, expected: Tensors, m: int = 1) -> str | None:
    """Message of ``assert_same_bits``; None if all bits are equal."""
    if isinstance(expected, Tensor):
        return _of_tensors(actual, expected, m)
    if isinstance(expected, Mapping):
        keys, other = list(expected), list(actual)
    else:
        keys, other = range(len(expected)), range(len(actual))
    if set(keys) != set(other):
        return f"expected {list(keys)}, got {list(other)}"
    found = ((key, first_difference(actual[key], expected[key], m)) for key in keys)
    return next((f"{key!r}: {difference}" for key, difference in found if difference is not None), None)


def _of_tensors(actual: Tensor, expected: Tensor, m: int) -> str | None:
    for name in ("dtype", "shape"):
        one, other = getattr(actual, name), getattr(expected, name)
        if one != other:
            return f"{name}: expected {other}, got {one}"
    if not expected.numel():
        return None
    actual, expected = (tensor.detach().cpu().contiguous() for tensor in (actual, expected))
    bits, others = (tensor.view(INTEGERS[tensor.itemsize]) for tensor in (actual, expected))
    differs = (bits != others) & ~(actual.isnan() & expected.isnan())
    groups = differs.reshape(*differs.shape[:-1], -1, m).any(-1) if differs.dim() else differs
    if not groups.any():
        return None
    index = tuple(groups.nonzero()[0].tolist())
    start = index[-1] * m if index else 0
    shown = [_shown(tensor[index[:-1]][start : start + m] if index else tensor) for tensor in (actual, expected)]
    return f"group {index} has {shown[0]}, expected {shown[1]}; {int(groups.sum())} of {groups.numel()} differ"


def _shown(group: Tensor) -> str:
    digits, bits = 2 * group.itemsize, group.view(INTEGERS[group.itemsize]).flatten().tolist()
    patterns = " ".join(f"{value % 16**digits:0{digits}x}" for value in bits)
    return f"{patterns} ({', '.join(f'{value:.9g}' for value in group.flatten().tolist())})"
