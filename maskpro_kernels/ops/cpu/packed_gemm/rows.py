"""Products with a few tokens, row by row: each run of weights is expanded into registers once, and multiplied with all.

int8 and int4 values are multiplied as floats, times their scale, or as integers, see ``products.method``. Of integers
64 are expanded at once, or on x86 without VBMI2 16, where ``gathered`` multiplies 2:4 int4. The activations are then
quantized to 16-bit integers, with one scale for each block of columns whose weights share a scale. Their error is 2^-16
of the largest number of the block. For outliers, which would make it too large, the product uses floats. With VBMI2 the
two bytes of an integer are multiplied separately.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from llvmlite import ir

from ..codegen import (
    ENTRY,
    I32,
    I64,
    TYPES,
    add_function,
    add_shared,
    for_range,
    maximum,
    minimum,
    prefer_512_bit_vectors,
)
from . import RUN, Packed
from .instructions import (
    FLOAT,
    I8,
    I16,
    LINE_BYTES,
    Instructions,
    Variable,
    as_float32,
    broadcast,
    buffer,
    ceil_div,
    copy,
    fma,
    gep,
    horizontal_sum,
    intrinsic,
    load_scale,
    nibbles,
    prefetch,
    store_rounded,
    vector,
    widened,
    zeros,
)
from .weight import Weight

# Distance of prefetches: the CPU's own prefetcher stops at each page
AHEAD_BYTES = 4096

# Weights of a span, and lanes of 32 bits in a 512-bit register
SPAN = 2 * RUN
LANES = 16

# Columns that quantized activations are padded to
STEP = 128

# Most spans of a block that are multiplied without a loop
UNROLLED = 4

# Most rows that are multiplied with each load of activations
ROWS_AT_ONCE = 2

# Most tokens to multiply a row with as integers at a time: each has two sums
INTEGER_TOKENS = 8

# Integers from -LARGEST to LARGEST are stored with MIDDLE added, since their bytes are unsigned
LARGEST = 32767
MIDDLE = 32768

# Largest ratio of a block's largest magnitude to its mean. The error of an integer, 2^-16 of the largest, is then below
# that of rounding a product to bfloat16, even if a mask drops the column of the largest number
MAX_OVER_MEAN = 128.0

# Keeps reciprocals of scales finite
LEAST_SCALE = 1e-37


class RowProduct:
    """Builder of ``loop(start, stop, k, rows, *pointers, bias, out)``: rows start to stop of x @ weight.T + bias.

    ``add_row`` of subclasses adds the code of a row, or their ``add_all_rows`` that of all. out [tokens, rows] and bias
    [rows] are of ``kind.x``.
    """

    def __init__(self, kind: Packed, isa: Instructions, tokens: int, biased: bool, pointers: int):
        self.kind = kind
        self.isa = isa
        self.tokens = tokens
        self.biased = biased
        self.module = ir.Module("maskpro_kernels")
        self.function, self.b = add_function(self.module, ENTRY, 4, pointers + 2)
        prefer_512_bit_vectors(self.function)
        self.start, self.stop, self.k, self.rows, *self.pointers, self.bias, self.out = self.function.args
        self.row_values = self.b.mul(self.b.sdiv(self.k, I64(kind.m)), I64(kind.n))
        # scales of a row
        self.scales_count = ceil_div(self.b, self.row_values, kind.group)

    def assembly(self) -> str:
        self.add_all_rows()
        self.b.ret_void()
        add_shared(self.module, self.function)
        return str(self.module)

    def add_all_rows(self) -> None:
        for_range(self.b, self.start, self.stop, self.add_row)

    def scale(self, scales: ir.Value, row: ir.Value, block: ir.Value) -> ir.Value:
        """float32 scale of a block of a row."""
        return load_scale(self.b, scales, self.b.add(self.b.mul(row, self.scales_count), block), self.kind)

    def store(self, row: ir.Value, token: int, total: ir.Value) -> None:
        """Write the sum of a float32 vector plus the bias to a token's output."""
        b = self.b
        dtype = self.kind.x
        element = TYPES[dtype]
        y = horizontal_sum(self.b, total)
        if self.biased:
            bias = b.load(gep(b, self.bias, row, element), typ=element, align=1)
            y = b.fadd(y, as_float32(b, bias, dtype))
        store_rounded(b, y, gep(b, self.out, b.add(b.mul(self.rows, I64(token)), row), element), dtype)


