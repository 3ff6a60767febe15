"""Products with many tokens by AMX, whose instructions multiply tiles of 16 x 32 bfloat16.

Weights, a strip of 32 rows by 16 runs at a time, are expanded into memory that stays in the nearest cache, and
multiplied with all tokens. The tokens are reordered before, by 16 tokens and two columns.
"""

from __future__ import annotations

from llvmlite import ir

from ..codegen import ENTRY, I32, I64, TYPES, add_function, add_shared, for_range, minimum, prefer_512_bit_vectors
from . import RUN, Packed
from .instructions import (
    FLOAT,
    I8,
    I16,
    Instructions,
    as_float32,
    buffer,
    ceil_div,
    copy,
    gep,
    intrinsic,
    prefetch,
    transposed,
    vector,
    zeros,
)
from .weight import Weight

# Rows of a tile, of 64 bytes each, which are rows of the weight or tokens
TILE = 16
ROW_BYTES = 64
TILE_BYTES = ROW_BYTES * TILE

# Rows that a product processes at a time, and their runs
STRIP = 2 * TILE
STRIP_RUNS = 16

# Most tokens with sums in memory: 32 rows of float32 sums fit into the next cache
TOKENS = 512

# Tile registers of sums: for 16 rows and 16 tokens, for the next 16 rows, for the next 16 tokens, and for both
SUM_TILES = (0, 1, 2, 3)
WEIGHT_TILES = (4, 5)
X_TILES = (6, 7)

# Operand of LDTILECFG: all eight tiles of 16 rows of 64 bytes, by palette 1
CONFIGURATION = bytes([1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[16] * 8, *[0] * 8])


def laid_out() -> str:
    """Code of ``loop(start, stop, k, tokens, x, out)``: reorder bfloat16 x [tokens, k], tiles start to stop of tokens.

    out is [tiles, runs of a row, TILE pairs of columns, TILE tokens, 2], zeros beyond k; tokens beyond the last repeat
    the last one.
    """
    module = ir.Module("maskpro_kernels")
    function, b = add_function(module, ENTRY, 4, 2)
    start, stop, k, tokens, x, out = function.args
    whole_runs = b.sdiv(k, I64(RUN))
    runs = ceil_div(b, k, RUN)
    run_buffer = buffer(b, I16, RUN)
    last = b.sub(tokens, I64(1))

    def reorder_tile(tile: ir.Value) -> None:
        first = b.mul(tile, I64(TILE))
        rows = [gep(b, x, b.mul(minimum(b, b.add(first, I64(i)), last), k), I16) for i in range(TILE)]

        def write_transposed(run: ir.Value, pairs: list[ir.Value]) -> None:
            target = gep(b, out, b.mul(b.add(b.mul(tile, runs), run), I64(TILE_BYTES)), I8)
            for i, column in enumerate(transposed(b, pairs)):
                b.store(column, gep(b, target, I64(ROW_BYTES * i), I8), align=64)

        def load_pairs(pointer: ir.Value) -> ir.Value:
            return b.load(pointer, typ=vector(I32, TILE), align=1)

        def reorder_whole(run: ir.Value) -> None:
            write_transposed(run, [load_pairs(gep(b, row, b.mul(run, I64(RUN)), I16)) for row in rows])

        def reorder_copied(run: ir.Value) -> None:
            first_column = b.mul(run, I64(RUN))
            pairs = []
            for row in rows:
                b.store(zeros(ir.ArrayType(I16, RUN)), run_buffer)
                copy(b, gep(b, row, first_column, I16), run_buffer, b.sub(k, first_column), I16)
                pairs.append(load_pairs(run_buffer))
            write_transposed(run, pairs)

        for_range(b, I64(0), whole_runs, reorder_whole)
        for_range(b, whole_runs, runs, reorder_copied)

    for_range(b, start, stop, reorder_tile)
    b.ret_void()
    add_shared(module, function)
    return str(module)


def tile_product(kind: Packed, isa: Instructions, biased: bool) -> str:
    """Code of ``loop(start, stop, k, rows, first, tokens, values, bits, scales, x, bias, out)`` for strips of rows.

    Strips start to stop, of STRIP rows each. x is from ``laid_out``; other arguments as in ``rows.float_product``. It
    multiplies ``tokens`` tokens from ``first`` on, at most TOKENS; ``first`` is a multiple of TILE.
    """
    return TileProduct(kind, isa, biased).assembly()


