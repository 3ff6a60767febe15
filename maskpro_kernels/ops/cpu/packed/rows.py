"""Products with a few tokens, row by row: each run of weights is placed in registers once, and multiplied with all.

int8 and int4 values are multiplied as integers: 64 are placed at once, or on x86 without VBMI2 16, where ``gathered``
multiplies 2:4 int4. The activations are then quantized to 16-bit integers, with one scale for each block of columns
whose weights share a scale. Their error is 2^-16 of the largest number of the block. For outliers, which would make it
too large, the product uses floats. With VBMI2 the two bytes of an integer are multiplied separately.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from llvmlite import ir

from ..codegen import ENTRY, LONG, TYPES, WORD, add_function, add_shared, each, larger, smaller, use_whole_registers
from . import RUN, Packed
from .instructions import (
    BYTE,
    FLOAT,
    HALF,
    LINE_BYTES,
    Instructions,
    Variable,
    as_float32,
    at,
    broadcast,
    buffer,
    copy,
    divided_up,
    fma,
    horizontal_sum,
    intrinsic,
    nibbles,
    prefetch,
    scale_at,
    stored,
    vector,
    widened,
    zeros,
)
from .weight import Weight

# Distance of prefetches: the CPU's own prefetcher stops at each page
AHEAD_BYTES = 4096

# Weights to place at once
OCTETS = 2 * RUN
LANES = 16

# Columns that activations are padded to
STEP = 128

# Octets of a block without a loop
UNROLLED = 4

# Most tokens to multiply a row with at a time: each has two sums
OCTET_TOKENS = 8

# Integers from -LARGEST to LARGEST are stored with MIDDLE added, since their bytes are unsigned
LARGEST = 32767
MIDDLE = 32768

# Largest ratio of a block's largest magnitude to its mean. The error of an integer, 2^-16 of the largest, is then below
# that of rounding a product to bfloat16, even if a mask drops the column of the largest number
MOST_OVER_MEAN = 128.0

# Keeps reciprocals of scales finite
LEAST_SCALE = 1e-37


class RowProduct:
    """Builder of ``loop(start, stop, k, rows, *pointers, bias, out)``: rows start to stop of x @ weight.T + bias.

    ``add_row`` of subclasses adds the code of a row. out [tokens, rows] and bias [rows] are of ``kind.x``.
    """

    def __init__(self, kind: Packed, use: Instructions, tokens: int, biased: bool, pointers: int):
        self.kind = kind
        self.use = use
        self.tokens = tokens
        self.biased = biased
        self.module = ir.Module("maskpro_kernels")
        self.function, self.b = add_function(self.module, ENTRY, 4, pointers + 2)
        use_whole_registers(self.function)
        self.start, self.stop, self.k, self.rows, *self.pointers, self.bias, self.out = self.function.args
        self.row_values = self.b.mul(self.b.sdiv(self.k, LONG(kind.m)), LONG(kind.n))
        # scales of a row
        self.scales_count = divided_up(self.b, self.row_values, kind.group)

    def assembly(self) -> str:
        each(self.b, self.start, self.stop, self.add_row)
        self.b.ret_void()
        add_shared(self.module, self.function)
        return str(self.module)

    def scale(self, scales: ir.Value, row: ir.Value, block: ir.Value) -> ir.Value:
        """float32 scale of a block of a row."""
        return scale_at(self.b, scales, self.b.add(self.b.mul(row, self.scales_count), block), self.kind)

    def store(self, row: ir.Value, token: int, total: ir.Value) -> None:
        """Write the sum of a float32 vector plus the bias to a token's output."""
        b = self.b
        dtype = self.kind.x
        element = TYPES[dtype]
        y = horizontal_sum(self.b, total)
        if self.biased:
            bias = b.load(at(b, self.bias, row, element), typ=element, align=1)
            y = b.fadd(y, as_float32(b, bias, dtype))
        stored(b, y, at(b, self.out, b.add(b.mul(self.rows, LONG(token)), row), element), dtype)


def product(kind: Packed, use: Instructions, tokens: int, biased: bool) -> str:
    """Code of ``loop(start, stop, k, rows, values, bits, scales, x, bias, out)``, see ``RowProduct``.

    x [tokens, k] is of ``kind.x`` if ``multiplies_pairs``, else float32; scales [rows, ceil(values of a row / group)]
    are of ``kind.x``.
    """
    return RegisterProduct(kind, use, tokens, biased).assembly()


