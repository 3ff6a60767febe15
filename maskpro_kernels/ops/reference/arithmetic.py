"""Logarithm and exponential as polynomials in correctly rounded operations, the same bits on every route."""

from __future__ import annotations

import torch

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
# Integers of so many bytes hold the bits of floats
INTEGERS = {2: torch.int16, 4: torch.int32}


def ln(x, near_one):
    """Natural logarithm of positive float32; ``near_one`` is x - 1 as the caller knows it best."""
    bits = x.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    t = torch.where(exponent == 0, near_one, (bits - (exponent << 23)).view(torch.float32) - 1.0)
    p = t * LN_POLYNOMIAL[5] + LN_POLYNOMIAL[4]
    for coefficient in LN_POLYNOMIAL[3::-1]:
        p = p * t + coefficient
    return p * t * t + t + exponent.to(torch.float32) * LN2


def saturated(x):
    """float32 no lower than the lowest finite one: what overflowed to minus infinity is that."""
    return torch.clamp(x, min=LOWEST_FLOAT32)


def exp(x):
    """e^x of float32 up to 88; 0 below -87, so that no subnormal arises."""
    underflow = x < EXP_UNDERFLOW
    clamped = torch.where(underflow, EXP_UNDERFLOW, x)
    # + 128 keeps the argument positive, where conversion to integer rounds down
    exponent = (clamped * LOG2_E + 128.5).to(torch.int32) - 128
    scale = exponent.to(torch.float32)
    r = clamped - scale * LN2_HIGH - scale * LN2_LOW
    p = r * EXP_POLYNOMIAL[4] + EXP_POLYNOMIAL[3]
    for coefficient in EXP_POLYNOMIAL[2::-1]:
        p = p * r + coefficient
    p = p * r * r + r + 1.0
    power = ((exponent + 127) << 23).view(torch.float32)
    return torch.where(underflow, 0.0, p * power)
