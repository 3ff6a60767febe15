"""Matrices as asynchronous products read them from shared memory, laid out an element at a time after the PTX ISA."""

from __future__ import annotations

import itertools

import numpy as np

# the swizzle's bits in a descriptor, by its width; those of tcgen05 with the constant that the ISA asks for
WGMMA_SWIZZLES = {width: code << 62 for width, code in {16: 0, 128: 1, 64: 2, 32: 3}.items()}
TCGEN05_SWIZZLES = {width: code << 61 | 1 << 46 for width, code in {16: 0, 128: 2, 64: 4, 32: 6}.items()}


def encoded(start, leading=0, stride=0, base=0):
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | base << 49


def canonical(rows, width, k_major, leading, stride):
    """{(row, column): byte} by the canonical layouts of the ISA: 16-byte units, then the swizzle of address bits.

    The ISA gives them as ((8, m), (T, 2k)) for K-major and ((T, chunks, m), (8, k)) for MN-major, T = 8 elements.
    """
    chunks = width // 16
    place = {}
    for row, column in itertools.product(range(rows), range(16)):
        if k_major:
            strides = (leading if width == 16 else 16, stride)
            unit = row % 8 * width + row // 8 * strides[1] + column // 8 * strides[0]
            at = unit + column % 8 * 2
        else:
            block, chunk, element = row // 8 // chunks, row // 8 % chunks, row % 8
            far, deep = (stride, leading) if width == 16 else (leading, stride)
            at = element * 2 + chunk * 16 + block * far + column % 8 * width + column // 8 * deep
        place[row, column] = at
    return place


def swizzled(at, width):
    """Bits 4 to 6 of the address, xored with as many of bits 7 to 9 as the width has chunks."""
    for bit in range({16: 0, 32: 1, 64: 2, 128: 3}[width]):
        at ^= (at >> 7 + bit & 1) << 4 + bit
    return at


def strides(width, k_major):
    """(leading, stride) in bytes of a matrix whose patterns lie one behind the other."""
    if k_major:
        return (128, 256) if width == 16 else (0, 8 * width)
    return (2048, 128) if width == 16 else (16 * width, 8 * width)


def image(matrix, width, k_major, start=0):
    """uint8: the bytes of a matrix uint16 [rows, 16] in shared memory, from ``start`` on; zeros between them."""
    place = canonical(len(matrix), width, k_major, *strides(width, k_major))
    found = {at: swizzled(start + byte, width) - start for at, byte in place.items()}
    data = np.zeros(max(found.values()) + 2, np.uint8)
    for at, byte in found.items():
        data[byte : byte + 2] = np.frombuffer(matrix[at].tobytes(), np.uint8)
    return data
