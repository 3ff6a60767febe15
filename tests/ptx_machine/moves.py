"""mov (PTX ISA 9.7.9.3 and 9.7.9.4): copies, and packs and unpacks vectors."""

from __future__ import annotations

from functools import cache

import numpy as np
from machines.findings import refusal

from .parser import UNSIGNED, Address, Instruction, Kernel, Pair, Register, Sink, Vector
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
    indices = [source.index if isinstance(source, Register) else None for source in sources]
    unused = cache(lambda: _unused_pieces(Register(index), len(sources), kernel))

    def run(batch, mask):
        value = dtype(0)
        for k, read in enumerate(reads):
            # LLVM packs a register that is never written where nobody wants the piece
            if indices[k] in batch.unusual and k in unused():
                continue
            value = value | read(batch, mask).astype(dtype) << dtype(k * bits)
        batch.write(index, value, mask)

    return run


def _unused_pieces(register: Register, count: int, kernel: Kernel) -> set[int]:
    """Which of the ``count`` pieces of a register no instruction reads: those that each of its unpackings drops."""
    unused = set(range(count))
    for ins in kernel.instructions():
        to, *rest = ins.operands or [None]
        packed = ins.opcode[0] == "mov" and to == register
        if packed or not any(_mentions(operand, register) for operand in ins.operands):
            continue
        if ins.opcode[0] != "mov" or not isinstance(to, Vector) or len(to.operands) != count:
            return set()
        unused &= {k for k, target in enumerate(to.operands) if isinstance(target, Sink)}
    return unused


def _mentions(operand, register: Register) -> bool:
    match operand:
        case Vector(parts):
            return any(_mentions(part, register) for part in parts)
        case Address(base):
            return base == register
        case Pair(first, second):
            return register in (first, second)
    return operand == register
