"""Stochastic rounding of logits to 16 bits."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import INTERPRETED
from .arithmetic import BFLOAT16_MAX, FLOAT16_MAX, FLOAT16_SMALLEST_NORMAL, FLOAT16_SUBNORMAL_STEP, STREAM_ROUNDING
from .philox import group_words

CUTS_OFF = tl.constexpr(INTERPRETED)


@triton.jit
def round_stochastically(x, r, dtype: tl.constexpr):
    """Round float32 up or down to a 16-bit dtype with probability by distance; r are random uint32 words.

    Finite values stay finite, others stay unchanged.
    """
    if dtype == tl.bfloat16:
        # zeros stay zero; numbers without a larger finite one are truncated, which also keeps infinities
        r = tl.where(tl.abs(x) < BFLOAT16_MAX, r, 0)
        bits = x.to(tl.uint32, bitcast=True) + (r >> 16)
        # by bits: a conversion rounds to the nearest, so it would need the lower bits cleared first
        rounded = (bits >> 16).to(tl.uint16).to(dtype, bitcast=True)
    else:
        magnitude = tl.abs(x)
        normal = magnitude >= FLOAT16_SMALLEST_NORMAL
        bits = tl.where(normal, x, 1.0).to(tl.int32, bitcast=True)
        grid = ((bits + (r >> 19).to(tl.int32)) & -8192).to(tl.float32, bitcast=True)
        steps = tl.where(normal, 0.0, magnitude * (1.0 / FLOAT16_SUBNORMAL_STEP))
        whole = steps.to(tl.int32).to(tl.float32)
        up = ((r >> 8).to(tl.float32) * (1.0 / 16777216.0)) < (steps - whole)
        small = (whole + tl.where(up, 1.0, 0.0)) * FLOAT16_SUBNORMAL_STEP
        rounded = tl.where(normal, grid, tl.where(x < 0.0, 0.0 - small, small))
        rounded = tl.minimum(tl.maximum(rounded, 0.0 - FLOAT16_MAX), FLOAT16_MAX)
        finite = tl.abs(x) < float("inf")
        rounded = tl.where(finite & (x != 0.0), rounded, x).to(dtype)
    return rounded


@triton.jit
def round_to_nearest(x, dtype: tl.constexpr):
    """Convert float32, ties to even like hardware; also in the interpreter, whose own conversion truncates bfloat16."""
    if CUTS_OFF and dtype == tl.bfloat16:
        bits = tl.where(x == 0.0, 1.0, x).to(tl.int32, bitcast=True)
        grid = ((bits + 0x7FFF + (bits >> 16 & 1)) & -65536).to(tl.float32, bitcast=True)
        x = tl.where((tl.abs(x) < float("inf")) & (x != 0.0), grid, x)
    return x.to(dtype)


@triton.jit
def round_group(x, group, M: tl.constexpr, key, dtype: tl.constexpr):
    """Round columns to a 16-bit dtype with words of the rounding stream."""
    words = group_words(group, M, STREAM_ROUNDING, key)
    rounded = ()
    for i in tl.static_range(M):
        rounded = rounded + (round_stochastically(x[i], words[i], dtype),)
    return rounded
