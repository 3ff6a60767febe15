"""Code that reads a packed weight run by run, with values placed in vectors, and code that unpacks it.

A run is 32 weights of a row. All runs of a pattern keep equally many, so the distance of their values is fixed. Nothing
is read beyond the last value of a row: runs for which that could happen are first copied to a buffer.
"""

from __future__ import annotations

from llvmlite import ir

from ..codegen import ENTRY, LONG, TYPES, WORD, add_function, add_shared, each, larger, smaller
from . import RUN, Packed
from .instructions import (
    BFLOAT,
    BYTE,
    FLOAT,
    HALF,
    Instructions,
    Variable,
    as_float32,
    at,
    broadcast,
    buffer,
    copy,
    divided_up,
    intrinsic,
    nibbles,
    rounded,
    scale_at,
    vector,
    widened,
    zeros,
)


class Weight:
    """Reader of the rows of a packed weight, of ``k`` weights each, run by run, for a function under construction.

    ``form`` is the content of vectors: "halves", 32 values of 16 bits; "floats"; "words", values as 32-bit integers.
    """

    def __init__(
        self, b: ir.IRBuilder, kind: Packed, use: Instructions, form: str, values: ir.Value, bits: ir.Value, k: ir.Value
    ):
        self.b = b
        self.kind = kind
        self.use = use
        self.form = form
        self.k = k
        self.values = values
        self.bits = bits
        # values are moved as integers of their bits
        self.element = TYPES[kind.values] if form == "floats" else ir.IntType(8 * kind.values.itemsize)
        self.lanes = RUN if form == "halves" else use.lanes
        # whether each vector has equally many values
        self.fixed = kind.m <= self.lanes
        self.row_values = b.mul(b.sdiv(k, LONG(kind.m)), LONG(kind.n))
        self.row_elements = b.sdiv(self.row_values, LONG(kind.in_byte))
        self.row_bytes = divided_up(b, k, 8)
        self.runs = divided_up(b, k, RUN)
        # runs of a row that can be read directly, for any bitmask
        self.direct_runs = b.sdiv(k, LONG(RUN))
        if not self.fixed and kind.in_byte == 1:
            # the vector of the last lanes may start after as many values as there are other lanes
            beyond = b.sdiv(b.sub(self.row_values, LONG(RUN - kind.kept)), LONG(kind.kept))
            self.direct_runs = smaller(b, self.direct_runs, larger(b, beyond, LONG(0)))
        self.aside = buffer(b, self.element, 2 * RUN)
        # int4 values of a run as bytes
        self.bytes = buffer(b, BYTE, 2 * RUN)
        # content of the buffer beyond the copied values
        b.store(zeros(ir.ArrayType(self.element, 2 * RUN)), self.aside)

    def within(self, first: ir.Value, last: ir.Value) -> ir.Value:
        """End of the direct runs among [first, last)."""
        return larger(self.b, first, smaller(self.b, self.direct_runs, last))

    def row(self, row: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Pointers to a row's values and bitmask."""
        b = self.b
        values = at(b, self.values, b.mul(row, self.row_elements), self.element)
        return values, at(b, self.bits, b.mul(row, self.row_bytes), BYTE)

    def values_of(self, row: tuple, run: ir.Value) -> ir.Value:
        """Pointer to a run's values."""
        return at(self.b, row[0], self.b.mul(run, LONG(self.kind.kept // self.kind.in_byte)), self.element)

    def direct(self, row: tuple, run: ir.Value, scale: ir.Value | None = None) -> list[ir.Value]:
        """``vectors`` of a direct run."""
        word = self.b.load(at(self.b, row[1], run, WORD), typ=WORD, align=1)
        return self.vectors(self.values_of(row, run), word, scale)

    def weights_of(self, run: ir.Value) -> ir.Value:
        """Number of weights of a run, i64."""
        return smaller(self.b, LONG(RUN), self.b.sub(self.k, self.b.mul(run, LONG(RUN))))

    def copied(self, row: tuple, run: ir.Value, scale: ir.Value | None = None) -> list[ir.Value]:
        """``vectors`` of any run, with zeros after the end of the row."""
        b = self.b
        weights = self.weights_of(run)
        values = b.mul(b.sdiv(weights, LONG(self.kind.m)), LONG(self.kind.n))
        elements = b.sdiv(values, LONG(self.kind.in_byte))
        copy(b, self.values_of(row, run), self.aside, elements, self.element)
        word = Variable(b, WORD(0))
        source = at(b, row[1], run, WORD)

        def add_byte(i: ir.Value) -> None:
            byte = b.zext(b.load(at(b, source, i, BYTE), typ=BYTE), WORD)
            word.set(b.or_(word.get(), b.shl(byte, b.trunc(b.mul(i, LONG(8)), WORD))))

        each(b, LONG(0), divided_up(b, weights, 8), add_byte)
        return self.vectors(self.aside, word.get(), scale)

    def vectors(self, values: ir.Value, word: ir.Value, scale: ir.Value | None) -> list[ir.Value]:
        """Weights of a run in order, from a pointer to values and a bitmask, times the float32 scale."""
        b = self.b
        n = self.kind.n
        m = self.kind.m
        if self.kind.in_byte == 2:
            b.store(nibbles(b, values, self.kind.kept), self.bytes)
            values = self.bytes
        if self.form == "halves":
            return [self.use.placed(b, self._loaded(values, self.kind.kept, scale), word)]
        out = []
        before = LONG(0)
        for lane in range(0, RUN, self.lanes):
            bits = b.trunc(b.lshr(word, WORD(lane)), ir.IntType(self.lanes))
            if self.fixed:
                loaded = self._loaded(at(b, values, LONG(lane * n // m), self.element), self.lanes * n // m, scale)
            else:
                loaded = self._loaded(at(b, values, before, self.element), self.lanes, scale)
                kept = intrinsic(b, f"llvm.ctpop.i{self.lanes}", bits.type, bits)
                before = b.add(before, b.zext(kept, LONG))
            out.append(self.use.placed(b, loaded, bits))
        return [b.bitcast(x, vector(FLOAT, self.lanes)) for x in out] if self.form == "floats" else out

    def _loaded(self, pointer: ir.Value, count: int, scale: ir.Value | None) -> ir.Value:
        """Load ``count`` values in the form of vectors, as integers, in a whole vector."""
        b = self.b
        dtype = self.kind.values
        given = b.load(pointer, typ=vector(self.element, count), align=1)
        if self.kind.scaled:
            given = b.sitofp(b.sext(given, vector(WORD, count)), vector(FLOAT, count))
            if scale is not None:
                given = b.fmul(given, broadcast(b, scale, count))
            if self.form == "halves":
                given = b.fptrunc(given, vector(BFLOAT, count))
        elif self.form == "words":
            given = given if dtype.itemsize == 4 else b.zext(given, vector(WORD, count))
        elif self.form == "floats":
            given = as_float32(b, given, dtype)
        integers = vector(HALF if self.form == "halves" else WORD, count)
        given = given if given.type == integers else b.bitcast(given, integers)
        return given if count == self.lanes else widened(b, given, self.lanes)


def unpack(kind: Packed, use: Instructions) -> str:
    """Code of ``loop(start, stop, k, first, count, stride, values, bits, scales, out)``: unpack runs from ``first`` on.

    Row i of the result, of ``count`` runs, starts at element i * stride of ``out``, of ``kind.x``. Values are integers,
    or of ``kind.x``, a dtype of 16 or 32 bits.
    """
    module = ir.Module("maskpro_kernels")
    function, b = add_function(module, ENTRY, 6, 4)
    start, stop, k, first, count, stride, values, bits, scales, out = function.args
    form = "floats" if kind.scaled else "halves" if use.halves and kind.x.itemsize == 2 else "words"
    weight = Weight(b, kind, use, form, values, bits, k)
    element = ir.IntType(8 * kind.x.itemsize)
    last = b.add(first, count)
    aside = buffer(b, element, RUN)
    direct = weight.within(first, last)
    row_scales = divided_up(b, weight.row_values, kind.group)

    def write(vectors: list[ir.Value], pointer: ir.Value) -> None:
        for i, given in enumerate(vectors):
            if form == "floats":
                given = rounded(b, given, kind.x)
            elif form == "words" and kind.x.itemsize == 2:
                given = b.trunc(given, vector(HALF, weight.lanes))
            b.store(given, at(b, pointer, LONG(i * weight.lanes), element), align=1)

    def unpack_row(row: ir.Value) -> None:
        place = weight.row(row)
        target = at(b, out, b.mul(row, stride), element)

        def target_of(run: ir.Value) -> ir.Value:
            return at(b, target, b.mul(b.sub(run, first), LONG(RUN)), element)

        def scale_of(run: ir.Value) -> ir.Value | None:
            if not kind.scaled:
                return None
            index = b.add(b.mul(row, row_scales), b.sdiv(run, LONG(kind.scaled_runs)))
            return scale_at(b, scales, index, kind)

        def unpack_copied(run: ir.Value) -> None:
            write(weight.copied(place, run, scale_of(run)), aside)
            copy(b, aside, target_of(run), weight.weights_of(run), element)

        each(b, first, direct, lambda run: write(weight.direct(place, run, scale_of(run)), target_of(run)))
        each(b, direct, last, unpack_copied)

    each(b, start, stop, unpack_row)
    b.ret_void()
    add_shared(module, function)
    return str(module)
