"""A packed 2:4 weight that has every code in each of the groups that a kernel takes together."""

from __future__ import annotations

import torch

import maskpro_kernels as mk
from helpers.bits import assert_same_bits
from helpers.enumerated import KERNEL_DEVICE
from helpers.products import normal
from maskpro_kernels.ops.pattern import bitmask_of

CODES = torch.tensor([0b0011, 0b0101, 0b0110, 0b1001, 0b1010, 0b1100], dtype=torch.uint8)


def every_code() -> torch.Tensor:
    """uint8 [6, 4]: each of the six codes in each of four groups."""
    return CODES[(torch.arange(6)[:, None] + torch.arange(4)) % 6].to(KERNEL_DEVICE)


def assert_every_code_is_placed(tokens: int, dtype: torch.dtype) -> None:
    """One column of each group at a time, of ``tokens`` such vectors a product: each value is where it belongs."""
    # whole numbers of as many bits as bfloat16 has, times the same: sums are exact
    values, scales = (64 * normal(*size, seed=seed) for size, seed in (((6, 8), 3), ((4, 4), 4)))
    stored = mk.PackedNM((2 * values.round() + 1).to(dtype), bitmask_of(every_code(), 4), "2:4")
    x = torch.diag_embed(scales.round()).transpose(0, 1).flatten(1).to(dtype)
    found = torch.cat([mk.nm_linear(part, stored) for part in x.split(tokens)])
    assert_same_bits(found, (x.double() @ stored.unpack().double().t()).to(dtype))
