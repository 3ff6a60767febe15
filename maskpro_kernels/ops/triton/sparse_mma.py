"""Products with 2:4 weights on sparse tensor cores: a Gluon kernel with ``mma.sp``, since Triton has no sparse dot.

The instruction multiplies a tile of 16 rows and 32 columns, half of which are stored, with 8 tokens. Each thread of a
warp passes int32 words: of values, with the two of a group, of x, with two columns, and the word of ``metadata_of``
whose number is the thread's. That word serves two tiles: selector 0 the upper 16 rows, 1 the lower ones. Which other
words a thread passes is in the PTX ISA: "Matrix Fragments for sparse mma.m16n8k32 with .f16 and .bf16 types".

A warp multiplies TILES tiles of rows with all tokens of its program. Steps of 64 columns are copied to shared memory
STAGES - 1 steps before their use. Programs along the grid's last axis split K, see ``masked_gemm``.
"""

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .launch import launch_tiles
from .masked_gemm import SplitResult
from .tiles import ALIGNED, architecture, tiles_for

# releases after Triton 3.6 renamed it
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

MMA = gl.constexpr("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.")
OPERANDS = gl.constexpr(".f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9, $10, $11}, {$12, $13, $14, $15}, $16, ")
ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "f16"}
REGISTERS = gl.constexpr("=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f,r,r,r,r")
# Rows and tokens of the instruction; words of values in a row of a step, and of the instruction
ROWS = gl.constexpr(16)
TOKENS = gl.constexpr(8)
STEP = gl.constexpr(16)
WORDS = gl.constexpr(8)
LANES = gl.constexpr(32)


@gluon.constexpr_function
def words_layout(registers, rows, words, row_step, warps):
    """Return the layout of words [rows, words] whose warps have eight rows of four threads."""
    of_warps = [[row_step << i, 0] for i in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], of_warps, [], [rows, words])


@gluon.jit
def added_product(total, values, x, metadata, ELEMENT: gl.constexpr, SELECTOR: gl.constexpr):
    """Add a tile's product to its sums; tensors are [warps, LANES, registers of a thread]."""
    NUMBER: gl.constexpr = "0x1;" if SELECTOR else "0x0;"
    ASSEMBLY: gl.constexpr = MMA + ELEMENT + "." + ELEMENT + OPERANDS + NUMBER
    operands = [values, x, total, metadata]
    return gl.inline_asm_elementwise(ASSEMBLY, REGISTERS, operands, dtype=gl.float32, is_pure=True, pack=4)


