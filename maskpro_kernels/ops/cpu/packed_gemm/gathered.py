"""Products of 2:4 int4 weights on x86 without VBMI2: activations move to the kept values, not values to columns.

Two rows are multiplied at once, 128 columns a step. Of each 16 activations a row keeps 8, so one PSHUFB serves both
rows. Its order is computed from the bitmask by PSHUFB too: of each four bits, the columns of the first and of the
second kept weight. The two bytes of an activation's integer are multiplied separately, as with VNNI.
"""

from __future__ import annotations

from llvmlite import ir

from ..codegen import I32, I64, TYPES, for_range, minimum
from . import Packed
from .instructions import (
    FLOAT,
    I8,
    I16,
    Instructions,
    Variable,
    as_float32,
    buffer,
    ceil_div,
    copy,
    fma,
    gep,
    intrinsic,
    prefetch,
    vector,
    zeros,
)
from .rows import AHEAD_BYTES, MIDDLE, STEP, RowProduct

I8X32 = vector(I8, 32)
I16X16 = vector(I16, 16)

# Columns of the first and of the second set bit of a 2:4 code; code 0, after the last column, has zeros for weights
KEPT_COLUMNS = [[column for column in range(4) if code >> column & 1] + [0, 0] for code in range(16)]
FIRST, SECOND = ([columns[i] for columns in KEPT_COLUMNS] for i in range(2))


def gathered_product(kind: Packed, isa: Instructions, tokens: int, biased: bool) -> str:
    """Code of ``loop(start, stop, k, rows, values, bits, scales, high, low, x_scales, bias, out)``, of pairs of rows.

    high and low are bytes [tokens, k rounded up to STEP], in the order of ``gathered_column``.
    """
    return GatheredProduct(kind, isa, tokens, biased, pointers=6).assembly()


