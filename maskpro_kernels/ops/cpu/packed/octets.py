"""Products of int8 values with a few tokens in integers: 64 weights are placed at once, and multiplied as bytes.

What they are multiplied with becomes integers of 16 bits, with one scale for each block of columns whose weights share
one. The error of each is 2^-16 of the largest number of its block. Where that number stands out, the product is made in
registers as others are. The two bytes of an integer are multiplied one by one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from llvmlite import ir

from ..codegen import TYPES
from ..loops import ENTRY, add_function, add_shared, each, use_whole_registers
from .build import (
    Variable,
    as_float32,
    at,
    broadcast,
    buffer,
    copy,
    divided_up,
    fma,
    horizontal_sum,
    larger,
    prefetch,
    smaller,
    widened,
)
from .instructions import BYTE, FLOAT, LONG, WORD, Instructions, intrinsic, vector, zeros
from .kind import RUN, Packed
from .row_product import AHEAD_BYTES, RowProduct

# Weights that are placed at once
OCTETS = 2 * RUN
LANES = 16

# Most tokens that a row is multiplied with at a time: each has two sums
TOKENS = 8

# Integers of 16 bits that stand for -LARGEST to LARGEST are stored with MIDDLE added, for their bytes have no sign
LARGEST, MIDDLE = 32767, 32768

# How often the mean magnitude of a block its largest number may be: the error of an integer, 2^-16 of that number, is
# then below what rounding a product to bfloat16 costs, even if a mask drops the column of that number
MOST_OVER_MEAN = 128.0

# So that no reciprocal of a scale is infinite
LEAST_SCALE = 1e-37


def as_integers(kind: Packed) -> str:
    """``loop(start, stop, k, x, high, low, scales, refused)``: for tokens start to stop of x [tokens, k] of ``kind.x``.

    high and low are bytes [tokens, k rounded up to OCTETS], scales float32 [tokens, blocks]. An int64 at ``refused``
    becomes 1 where integers would be too coarse for a block: its largest number lies too far above the others, or is
    none.
    """
    module = ir.Module("maskpro_kernels")
    function, b = add_function(module, ENTRY, 3, 5)
    use_whole_registers(function)
    start, stop, k, x, high, low, scales, refused = function.args
    columns = LONG(kind.scaled_runs * RUN)
    padded = b.mul(divided_up(b, k, OCTETS), LONG(OCTETS))
    blocks = divided_up(b, k, kind.scaled_runs * RUN)
    lanes = _Lanes(b, kind.x)

    def token_integers(token: ir.Value) -> None:
        row = at(b, x, b.mul(token, k), lanes.element)
        targets = [at(b, target, b.mul(token, padded), BYTE) for target in (high, low)]

        def block_integers(block: ir.Value) -> None:
            first = b.mul(block, columns)
            last = smaller(b, k, b.add(first, columns))
            scale, fits = _scale(b, lanes, row, first, last)
            with b.if_then(b.not_(fits), likely=False):
                b.store(LONG(1), refused)
            b.store(scale, at(b, scales, b.add(b.mul(token, blocks), block), FLOAT), align=4)
            factor = broadcast(b, b.fdiv(ir.Constant(FLOAT, 1.0), scale), LANES)

            def write(column: ir.Value, values: ir.Value) -> None:
                for target, part in zip(targets, _bytes(b, b.fmul(values, factor)), strict=True):
                    b.store(part, at(b, target, column, BYTE), align=1)

            lanes.each(row, first, last, write)

        each(b, LONG(0), blocks, block_integers)

    each(b, start, stop, token_integers)
    b.ret_void()
    add_shared(module, function)
    return str(module)


class _Lanes:
    """Columns of a row of a dtype, LANES of them at a time, as float32."""

    def __init__(self, b: ir.IRBuilder, dtype: torch.dtype):
        self.b, self.dtype, self.element = b, dtype, TYPES[dtype]
        self.aside = buffer(b, self.element, LANES)

    def each(self, row: ir.Value, first: ir.Value, last: ir.Value, take: Callable[[ir.Value, ir.Value], None]) -> None:
        """``take(column, values)`` of all columns in [first, last), zeros beyond the last."""
        b = self.b
        whole = b.add(first, b.mul(b.sdiv(b.sub(last, first), LONG(LANES)), LONG(LANES)))

        def rest(column: ir.Value) -> None:
            b.store(zeros(ir.ArrayType(self.element, LANES)), self.aside)
            copy(b, at(b, row, column, self.element), self.aside, b.sub(last, column), self.element)
            take(column, self._loaded(self.aside))

        each(b, first, whole, lambda column: take(column, self._loaded(at(b, row, column, self.element))), by=LANES)
        each(b, whole, last, rest, by=LANES)

    def _loaded(self, pointer: ir.Value) -> ir.Value:
        return as_float32(self.b, self.b.load(pointer, typ=vector(self.element, LANES), align=1), self.dtype)


def _scale(b: ir.IRBuilder, lanes: _Lanes, row: ir.Value, first: ir.Value, last: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(By which the integers of those columns are to be multiplied, whether integers are fine enough for them)."""
    none = zeros(vector(FLOAT, LANES))
    most, total = Variable(b, none), Variable(b, none)

    def widen(_: ir.Value, values: ir.Value) -> None:
        magnitude = intrinsic(b, f"llvm.fabs.v{LANES}f32", values.type, values)
        most.set(intrinsic(b, f"llvm.maximum.v{LANES}f32", values.type, most.get(), magnitude))
        total.set(b.fadd(total.get(), magnitude))

    lanes.each(row, first, last, widen)
    largest = intrinsic(b, f"llvm.vector.reduce.fmaximum.v{LANES}f32", FLOAT, most.get())
    mean = b.fdiv(horizontal_sum(b, total.get()), b.sitofp(b.sub(last, first), FLOAT))
    # false of what is no number
    near = b.fcmp_ordered("<=", largest, b.fmul(mean, ir.Constant(FLOAT, MOST_OVER_MEAN)))
    finite = b.fcmp_ordered("<", largest, ir.Constant(FLOAT, float("inf")))
    scale = b.fdiv(largest, ir.Constant(FLOAT, float(LARGEST)))
    least = torch.tensor(LEAST_SCALE, dtype=torch.float32).item()
    return intrinsic(b, "llvm.maximum.f32", FLOAT, scale, ir.Constant(FLOAT, least)), b.and_(near, finite)


