"""Products with a few tokens: each run is placed in registers once, and multiplied with every token."""

from __future__ import annotations

import torch
from llvmlite import ir

from ..loops import each
from .build import LINE_BYTES, Variable, at, broadcast, buffer, copy, fma, prefetch, smaller
from .instructions import BYTE, FLOAT, HALF, LONG, Instructions, vector, zeros
from .kind import RUN, Packed
from .row_product import AHEAD_BYTES, RowProduct
from .weight import Weight


def product(kind: Packed, use: Instructions, tokens: int, biased: bool) -> str:
    """``loop(start, stop, k, rows, values, bits, scales, x, bias, out)``: as ``RowProduct``.

    x [tokens, k] is of ``kind.x`` where ``multiplies_pairs``, else float32; scales [rows, ceil(values of a row /
    SCALED)] are of ``kind.x``.
    """
    return Product(kind, use, tokens, biased).assembly()


def multiplies_pairs(kind: Packed, use: Instructions) -> bool:
    """Whether the products of bfloat16 are made by instructions of their own."""
    return use.pairs and kind.x == torch.bfloat16


class Product(RowProduct):
    """The function of ``product``, of a weight of ``weight_class``."""

    weight_class = Weight

    def __init__(self, kind: Packed, use: Instructions, tokens: int, biased: bool):
        super().__init__(kind, use, tokens, biased, pointers=4)
        values, bits, self.scales, self.x = self.pointers
        self.pairs = multiplies_pairs(kind, use)
        self.weight = self.weight_class(self.b, kind, use, "halves" if self.pairs else "floats", values, bits, self.k)
        self.lanes = use.lanes
        # enough sums beside each other to hide how long one takes
        self.beside = max(1, 4 // tokens)
        self.x_element = HALF if self.pairs else FLOAT
        self.x_aside = [buffer(self.b, self.x_element, RUN) for _ in range(tokens)]

    def add_row(self, row: ir.Value) -> None:
        b, place = self.b, self.weight.row(row)
        if self.kind.values != torch.int8:
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
        """Vectors [lanes] for each token whose sums are the products over those runs of a row."""
        b, weight, none = self.b, self.weight, zeros(vector(FLOAT, self.lanes))
        sums = [[Variable(b, none) for _ in range(self.tokens)] for _ in range(self.beside)]
        direct = weight.within(start, stop)
        several = b.sub(direct, b.srem(b.sub(direct, start), LONG(self.beside)))
        line = max(1, LINE_BYTES // (self.kind.kept * self.kind.values.itemsize))

        def multiply(run: ir.Value, own: list) -> None:
            self._multiply(weight.direct(place, run), [self._x_of(token, run) for token in range(self.tokens)], own)

        def beside(run: ir.Value) -> None:
            for i, own in enumerate(sums):
                here = b.add(run, LONG(i))
                if i % line == 0:
                    ahead = at(b, weight.values_of(place, here), LONG(AHEAD_BYTES), BYTE)
                    prefetch(b, ahead)
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
        """Pointer to what a token has for a run."""
        b = self.b
        return at(b, self.x, b.add(b.mul(self.k, LONG(token)), b.mul(run, LONG(RUN))), self.x_element)

    def _x_copied(self, token: int, run: ir.Value) -> ir.Value:
        """``_x_of``, with zeros where the row has ended."""
        b, aside = self.b, self.x_aside[token]
        b.store(zeros(ir.ArrayType(self.x_element, RUN)), aside)
        copy(b, self._x_of(token, run), aside, self.weight.weights_of(run), self.x_element)
        return aside

    def _multiply(self, weights: list[ir.Value], x: list[ir.Value], sums: list[Variable]) -> None:
        """Add the products of a run's weights with each token's x to its sum."""
        b, lanes = self.b, self.weight.lanes
        for i, weight in enumerate(weights):
            for pointer, total in zip(x, sums, strict=True):
                here = at(b, pointer, LONG(i * lanes), self.x_element)
                own = b.load(here, typ=vector(self.x_element, lanes), align=1)
                if self.pairs:
                    total.set(self.use.dot_pairs(b, total.get(), weight, own))
                else:
                    total.set(fma(b, weight, own, total.get()))
