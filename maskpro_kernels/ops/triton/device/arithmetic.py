"""Constants of the reference as tl.constexpr; logarithm, exponential and reciprocal with the reference's bits."""

from __future__ import annotations

import triton
import triton.language as tl

from ... import bounds as _bounds
from ... import philox as _philox
from ...reference import arithmetic as _arithmetic
from ...reference import gumbel_top_k as _gumbel_top_k
from ...reference import plackett_luce as _plackett_luce
from ..tiles import INTERPRETED as _INTERPRETED

LN: tl.constexpr = tl.constexpr(_arithmetic.LN_POLYNOMIAL)
SQRT_HALF_BITS: tl.constexpr = tl.constexpr(_arithmetic.SQRT_HALF_BITS)
LN2: tl.constexpr = tl.constexpr(_arithmetic.LN2)
EXP: tl.constexpr = tl.constexpr(_arithmetic.EXP_POLYNOMIAL)
LOG2_E: tl.constexpr = tl.constexpr(_arithmetic.LOG2_E)
LN2_HIGH: tl.constexpr = tl.constexpr(_arithmetic.LN2_HIGH)
LN2_LOW: tl.constexpr = tl.constexpr(_arithmetic.LN2_LOW)
EXP_UNDERFLOW: tl.constexpr = tl.constexpr(_arithmetic.EXP_UNDERFLOW)
LOWEST_FLOAT32: tl.constexpr = tl.constexpr(_arithmetic.LOWEST_FLOAT32)
SMALLEST_NORMAL: tl.constexpr = tl.constexpr(_arithmetic.SMALLEST_NORMAL)
BERNOULLI: tl.constexpr = tl.constexpr(_plackett_luce.BERNOULLI)
ONE_MINUS_EXP: tl.constexpr = tl.constexpr(_plackett_luce.ONE_MINUS_EXP)
TWO_POW_MINUS_32: tl.constexpr = tl.constexpr(_gumbel_top_k.TWO_POW_MINUS_32)
EXPONENT_CLAMP: tl.constexpr = tl.constexpr(_plackett_luce.EXPONENT_CLAMP)
RECIPROCAL_SCALE: tl.constexpr = tl.constexpr(_plackett_luce.RECIPROCAL_SCALE)
INVERSE_RECIPROCAL_SCALE: tl.constexpr = tl.constexpr(1.0 / _plackett_luce.RECIPROCAL_SCALE)
EXACT_SCORE_MAX_N: tl.constexpr = tl.constexpr(_plackett_luce.EXACT_SCORE_MAX_N)
NEAR_CERTAIN: tl.constexpr = tl.constexpr(_plackett_luce.NEAR_CERTAIN)
FIRST_NODE: tl.constexpr = tl.constexpr(_plackett_luce.FIRST_NODE)
LOWEST_LOG_ARRIVAL: tl.constexpr = tl.constexpr(_plackett_luce.LOWEST_LOG_ARRIVAL)
LARGEST_LOG_ARRIVAL: tl.constexpr = tl.constexpr(_plackett_luce.LARGEST_LOG_ARRIVAL)
BFLOAT16_MAX: tl.constexpr = tl.constexpr(_arithmetic.BFLOAT16_MAX)
FLOAT16_MAX: tl.constexpr = tl.constexpr(_arithmetic.FLOAT16_MAX)
FLOAT16_SMALLEST_NORMAL: tl.constexpr = tl.constexpr(_arithmetic.FLOAT16_SMALLEST_NORMAL)
FLOAT16_SUBNORMAL_STEP: tl.constexpr = tl.constexpr(_arithmetic.FLOAT16_SUBNORMAL_STEP)

MINUS_LOG_AT_ZERO: tl.constexpr = tl.constexpr(_bounds.MINUS_LOG_AT_ZERO)
TANGENT: tl.constexpr = tl.constexpr(_bounds.TANGENT)
NATS_PER_BIT_PATTERN: tl.constexpr = tl.constexpr(_bounds.NATS_PER_BIT_PATTERN)

MULTIPLIERS: tl.constexpr = tl.constexpr(_philox.MULTIPLIERS)
KEY_STEPS: tl.constexpr = tl.constexpr(_philox.KEY_STEPS)
ROUNDS: tl.constexpr = tl.constexpr(_philox.ROUNDS)
STREAM_DRAW: tl.constexpr = tl.constexpr(_philox.STREAM_DRAW)
STREAM_ROUNDING: tl.constexpr = tl.constexpr(_philox.STREAM_ROUNDING)

INTERPRETED: tl.constexpr = tl.constexpr(_INTERPRETED)
# y is 1 / x within one unit in the last place (PTX ISA 9.7.3.13, rcp), and e = 1 - x y is exact, so 1 / x is y (1 + e +
# e^2) up to e^3. The sum e + e^2 is rounded up: rounded to the nearest it would give a tie if the significand of x is
# all ones, the one x that Newton's step may round wrongly (Markstein 2000, IA-64 and Elementary Functions, chapter 8).
SCALED_RECIPROCAL: tl.constexpr = tl.constexpr("""{
.reg .b32 y, e, minus;
rcp.approx.ftz.f32 y, $1;
neg.f32 minus, $1;
fma.rn.f32 e, minus, y, 0f3F800000;
fma.rp.f32 e, e, e, e;
mul.rn.f32 y, y, $2;
fma.rn.f32 $0, e, y, y;
}""")


@triton.jit
def scaled_reciprocal(x, SCALE: tl.constexpr):
    """SCALE / x, rounded to the nearest, for float32 of magnitude between 2^-60 and 2^60. Not for AMD's GPUs.

    SCALE is a power of two between 2^-30 and 2^30. Within these ranges nothing is subnormal, so it needs no slow path
    like that of ``div_rn``.
    """
    scale = tl.full(x.shape, SCALE, tl.float32)
    if INTERPRETED:
        return tl.div_rn(scale, x)
    else:
        return tl.inline_asm_elementwise(
            SCALED_RECIPROCAL, "=f,f,f", [x, scale], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def ln(x, near_one):
    """Natural logarithm of positive float32; ``near_one`` is x - 1, as exactly as the caller has it."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    t = tl.where(exponent == 0, near_one, (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0)
    p = t * LN[5] + LN[4]
    p = p * t + LN[3]
    p = p * t + LN[2]
    p = p * t + LN[1]
    p = p * t + LN[0]
    return p * t * t + t + exponent.to(tl.float32) * LN2


@triton.jit
def saturated(x):
    """Clamp float32 to at least the lowest finite number, which replaces minus infinity."""
    return tl.maximum(x, LOWEST_FLOAT32)


@triton.jit
def saturated_columns(columns, M: tl.constexpr):
    result = ()
    for i in tl.static_range(M):
        result = result + (saturated(columns[i]),)
    return result


@triton.jit
def exp_in_range(x):
    """e^x for float32 between -87 and 88."""
    exponent = (x * LOG2_E + 128.5).to(tl.int32) - 128
    scale = exponent.to(tl.float32)
    r = x - scale * LN2_HIGH - scale * LN2_LOW
    p = r * EXP[4] + EXP[3]
    p = p * r + EXP[2]
    p = p * r + EXP[1]
    p = p * r + EXP[0]
    p = p * r * r + r + 1.0
    power = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    return p * power


@triton.jit
def exp(x):
    """e^x for float32 up to 88; 0 below -87, so that no result is subnormal."""
    return tl.where(x < EXP_UNDERFLOW, 0.0, exp_in_range(tl.maximum(x, EXP_UNDERFLOW)))
