"""Matrices as groups, groups as columns, group codes, and packed weights, which hold the kept values alone."""

from __future__ import annotations

import torch

from .. import philox
from ..pattern import codes_of

# Integers of so many bytes hold the bits of floats
INTEGERS = {2: torch.int16, 4: torch.int32}
# Kept values of a row that share a scale
SCALED = 128


def grouped(x, m):
    """[rows, K] as [rows, K / M, M]."""
    return x.view(x.shape[0], x.shape[1] // m, m)


def columns(x):
    """The M columns of groups [..., M]."""
    return list(x.unbind(-1))


def uncolumns(xs):
    """Groups [..., M] from their columns."""
    return torch.stack(xs, dim=-1)


def encode(kept, dtype):
    """Group codes from bool columns."""
    code = kept[0].to(torch.int32)
    for i in range(1, len(kept)):
        code = code | kept[i].to(torch.int32) << i
    return code.to(dtype)


def decode(codes, m):
    """Bool columns from group codes."""
    code = codes.to(torch.int32)
    return [(code >> i & 1) != 0 for i in range(m)]


def fixed_sum(xs):
    """Sum in index order."""
    total = xs[0]
    for x in xs[1:]:
        total = total + x
    return total


def group_index(x, counter, m):
    """Index in the whole layer of every group of a matrix [rows, K], int64 [rows, K / M]."""
    return philox.group_index(x.shape[0], x.shape[1] // m, counter.group_offset, counter.group_row_stride, x.device)


def group_unpacked(values, codes, *, m):
    """[..., M]: the N values [..., N] of each group in order where its code keeps, zeros elsewhere."""
    values, kept = columns(values), decode(codes, m)
    n = len(values)
    before = torch.zeros_like(kept[0], dtype=torch.int32)
    out = []
    for i in range(m):
        # so many of the values stand before: all that lie behind have to find room as well
        fewest, most = max(0, i - (m - n)), min(i, n - 1)
        value = values[fewest]
        for count in range(fewest + 1, most + 1):
            value = torch.where(before >= count, values[count], value)
        out.append(torch.where(kept[i], value, 0))
        before = before + kept[i].to(torch.int32)
    return uncolumns(out)


def unpack_nm(values, bitmask, *, n, m):
    """[rows, K] of values [rows, K N / M] and their bitmask, bit for bit."""
    k = values.shape[1] // n * m
    as_integers = values.view(INTEGERS[values.itemsize])
    return group_unpacked(grouped(as_integers, n), codes_of(bitmask, k, m), m=m).flatten(1).view(values.dtype)


def dequantized(values, scales, dtype):
    """int8 values [rows, values] times those of scales [rows, ceil(values / SCALED)], rounded to a dtype once."""
    each = scales.float().repeat_interleave(SCALED, dim=1)[:, : values.shape[1]]
    return (values.float() * each).to(dtype)


def _unpacked(values, bitmask, scales, dtype, n, m):
    return unpack_nm(values if scales is None else dequantized(values, scales, dtype), bitmask, n=n, m=m)


def nm_linear(x, parts, bias, n, m):
    """x [tokens, K] @ weight [rows, K].T + bias; parts are (values, bitmask, scales or None)."""
    return torch.nn.functional.linear(x, _unpacked(*parts, x.dtype, n, m), bias)


def input_grad(grad, parts, n, m):
    """grad [tokens, rows] @ weight [rows, K]."""
    return grad @ _unpacked(*parts, grad.dtype, n, m)


def packed_part(dense, bitmask, *, n, m):
    """The part of a matrix [rows, K] that the bitmask keeps: [rows, K N / M], in order, as values are stored."""
    rows, k = dense.shape
    kept = uncolumns(decode(codes_of(bitmask, k, m), m))
    # stable: the kept ones in their order, then the others
    order = kept.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :n]
    return grouped(dense, m).gather(-1, order).reshape(rows, k // m * n)
