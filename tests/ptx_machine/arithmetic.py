"""Integer arithmetic (PTX ISA 9.7.1): add, sub, mul, mad, div, rem, abs, neg, min, max; wraps around as numpy does."""

from __future__ import annotations

import numpy as np

from .parser import Instruction, Kernel
from .registry import (
    destination,
    instruction,
    modifiers,
    numpy_type,
    operands,
    reader,
)

INTEGERS = tuple(f"{letter}{bits}" for letter in "us" for bits in (16, 32, 64))


def elementwise(ins: Instruction, kernel: Kernel, dtype: type, count: int, compute, out: type | None = None):
    """d = compute(operands), each read as ``dtype``, written as ``out`` where that differs."""
    given = operands(ins, count + 1)
    index = destination(given[0], out or dtype, ins, kernel)
    reads = [reader(operand, dtype, ins, kernel) for operand in given[1:]]
    if count == 1:
        (first,) = reads
        return lambda batch, mask: batch.write(index, compute(first(batch, mask)), mask)
    if count == 2:
        first, second = reads
        return lambda batch, mask: batch.write(index, compute(first(batch, mask), second(batch, mask)), mask)
    return lambda batch, mask: batch.write(index, compute(*(read(batch, mask) for read in reads)), mask)


def _simple(name: str, count: int, compute):
    @instruction(name)
    def translate(ins: Instruction, kernel: Kernel):
        (kind,) = modifiers(ins, INTEGERS)
        return elementwise(ins, kernel, numpy_type(kind), count, compute)

    return translate


_simple("add", 2, np.add)
_simple("sub", 2, np.subtract)
