"""Packed weights unpacked: bits go where they stood."""

from __future__ import annotations

from llvmlite import ir

from ..loops import ENTRY, add_function, add_shared, each
from .build import at, buffer, copy
from .instructions import HALF, LONG, Instructions, vector
from .kind import RUN, Packed
from .weight import Weight


def unpack(kind: Packed, use: Instructions) -> str:
    """``loop(start, stop, k, first, count, stride, values, bits, out)``: ``count`` runs of rows, from ``first`` on.

    Row i of the result starts at element i * stride of ``out``. Values are of ``kind.x``, a dtype of 16 or 32 bits.
    """
    module = ir.Module("maskpro_kernels")
    function, b = add_function(module, ENTRY, 6, 3)
    start, stop, k, first, count, stride, values, bits, out = function.args
    form = "halves" if use.halves and kind.values.itemsize == 2 else "words"
    weight = Weight(b, kind, use, form, values, bits, k)
    last, aside = b.add(first, count), buffer(b, weight.element, RUN)
    direct = weight.within(first, last)

    def write(vectors: list[ir.Value], pointer: ir.Value) -> None:
        for i, given in enumerate(vectors):
            if form == "words" and kind.values.itemsize == 2:
                given = b.trunc(given, vector(HALF, weight.lanes))
            b.store(given, at(b, pointer, LONG(i * weight.lanes), weight.element), align=1)

    def unpack_row(row: ir.Value) -> None:
        place, target = weight.row(row), at(b, out, b.mul(row, stride), weight.element)

        def target_of(run: ir.Value) -> ir.Value:
            return at(b, target, b.mul(b.sub(run, first), LONG(RUN)), weight.element)

        def unpack_copied(run: ir.Value) -> None:
            write(weight.copied(place, run), aside)
            copy(b, aside, target_of(run), weight.weights_of(run), weight.element)

        each(b, first, direct, lambda run: write(weight.direct(place, run), target_of(run)))
        each(b, direct, last, unpack_copied)

    each(b, start, stop, unpack_row)
    b.ret_void()
    add_shared(module, function)
    return str(module)
