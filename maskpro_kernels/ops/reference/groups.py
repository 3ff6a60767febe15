"""Matrices as groups, groups as columns, and group codes."""

from __future__ import annotations

import torch

from .. import philox


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
