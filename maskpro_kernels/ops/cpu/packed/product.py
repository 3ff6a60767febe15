"""Products with a few tokens: each run is placed in registers once, and multiplied with every token."""

from __future__ import annotations

import torch
from llvmlite import ir

from ...reference.packing import SCALED
from ..codegen import TYPES
from ..loops import ENTRY, add_function, add_shared, each
from .build import LINE_BYTES, Variable, at, broadcast, buffer, copy, fma, prefetch, scalar_as_float32, smaller, stored
from .instructions import BYTE, FLOAT, HALF, LONG, Instructions, intrinsic, vector, zeros
from .kind import RUN, Packed
from .weight import Weight

# How far ahead values are asked for: the CPU's own prefetcher stops at each page
AHEAD_BYTES = 4096


def product(kind: Packed, use: Instructions, tokens: int, biased: bool) -> str:
    """``loop(start, stop, k, rows, values, bits, scales, x, bias, out)``: rows start to stop of x @ weight.T + bias.

    x [tokens, k] is of ``kind.x`` where ``multiplies_pairs``, else float32; bias [rows] and out [tokens, rows] are of
    ``kind.x``, scales [rows, ceil(values of a row / SCALED)] as well.
    """
    return Product(kind, use, tokens, biased).assembly()


def multiplies_pairs(kind: Packed, use: Instructions) -> bool:
    """Whether the products of bfloat16 are made by instructions of their own."""
    return use.pairs and kind.x == torch.bfloat16


class Product:
    """The function of ``product``, of a weight of ``weight_class``."""

    weight_class = Weight

    def __init__(self, kind: Packed, use: Instructions, tokens: int, biased: bool):
        self.kind, self.use, self.tokens, self.biased = kind, use, tokens, biased
        self.pairs = multiplies_pairs(kind, use)
        self.module = ir.Module("maskpro_kernels")
        self.function, self.b = add_function(self.module, ENTRY, 4, 6)
        set.add(self.function.attributes, '"prefer-vector-width"="512"')
        self.start, self.stop, self.k, self.rows, *pointers = self.function.args
        values, bits, self.scales, self.x, self.bias, self.out = pointers
        self.weight = self.weight_class(self.b, kind, use, "halves" if self.pairs else "floats", values, bits, self.k)
        self.lanes = use.lanes
        # enough sums beside each other to hide how long one takes
        self.beside = max(1, 4 // tokens)
        self.x_element = HALF if self.pairs else FLOAT
        self.x_aside = [buffer(self.b, self.x_element, RUN) for _ in range(tokens)]

    def assembly(self) -> str:
        each(self.b, self.start, self.stop, self._row)
        self.b.ret_void()
        add_shared(self.module, self.function)
        return str(self.module)

    def _row(self, row: ir.Value) -> None:
        b, none = self.b, zeros(vector(FLOAT, self.lanes))
        totals = [Variable(b, none) for _ in range(self.tokens)]
        place = self.weight.row(row)
        if self.kind.values == torch.int8:
            row_scales = b.sdiv(b.add(self.weight.row_values, LONG(SCALED - 1)), LONG(SCALED))
            first, each_scale = b.mul(row, row_scales), LONG(self.kind.scaled_runs)

            def scaled(i: ir.Value) -> None:
                start = b.mul(i, each_scale)
                sums = self._sums(place, start, smaller(b, self.weight.runs, b.add(start, each_scale)))
                given = b.load(at(b, self.scales, b.add(first, i), TYPES[self.kind.x]), typ=TYPES[self.kind.x], align=1)
                scale = broadcast(b, scalar_as_float32(b, given, self.kind.x), self.lanes)
                for total, part in zip(totals, sums, strict=True):
                    total.set(fma(b, part, scale, total.get()))

            each(b, LONG(0), row_scales, scaled)
        else:
            for total, part in zip(totals, self._sums(place, LONG(0), self.weight.runs), strict=True):
                total.set(part)
        for token, total in enumerate(totals):
            self._store(row, token, total.get())

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
                sum_ = (
                    self.use.dot_pairs(b, total.get(), weight, own) if self.pairs else fma(b, weight, own, total.get())
                )
                total.set(sum_)

    def _store(self, row: ir.Value, token: int, total: ir.Value) -> None:
        b, dtype = self.b, self.kind.x
        element = TYPES[dtype]
        name = f"llvm.vector.reduce.fadd.v{self.lanes}f32"
        y = intrinsic(b, name, FLOAT, ir.Constant(FLOAT, -0.0), total, flags=("reassoc",))
        if self.biased:
            bias = b.load(at(b, self.bias, row, element), typ=element, align=1)
            y = b.fadd(y, scalar_as_float32(b, bias, dtype))
        stored(b, y, at(b, self.out, b.add(b.mul(self.rows, LONG(token)), row), element), dtype)
