"""Matrices in shared memory that a descriptor of 64 bits points to: where their elements of 16 bits lie.

wgmma: "Asynchronous warpgroup-level matrix shared memory layout" of the PTX ISA 9; tcgen05: "Shared memory descriptor"
there. The layouts are the same. Lengths are bytes, and stand in the descriptor without their lowest four bits.

The 16 elements along K that an instruction takes are either neighbours ("K-major") or rows apart ("MN-major"). Rows
are ``width`` bytes of memory, the width of the swizzle: 128, 64 or 32, and 16 without one. Eight rows are a pattern.
In it the 16-byte chunks of each row are permuted: the row's number is xored into the chunk's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WGMMA_WIDTHS = {0: 16, 1: 128, 2: 64, 3: 32}
TCGEN05_WIDTHS = {0: 16, 2: 128, 4: 64, 6: 32}
# Elements along K
DEPTH = 16


@dataclass(frozen=True)
class Descriptor:
    """``start``, ``leading``, ``stride`` and ``width`` in bytes; ``base`` is where patterns begin, in 128 bytes."""

    start: int
    leading: int
    stride: int
    base: int
    width: int


def _length(value: int, at: int) -> int:
    return (value >> at & 0x3FFF) << 4


def _refuse_set_bits(value: int, known: int) -> None:
    if value & ~known:
        raise ValueError(f"descriptor {value:#018x} has bits set that the ISA reserves: {value & ~known:#x}")


def wgmma_descriptor(value: int) -> Descriptor:
    """Table "Matrix descriptor layout". Raises ValueError where reserved bits are set."""
    _refuse_set_bits(value, 0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 7 << 49 | 3 << 62)
    return _described(value, WGMMA_WIDTHS[value >> 62])


def tcgen05_descriptor(value: int) -> Descriptor:
    """Table "Shared memory descriptor layout". Raises ValueError where a fixed or reserved field is another.

    Refused as well: leading dimensions given as addresses (sm_103), and swizzles by 32 bytes.
    """
    _refuse_set_bits(value, 0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 7 << 46 | 7 << 49 | 7 << 61)
    if value >> 46 & 7 != 1:
        raise ValueError(f"descriptor {value:#018x} has {value >> 46 & 7} in bits 46 to 48, expected 1")
    if value >> 61 not in TCGEN05_WIDTHS:
        raise ValueError(f"descriptor {value:#018x} has swizzle {value >> 61}, expected one of {[*TCGEN05_WIDTHS]}")
    return _described(value, TCGEN05_WIDTHS[value >> 61])


def _described(value: int, width: int) -> Descriptor:
    return Descriptor(_length(value, 0), _length(value, 16), _length(value, 32), value >> 49 & 7, width)


def offsets(descriptor: Descriptor, rows: int, k_major: bool) -> np.ndarray:
    """int64 [rows, DEPTH]: bytes of shared memory at which the elements begin; ``rows`` are along M or N.

    K-major, eight rows of M or N are a pattern, and the next eight lie ``stride`` further; without a swizzle columns 8
    to 15 lie ``leading`` further. MN-major, eight rows of K are a pattern of ``width`` / 2 elements each; with a
    swizzle the next elements of M or N lie ``leading`` further and the next rows of K ``stride`` further, without one
    it is the other way round.
    """
    r, k = np.arange(rows)[:, None], np.arange(DEPTH)[None, :]
    d = descriptor
    swizzled = d.width > 16
    if k_major:
        column = k * 2 if swizzled else k // 8 * d.leading + k % 8 * 2
        at = r // 8 * d.stride + r % 8 * d.width + column
    else:
        across = d.width // 2
        far, deep = (d.leading, d.stride) if swizzled else (d.stride, d.leading)
        at = r // across * far + r % across * 2 + k // 8 * deep + k % 8 * d.width
    at = at + d.start
    return at ^ (_row_of_pattern(at, d) << 4) if swizzled else at


def _row_of_pattern(at: np.ndarray, descriptor: Descriptor) -> np.ndarray:
    """What is xored into a chunk's number: which 128 bytes of the pattern, as far as the width has chunks.

    Patterns begin at multiples of 8 * width bytes. Where they don't, ``base`` says by how many 128 bytes.
    """
    return (at >> 7) - descriptor.base & descriptor.width // 16 - 1