def _bytes(values: list[int]) -> ir.Constant:
    """A byte for each of 32 lanes, the values again and again."""
    return ir.Constant(I8X32, [x & 0xFF for x in values] * (32 // len(values)))


class GatheredProduct(RowProduct):
    def add_row(self, pair: ir.Value) -> None:
        b = self.b
        values, bits, *_ = self.pointers
        first = b.mul(pair, I64(2))
        # the last of an odd number is multiplied twice
        rows = first, minimum(b, b.add(first, I64(1)), b.sub(self.rows, I64(1)))
        row_bytes = b.sdiv(self.k, I64(4))
        mask_bytes = ceil_div(b, self.k, 8)
        sources = [gep(b, values, b.mul(row, row_bytes), I8) for row in rows]
        masks = [gep(b, bits, b.mul(row, mask_bytes), I8) for row in rows]
        totals = [Variable(b, zeros(vector(FLOAT, 8))) for _ in range(self.tokens)]
        buffers = [(buffer(b, I8, STEP // 4), buffer(b, I8, STEP // 8)) for _ in rows]

        def multiply_direct(step: ir.Value) -> None:
            step_sources = [gep(b, source, b.mul(step, I64(STEP // 4)), I8) for source in sources]
            for source in step_sources:
                prefetch(b, gep(b, source, I64(AHEAD_BYTES), I8))
            step_masks = [gep(b, mask, b.mul(step, I64(STEP // 8)), I8) for mask in masks]
            self._multiply(step, rows, step_sources, step_masks, totals)

        def multiply_copied(step: ir.Value) -> None:
            # of the values four columns are a byte, of the masks eight
            for i, pointers, columns, end in ((0, sources, 4, row_bytes), (1, masks, 8, mask_bytes)):
                start = b.mul(step, I64(STEP // columns))
                for pointer, row_buffers in zip(pointers, buffers, strict=True):
                    b.store(zeros(ir.ArrayType(I8, STEP // columns)), row_buffers[i])
                    copy(b, gep(b, pointer, start, I8), row_buffers[i], b.sub(end, start), I8)
            self._multiply(step, rows, *zip(*buffers, strict=True), totals)

        whole_steps = b.sdiv(self.k, I64(STEP))
        for_range(b, I64(0), whole_steps, multiply_direct)
        # none or one
        for_range(b, whole_steps, ceil_div(b, self.k, STEP), multiply_copied)
        for token, total in enumerate(totals):
            for i, row in enumerate(rows):
                row_lanes = ir.Constant(vector(I32, 4), [2 * i, 2 * i + 1, 2 * i + 4, 2 * i + 5])
                self.store(row, token, b.shuffle_vector(total.get(), total.get(), row_lanes))

    def _multiply(self, step: ir.Value, rows, sources, masks, totals: list[Variable]) -> None:
        """Add the products of a step of two rows with each token to its sums: lanes 0, 1, 4, 5 are of the first row."""
        b = self.b
        orders = self._orders(masks)
        weights = self._weights(sources)
        *_, high, low, x_scales = self.pointers
        padded_k = b.mul(ceil_div(b, self.k, STEP), I64(STEP))
        # MIDDLE was added to each integer
        ones = _bytes([1])
        added = self._wide(self._dot(ones, b.add(b.add(*weights[:2]), b.add(*weights[2:]))), -MIDDLE)
        # half a step has 32 values of a row
        block_halves = self.kind.group // 32
        last = b.sub(self.scales_count, I64(1))
        blocks = [minimum(b, b.sdiv(b.add(b.mul(step, I64(2)), I64(i)), I64(block_halves)), last) for i in range(2)]
        weight_scales = self._repeated([self._row_scale(row, block) for block in blocks for row in rows], 2)
        for token, total in enumerate(totals):
            sums = []
            for x_bytes in (high, low):
                pointer = gep(b, x_bytes, b.add(b.mul(padded_k, I64(token)), b.mul(step, I64(STEP))), I8)
                products = []
                for i, (order, weight) in enumerate(zip(orders, weights, strict=True)):
                    x = b.load(gep(b, pointer, I64(32 * i), I8), typ=I8X32, align=1)
                    products.append(self._dot(self._shuffled(x, order), weight))
                sums.append(b.add(b.add(*products[:2]), b.add(*products[2:])))
            # a high byte counts 256
            integers = b.add(b.add(self._wide(sums[0], 256), self._wide(sums[1], 1)), added)
            first_scale = b.mul(self.scales_count, I64(token))
            token_scales = [
                b.load(gep(b, x_scales, b.add(first_scale, block), FLOAT), typ=FLOAT, align=4) for block in blocks
            ]
            scales = b.fmul(weight_scales, self._repeated(token_scales, 4))
            total.set(fma(b, b.sitofp(integers, vector(FLOAT, 8)), scales, total.get()))

    def _orders(self, masks: list[ir.Value]) -> list[ir.Value]:
        """Four vectors of indices of kept activations: each half has 8 bytes of the first row and 8 of the second."""
        b = self.b
        first, second = (b.load(mask, typ=vector(I8, 16), align=1) for mask in masks)
        pairs = [i + offset for i in range(0, 16, 2) for offset in (0, 1, 16, 17)]
        bits = b.shuffle_vector(first, second, ir.Constant(vector(I32, 32), pairs))
        low_codes = b.and_(bits, _bytes([15]))
        high_codes = b.lshr(bits, _bytes([4]))
        even, odd = (
            [self._shuffled(_bytes([column + offset for column in table]), codes) for table in (FIRST, SECOND)]
            for codes, offset in ((low_codes, 0), (high_codes, 4))
        )
        quads = [
            self._interleaved(self._interleaved(*even, 1, upper), self._interleaved(*odd, 1, upper), 2, half)
            for upper in (False, True)
            for half in (False, True)
        ]
        return [b.add(quad, _bytes([0] * 4 + [8] * 4)) for quad in quads]

    def _weights(self, sources: list[ir.Value]) -> list[ir.Value]:
        """Four vectors of values as bytes, in the lanes of ``_orders``."""
        b = self.b
        signed = _bytes([*range(8), *range(-8, 0)])
        rows = [b.load(source, typ=I8X32, align=1) for source in sources]
        weights = []
        for upper in (False, True):
            pairs = self._interleaved(*rows, 4, upper)
            nibbles = [self._shuffled(signed, x) for x in (b.and_(pairs, _bytes([15])), b.lshr(pairs, _bytes([4])))]
            weights += [self._interleaved(*nibbles, 1, half) for half in (False, True)]
        return weights

    def _interleaved(self, x: ir.Value, y: ir.Value, width: int, upper: bool) -> ir.Value:
        """Elements of ``width`` bytes of two vectors in turn, of the lower or upper 8 bytes of each half (PUNPCK)."""
        count = 8 // width
        order = [
            half * 2 * count + upper * count + i + source * 4 * count
            for half in range(2)
            for i in range(count)
            for source in range(2)
        ]
        elements = vector(ir.IntType(8 * width), 32 // width)
        x = self.b.bitcast(x, elements)
        y = self.b.bitcast(y, elements)
        interleaved = self.b.shuffle_vector(x, y, ir.Constant(vector(I32, len(order)), order))
        return self.b.bitcast(interleaved, I8X32)

    def _shuffled(self, values: ir.Value, order: ir.Value) -> ir.Value:
        return intrinsic(self.b, "llvm.x86.avx2.pshuf.b", I8X32, values, order)

    def _dot(self, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
        """Sums of two products of bytes each, 16 bits (PMADDUBSW): at most 2 * 255 * 8, and four of them fit."""
        return intrinsic(self.b, "llvm.x86.avx2.pmadd.ub.sw", I16X16, unsigned, signed)

    def _wide(self, sums: ir.Value, factor: int) -> ir.Value:
        """int32 sums of two lanes each, times a factor of 16 bits (PMADDWD)."""
        factors = ir.Constant(I16X16, [factor] * 16)
        return intrinsic(self.b, "llvm.x86.avx2.pmadd.wd", vector(I32, 8), sums, factors)

    def _row_scale(self, row: ir.Value, block: ir.Value) -> ir.Value:
        b = self.b
        element = TYPES[self.kind.x]
        pointer = gep(b, self.pointers[2], b.add(b.mul(row, self.scales_count), block), element)
        return as_float32(b, b.load(pointer, typ=element, align=1), self.kind.x)

    def _repeated(self, values: list[ir.Value], times: int) -> ir.Value:
        """Vector of 8 lanes: each float32 value ``times`` times."""
        b = self.b
        out = ir.Constant(vector(FLOAT, len(values)), ir.Undefined)
        for i, value in enumerate(values):
            out = b.insert_element(out, value, I32(i))
        order = [i for i in range(len(values)) for _ in range(times)]
        return b.shuffle_vector(out, out, ir.Constant(vector(I32, 8), order))
