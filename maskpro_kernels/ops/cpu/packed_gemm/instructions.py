"""Building blocks of code for packed weights: LLVM code, and instruction sets of CPUs.

They expand the kept values of a group into their columns and multiply them. A CPU's features determine the best set. On
a CPU without any set, compiled loops unpack packed weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from llvmlite import ir

from ..codegen import I32, I64, POINTER, TYPES, for_range, rounded_to_bfloat16
from . import Packed

I8 = ir.IntType(8)
I16 = ir.IntType(16)
FLOAT = ir.FloatType()
LINE_BYTES = 64


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite's builder lacks."""

    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"


BFLOAT = _BFloat()


def vector(element: ir.Type, lanes: int) -> ir.VectorType:
    return ir.VectorType(element, lanes)


def zeros(type_: ir.Type) -> ir.Constant:
    return ir.Constant(type_, None)


def intrinsic(b: ir.IRBuilder, name: str, result: ir.Type, *args: ir.Value, flags: tuple[str, ...] = ()) -> ir.Value:
    """Call an LLVM intrinsic by its full name, with floating-point flags."""
    declared = b.module.globals.get(name)
    function = declared or ir.Function(b.module, ir.FunctionType(result, [x.type for x in args]), name)
    return b.call(function, args, fastmath=flags)


class Variable:
    """Variable that LLVM keeps in a register."""

    def __init__(self, b: ir.IRBuilder, initial: ir.Value):
        self.b = b
        self.type = initial.type
        self.pointer = buffer(b, initial.type, 1)
        self.set(initial)

    def set(self, value: ir.Value) -> None:
        self.b.store(value, self.pointer)

    def get(self) -> ir.Value:
        return self.b.load(self.pointer, typ=self.type)


def buffer(b: ir.IRBuilder, element: ir.Type, count: int) -> ir.Value:
    """Allocate memory for ``count`` elements once in the function, also for calls within loops."""
    with b.goto_entry_block():
        pointer = b.alloca(ir.ArrayType(element, count))
    # an untyped pointer; llvmlite gives it the type of the element
    pointer.align = LINE_BYTES
    pointer.type = POINTER
    return pointer


def gep(b: ir.IRBuilder, pointer: ir.Value, index: ir.Value, element: ir.Type) -> ir.Value:
    return b.gep(pointer, [index], source_etype=element)


def broadcast(b: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    first = b.insert_element(ir.Constant(vector(value.type, lanes), ir.Undefined), value, I32(0))
    return b.shuffle_vector(first, first, zeros(vector(I32, lanes)))


def widened(b: ir.IRBuilder, values: ir.Value, lanes: int) -> ir.Value:
    """Widen a vector to ``lanes`` lanes; the added lanes are undefined."""
    order = ir.Constant(vector(I32, lanes), [min(i, values.type.count) for i in range(lanes)])
    return b.shuffle_vector(values, ir.Constant(values.type, ir.Undefined), order)


def fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, total: ir.Value) -> ir.Value:
    return intrinsic(b, f"llvm.fma.v{total.type.count}f32", total.type, x, y, total)


def prefetch(b: ir.IRBuilder, pointer: ir.Value) -> None:
    """Prefetch a cache line for one read into all caches; does nothing for an invalid address."""
    intrinsic(b, "llvm.prefetch.p0", ir.VoidType(), pointer, I32(0), I32(3), I32(1))


def copy(b: ir.IRBuilder, source: ir.Value, target: ir.Value, count: ir.Value, element: ir.Type) -> None:
    def copy_element(i: ir.Value) -> None:
        b.store(b.load(gep(b, source, i, element), typ=element, align=1), gep(b, target, i, element), align=1)

    for_range(b, I64(0), count, copy_element)


def ceil_div(b: ir.IRBuilder, value: ir.Value, divisor: int) -> ir.Value:
    """i64 divided by a constant, rounded up."""
    return b.sdiv(b.add(value, I64(divisor - 1)), I64(divisor))


