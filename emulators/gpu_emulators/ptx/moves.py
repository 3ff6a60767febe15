"""mov (PTX ISA 9.7.9.3 and 9.7.9.4): copies, and packs and unpacks vectors."""

from __future__ import annotations

import numpy as np

from ..findings import refusal
from .parser import UNSIGNED, Instruction, Kernel, Sink, Vector
from .registry import destination, instruction, modifiers, operands, passing_on, reader

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

    def part(target, shift):
        def take(value):
            return (value >> shift).astype(piece)

        return passing_on(destination(target, piece, ins, kernel), [source], dtype, ins, kernel, take, take)

    parts = [part(target, dtype(k * bits)) for k, target in enumerate(targets) if not isinstance(target, Sink)]

    def run(batch, mask):
        for one in parts:
            one(batch, mask)

    return run


def _pack(to, sources: tuple, dtype: type, ins: Instruction, kernel: Kernel):
    piece = _piece(dtype, len(sources), ins)
    shifts = [dtype(k * np.dtype(piece).itemsize * 8) for k in range(1, len(sources))]

    def join(low, *values):
        joined = low.astype(dtype)
        for value, shift in zip(values, shifts, strict=True):
            joined = joined | value.astype(dtype) << shift
        return joined

    return passing_on(destination(to, dtype, ins, kernel), sources, piece, ins, kernel, join, join)
