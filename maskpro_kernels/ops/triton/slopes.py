"""The slope of a loss in the mask, and the step of the logits against it.

G = grad^T x is the derivative in the masked weight, for grad [tokens, rows] and x [tokens, K], both contiguous. With
few tokens one kernel multiplies and steps: a program computes a tile of G over all tokens, so that sums have a fixed
order. It writes G to memory only for ``weight_grad``. With many tokens torch multiplies, and a second kernel here reads
G; the next layer's G reuses the memory.

Constants of the kernels, in addition to those in ``masked_gemm``: UPDATE, whether they step the logits ``source`` and
write ``partial``, or write the slope to ``out``. With KIND "codes" the mask comes from ``codes`` of an earlier draw.
``partial`` is each program's sum of squares of the slope, times ``share``, the number of programs over that of weights.
The mean over programs is then the mean square, by one operation. Over weights alone, the share of a large layer might
be a subnormal number.
"""

import torch
import triton
import triton.language as tl

from . import device as d
from .curvature import curvature_factors
from .launch import launch, launch_tiles
from .masked_gemm import (
    UNSPECIALIZED_OF_TILES,
    load_groups,
    mask_arguments,
    operand_constants,
    tile_code,
    tile_groups,
    tile_logits,
    weight_grad_tile,
)
from .sampling import UNSPECIALIZED, counter_arguments, group_index, load_columns, store_columns
from .tiles import architecture, configuration, fused_tokens, tiles_for

# Tiles of columns to process together, row by row of tiles: memory is then read a sixteenth as often for grad
SHARING = tl.constexpr(16)


@triton.jit
def column_sum(columns, M: tl.constexpr):
    """Sum of columns in index order."""
    total = columns[0]
    for i in tl.static_range(1, M):
        total = total + columns[i]
    return total


@triton.jit
def mask_slope(weight, grad, square, code, M: tl.constexpr):
    """``reference.group_mask_slope`` of columns."""
    kept = d.decode(code, M)
    h = ()
    for i in tl.static_range(M):
        half = 0.5 * (weight[i] * weight[i] * square[i])
        h = h + (weight[i] * grad[i] + tl.where(kept[i], 0.0 - half, half),)
    mean = column_sum(h, M) * (1.0 / M)
    centred = ()
    for i in tl.static_range(M):
        centred = centred + (h[i] - mean,)
    return centred


@triton.jit
def sum_of_squares(columns, M: tl.constexpr):
    squares = ()
    for i in tl.static_range(M):
        squares = squares + (columns[i] * columns[i],)
    return column_sum(squares, M)


@triton.jit
def sum_over_tile(slope, M: tl.constexpr):
    """Sum of squares of all columns of a slope from a product's tile."""
    squares = sum_of_squares(slope, M)
    if M == 2:
        # On sm_100 Triton 3.6 propagates the layout of the product's tile to its users, and fails at a sum over a
        # tensor of one dimension. A new dimension stops the propagation.
        squares = tl.sum(squares[None, :], 1)
    return tl.sum(squares, 0)


@triton.jit
def descended(x, gradient, rate, max_update, group, key, M: tl.constexpr, dtype: tl.constexpr):
    """Columns of logits less the clamped step, rounded for a ``dtype`` of 16 bits."""
    rate = tl.where(rate < float("inf"), rate, 0.0)
    new = ()
    for i in tl.static_range(M):
        bounded = tl.maximum(tl.minimum(gradient[i] * rate, max_update), 0.0 - max_update)
        new = new + (x[i] - tl.where(tl.abs(gradient[i]) < float("inf"), bounded, 0.0),)
    if dtype != tl.float32:
        new = d.round_group(new, group, M, key, dtype)
    return new


