"""Constants of the reference, as Triton takes them."""

from __future__ import annotations

import triton.language as tl

from ... import bounds as _bounds
from ... import philox as _philox
from ... import reference as _reference

LN: tl.constexpr = tl.constexpr(_reference.LN_POLYNOMIAL)
SQRT_HALF_BITS: tl.constexpr = tl.constexpr(_reference.SQRT_HALF_BITS)
LN2: tl.constexpr = tl.constexpr(_reference.LN2)
EXP: tl.constexpr = tl.constexpr(_reference.EXP_POLYNOMIAL)
LOG2_E: tl.constexpr = tl.constexpr(_reference.LOG2_E)
LN2_HIGH: tl.constexpr = tl.constexpr(_reference.LN2_HIGH)
LN2_LOW: tl.constexpr = tl.constexpr(_reference.LN2_LOW)
EXP_UNDERFLOW: tl.constexpr = tl.constexpr(_reference.EXP_UNDERFLOW)
LOWEST_FLOAT32: tl.constexpr = tl.constexpr(_reference.LOWEST_FLOAT32)
SMALLEST_NORMAL: tl.constexpr = tl.constexpr(_reference.SMALLEST_NORMAL)
BERNOULLI: tl.constexpr = tl.constexpr(_reference.BERNOULLI)
ONE_MINUS_EXP: tl.constexpr = tl.constexpr(_reference.ONE_MINUS_EXP)
TWO_POW_MINUS_32: tl.constexpr = tl.constexpr(_reference.TWO_POW_MINUS_32)
EXPONENT_CLAMP: tl.constexpr = tl.constexpr(_reference.EXPONENT_CLAMP)
RECIPROCAL_SCALE: tl.constexpr = tl.constexpr(_reference.RECIPROCAL_SCALE)
INVERSE_RECIPROCAL_SCALE: tl.constexpr = tl.constexpr(1.0 / _reference.RECIPROCAL_SCALE)
EXACT_SCORE_MAX_N: tl.constexpr = tl.constexpr(_reference.EXACT_SCORE_MAX_N)
NEAR_CERTAIN: tl.constexpr = tl.constexpr(_reference.NEAR_CERTAIN)
FIRST_NODE: tl.constexpr = tl.constexpr(_reference.FIRST_NODE)
LOWEST_LOG_ARRIVAL: tl.constexpr = tl.constexpr(_reference.LOWEST_LOG_ARRIVAL)
LARGEST_LOG_ARRIVAL: tl.constexpr = tl.constexpr(_reference.LARGEST_LOG_ARRIVAL)
BFLOAT16_MAX: tl.constexpr = tl.constexpr(_reference.BFLOAT16_MAX)
FLOAT16_MAX: tl.constexpr = tl.constexpr(_reference.FLOAT16_MAX)
FLOAT16_SMALLEST_NORMAL: tl.constexpr = tl.constexpr(_reference.FLOAT16_SMALLEST_NORMAL)
FLOAT16_SUBNORMAL_STEP: tl.constexpr = tl.constexpr(_reference.FLOAT16_SUBNORMAL_STEP)

MINUS_LOG_AT_ZERO: tl.constexpr = tl.constexpr(_bounds.MINUS_LOG_AT_ZERO)
TANGENT: tl.constexpr = tl.constexpr(_bounds.TANGENT)
NATS_PER_BIT_PATTERN: tl.constexpr = tl.constexpr(_bounds.NATS_PER_BIT_PATTERN)

MULTIPLIERS: tl.constexpr = tl.constexpr(_philox.MULTIPLIERS)
KEY_STEPS: tl.constexpr = tl.constexpr(_philox.KEY_STEPS)
ROUNDS: tl.constexpr = tl.constexpr(_philox.ROUNDS)
STREAM_DRAW: tl.constexpr = tl.constexpr(_philox.STREAM_DRAW)
STREAM_ROUNDING: tl.constexpr = tl.constexpr(_philox.STREAM_ROUNDING)
