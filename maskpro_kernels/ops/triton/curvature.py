"""Factors of a loss's second derivative: ``reference.curvature_factors`` as two kernels.

Which rows count depends on the mean of all rows' squares, so x is read by a second launch. Each tensor is read once.
Sums have a fixed order: a program's sums are written, and the programs that need all of them add them in order.
"""

import torch
import triton
import triton.language as tl

from ..reference.curvature import LEAST_SQUARE
from .launch import launch_blocks
from .tiles import FACTORS, architecture, gradient_rows

LEAST = tl.constexpr(LEAST_SQUARE)
# Rows whose squares a program loads at a time, to find those that count
SCAN = tl.constexpr(4096)


@triton.jit(do_not_specialize=["tokens"])
def gradient_squares_kernel(
    grad, token_squares, partial, tokens: tl.int64, rows, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Sums of squares of ROWS tokens of grad [tokens, rows]: of each to ``token_squares``, of each column to a row of
    ``partial`` [programs, rows], if given."""
    part = tl.program_id(0).to(tl.int64)
    token = part * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        inside = (token < tokens)[:, None] & (row < rows)[None, :]
        g = tl.load(grad + token[:, None] * rows + row[None, :], mask=inside, other=0.0).to(tl.float32)
        squares = g * g
        total += squares
        if partial is not None:
            tl.store(partial + part * rows + row, tl.sum(squares, 0), mask=row < rows)
    tl.store(token_squares + token, tl.sum(total, 1), mask=token < tokens)


@triton.jit
def load_squares(token_squares, first, tokens, COUNT: tl.constexpr):
    """(squares of COUNT tokens from ``first`` on, whether there are so many)."""
    token = first + tl.arange(0, COUNT)
    return tl.load(token_squares + token, mask=token < tokens, other=0.0), token < tokens


@triton.jit(do_not_specialize=["tokens", "parts"])
def curvature_factors_kernel(
    token_squares, partial, x, row_squares, loss_tokens, factor_of_rows, factor_of_columns, curvature, tokens_of_mean,
    tokens: tl.int64, parts: tl.int64, rows, columns,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one of the factors: the first programs add squares of x [tokens, columns], the others those of
    ``partial`` [parts, rows]. ``tokens_of_mean`` is their number as a float, at least 1."""
    total = tl.zeros((SCAN,), tl.float32)
    for first in range(0, tokens, SCAN):
        squares, _ = load_squares(token_squares, first, tokens, SCAN)
        # a row that is not finite has no part in the mean, but a gradient
        total += tl.where(squares < float("inf"), squares, 0.0)
    least = LEAST * tl.div_rn(tl.sum(total, 0), tokens_of_mean)
    used = tl.zeros((SCAN,), tl.float32)
    for first in range(0, tokens, SCAN):
        squares, inside = load_squares(token_squares, first, tokens, SCAN)
        used += tl.where(inside & ((squares <= least) == 0), 1.0, 0.0)
    count = tl.sum(used, 0)
    if row_squares is not None:
        # a divergence has no gradient at its minimum, but a curvature
        least = tl.where(count > 0.0, least, -1.0)
        count = tl.where(count > 0.0, count, tokens_of_mean)
    count = tl.maximum(count, 1.0)
    scale = count
    if loss_tokens is not None:
        scale = tl.load(loss_tokens)
    block = tl.program_id(0)
    blocks_of_x = tl.cdiv(columns, BLOCK)
    if block < blocks_of_x:
        column = block * BLOCK + tl.arange(0, BLOCK)
        sums = tl.zeros((ROWS, BLOCK), tl.float32)
        for first in range(0, tokens, ROWS):
            squares, inside = load_squares(token_squares, first, tokens, ROWS)
            token = first + tl.arange(0, ROWS)
            taken = (inside & ((squares <= least) == 0))[:, None] & (column < columns)[None, :]
            part = tl.load(x + token[:, None] * columns + column[None, :], mask=taken, other=0.0).to(tl.float32)
            sums += part * part
        tl.store(factor_of_columns + column, tl.sum(sums, 0), mask=column < columns)
    else:
        row = (block - blocks_of_x) * BLOCK + tl.arange(0, BLOCK)
        if row_squares is None:
            sums = tl.zeros((ROWS, BLOCK), tl.float32)
            for first in range(0, parts, ROWS):
                part = first + tl.arange(0, ROWS)
                inside = (part < parts)[:, None] & (row < rows)[None, :]
                sums += tl.load(partial + part[:, None] * rows + row[None, :], mask=inside, other=0.0)
            factor = tl.div_rn(scale, count) * tl.sum(sums, 0)
        else:
            factor = tl.div_rn(tl.load(row_squares + row, mask=row < rows, other=0.0), scale)
        tl.store(factor_of_rows + row, curvature * factor, mask=row < rows)


def curvature_factors(grad, x, curvature, tokens, row_squares):
    """``reference.curvature_factors`` as two kernels."""
    count, rows = grad.shape
    columns = x.shape[1]
    device = grad.device
    config = gradient_rows(count, architecture(device))
    parts = triton.cdiv(count, config.rows)
    token_squares = torch.empty(count, dtype=torch.float32, device=device)
    partial = torch.empty(parts, rows, dtype=torch.float32, device=device) if row_squares is None else None
    factor_of_rows = torch.empty(rows, dtype=torch.float32, device=device)
    factor_of_columns = torch.empty(columns, dtype=torch.float32, device=device)
    if tokens is not None and tokens.device != device:
        tokens = tokens.to(device, non_blocking=True)
    launch_blocks(gradient_squares_kernel, "gradient_squares", parts, config, device,
                  grad, token_squares, partial, count, rows)  # fmt: skip
    programs = triton.cdiv(columns, FACTORS.block) + triton.cdiv(rows, FACTORS.block)
    launch_blocks(curvature_factors_kernel, "curvature_factors", programs, FACTORS, device,
                  token_squares, partial, x, row_squares, tokens, factor_of_rows, factor_of_columns, curvature,
                  float(max(count, 1)), count, parts, rows, columns)  # fmt: skip
    return factor_of_rows, factor_of_columns
