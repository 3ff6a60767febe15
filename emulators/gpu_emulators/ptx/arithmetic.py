"""Integer arithmetic (PTX ISA 9.7.1), which wraps around; and how an instruction is done to all threads at once."""

from __future__ import annotations

from functools import reduce

import numpy as np

from ..findings import refusal
from .parser import UNSIGNED, Instruction, Kernel
from .registry import destination, instruction, modifiers, numpy_type, operands, passing_on, reader

INTEGERS = tuple(f"{letter}{bits}" for letter in "us" for bits in (16, 32, 64))
PACKED = ("u16x2", "s16x2")


def elementwise(ins: Instruction, kernel: Kernel, dtype: type, count: int, compute):
    """d = compute(operands), each of ``dtype`` as the result is."""
    given = operands(ins, count + 1)
    index = destination(given[0], dtype, ins, kernel)
    reads = [reader(operand, dtype, ins, kernel) for operand in given[1:]]
    if count == 1:
        (first,) = reads
        return lambda batch, mask: batch.write(index, compute(first(batch, mask)), mask)
    if count == 2:
        first, second = reads
        return lambda batch, mask: batch.write(index, compute(first(batch, mask), second(batch, mask)), mask)
    return lambda batch, mask: batch.write(index, compute(*(read(batch, mask) for read in reads)), mask)


def packed(ins: Instruction, kernel: Kernel, whole: type, part: type, count: int, compute):
    """d = compute(operands) for each of two values of ``part`` that a register of ``whole`` holds.

    What is undefined in one of them leaves the other as it is.
    """
    given = operands(ins, count + 1)
    index = destination(given[0], whole, ins, kernel)
    bits = UNSIGNED[np.dtype(part).itemsize * 8]

    def both(*values):
        halves = [np.asarray(value)[..., None].view(part) for value in values]
        return np.ascontiguousarray(compute(*halves)).view(whole)[..., 0]

    def spread(*undefined):
        parts = np.asarray(reduce(np.bitwise_or, undefined))[..., None].view(bits)
        return np.where(parts != 0, ~bits(0), bits(0)).view(whole)[..., 0]

    return passing_on(index, given[1:], whole, ins, kernel, both, spread)


def _wide(kind: str) -> type:
    return numpy_type(f"{kind[0]}{2 * int(kind[1:])}")


def high_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of the product of integers of 16 or 32 bits."""
    bits = a.dtype.itemsize * 8
    wide = np.dtype(f"{a.dtype.kind}{a.dtype.itemsize * 2}").type
    return (a.astype(wide) * b.astype(wide) >> wide(bits)).astype(a.dtype)


def truncated_quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b rounded towards zero, b not zero; the lowest integer by -1 wraps around."""
    if a.dtype.kind == "u":
        return a // b
    quotient = a // b
    return quotient + ((a - quotient * b != 0) & ((a < 0) != (b < 0))).astype(a.dtype)


def truncated_remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """What the truncated quotient leaves, with the sign of ``a``."""
    return a - truncated_quotient(a, b) * b


