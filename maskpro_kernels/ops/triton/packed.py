"""Products with a packed N:M weight: values are placed in their columns in registers, and multiplied.

Values [rows, K N / M] and bitmask uint8 [rows, ceil(K / 8)] are contiguous. A thread processes a chunk of the weight at
a time. The values of a chunk fill 16 bytes, one load: four words of two 16-bit values. One word of the bitmask belongs
to them. int8 values fill 8 bytes and are converted to such words. On compute capability 8.x torch multiplies many
tokens with 2:4 weights, on sparse tensor cores.
"""

import math
import sys

import torch
import triton
import triton.language as tl

from .. import reference
from . import device as d
from . import tiles
from .launch import launch, launch_elements, launch_rows, launch_tiles
from .masked_gemm import SplitResult, operand_constants, own_part, own_sums, result_dtype
from .tiles import ALIGNED, PACKED_TOKENS, architecture, rows_for, tiles_for

VALUES = tl.constexpr(8)
SCALED = tl.constexpr(reference.SCALED)
WORDS = tl.constexpr(4)
# Patterns with whole groups in a chunk of 16 bytes, whose kernels the tests compile ahead of time
MULTIPLIED = frozenset({(2, 4), (1, 4), (4, 8), (8, 16)})
# Multiples that torch's kernel needs of rows and columns of the weight and of tokens, see
# SparseSemiStructuredTensorCUTLASS
ROWS, COLUMNS, TOKENS = 32, 64, 8
# Rows of a block of reordered metadata, and its columns, the words of a sector of memory
BLOCK_ROWS, BLOCK_COLUMNS = tl.constexpr(32), tl.constexpr(16)
# The lowest bit of each of four groups
LOWEST = tl.constexpr(0x1111)


