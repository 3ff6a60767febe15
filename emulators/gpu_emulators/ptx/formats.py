"""Number formats and their rounding (PTX ISA 5.2.2 and 5.2.3): float32, float64, float16, bfloat16.

Values of 16 bits travel as their bits, uint16. Results are rounded once, to the nearest, ties to even.
"""

from __future__ import annotations

import numpy as np

from ..rounding import faithful, fused, fused_up, odd_float32, odd_sum, without_subnormal

# the one pattern of results that are no number
NAN16, NAN32 = np.uint16(0x7FFF), np.uint32(0x7FFFFFFF).view(np.float32)
HALVES = ("f16", "bf16")


def canonical(values: np.ndarray) -> np.ndarray:
    """float32 results with the one pattern of NaN (PTX ISA 9.7.3, floating-point instructions)."""
    if values.ndim == 0:
        return values if values == values else NAN32
    flat = values.reshape(-1)
    # squares are never of unlike infinities, so that their sum is NaN where a value is
    if np.isnan(np.dot(flat, flat)):
        return np.where(np.isnan(values), NAN32, values)
    return values


def decode(bits: np.ndarray, kind: str) -> np.ndarray:
    """float32 of the bits of "f16" or "bf16", exactly."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.float16).astype(np.float32)


def encode(values: np.ndarray, kind: str) -> np.ndarray:
    """Bits of "f16" or "bf16" of float32 values."""
    if kind == "f16":
        rounded = values.astype(np.float16).view(np.uint16)
    else:
        bits = values.view(np.uint32)
        rounded = ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(
            np.uint16
        )
    return np.where(np.isnan(values), NAN16, rounded)


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float32, rounded once."""
    return canonical(fused(a, b, c))


def fma32_up(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The same, rounded towards plus infinity."""
    return canonical(fused_up(a, b, c))


def near_reciprocal(a: np.ndarray) -> np.ndarray:
    """One of the two float32 numbers about 1 / a; subnormal operands and results are zeros."""
    return canonical(faithful(1.0 / without_subnormal(a).astype(np.float64), a))


def fma16(a: np.ndarray, b: np.ndarray, c: np.ndarray, kind: str) -> np.ndarray:
    """a * b + c of bits of "f16" or "bf16", rounded once."""
    a, b, c = (decode(bits, kind).astype(np.float64) for bits in (a, b, c))
    return encode(odd_float32(odd_sum(a * b, c)), kind)


def add16(a: np.ndarray, b: np.ndarray, kind: str) -> np.ndarray:
    return encode(odd_float32(odd_sum(*(decode(bits, kind).astype(np.float64) for bits in (a, b)))), kind)


def sub16(a: np.ndarray, b: np.ndarray, kind: str) -> np.ndarray:
    return add16(a, b ^ np.uint16(0x8000), kind)


def mul16(a: np.ndarray, b: np.ndarray, kind: str) -> np.ndarray:
    a, b = (decode(bits, kind).astype(np.float64) for bits in (a, b))
    return encode(odd_float32(a * b), kind)


def min32(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The smaller; a number rather than NaN, -0 below +0 (PTX ISA 9.7.3.11, min)."""
    either = (a.view(np.uint32) | b.view(np.uint32)).view(np.float32)
    return canonical(np.where(a == b, either, np.fmin(a, b)))


def max32(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The larger; a number rather than NaN, +0 above -0 (PTX ISA 9.7.3.12, max)."""
    both = (a.view(np.uint32) & b.view(np.uint32)).view(np.float32)
    return canonical(np.where(a == b, both, np.fmax(a, b)))


def min32_or_nan(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(a) | np.isnan(b), NAN32, min32(a, b))


def max32_or_nan(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(a) | np.isnan(b), NAN32, max32(a, b))