@instruction("add", "sub")
def add_or_subtract(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.1.1 and 9.7.1.2, add and sub."""
    compute = np.add if ins.opcode[0] == "add" else np.subtract
    (kind,) = modifiers(ins, INTEGERS + (PACKED if ins.opcode[0] == "add" else ()))
    if kind in PACKED:
        return packed(ins, kernel, np.uint32, np.uint16, 2, compute)
    return elementwise(ins, kernel, numpy_type(kind), 2, compute)


@instruction("mul")
def multiply(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.1.3, mul: .lo and .hi half of the product, or .wide all of it."""
    part, kind = modifiers(ins, ("lo", "hi", "wide"), INTEGERS)
    dtype = numpy_type(kind)
    if part == "lo":
        return elementwise(ins, kernel, dtype, 2, np.multiply)
    if kind[1:] == "64":
        raise refusal(ins, "the upper half of 64 bits")
    if part == "hi":
        return elementwise(ins, kernel, dtype, 2, high_product)
    wide = _wide(kind)
    to, *factors = operands(ins, 3)
    index = destination(to, wide, ins, kernel)
    first, second = (reader(factor, dtype, ins, kernel) for factor in factors)
    return lambda batch, mask: batch.write(
        index, np.multiply(first(batch, mask), second(batch, mask), dtype=wide, casting="unsafe"), mask
    )


@instruction("mad")
def multiply_and_add(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.1.4, mad: as mul, then a sum that wraps around."""
    part, kind = modifiers(ins, ("lo", "hi", "wide"), INTEGERS)
    dtype = numpy_type(kind)
    if part == "lo":
        return elementwise(ins, kernel, dtype, 3, lambda a, b, c: a * b + c)
    if kind[1:] == "64":
        raise refusal(ins, "the upper half of 64 bits")
    if part == "hi":
        return elementwise(ins, kernel, dtype, 3, lambda a, b, c: high_product(a, b) + c)
    wide = _wide(kind)
    to, *factors, addend = operands(ins, 4)
    index = destination(to, wide, ins, kernel)
    first, second = (reader(factor, dtype, ins, kernel) for factor in factors)
    third = reader(addend, wide, ins, kernel)
    return lambda batch, mask: batch.write(
        index,
        np.multiply(first(batch, mask), second(batch, mask), dtype=wide, casting="unsafe") + third(batch, mask),
        mask,
    )


@instruction("div", "rem")
def divide(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.1.8 and 9.7.1.9, div and rem. By zero the result is undefined, which is a finding."""
    (kind,) = modifiers(ins, INTEGERS)
    dtype = numpy_type(kind)
    to, dividend, divisor = operands(ins, 3)
    index = destination(to, dtype, ins, kernel)
    first, second = reader(dividend, dtype, ins, kernel), reader(divisor, dtype, ins, kernel)
    compute = truncated_quotient if ins.opcode[0] == "div" else truncated_remainder

    def run(batch, mask):
        by = second(batch, mask)
        zero = by == 0
        if np.any(zero):
            if mask is None or (zero & mask).any():
                batch.find("division by zero", ins)
            by = np.where(zero, dtype(1), by)
        batch.write(index, compute(first(batch, mask), by), mask)

    return run


@instruction("neg", "abs")
def change_sign(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.1.11 and 9.7.1.10, neg and abs; the lowest integer stays as it is."""
    (kind,) = modifiers(ins, tuple(kind for kind in INTEGERS if kind[0] == "s"))
    return elementwise(ins, kernel, numpy_type(kind), 1, np.negative if ins.opcode[0] == "neg" else np.abs)


@instruction("min", "max")
def extremum(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.1.12 and 9.7.1.13, min and max."""
    (kind,) = modifiers(ins, INTEGERS)
    return elementwise(ins, kernel, numpy_type(kind), 2, np.minimum if ins.opcode[0] == "min" else np.maximum)


@instruction("popc", "clz")
def count_bits(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.1.14 and 9.7.1.15, popc and clz; the count has 32 bits."""
    (kind,) = modifiers(ins, ("b32", "b64"))
    dtype = UNSIGNED[int(kind[1:])]
    to, of = operands(ins, 2)
    index, read = destination(to, np.uint32, ins, kernel), reader(of, dtype, ins, kernel)
    count = np.bitwise_count if ins.opcode[0] == "popc" else leading_zeros
    return lambda batch, mask: batch.write(index, count(read(batch, mask)).astype(np.uint32), mask)


def leading_zeros(values: np.ndarray) -> np.ndarray:
    bits = values.dtype.itemsize * 8
    # all bits below the highest one set
    filled = values
    for shift in (1, 2, 4, 8, 16, 32):
        if shift < bits:
            filled = filled | filled >> values.dtype.type(shift)
    return bits - np.bitwise_count(filled).astype(np.int64)


@instruction("brev")
def reverse(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.1.18, brev."""
    (kind,) = modifiers(ins, ("b32", "b64"))
    return elementwise(ins, kernel, UNSIGNED[int(kind[1:])], 1, reversed_bits)


def reversed_bits(values: np.ndarray) -> np.ndarray:
    bits, dtype = values.dtype.itemsize * 8, values.dtype.type
    result = dtype(0)
    for k in range(bits):
        result = result | (values >> dtype(k) & dtype(1)) << dtype(bits - 1 - k)
    return result


@instruction("bfe")
def extract_field(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.1.19, bfe: bits from a position on, the sign's bit or zeros above."""
    (kind,) = modifiers(ins, ("u32", "s32", "u64", "s64"))
    dtype = numpy_type(kind)
    to, of, position, length = operands(ins, 4)
    index, read = destination(to, dtype, ins, kernel), reader(of, dtype, ins, kernel)
    start, count = reader(position, np.uint32, ins, kernel), reader(length, np.uint32, ins, kernel)
    return lambda batch, mask: batch.write(
        index, field(read(batch, mask), start(batch, mask), count(batch, mask)), mask
    )


def field(values: np.ndarray, start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """``count`` bits of ``values`` from ``start`` on, both of which are taken modulo 256."""
    bits, dtype = values.dtype.itemsize * 8, values.dtype.type
    start, count = start & np.uint32(255), count & np.uint32(255)
    # a field that reaches beyond the top is as long as there are bits, and filled from the top bit
    inside = np.minimum(start, np.uint32(bits - 1)).astype(dtype)
    length = np.minimum(count, np.uint32(bits) - inside.astype(np.uint32))
    up = (np.uint32(bits) - inside.astype(np.uint32) - length).astype(dtype)
    down = (np.uint32(bits) - length).astype(dtype)
    kept = values << np.minimum(up, dtype(bits - 1)) >> np.minimum(down, dtype(bits - 1))
    if dtype(0).dtype.kind == "u":
        kept = np.where(start > bits - 1, dtype(0), kept)
    else:
        kept = np.where(start > bits - 1, values >> dtype(bits - 1), kept)
    return np.where(count == 0, dtype(0), kept)


@instruction("bfi")
def insert_field(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.1.20, bfi: ``length`` bits of a at a position of b."""
    (kind,) = modifiers(ins, ("b32", "b64"))
    bits, dtype = int(kind[1:]), UNSIGNED[int(kind[1:])]
    to, new, old, position, length = operands(ins, 5)
    index = destination(to, dtype, ins, kernel)
    first, second = reader(new, dtype, ins, kernel), reader(old, dtype, ins, kernel)
    start, count = reader(position, np.uint32, ins, kernel), reader(length, np.uint32, ins, kernel)

    def run(batch, mask):
        at, size = start(batch, mask) & np.uint32(255), count(batch, mask) & np.uint32(255)
        inside = (at < bits) & (size > 0)
        shift = np.minimum(at, np.uint32(bits - 1)).astype(dtype)
        ones = np.iinfo(dtype).max >> (bits - np.clip(size, 1, bits)).astype(dtype)
        held = np.where(inside, ones << shift, dtype(0))
        result = second(batch, mask) & ~held | first(batch, mask) << shift & held
        batch.write(index, result.astype(dtype), mask)

    return run
