"""What code for packed weights is built of, in the terms of LLVM."""

from __future__ import annotations

import torch
from llvmlite import ir

from ..codegen import TYPES, rounded_to_bfloat16
from ..loops import each
from .instructions import FLOAT, LONG, POINTER, WORD, intrinsic, vector, zeros

LINE_BYTES = 64


class Variable:
    """A value that changes, of which LLVM makes a register."""

    def __init__(self, b: ir.IRBuilder, initial: ir.Value):
        self.b, self.type = b, initial.type
        self.place = buffer(b, initial.type, 1)
        self.set(initial)

    def set(self, value: ir.Value) -> None:
        self.b.store(value, self.place)

    def get(self) -> ir.Value:
        return self.b.load(self.place, typ=self.type)


def buffer(b: ir.IRBuilder, element: ir.Type, count: int) -> ir.Value:
    """Memory of the function for so many, made once however often a loop comes by."""
    with b.goto_entry_block():
        place = b.alloca(ir.ArrayType(element, count))
    # a pointer like all others, which llvmlite gives the type of what it points to
    place.align, place.type = LINE_BYTES, POINTER
    return place


def at(b: ir.IRBuilder, pointer: ir.Value, index: ir.Value, element: ir.Type) -> ir.Value:
    return b.gep(pointer, [index], source_etype=element)


def broadcast(b: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    first = b.insert_element(ir.Constant(vector(value.type, lanes), ir.Undefined), value, WORD(0))
    return b.shuffle_vector(first, first, zeros(vector(WORD, lanes)))


def widened(b: ir.IRBuilder, values: ir.Value, lanes: int) -> ir.Value:
    """A vector of so many lanes that begins with another one; what stands behind that is not to be used."""
    order = ir.Constant(vector(WORD, lanes), [min(i, values.type.count) for i in range(lanes)])
    return b.shuffle_vector(values, ir.Constant(values.type, ir.Undefined), order)


def fma(b: ir.IRBuilder, one: ir.Value, other: ir.Value, total: ir.Value) -> ir.Value:
    return intrinsic(b, f"llvm.fma.v{total.type.count}f32", total.type, one, other, total)


def prefetch(b: ir.IRBuilder, pointer: ir.Value) -> None:
    """Ask for a line, to be read once and kept in all caches; where there is no such memory nothing happens."""
    intrinsic(b, "llvm.prefetch.p0", ir.VoidType(), pointer, WORD(0), WORD(3), WORD(1))


def copy(b: ir.IRBuilder, source: ir.Value, target: ir.Value, count: ir.Value, element: ir.Type) -> None:
    def one(i: ir.Value) -> None:
        b.store(b.load(at(b, source, i, element), typ=element, align=1), at(b, target, i, element), align=1)

    each(b, LONG(0), count, one)


def smaller(b: ir.IRBuilder, one: ir.Value, other: ir.Value) -> ir.Value:
    return b.select(b.icmp_signed("<", one, other), one, other)


def larger(b: ir.IRBuilder, one: ir.Value, other: ir.Value) -> ir.Value:
    return b.select(b.icmp_signed(">", one, other), one, other)


def divided_up(b: ir.IRBuilder, value: ir.Value, by: int) -> ir.Value:
    """An i64 divided by a constant, and rounded up."""
    return b.sdiv(b.add(value, LONG(by - 1)), LONG(by))


def horizontal_sum(b: ir.IRBuilder, values: ir.Value) -> ir.Value:
    """The sum of a float32 vector, in whatever order is quick."""
    name = f"llvm.vector.reduce.fadd.v{values.type.count}f32"
    return intrinsic(b, name, FLOAT, ir.Constant(FLOAT, -0.0), values, flags=("reassoc",))


def as_float32(b: ir.IRBuilder, values: ir.Value, dtype: torch.dtype) -> ir.Value:
    """A dtype's value, or a vector of such, as float32."""
    lanes = getattr(values.type, "count", None)
    wide, word = (FLOAT, WORD) if lanes is None else (vector(FLOAT, lanes), vector(WORD, lanes))
    if dtype == torch.bfloat16:
        shift = ir.Constant(word, 16 if lanes is None else [16] * lanes)
        return b.bitcast(b.shl(b.zext(values, word), shift), wide)
    return b.fpext(values, wide) if dtype == torch.float16 else values


def stored(b: ir.IRBuilder, value: ir.Value, pointer: ir.Value, dtype: torch.dtype) -> None:
    """Store a float32 as a dtype."""
    if dtype == torch.bfloat16:
        value = rounded_to_bfloat16(b, value)
    elif dtype == torch.float16:
        value = b.fptrunc(value, TYPES[dtype])
    b.store(value, pointer, align=1)