def chunk_length(n: int, m: int) -> int:
    """Weights of a chunk, which has eight values."""
    return VALUES.value * m // n


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
def multiplied_byte(word, index: tl.constexpr, scale, ELEMENT: tl.constexpr):
    """A signed byte of an int32 word times a scale: the bits of ELEMENT, as int32."""
    # shift up to the sign bit, and down with sign extension
    number = (word << (24 - 8 * index)) >> 24
    value = d.round_to_nearest(number.to(tl.float32) * scale, ELEMENT)
    return value.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def multiplied_words(bytes_, scale, ELEMENT: tl.constexpr):
    """WORDS columns of two values of ELEMENT each, from two int32 columns of four int8 values each."""
    words = ()
    for i in tl.static_range(WORDS):
        low = multiplied_byte(bytes_[i // 2], 2 * (i % 2), scale, ELEMENT)
        words = words + (low | multiplied_byte(bytes_[i // 2], 2 * (i % 2) + 1, scale, ELEMENT) << 16,)
    return words


@triton.jit
def load_chunk(values, bitmask, scales, row, chunk, chunks, inside, ELEMENT: tl.constexpr):
    """(WORDS columns of a chunk's values, int32 code of its groups); zeros for chunks outside.

    A row has ``chunks`` chunks. With scales, values are int8.
    """
    at = row * chunks + chunk
    if scales is None:
        words = tl.load(values + at[:, None] * WORDS + tl.arange(0, WORDS)[None, :], mask=inside[:, None], other=0)
        return d.split_columns(words, WORDS), tl.load(bitmask + at, mask=inside, other=0).to(tl.int32)
    else:
        words = tl.load(values + at[:, None] * 2 + tl.arange(0, 2)[None, :], mask=inside[:, None], other=0)
        code = tl.load(bitmask + at, mask=inside, other=0).to(tl.int32)
        blocks = tl.cdiv(chunks, SCALED // VALUES)
        scale = tl.load(scales + row * blocks + chunk // (SCALED // VALUES), mask=inside, other=0.0).to(tl.float32)
        return multiplied_words(d.split_columns(words, 2), scale, ELEMENT), code


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
    N: tl.constexpr, M: tl.constexpr, UNIT: tl.constexpr, BY_BYTES: tl.constexpr, ELEMENT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Product with one token. A program computes ROWS rows over all of K; each thread has chunks of all its rows.

    With ``BY_BYTES`` values are not moved; for each one the kernel selects its activation.
    """
    CHUNK: tl.constexpr = VALUES * M // N
    chunks = units * UNIT
    first_row = tl.program_id(0) * ROWS
    totals = ()
    biases = ()
    for r in tl.static_range(ROWS):
        totals = totals + (tl.zeros((BLOCK,), tl.float32),)
        if bias is not None:
            biases = biases + (tl.load(bias + tl.minimum(first_row + r, rows - 1)).to(tl.float32),)
    for first in range(0, chunks, BLOCK):
        chunk = first + tl.arange(0, BLOCK)
        inside = chunk < chunks
        activations = load_activations(x, chunk, inside, CHUNK)
        if not BY_BYTES:
            activations = unpacked_columns(activations, CHUNK // 2, ELEMENT)
        new = ()
        for r in tl.static_range(ROWS):
            # beyond the end repeat the last row, which needs no mask
            row = tl.minimum(first_row + r, rows - 1).to(tl.int64)
            words, code = load_chunk(values, bitmask, scales, row, chunk, chunks, inside, ELEMENT)
            if BY_BYTES:
                chosen = unpacked_columns(d.chosen_pairs(activations, code), WORDS, ELEMENT)
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
    N: tl.constexpr, M: tl.constexpr, UNIT: tl.constexpr, BY_BYTES: tl.constexpr, ELEMENT: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
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
        words, code = load_chunk(values, bitmask, scales, row.to(tl.int64), chunk, chunks, inside, ELEMENT)
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
def load_code(bitmask, row, group, inside, row_bytes, M: tl.constexpr):
    """int32 group codes from the bitmask of any pattern."""
    pointers = bitmask + row * row_bytes + group * M // 8
    code = tl.load(pointers, mask=inside, other=0).to(tl.int32)
    if M < 8:
        code = code >> (group * M % 8).to(tl.int32) & ((1 << M) - 1)
    for i in tl.static_range(1, M // 8):
        code |= tl.load(pointers + i, mask=inside, other=0).to(tl.int32) << (8 * i)
    return code


@triton.jit(do_not_specialize=["groups", "row_bytes", "total"])
def unpack_kernel(
    values, bitmask, out, groups: tl.int64, row_bytes: tl.int64, total: tl.int64,
    N: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Unpack any pattern, with values of any integer type; ``groups`` in a row, ``total`` in all."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < total
    kept = d.decode(load_code(bitmask, index // groups, index % groups, inside, row_bytes, M), M)
    at = index * N
    columns = ()
    for i in tl.static_range(M):
        # if a bitmask keeps too many, read nothing beyond the end
        columns = columns + (tl.load(values + at, mask=kept[i] & (at < total * N), other=0),)
        at += kept[i].to(tl.int64)
    tile = d.join_columns(columns, M)
    tl.store(out + index[:, None] * M + tl.arange(0, M)[None, :], tile, mask=inside[:, None])


@triton.jit
def indices_of_codes(codes):
    """Convert four codes of 2:4 to four pairs of places of two bits each, lower place first, in int32 words.

    The lower place is 0 if weight 0 is kept, else 1 if weight 1 is kept, else 2. The upper place is 3 if weight 3 is
    kept, else 1 if weights 0 and 1 are kept, else 2: its lower bit is set for 1 and 3, its upper bit for 2 and 3.
    """
    kept = ()
    for i in tl.static_range(4):
        kept = kept + ((codes >> i) & LOWEST,)
    both, neither = kept[0] & kept[1], (kept[0] | kept[1]) ^ LOWEST
    return (kept[1] & ~kept[0]) | neither << 1 | (both | neither | kept[3]) << 2 | (both ^ LOWEST) << 3


@triton.jit
def metadata_kernel(bitmask, out, rows, columns, count, BLOCK: tl.constexpr):
    """Convert words [rows, columns] of four codes to words of four pairs of places, in the order of CUTLASS.

    In a block of 32 rows, row 8 a + b goes to row 4 b + a. Then blocks of 2 x 2 are transposed, and pairs of columns
    are stored one after the other.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # a word's target: its block, and in it the pair of columns, the row, and the column of the pair
    block, at = index // (BLOCK_ROWS * BLOCK_COLUMNS), index % (BLOCK_ROWS * BLOCK_COLUMNS)
    row_blocks = rows // BLOCK_ROWS
    pair = block // row_blocks * (BLOCK_COLUMNS // 2) + at // (2 * BLOCK_ROWS)
    first_row, place = block % row_blocks * BLOCK_ROWS, at % (2 * BLOCK_ROWS)
    row = first_row + (place // 4 % 2) * 16 + (place % 2) * 8 + place // 8
    column = 2 * pair + place // 2 % 2
    inside = (index < count) & (column < columns)
    codes = tl.load(bitmask + row.to(tl.int64) * columns + column, mask=inside, other=0).to(tl.int32)
    where = pair.to(tl.int64) * (2 * rows) + 2 * first_row + place
    tl.store(out + where, indices_of_codes(codes).to(tl.int16), mask=inside)


def route(x: torch.Tensor, values: torch.Tensor, bitmask: torch.Tensor, n: int, m: int) -> str:
    """Route of the product of x [tokens, K] with a packed weight.

    "vector": one token, without tensor cores. "tiles": unpack tiles of the weight in registers and multiply. "sparse":
    torch multiplies by sparse tensor cores. "unpack": unpack the whole weight into a temporary one; torch multiplies.
    """
    tokens, k = x.shape
    # words must be aligned, but a slice may start anywhere
    aligned = values.data_ptr() % 16 == 0 and bitmask.data_ptr() % 16 == 0
    if not (x.is_cuda or tiles.ON_CPU) or not tokens or not len(values) or x.itemsize != 2 or not aligned:
        return "unpack"
    if tokens > PACKED_TOKENS:
        sparse = sparse_available(x.device) and sparse_fits(x, values, n, m)
        return "sparse" if sparse else "unpack"
    if (n, m) not in MULTIPLIED or k % chunk_length(n, m):
        return "unpack"
    return "vector" if tokens == 1 else "tiles"


def nm_linear(x, values, bitmask, scales, bias, n, m):
    """x [tokens, K] @ unpacked [rows, K].T + bias, in the dtype of x, which values or scales have too."""
    tokens, rows = x.shape[0], values.shape[0]
    if tokens == 0:
        return torch.empty(0, rows, dtype=x.dtype, device=x.device)
    how = route(x, values, bitmask, n, m)
    if how == "vector":
        return _vector(x, values, bitmask, scales, bias, n, m)
    if how == "tiles":
        return _tiles(x, values, bitmask, scales, bias, n, m)
    if scales is not None:
        values = reference.dequantized(values, scales, x.dtype)
    if how == "sparse":
        return sparse_linear(x, values, bitmask, bias)
    return torch.nn.functional.linear(x, unpack_nm(values, bitmask, n, m), bias)


def kernel_arguments(values, bitmask, k, n, m, dtype, target):
    """(values and bitmask as words, units of chunks in a row, constants) of kernels for activations of ``dtype``."""
    chunks = k // chunk_length(n, m)
    unit = math.gcd(chunks, ALIGNED)
    words = values.view(torch.int32), bitmask.view({16: torch.int16, 32: torch.int32}[chunk_length(n, m)])
    return words, chunks // unit, kernel_constants(n, m, dtype, target) | {"UNIT": unit}


def kernel_constants(n: int, m: int, dtype: torch.dtype, target: str) -> dict:
    """Constants of kernels for activations of ``dtype`` on an architecture."""
    element = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
    return {"N": n, "ELEMENT": element, "BY_BYTES": (n, m) == (2, 4) and target.startswith("sm_")}


def _vector(x, values, bitmask, scales, bias, n, m):
    rows, k, target = len(values), x.shape[1], architecture(x.device)
    words, units, constants = kernel_arguments(values, bitmask, k, n, m, x.dtype, target)
    # words of two activations must be aligned
    if x.data_ptr() % 4 or x.storage_offset() % 2:
        x = x.flatten().clone()
    out = torch.empty(1, rows, dtype=result_dtype(x.dtype), device=x.device)
    config = rows_for(rows, k // chunk_length(n, m), target)
    launch_rows(packed_vector_kernel, "packed_vector", m, rows, config, x.device,
                x.flatten().view(torch.int32), *words, scales, bias, out, rows, units, **constants)  # fmt: skip
    return out.to(x.dtype)


def _tiles(x, values, bitmask, scales, bias, n, m):
    (tokens, k), rows, target = x.shape, len(values), architecture(x.device)
    words, units, constants = kernel_arguments(values, bitmask, k, n, m, x.dtype, target)
    tile = tiles_for("packed_linear", m, x.dtype, tokens, rows, k, target)
    split = SplitResult("packed_linear", tile, (tokens, rows), k, x, bias)
    launch_tiles(packed_linear_kernel, "packed_linear", m, split.grid, tile, x.device,
                 x, *words, scales, split.bias, split.out, tokens, rows, units,
                 **constants, **operand_constants(x.dtype))  # fmt: skip
    return split.sum()


def metadata(bitmask: torch.Tensor) -> torch.Tensor:
    """Metadata int16 [rows, K / 16] of a bitmask uint8 [rows, K / 8] of 2:4, rows and K multiples of 32."""
    words = bitmask.view(torch.int16)
    rows, columns = words.shape
    out = torch.empty_like(words)
    count = rows * triton.cdiv(columns, BLOCK_COLUMNS.value) * BLOCK_COLUMNS.value
    launch_elements(metadata_kernel, "metadata", count, words.device, words, out, rows, columns, count)
    return out


def sparse_available(device: torch.device) -> bool:
    """Return whether torch multiplies with semi-structured weights on a device: by CUTLASS, only on 8.x and Linux.

    On 9.x and later torch has only cuSPARSELt, which makes its format from the dense weight.
    """
    if device.type != "cuda" or torch.version.hip is not None or sys.platform != "linux":
        return False
    return torch.cuda.get_device_capability(device)[0] == 8


def sparse_fits(x: torch.Tensor, values: torch.Tensor, n: int, m: int) -> bool:
    """Return whether torch's kernel supports x [tokens, K] of 16 bits and the values of a weight [rows, K]."""
    sizes = len(values) % ROWS == 0 and x.shape[1] % COLUMNS == 0
    return (n, m) == (2, 4) and x.itemsize == 2 and sizes and values.data_ptr() % 16 == 0


def sparse_linear(
    x: torch.Tensor, values: torch.Tensor, bitmask: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x [tokens, K] @ unpacked [rows, K].T + bias [rows], all of one dtype of 16 bits; see ``sparse_fits``.

    torch's kernel, of CUTLASS, reads the packed values unchanged. Instead of the bitmask it reads the metadata of
    ``torch.sparse.SparseSemiStructuredTensorCUTLASS``: two bits for each value, reordered.
    """
    tokens = len(x)
    if tokens % TOKENS or x.data_ptr() % 16:
        x = torch.nn.functional.pad(x, (0, 0, 0, -tokens % TOKENS))
    operands = values, metadata(bitmask), x.t()
    if bias is None:
        y = torch._sparse_semi_structured_mm(*operands)
    else:
        y = torch._sparse_semi_structured_addmm(bias, *operands)
    return y[:, :tokens].t().contiguous()


def unpack_nm(values, bitmask, n, m):
    """``reference.unpack_nm`` as one kernel."""
    rows, groups = values.shape[0], values.shape[1] // n
    out = torch.empty(rows, groups * m, dtype=values.dtype, device=values.device)
    integers, total = reference.INTEGERS[values.itemsize], rows * groups
    launch(unpack_kernel, "unpack", m, total, values.device,
           values.view(integers), bitmask, out.view(integers), groups, bitmask.shape[1], total, N=n)  # fmt: skip
    return out
