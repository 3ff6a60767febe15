"""Triton kernels after the subjects of Triton's tutorials, written anew: vector add, softmax and matmul."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add(x, y, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    tl.store(out + at, tl.load(x + at, inside) + tl.load(y + at, inside), inside)


@triton.jit
def add_beyond_the_end(x, y, out, size, BLOCK: tl.constexpr):
    """`add` without its mask."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at) + tl.load(y + at))


@triton.jit
def count(x, total, BLOCK: tl.constexpr):
    """All programs add to one place without an atomic."""
    part = tl.sum(tl.load(x + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)))
    tl.store(total, tl.load(total) + part)


@triton.jit
def softmax(x, out, columns, stride, BLOCK: tl.constexpr):
    """One row a program."""
    at = tl.arange(0, BLOCK)
    row = tl.load(x + tl.program_id(0) * stride + at, at < columns, -float("inf"))
    powers = tl.exp2((row - tl.max(row)) * 1.4426950408889634)
    tl.store(out + tl.program_id(0) * stride + at, powers / tl.sum(powers), at < columns)


@triton.jit
def matmul(a, b, c, m, n, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """One tile of c [m, n] a program; a [m, k] and b [k, n] row by row, k a multiple of K."""
    rows, columns = tl.program_id(0) * M + tl.arange(0, M), tl.program_id(1) * N + tl.arange(0, N)
    steps = tl.arange(0, K)
    sums = tl.zeros((M, N), tl.float32)
    for start in range(0, k, K):
        left = tl.load(a + rows[:, None] * k + (start + steps)[None, :], rows[:, None] < m, 0.0)
        right = tl.load(b + (start + steps)[:, None] * n + columns[None, :], columns[None, :] < n, 0.0)
        sums = tl.dot(left, right, sums)
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    tl.store(c + rows[:, None] * n + columns[None, :], sums.to(c.dtype.element_ty), inside)
