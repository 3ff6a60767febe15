"""Products with a packed N:M weight: values are placed in their columns in registers, and multiplied.

Values [rows, K N / M] and bitmask uint8 [rows, ceil(K / 8)] are contiguous. A thread processes a chunk of the weight at
a time. The values of a chunk fill 16 bytes, one load: four words of two 16-bit values. One word of the bitmask belongs
to them. int8 values fill 8 bytes, int4 values 4, and are converted to such words.

For sparse tensor cores a 2:4 weight has int16 metadata in place of the bitmask.
"""

import math
import sys

import torch
import triton
import triton.language as tl

from .. import reference
from . import device as d
from . import tiles
from .launch import launch, launch_rows, launch_tiles
from .masked_gemm import SplitResult, operand_constants, own_part, own_sums, result_dtype
from .tiles import ALIGNED, INTERPRETED, LIBRARY_TOKENS, PACKED_TOKENS, TARGETS, architecture, rows_for, tiles_for

VALUES = tl.constexpr(8)
WORDS = tl.constexpr(4)
# Patterns with whole groups in a chunk of 16 bytes, whose kernels the tests compile ahead of time
MULTIPLIED = frozenset({(2, 4), (1, 4), (4, 8), (8, 16)})
# Multiples that torch's kernel needs of rows and columns of the weight and of tokens, see
# SparseSemiStructuredTensorCUTLASS
ROWS = 32
COLUMNS = 64
TOKENS = 8


def chunk_length(n: int, m: int) -> int:
    """Weights of a chunk, which has eight values."""
    return VALUES.value * m // n


@triton.constexpr_function
def wide(bits: int, by_bytes: bool, unit: int) -> int:
    """Number of chunks that a thread of ``packed_vector`` loads at once, in rows of a multiple of ``unit`` chunks."""
    return 4 if bits == 4 and by_bytes and unit % 4 == 0 else 1


@triton.jit
def low_half(word, ELEMENT: tl.constexpr, OUT: tl.constexpr):
    """Value in the low half of an int32 word, as OUT."""
    return (word & 0xFFFF).to(tl.int16).to(ELEMENT, bitcast=True).to(OUT)


@triton.jit
def high_half(word, ELEMENT: tl.constexpr, OUT: tl.constexpr):
    return (word >> 16).to(tl.int16).to(ELEMENT, bitcast=True).to(OUT)


@triton.jit
def halves(word, ELEMENT: tl.constexpr, OUT: tl.constexpr):
    """(value in the low half of an int32 word, value in the high half), as OUT."""
    if ELEMENT == tl.bfloat16 and OUT == tl.float32:
        # a bfloat16 is the upper half of a float32
        pair = (word << 16).to(tl.float32, bitcast=True), (word & -0x10000).to(tl.float32, bitcast=True)
    else:
        pair = low_half(word, ELEMENT, OUT), high_half(word, ELEMENT, OUT)
    return pair


@triton.jit
def placed_one(value, kept, M: tl.constexpr):
    """M columns of a group with one value."""
    columns = ()
    for i in tl.static_range(M):
        columns = columns + (tl.where(kept[i], value, 0.0),)
    return columns


@triton.jit
def placed_two_of_four(first, second, kept):
    """4 columns of a group with two values: the first at the first kept place, the other at the last."""
    return (
        tl.where(kept[0], first, 0.0),
        tl.where(kept[1], tl.where(kept[0], second, first), 0.0),
        tl.where(kept[2], tl.where(kept[3], first, second), 0.0),
        tl.where(kept[3], second, 0.0),
    )


@triton.jit
def placed_in_turn(words, kept, COUNT: tl.constexpr, M: tl.constexpr, ELEMENT: tl.constexpr, OUT: tl.constexpr):
    """M columns of a group whose values are in COUNT words: each kept place takes the next value."""
    columns = ()
    for i in tl.static_range(M):
        columns = columns + (tl.where(kept[i], low_half(words[0], ELEMENT, OUT), 0.0),)
        moved = ()
        for j in tl.static_range(COUNT):
            # unsigned, so that the sign does not fill the place of the next value
            shifted = words[j].to(tl.uint32, bitcast=True) >> 16
            if j + 1 < COUNT:
                shifted |= words[j + 1].to(tl.uint32, bitcast=True) << 16
            moved = moved + (tl.where(kept[i], shifted.to(tl.int32, bitcast=True), words[j]),)
        words = moved
    return columns


