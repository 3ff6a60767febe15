"""Results that are rounded once, by way of float64, and approximations."""

from __future__ import annotations

import numpy as np


def odd_sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b of float64, rounded to odd: what rounds it again to far fewer bits rounds the exact sum.

    The error of the sum is exact (Knuth, The Art of Computer Programming, volume 2, 4.2.2, theorem B); rounding to odd:
    Boldo and Melquiond, Emulation of a FMA and correctly rounded sums, IEEE Transactions on Computers 57, 2008.
    """
    total = a + b
    rest = total - a
    error = (a - (total - rest)) + (b - rest)
    bits = np.asarray(total).view(np.int64)
    even = (error != 0) & (bits & 1 == 0) & np.isfinite(total)
    away = (error > 0) == (total > 0)
    return np.where(even, bits + np.where(away, 1, -1), bits).view(np.float64)


def odd_float32(values: np.ndarray) -> np.ndarray:
    """float64 rounded to odd float32."""
    rounded = np.asarray(values.astype(np.float32))
    back = rounded.astype(np.float64)
    bits = rounded.view(np.int32)
    even = (back != values) & (bits & 1 == 0) & np.isfinite(values)
    return np.where(even, bits + np.where(np.abs(back) < np.abs(values), 1, -1), bits).astype(np.int32).view(np.float32)


def fused_up(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float32, rounded once, towards plus infinity; NaN of any bits."""
    nearest = np.asarray(fused(a, b, c))
    exact = odd_sum(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64))
    # rounded to odd it lies on the same side of every float32 as the exact sum
    below = np.isfinite(exact) & (nearest.astype(np.float64) < exact)
    return np.where(below, np.nextafter(nearest, np.float32(np.inf)), nearest)[()]


def faithful(exact: np.ndarray, operand: np.ndarray, flush: bool = True) -> np.ndarray:
    """float64 as an approximation may give it in float32: one of the two neighbours of the exact value.

    Instruction sets state an error of one unit in the last place, and no bits. Here the operand's bits say which
    neighbour it is, as if at random, so that a kernel is seen to be wrong whose results depend on it. With ``flush`` a
    result that would be subnormal is 0.
    """
    nearest = np.asarray(exact).astype(np.float32)
    below = nearest.astype(np.float64) < exact
    other = np.nextafter(nearest, np.where(below, np.float32(np.inf), np.float32(-np.inf)))
    nearer = operand.view(np.uint32) * np.uint32(2654435761) >> np.uint32(31) == 0
    exactly = nearest.astype(np.float64) == exact
    result = np.where(nearer | exactly | ~np.isfinite(nearest), nearest, other)
    return without_subnormal(result) if flush else result


def without_subnormal(a: np.ndarray) -> np.ndarray:
    """float32 with zeros of the same sign in place of subnormal numbers."""
    return np.where(np.abs(a) < np.float32(2.0**-126), np.copysign(np.float32(0), a), a)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float32, rounded once; NaN of any bits.

    The product is exact in float64. Rounding the sum twice differs from once only where the first result lies halfway
    between two float32, or is subnormal in float32: those are done again, by way of rounding to odd.
    """
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = np.asarray(product + addend)
    result = total.astype(np.float32)
    doubtful = (total.view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    doubtful |= np.abs(result) < np.float32(2.0**-125)
    if doubtful.any():
        product, addend = (np.broadcast_to(part, total.shape)[doubtful] for part in (product, addend))
        result[doubtful] = odd_sum(product, addend).astype(np.float32)
    return result if result.ndim else result[()]
