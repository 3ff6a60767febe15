"""Arithmetic of float32 as CDNA3 does it in the modes that the emulator models: nearest even, subnormal numbers kept.

CDNA3 ISA, Vector ALU Operations, and the descriptions of the instructions. A NaN that comes in goes out with its quiet
bit set; one that comes of numbers has the bits 0x7fc00000.
"""

from __future__ import annotations

import numpy as np

from ..rounding import faithful, fused, odd_sum, without_subnormal

QUIET = np.uint32(1 << 22)
NAN = np.uint32(0x7FC00000)
SIGN = np.uint32(1 << 31)
INFINITE = np.uint32(0x7F800000)
ONES = np.uint32((1 << 23) - 1)


def with_nan(result: np.ndarray, *operands: np.ndarray) -> np.ndarray:
    """A result with NaN as the instructions give it: the first operand that is NaN, quiet."""
    wrong = np.isnan(result)
    if not wrong.any():
        return result
    bits = np.full(result.shape, NAN)
    for operand in reversed(operands):
        bits = np.where(np.isnan(operand), operand.view(np.uint32) | QUIET, bits)
    return np.where(wrong, bits, result.view(np.uint32)).astype(np.uint32).view(np.float32)


def add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return with_nan(a + b, a, b)


def subtract(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return with_nan(a - b, a, b)


def multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return with_nan(a * b, a, b)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return with_nan(fused(a, b, c), a, b, c)


def is_signalling(a: np.ndarray) -> np.ndarray:
    return np.isnan(a) & (a.view(np.uint32) & QUIET == 0)


def _extremum(a: np.ndarray, b: np.ndarray, equal: np.ndarray, best: np.ndarray) -> np.ndarray:
    """By IEEE's rules: a number rather than a quiet NaN, but a signalling one before all."""
    result = np.where(a == b, equal, best)
    odd = np.isnan(a) | np.isnan(b)
    if not odd.any():
        return result
    a, b = np.broadcast_arrays(a, b)
    quiet_a, quiet_b = ((one.view(np.uint32) | QUIET).view(np.float32) for one in (a.copy(), b.copy()))
    number = np.where(np.isnan(a), np.where(np.isnan(b), quiet_a, b), np.where(np.isnan(b), a, result))
    return np.where(is_signalling(a), quiet_a, np.where(is_signalling(b), quiet_b, number))


def minimum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """CDNA3 ISA, V_MIN_F32: -0 below +0."""
    return _extremum(a, b, (a.view(np.uint32) | b.view(np.uint32)).view(np.float32), np.fmin(a, b))


def maximum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """CDNA3 ISA, V_MAX_F32: +0 above -0."""
    return _extremum(a, b, (a.view(np.uint32) & b.view(np.uint32)).view(np.float32), np.fmax(a, b))


def median(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """CDNA3 ISA, V_MED3_F32: the smallest where one is NaN."""
    largest = maximum(maximum(a, b), c)
    between = np.where(largest == a, maximum(b, c), np.where(largest == b, maximum(a, c), maximum(a, b)))
    odd = np.isnan(a) | np.isnan(b) | np.isnan(c)
    return np.where(odd, minimum(minimum(a, b), c), between) if odd.any() else between


def reciprocal(a: np.ndarray) -> np.ndarray:
    """CDNA3 ISA, V_RCP_F32, V_RCP_IFLAG_F32.

    Of a significand of ones alone it is correctly rounded. LLVM's division needs that, after Markstein, Computation of
    elementary functions on the IBM RISC System/6000 processor, 1990: one step of Newton's iteration rounds any other
    reciprocal correctly.
    """
    exact = 1 / without_subnormal(a).astype(np.float64)
    all_ones = a.view(np.uint32) & ONES == ONES
    return with_nan(np.where(all_ones, without_subnormal(exact.astype(np.float32)), faithful(exact, a)), a)


def root(a: np.ndarray) -> np.ndarray:
    """CDNA3 ISA, V_SQRT_F32."""
    return with_nan(faithful(np.sqrt(without_subnormal(a).astype(np.float64)), a), a)


def reciprocal_root(a: np.ndarray) -> np.ndarray:
    """CDNA3 ISA, V_RSQ_F32."""
    return with_nan(faithful(1 / np.sqrt(without_subnormal(a).astype(np.float64)), a), a)


# -- division


def exponent(a: np.ndarray) -> np.ndarray:
    """The exponent with its bias, as it is stored."""
    return (a.view(np.uint32) >> np.uint32(23) & np.uint32(255)).astype(np.int32)


def is_subnormal(a: np.ndarray) -> np.ndarray:
    return (exponent(a) == 0) & (a != 0)


def division_scale(a: np.ndarray, denominator: np.ndarray, numerator: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the numerator or the denominator ``a``, scaled; whether V_DIV_FMAS_F32 scales back): V_DIV_SCALE_F32.

    Scales by 2^64 where the reciprocal or the quotient would be subnormal or close to the largest number. Where both
    would be subnormal the denominator becomes smaller. The ISA's text has it become larger, which overflows.
    """
    of_denominator = a.view(np.uint32) == denominator.view(np.uint32)
    of_numerator = a.view(np.uint32) == numerator.view(np.uint32)
    wide = denominator.astype(np.float64)
    tiny_reciprocal = np.abs(1 / wide) < 2.0**-126
    tiny_quotient = np.abs(numerator.astype(np.float64) / wide) < 2.0**-126
    up, down = np.float32(2.0**64), np.float32(2.0**-64)
    cases = [
        (exponent(numerator) - exponent(denominator) >= 96, np.where(of_denominator, up, 1), True),
        (is_subnormal(denominator), up, False),
        (tiny_reciprocal & tiny_quotient, np.where(of_denominator, down, 1), True),
        (tiny_reciprocal, down, False),
        (tiny_quotient, np.where(of_numerator, up, 1), True),
        (exponent(numerator) <= 23, up, False),
    ]
    factor, scales = np.float32(1), np.False_
    for applies, by, scales_back in reversed(cases):
        factor, scales = np.where(applies, by, factor), np.where(applies, scales_back, scales)
    undefined = (denominator == 0) | (numerator == 0)
    result = multiply(a, factor.astype(np.float32))
    return np.where(undefined, NAN.view(np.float32), result), scales & ~undefined


def division_fma(a: np.ndarray, b: np.ndarray, c: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """V_DIV_FMAS_F32: a * b + c, times 2^64 or 2^-64 where the lane's bit of VCC is set; rounded once."""
    up = exponent(c) > 127
    result = fma(a, b, c)
    if not scales.any():
        return result
    # exact in float64: a quotient of few bits, and what is missing to it
    factor = np.where(up, 2.0**64, 2.0**-64)
    wide = [(one.astype(np.float64)) for one in (a, b, c)]
    scaled = with_nan((odd_sum(wide[0] * wide[1], wide[2]) * factor).astype(np.float32), a, b, c)
    return np.where(scales, scaled, result)


def division_fixup(quotient: np.ndarray, denominator: np.ndarray, numerator: np.ndarray) -> np.ndarray:
    """V_DIV_FIXUP_F32: the quotient, or what zeros, infinities and NaN give, and what is too small or too large.

    Too large is told here by the exponents, as too small is. The ISA's text names a denominator whose exponent is 255,
    which no number has.
    """
    sign = (denominator.view(np.uint32) ^ numerator.view(np.uint32)) & SIGN
    infinite_denominator, infinite_numerator = np.isinf(denominator), np.isinf(numerator)
    zero_denominator, zero_numerator = denominator == 0, numerator == 0
    undefined = NAN | SIGN
    cases = [
        (np.isnan(numerator), numerator.view(np.uint32) | QUIET),
        (np.isnan(denominator), denominator.view(np.uint32) | QUIET),
        (zero_denominator & zero_numerator | infinite_denominator & infinite_numerator, undefined),
        (zero_denominator | infinite_numerator, sign | INFINITE),
        (infinite_denominator | zero_numerator, sign),
        (exponent(numerator) - exponent(denominator) < -150, sign),
        (exponent(numerator) - exponent(denominator) > 150, sign | INFINITE),
    ]
    bits = quotient.view(np.uint32) & ~SIGN | sign
    for applies, value in reversed(cases):
        bits = np.where(applies, value, bits)
    return bits.astype(np.uint32).view(np.float32)
