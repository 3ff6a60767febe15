"""Building blocks of code for packed weights: LLVM code, and instruction sets of CPUs.

They place the kept values of a group in their columns and multiply them. A CPU's features determine the best set. On a
CPU without any set, compiled loops unpack packed weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from llvmlite import ir

from ..codegen import LONG, POINTER, TYPES, WORD, each, rounded_to_bfloat16
from . import Packed

BYTE = ir.IntType(8)
HALF = ir.IntType(16)
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
    known = b.module.globals.get(name)
    function = known or ir.Function(b.module, ir.FunctionType(result, [x.type for x in args]), name)
    return b.call(function, args, fastmath=flags)


class Variable:
    """Variable that LLVM keeps in a register."""

    def __init__(self, b: ir.IRBuilder, initial: ir.Value):
        self.b = b
        self.type = initial.type
        self.place = buffer(b, initial.type, 1)
        self.set(initial)

    def set(self, value: ir.Value) -> None:
        self.b.store(value, self.place)

    def get(self) -> ir.Value:
        return self.b.load(self.place, typ=self.type)


def buffer(b: ir.IRBuilder, element: ir.Type, count: int) -> ir.Value:
    """Allocate memory for ``count`` elements once in the function, also for calls within loops."""
    with b.goto_entry_block():
        place = b.alloca(ir.ArrayType(element, count))
    # an untyped pointer; llvmlite gives it the type of the element
    place.align = LINE_BYTES
    place.type = POINTER
    return place


def at(b: ir.IRBuilder, pointer: ir.Value, index: ir.Value, element: ir.Type) -> ir.Value:
    return b.gep(pointer, [index], source_etype=element)


def broadcast(b: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    first = b.insert_element(ir.Constant(vector(value.type, lanes), ir.Undefined), value, WORD(0))
    return b.shuffle_vector(first, first, zeros(vector(WORD, lanes)))


def widened(b: ir.IRBuilder, values: ir.Value, lanes: int) -> ir.Value:
    """Widen a vector to ``lanes`` lanes; the added lanes are undefined."""
    order = ir.Constant(vector(WORD, lanes), [min(i, values.type.count) for i in range(lanes)])
    return b.shuffle_vector(values, ir.Constant(values.type, ir.Undefined), order)


def fma(b: ir.IRBuilder, one: ir.Value, other: ir.Value, total: ir.Value) -> ir.Value:
    return intrinsic(b, f"llvm.fma.v{total.type.count}f32", total.type, one, other, total)


def prefetch(b: ir.IRBuilder, pointer: ir.Value) -> None:
    """Prefetch a cache line for one read into all caches; does nothing for an invalid address."""
    intrinsic(b, "llvm.prefetch.p0", ir.VoidType(), pointer, WORD(0), WORD(3), WORD(1))


def copy(b: ir.IRBuilder, source: ir.Value, target: ir.Value, count: ir.Value, element: ir.Type) -> None:
    def one(i: ir.Value) -> None:
        b.store(b.load(at(b, source, i, element), typ=element, align=1), at(b, target, i, element), align=1)

    each(b, LONG(0), count, one)


def divided_up(b: ir.IRBuilder, value: ir.Value, by: int) -> ir.Value:
    """i64 divided by a constant, rounded up."""
    return b.sdiv(b.add(value, LONG(by - 1)), LONG(by))


def horizontal_sum(b: ir.IRBuilder, values: ir.Value) -> ir.Value:
    """Sum of a float32 vector, in the fastest order."""
    name = f"llvm.vector.reduce.fadd.v{values.type.count}f32"
    return intrinsic(b, name, FLOAT, ir.Constant(FLOAT, -0.0), values, flags=("reassoc",))


def as_float32(b: ir.IRBuilder, values: ir.Value, dtype: torch.dtype) -> ir.Value:
    """Convert a value or vector of a dtype to float32."""
    lanes = getattr(values.type, "count", None)
    wide, word = (FLOAT, WORD) if lanes is None else (vector(FLOAT, lanes), vector(WORD, lanes))
    if dtype == torch.bfloat16:
        shift = ir.Constant(word, 16 if lanes is None else [16] * lanes)
        return b.bitcast(b.shl(b.zext(values, word), shift), wide)
    return b.fpext(values, wide) if dtype == torch.float16 else values


def nibbles(b: ir.IRBuilder, pointer: ir.Value, count: int) -> ir.Value:
    """Load a vector of ``count`` int4 values as bytes, times 16: in the upper four bits."""
    words = vector(HALF, count // 2)
    pair = b.zext(b.load(pointer, typ=vector(BYTE, count // 2), align=1), words)
    first, second, mask = (ir.Constant(words, [x] * (count // 2)) for x in (4, 8, 0xF0F0))
    return b.bitcast(b.and_(b.or_(b.shl(pair, first), b.shl(pair, second)), mask), vector(BYTE, count))


def scale_at(b: ir.IRBuilder, scales: ir.Value, index: ir.Value, kind: Packed) -> ir.Value:
    """Load a scale as float32, for int4 over 16, see ``nibbles``."""
    element = TYPES[kind.x]
    scale = as_float32(b, b.load(at(b, scales, index, element), typ=element, align=1), kind.x)
    return b.fmul(scale, ir.Constant(FLOAT, 1 / 16)) if kind.values == torch.uint8 else scale


def rounded(b: ir.IRBuilder, values: ir.Value, dtype: torch.dtype) -> ir.Value:
    """Convert a vector of float32 that are not NaN to a dtype, to the nearest."""
    if dtype != torch.bfloat16:
        return b.fptrunc(values, vector(TYPES[dtype], values.type.count)) if dtype == torch.float16 else values
    words = vector(WORD, values.type.count)
    bits = b.bitcast(values, words)
    half, one, most = (ir.Constant(words, [x] * words.count) for x in (16, 1, 0x7FFF))
    carried = b.add(bits, b.add(b.and_(b.lshr(bits, half), one), most))
    return b.trunc(b.lshr(carried, half), vector(HALF, words.count))


def stored(b: ir.IRBuilder, value: ir.Value, pointer: ir.Value, dtype: torch.dtype) -> None:
    """Convert a float32 to a dtype and store it."""
    if dtype == torch.bfloat16:
        value = rounded_to_bfloat16(b, value)
    elif dtype == torch.float16:
        value = b.fptrunc(value, TYPES[dtype])
    b.store(value, pointer, align=1)


def _row_of(b: ir.IRBuilder, rows: list[list[int]], bits: ir.Value, bytes_each: int) -> ir.Value:
    """Row of the module's table of bytes for a part of the bitmask."""
    table = b.module.globals.get("table")
    if table is None:
        content = bytearray(x & 0xFF for row in rows for x in row)
        table = ir.GlobalVariable(b.module, ir.ArrayType(BYTE, len(content)), "table")
        table.initializer = ir.Constant(table.value_type, content)
        table.global_constant = True
        table.linkage = "private"
        table.align = 64
    place = b.mul(b.zext(bits, LONG), LONG(bytes_each))
    return b.load(at(b, table, place, BYTE), typ=vector(BYTE, bytes_each), align=8)


