"""Products of 2:4 int4 weights on x86 without VBMI2: activations move to the kept values, not values to columns.

Two rows are multiplied at once, 128 columns a step. Of each 16 activations a row keeps 8, so one byte shuffle serves
both rows. Its order is computed from the bitmask by shuffles too: of each four bits, the places of the first and of the
second kept weight. The two bytes of an activation's integer are multiplied separately, as with VBMI2.
"""

from __future__ import annotations

from llvmlite import ir

from ..codegen import LONG, TYPES, WORD, each, smaller
from . import Packed
from .instructions import (
    BYTE,
    FLOAT,
    HALF,
    Instructions,
    Variable,
    as_float32,
    at,
    buffer,
    copy,
    divided_up,
    fma,
    intrinsic,
    prefetch,
    vector,
    zeros,
)
from .rows import AHEAD_BYTES, MIDDLE, STEP, RowProduct

OCTETS = vector(BYTE, 32)
WORDS = vector(HALF, 16)

# Places of the first and of the second set bit among four; code 0, after the last column, has zeros for weights
PLACES = [[place for place in range(4) if code >> place & 1] + [0, 0] for code in range(16)]
FIRST, SECOND = ([places[i] for places in PLACES] for i in range(2))


def gathered_product(kind: Packed, use: Instructions, tokens: int, biased: bool) -> str:
    """Code of ``loop(start, stop, k, rows, values, bits, scales, high, low, x_scales, bias, out)``, of pairs of rows.

    high and low are bytes [tokens, k rounded up to STEP], at the places of ``gathered_column``.
    """
    return _GatheredProduct(kind, use, tokens, biased, pointers=6).assembly()


