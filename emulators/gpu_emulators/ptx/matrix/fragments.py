"""Which element of a matrix a thread holds in which register, for the matrix instructions of warps and warp groups.

A register is an array [T] of a batch's threads; a warp is 32 of them in a row. Matrices are [warps, rows, columns], the
elements as their bits, uint16 of bf16 and f16, uint32 of tf32. Sections are those of the PTX ISA 9.

A fragment of 32-bit elements is one of 16-bit elements in which two neighbours along K are one element: it has half as
many of them along K, in the same registers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..batch import WARP
from ..formats import decode

WARP_GROUP = 128
# bytes that eight threads hold next to each other, a row of a tile
ROW_BYTES = 16
# how the bits of an element are held
CONTAINERS = {"bf16": np.uint16, "f16": np.uint16, "tf32": np.uint32}
# a tf32 has 19 bits, from the top on
TF32_BITS = np.uint32(0xFFFFE000)


def to_float32(bits: np.ndarray, element: str) -> np.ndarray:
    """Values of the bits of "bf16", "f16" or "tf32", exact in float32.

    The lower 13 bits of a tf32 take no part: "wgmma.mma_async operation involving type .tf32 will truncate lower 13
    bits of the 32-bit input data" (floating point operations of wgmma). Of mma the ISA leaves it open.
    """
    if element == "tf32":
        return (bits & TF32_BITS).view(np.float32)
    return decode(bits, element)


def tile(register: np.ndarray, container: type = np.uint16) -> np.ndarray:
    """[warps, 8, 8] uint16 of a register of two elements: thread t holds row t // 4, columns 2 (t % 4) and the next.

    "Warp-level matrix load instruction: ldmatrix": the piece that every fragment consists of. Of one element uint32,
    it is [warps, 8, 4], and thread t holds column t % 4.
    """
    columns = ROW_BYTES // np.dtype(container).itemsize
    return np.ascontiguousarray(register, np.uint32).view(container).reshape(-1, 8, columns)


def tile_register(matrix: np.ndarray) -> np.ndarray:
    """uint32 [T]: the inverse of ``tile``."""
    return np.ascontiguousarray(matrix).reshape(-1).view(np.uint32)


def a_matrix(registers: Sequence[np.ndarray], container: type = np.uint16) -> np.ndarray:
    """[warps, 16, 16] uint16, or [warps, 16, 8] uint32, of the four registers of A.

    "Matrix Fragments for mma.m16n8k16 with floating point type", "Matrix Fragments for mma.m16n8k8" with .tf32, and
    "Register Fragments for wgmma.mma_async.m64k16", where a warp holds 16 of the 64 rows.
    """
    upper_left, lower_left, upper_right, lower_right = (tile(register, container) for register in registers)
    left = np.concatenate([upper_left, lower_left], 1)
    right = np.concatenate([upper_right, lower_right], 1)
    return np.concatenate([left, right], 2)


def a_registers(matrix: np.ndarray) -> list[np.ndarray]:
    """Four uint32 [T]: the inverse of ``a_matrix``."""
    half = matrix.shape[2] // 2
    pieces = (matrix[:, row : row + 8, column : column + half] for column in (0, half) for row in (0, 8))
    return [tile_register(piece) for piece in pieces]


def b_matrix(registers: Sequence[np.ndarray], container: type = np.uint16) -> np.ndarray:
    """[warps, 8 a register, 8] uint16, or [warps, 4 a register, 8] uint32, of the registers of B.

    Thread t holds column t // 4. Two registers: mma.m16n8k16, and mma.m16n8k8 of .tf32; four: "Matrix Fragments for
    sparse mma.m16n8k32 with .f16 and .bf16 types".
    """
    return np.concatenate([tile(register, container).transpose(0, 2, 1) for register in registers], 1)


def b_registers(matrix: np.ndarray) -> list[np.ndarray]:
    """uint32 [T] for each tile's rows: the inverse of ``b_matrix``."""
    rows = ROW_BYTES // matrix.itemsize
    return [tile_register(matrix[:, row : row + rows].transpose(0, 2, 1)) for row in range(0, matrix.shape[1], rows)]


def accumulators(registers: Sequence[np.ndarray]) -> np.ndarray:
    """float32 [warps, 16, 2 a register] of the registers of C or D.

    Four registers: mma.m16n8k16. More: "Register Fragments for wgmma.mma_async.m64k16", every four of them the next 8
    columns, and a warp 16 of the 64 rows.
    """
    held = np.stack([np.ascontiguousarray(register).view(np.float32) for register in registers])
    # next columns, lower rows, odd column; warp, row, column pair
    held = held.reshape(len(registers) // 4, 2, 2, -1, 8, 4)
    return held.transpose(3, 1, 4, 0, 5, 2).reshape(held.shape[3], 16, 2 * len(registers))


def accumulator_registers(matrix: np.ndarray) -> np.ndarray:
    """float32 [columns / 2, T]: the inverse of ``accumulators``."""
    warps, _, columns = matrix.shape
    held = matrix.reshape(warps, 2, 8, columns // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)
    return np.ascontiguousarray(held, np.float32).reshape(columns // 2, warps * WARP)


def loaded(rows: np.ndarray, count: int, transposed: bool) -> list[np.ndarray]:
    """The registers that ldmatrix gives for ``count`` matrices 8 x 8, from the rows that its threads point to.

    ``rows`` is uint8 [T, 16]; thread t of a warp points to row t % 8 of matrix t // 8 ("Warp-level matrix load
    instruction: ldmatrix").
    """
    matrices = rows.view(np.uint16).reshape(-1, 4, 8, 8)
    return [tile_register(matrices[:, k].transpose(0, 2, 1) if transposed else matrices[:, k]) for k in range(count)]


def stored(registers: Sequence[np.ndarray], transposed: bool) -> np.ndarray:
    """uint8 [T, 16]: the rows that stmatrix writes where its threads point to; zeros where they point to none."""
    matrices = np.zeros((len(registers[0]) // WARP, 4, 8, 8), np.uint16)
    for k, register in enumerate(registers):
        matrices[:, k] = tile(register).transpose(0, 2, 1) if transposed else tile(register)
    return matrices.reshape(-1, 8).view(np.uint8)


def multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray | float, element: str) -> np.ndarray:
    """float32 a @ b + c of the bits of ``element``.

    Products of two such numbers are exact in float64. They are summed in float64 and rounded once; the ISA leaves the
    order and the rounding of that sum open.
    """
    left, right = (to_float32(x, element).astype(np.float64) for x in (a, b))
    return (np.matmul(left, right) + c).astype(np.float32)
