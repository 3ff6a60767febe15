"""One-pass masked products: a tile of the weight is loaded, masked in registers, and multiplied.

Tensors are contiguous: the weight is [rows, K], x [tokens, K], y and its gradient [tokens, rows], the bias [rows]. The
product has the dtype of x; weight and bias may have another. Neither mask nor masked weight is written to memory. The
weight is the row operand of every product, so that few tokens still fill the matrix units. The groups of a tile are
[groups, M], row by row.

If y or the gradient of x has few rows of tiles, the inner dimension is split, so that every processor has work. Each
part has its own programs, along the last axis of the grid, which write their sums in float32. A second kernel adds the
parts in order, so that the bits of a result repeat.

Constants of the kernels: N and M of the pattern; KIND of the mask as in ``MaskSource``, which makes ``source`` logits
or codes; OPERAND and PRECISION of the matrix units; BLOCK_OUT, BLOCK_T and BLOCK_K, the weight rows, tokens and columns
of a tile.
"""

import torch
import triton
import triton.language as tl

from ..counter import MaskSource
from ..reference.plackett_luce import EXACT_SCORE_MAX_N
from . import device as d
from . import sampling
from .launch import launch_elements, launch_tiles
from .tiles import (
    ACROSS_COLUMNS,
    ALIGNED,
    INTERPRETED,
    ONE_PASS_TOKENS,
    Tiles,
    architecture,
    one_pass_tokens,
    parts_for,
    tiles_for,
)

# Sizes and places of layers, for which kernels are not specialized
UNSPECIALIZED_OF_TILES = ["offset", "row_stride", "tokens"]


@triton.jit
def own_part(size, STEP: tl.constexpr):
    """(first, end) of the program's part of an inner dimension: whole steps, except at its end."""
    steps = tl.cdiv(tl.cdiv(size, STEP), tl.num_programs(2))
    first = tl.program_id(2) * steps * STEP
    end = tl.minimum(first + steps * STEP, size)
    # ``nonempty_parts`` leaves none empty. If a loop may run zero times, LLVM sets the sums just before the wait for
    # wgmma, and then ptxas lets each wgmma wait for the one before: its warning C7515
    tl.assume(first < end)
    return first, end


@triton.jit
def own_sums(out, tokens, columns):
    """Pointer to the result [tokens, columns] of the program's part of the inner dimension."""
    return out + tl.program_id(2).to(tl.int64) * tokens * columns


