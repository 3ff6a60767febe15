"""Logic and shifts (PTX ISA 9.7.8): and, or, xor, not, lop3, shl, shr, shf; and prmt (9.7.9.7)."""

from __future__ import annotations

import numpy as np

from ..findings import refusal
from .arithmetic import elementwise
from .parser import Immediate, Instruction, Kernel
from .registry import destination, instruction, modifiers, numpy_type, operands, passing_on, reader

LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@instruction(*LOGIC)
def logic(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.8.1 to 9.7.8.3, and, or, xor."""
    (kind,) = modifiers(ins, ("pred", "b16", "b32", "b64"))
    dtype, compute = numpy_type(kind), LOGIC[ins.opcode[0]]
    if kind == "pred":
        return elementwise(ins, kernel, dtype, 2, compute)
    to, *given = operands(ins, 3)
    index = destination(to, dtype, ins, kernel)
    # a bit is undefined where that bit of either is, though the other one may decide it: LLVM's poison stays poison
    return passing_on(index, given, dtype, ins, kernel, compute, np.bitwise_or)


@instruction("not")
def invert(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.8.4, not."""
    (kind,) = modifiers(ins, ("pred", "b16", "b32", "b64"))
    return elementwise(ins, kernel, numpy_type(kind), 1, np.invert)


@instruction("lop3")
def any_logic(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.8.6, lop3: the function of three bits that a table of eight gives."""
    modifiers(ins, "b32")
    given = operands(ins, 5)
    if not isinstance(given[4], Immediate) or not 0 <= given[4].value < 256:
        raise refusal(ins, "a table of eight bits is expected")
    table, index = given[4].value, destination(given[0], np.uint32, ins, kernel)
    reads = [reader(operand, np.uint32, ins, kernel) for operand in given[1:4]]

    def run(batch, mask):
        values = [read(batch, mask) for read in reads]
        result = np.uint32(0)
        for row in range(8):
            if table >> row & 1:
                a, b, c = (value if row >> k & 1 else ~value for k, value in zip((2, 1, 0), values, strict=True))
                result = result | a & b & c
        batch.write(index, result, mask)

    return run


@instruction("shl", "shr")
def shift(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.8.8 and 9.7.8.9, shl and shr: what is shifted further than the width is gone, or the sign."""
    left = ins.opcode[0] == "shl"
    (kind,) = modifiers(ins, tuple(f"{letter}{bits}" for letter in ("b" if left else "bus") for bits in (16, 32, 64)))
    dtype, bits = numpy_type(kind), int(kind[1:])
    to, of, by = operands(ins, 3)
    index, read = destination(to, dtype, ins, kernel), reader(of, dtype, ins, kernel)
    move = np.left_shift if left else np.right_shift
    if isinstance(by, Immediate) and 0 <= by.value < bits:
        fixed = dtype(by.value)
        return lambda batch, mask: batch.write(index, move(read(batch, mask), fixed), mask)
    amount = reader(by, np.uint32, ins, kernel)

    def run(batch, mask):
        value, count = read(batch, mask), amount(batch, mask)
        moved = move(value, np.minimum(count, np.uint32(bits - 1)).astype(dtype))
        batch.write(index, moved if kind[0] == "s" else np.where(count < bits, moved, dtype(0)), mask)

    return run


@instruction("shf")
def funnel_shift(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.8.7, shf: of the 64 bits of two registers."""
    way, wrap, _ = modifiers(ins, ("l", "r"), ("wrap", "clamp"), "b32")
    to, *given = operands(ins, 4)
    index = destination(to, np.uint32, ins, kernel)
    low, high, by = (reader(operand, np.uint32, ins, kernel) for operand in given)

    def run(batch, mask):
        count = by(batch, mask)
        count = count & np.uint32(31) if wrap == "wrap" else np.minimum(count, np.uint32(32))
        both = high(batch, mask).astype(np.uint64) << np.uint64(32) | low(batch, mask)
        count = count.astype(np.uint64)
        moved = both << count >> np.uint64(32) if way == "l" else both >> count
        batch.write(index, moved.astype(np.uint32), mask)

    return run


@instruction("prmt")
def permute(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.9.7, prmt without a mode: bytes of eight, chosen by three bits each; a fourth repeats the sign."""
    modifiers(ins, "b32")
    to, *given = operands(ins, 4)
    index = destination(to, np.uint32, ins, kernel)
    low, high, selector = (reader(operand, np.uint32, ins, kernel) for operand in given)

    def run(batch, mask):
        both = high(batch, mask).astype(np.uint64) << np.uint64(32) | low(batch, mask)
        chosen, result = selector(batch, mask), np.uint32(0)
        for k in range(4):
            nibble = chosen >> np.uint32(4 * k) & np.uint32(15)
            byte = (both >> (nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8)).astype(np.uint8)
            if np.any(nibble & np.uint32(8)):
                byte = np.where(nibble & np.uint32(8), (byte.view(np.int8) >> np.int8(7)).view(np.uint8), byte)
            result = result | byte.astype(np.uint32) << np.uint32(8 * k)
        batch.write(index, result, mask)

    return run
