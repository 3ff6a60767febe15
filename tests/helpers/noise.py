"""The noise of a draw and its ln and exp, each as a kernel of its own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from helpers.enumerated import KERNEL_DEVICE
from maskpro_kernels.ops.triton import device as device
from maskpro_kernels.ops.triton.tiles import INTERPRETED

# The interpreter takes as long for a small block as for a large one; compiled, large ones do not fit into registers
BLOCK = 1 << 16 if INTERPRETED else 1 << 10


@triton.jit
def gumbel_kernel(words, out, total, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    r = tl.load(words + i, mask=i < total, other=0).to(tl.uint32)
    tl.store(out + i, device.gumbel(r), mask=i < total)


@triton.jit
def ln_kernel(x, near_one, out, total, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < total
    y = device.ln(tl.load(x + i, mask=inside, other=1.0), tl.load(near_one + i, mask=inside, other=0.0))
    tl.store(out + i, y, mask=inside)


@triton.jit
def exp_kernel(x, out, total, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, device.exp(tl.load(x + i, mask=i < total, other=0.0)), mask=i < total)


def without_contraction() -> dict[str, bool]:
    """Arguments that ``launch`` adds; the interpreter has no compiler options."""
    return {} if INTERPRETED else {"enable_fp_fusion": False}


def in_kernel(kernel, *tensors: Tensor) -> Tensor:
    """float32, what one of these kernels makes of each element."""
    out = torch.full(tensors[0].shape, torch.nan, dtype=torch.float32, device=KERNEL_DEVICE)
    tensors = [t.to(KERNEL_DEVICE) for t in tensors]
    grid = (triton.cdiv(out.numel(), BLOCK),)
    kernel[grid](*tensors, out, out.numel(), BLOCK=BLOCK, **without_contraction())
    return out.cpu()
