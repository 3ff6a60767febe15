"""The sparse matrix A of mma.sp.m16n8k32: which two of four neighbours its elements are.

"Sparse matrix storage" and "Matrix Fragments for sparse mma.m16n8k32 with .f16 and .bf16 types" of the PTX ISA 9.
A thread's four registers hold the two elements kept of four neighbours each, where a dense 16 x 16 fragment has two
neighbours. Beside it two threads of every four hold the positions: 2 bits an element, two elements a chunk of four.
"""

from __future__ import annotations

import numpy as np

from .fragments import to_float32

# 32 columns in chunks of four
CHUNKS = 8
KEPT = 2


def positions(metadata: np.ndarray, selector: int) -> np.ndarray:
    """[warps, 16, CHUNKS, KEPT]: positions 0 to 3 of the kept elements in their chunks, of the words uint32 [T].

    ``selector`` 0 takes the words of threads 0 and 1 of every four, 1 those of threads 2 and 3. The first of them has
    columns 0 to 15, the second columns 16 to 31; row g (the number of the four threads) is in its lower half, row
    g + 8 in its upper half.
    """
    pair = metadata.reshape(-1, 8, 4)[:, :, 2 * selector : 2 * selector + 2]
    # warp, row of 8, half of the columns, half of the rows, chunk of that half, element
    shifts = np.arange(0, 32, 2, dtype=np.uint32).reshape(2, CHUNKS // 2, KEPT)
    fields = pair[..., None, None, None] >> shifts & np.uint32(3)
    return fields.transpose(0, 3, 1, 2, 4, 5).reshape(-1, 16, CHUNKS, KEPT).astype(np.int64)


def metadata_of(kept: np.ndarray, selector: int) -> np.ndarray:
    """uint32 [T]: the inverse of ``positions``; the threads that the selector leaves out hold zeros."""
    fields = kept.reshape(-1, 2, 8, 2, CHUNKS // 2, KEPT).transpose(0, 2, 3, 1, 4, 5).astype(np.uint32)
    shifts = np.arange(0, 32, 2, dtype=np.uint32).reshape(2, CHUNKS // 2, KEPT)
    words = np.zeros((len(fields), 8, 4), np.uint32)
    words[:, :, 2 * selector : 2 * selector + 2] = (fields << shifts).sum((3, 4, 5), dtype=np.uint32)
    return words.reshape(-1)


def sparse_multiply_add(a: np.ndarray, kept: np.ndarray, b: np.ndarray, c: np.ndarray, element: str) -> np.ndarray:
    """float32 [warps, 16, 8]: kept elements of A times the rows of B at their positions, plus C.

    ``a`` is uint16 [warps, 16, 16], ``kept`` as of ``positions``, ``b`` uint16 [warps, 32, 8]. Rows of B that an
    element is not kept for take no part, infinities and NaN among them.
    """
    rows = (kept + 4 * np.arange(CHUNKS)[:, None]).reshape(len(a), 16, 16)
    x, y = (to_float32(bits, element).astype(np.float64) for bits in (a, b))
    chosen = y[np.arange(len(a))[:, None, None], rows]
    return (np.matmul(x[:, :, None], chosen)[:, :, 0] + c).astype(np.float32)