def multiplies_pairs(kind: Packed, use: Instructions) -> bool:
    """Return whether instructions for products of bfloat16 are used."""
    return use.pairs and kind.x == torch.bfloat16


class RegisterProduct(RowProduct):
    weight_class = Weight

    def __init__(self, kind: Packed, use: Instructions, tokens: int, biased: bool):
        super().__init__(kind, use, tokens, biased, pointers=4)
        values, bits, self.scales, self.x = self.pointers
        self.pairs = multiplies_pairs(kind, use)
        self.weight = self.weight_class(self.b, kind, use, "halves" if self.pairs else "floats", values, bits, self.k)
        self.lanes = use.lanes
        # enough independent sums to hide the latency of one
        self.beside = max(1, 4 // tokens)
        self.x_element = HALF if self.pairs else FLOAT
        self.x_aside = [buffer(self.b, self.x_element, RUN) for _ in range(tokens)]

    def add_row(self, row: ir.Value) -> None:
        b = self.b
        place = self.weight.row(row)
        if not self.kind.scaled:
            totals = self._sums(place, LONG(0), self.weight.runs)
        else:
            sums = [Variable(b, zeros(vector(FLOAT, self.lanes))) for _ in range(self.tokens)]
            in_block = LONG(self.kind.scaled_runs)

            def add_block(block: ir.Value) -> None:
                start = b.mul(block, in_block)
                parts = self._sums(place, start, smaller(b, self.weight.runs, b.add(start, in_block)))
                scale = broadcast(b, self.scale(self.scales, row, block), self.lanes)
                for total, part in zip(sums, parts, strict=True):
                    total.set(fma(b, part, scale, total.get()))

            each(b, LONG(0), self.scales_count, add_block)
            totals = [total.get() for total in sums]
        for token, total in enumerate(totals):
            self.store(row, token, total)

    def _sums(self, place: tuple, start: ir.Value, stop: ir.Value) -> list[ir.Value]:
        """Vectors [lanes] for each token; each adds up to the product over runs [start, stop) of a row."""
        b = self.b
        weight = self.weight
        none = zeros(vector(FLOAT, self.lanes))
        sums = [[Variable(b, none) for _ in range(self.tokens)] for _ in range(self.beside)]
        direct = weight.within(start, stop)
        several = b.sub(direct, b.srem(b.sub(direct, start), LONG(self.beside)))
        line = max(1, LINE_BYTES * self.kind.in_byte // (self.kind.kept * self.kind.values.itemsize))

        def multiply(run: ir.Value, own: list) -> None:
            self._multiply(weight.direct(place, run), [self._x_of(token, run) for token in range(self.tokens)], own)

        def beside(run: ir.Value) -> None:
            for i, own in enumerate(sums):
                here = b.add(run, LONG(i))
                if i % line == 0:
                    prefetch(b, at(b, weight.values_of(place, here), LONG(AHEAD_BYTES), BYTE))
                multiply(here, own)

        def last(run: ir.Value) -> None:
            weights = weight.copied(place, run)
            self._multiply(weights, [self._x_copied(token, run) for token in range(self.tokens)], sums[0])

        if self.beside > 1:
            each(b, start, several, beside, by=self.beside)
            each(b, several, direct, lambda run: multiply(run, sums[0]))
        else:
            each(b, start, direct, beside)
        each(b, direct, stop, last)
        totals = [x.get() for x in sums[0]]
        for own in sums[1:]:
            totals = [b.fadd(total, x.get()) for total, x in zip(totals, own, strict=True)]
        return totals

    def _x_of(self, token: int, run: ir.Value) -> ir.Value:
        b = self.b
        return at(b, self.x, b.add(b.mul(self.k, LONG(token)), b.mul(run, LONG(RUN))), self.x_element)

    def _x_copied(self, token: int, run: ir.Value) -> ir.Value:
        """``_x_of``, with zeros after the end of the row."""
        b = self.b
        aside = self.x_aside[token]
        b.store(zeros(ir.ArrayType(self.x_element, RUN)), aside)
        copy(b, self._x_of(token, run), aside, self.weight.weights_of(run), self.x_element)
        return aside

    def _multiply(self, weights: list[ir.Value], x: list[ir.Value], sums: list[Variable]) -> None:
        """Add the products of a run's weights with each token's x to its sum."""
        b = self.b
        lanes = self.weight.lanes
        for i, weight in enumerate(weights):
            for pointer, total in zip(x, sums, strict=True):
                here = at(b, pointer, LONG(i * lanes), self.x_element)
                own = b.load(here, typ=vector(self.x_element, lanes), align=1)
                if self.pairs:
                    total.set(self.use.dot_pairs(b, total.get(), weight, own))
                else:
                    total.set(fma(b, weight, own, total.get()))


# Products of integers


def gathers(kind: Packed, use: Instructions) -> bool:
    """Return whether activations move to the kept values, see ``gathered``."""
    return use.words and not use.octets and (kind.n, kind.m, kind.values) == (2, 4, torch.uint8)


def gathered_column(b: ir.IRBuilder, column: ir.Value) -> ir.Value:
    """Place of a column among the bytes of ``gathered``: a vector has 16 columns of each half of a step."""
    chunk = b.and_(b.lshr(column, LONG(4)), LONG(7))
    place = b.or_(b.shl(b.and_(chunk, LONG(3)), LONG(1)), b.lshr(chunk, LONG(2)))
    return b.or_(b.and_(column, LONG(-STEP)), b.shl(place, LONG(4)))


def as_integers(kind: Packed, use: Instructions) -> str:
    """Code of ``loop(start, stop, k, x, high, low, scales, refused)``: quantize tokens start to stop of x [tokens, k].

    x is of ``kind.x``, high and low are bytes [tokens, k rounded up to STEP], scales float32 [tokens, blocks]. Unless
    ``use.octets`` or ``gathers``, high are 16-bit integers, and low is not used. An int64 at ``refused`` is set to 1 if
    integers are too coarse for a block: its largest number is too far above the others, or NaN.
    """
    module = ir.Module("maskpro_kernels")
    function, b = add_function(module, ENTRY, 3, 5)
    use_whole_registers(function)
    start, stop, k, x, high, low, scales, refused = function.args
    columns = LONG(kind.scaled_runs * RUN)
    padded = b.mul(divided_up(b, k, STEP), LONG(STEP))
    gathered = gathers(kind, use)
    blocks = divided_up(b, k, kind.scaled_runs * RUN)
    element = TYPES[kind.x]
    aside = buffer(b, TYPES[kind.x], LANES)

    def lanes(row: ir.Value, first: ir.Value, last: ir.Value, take: Callable[[ir.Value, ir.Value], None]) -> None:
        """Call ``take(column, values)`` for columns [first, last), LANES float32 at a time; zeros beyond the last."""
        whole = b.add(first, b.mul(b.sdiv(b.sub(last, first), LONG(LANES)), LONG(LANES)))

        def taken(column: ir.Value, pointer: ir.Value) -> None:
            take(column, as_float32(b, b.load(pointer, typ=vector(element, LANES), align=1), kind.x))

        def rest(column: ir.Value) -> None:
            b.store(zeros(ir.ArrayType(element, LANES)), aside)
            copy(b, at(b, row, column, element), aside, b.sub(last, column), element)
            taken(column, aside)

        each(b, first, whole, lambda column: taken(column, at(b, row, column, element)), by=LANES)
        each(b, whole, last, rest, by=LANES)

    def token_integers(token: ir.Value) -> None:
        row = at(b, x, b.mul(token, k), element)
        part = BYTE if use.octets or gathered else HALF
        targets = [at(b, target, b.mul(token, padded), part) for target in (high, low)]

        def block_integers(block: ir.Value) -> None:
            first = b.mul(block, columns)
            last = smaller(b, k, b.add(first, columns))
            # a block of one large number and zeros has the ratio of its columns
            most = min(MOST_OVER_MEAN, kind.scaled_runs * RUN / 2)
            scale, fits = _scale(b, lanes, row, first, last, most)
            with b.if_then(b.not_(fits), likely=False):
                b.store(LONG(1), refused)
            b.store(scale, at(b, scales, b.add(b.mul(token, blocks), block), FLOAT), align=4)
            factor = broadcast(b, b.fdiv(ir.Constant(FLOAT, 1.0), scale), LANES)
            words = vector(WORD, LANES)

            def write(column: ir.Value, values: ir.Value) -> None:
                nearest = intrinsic(b, f"llvm.rint.v{LANES}f32", values.type, b.fmul(values, factor))
                # saturates, since NaN has no integer
                number = intrinsic(b, f"llvm.fptosi.sat.v{LANES}i32.v{LANES}f32", words, nearest)
                given = [number]
                if part is BYTE:
                    number = b.add(number, ir.Constant(words, [MIDDLE] * LANES))
                    given = [b.lshr(number, ir.Constant(words, [8] * LANES)), number]
                column = gathered_column(b, column) if gathered else column
                for target, number in zip(targets, given, strict=False):
                    b.store(b.trunc(number, vector(part, LANES)), at(b, target, column, part), align=1)

            lanes(row, first, last, write)

        each(b, LONG(0), blocks, block_integers)

    each(b, start, stop, token_integers)
    b.ret_void()
    add_shared(module, function)
    return str(module)


def _scale(b: ir.IRBuilder, lanes: Callable, row: ir.Value, first: ir.Value, last: ir.Value, over: float) -> tuple:
    """(scale of the integers of columns [first, last), whether integers are accurate enough for them)."""
    none = zeros(vector(FLOAT, LANES))
    most = Variable(b, none)
    total = Variable(b, none)

    def widen(_: ir.Value, values: ir.Value) -> None:
        magnitude = intrinsic(b, f"llvm.fabs.v{LANES}f32", values.type, values)
        most.set(intrinsic(b, f"llvm.maximum.v{LANES}f32", values.type, most.get(), magnitude))
        total.set(b.fadd(total.get(), magnitude))

    lanes(row, first, last, widen)
    largest = intrinsic(b, f"llvm.vector.reduce.fmaximum.v{LANES}f32", FLOAT, most.get())
    mean = b.fdiv(horizontal_sum(b, total.get()), b.sitofp(b.sub(last, first), FLOAT))
    # false for NaN
    near = b.fcmp_ordered("<=", largest, b.fmul(mean, ir.Constant(FLOAT, over)))
    finite = b.fcmp_ordered("<", largest, ir.Constant(FLOAT, float("inf")))
    scale = b.fdiv(largest, ir.Constant(FLOAT, float(LARGEST)))
    least = torch.tensor(LEAST_SCALE, dtype=torch.float32).item()
    return intrinsic(b, "llvm.maximum.f32", FLOAT, scale, ir.Constant(FLOAT, least)), b.and_(near, finite)


def octet_product(kind: Packed, use: Instructions, tokens: int, biased: bool) -> str:
    """Code of ``loop(start, stop, k, rows, values, bits, scales, high, low, x_scales, bias, out)``."""
    return _OctetProduct(kind, use, tokens, biased).assembly()


class _OctetProduct(RowProduct):
    def __init__(self, kind: Packed, use: Instructions, tokens: int, biased: bool):
        super().__init__(kind, use, tokens, biased, pointers=6)
        self.values, self.bits, self.scales, self.high, self.low, self.x_scales = self.pointers
        b = self.b
        self.kept = 2 * kind.kept
        self.octet_bytes = self.kept // kind.in_byte
        self.in_block = kind.scaled_runs // 2
        self.row_bytes = divided_up(b, self.k, 8)
        self.whole = b.sdiv(self.k, LONG(OCTETS))
        self.all = divided_up(b, self.k, OCTETS)
        self.sum_type = vector(WORD, LANES if use.octets else LANES // 2)
        self.values_aside = buffer(b, BYTE, OCTETS)
        self.bits_aside = buffer(b, BYTE, 8)
        b.store(zeros(ir.ArrayType(BYTE, OCTETS)), self.values_aside)

    def add_row(self, row: ir.Value) -> None:
        b = self.b
        floats = vector(FLOAT, self.sum_type.count)
        values = at(b, self.values, b.mul(row, b.sdiv(self.row_values, LONG(self.kind.in_byte))), BYTE)
        bits = at(b, self.bits, b.mul(row, self.row_bytes), BYTE)
        totals = [Variable(b, zeros(floats)) for _ in range(self.tokens)]

        def add_block(block: ir.Value, whole: bool) -> None:
            first = b.mul(block, LONG(self.in_block))
            last = b.add(first, LONG(self.in_block))
            sums = self._sums(values, bits, first, last if whole else smaller(b, self.all, last), whole)
            scale = self.scale(self.scales, row, block)
            for token, (total, part) in enumerate(zip(totals, sums, strict=True)):
                index = b.add(b.mul(self.scales_count, LONG(token)), block)
                own = b.fmul(scale, b.load(at(b, self.x_scales, index, FLOAT), typ=FLOAT, align=4))
                total.set(fma(b, b.sitofp(part, floats), broadcast(b, own, floats.count), total.get()))

        blocks = b.sdiv(self.whole, LONG(self.in_block))
        each(b, LONG(0), blocks, lambda block: add_block(block, True))
        each(b, blocks, self.scales_count, lambda block: add_block(block, False))
        for token, total in enumerate(totals):
            self.store(row, token, total.get())

    def _sums(self, values: ir.Value, bits: ir.Value, first: ir.Value, last: ir.Value, whole: bool) -> list[ir.Value]:
        """int32 sums for each token; each adds up to the product over octets [first, last) of a row."""
        b = self.b
        none = zeros(self.sum_type)
        octets = self.use.octets
        plain = Variable(b, none)
        # of two bytes, or of 16 bits
        parts = [[Variable(b, none) for _ in range(2 if octets else 1)] for _ in range(self.tokens)]
        ones = ir.Constant(vector(BYTE, OCTETS), [1] * OCTETS)
        padded = b.mul(divided_up(b, self.k, STEP), LONG(STEP))

        def loaded(source: ir.Value) -> ir.Value:
            if self.kind.in_byte == 2:
                return nibbles(b, source, self.kept)
            return b.load(source, typ=vector(BYTE, self.kept), align=1)

        def multiply(octet: ir.Value, source: ir.Value, bits: ir.Value) -> None:
            word = b.load(bits, typ=LONG, align=1)
            weights = self.use.placed(b, widened(b, loaded(source), OCTETS), word)
            plain.set(self.use.dot_octets(b, plain.get(), ones, weights))
            for token, own in enumerate(parts):
                at_token = b.add(b.mul(padded, LONG(token)), b.mul(octet, LONG(OCTETS)))
                for total, x in zip(own, (self.high, self.low), strict=True):
                    given = b.load(at(b, x, at_token, BYTE), typ=vector(BYTE, OCTETS), align=1)
                    total.set(self.use.dot_octets(b, total.get(), given, weights))

        def multiply_words(octet: ir.Value, source: ir.Value, bits: ir.Value) -> None:
            given = loaded(source)
            for part in range(OCTETS // LANES):
                start = part * self.kept * LANES // OCTETS
                lanes = [min(start // LANES * LANES + i, self.kept - 1) for i in range(LANES)]
                own = b.shuffle_vector(given, given, ir.Constant(vector(WORD, LANES), lanes))
                own_bits = at(b, bits, LONG(part), HALF)
                placed = self.use.placed_bytes(b, own, own_bits, start % LANES, self.kind)
                weights = b.sext(placed, vector(HALF, LANES))
                for token, (total,) in enumerate(parts):
                    column = b.add(b.mul(octet, LONG(OCTETS)), LONG(LANES * part))
                    place = at(b, self.high, b.add(b.mul(padded, LONG(token)), column), HALF)
                    x = b.load(place, typ=vector(HALF, LANES), align=1)
                    total.set(self.use.dot_words(b, total.get(), weights, x))

        multiplied = multiply if octets else multiply_words

        def direct(octet: ir.Value, prefetched: bool = True) -> None:
            source = at(b, values, b.mul(octet, LONG(self.octet_bytes)), BYTE)
            if prefetched:
                prefetch(b, at(b, source, LONG(AHEAD_BYTES), BYTE))
            multiplied(octet, source, at(b, bits, octet, LONG))

        def copied(octet: ir.Value) -> None:
            done = b.mul(octet, LONG(OCTETS))
            left = smaller(b, LONG(OCTETS), b.sub(self.k, done))
            kept = b.mul(b.sdiv(left, LONG(self.kind.m)), LONG(self.kind.n))
            given = at(b, values, b.mul(octet, LONG(self.octet_bytes)), BYTE)
            copy(b, given, self.values_aside, b.sdiv(kept, LONG(self.kind.in_byte)), BYTE)
            b.store(LONG(0), self.bits_aside)
            copy(b, at(b, bits, octet, LONG), self.bits_aside, divided_up(b, left, 8), BYTE)
            multiplied(octet, self.values_aside, self.bits_aside)

        if whole:
            # without a loop for the few octets of most blocks
            unrolled = min(self.in_block, UNROLLED)
            line = LINE_BYTES // self.octet_bytes

            def several(octet: ir.Value) -> None:
                for i in range(unrolled):
                    direct(b.add(octet, LONG(i)), i % line == 0)

            if unrolled == self.in_block:
                several(first)
            else:
                each(b, first, last, several, by=unrolled)
        else:
            end = larger(b, first, smaller(b, self.whole, last))
            each(b, first, end, direct)
            each(b, end, last, copied)
        if not octets:
            return [total.get() for (total,) in parts]
        eight, middle = (ir.Constant(self.sum_type, [x] * LANES) for x in (8, MIDDLE))
        shift = b.mul(plain.get(), middle)
        return [b.sub(b.add(b.shl(high.get(), eight), low.get()), shift) for high, low in parts]
