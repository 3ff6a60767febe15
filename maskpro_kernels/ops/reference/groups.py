"""Matrices as groups, groups as columns, group codes, and packed weights, which store kept values only."""

from __future__ import annotations

import torch

from .. import philox
from ..pattern import as_bitmask, codes_of

# Integer dtypes for the bits of floats, by bytes
INTEGERS = {2: torch.int16, 4: torch.int32}
# Kept values of a row that share a scale: of int8 values, and of int4 values, by default the first number
SCALED = 128
INT4_GROUPS = (64, 32, 128)


def grouped(x, m):
    """View [rows, K] as [rows, K / M, M]."""
    return x.view(x.shape[0], x.shape[1] // m, m)


def columns(x):
    """M columns of groups [..., M]."""
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
    """Index of each group of a matrix [rows, K] in the whole layer, int64 [rows, K / M]."""
    return philox.group_index(x.shape[0], x.shape[1] // m, counter.group_offset, counter.group_row_stride, x.device)


def group_unpacked(values, codes, *, m):
    """Groups [..., M] with the N values [..., N] at the kept places of the code, in order, and zeros elsewhere."""
    values = columns(values)
    kept = decode(codes, m)
    n = len(values)
    before = torch.zeros_like(kept[0], dtype=torch.int32)
    out = []
    for i in range(m):
        # range of the index of this column's value: the later values need room as well
        fewest = max(0, i - (m - n))
        most = min(i, n - 1)
        value = values[fewest]
        for count in range(fewest + 1, most + 1):
            value = torch.where(before >= count, values[count], value)
        out.append(torch.where(kept[i], value, 0))
        before = before + kept[i].to(torch.int32)
    return uncolumns(out)


def unpack_nm(values, bitmask, n, m):
    """Unpack values [rows, K N / M] and their bitmask, or metadata of 2:4, to [rows, K], bit for bit."""
    k = values.shape[1] // n * m
    bitmask = as_bitmask(bitmask, k, len(values))
    as_integers = values.view(INTEGERS[values.itemsize])
    return group_unpacked(grouped(as_integers, n), codes_of(bitmask, k, m), m=m).flatten(1).view(values.dtype)


def kept_values(values):
    """Number of values in a row: bytes of dtype uint8 have two int4 values each."""
    return values.shape[1] * (2 if values.dtype == torch.uint8 else 1)


def scaled_group(values, scales):
    """Number of values of a row that share a scale; with one scale a row, the first of those possible."""
    kept = kept_values(values)
    blocks = scales.shape[1]
    sizes = INT4_GROUPS if values.dtype == torch.uint8 else (SCALED,)
    return next((size for size in sizes if -(-kept // size) == blocks), None)


def numbers_of(values):
    """int8 values from bytes of two int4 values each, two's complement: the lower four bits are the first value."""
    if values.dtype == torch.int8:
        return values
    halves = torch.stack((values & 15, values >> 4), dim=-1).flatten(1).to(torch.int8)
    return torch.where(halves > 7, halves - 16, halves)


def dequantized(values, scales, dtype):
    """int8 or int4 values [rows, values] times the scale of each block of a row, rounded to a dtype once."""
    numbers = numbers_of(values)
    each = scales.float().repeat_interleave(scaled_group(values, scales), dim=1)[:, : numbers.shape[1]]
    return (numbers.float() * each).to(dtype)


def _unpacked(values, bitmask, scales, dtype, n, m):
    return unpack_nm(values if scales is None else dequantized(values, scales, dtype), bitmask, n, m)


def nm_linear(x, values, bitmask, scales, bias, n, m):
    """x [tokens, K] @ weight [rows, K].T + bias."""
    return torch.nn.functional.linear(x, _unpacked(values, bitmask, scales, x.dtype, n, m), bias)


def nm_linear_input_grad(grad, values, bitmask, scales, n, m):
    """grad [tokens, rows] @ weight [rows, K]."""
    return grad @ _unpacked(values, bitmask, scales, grad.dtype, n, m)


def packed_part(dense, bitmask, n, m):
    """Part of a matrix [rows, K] that the bitmask keeps: [rows, K N / M], in the order of stored values."""
    rows, k = dense.shape
    kept = uncolumns(decode(codes_of(bitmask, k, m), m))
    # a stable sort gives the kept ones in order, then the others
    order = kept.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :n]
    return grouped(dense, m).gather(-1, order).reshape(rows, k // m * n)