def _ranks(lanes: int) -> list[list[int | None]]:
    """For each bitmask of ``lanes`` bits, the index of the value in each lane, or None."""
    places = range(lanes)
    return [[(x & (1 << i) - 1).bit_count() if x >> i & 1 else None for i in places] for x in range(1 << lanes)]


class Instructions:
    """Instruction set of one kind of CPU.

    Attributes:
        needs: required features, by LLVM's names.
        lanes: 32-bit values of a vector.
        tokens: most tokens to multiply a row with at a time, so that their sums leave registers for the weights.
        halves: whether it places 32 values of 16 bits at once.
        pairs: whether it multiplies pairs of bfloat16 into float32 sums.
        words: whether it places 16 bytes at once, and multiplies pairs of 16-bit integers into int32 sums.
        octets: whether it places 64 bytes at once, and multiplies quadruples of them into int32 sums.
        tiles: whether it multiplies matrices of 16 x 32 bfloat16.
    """

    needs: tuple[str, ...]
    lanes: int
    tokens: int
    halves = pairs = words = octets = tiles = False

    def __init__(self, features: Mapping[str, bool]):
        pass

    def __repr__(self) -> str:
        # part of the key of compiled code: CPUs of one kind may differ in these
        return f"{type(self).__name__}({self.halves}, {self.pairs}, {self.octets}, {self.tiles})"

    def placed(self, b: ir.IRBuilder, values: ir.Value, bits: ir.Value) -> ir.Value:
        """Place the first values of a vector of 32-bit integers in the lanes of ``bits``, with zeros in others."""
        raise NotImplementedError