@triton.jit
def finish_tile(
    gradient, weight, grad_squares, x_squares, source, codes, out, weight_grad, partial, share, rate, max_update,
    inv_temperature, seed, step, layer, draw, offset, row_stride, rows, groups, row_tile, group_tile, group_tiles,
    KIND: tl.constexpr, N: tl.constexpr, M: tl.constexpr, UPDATE: tl.constexpr, BLOCK_OUT: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Write the slope of a tile of G, float32 [groups of the tile, M], to ``out``, or step its logits."""
    row, group, inside = tile_groups(row_tile * BLOCK_OUT, group_tile * GROUPS, rows, groups, BLOCK_OUT, GROUPS)
    logits = tile_logits(source, row, group, inside, groups, KIND, M)
    code = tile_code(codes if KIND == "codes" else source, logits, inv_temperature, row, group, inside, groups,
                     seed, step, layer, draw, offset, row_stride, KIND, N, M)  # fmt: skip
    w = d.split_columns(load_groups(weight, row, group, inside, groups, M).to(tl.float32), M)
    # one row [K] for all rows
    squares = load_groups(x_squares, 0 * row, group, group < groups, groups, M)
    squares *= tl.load(grad_squares + row, mask=row < rows, other=0.0)[:, None]
    grads = d.split_columns(gradient, M)
    slope = mask_slope(w, grads, d.split_columns(squares, M), code, M)
    offsets = ((row.to(tl.int64) * groups + group) * M)[:, None] + tl.arange(0, M)[None, :]
    if weight_grad is not None:
        tl.store(weight_grad + offsets, d.join_columns(grads, M), mask=inside[:, None])
    if UPDATE:
        # for drawn masks a second load. The compiler merges both, unless ``weight_grad`` is stored in between. To keep
        # the columns across the product would take registers: 12 more for 8:16 on gfx942
        logits = d.split_columns(load_groups(source, row, group, inside, groups, M).to(tl.float32), M)
        index = (offset + row * row_stride + group).to(tl.uint32)
        dtype: tl.constexpr = source.dtype.element_ty
        new = descended(logits, slope, tl.load(rate), max_update, index, d.load_key(seed, step, layer, draw), M, dtype)
        tl.store(source + offsets, d.join_columns(new, M), mask=inside[:, None])
        # weights outside of the matrix are zeros, so they have no slope
        tl.store(partial + row_tile * group_tiles + group_tile, sum_over_tile(slope, M) * share)
    else:
        tl.store(out + offsets, d.join_columns(slope, M), mask=inside[:, None])


@triton.jit(do_not_specialize=UNSPECIALIZED_OF_TILES)
def straight_through_kernel(
    grad, x, weight, grad_squares, x_squares, source, codes, out, weight_grad, partial, share, rate, max_update,
    inv_temperature, seed, step, layer, draw, offset: tl.int64, row_stride: tl.int64, tokens: tl.int64, rows, groups,
    KIND: tl.constexpr, N: tl.constexpr, M: tl.constexpr, UPDATE: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Product, then slope or step."""
    GROUPS: tl.constexpr = BLOCK_K // M
    row_tiles = tl.num_programs(0)
    group_tiles = tl.num_programs(1)
    # programs that start one after the other share rows of grad as well as columns of x
    group_tile, row_tile = tl.swizzle2d(tl.program_id(1), tl.program_id(0), group_tiles, row_tiles, SHARING)
    total = weight_grad_tile(grad, x, tokens, rows, groups, row_tile * BLOCK_OUT, group_tile * GROUPS,
                             M, OPERAND, PRECISION, BLOCK_OUT, BLOCK_T, BLOCK_K)  # fmt: skip
    finish_tile(tl.reshape(total, (BLOCK_OUT * GROUPS, M)), weight, grad_squares, x_squares, source, codes, out,
                weight_grad, partial, share, rate, max_update, inv_temperature, seed, step, layer, draw, offset,
                row_stride, rows, groups, row_tile, group_tile, group_tiles,
                KIND, N, M, UPDATE, BLOCK_OUT, GROUPS)  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED_OF_TILES)