class TileProduct:
    """Builder of the function of ``tile_product``."""

    def __init__(self, kind: Packed, isa: Instructions, biased: bool):
        self.kind = kind
        self.isa = isa
        self.biased = biased
        self.module = ir.Module("maskpro_kernels")
        self.function, self.b = add_function(self.module, ENTRY, 6, 6)
        prefer_512_bit_vectors(self.function)
        self.start, self.stop, self.k, self.rows, self.first, self.tokens, *pointers = self.function.args
        values, bits, scales, self.x, self.bias, self.out = pointers
        b = self.b
        self.weight = Weight(b, kind, isa, "i16", values, bits, self.k, scales)
        # [STRIP_RUNS, STRIP, RUN] weights, and sums [tiles of tokens, STRIP, TILE]
        self.expanded = buffer(b, I16, STRIP_RUNS * STRIP * RUN)
        self.sums = buffer(b, FLOAT, STRIP * TOKENS)
        self.bias_buffer = buffer(b, TYPES[kind.x], STRIP)
        self.out_buffer = buffer(b, TYPES[kind.x], STRIP)

    def assembly(self) -> str:
        b = self.b
        previous = buffer(b, I8, 64)
        configuration = buffer(b, I8, 64)
        b.store(ir.Constant(ir.ArrayType(I8, 64), bytearray(CONFIGURATION)), configuration)
        # other libraries of the process may depend on their configuration of tiles
        intrinsic(b, "llvm.x86.sttilecfg", ir.VoidType(), previous)
        intrinsic(b, "llvm.x86.ldtilecfg", ir.VoidType(), configuration)
        for_range(b, self.start, self.stop, self._add_strip)
        intrinsic(b, "llvm.x86.ldtilecfg", ir.VoidType(), previous)
        b.ret_void()
        add_shared(self.module, self.function)
        return str(self.module)

    def _add_strip(self, strip: ir.Value) -> None:
        b = self.b
        first_row = b.mul(strip, I64(STRIP))
        tiles = ceil_div(b, self.tokens, TILE)

        def clear(i: ir.Value) -> None:
            b.store(zeros(vector(FLOAT, TILE)), gep(b, self.sums, b.mul(i, I64(TILE)), FLOAT), align=64)

        def multiply_runs(run: ir.Value) -> None:
            run_end = minimum(b, self.weight.runs, b.add(run, I64(STRIP_RUNS)))
            self._expand(first_row, run, run_end)
            paired = b.mul(b.sdiv(tiles, I64(2)), I64(2))
            for_range(b, I64(0), paired, lambda tile: self._multiply(tile, 2, run, run_end), step=2)
            for_range(b, paired, tiles, lambda tile: self._multiply(tile, 1, run, run_end))

        for_range(b, I64(0), b.mul(tiles, I64(STRIP)), clear)
        for_range(b, I64(0), self.weight.runs, multiply_runs, step=STRIP_RUNS)
        for_range(b, I64(0), tiles, lambda tile: self._write(first_row, tile))

    def _expand(self, first_row: ir.Value, first_run: ir.Value, run_end: ir.Value) -> None:
        """Expand the weights of a strip, runs [first_run, run_end) of each row, into their columns."""
        b = self.b
        weight = self.weight
        rows = minimum(b, I64(STRIP), b.sub(self.rows, first_row))
        more = b.icmp_signed("<", run_end, weight.runs)

        def expand_row(i: ir.Value) -> None:
            row = b.add(first_row, i)
            # the next runs, of this strip or of the next one
            next_pointers = weight.row_pointers(b.select(more, row, b.add(row, I64(STRIP))))
            next_values = weight.run_values(next_pointers, b.select(more, run_end, I64(0)))

            def write(vectors: list[ir.Value], run: ir.Value) -> None:
                index = b.mul(b.add(b.mul(b.sub(run, first_run), I64(STRIP)), i), I64(RUN))
                b.store(vectors[0], gep(b, self.expanded, index, I16), align=64)

            def prefetch_next(run: ir.Value) -> None:
                offset = b.mul(b.sub(run, first_run), I64(self.kind.elements_per_run))
                prefetch(b, gep(b, next_values, offset, weight.element))

            weight.load_runs(row, first_run, run_end, write, prefetch_next)

        for_range(b, I64(0), rows, expand_row)

    def _move_tile(self, instruction: str, number: int, pointer: ir.Value) -> None:
        """Load or store a tile register with adjacent rows in memory."""
        intrinsic(self.b, f"llvm.x86.{instruction}64", ir.VoidType(), I8(number), pointer, I64(ROW_BYTES))

    def _multiply(self, tile: ir.Value, count: int, first_run: ir.Value, run_end: ir.Value) -> None:
        """Add the products of the expanded runs with ``count`` tiles of tokens to their sums."""
        b = self.b
        numbers = SUM_TILES[: 2 * count]
        sums = gep(b, self.sums, b.mul(tile, I64(STRIP * TILE)), FLOAT)
        pointers = [gep(b, sums, I64(TILE * TILE * i), FLOAT) for i in range(len(numbers))]
        # the number of the tile among those of all tokens
        x_tile = b.add(b.sdiv(self.first, I64(TILE)), tile)
        for number, pointer in zip(numbers, pointers, strict=True):
            self._move_tile("tileloadd", number, pointer)

        def multiply_run(run: ir.Value) -> None:
            weights = gep(b, self.expanded, b.mul(b.sub(run, first_run), I64(STRIP * RUN)), I16)
            for i, number in enumerate(WEIGHT_TILES):
                self._move_tile("tileloadd", number, gep(b, weights, I64(TILE * RUN * i), I16))
            for i, number in enumerate(X_TILES[:count]):
                index = b.add(b.mul(b.add(x_tile, I64(i)), self.weight.runs), run)
                self._move_tile("tileloadd", number, gep(b, self.x, b.mul(index, I64(TILE_BYTES)), I8))
            for number in numbers:
                operands = I8(number), I8(WEIGHT_TILES[number % 2]), I8(X_TILES[number // 2])
                intrinsic(b, "llvm.x86.tdpbf16ps", ir.VoidType(), *operands)

        for_range(b, first_run, run_end, multiply_run)
        for number, pointer in zip(numbers, pointers, strict=True):
            self._move_tile("tilestored", number, pointer)

    def _write(self, first_row: ir.Value, tile: ir.Value) -> None:
        """Write the sums of a strip and a tile of tokens, token by token."""
        b = self.b
        element = TYPES[self.kind.x]
        rows = minimum(b, I64(STRIP), b.sub(self.rows, first_row))
        whole = b.icmp_signed("==", rows, I64(STRIP))
        first_token = b.mul(tile, I64(TILE))
        tokens = minimum(b, I64(TILE), b.sub(self.tokens, first_token))
        sums = gep(b, self.sums, b.mul(tile, I64(STRIP * TILE)), FLOAT)
        if self.biased:
            copy(b, gep(b, self.bias, first_row, element), self.bias_buffer, rows, element)
        for half in range(2):
            loaded = [
                b.load(gep(b, sums, I64((half * TILE + i) * TILE), FLOAT), typ=vector(FLOAT, TILE), align=64)
                for i in range(TILE)
            ]
            columns = transposed(b, loaded)
            if self.biased:
                bias = b.load(gep(b, self.bias_buffer, I64(half * TILE), element), typ=vector(element, TILE), align=1)
                columns = [b.fadd(column, as_float32(b, bias, self.kind.x)) for column in columns]
            half_rows = b.sub(rows, I64(half * TILE))
            for i, column in enumerate(columns):
                out_row = b.mul(b.add(b.add(self.first, first_token), I64(i)), self.rows)
                pointer = gep(b, self.out, b.add(out_row, b.add(first_row, I64(half * TILE))), element)
                rounded = self.isa.round_to_bfloat16(b, column)
                with b.if_then(b.icmp_signed("<", I64(i), tokens)):
                    with b.if_else(whole) as (then, otherwise):
                        with then:
                            b.store(rounded, pointer, align=1)
                        with otherwise:
                            b.store(rounded, self.out_buffer, align=1)
                            copy(b, self.out_buffer, pointer, minimum(b, I64(TILE), half_rows), element)