class X86(Instructions):
    words = True

    def placed_bytes(self, b: ir.IRBuilder, values: ir.Value, bits: ir.Value, first: int, kind: Packed) -> ir.Value:
        """Place bytes of a vector of 16, from number ``first`` on, by 16 bits at a pointer, with zeros in others."""
        low, high = (b.load(at(b, bits, LONG(i), BYTE), typ=BYTE) for i in range(2))
        # an index with its highest bit set gives zero, also with the number of the first byte added
        rows = [[128 if x is None else x for x in row] for row in _ranks(8)]
        parts = [_row_of(b, rows, part, 8) for part in (low, high)]
        second = first + 8 * kind.n // kind.m
        if kind.m == 16:
            second = first
            parts[1] = b.add(parts[1], broadcast(b, intrinsic(b, "llvm.ctpop.i8", BYTE, low), 8))
        order = b.shuffle_vector(*parts, ir.Constant(vector(WORD, 16), list(range(16))))
        order = b.add(order, ir.Constant(vector(BYTE, 16), [first] * 8 + [second] * 8))
        return intrinsic(b, "llvm.x86.ssse3.pshuf.b.128", vector(BYTE, 16), values, order)

    def dot_words(self, b: ir.IRBuilder, total: ir.Value, weights: ir.Value, x: ir.Value) -> ir.Value:
        """total + weights * x of 16 integers of 16 bits each, two products into each of 8 int32 sums."""
        return b.add(total, intrinsic(b, "llvm.x86.avx2.pmadd.wd", total.type, weights, x))


class Avx512(X86):
    needs = ("avx512f", "avx512bw", "avx512vl", "f16c")
    lanes = 16
    tokens = 16

    def __init__(self, features):
        self.halves = bool(features.get("avx512vbmi2"))
        self.pairs = self.halves and bool(features.get("avx512bf16"))
        self.octets = self.halves and bool(features.get("avx512vnni"))
        self.tiles = self.pairs and bool(features.get("amx-tile") and features.get("amx-bf16"))

    def placed(self, b, values, bits):
        typ = values.type
        name = f"llvm.x86.avx512.mask.expand.v{typ.count}i{typ.element.width}"
        return intrinsic(b, name, typ, values, zeros(typ), b.bitcast(bits, vector(ir.IntType(1), typ.count)))

    def dot_pairs(self, b: ir.IRBuilder, total: ir.Value, weights: ir.Value, x: ir.Value) -> ir.Value:
        """total + weights * x of 32 bfloat16 values each, two products into each of 16 sums."""
        pairs = (b.bitcast(each, vector(BFLOAT, 32)) for each in (weights, x))
        return intrinsic(b, "llvm.x86.avx512bf16.dpbf16ps.512", total.type, total, *pairs)

    def dot_octets(self, b: ir.IRBuilder, total: ir.Value, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
        """total + unsigned * signed of 64 bytes each, four products into each of 16 int32 sums."""
        words = (b.bitcast(each, vector(WORD, 16)) for each in (unsigned, signed))
        return intrinsic(b, "llvm.x86.avx512.vpdpbusd.512", total.type, total, *words)


class Avx2(X86):
    needs = ("avx2", "fma", "f16c")
    lanes = 8
    tokens = 8

    def placed(self, b, values, bits):
        rows = [[-1 if x is None else x for x in row] for row in _ranks(8)]
        order = b.sext(_row_of(b, rows, bits, 8), vector(WORD, 8))
        moved = intrinsic(b, "llvm.x86.avx2.permd", vector(WORD, 8), values, order)
        return b.select(b.icmp_signed("<", order, zeros(order.type)), zeros(moved.type), moved)


class Neon(Instructions):
    needs = ("neon",)
    lanes = 4
    tokens = 16

    def placed(self, b, values, bits):
        # an index beyond the 16 bytes gives zero
        rows = [[255 if x is None else 4 * x + byte for x in row for byte in range(4)] for row in _ranks(4)]
        order = _row_of(b, rows, bits, 16)
        octets = vector(BYTE, 16)
        moved = intrinsic(b, "llvm.aarch64.neon.tbl1.v16i8", octets, b.bitcast(values, octets), order)
        return b.bitcast(moved, vector(WORD, 4))


# Best first
KINDS: tuple[type[Instructions], ...] = (Avx512, Avx2, Neon)


def chosen(features: Mapping[str, bool]) -> Instructions | None:
    """Best instruction set of a CPU with these features, or None."""
    return next((kind(features) for kind in KINDS if all(features.get(name) for name in kind.needs)), None)