def _bytes(b: ir.IRBuilder, values: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(High, low) bytes of the nearest integers, MIDDLE added."""
    words = vector(WORD, LANES)
    nearest = intrinsic(b, f"llvm.rint.v{LANES}f32", values.type, values)
    # what is no number has no integer
    number = intrinsic(b, f"llvm.fptosi.sat.v{LANES}i32.v{LANES}f32", words, nearest)
    number = b.add(number, ir.Constant(words, [MIDDLE] * LANES))
    octets = vector(BYTE, LANES)
    return b.trunc(b.lshr(number, ir.Constant(words, [8] * LANES)), octets), b.trunc(number, octets)


def product(kind: Packed, use: Instructions, tokens: int, biased: bool) -> str:
    """``loop(start, stop, k, rows, values, bits, scales, high, low, x_scales, bias, out)``: as ``RowProduct``."""
    return _Product(kind, use, tokens, biased).assembly()


class _Product(RowProduct):
    """The function of ``product``."""

    def __init__(self, kind: Packed, use: Instructions, tokens: int, biased: bool):
        super().__init__(kind, use, tokens, biased, pointers=6)
        self.values, self.bits, self.scales, self.high, self.low, self.x_scales = self.pointers
        b, self.kept = self.b, 2 * kind.kept
        self.in_block = kind.scaled_runs // 2
        self.row_bytes = divided_up(b, self.k, 8)
        self.whole, self.all = b.sdiv(self.k, LONG(OCTETS)), divided_up(b, self.k, OCTETS)
        self.values_aside, self.bits_aside = buffer(b, BYTE, OCTETS), buffer(b, BYTE, 8)
        b.store(zeros(ir.ArrayType(BYTE, OCTETS)), self.values_aside)

    def add_row(self, row: ir.Value) -> None:
        b = self.b
        values = at(b, self.values, b.mul(row, self.row_values), BYTE)
        bits = at(b, self.bits, b.mul(row, self.row_bytes), BYTE)
        totals = [Variable(b, zeros(vector(FLOAT, LANES))) for _ in range(self.tokens)]

        def add_block(block: ir.Value) -> None:
            first = b.mul(block, LONG(self.in_block))
            sums = self._sums(values, bits, first, smaller(b, self.all, b.add(first, LONG(self.in_block))))
            scale = self.scale(self.scales, row, block)
            for token, (total, part) in enumerate(zip(totals, sums, strict=True)):
                index = b.add(b.mul(self.scales_count, LONG(token)), block)
                own = b.fmul(scale, b.load(at(b, self.x_scales, index, FLOAT), typ=FLOAT, align=4))
                number = b.sitofp(part, vector(FLOAT, LANES))
                total.set(fma(b, number, broadcast(b, own, LANES), total.get()))

        each(b, LONG(0), self.scales_count, add_block)
        for token, total in enumerate(totals):
            self.store(row, token, total.get())

    def _sums(self, values: ir.Value, bits: ir.Value, first: ir.Value, last: ir.Value) -> list[ir.Value]:
        """int32 [LANES] for each token, whose sums are the products over those octets of a row."""
        b, none = self.b, zeros(vector(WORD, LANES))
        plain = Variable(b, none)
        parts = [(Variable(b, none), Variable(b, none)) for _ in range(self.tokens)]
        ones = ir.Constant(vector(BYTE, OCTETS), [1] * OCTETS)
        padded = b.mul(self.all, LONG(OCTETS))

        def multiply(octet: ir.Value, source: ir.Value, word: ir.Value) -> None:
            loaded = b.load(source, typ=vector(BYTE, self.kept), align=1)
            weights = self.use.placed(b, widened(b, loaded, OCTETS), word)
            plain.set(self.use.dot_octets(b, plain.get(), ones, weights))
            for token, own in enumerate(parts):
                at_token = b.add(b.mul(padded, LONG(token)), b.mul(octet, LONG(OCTETS)))
                for total, x in zip(own, (self.high, self.low), strict=True):
                    given = b.load(at(b, x, at_token, BYTE), typ=vector(BYTE, OCTETS), align=1)
                    total.set(self.use.dot_octets(b, total.get(), given, weights))

        def direct(octet: ir.Value) -> None:
            source = at(b, values, b.mul(octet, LONG(self.kept)), BYTE)
            prefetch(b, at(b, source, LONG(AHEAD_BYTES), BYTE))
            multiply(octet, source, b.load(at(b, bits, octet, LONG), typ=LONG, align=1))

        def copied(octet: ir.Value) -> None:
            done = b.mul(octet, LONG(OCTETS))
            left = smaller(b, LONG(OCTETS), b.sub(self.k, done))
            kept = b.mul(b.sdiv(left, LONG(self.kind.m)), LONG(self.kind.n))
            copy(b, at(b, values, b.mul(octet, LONG(self.kept)), BYTE), self.values_aside, kept, BYTE)
            b.store(LONG(0), self.bits_aside)
            copy(b, at(b, bits, octet, LONG), self.bits_aside, divided_up(b, left, 8), BYTE)
            multiply(octet, self.values_aside, b.load(self.bits_aside, typ=LONG))

        whole = larger(b, first, smaller(b, self.whole, last))
        each(b, first, whole, direct)
        each(b, whole, last, copied)
        eight, middle = (ir.Constant(vector(WORD, LANES), [x] * LANES) for x in (8, MIDDLE))
        shift = b.mul(plain.get(), middle)
        return [b.sub(b.add(b.shl(high.get(), eight), low.get()), shift) for high, low in parts]
