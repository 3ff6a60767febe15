"""Code that reads a packed weight run by run, with values expanded into vectors, and code that unpacks it.

All runs of a pattern keep equally many weights, so the distance of their values is fixed. Nothing is read beyond the
last value of a row: runs for which that could happen are first copied to a buffer.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from ..codegen import ENTRY, I32, I64, TYPES, add_function, add_shared, for_range, maximum, minimum
from . import RUN, Packed
from .instructions import (
    FLOAT,
    I8,
    I16,
    Instructions,
    Variable,
    as_float32,
    broadcast,
    buffer,
    ceil_div,
    copy,
    gep,
    intrinsic,
    load_scale,
    nibbles,
    rounded,
    vector,
    widened,
    zeros,
)


class Weight:
    """Reader of the rows of a packed weight, of ``k`` weights each, run by run, for a function under construction.

    ``form`` is the content of vectors: "i16", bits of 32 values of 16 bits; "float"; "i32", values as 32-bit integers.
    ``scales`` are read by ``run_scale`` alone.
    """

    def __init__(self, b: ir.IRBuilder, kind: Packed, isa: Instructions, form: str, values: ir.Value, bits: ir.Value,
                 k: ir.Value, scales: ir.Value | None = None):  # fmt: skip
        self.b = b
        self.kind = kind
        self.isa = isa
        self.form = form
        self.k = k
        self.values = values
        self.bits = bits
        self.scales = scales
        # values are moved as integers of their bits
        self.element = TYPES[kind.values] if form == "float" else ir.IntType(8 * kind.values.itemsize)
        self.lanes = RUN if form == "i16" else isa.lanes
        # whether each vector has equally many values
        self.fixed = kind.m <= self.lanes
        self.row_values = b.mul(b.sdiv(k, I64(kind.m)), I64(kind.n))
        self.row_scales = ceil_div(b, self.row_values, kind.group)
        self.row_elements = b.sdiv(self.row_values, I64(kind.values_per_element))
        self.row_bytes = ceil_div(b, k, 8)
        self.runs = ceil_div(b, k, RUN)
        # runs of a row that can be read directly, for any bitmask
        self.direct_runs = b.sdiv(k, I64(RUN))
        if not self.fixed and kind.values_per_element == 1:
            # the vector of the last lanes may start after as many values as there are lanes before it
            whole_loads = b.sdiv(b.sub(self.row_values, I64(RUN - kind.values_per_run)), I64(kind.values_per_run))
            self.direct_runs = minimum(b, self.direct_runs, maximum(b, whole_loads, I64(0)))
        self.values_buffer = buffer(b, self.element, 2 * RUN)
        # int4 values of a run as bytes
        self.bytes_buffer = buffer(b, I8, 2 * RUN)
        # content of the buffer beyond the copied values
        b.store(zeros(ir.ArrayType(self.element, 2 * RUN)), self.values_buffer)

    def direct_end(self, first: ir.Value, last: ir.Value) -> ir.Value:
        """End of the direct runs among [first, last)."""
        return maximum(self.b, first, minimum(self.b, self.direct_runs, last))

    def row_pointers(self, row: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Pointers to a row's values and bitmask."""
        b = self.b
        values = gep(b, self.values, b.mul(row, self.row_elements), self.element)
        return values, gep(b, self.bits, b.mul(row, self.row_bytes), I8)

    def run_values(self, pointers: tuple, run: ir.Value) -> ir.Value:
        """Pointer to a run's values, by the row's pointers."""
        return gep(self.b, pointers[0], self.b.mul(run, I64(self.kind.elements_per_run)), self.element)

    def run_scale(self, row: ir.Value, run: ir.Value) -> ir.Value | None:
        """Scale of a run as float32, None without scales."""
        if not self.kind.scaled:
            return None
        b = self.b
        index = b.add(b.mul(row, self.row_scales), b.sdiv(run, I64(self.kind.runs_per_scale)))
        return load_scale(b, self.scales, index, self.kind)

    def load_direct(self, pointers: tuple, run: ir.Value, scale: ir.Value | None = None) -> list[ir.Value]:
        """``vectors`` of a direct run."""
        bits = None
        if not self.kind.whole:
            bits = self.b.load(gep(self.b, pointers[1], run, I32), typ=I32, align=1)
        return self.vectors(self.run_values(pointers, run), bits, scale)

    def run_length(self, run: ir.Value) -> ir.Value:
        """Number of weights of a run, i64."""
        return minimum(self.b, I64(RUN), self.b.sub(self.k, self.b.mul(run, I64(RUN))))

    def load_copied(self, pointers: tuple, run: ir.Value, scale: ir.Value | None = None) -> list[ir.Value]:
        """``vectors`` of any run, with zeros after the end of the row."""
        b = self.b
        weights = self.run_length(run)
        values = b.mul(b.sdiv(weights, I64(self.kind.m)), I64(self.kind.n))
        elements = b.sdiv(values, I64(self.kind.values_per_element))
        copy(b, self.run_values(pointers, run), self.values_buffer, elements, self.element)
        if self.kind.whole:
            return self.vectors(self.values_buffer, None, scale)
        bits = Variable(b, I32(0))
        source = gep(b, pointers[1], run, I32)

        def add_byte(i: ir.Value) -> None:
            byte = b.zext(b.load(gep(b, source, i, I8), typ=I8), I32)
            bits.set(b.or_(bits.get(), b.shl(byte, b.trunc(b.mul(i, I64(8)), I32))))

        for_range(b, I64(0), ceil_div(b, weights, 8), add_byte)
        return self.vectors(self.values_buffer, bits.get(), scale)

    def load_runs(
        self,
        row: ir.Value,
        first: ir.Value,
        last: ir.Value,
        write: Callable[[list[ir.Value], ir.Value], None],
        before_direct: Callable[[ir.Value], None] = lambda run: None,
    ) -> None:
        """Load runs [first, last) of a row, scaled, in loops which call ``write(vectors, run)``."""
        pointers = self.row_pointers(row)
        direct_end = self.direct_end(first, last)

        def load_direct(run: ir.Value) -> None:
            before_direct(run)
            write(self.load_direct(pointers, run, self.run_scale(row, run)), run)

        def load_copied(run: ir.Value) -> None:
            write(self.load_copied(pointers, run, self.run_scale(row, run)), run)

        for_range(self.b, first, direct_end, load_direct)
        for_range(self.b, direct_end, last, load_copied)

    def vectors(self, values: ir.Value, bits: ir.Value | None, scale: ir.Value | None) -> list[ir.Value]:
        """Weights of a run in order, from a pointer to values and the bits of its mask, times the float32 scale.

        ``bits`` are None if all weights are kept.
        """
        b = self.b
        n = self.kind.n
        m = self.kind.m
        if self.kind.values_per_element == 2:
            b.store(nibbles(b, values, self.kind.values_per_run), self.bytes_buffer)
            values = self.bytes_buffer
        if self.form == "i16":
            loaded = self._loaded(values, self.kind.values_per_run, scale)
            return [loaded if bits is None else self.isa.expand(b, loaded, bits)]
        out = []
        values_before = I64(0)
        for lane in range(0, RUN, self.lanes):
            if bits is None:
                out.append(self._loaded(gep(b, values, I64(lane), self.element), self.lanes, scale))
                continue
            vector_bits = b.trunc(b.lshr(bits, I32(lane)), ir.IntType(self.lanes))
            if self.fixed:
                loaded = self._loaded(gep(b, values, I64(lane * n // m), self.element), self.lanes * n // m, scale)
            else:
                loaded = self._loaded(gep(b, values, values_before, self.element), self.lanes, scale)
                kept = intrinsic(b, f"llvm.ctpop.i{self.lanes}", vector_bits.type, vector_bits)
                values_before = b.add(values_before, b.zext(kept, I64))
            out.append(self.isa.expand(b, loaded, vector_bits))
        return [b.bitcast(x, vector(FLOAT, self.lanes)) for x in out] if self.form == "float" else out

    def _loaded(self, pointer: ir.Value, count: int, scale: ir.Value | None) -> ir.Value:
        """Load ``count`` values in the form of vectors, as integers, in a whole vector."""
        b = self.b
        dtype = self.kind.values
        values = b.load(pointer, typ=vector(self.element, count), align=1)
        if self.kind.scaled:
            values = b.sitofp(b.sext(values, vector(I32, count)), vector(FLOAT, count))
            if scale is not None:
                values = b.fmul(values, broadcast(b, scale, count))
            if self.form == "i16":
                values = self.isa.round_to_bfloat16(b, values)
        elif self.form == "i32":
            values = values if dtype.itemsize == 4 else b.zext(values, vector(I32, count))
        elif self.form == "float":
            values = as_float32(b, values, dtype)
        integers = vector(I16 if self.form == "i16" else I32, count)
        values = values if values.type == integers else b.bitcast(values, integers)
        return values if count == self.lanes else widened(b, values, self.lanes)


def unpack(kind: Packed, isa: Instructions) -> str:
    """Code of ``loop(start, stop, k, first, count, stride, values, bits, scales, out)``: unpack runs from ``first`` on.

    Row i of the result, of ``count`` runs, starts at element i * stride of ``out``, of ``kind.x``. Values are integers,
    or of ``kind.x``, a dtype of 16 or 32 bits.
    """
    module = ir.Module("maskpro_kernels")
    function, b = add_function(module, ENTRY, 6, 4)
    start, stop, k, first, count, stride, values, bits, scales, out = function.args
    form = "float" if kind.scaled else "i16" if isa.vbmi2 and kind.x.itemsize == 2 else "i32"
    weight = Weight(b, kind, isa, form, values, bits, k, scales)
    element = ir.IntType(8 * kind.x.itemsize)
    last = b.add(first, count)
    run_buffer = buffer(b, element, RUN)
    direct_end = weight.direct_end(first, last)

    def write(vectors: list[ir.Value], pointer: ir.Value) -> None:
        for i, weights in enumerate(vectors):
            if form == "float":
                weights = rounded(b, weights, kind.x)
            elif form == "i32" and kind.x.itemsize == 2:
                weights = b.trunc(weights, vector(I16, weight.lanes))
            b.store(weights, gep(b, pointer, I64(i * weight.lanes), element), align=1)

    def unpack_row(row: ir.Value) -> None:
        pointers = weight.row_pointers(row)
        out_row = gep(b, out, b.mul(row, stride), element)

        def out_run(run: ir.Value) -> ir.Value:
            return gep(b, out_row, b.mul(b.sub(run, first), I64(RUN)), element)

        def unpack_direct(run: ir.Value) -> None:
            write(weight.load_direct(pointers, run, weight.run_scale(row, run)), out_run(run))

        def unpack_copied(run: ir.Value) -> None:
            write(weight.load_copied(pointers, run, weight.run_scale(row, run)), run_buffer)
            copy(b, run_buffer, out_run(run), weight.run_length(run), element)

        for_range(b, first, direct_end, unpack_direct)
        for_range(b, direct_end, last, unpack_copied)

    for_range(b, start, stop, unpack_row)
    b.ret_void()
    add_shared(module, function)
    return str(module)