def _bytes(values: list[int]) -> ir.Constant:
    """A byte for each of 32 lanes, the values again and again."""
    return ir.Constant(OCTETS, [x & 0xFF for x in values] * (32 // len(values)))


class _GatheredProduct(RowProduct):
    def add_row(self, pair: ir.Value) -> None:
        b = self.b
        values, bits, *_ = self.pointers
        first = b.mul(pair, LONG(2))
        # the last of an odd number is multiplied twice
        rows = first, smaller(b, b.add(first, LONG(1)), b.sub(self.rows, LONG(1)))
        row_bytes = b.sdiv(self.k, LONG(4))
        mask_bytes = divided_up(b, self.k, 8)
        sources = [at(b, values, b.mul(row, row_bytes), BYTE) for row in rows]
        masks = [at(b, bits, b.mul(row, mask_bytes), BYTE) for row in rows]
        totals = [Variable(b, zeros(vector(FLOAT, 8))) for _ in range(self.tokens)]
        asides = [(buffer(b, BYTE, STEP // 4), buffer(b, BYTE, STEP // 8)) for _ in rows]

        def direct(step: ir.Value) -> None:
            own = [at(b, source, b.mul(step, LONG(STEP // 4)), BYTE) for source in sources]
            for source in own:
                prefetch(b, at(b, source, LONG(AHEAD_BYTES), BYTE))
            self._multiply(step, rows, own, [at(b, mask, b.mul(step, LONG(STEP // 8)), BYTE) for mask in masks], totals)

        def copied(step: ir.Value) -> None:
            for part, given, columns, end in ((0, sources, 4, row_bytes), (1, masks, 8, mask_bytes)):
                start = b.mul(step, LONG(STEP // columns))
                for pointer, aside in zip(given, asides, strict=True):
                    b.store(zeros(ir.ArrayType(BYTE, STEP // columns)), aside[part])
                    copy(b, at(b, pointer, start, BYTE), aside[part], b.sub(end, start), BYTE)
            self._multiply(step, rows, *zip(*asides, strict=True), totals)

        whole = b.sdiv(self.k, LONG(STEP))
        each(b, LONG(0), whole, direct)
        # none or one
        each(b, whole, divided_up(b, self.k, STEP), copied)
        for token, total in enumerate(totals):
            for i, row in enumerate(rows):
                own = ir.Constant(vector(WORD, 4), [2 * i, 2 * i + 1, 2 * i + 4, 2 * i + 5])
                self.store(row, token, b.shuffle_vector(total.get(), total.get(), own))

    def _multiply(self, step: ir.Value, rows, sources, masks, totals: list[Variable]) -> None:
        """Add the products of a step of two rows with each token to its sums: lanes 0, 1, 4, 5 are of the first row."""
        b = self.b
        orders = self._orders(masks)
        weights = self._weights(sources)
        *_, high, low, x_scales = self.pointers
        padded = b.mul(divided_up(b, self.k, STEP), LONG(STEP))
        # MIDDLE was added to each integer
        plain = self._wide(self._dot(_bytes([1]), b.add(b.add(*weights[:2]), b.add(*weights[2:]))), -MIDDLE)
        # half a step has 32 values of a row
        halves = self.kind.group // 32
        last = b.sub(self.scales_count, LONG(1))
        blocks = [smaller(b, b.sdiv(b.add(b.mul(step, LONG(2)), LONG(i)), LONG(halves)), last) for i in range(2)]
        scales = self._lanes([self._row_scale(row, block) for block in blocks for row in rows], 2)
        for token, total in enumerate(totals):
            sums = []
            for part in (high, low):
                place = at(b, part, b.add(b.mul(padded, LONG(token)), b.mul(step, LONG(STEP))), BYTE)
                products = []
                for i, (order, weight) in enumerate(zip(orders, weights, strict=True)):
                    x = b.load(at(b, place, LONG(32 * i), BYTE), typ=OCTETS, align=1)
                    products.append(self._dot(self._shuffled(x, order), weight))
                sums.append(b.add(b.add(*products[:2]), b.add(*products[2:])))
            # a high byte counts 256
            integers = b.add(b.add(self._wide(sums[0], 256), self._wide(sums[1], 1)), plain)
            at_token = b.mul(self.scales_count, LONG(token))
            own = [b.load(at(b, x_scales, b.add(at_token, block), FLOAT), typ=FLOAT, align=4) for block in blocks]
            scale = b.fmul(scales, self._lanes(own, 4))
            total.set(fma(b, b.sitofp(integers, vector(FLOAT, 8)), scale, total.get()))

    def _orders(self, masks: list[ir.Value]) -> list[ir.Value]:
        """Four vectors of the places of kept activations, of the first row's chunk and of the second's in each half."""
        b = self.b
        one, other = (b.load(mask, typ=vector(BYTE, 16), align=1) for mask in masks)
        pairs = [i + offset for i in range(0, 16, 2) for offset in (0, 1, 16, 17)]
        bits = b.shuffle_vector(one, other, ir.Constant(vector(WORD, 32), pairs))
        low = b.and_(bits, _bytes([15]))
        high = b.lshr(bits, _bytes([4]))
        even, odd = (
            [self._shuffled(_bytes([place + offset for place in table]), codes) for table in (FIRST, SECOND)]
            for codes, offset in ((low, 0), (high, 4))
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
        given = [b.load(source, typ=OCTETS, align=1) for source in sources]
        weights = []
        for upper in (False, True):
            pair = self._interleaved(*given, 4, upper)
            parts = [self._shuffled(signed, x) for x in (b.and_(pair, _bytes([15])), b.lshr(pair, _bytes([4])))]
            weights += [self._interleaved(*parts, 1, half) for half in (False, True)]
        return weights

    def _interleaved(self, one: ir.Value, other: ir.Value, width: int, upper: bool) -> ir.Value:
        """Elements of ``width`` bytes of two vectors in turn, of the lower or upper 8 bytes of each half."""
        count = 8 // width
        order = [
            half * 2 * count + upper * count + i + which * 4 * count
            for half in range(2)
            for i in range(count)
            for which in range(2)
        ]
        kind = vector(ir.IntType(8 * width), 32 // width)
        parts = (self.b.bitcast(x, kind) for x in (one, other))
        mixed = self.b.shuffle_vector(*parts, ir.Constant(vector(WORD, len(order)), order))
        return self.b.bitcast(mixed, OCTETS)

    def _shuffled(self, values: ir.Value, order: ir.Value) -> ir.Value:
        return intrinsic(self.b, "llvm.x86.avx2.pshuf.b", OCTETS, values, order)

    def _dot(self, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
        """Sums of two products of bytes each, 16 bits: at most 2 * 255 * 8, and four of them fit."""
        return intrinsic(self.b, "llvm.x86.avx2.pmadd.ub.sw", WORDS, unsigned, signed)

    def _wide(self, sums: ir.Value, factor: int) -> ir.Value:
        """int32 sums of two lanes each, times a factor of 16 bits."""
        factors = ir.Constant(WORDS, [factor] * 16)
        return intrinsic(self.b, "llvm.x86.avx2.pmadd.wd", vector(WORD, 8), sums, factors)

    def _row_scale(self, row: ir.Value, block: ir.Value) -> ir.Value:
        b = self.b
        element = TYPES[self.kind.x]
        place = at(b, self.pointers[2], b.add(b.mul(row, self.scales_count), block), element)
        return as_float32(b, b.load(place, typ=element, align=1), self.kind.x)

    def _lanes(self, values: list[ir.Value], times: int) -> ir.Value:
        """Each value in as many lanes of a vector of 8."""
        b = self.b
        out = ir.Constant(vector(FLOAT, len(values)), ir.Undefined)
        for i, value in enumerate(values):
            out = b.insert_element(out, value, WORD(i))
        order = [i for i in range(len(values)) for _ in range(times)]
        return b.shuffle_vector(out, out, ir.Constant(vector(WORD, 8), order))