def float_product(kind: Packed, isa: Instructions, tokens: int, biased: bool) -> str:
    """Code of ``loop(start, stop, k, rows, values, bits, scales, x, bias, out)``, see ``RowProduct``.

    x [tokens, k] is of ``kind.x`` if ``multiplies_bfloat16``, else float32; scales [rows, blocks] are of ``kind.x``.
    """
    return FloatProduct(kind, isa, tokens, biased).assembly()


def multiplies_bfloat16(kind: Packed, isa: Instructions) -> bool:
    """Return whether instructions for products of bfloat16 are used."""
    return isa.bf16 and kind.x == torch.bfloat16


class FloatProduct(RowProduct):
    weight_class = Weight

    def __init__(self, kind: Packed, isa: Instructions, tokens: int, biased: bool):
        super().__init__(kind, isa, tokens, biased, pointers=4)
        values, bits, scales, self.x = self.pointers
        self.multiplies_bfloat16 = multiplies_bfloat16(kind, isa)
        form = "i16" if self.multiplies_bfloat16 else "float"
        self.weight = self.weight_class(self.b, kind, isa, form, values, bits, self.k, scales)
        self.lanes = isa.lanes
        self.x_element = I16 if self.multiplies_bfloat16 else FLOAT
        self.x_buffers = [buffer(self.b, self.x_element, RUN) for _ in range(tokens)]

    def add_all_rows(self) -> None:
        b = self.b
        # fewer tokens fit into the nearest cache, and the sums of more do not fit into registers
        several = self.multiplies_bfloat16 and self.isa.tokens // 4 < self.tokens <= self.isa.tokens // ROWS_AT_ONCE
        count = ROWS_AT_ONCE if several else 1
        many_end = b.sub(self.stop, b.srem(b.sub(self.stop, self.start), I64(count)))
        for_range(b, self.start, many_end, lambda row: self._add_rows(row, count), step=count)
        if count > 1:
            for_range(b, many_end, self.stop, lambda row: self._add_rows(row, 1))

    def _add_rows(self, first_row: ir.Value, count: int) -> None:
        """Add the code of ``count`` adjacent rows."""
        b = self.b
        weight = self.weight
        rows = [b.add(first_row, I64(i)) for i in range(count)]
        pointers = [weight.row_pointers(row) for row in rows]
        # enough independent sums to hide the latency of one
        unrolled_runs = max(1, 4 // (self.tokens * count))
        zero = zeros(vector(FLOAT, self.lanes))
        # of each run, row and token
        sums = [[[Variable(b, zero) for _ in range(self.tokens)] for _ in rows] for _ in range(unrolled_runs)]
        unrolled_end = b.sub(weight.direct_runs, b.srem(weight.direct_runs, I64(unrolled_runs)))
        line_runs = max(1, LINE_BYTES // (self.kind.elements_per_run * self.kind.values.itemsize))

        def multiply(run: ir.Value, run_sums: list[list[Variable]], load: Callable, x_pointer: Callable) -> None:
            weights = [
                load(row_pointers, run, weight.run_scale(row, run))
                for row, row_pointers in zip(rows, pointers, strict=True)
            ]
            self._multiply(weights, [x_pointer(token, run) for token in range(self.tokens)], run_sums)

        def multiply_direct(run: ir.Value, run_sums: list[list[Variable]]) -> None:
            multiply(run, run_sums, weight.load_direct, self._x_pointer)

        def multiply_unrolled(first: ir.Value) -> None:
            for i, run_sums in enumerate(sums):
                run = b.add(first, I64(i))
                if i % line_runs == 0:
                    for row_pointers in pointers:
                        prefetch(b, gep(b, weight.run_values(row_pointers, run), I64(AHEAD_BYTES), I8))
                multiply_direct(run, run_sums)

        def multiply_copied(run: ir.Value) -> None:
            multiply(run, sums[0], weight.load_copied, self._copied_x)

        for_range(b, I64(0), unrolled_end, multiply_unrolled, step=unrolled_runs)
        if unrolled_runs > 1:
            for_range(b, unrolled_end, weight.direct_runs, lambda run: multiply_direct(run, sums[0]))
        for_range(b, weight.direct_runs, weight.runs, multiply_copied)
        for i, row in enumerate(rows):
            for token in range(self.tokens):
                total = sums[0][i][token].get()
                for run_sums in sums[1:]:
                    total = b.fadd(total, run_sums[i][token].get())
                self.store(row, token, total)

    def _x_pointer(self, token: int, run: ir.Value) -> ir.Value:
        b = self.b
        return gep(b, self.x, b.add(b.mul(self.k, I64(token)), b.mul(run, I64(RUN))), self.x_element)

    def _copied_x(self, token: int, run: ir.Value) -> ir.Value:
        """Pointer to a copy of a token's x, with zeros after the end of the row."""
        b = self.b
        x_buffer = self.x_buffers[token]
        b.store(zeros(ir.ArrayType(self.x_element, RUN)), x_buffer)
        copy(b, self._x_pointer(token, run), x_buffer, self.weight.run_length(run), self.x_element)
        return x_buffer

    def _multiply(self, weights: list[list[ir.Value]], x_pointers: list[ir.Value], sums: list[list[Variable]]) -> None:
        """Add the products of a run's weights of each row with each token's x to their sum."""
        b = self.b
        lanes = self.weight.lanes
        for i in range(len(weights[0])):
            for token, pointer in enumerate(x_pointers):
                x = b.load(gep(b, pointer, I64(i * lanes), self.x_element), typ=vector(self.x_element, lanes), align=1)
                for row_weights, row_sums in zip(weights, sums, strict=True):
                    total = row_sums[token]
                    if self.multiplies_bfloat16:
                        total.set(self.isa.dot_bfloat16(b, total.get(), row_weights[i], x))
                    else:
                        total.set(fma(b, row_weights[i], x, total.get()))


# Products of integers


def gathers(kind: Packed, isa: Instructions) -> bool:
    """Return whether activations move to the kept values, see ``gathered``."""
    return isa.pmaddwd and not isa.vnni and (kind.n, kind.m, kind.values) == (2, 4, torch.uint8)


def gathered_column(b: ir.IRBuilder, column: ir.Value) -> ir.Value:
    """Index of a column among the bytes of ``gathered``: a vector has 16 columns of each half of a step."""
    # the number of 16 bytes among the eight of a step, before and after
    source = b.and_(b.lshr(column, I64(4)), I64(7))
    target = b.or_(b.shl(b.and_(source, I64(3)), I64(1)), b.lshr(source, I64(2)))
    return b.or_(b.and_(column, I64(-STEP)), b.shl(target, I64(4)))


def quantizer(kind: Packed, isa: Instructions) -> str:
    """Code of ``loop(start, stop, k, x, high, low, scales, refused)``: quantize tokens start to stop of x [tokens, k].

    x is of ``kind.x``, high and low are bytes [tokens, k rounded up to STEP], scales float32 [tokens, blocks]. Unless
    ``isa.vnni`` or ``gathers``, high are 16-bit integers, and low is not used. An int64 at ``refused`` is set to 1 if
    integers are too coarse for a block: its largest number is too far above the others, or NaN.
    """
    module = ir.Module("maskpro_kernels")
    function, b = add_function(module, ENTRY, 3, 5)
    prefer_512_bit_vectors(function)
    start, stop, k, x, high, low, scales, refused = function.args
    block_columns = kind.runs_per_scale * RUN
    padded_k = b.mul(ceil_div(b, k, STEP), I64(STEP))
    gathered = gathers(kind, isa)
    blocks = ceil_div(b, k, block_columns)
    element = TYPES[kind.x]
    x_buffer = buffer(b, TYPES[kind.x], LANES)

    def for_columns(row: ir.Value, first: ir.Value, last: ir.Value, body: Callable[[ir.Value, ir.Value], None]) -> None:
        """Call ``body(column, values)`` for columns [first, last), LANES float32 at a time; zeros beyond the last."""
        whole_end = b.add(first, b.mul(b.sdiv(b.sub(last, first), I64(LANES)), I64(LANES)))

        def load(column: ir.Value, pointer: ir.Value) -> None:
            body(column, as_float32(b, b.load(pointer, typ=vector(element, LANES), align=1), kind.x))

        def load_copied(column: ir.Value) -> None:
            b.store(zeros(ir.ArrayType(element, LANES)), x_buffer)
            copy(b, gep(b, row, column, element), x_buffer, b.sub(last, column), element)
            load(column, x_buffer)

        for_range(b, first, whole_end, lambda column: load(column, gep(b, row, column, element)), step=LANES)
        for_range(b, whole_end, last, load_copied, step=LANES)

    def quantize_token(token: ir.Value) -> None:
        row = gep(b, x, b.mul(token, k), element)
        out_type = I8 if isa.vnni or gathered else I16
        targets = [gep(b, pointer, b.mul(token, padded_k), out_type) for pointer in (high, low)]

        def quantize_block(block: ir.Value) -> None:
            first = b.mul(block, I64(block_columns))
            last = minimum(b, k, b.add(first, I64(block_columns)))
            # a block of one large number and zeros has the ratio of its columns
            max_ratio = min(MAX_OVER_MEAN, block_columns / 2)
            scale, accurate = _scale(b, for_columns, row, first, last, max_ratio)
            with b.if_then(b.not_(accurate), likely=False):
                b.store(I64(1), refused)
            b.store(scale, gep(b, scales, b.add(b.mul(token, blocks), block), FLOAT), align=4)
            reciprocal = broadcast(b, b.fdiv(ir.Constant(FLOAT, 1.0), scale), LANES)
            integer_type = vector(I32, LANES)

            def write(column: ir.Value, values: ir.Value) -> None:
                nearest = intrinsic(b, f"llvm.rint.v{LANES}f32", values.type, b.fmul(values, reciprocal))
                # saturates, since NaN has no integer
                integers = intrinsic(b, f"llvm.fptosi.sat.v{LANES}i32.v{LANES}f32", integer_type, nearest)
                results = [integers]
                if out_type is I8:
                    integers = b.add(integers, ir.Constant(integer_type, [MIDDLE] * LANES))
                    results = [b.lshr(integers, ir.Constant(integer_type, [8] * LANES)), integers]
                column = gathered_column(b, column) if gathered else column
                for target, result in zip(targets, results, strict=False):
                    b.store(b.trunc(result, vector(out_type, LANES)), gep(b, target, column, out_type), align=1)

            for_columns(row, first, last, write)

        for_range(b, I64(0), blocks, quantize_block)

    for_range(b, start, stop, quantize_token)
    b.ret_void()
    add_shared(module, function)
    return str(module)


def _scale(
    b: ir.IRBuilder, for_columns: Callable, row: ir.Value, first: ir.Value, last: ir.Value, max_ratio: float
) -> tuple[ir.Value, ir.Value]:
    """(scale of the integers of columns [first, last), whether integers are accurate enough for them)."""
    zero = zeros(vector(FLOAT, LANES))
    maxima = Variable(b, zero)
    total = Variable(b, zero)

    def add_columns(_: ir.Value, values: ir.Value) -> None:
        magnitude = intrinsic(b, f"llvm.fabs.v{LANES}f32", values.type, values)
        maxima.set(intrinsic(b, f"llvm.maximum.v{LANES}f32", values.type, maxima.get(), magnitude))
        total.set(b.fadd(total.get(), magnitude))

    for_columns(row, first, last, add_columns)
    largest = intrinsic(b, f"llvm.vector.reduce.fmaximum.v{LANES}f32", FLOAT, maxima.get())
    mean = b.fdiv(horizontal_sum(b, total.get()), b.sitofp(b.sub(last, first), FLOAT))
    # false for NaN
    near = b.fcmp_ordered("<=", largest, b.fmul(mean, ir.Constant(FLOAT, max_ratio)))
    finite = b.fcmp_ordered("<", largest, ir.Constant(FLOAT, float("inf")))
    scale = b.fdiv(largest, ir.Constant(FLOAT, float(LARGEST)))
    least = torch.tensor(LEAST_SCALE, dtype=torch.float32).item()
    return intrinsic(b, "llvm.maximum.f32", FLOAT, scale, ir.Constant(FLOAT, least)), b.and_(near, finite)


def integer_product(kind: Packed, isa: Instructions, tokens: int, biased: bool) -> str:
    """Code of ``loop(start, stop, k, rows, values, bits, scales, high, low, x_scales, bias, out)``.

    high, low and x_scales are those of ``quantizer``.
    """
    return IntegerProduct(kind, isa, tokens, biased).assembly()


class IntegerProduct(RowProduct):
    def __init__(self, kind: Packed, isa: Instructions, tokens: int, biased: bool):
        super().__init__(kind, isa, tokens, biased, pointers=6)
        self.values, self.bits, self.scales, self.high, self.low, self.x_scales = self.pointers
        b = self.b
        self.span_values = 2 * kind.values_per_run
        self.span_bytes = 2 * kind.elements_per_run
        self.block_spans = kind.runs_per_scale // 2
        self.row_bytes = ceil_div(b, self.k, 8)
        self.whole_spans = b.sdiv(self.k, I64(SPAN))
        self.spans = ceil_div(b, self.k, SPAN)
        self.sum_type = vector(I32, LANES if isa.vnni else LANES // 2)
        self.values_buffer = buffer(b, I8, SPAN)
        self.bits_buffer = buffer(b, I8, 8)
        b.store(zeros(ir.ArrayType(I8, SPAN)), self.values_buffer)

    def add_row(self, row: ir.Value) -> None:
        b = self.b
        floats = vector(FLOAT, self.sum_type.count)
        values = gep(b, self.values, b.mul(row, b.sdiv(self.row_values, I64(self.kind.values_per_element))), I8)
        bits = gep(b, self.bits, b.mul(row, self.row_bytes), I8)
        totals = [Variable(b, zeros(floats)) for _ in range(self.tokens)]

        def add_block(block: ir.Value, whole: bool) -> None:
            first = b.mul(block, I64(self.block_spans))
            last = b.add(first, I64(self.block_spans))
            sums = self._sums(values, bits, first, last if whole else minimum(b, self.spans, last), whole)
            weight_scale = self.scale(self.scales, row, block)
            for token, (total, block_sum) in enumerate(zip(totals, sums, strict=True)):
                index = b.add(b.mul(self.scales_count, I64(token)), block)
                scale = b.fmul(weight_scale, b.load(gep(b, self.x_scales, index, FLOAT), typ=FLOAT, align=4))
                total.set(fma(b, b.sitofp(block_sum, floats), broadcast(b, scale, floats.count), total.get()))

        whole_blocks = b.sdiv(self.whole_spans, I64(self.block_spans))
        for_range(b, I64(0), whole_blocks, lambda block: add_block(block, True))
        for_range(b, whole_blocks, self.scales_count, lambda block: add_block(block, False))
        for token, total in enumerate(totals):
            self.store(row, token, total.get())

    def _sums(self, values: ir.Value, bits: ir.Value, first: ir.Value, last: ir.Value, whole: bool) -> list[ir.Value]:
        """int32 sums for each token; each adds up to the product over spans [first, last) of a row."""
        b = self.b
        zero = zeros(self.sum_type)
        vnni = self.isa.vnni
        weight_sum = Variable(b, zero)
        # of the two bytes of an activation, or of its 16 bits
        token_sums = [[Variable(b, zero) for _ in range(2 if vnni else 1)] for _ in range(self.tokens)]
        ones = ir.Constant(vector(I8, SPAN), [1] * SPAN)
        padded_k = b.mul(ceil_div(b, self.k, STEP), I64(STEP))

        def load_values(source: ir.Value) -> ir.Value:
            if self.kind.values_per_element == 2:
                return nibbles(b, source, self.span_values)
            return b.load(source, typ=vector(I8, self.span_values), align=1)

        def multiply_i8(span: ir.Value, source: ir.Value, span_bits: ir.Value) -> None:
            weights = widened(b, load_values(source), SPAN)
            if not self.kind.whole:
                weights = self.isa.expand(b, weights, b.load(span_bits, typ=I64, align=1))
            weight_sum.set(self.isa.dot_i8(b, weight_sum.get(), ones, weights))
            for token, byte_sums in enumerate(token_sums):
                index = b.add(b.mul(padded_k, I64(token)), b.mul(span, I64(SPAN)))
                for byte_sum, pointer in zip(byte_sums, (self.high, self.low), strict=True):
                    x = b.load(gep(b, pointer, index, I8), typ=vector(I8, SPAN), align=1)
                    byte_sum.set(self.isa.dot_i8(b, byte_sum.get(), x, weights))

        def multiply_i16(span: ir.Value, source: ir.Value, span_bits: ir.Value) -> None:
            loaded = load_values(source)
            for i in range(SPAN // LANES):
                start = i * self.span_values * LANES // SPAN
                lanes = [min(start // LANES * LANES + lane, self.span_values - 1) for lane in range(LANES)]
                expanded = b.shuffle_vector(loaded, loaded, ir.Constant(vector(I32, LANES), lanes))
                if not self.kind.whole:
                    lane_bits = gep(b, span_bits, I64(i), I16)
                    expanded = self.isa.expand_bytes(b, expanded, lane_bits, start % LANES, self.kind)
                weights = b.sext(expanded, vector(I16, LANES))
                for token, (total,) in enumerate(token_sums):
                    column = b.add(b.mul(span, I64(SPAN)), I64(LANES * i))
                    pointer = gep(b, self.high, b.add(b.mul(padded_k, I64(token)), column), I16)
                    x = b.load(pointer, typ=vector(I16, LANES), align=1)
                    total.set(self.isa.dot_i16(b, total.get(), weights, x))

        multiply = multiply_i8 if vnni else multiply_i16

        def multiply_direct(span: ir.Value, prefetched: bool = True) -> None:
            source = gep(b, values, b.mul(span, I64(self.span_bytes)), I8)
            if prefetched:
                prefetch(b, gep(b, source, I64(AHEAD_BYTES), I8))
            multiply(span, source, gep(b, bits, span, I64))

        def multiply_copied(span: ir.Value) -> None:
            first_column = b.mul(span, I64(SPAN))
            columns = minimum(b, I64(SPAN), b.sub(self.k, first_column))
            kept = b.mul(b.sdiv(columns, I64(self.kind.m)), I64(self.kind.n))
            source = gep(b, values, b.mul(span, I64(self.span_bytes)), I8)
            copy(b, source, self.values_buffer, b.sdiv(kept, I64(self.kind.values_per_element)), I8)
            if not self.kind.whole:
                b.store(I64(0), self.bits_buffer)
                copy(b, gep(b, bits, span, I64), self.bits_buffer, ceil_div(b, columns, 8), I8)
            multiply(span, self.values_buffer, self.bits_buffer)

        if whole:
            # without a loop for the few spans of most blocks
            unrolled = min(self.block_spans, UNROLLED)
            line_spans = LINE_BYTES // self.span_bytes

            def multiply_unrolled(span: ir.Value) -> None:
                for i in range(unrolled):
                    multiply_direct(b.add(span, I64(i)), i % line_spans == 0)

            if unrolled == self.block_spans:
                multiply_unrolled(first)
            else:
                for_range(b, first, last, multiply_unrolled, step=unrolled)
        else:
            direct_end = maximum(b, first, minimum(b, self.whole_spans, last))
            for_range(b, first, direct_end, multiply_direct)
            for_range(b, direct_end, last, multiply_copied)
        if not vnni:
            return [total.get() for (total,) in token_sums]
        eight = ir.Constant(self.sum_type, [8] * LANES)
        # MIDDLE was added to each integer
        added = b.mul(weight_sum.get(), ir.Constant(self.sum_type, [MIDDLE] * LANES))
        return [b.sub(b.add(b.shl(high.get(), eight), low.get()), added) for high, low in token_sums]
