"""Products whose inner dimension is shared out, so that those with few rows give every processor work.

Each part of it has programs of its own, along the last axis of the grid, which write their sums in float32. A second
kernel adds the parts in their order: the bits of a result repeat.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch_elements
from .tiles import INTERPRETED, RESULT_SIDE, Tiles, architecture, parts_for


@triton.jit
def own_part(size, STEP: tl.constexpr):
    """(first, end) of the program's part of an inner dimension: whole steps, but where that ends."""
    steps = tl.cdiv(tl.cdiv(size, STEP), tl.num_programs(2))
    first = tl.program_id(2) * steps * STEP
    return first, tl.minimum(first + steps * STEP, size)


@triton.jit
def own_sums(out, tokens, columns):
    """Where the program's part of the inner dimension has its result [tokens, columns]."""
    return out + tl.program_id(2).to(tl.int64) * tokens * columns


@triton.jit(do_not_specialize=["total"])
def split_sum_kernel(partial, bias, out, columns, total: tl.int64, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """out [tokens, columns] is the sum of PARTS of them, in order, and the bias."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < total
    y = tl.load(partial + index, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        y += tl.load(partial + part * total + index, mask=inside, other=0.0)
    if bias is not None:
        y += tl.load(bias + index % columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + index, y.to(out.dtype.element_ty), mask=inside)


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what a kernel writes a result of ``dtype``."""
    # the interpreter truncates where hardware rounds
    return torch.float32 if INTERPRETED else dtype


class SplitResult:
    """The result [tokens, columns] of a product, in the dtype and on the device of its operand x.

    Attributes:
        grid: of the product's kernel: blocks of columns, blocks of tokens, parts of the inner dimension.
        out: what that kernel writes: the result, or [parts, tokens, columns] in float32.
        bias: what it adds: with several parts None.
    """

    def __init__(self, product: str, tile: Tiles, shape: tuple[int, int], inner: int, x: Tensor, bias: Tensor | None):
        tokens, columns = shape
        across, step = (tile.out, tile.k) if RESULT_SIDE[product] == "out" else (tile.k, tile.out)
        blocks = triton.cdiv(columns, across), triton.cdiv(tokens, tile.tokens)
        self.parts = parts_for(tile, blocks[0] * blocks[1], triton.cdiv(inner, step), architecture(x.device))
        self.grid = (*blocks, self.parts)
        self.whole = torch.empty(shape, dtype=result_dtype(x.dtype), device=x.device)
        self.out, self.bias, self.added = self.whole, bias, None
        if self.parts > 1:
            self.out = torch.empty(self.parts, *shape, dtype=torch.float32, device=x.device)
            self.bias, self.added = None, bias
        self.dtype = x.dtype

    def sum(self) -> Tensor:
        """The result, once the product's kernel has written all parts."""
        if self.parts > 1:
            count = self.whole.numel()
            launch_elements(split_sum_kernel, "split_sum", count, self.whole.device,
                            self.out, self.added, self.whole, self.whole.shape[1], count, PARTS=self.parts)  # fmt: skip
        return self.whole.to(self.dtype)