@triton.jit(do_not_specialize=["total"])
def split_sum_kernel(partial, bias, out, columns, total: tl.int64, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """out [tokens, columns] is the sum of PARTS partial results, in order, plus the bias."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < total
    y = tl.load(partial + index, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        y += tl.load(partial + part * total + index, mask=inside, other=0.0)
    if bias is not None:
        y += tl.load(bias + index % columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + index, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def tile_groups(first_row, first_group, rows, groups, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """(row, group in the row, whether it exists) of a tile's ROWS * GROUPS groups."""
    index = tl.arange(0, ROWS * GROUPS)
    row = first_row + index // GROUPS
    group = first_group + index % GROUPS
    return row, group, (row < rows) & (group < groups)


@triton.jit
def load_groups(pointer, row, group, inside, groups, M: tl.constexpr):
    """Load [groups of the tile, M] in the stored dtype, zeros outside."""
    offsets = (row.to(tl.int64) * groups + group) * M
    return tl.load(pointer + offsets[:, None] + tl.arange(0, M)[None, :], mask=inside[:, None], other=0.0)


@triton.jit
def tile_code(
    source, x, inv_temperature, row, group, inside, groups, seed, step, layer, draw, offset, row_stride,
    KIND: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """int32 group codes of a tile; x are columns of logits, unused if codes are given."""
    if KIND == "drawn":
        index = (offset + row * row_stride + group).to(tl.uint32)
        key = d.load_key(seed, step, layer, draw)
        code = d.drawn_code(x, index, inv_temperature, N, M, key)
    elif M < 16 and source.dtype.element_ty == tl.int32:
        # four codes a word, see ``loaded_source``
        word = tl.load(source + row.to(tl.int64) * (groups >> 2) + (group >> 2), mask=inside, other=0)
        code = word >> (group % 4 * 8) & 0xFF
    else:
        code = tl.load(source + row.to(tl.int64) * groups + group, mask=inside, other=0).to(tl.int32)
    return code


@triton.jit
def tile_logits(source, row, group, inside, groups, KIND: tl.constexpr, M: tl.constexpr):
    """Columns of logits, float32; nothing if codes are given."""
    if KIND == "codes":
        columns = ()
    else:
        columns = d.split_columns(load_groups(source, row, group, inside, groups, M).to(tl.float32), M)
    return columns


@triton.jit
def masked_groups(tile, code, M: tl.constexpr):
    """Tile [groups, M] with exact zeros where the code drops."""
    kept = d.decode(code, M)
    columns = d.split_columns(tile, M)
    masked = ()
    for i in tl.static_range(M):
        masked = masked + (tl.where(kept[i], columns[i], 0.0),)
    return d.join_columns(masked, M)


@triton.jit(do_not_specialize=UNSPECIALIZED_OF_TILES)
def masked_linear_kernel(
    x, weight, source, bias, out, partial, inv_temperature, seed, step, layer, draw, offset: tl.int64,
    row_stride: tl.int64, tokens: tl.int64, rows, groups,
    KIND: tl.constexpr, N: tl.constexpr, M: tl.constexpr, LOG_PROB: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y or its parts; with LOG_PROB also ``partial``, each program's sum of its groups' log-probabilities."""
    GROUPS: tl.constexpr = BLOCK_K // M
    first_row = tl.program_id(0) * BLOCK_OUT
    token = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K)
    start, end = own_part(groups, GROUPS)
    x_pointers = x + token[None, :] * (groups * M) + start * M + k[:, None]
    total = tl.zeros((BLOCK_OUT, BLOCK_T), tl.float32)
    log_probs = tl.zeros((BLOCK_OUT * GROUPS,), tl.float32)
    for first_group in range(start, end, GROUPS):
        row, group, inside = tile_groups(first_row, first_group, rows, groups, BLOCK_OUT, GROUPS)
        w = load_groups(weight, row, group, inside, groups, M)
        logits = tile_logits(source, row, group, inside, groups, KIND, M)
        code = tile_code(source, logits, inv_temperature, row, group, inside, groups, seed, step, layer, draw,
                         offset, row_stride, KIND, N, M)  # fmt: skip
        if LOG_PROB:
            # every block of tokens has this tile; only the first one counts it
            if tl.program_id(1) == 0:
                z = d.scaled(logits, inv_temperature, M)
                log_probs += tl.where(inside, d.exact_log_prob(z, d.decode(code, M), N, M), 0.0)
        masked = tl.reshape(masked_groups(w, code, M), (BLOCK_OUT, BLOCK_K)).to(OPERAND)
        present = (token[None, :] < tokens) & (first_group * M + k[:, None] < groups * M)
        x_tile = tl.load(x_pointers, mask=present, other=0.0).to(OPERAND)
        total = tl.dot(masked, x_tile, total, input_precision=PRECISION)
        x_pointers += BLOCK_K
    row = first_row + tl.arange(0, BLOCK_OUT)
    if bias is not None:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    pointers = own_sums(out, tokens, rows) + token[None, :] * rows + row[:, None]
    tl.store(pointers, total.to(out.dtype.element_ty), mask=(token[None, :] < tokens) & (row[:, None] < rows))
    if LOG_PROB:
        if tl.program_id(1) == 0:
            tl.store(partial + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0), tl.sum(log_probs, 0))


@triton.jit(do_not_specialize=UNSPECIALIZED_OF_TILES)
def masked_linear_input_grad_kernel(
    grad, weight, source, out, inv_temperature, seed, step, layer, draw, offset: tl.int64, row_stride: tl.int64,
    tokens: tl.int64, rows, groups,
    KIND: tl.constexpr, N: tl.constexpr, M: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradient of x, or its parts."""
    GROUPS: tl.constexpr = BLOCK_K // M
    first_group = tl.program_id(0) * GROUPS
    token = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o = tl.arange(0, BLOCK_OUT)
    start, end = own_part(rows, BLOCK_OUT)
    grad_pointers = grad + token[None, :] * rows + start + o[:, None]
    total = tl.zeros((BLOCK_K, BLOCK_T), tl.float32)
    for first_row in range(start, end, BLOCK_OUT):
        row, group, inside = tile_groups(first_row, first_group, rows, groups, BLOCK_OUT, GROUPS)
        w = load_groups(weight, row, group, inside, groups, M)
        logits = tile_logits(source, row, group, inside, groups, KIND, M)
        code = tile_code(source, logits, inv_temperature, row, group, inside, groups, seed, step, layer, draw,
                         offset, row_stride, KIND, N, M)  # fmt: skip
        masked = tl.reshape(masked_groups(w, code, M), (BLOCK_OUT, BLOCK_K)).to(OPERAND)
        present = (token[None, :] < tokens) & (first_row + o[:, None] < rows)
        grad_tile = tl.load(grad_pointers, mask=present, other=0.0).to(OPERAND)
        total = tl.dot(tl.trans(masked), grad_tile, total, input_precision=PRECISION)
        grad_pointers += BLOCK_OUT
    k = first_group * M + tl.arange(0, BLOCK_K)
    pointers = own_sums(out, tokens, groups * M) + token[None, :] * (groups * M) + k[:, None]
    present = (token[None, :] < tokens) & (k[:, None] < groups * M)
    tl.store(pointers, total.to(out.dtype.element_ty), mask=present)


@triton.jit
def weight_grad_tile(
    grad, x, tokens, rows, groups, first_row, first_group,
    M: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_OUT, BLOCK_K] of grad.T @ x, zeros outside the weight; all tokens, at least one, in order."""
    # see ``own_part``
    tl.assume(tokens > 0)
    o = first_row + tl.arange(0, BLOCK_OUT)
    k = first_group * M + tl.arange(0, BLOCK_K)
    t = tl.arange(0, BLOCK_T)
    grad_pointers = grad + t[None, :] * rows + o[:, None]
    x_pointers = x + t[:, None] * (groups * M) + k[None, :]
    total = tl.zeros((BLOCK_OUT, BLOCK_K), tl.float32)
    for first_token in range(0, tokens, BLOCK_T):
        present = first_token + t < tokens
        grad_tile = tl.load(grad_pointers, mask=present[None, :] & (o[:, None] < rows), other=0.0).to(OPERAND)
        x_tile = tl.load(x_pointers, mask=present[:, None] & (k[None, :] < groups * M), other=0.0).to(OPERAND)
        total = tl.dot(grad_tile, x_tile, total, input_precision=PRECISION)
        grad_pointers += BLOCK_T * rows
        x_pointers += BLOCK_T * groups * M
    return total


@triton.jit(do_not_specialize=UNSPECIALIZED_OF_TILES)
def masked_linear_weight_grad_kernel(
    grad, x, source, out, inv_temperature, seed, step, layer, draw, offset: tl.int64, row_stride: tl.int64,
    tokens: tl.int64, rows, groups,
    KIND: tl.constexpr, N: tl.constexpr, M: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradient of the weight, zeros where the mask drops."""
    GROUPS: tl.constexpr = BLOCK_K // M
    first_row = tl.program_id(0) * BLOCK_OUT
    first_group = tl.program_id(1) * GROUPS
    total = weight_grad_tile(grad, x, tokens, rows, groups, first_row, first_group,
                             M, OPERAND, PRECISION, BLOCK_OUT, BLOCK_T, BLOCK_K)  # fmt: skip
    row, group, inside = tile_groups(first_row, first_group, rows, groups, BLOCK_OUT, GROUPS)
    logits = tile_logits(source, row, group, inside, groups, KIND, M)
    code = tile_code(source, logits, inv_temperature, row, group, inside, groups, seed, step, layer, draw,
                     offset, row_stride, KIND, N, M)  # fmt: skip
    masked = masked_groups(tl.reshape(total, (BLOCK_OUT * GROUPS, M)), code, M)
    offsets = (row.to(tl.int64) * groups + group) * M
    pointers = out + offsets[:, None] + tl.arange(0, M)[None, :]
    tl.store(pointers, masked.to(out.dtype.element_ty), mask=inside[:, None])


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype in which a kernel writes a result of ``dtype``."""
    # the interpreter truncates, hardware rounds
    return torch.float32 if INTERPRETED else dtype


class SplitResult:
    """Result [tokens, columns] of a product, in the dtype and on the device of its operand x.

    The bytes of ``weight`` limit the parts. Those of a mask do not count: a drawn one and its codes give the same bits.

    Attributes:
        grid: of the product's kernel: blocks of columns, blocks of tokens, parts of the inner dimension.
        out: output of the kernel: the result, or [parts, tokens, columns] in float32.
        bias: bias that the kernel adds: None with several parts.
    """

    def __init__(self, product: str, tile: Tiles, shape: tuple[int, int], inner: int, x: torch.Tensor,
                 bias: torch.Tensor | None, *weight: torch.Tensor):  # fmt: skip
        tokens, columns = shape
        across, step = (tile.k, tile.out) if product in ACROSS_COLUMNS else (tile.out, tile.k)
        # without triton.cdiv, which takes a microsecond
        blocks = -(-columns // across), -(-tokens // tile.tokens)
        given = sum(part.nbytes for part in weight), tokens * columns
        self.parts = parts_for(tile, blocks[0] * blocks[1], -(-inner // step), architecture(x.device), *given)
        self.grid = (*blocks, self.parts)
        self.whole = torch.empty(shape, dtype=result_dtype(x.dtype), device=x.device)
        self.out = self.whole
        self.bias = bias
        self.added = None
        if self.parts > 1:
            self.out = torch.empty(self.parts, *shape, dtype=torch.float32, device=x.device)
            self.bias = None
            self.added = bias
        self.dtype = x.dtype

    def sum(self) -> torch.Tensor:
        """Sum the parts into the result, after the product's kernel."""
        if self.parts > 1:
            count = self.whole.numel()
            launch_elements(split_sum_kernel, "split_sum", count, self.whole.device,
                            self.out, self.added, self.whole, self.whole.shape[1], count, PARTS=self.parts)  # fmt: skip
        # a cast to the same dtype takes microseconds too
        return self.whole if self.whole.dtype == self.dtype else self.whole.to(self.dtype)


def operand_constants(dtype: torch.dtype) -> dict:
    """Constants of a kernel that multiplies tiles of ``dtype``."""
    # the interpreter multiplies the bits of 16-bit floats as integers
    wide = INTERPRETED or dtype == torch.float32
    element = tl.float32 if wide else tl.bfloat16 if dtype == torch.bfloat16 else tl.float16
    tf32 = wide and not INTERPRETED and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {"OPERAND": element, "PRECISION": "tf32" if tf32 else "ieee"}


def loaded_source(mask: MaskSource, tile: Tiles) -> torch.Tensor:
    """Logits, or codes; as words of four if a thread loads fewer: an asynchronous copy has at least 4 bytes."""
    codes = mask.tensor
    fits = mask.kind == "codes" and codes.dtype == torch.uint8 and tile.few_codes(mask.m) and codes.shape[1] % 4 == 0
    # flat: a single row may have any stride
    return codes.view(-1).view(torch.int32) if fits and (codes.data_ptr() | codes.storage_offset()) % 4 == 0 else codes


def mask_arguments(mask, tokens, matrix):
    """Arguments of a product's kernel: of a mask, and of the sizes of x [tokens, K] and the matrix [rows, K]."""
    return mask.inv_temperature, *mask.counter, tokens, matrix.shape[0], matrix.shape[1] // mask.m


def one_pass(tensor: torch.Tensor, mask: MaskSource) -> bool:
    """Return whether a mask is applied inside its product with ``tensor`` [tokens, ...], not to a transient weight."""
    return 0 < tensor.shape[0] <= one_pass_tokens(mask.kind, architecture(tensor.device))


def masked_linear(x, weight, bias, log_prob, mask):
    """[x @ (weight * mask).T + bias], with ``log_prob`` also log p of the drawn mask, 0-dim."""
    tokens = x.shape[0]
    rows = weight.shape[0]
    if rows == 0 or not one_pass(x, mask):
        total = None
        if log_prob:
            mask, total = _drawn_with_log_prob(mask)
        bias = None if bias is None else bias.to(x.dtype)
        y = torch.nn.functional.linear(x, sampling.masked_weight(weight, mask, x.dtype), bias)
        return [y] if total is None else [y, total]
    tile = tiles_for("masked_linear", mask.m, x.dtype, tokens, *weight.shape, architecture(x.device))
    split = SplitResult("masked_linear", tile, (tokens, rows), weight.shape[1], x, bias, weight)
    # for larger N the log-probability is a quadrature, too large for the registers of a product
    inside = log_prob and mask.n <= EXACT_SCORE_MAX_N
    sums = (split.parts, split.grid[0])
    partial = torch.empty(sums, dtype=torch.float32, device=x.device) if inside else None
    launch_tiles(masked_linear_kernel, "masked_linear", mask.m, split.grid, tile, x.device,
                 x, weight, loaded_source(mask, tile), split.bias, split.out, partial,
                 *mask_arguments(mask, tokens, weight),
                 KIND=mask.kind, N=mask.n, LOG_PROB=inside, **operand_constants(x.dtype))  # fmt: skip
    y = split.sum()
    if not log_prob:
        return [y]
    return [y, partial.sum() if inside else _drawn_with_log_prob(mask)[1]]


def _drawn_with_log_prob(mask):
    """(drawn mask as codes, its log-probability summed over the layer, 0-dim float32)."""
    pattern = (mask.n, mask.m)
    codes = mask.codes
    if codes is None:
        codes = sampling.sample_mask(mask.tensor, *pattern, mask.inv_temperature, mask.counter)
    total = sampling.mask_log_prob(mask.tensor, codes, *pattern, mask.inv_temperature).sum()
    return MaskSource(codes, "codes", *pattern, 1.0), total


def masked_linear_input_grad(grad, weight, mask):
    """grad [tokens, rows] @ (weight * mask): [tokens, K] in the dtype of grad."""
    tokens = grad.shape[0]
    rows, k = weight.shape
    # unaligned rows of grad are loaded value by value, and their addresses alone fill the registers
    if rows == 0 or rows % ALIGNED or not one_pass(grad, mask):
        return grad @ sampling.masked_weight(weight, mask, grad.dtype)
    tile = tiles_for("masked_linear_input_grad", mask.m, grad.dtype, tokens, rows, k, architecture(grad.device))
    split = SplitResult("masked_linear_input_grad", tile, (tokens, k), rows, grad, None, weight)
    launch_tiles(masked_linear_input_grad_kernel, "masked_linear_input_grad", mask.m, split.grid, tile, grad.device,
                 grad, weight, loaded_source(mask, tile), split.out, *mask_arguments(mask, tokens, weight),
                 KIND=mask.kind, N=mask.n, **operand_constants(grad.dtype))  # fmt: skip
    return split.sum()


def masked_linear_weight_grad(grad, x, mask):
    """(grad.T @ x) * mask: [rows, K] for grad [tokens, rows] and x [tokens, K]."""
    tokens = grad.shape[0]
    rows = grad.shape[1]
    k = x.shape[1]
    if rows == 0 or not 0 < tokens <= ONE_PASS_TOKENS:
        return sampling.masked_weight(grad.t() @ x, mask)
    out = torch.empty(rows, k, dtype=result_dtype(grad.dtype), device=grad.device)
    tile = tiles_for("masked_linear_weight_grad", mask.m, grad.dtype, tokens, rows, k, architecture(grad.device))
    grid = (triton.cdiv(rows, tile.out), triton.cdiv(k, tile.k))
    launch_tiles(masked_linear_weight_grad_kernel, "masked_linear_weight_grad", mask.m, grid, tile, grad.device,
                 grad, x, mask.tensor, out, *mask_arguments(mask, tokens, out),
                 KIND=mask.kind, N=mask.n, **operand_constants(grad.dtype))  # fmt: skip
    return out.to(grad.dtype)
