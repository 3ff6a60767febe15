"""What products that take a weight row by row have in common, whatever they do with a row."""

from __future__ import annotations

from llvmlite import ir

from ...reference.packing import SCALED
from ..codegen import TYPES
from ..loops import ENTRY, add_function, add_shared, each, use_whole_registers
from .build import as_float32, at, divided_up, horizontal_sum, stored
from .instructions import LONG, Instructions
from .kind import Packed

# How far ahead values are asked for: the CPU's own prefetcher stops at each page
AHEAD_BYTES = 4096


class RowProduct:
    """``loop(start, stop, k, rows, *pointers, bias, out)``: rows start to stop of x @ weight.T + bias.

    Subclasses say what a row does, by ``add_row``.

    Args:
        kind: of which weight.
        use: the CPU's instructions.
        tokens: of x, and of out [tokens, rows].
        biased: whether there is a bias [rows], of ``kind.x`` as out is.
        pointers: how many others there are.
    """

    def __init__(self, kind: Packed, use: Instructions, tokens: int, biased: bool, pointers: int):
        self.kind, self.use, self.tokens, self.biased = kind, use, tokens, biased
        self.module = ir.Module("maskpro_kernels")
        self.function, self.b = add_function(self.module, ENTRY, 4, pointers + 2)
        use_whole_registers(self.function)
        self.start, self.stop, self.k, self.rows, *self.pointers, self.bias, self.out = self.function.args
        self.row_values = self.b.mul(self.b.sdiv(self.k, LONG(kind.m)), LONG(kind.n))
        # of a row
        self.scales_count = divided_up(self.b, self.row_values, SCALED)

    def add_row(self, row: ir.Value) -> None:
        raise NotImplementedError

    def assembly(self) -> str:
        """Of the module."""
        each(self.b, self.start, self.stop, self.add_row)
        self.b.ret_void()
        add_shared(self.module, self.function)
        return str(self.module)

    def scale(self, scales: ir.Value, row: ir.Value, block: ir.Value) -> ir.Value:
        """The float32 scale of a block of a row."""
        b, element = self.b, TYPES[self.kind.x]
        index = b.add(b.mul(row, self.scales_count), block)
        return as_float32(b, b.load(at(b, scales, index, element), typ=element, align=1), self.kind.x)

    def store(self, row: ir.Value, token: int, total: ir.Value) -> None:
        """Write the sum of a float32 vector, and the bias, to a token's place."""
        b, dtype = self.b, self.kind.x
        element, y = TYPES[dtype], horizontal_sum(self.b, total)
        if self.biased:
            bias = b.load(at(b, self.bias, row, element), typ=element, align=1)
            y = b.fadd(y, as_float32(b, bias, dtype))
        stored(b, y, at(b, self.out, b.add(b.mul(self.rows, LONG(token)), row), element), dtype)