def horizontal_sum(b: ir.IRBuilder, values: ir.Value) -> ir.Value:
    """Sum of a float32 vector, in the fastest order."""
    name = f"llvm.vector.reduce.fadd.v{values.type.count}f32"
    return intrinsic(b, name, FLOAT, ir.Constant(FLOAT, -0.0), values, flags=("reassoc",))


def as_float32(b: ir.IRBuilder, values: ir.Value, dtype: torch.dtype) -> ir.Value:
    """Convert a value or vector of a dtype to float32."""
    lanes = getattr(values.type, "count", None)
    floats = FLOAT if lanes is None else vector(FLOAT, lanes)
    if dtype == torch.bfloat16:
        integers = I32 if lanes is None else vector(I32, lanes)
        shift = ir.Constant(integers, 16 if lanes is None else [16] * lanes)
        return b.bitcast(b.shl(b.zext(values, integers), shift), floats)
    return b.fpext(values, floats) if dtype == torch.float16 else values


def nibbles(b: ir.IRBuilder, pointer: ir.Value, count: int) -> ir.Value:
    """Load a vector of ``count`` int4 values as bytes, times 16: in the upper four bits."""
    integers = vector(I16, count // 2)
    pairs = b.zext(b.load(pointer, typ=vector(I8, count // 2), align=1), integers)
    low_shift, high_shift, mask = (ir.Constant(integers, [x] * (count // 2)) for x in (4, 8, 0xF0F0))
    return b.bitcast(b.and_(b.or_(b.shl(pairs, low_shift), b.shl(pairs, high_shift)), mask), vector(I8, count))


def load_scale(b: ir.IRBuilder, scales: ir.Value, index: ir.Value, kind: Packed) -> ir.Value:
    """Load a scale as float32, for int4 over 16, see ``nibbles``."""
    element = TYPES[kind.x]
    scale = as_float32(b, b.load(gep(b, scales, index, element), typ=element, align=1), kind.x)
    return b.fmul(scale, ir.Constant(FLOAT, 1 / 16)) if kind.values == torch.uint8 else scale


def rounded(b: ir.IRBuilder, values: ir.Value, dtype: torch.dtype) -> ir.Value:
    """Convert a vector of float32 that are not NaN to a dtype, to the nearest."""
    if dtype != torch.bfloat16:
        return b.fptrunc(values, vector(TYPES[dtype], values.type.count)) if dtype == torch.float16 else values
    integers = vector(I32, values.type.count)
    bits = b.bitcast(values, integers)
    shift, ones, below_half = (ir.Constant(integers, [x] * integers.count) for x in (16, 1, 0x7FFF))
    carried = b.add(bits, b.add(b.and_(b.lshr(bits, shift), ones), below_half))
    return b.trunc(b.lshr(carried, shift), vector(I16, integers.count))


def store_rounded(b: ir.IRBuilder, value: ir.Value, pointer: ir.Value, dtype: torch.dtype) -> None:
    """Convert a float32 to a dtype and store it."""
    if dtype == torch.bfloat16:
        value = rounded_to_bfloat16(b, value)
    elif dtype == torch.float16:
        value = b.fptrunc(value, TYPES[dtype])
    b.store(value, pointer, align=1)


def transposed(b: ir.IRBuilder, rows: Sequence[ir.Value]) -> list[ir.Value]:
    """Columns of a square matrix of vectors; its size is a power of two."""
    rows = list(rows)
    count = len(rows)
    step = 1
    while step < count:
        orders = [
            [(i & ~step) + (count if i & step else 0) + (step if high else 0) for i in range(count)] for high in (0, 1)
        ]
        masks = [ir.Constant(vector(I32, count), order) for order in orders]
        for i in range(count):
            if not i & step:
                upper = rows[i]
                lower = rows[i + step]
                rows[i], rows[i + step] = (b.shuffle_vector(upper, lower, mask) for mask in masks)
        step *= 2
    return rows


def _table_row(b: ir.IRBuilder, rows: list[list[int]], bits: ir.Value, row_bytes: int) -> ir.Value:
    """Load the row of the module's table of bytes for some bits of the bitmask."""
    table = b.module.globals.get("table")
    if table is None:
        content = bytearray(x & 0xFF for row in rows for x in row)
        table = ir.GlobalVariable(b.module, ir.ArrayType(I8, len(content)), "table")
        table.initializer = ir.Constant(table.value_type, content)
        table.global_constant = True
        table.linkage = "private"
        table.align = 64
    index = b.mul(b.zext(bits, I64), I64(row_bytes))
    return b.load(gep(b, table, index, I8), typ=vector(I8, row_bytes), align=8)


def _expand_indices(lanes: int) -> list[list[int | None]]:
    """For each bitmask of ``lanes`` bits, the index of the value in each lane, or None."""
    return [
        [(bits & (1 << lane) - 1).bit_count() if bits >> lane & 1 else None for lane in range(lanes)]
        for bits in range(1 << lanes)
    ]


class Instructions:
    """Instruction set of one kind of CPU.

    Attributes:
        needs: required features, by LLVM's names.
        lanes: 32-bit values of a vector.
        tokens: most tokens to multiply a row with at a time, so that their sums leave registers for the weights.
        vbmi2: whether it expands vectors of 64 bytes or of 32 values of 16 bits (VPEXPANDB, VPEXPANDW).
        bf16: whether it multiplies pairs of bfloat16 into float32 sums (VDPBF16PS), with ``vbmi2``.
        vnni: whether it multiplies quadruples of bytes into int32 sums (VPDPBUSD), with ``vbmi2``.
        amx: whether it multiplies tiles of 16 x 32 bfloat16 (TDPBF16PS), with ``bf16``.
        pmaddwd: whether it shuffles 16 bytes, and multiplies pairs of 16-bit integers into int32 sums (PSHUFB,
            PMADDWD).
    """

    needs: tuple[str, ...]
    lanes: int
    tokens: int
    vbmi2 = bf16 = vnni = amx = pmaddwd = False

    def __init__(self, features: Mapping[str, bool]):
        pass

    def __repr__(self) -> str:
        # part of the key of compiled code: CPUs of one kind may differ in these
        return f"{type(self).__name__}({self.vbmi2}, {self.bf16}, {self.vnni}, {self.amx})"

    def expand(self, b: ir.IRBuilder, values: ir.Value, bits: ir.Value) -> ir.Value:
        """Move the first values of a vector of 32-bit integers into the lanes whose bits are set; zeros in others."""
        raise NotImplementedError


class X86(Instructions):
    pmaddwd = True

    def expand_bytes(self, b: ir.IRBuilder, values: ir.Value, bits: ir.Value, first: int, kind: Packed) -> ir.Value:
        """``expand`` for 16 lanes of bytes, of values from number ``first`` on, by 16 bits at a pointer."""
        low, high = (b.load(gep(b, bits, I64(i), I8), typ=I8) for i in range(2))
        # an index with its highest bit set gives zero, also with the number of the first byte added
        rows = [[128 if x is None else x for x in row] for row in _expand_indices(8)]
        low_order = _table_row(b, rows, low, 8)
        high_order = _table_row(b, rows, high, 8)
        second = first + 8 * kind.n // kind.m
        if kind.m == 16:
            second = first
            high_order = b.add(high_order, broadcast(b, intrinsic(b, "llvm.ctpop.i8", I8, low), 8))
        order = b.shuffle_vector(low_order, high_order, ir.Constant(vector(I32, 16), list(range(16))))
        order = b.add(order, ir.Constant(vector(I8, 16), [first] * 8 + [second] * 8))
        return intrinsic(b, "llvm.x86.ssse3.pshuf.b.128", vector(I8, 16), values, order)

    def dot_i16(self, b: ir.IRBuilder, total: ir.Value, weights: ir.Value, x: ir.Value) -> ir.Value:
        """total + weights * x of 16 integers of 16 bits each, two products into each of 8 int32 sums."""
        return b.add(total, intrinsic(b, "llvm.x86.avx2.pmadd.wd", total.type, weights, x))


class Avx512(X86):
    needs = ("avx512f", "avx512bw", "avx512vl", "f16c")
    lanes = 16
    tokens = 16

    def __init__(self, features):
        self.vbmi2 = bool(features.get("avx512vbmi2"))
        self.bf16 = self.vbmi2 and bool(features.get("avx512bf16"))
        self.vnni = self.vbmi2 and bool(features.get("avx512vnni"))
        self.amx = self.bf16 and bool(features.get("amx-tile") and features.get("amx-bf16"))

    def expand(self, b, values, bits):
        type_ = values.type
        name = f"llvm.x86.avx512.mask.expand.v{type_.count}i{type_.element.width}"
        return intrinsic(b, name, type_, values, zeros(type_), b.bitcast(bits, vector(ir.IntType(1), type_.count)))

    def round_to_bfloat16(self, b: ir.IRBuilder, values: ir.Value) -> ir.Value:
        """Round a vector of float32 to bfloat16, to the nearest, as a vector of I16."""
        count = values.type.count
        return b.bitcast(b.fptrunc(values, vector(BFLOAT, count)), vector(I16, count))

    def dot_bfloat16(self, b: ir.IRBuilder, total: ir.Value, weights: ir.Value, x: ir.Value) -> ir.Value:
        """total + weights * x of 32 bfloat16 values each, two products into each of 16 sums."""
        weights = b.bitcast(weights, vector(BFLOAT, 32))
        x = b.bitcast(x, vector(BFLOAT, 32))
        return intrinsic(b, "llvm.x86.avx512bf16.dpbf16ps.512", total.type, total, weights, x)

    def dot_i8(self, b: ir.IRBuilder, total: ir.Value, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
        """total + unsigned * signed of 64 bytes each, four products into each of 16 int32 sums."""
        unsigned = b.bitcast(unsigned, total.type)
        signed = b.bitcast(signed, total.type)
        return intrinsic(b, "llvm.x86.avx512.vpdpbusd.512", total.type, total, unsigned, signed)


class Avx2(X86):
    needs = ("avx2", "fma", "f16c")
    lanes = 8
    tokens = 8

    def expand(self, b, values, bits):
        rows = [[-1 if x is None else x for x in row] for row in _expand_indices(8)]
        order = b.sext(_table_row(b, rows, bits, 8), vector(I32, 8))
        permuted = intrinsic(b, "llvm.x86.avx2.permd", vector(I32, 8), values, order)
        return b.select(b.icmp_signed("<", order, zeros(order.type)), zeros(permuted.type), permuted)


class Neon(Instructions):
    needs = ("neon",)
    lanes = 4
    tokens = 16

    def expand(self, b, values, bits):
        # an index beyond the 16 bytes gives zero
        rows = [[255 if x is None else 4 * x + byte for x in row for byte in range(4)] for row in _expand_indices(4)]
        order = _table_row(b, rows, bits, 16)
        bytes_type = vector(I8, 16)
        shuffled = intrinsic(b, "llvm.aarch64.neon.tbl1.v16i8", bytes_type, b.bitcast(values, bytes_type), order)
        return b.bitcast(shuffled, vector(I32, 4))


# Best first
INSTRUCTION_SETS: tuple[type[Instructions], ...] = (Avx512, Avx2, Neon)


def best_instructions(features: Mapping[str, bool]) -> Instructions | None:
    """Best instruction set of a CPU with these features, or None."""
    for instructions in INSTRUCTION_SETS:
        if all(features.get(name) for name in instructions.needs):
            return instructions(features)
    return None
