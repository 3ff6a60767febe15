"""Products with 2:4 weights by torch's semi-structured matmul, on the sparse tensor cores of compute capability 8.x.

torch's kernel, CUTLASS's, takes the kept values as they are packed, and in place of the bitmask the metadata of
``torch.sparse.SparseSemiStructuredTensorCUTLASS``: two bits for each value, in an order of its own. On 9.x and later
torch has cuSPARSELt alone, whose format comes from the dense weight.
"""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch_elements

# Of weights and of tokens what torch's kernel takes multiples of, see SparseSemiStructuredTensorCUTLASS
ROWS, COLUMNS, TOKENS = 32, 64, 8
# Rows of a block that is put in order as a whole, and columns of it: words that a sector of memory holds
BLOCK_ROWS, BLOCK_COLUMNS = tl.constexpr(32), tl.constexpr(16)
# The lowest bit of each of four groups
LOWEST = tl.constexpr(0x1111)


@triton.jit
def indices_of_codes(codes):
    """Four codes of 2:4 as four pairs of places, two bits each, the lower place in the lower bits: words of int32.

    The lower place is 1 where weight 1 is kept without weight 0, and 2 where neither is. The upper one is 1 where both
    are, 3 where weight 3 is kept, and else 2: its lower bit is set for 1 and 3, its upper bit for all but 1.
    """
    kept = ()
    for i in tl.static_range(4):
        kept = kept + ((codes >> i) & LOWEST,)
    both, neither = kept[0] & kept[1], (kept[0] | kept[1]) ^ LOWEST
    return (kept[1] & ~kept[0]) | neither << 1 | (both | neither | kept[3]) << 2 | (both ^ LOWEST) << 3


@triton.jit
def metadata_kernel(bitmask, out, rows, columns, count, BLOCK: tl.constexpr):
    """Words [rows, columns] of four codes each become words of four pairs of places, in the order of CUTLASS.

    In a block of 32 rows, row 8 a + b goes to row 4 b + a. Then blocks of 2 x 2 are transposed, and pairs of columns
    lie one after the other.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # by where a word goes to: its block, there the pair of columns, the row, and which of the pair
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


def metadata(bitmask: Tensor) -> Tensor:
    """int16 [rows, K / 16] of a bitmask uint8 [rows, K / 8] of 2:4, rows a multiple of 32 and K of 32."""
    words = bitmask.view(torch.int16)
    rows, columns = words.shape
    out = torch.empty_like(words)
    count = rows * triton.cdiv(columns, BLOCK_COLUMNS.value) * BLOCK_COLUMNS.value
    launch_elements(metadata_kernel, "metadata", count, words.device, words, out, rows, columns, count)
    return out


def available(device: torch.device) -> bool:
    """Whether torch multiplies with semi-structured weights there: by CUTLASS, which it has for 8.x and Linux alone."""
    if device.type != "cuda" or torch.version.hip is not None or sys.platform != "linux":
        return False
    return torch.cuda.get_device_capability(device)[0] == 8


def fits(x: Tensor, values: Tensor, n: int, m: int) -> bool:
    """Whether x [tokens, K] of 16 bits and the values of a weight [rows, K] are such as torch's kernel takes."""
    sizes = len(values) % ROWS == 0 and x.shape[1] % COLUMNS == 0
    return (n, m) == (2, 4) and x.itemsize == 2 and sizes and values.data_ptr() % 16 == 0


def linear(x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None) -> Tensor:
    """x [tokens, K] @ unpacked [rows, K].T + bias [rows], all of one dtype of 16 bits; see ``fits``."""
    tokens = len(x)
    if tokens % TOKENS or x.data_ptr() % 16:
        x = torch.nn.functional.pad(x, (0, 0, 0, -tokens % TOKENS))
    operands = values, metadata(bitmask), x.t()
    if bias is None:
        y = torch._sparse_semi_structured_mm(*operands)
    else:
        y = torch._sparse_semi_structured_addmm(bias, *operands)
    return y[:, :tokens].t().contiguous()