@triton.jit
def placed(
    words, code, N: tl.constexpr, M: tl.constexpr, BY_BYTES: tl.constexpr, ELEMENT: tl.constexpr, OUT: tl.constexpr
):
    """Columns of OUT with the values of a chunk at their places, zeros elsewhere."""
    columns = ()
    if BY_BYTES:
        pairs = d.placed_pairs(words, code)
        for i in tl.static_range(VALUES):
            columns = columns + halves(pairs[i], ELEMENT, OUT)
    else:
        for group in tl.static_range(VALUES // N):
            columns = columns + placed_group(words, d.decode(code >> (group * M), M), group, N, M, ELEMENT, OUT)
    return columns


@triton.jit
def placed_group(
    words, kept, GROUP: tl.constexpr, N: tl.constexpr, M: tl.constexpr, ELEMENT: tl.constexpr, OUT: tl.constexpr
):
    """M columns of OUT, for one group of a chunk."""
    if N == 1:
        columns = placed_one(halves(words[GROUP // 2], ELEMENT, OUT)[GROUP % 2], kept, M)
    elif N == 2:
        first, second = halves(words[GROUP], ELEMENT, OUT)
        columns = placed_two_of_four(first, second, kept)
    else:
        own = ()
        for i in tl.static_range(N // 2):
            own = own + (words[GROUP * (N // 2) + i],)
        columns = placed_in_turn(own, kept, N // 2, M, ELEMENT, OUT)
    return columns


@triton.jit
def rounded_bits(value, ELEMENT: tl.constexpr):
    """Round float32 to ELEMENT: its bits, as int32."""
    return d.round_to_nearest(value, ELEMENT).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def multiplied_byte(word, index: tl.constexpr, scale, ELEMENT: tl.constexpr):
    """A signed byte of an int32 word times a scale: the bits of ELEMENT, as int32."""
    # shift up to the sign bit, and down with sign extension
    number = (word << (24 - 8 * index)) >> 24
    return rounded_bits(number.to(tl.float32) * scale, ELEMENT)


@triton.jit
def multiplied_words(bytes_, scale, ELEMENT: tl.constexpr):
    """WORDS columns of two values of ELEMENT each, from two int32 columns of four int8 values each."""
    words = ()
    for i in tl.static_range(WORDS):
        low = multiplied_byte(bytes_[i // 2], 2 * (i % 2), scale, ELEMENT)
        words = words + (low | multiplied_byte(bytes_[i // 2], 2 * (i % 2) + 1, scale, ELEMENT) << 16,)
    return words


@triton.jit
def fused_pairs(pairs, factors, addends, ELEMENT: tl.constexpr, PAIRED: tl.constexpr):
    """pairs * factors + addends for int32 words of two values of ELEMENT; ``PAIRED`` uses NVIDIA's instruction."""
    if PAIRED:
        BFLOAT: tl.constexpr = "fma.rn.bf16x2 $0, $1, $2, $3;"
        HALF: tl.constexpr = "fma.rn.f16x2 $0, $1, $2, $3;"
        return tl.inline_asm_elementwise(
            BFLOAT if ELEMENT == tl.bfloat16 else HALF, "=r,r,r,r", [pairs, factors, addends],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        low, high = halves(pairs, ELEMENT, tl.float32)
        low_factor, high_factor = halves(factors, ELEMENT, tl.float32)
        low_addend, high_addend = halves(addends, ELEMENT, tl.float32)
        low = low * low_factor + low_addend
        high = high * high_factor + high_addend
        return rounded_bits(low, ELEMENT) | rounded_bits(high, ELEMENT) << 16


@triton.jit
def int4_words(word, scale, ELEMENT: tl.constexpr, PAIRED: tl.constexpr):
    """WORDS columns of two values of ELEMENT each, from an int32 column of eight int4 values, and scales of ELEMENT.

    MIDDLE are the bits of 136 or 1032, whose last four are 8: exclusive or with a value's four bits adds the value.
    """
    MIDDLE: tl.constexpr = 0x43084308 if ELEMENT == tl.bfloat16 else 0x64086408
    one = tl.full(word.shape, 0x3F803F80 if ELEMENT == tl.bfloat16 else 0x3C003C00, tl.int32)
    # with the signs of both halves; a sum with -0.0 keeps every number
    minus_middle = tl.full(word.shape, MIDDLE - 0x7FFF8000, tl.int32)
    minus_zero = tl.full(word.shape, -0x7FFF8000, tl.int32)
    scale = scale.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    scale |= scale << 16
    words = ()
    for i in tl.static_range(WORDS):
        if PAIRED:
            # byte i of the word, and in the upper half of the word without its first value
            pair = d.permuted_bytes(word, word >> 4, tl.full(word.shape, i | (i + 4) << 8, tl.int32)) & 0x000F000F
        else:
            pair = word >> 8 * i & 0xF | (word >> 8 * i + 4 & 0xF) << 16
        pair = fused_pairs(pair ^ MIDDLE, one, minus_middle, ELEMENT, PAIRED)
        words = words + (fused_pairs(pair, scale, minus_zero, ELEMENT, PAIRED),)
    return words


@triton.jit
def load_scale(scales, place, inside, ELEMENT: tl.constexpr):
    """Scale of ELEMENT at each place."""
    if scales.dtype.element_ty == tl.int32:
        # two a word, since an asynchronous copy has at least 4 bytes
        word = tl.load(scales + (place >> 1), mask=inside, other=0)
        scale = low_half(word >> ((place & 1) * 16).to(tl.int32), ELEMENT, ELEMENT)
    else:
        scale = tl.load(scales + place, mask=inside, other=0.0)
    return scale


@triton.jit
def load_chunk(
    values, bitmask, scales, row, chunk, chunks, inside, GROUP: tl.constexpr, BITS: tl.constexpr, PAIRED: tl.constexpr,
    ELEMENT: tl.constexpr,
):  # fmt: skip
    """(WORDS columns of a chunk's values, int32 code of its groups); zeros for chunks outside.

    A row has ``chunks`` chunks; values have ``BITS``, and ``GROUP`` chunks of integers share a scale.
    """
    at = row * chunks + chunk
    if BITS == 16:
        words = tl.load(values + at[:, None] * WORDS + tl.arange(0, WORDS)[None, :], mask=inside[:, None], other=0)
        return d.split_columns(words, WORDS), tl.load(bitmask + at, mask=inside, other=0).to(tl.int32)
    else:
        scale = load_scale(scales, row * tl.cdiv(chunks, GROUP) + chunk // GROUP, inside, ELEMENT)
        code = tl.load(bitmask + at, mask=inside, other=0).to(tl.int32)
        if BITS == 8:
            words = tl.load(values + at[:, None] * 2 + tl.arange(0, 2)[None, :], mask=inside[:, None], other=0)
            words = multiplied_words(d.split_columns(words, 2), scale.to(tl.float32), ELEMENT)
        else:
            words = int4_words(tl.load(values + at, mask=inside, other=0), scale, ELEMENT, PAIRED)
        return words, code


@triton.jit
def load_activations(x, chunk, inside, CHUNK: tl.constexpr):
    """CHUNK / 2 columns of int32, two values of x each."""
    columns = ()
    for part in tl.static_range(CHUNK // VALUES):
        # one load of a thread: a wider tile would be distributed over threads, through shared memory
        pointers = x + chunk[:, None] * (CHUNK // 2) + part * WORDS + tl.arange(0, WORDS)[None, :]
        columns = columns + d.split_columns(tl.load(pointers, mask=inside[:, None], other=0), WORDS)
    return columns


@triton.jit
def added_products(total, weights, activations, COUNT: tl.constexpr):
    """Add the products of COUNT columns to a sum, in order."""
    for i in tl.static_range(COUNT):
        total = tl.fma(weights[i], activations[i], total)
    return total


@triton.jit
def unpacked_columns(words, COUNT: tl.constexpr, ELEMENT: tl.constexpr):
    """Twice COUNT columns of float32, from int32 columns of two values each."""
    columns = ()
    for i in tl.static_range(COUNT):
        columns = columns + halves(words[i], ELEMENT, tl.float32)
    return columns


@triton.jit
def packed_vector_kernel(
    x, values, bitmask, scales, bias, out, rows, units,
    N: tl.constexpr, M: tl.constexpr, UNIT: tl.constexpr, BY_BYTES: tl.constexpr, GROUP: tl.constexpr,
    BITS: tl.constexpr, PAIRED: tl.constexpr, ELEMENT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Product with one token. A program computes ROWS rows over all of K; each thread has chunks of all its rows.

    With ``BY_BYTES`` values are not moved; for each one the kernel selects its activation.
    """
    CHUNK: tl.constexpr = VALUES * M // N
    # int4 values of as many chunks fill 16 bytes, one load
    WIDE: tl.constexpr = wide(BITS, BY_BYTES, UNIT)
    chunks = units * UNIT
    parts = units * (UNIT // WIDE)
    first_row = tl.program_id(0) * ROWS
    totals = ()
    biases = ()
    for r in tl.static_range(ROWS):
        totals = totals + (tl.zeros((BLOCK,), tl.float32),)
        if bias is not None:
            biases = biases + (tl.load(bias + tl.minimum(first_row + r, rows - 1)).to(tl.float32),)
    for first in range(0, parts, BLOCK):
        chunk = first + tl.arange(0, BLOCK)
        inside = chunk < parts
        activations = ()
        for i in tl.static_range(WIDE):
            activations = activations + (load_activations(x, chunk * WIDE + i, inside, CHUNK),)
        if not BY_BYTES:
            activations = unpacked_columns(activations[0], CHUNK // 2, ELEMENT)
        new = ()
        for r in tl.static_range(ROWS):
            # beyond the end repeat the last row, which needs no mask
            row = tl.minimum(first_row + r, rows - 1).to(tl.int64)
            if WIDE == 1:
                words, code = load_chunk(
                    values, bitmask, scales, row, chunk, chunks, inside, GROUP, BITS, PAIRED, ELEMENT
                )
            if WIDE > 1:
                at = ((row * parts + chunk) * WIDE)[:, None] + tl.arange(0, WIDE)[None, :]
                given = d.split_columns(tl.load(values + at, mask=inside[:, None], other=0), WIDE)
                codes = d.split_columns(tl.load(bitmask + at, mask=inside[:, None], other=0), WIDE)
                place = row * tl.cdiv(chunks, GROUP) + chunk // (GROUP // WIDE)
                scale = load_scale(scales, place, inside, ELEMENT)
                total = totals[r]
                for i in tl.static_range(WIDE):
                    words = int4_words(given[i], scale, ELEMENT, PAIRED)
                    chosen = unpacked_columns(d.chosen_pairs(activations[i], codes[i].to(tl.int32)), WORDS, ELEMENT)
                    total = added_products(total, unpacked_columns(words, WORDS, ELEMENT), chosen, VALUES)
            elif BY_BYTES:
                chosen = unpacked_columns(d.chosen_pairs(activations[0], code), WORDS, ELEMENT)
                total = added_products(totals[r], unpacked_columns(words, WORDS, ELEMENT), chosen, VALUES)
            else:
                columns = placed(words, code, N, M, False, ELEMENT, tl.float32)
                total = added_products(totals[r], columns, activations, CHUNK)
            new = new + (total,)
        totals = new
    for r in tl.static_range(ROWS):
        row = tl.minimum(first_row + r, rows - 1)
        y = tl.sum(totals[r], 0)
        if bias is not None:
            y += biases[r]
        tl.store(out + row, y.to(out.dtype.element_ty))


# not specialized on units = 1: LLVM would see a single step, and move the zeros of its sum after the fence of wgmma
@triton.jit(do_not_specialize=["tokens", "units"])
def packed_linear_kernel(
    x, values, bitmask, scales, bias, out, tokens: tl.int64, rows, units,
    N: tl.constexpr, M: tl.constexpr, UNIT: tl.constexpr, BY_BYTES: tl.constexpr, GROUP: tl.constexpr,
    BITS: tl.constexpr, PAIRED: tl.constexpr, ELEMENT: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Product with several tokens. Programs along the grid's last axis split K and write sums; see ``masked_gemm``."""
    CHUNK: tl.constexpr = VALUES * M // N
    CHUNKS: tl.constexpr = BLOCK_K // CHUNK
    chunks = units * UNIT
    start, end = own_part(chunks, CHUNKS)
    first_row = tl.program_id(0) * BLOCK_OUT
    token = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K)
    index = tl.arange(0, BLOCK_OUT * CHUNKS)
    row = first_row + index // CHUNKS
    x_pointers = x + token[None, :] * (chunks * CHUNK) + start * CHUNK + k[:, None]
    total = tl.zeros((BLOCK_OUT, BLOCK_T), tl.float32)
    for first in range(start, end, CHUNKS):
        chunk = first + index % CHUNKS
        inside = (row < rows) & (chunk < chunks)
        words, code = load_chunk(
            values, bitmask, scales, row.to(tl.int64), chunk, chunks, inside, GROUP, BITS, PAIRED, ELEMENT
        )
        tile = d.join_columns(placed(words, code, N, M, BY_BYTES, ELEMENT, OPERAND), CHUNK)
        weight = tl.reshape(tile, (BLOCK_OUT, BLOCK_K))
        present = (token[None, :] < tokens) & (first * CHUNK + k[:, None] < chunks * CHUNK)
        x_tile = tl.load(x_pointers, mask=present, other=0.0).to(OPERAND)
        total = tl.dot(weight, x_tile, total, input_precision=PRECISION)
        x_pointers += BLOCK_K
    row = first_row + tl.arange(0, BLOCK_OUT)
    if bias is not None:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    pointers = own_sums(out, tokens, rows) + token[None, :] * rows + row[:, None]
    tl.store(pointers, total.to(out.dtype.element_ty), mask=(token[None, :] < tokens) & (row[:, None] < rows))


@triton.jit
def load_metadata_code(metadata, row, group, inside, row_blocks):
    """int32 group codes from the metadata of 2:4; ``metadata_of`` says where a word of four groups lies."""
    block = group // 8 * row_blocks + row // 32
    place = block * 64 + row % 8 * 8 + row % 32 // 16 * 4 + group % 8 // 4 * 2 + row % 16 // 8
    places = tl.load(metadata + place, mask=inside, other=0).to(tl.int32) >> (group % 4 * 4).to(tl.int32)
    return 1 << (places & 3) | 1 << (places >> 2 & 3)


@triton.jit
def load_code(bitmask, row, group, inside, row_bytes, M: tl.constexpr):
    """int32 group codes from the bitmask of any pattern."""
    pointers = bitmask + row * row_bytes + group * M // 8
    code = tl.load(pointers, mask=inside, other=0).to(tl.int32)
    if M < 8:
        code = code >> (group * M % 8).to(tl.int32) & ((1 << M) - 1)
    for i in tl.static_range(1, M // 8):
        code |= tl.load(pointers + i, mask=inside, other=0).to(tl.int32) << (8 * i)
    return code


@triton.jit(do_not_specialize=["groups", "stride", "total"])
def unpack_kernel(
    values, bitmask, out, groups: tl.int64, stride: tl.int64, total: tl.int64,
    N: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Unpack any pattern, with values of any integer type; ``groups`` in a row, ``total`` in all.

    ``stride`` is the bytes in a row of a bitmask uint8, or the blocks of 32 rows of metadata int16 of 2:4.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < total
    if bitmask.dtype.element_ty == tl.int16:
        code = load_metadata_code(bitmask, index // groups, index % groups, inside, stride)
    else:
        code = load_code(bitmask, index // groups, index % groups, inside, stride, M)
    kept = d.decode(code, M)
    at = index * N
    columns = ()
    for i in tl.static_range(M):
        # if a bitmask keeps too many, read nothing beyond the end
        columns = columns + (tl.load(values + at, mask=kept[i] & (at < total * N), other=0),)
        at += kept[i].to(tl.int64)
    tile = d.join_columns(columns, M)
    tl.store(out + index[:, None] * M + tl.arange(0, M)[None, :], tile, mask=inside[:, None])


def route(x: torch.Tensor, values: torch.Tensor, bitmask: torch.Tensor, n: int, m: int) -> str:
    """Route of the product of x [tokens, K] with a packed weight.

    "vector": one token, without tensor cores. "tiles": unpack tiles of the weight in registers and multiply.
    "sparse_mma", "sparse": multiply by sparse tensor cores, in a kernel or by torch, with metadata in place of the
    bitmask. "unpack": unpack the whole weight into a temporary one; torch multiplies.
    """
    tokens, k = x.shape
    # words must be aligned, but a slice may start anywhere
    aligned = values.data_ptr() % 16 == 0 and bitmask.data_ptr() % 16 == 0
    if not (x.is_cuda or tiles.ON_CPU) or not tokens or not values.shape[0] or x.itemsize != 2 or not aligned:
        return "unpack"
    if bitmask.dtype == torch.int16:
        if tokens > LIBRARY_TOKENS and sparse_available(x.device) and sparse_fits(x, values):
            return "sparse"
        # nothing interprets inline assembly
        few = tokens <= TARGETS[architecture(x.device)].sparse_tokens and not INTERPRETED
        return "sparse_mma" if few else "unpack"
    if tokens > PACKED_TOKENS or (n, m) not in MULTIPLIED or k % chunk_length(n, m):
        return "unpack"
    return "vector" if tokens == 1 else "tiles"


def nm_linear(x, values, bitmask, scales, bias, n, m):
    """x [tokens, K] @ unpacked [rows, K].T + bias, in the dtype of x, which values or scales have too."""
    tokens = x.shape[0]
    rows = values.shape[0]
    if tokens == 0:
        return torch.empty(0, rows, dtype=x.dtype, device=x.device)
    how = route(x, values, bitmask, n, m)
    if how == "sparse_mma":
        # imported here: a release may have no Gluon
        from . import sparse_mma

        return sparse_mma.linear(x, values, bitmask, bias)
    if how == "vector":
        return _vector(x, values, bitmask, scales, bias, n, m)
    if how == "tiles":
        return _tiles(x, values, bitmask, scales, bias, n, m)
    if scales is not None:
        values = reference.dequantized(values, scales, x.dtype)
    if how == "sparse":
        return sparse_linear(x, values, bitmask, bias)
    return torch.nn.functional.linear(x, unpack_nm(values, bitmask, n, m), bias)


def nm_linear_input_grad(grad, values, bitmask, scales, n, m):
    """grad [tokens, rows] @ unpacked [rows, K], in the dtype of grad, which values or scales have too."""
    if scales is not None:
        values = reference.dequantized(values, scales, scales.dtype)
    return grad @ unpack_nm(values, bitmask, n, m)


def kernel_arguments(values, bitmask, scales, k, n, m, dtype, target):
    """(values, bitmask and scales as words, units of chunks in a row, constants) for activations of ``dtype``."""
    group = VALUES.value if scales is None else reference.scaled_group(values, scales)
    constants = kernel_constants(n, m, dtype, target, values.dtype, group)
    chunks = k // chunk_length(n, m)
    unit = math.gcd(chunks, ALIGNED)
    word = {16: torch.int16, 32: torch.int32}[chunk_length(n, m)]
    words = values.view(-1).view(torch.int32), bitmask.view(-1).view(word)
    if scales is not None and scales.numel() % 2 == scales.storage_offset() % 2 == scales.data_ptr() % 4 == 0:
        scales = scales.view(-1).view(torch.int32)
    return (*words, scales), chunks // unit, constants | {"UNIT": unit}


def kernel_constants(
    n: int, m: int, dtype: torch.dtype, target: str, values: torch.dtype, group: int = VALUES.value
) -> dict:
    """Constants of kernels for activations of ``dtype`` on an architecture; ``group`` values share a scale."""
    bits = {torch.int8: 8, torch.uint8: 4}.get(values, 16)
    on_nvidia = target.startswith("sm_")
    element = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
    scaled = {"GROUP": group // VALUES.value, "BITS": bits, "PAIRED": on_nvidia and not INTERPRETED}
    return {"N": n, "ELEMENT": element, "BY_BYTES": (n, m) == (2, 4) and on_nvidia, **scaled}


def _vector(x, values, bitmask, scales, bias, n, m):
    rows = len(values)
    k = x.shape[1]
    target = architecture(x.device)
    words, units, constants = kernel_arguments(values, bitmask, scales, k, n, m, x.dtype, target)
    # words of two activations must be aligned
    if x.data_ptr() % 4 or x.storage_offset() % 2:
        x = x.flatten().clone()
    out = torch.empty(1, rows, dtype=result_dtype(x.dtype), device=x.device)
    parts = units * constants["UNIT"] // wide(constants["BITS"], constants["BY_BYTES"], constants["UNIT"])
    config = rows_for(rows, parts, target)
    launch_rows(packed_vector_kernel, "packed_vector", m, rows, config, x.device,
                x.flatten().view(torch.int32), *words, bias, out, rows, units, **constants)  # fmt: skip
    return out.to(x.dtype)


def _tiles(x, values, bitmask, scales, bias, n, m):
    tokens, k = x.shape
    rows = values.shape[0]
    target = architecture(x.device)
    words, units, constants = kernel_arguments(values, bitmask, scales, k, n, m, x.dtype, target)
    tile = tiles_for("packed_linear", m, x.dtype, tokens, rows, k, target)
    split = SplitResult("packed_linear", tile, (tokens, rows), k, x, bias, values, bitmask)
    launch_tiles(packed_linear_kernel, "packed_linear", m, split.grid, tile, x.device,
                 x, *words, split.bias, split.out, tokens, rows, units,
                 **constants, **operand_constants(x.dtype))  # fmt: skip
    return split.sum()


def sparse_available(device: torch.device) -> bool:
    """Return whether torch multiplies with semi-structured weights on a device: by CUTLASS, only on 8.x and Linux.

    On 9.x and later torch has only cuSPARSELt, which makes its format from the dense weight.
    """
    if device.type != "cuda" or torch.version.hip is not None or sys.platform != "linux":
        return False
    return torch.cuda.get_device_capability(device)[0] == 8


def sparse_fits(x: torch.Tensor, values: torch.Tensor) -> bool:
    """Return whether torch's kernel supports x [tokens, K] and the values of a weight [rows, K], both of 16 bits."""
    return len(values) % ROWS == 0 and x.shape[1] % COLUMNS == 0


def sparse_linear(
    x: torch.Tensor, values: torch.Tensor, metadata: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x [tokens, K] @ unpacked [rows, K].T + bias [rows], all of one dtype of 16 bits; see ``sparse_fits``.

    torch's kernel, of CUTLASS, reads packed values and metadata unchanged.
    """
    tokens = len(x)
    if tokens % TOKENS or x.data_ptr() % 16:
        x = torch.nn.functional.pad(x, (0, 0, 0, -tokens % TOKENS))
    operands = values, metadata, x.t()
    if bias is None:
        y = torch._sparse_semi_structured_mm(*operands)
    else:
        y = torch._sparse_semi_structured_addmm(bias, *operands)
    return y[:, :tokens].t().contiguous()


def unpack_nm(values, bitmask, n, m):
    """``reference.unpack_nm`` as one kernel."""
    rows = values.shape[0]
    groups = values.shape[1] // n
    out = torch.empty(rows, groups * m, dtype=values.dtype, device=values.device)
    integers = reference.INTEGERS[values.itemsize]
    total = rows * groups
    stride = bitmask.shape[1] if bitmask.dtype == torch.uint8 else len(bitmask) // 32
    launch(unpack_kernel, "unpack", m, total, values.device,
           values.view(integers), bitmask, out.view(integers), groups, stride, total, N=n)  # fmt: skip
    return out