@gluon.jit
def copy_step(
    own_values, own_x, own_metadata, of_values, of_x, of_metadata, k, end, column, x_column, half, last_block,
    block_words,
):  # fmt: skip
    """Start copies of a step, which begins at word k of a row's values; words from ``end`` on become zeros."""
    copy_async(own_values, of_values + k, mask=(k + column // 4 * 4 < end)[None, :])
    copy_async(own_x, of_x + 2 * k, mask=(2 * k + x_column // 4 * 4 < 2 * end)[None, :])
    # metadata must be valid for zeros too: the second half of a last step may repeat the first
    block = gl.minimum(k // WORDS + half, last_block) * block_words
    copy_async(own_metadata, of_metadata + block[:, None], mask=k < end)
    async_copy.commit_group()


# units: with a constant of 1 LLVM sees a single step
@gluon.jit(do_not_specialize=["tokens", "rows", "units"])
def sparse_mma_kernel(
    x, values, metadata, bias, out, tokens: gl.int64, rows, units,
    M: gl.constexpr, UNIT: gl.constexpr, ELEMENT: gl.constexpr, STAGES: gl.constexpr,
    BLOCK_OUT: gl.constexpr, BLOCK_T: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    WARPS: gl.constexpr = gl.num_warps()
    TILES: gl.constexpr = BLOCK_OUT // (ROWS * WARPS)
    gl.static_assert(BLOCK_K == STEP * M and TILES % 2 == 0)
    REGISTER: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, LANES, 1], [WARPS, 1, 1], [2, 1, 0])
    LANE: gl.constexpr = gl.SliceLayout(2, REGISTER)
    LOADED: gl.constexpr = words_layout([[8, 0], [0, 4], [0, 8]], ROWS * WARPS, STEP, ROWS, WARPS)
    X_LOADED: gl.constexpr = words_layout([[0, 4], [0, 8], [0, 16]], TOKENS, 2 * STEP, 0, WARPS)
    COPIED: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [WARPS, 1], [1, 0])
    X_COPIED: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])
    # ``ldmatrix`` reads eight rows of 16 bytes: swizzled, they are in different banks
    SWIZZLED: gl.constexpr = gl.SwizzledSharedLayout(4, 2, 4, [1, 0])
    X_SWIZZLED: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    # A step has the rows of the first tile of each warp, then those of the second; words of metadata likewise
    own_values = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_OUT, STEP], SWIZZLED)
    own_x = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_T, 2 * STEP], X_SWIZZLED)
    own_metadata = gl.allocate_shared_memory(gl.int32, [STAGES, TILES * WARPS, LANES], PLAIN)

    groups = units * UNIT
    part = gl.cdiv(gl.cdiv(groups, STEP), gl.num_programs(2)) * STEP
    start = gl.program_id(2) * part
    end = gl.minimum(start + part, groups)
    first_row = gl.program_id(0) * BLOCK_OUT
    first_token = gl.program_id(1).to(gl.int64) * BLOCK_T

    # Rows and tokens past the end repeat the last one, which needs no mask
    column = gl.arange(0, STEP, gl.SliceLayout(0, COPIED))
    x_column = gl.arange(0, 2 * STEP, gl.SliceLayout(0, X_COPIED))
    row = gl.arange(0, BLOCK_OUT, gl.SliceLayout(1, COPIED))
    row = row // ROWS % WARPS * (ROWS * TILES) + row // (ROWS * WARPS) * ROWS + row % ROWS
    row = gl.minimum(row, rows - 1 - first_row)
    of_values = values + first_row.to(gl.int64) * groups + row[:, None] * groups + column[None, :]
    token = gl.arange(0, BLOCK_T, gl.SliceLayout(1, X_COPIED))
    token = gl.minimum(token, gl.minimum(tokens - 1 - first_token, BLOCK_T - 1).to(gl.int32))
    of_x = x + first_token * (2 * groups) + token[:, None] * (2 * groups) + x_column[None, :]
    row_blocks = gl.cdiv(rows, 2 * ROWS)
    last_block = gl.cdiv(groups, WORDS) - 1
    place = gl.arange(0, TILES * WARPS, gl.SliceLayout(1, X_COPIED))
    block = first_row // (2 * ROWS) + place % WARPS * (TILES // 2) + place // (2 * WARPS)
    of_metadata = metadata + gl.minimum(block, row_blocks - 1)[:, None] * LANES + x_column[None, :]
    half = place // WARPS % 2
    block_words = row_blocks * LANES

    for step in gl.static_range(STAGES - 1):
        copy_step(own_values.index(step), own_x.index(step), own_metadata.index(step), of_values, of_x, of_metadata,
                  start + step * STEP, end, column, x_column, half, last_block, block_words)  # fmt: skip
    totals = ()
    for _ in gl.static_range(BLOCK_T // TOKENS * TILES):
        totals = totals + (gl.full([WARPS, LANES, 4], 0.0, gl.float32, REGISTER),)
    for step in range(0, gl.cdiv(end - start, STEP)):
        async_copy.wait_group(STAGES - 2)
        ahead = step + STAGES - 1
        slot = ahead % STAGES
        copy_step(own_values.index(slot), own_x.index(slot), own_metadata.index(slot), of_values, of_x, of_metadata,
                  start + ahead * STEP, end, column, x_column, half, last_block, block_words)  # fmt: skip
        slot = step % STAGES
        first = ()
        second = ()
        words = ()
        for i in gl.static_range(TILES):
            tile = own_values.index(slot).slice(i * ROWS * WARPS, ROWS * WARPS).load(LOADED)
            # warp, half of the rows, row, half of the columns, half of the words, word
            tile = tile.reshape([WARPS, 2, 8, 2, 2, 4]).permute([0, 2, 5, 4, 1, 3]).reshape([WARPS, LANES, 4, 2])
            halves = gl.split(tile)
            first = first + (gl.convert_layout(halves[0], REGISTER, assert_trivial=True),)
            second = second + (gl.convert_layout(halves[1], REGISTER, assert_trivial=True),)
            word = own_metadata.index(slot).slice(i * WARPS, WARPS).load(LANE)
            words = words + (gl.expand_dims(word, 2).broadcast_to([WARPS, LANES, 4]),)
        new = ()
        for t in gl.static_range(BLOCK_T // TOKENS):
            tile = own_x.index(slot).slice(t * TOKENS, TOKENS).load(X_LOADED)
            tile = tile.reshape([TOKENS, 2, 4, 4]).permute([0, 3, 2, 1]).reshape([LANES, 4, 2])
            halves = gl.split(tile)
            x_first = gl.convert_layout(halves[0], gl.SliceLayout(0, REGISTER), assert_trivial=True)
            x_second = gl.convert_layout(halves[1], gl.SliceLayout(0, REGISTER), assert_trivial=True)
            x_first = gl.expand_dims(x_first, 0).broadcast_to([WARPS, LANES, 4])
            x_second = gl.expand_dims(x_second, 0).broadcast_to([WARPS, LANES, 4])
            for i in gl.static_range(TILES):
                total = totals[t * TILES + i]
                total = added_product(total, first[i], x_first, words[i // 2 * 2], ELEMENT, i % 2)
                new = new + (added_product(total, second[i], x_second, words[i // 2 * 2 + 1], ELEMENT, i % 2),)
        totals = new
    async_copy.wait_group(0)

    warp = gl.arange(0, WARPS, gl.SliceLayout(1, LANE))[:, None][:, :, None]
    lane = gl.arange(0, LANES, gl.SliceLayout(0, LANE))[None, :][:, :, None]
    register = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(0, REGISTER)))[None, :][None, :, :]
    row = first_row + warp * (ROWS * TILES) + register // 2 * 8 + lane // 4
    token = first_token + lane % 4 * 2 + register % 2
    out += gl.program_id(2).to(gl.int64) * tokens * rows
    for i in gl.static_range(TILES):
        own_row = row + ROWS * i
        added = 0.0
        if bias is not None:
            added = gl.load(bias + own_row, mask=own_row < rows, other=0.0).to(gl.float32)
        for t in gl.static_range(BLOCK_T // TOKENS):
            own_token = token + TOKENS * t
            y = (totals[t * TILES + i] + added).to(out.dtype.element_ty)
            gl.store(out + own_token * rows + own_row, y, mask=(own_row < rows) & (own_token < tokens))


def linear(x: torch.Tensor, values: torch.Tensor, metadata: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [tokens, K] @ unpacked [rows, K].T + bias [rows], all of one dtype of 16 bits."""
    tokens, k = x.shape
    rows = len(values)
    unit = math.gcd(k // 4, ALIGNED)
    # copies are of 16 bytes
    x = x.clone() if x.data_ptr() % 16 else x
    tile = tiles_for("sparse_mma", 4, x.dtype, tokens, rows, k, architecture(x.device))
    split = SplitResult("sparse_mma", tile, (tokens, rows), k, x, bias, values, metadata)
    launch_tiles(sparse_mma_kernel, "sparse_mma", 4, split.grid, tile, x.device,
                 *(part.view(-1).view(torch.int32) for part in (x, values, metadata)), split.bias, split.out, tokens,
                 rows, k // 4 // unit, UNIT=unit, ELEMENT=ELEMENTS[x.dtype], STAGES=tile.num_stages)  # fmt: skip
    return split.sum()