def straight_through_step_kernel(
    gradient, weight, grad_squares, x_squares, source, codes, out, partial, share, rate, max_update, inv_temperature,
    seed, step, layer, draw, offset: tl.int64, row_stride: tl.int64, tokens: tl.int64, rows, groups,
    KIND: tl.constexpr, N: tl.constexpr, M: tl.constexpr, UPDATE: tl.constexpr, BLOCK_OUT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Slope, or step of the logits, from a product G in memory.

    It has the arguments of the other kernel; ``tokens`` and BLOCK_T are not used.
    """
    GROUPS: tl.constexpr = BLOCK_K // M
    row_tile = tl.program_id(0)
    group_tile = tl.program_id(1)
    group_tiles = tl.num_programs(1)
    row, group, inside = tile_groups(row_tile * BLOCK_OUT, group_tile * GROUPS, rows, groups, BLOCK_OUT, GROUPS)
    tile = load_groups(gradient, row, group, inside, groups, M)
    finish_tile(tile, weight, grad_squares, x_squares, source, codes, out, None,
                partial, share, rate, max_update, inv_temperature, seed, step, layer, draw, offset,
                row_stride, rows, groups, row_tile, group_tile, group_tiles,
                KIND, N, M, UPDATE, BLOCK_OUT, GROUPS)  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def descend_kernel(
    logits, gradient, partial, share, rate, max_update, seed, step, layer, draw, offset: tl.int64, row_stride: tl.int64,
    columns: tl.int64, total: tl.int64,
    M: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Step logits [rows, K] against a gradient float32 [rows, K]; ``partial`` and ``share`` as above."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    x = load_columns(logits, first, total, M, BLOCK)
    g = load_columns(gradient, first, total, M, BLOCK)
    group = group_index(offset, row_stride, columns, first, BLOCK, WHOLE)
    key = d.load_key(seed, step, layer, draw)
    new = descended(x, g, tl.load(rate), max_update, group, key, M, logits.dtype.element_ty)
    store_columns(logits, new, first, total, M, BLOCK)
    tl.store(partial + tl.program_id(0), tl.sum(sum_of_squares(g, M), 0) * share)


def straight_through_grad(grad, x, weight, curvature, weight_grad, tokens, row_squares, mask):
    """``ops.straight_through_grad``, see ``fused``."""
    factors = curvature_factors(grad, x, curvature, tokens, row_squares)
    out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    _launch(grad, x, weight, *factors, mask, out, weight_grad)
    return out


def straight_through_update_(
    logits, grad, x, weight, curvature, rate, max_update, weight_grad, tokens, row_squares, mask
):
    """``ops.straight_through_update_``, see ``fused``."""
    factors = curvature_factors(grad, x, curvature, tokens, row_squares)
    mask = mask._replace(tensor=logits)
    partial = _launch(grad, x, weight, *factors, mask, None, weight_grad, rate, max_update)
    return _mean_square(partial, weight)


def descend_(logits, gradient, rate, max_update, m, counter):
    """``reference.descend_`` as one kernel."""
    arguments, whole = counter_arguments(counter, logits, m)
    groups = arguments[-1]
    programs = triton.cdiv(groups, configuration("descend", m, groups, architecture(logits.device)).block)
    partial = torch.empty(programs, dtype=torch.float32, device=logits.device)
    launch(descend_kernel, "descend", m, groups, logits.device,
           logits, gradient, partial, _share(partial, logits), rate, max_update, *arguments, WHOLE=whole)  # fmt: skip
    return _mean_square(partial, logits)


def fused(tokens: int, kind: str, device: torch.device) -> bool:
    """Return whether one kernel multiplies some tokens and steps under a mask of this kind; else torch multiplies."""
    return 0 < tokens <= fused_tokens(kind, architecture(device))


def weight_gradient(grad: torch.Tensor, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """G = grad [tokens, rows].T @ x [tokens, K], float32, summed in float32, written to ``out`` if given."""
    if out is None:
        out = torch.empty(grad.shape[1], x.shape[1], dtype=torch.float32, device=grad.device)
    if grad.device.type == "cpu" or torch.version.hip is not None:
        # torch multiplies into another dtype on CUDA; on ROCm not by each of its libraries (CUDABlas.cpp refuses it for
        # composable kernels), and on CPUs not at all
        return torch.mm(grad.t().float(), x.float(), out=out)
    return torch.mm(grad.t(), x, out_dtype=torch.float32, out=out)


def _launch(grad, x, weight, grad_squares, x_squares, mask, out, weight_grad, rate=None, max_update=0.0):
    """Write the slope to ``out``, or step the logits and return ``partial``."""
    rows, k = weight.shape
    tokens = len(grad)
    target = architecture(weight.device)
    codes = mask.tensor if mask.kind == "codes" else mask.codes
    kind = mask.kind if codes is None else "codes"
    name = "straight_through"
    kernel = straight_through_kernel
    operands = (grad, x)
    constants = operand_constants(grad.dtype)
    written = (out, weight_grad)
    if rows and not fused(tokens, kind, weight.device):
        name = "straight_through_step"
        kernel = straight_through_step_kernel
        operands = (weight_gradient(grad, x, weight_grad),)
        constants = {}
        written = (out,)
    tile = tiles_for(name, mask.m, grad.dtype, tokens, rows, k, target)
    grid = (triton.cdiv(rows, tile.out), triton.cdiv(k, tile.k))
    partial = torch.empty(grid, dtype=torch.float32, device=weight.device) if out is None else None
    share = 0.0 if partial is None else _share(partial, weight)
    if rows:
        launch_tiles(kernel, name, mask.m, grid, tile, weight.device,
                     *operands, weight, grad_squares, x_squares, mask.tensor, codes, *written, partial, share,
                     rate, max_update, *mask_arguments(mask, tokens, weight), KIND=kind, N=mask.n,
                     UPDATE=out is None, **constants)  # fmt: skip
    return partial


def _share(partial, logits):
    """Number of programs over that of weights."""
    return partial.numel() / max(logits.numel(), 1)


def _mean_square(partial, logits):
    """Mean square over all weights, from sums in fixed order."""
    return partial.mean() if logits.numel() else partial.new_zeros(())
