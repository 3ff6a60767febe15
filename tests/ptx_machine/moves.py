"""mov (PTX ISA 9.7.9.3 and 9.7.9.4): copies, and packs and unpacks vectors."""

from __future__ import annotations

import numpy as np

from .findings import refusal
from .parser import UNSIGNED, Instruction, Kernel, Sink, Vector
from .registry import destination, instruction, modifiers, operands, reader

TYPES = ("pred", "f32", "f64", *(f"{letter}{bits}" for letter in "bus" for bits in (16, 32, 64)))


@instruction("mov")
def move(ins: Instruction, kernel: Kernel):
    (kind,) = modifiers(ins, TYPES)
    to, source = operands(ins, 2)
    dtype = np.bool_ if kind == "pred" else UNSIGNED[int(kind[1:])]
    if isinstance(to, Vector):
        return _unpack(to.operands, source, dtype, ins, kernel)
    if isinstance(source, Vector):
        return _pack(to, source.operands, dtype, ins, kernel)
    index, read = destination(to, dtype, ins, kernel), reader(source, dtype, ins, kernel)
    return lambda batch, mask: batch.write(index, read(batch, mask), mask)


def _piece(dtype: type, count: int, ins: Instruction) -> type:
    """The type of each of ``count`` pieces of a value."""
    bits = np.dtype(dtype).itemsize * 8
    if ins.opcode[1][0] != "b" or count not in (2, 4) or bits // count not in UNSIGNED:
        raise refusal(ins, f"{count} pieces of a value of .{ins.opcode[1]}")
    return UNSIGNED[bits // count]


def _unpack(targets: tuple, source, dtype: type, ins: Instruction, kernel: Kernel):
    piece = _piece(dtype, len(targets), ins)
    bits = np.dtype(piece).itemsize * 8
    read = reader(source, dtype, ins, kernel)
    wanted = [
        (dtype(k * bits), destination(target, piece, ins, kernel))
        for k, target in enumerate(targets)
        if not isinstance(target, Sink)
    ]

    def run(batch, mask):
        value = read(batch, mask)
        for shift, index in wanted:
            batch.write(index, (value >> shift).astype(piece), mask)

    return run


def _pack(to, sources: tuple, dtype: type, ins: Instruction, kernel: Kernel):
    piece = _piece(dtype, len(sources), ins)
    bits = np.dtype(piece).itemsize * 8
    index = destination(to, dtype, ins, kernel)
    reads = [reader(source, piece, ins, kernel) for source in sources]

    def run(batch, mask):
        value = dtype(0)
        for k, read in enumerate(reads):
            value = value | read(batch, mask).astype(dtype) << dtype(k * bits)
        batch.write(index, value, mask)

    return run
