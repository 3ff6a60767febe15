"""Arithmetic with the same bits on every route: logarithm, exponential and stochastic rounding to 16 bits."""

from __future__ import annotations

import functools

import torch

from .. import philox
from .groups import columns, uncolumns

# ln(1 + t) = t + t^2 P(t) on [sqrt(1/2) - 1, sqrt(2) - 1]; degree 5, minimax in the relative error of ln: 5e-7
LN_POLYNOMIAL = (
    -0.5000084638595581,
    0.33319219946861267,
    -0.24919062852859497,
    0.20449119806289673,
    -0.18587608635425568,
    0.11949444562196732,
)
SQRT_HALF_BITS = 0x3F3504F3
LN2 = 0.6931471824645996

# e^r = 1 + r + r^2 P(r) on [-ln(2)/2, ln(2)/2]; Chebyshev fit of degree 4, relative error 1e-8
EXP_POLYNOMIAL = (0.5, 0.16666576266288757, 0.041666463017463684, 0.00836329534649849, 0.0013933823211118579)
LOG2_E = 1.4426950216293335
# ln 2 in two parts: the first has few bits, so that its product with an exponent is exact
LN2_HIGH = 0.693359375
LN2_LOW = -0.00021219444170128554
EXP_UNDERFLOW = -87.0
LOWEST_FLOAT32 = torch.finfo(torch.float32).min
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny

BFLOAT16_MAX = torch.finfo(torch.bfloat16).max
FLOAT16_MAX = torch.finfo(torch.float16).max
FLOAT16_SMALLEST_NORMAL = 2.0**-14
FLOAT16_SUBNORMAL_STEP = 2.0**-24


def scalar(value, like):
    """Make a 0-dim float32 tensor of a number, on a tensor's device, so that no compiled loop contains its value."""
    return _scalar(value, like.device)


@functools.lru_cache(maxsize=1 << 12)
def _scalar(value, device):
    # cached and only read: a layer needs the same few numbers at each step
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=torch.float32, device=device)


def ln(x, near_one):
    """Natural logarithm of positive float32; ``near_one`` is x - 1, as exactly as the caller has it."""
    bits = x.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    t = torch.where(exponent == 0, near_one, (bits - (exponent << 23)).view(torch.float32) - 1.0)
    p = t * LN_POLYNOMIAL[5] + LN_POLYNOMIAL[4]
    for coefficient in LN_POLYNOMIAL[3::-1]:
        p = p * t + coefficient
    return p * t * t + t + exponent.to(torch.float32) * LN2


def saturated(x):
    """Clamp float32 to at least the lowest finite number, which replaces minus infinity."""
    return torch.clamp(x, min=LOWEST_FLOAT32)


def exp(x):
    """e^x for float32 up to 88; 0 below -87, so that no result is subnormal."""
    underflow = x < EXP_UNDERFLOW
    clamped = torch.where(underflow, EXP_UNDERFLOW, x)
    # + 128 makes the argument positive, so that conversion to integer rounds down
    exponent = (clamped * LOG2_E + 128.5).to(torch.int32) - 128
    scale = exponent.to(torch.float32)
    r = clamped - scale * LN2_HIGH - scale * LN2_LOW
    p = r * EXP_POLYNOMIAL[4] + EXP_POLYNOMIAL[3]
    for coefficient in EXP_POLYNOMIAL[2::-1]:
        p = p * r + coefficient
    p = p * r * r + r + 1.0
    power = ((exponent + 127) << 23).view(torch.float32)
    return torch.where(underflow, 0.0, p * power)


def round_stochastically(x, r, dtype):
    """Round float32 up or down to a number of a 16-bit dtype, with probability by distance; the result is float32.

    Finite values stay finite, others stay unchanged; ``r`` are random 32-bit words in int64.
    """
    if dtype == torch.bfloat16:
        # a bit cast may lose the sign of a zero, so zeros are handled separately
        bits = torch.where(x == 0.0, 1.0, x).view(torch.int32)
        grid = ((bits + (r >> 16).to(torch.int32)) & -65536).view(torch.float32)
        rounded = torch.clamp(grid, -BFLOAT16_MAX, BFLOAT16_MAX)
    else:
        magnitude = x.abs()
        normal = magnitude >= FLOAT16_SMALLEST_NORMAL
        bits = torch.where(normal, x, 1.0).view(torch.int32)
        grid = ((bits + (r >> 19).to(torch.int32)) & -8192).view(torch.float32)
        steps = torch.where(normal, 0.0, magnitude * (1.0 / FLOAT16_SUBNORMAL_STEP))
        whole = steps.to(torch.int32).to(torch.float32)
        up = (r >> 8).to(torch.float32) * 2.0**-24 < steps - whole
        small = (whole + up.to(torch.float32)) * FLOAT16_SUBNORMAL_STEP
        rounded = torch.where(normal, grid, torch.where(x < 0.0, 0.0 - small, small))
        rounded = torch.clamp(rounded, -FLOAT16_MAX, FLOAT16_MAX)
    return torch.where((x.abs() < torch.inf) & (x != 0.0), rounded, x)


def group_round_logits(x, group, key, *, dtype):
    """Round float32 groups stochastically to a 16-bit dtype, with words of the rounding stream."""
    words = philox.group_words(group, x.shape[-1], philox.STREAM_ROUNDING, key)
    rounded = [round_stochastically(x_i, r, dtype) for x_i, r in zip(columns(x), words, strict=True)]
    return uncolumns(rounded).to(dtype)
