"""Stochastic rounding of logits to 16 bits."""

from __future__ import annotations

import torch

from .. import philox
from .groups import columns, uncolumns

BFLOAT16_MAX = torch.finfo(torch.bfloat16).max
FLOAT16_MAX = torch.finfo(torch.float16).max
FLOAT16_SMALLEST_NORMAL = 2.0**-14
FLOAT16_SUBNORMAL_STEP = 2.0**-24


def round_stochastically(x, r, dtype):
    """float32 rounded up or down to a 16-bit dtype's grid with probability by distance, still float32.

    Finite values stay finite, others pass through; ``r`` holds 32-bit words in int64.
    """
    if dtype == torch.bfloat16:
        # the sign of a zero is not defined through a bit cast, so zeros step aside
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
    """float32 groups rounded stochastically to a 16-bit dtype with words of the rounding stream."""
    words = philox.group_words(group, x.shape[-1], philox.STREAM_ROUNDING, key)
    rounded = [round_stochastically(x_i, r, dtype) for x_i, r in zip(columns(x), words, strict=True)]
    return uncolumns(rounded).to(dtype)
