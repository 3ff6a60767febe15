"""Products with many tokens by AMX, whose instructions multiply matrices of 16 x 32 bfloat16.

Weights, 32 rows by 16 runs at a time, are placed in memory that stays in the nearest cache, and multiplied with all
tokens. The tokens are reordered before, by 16 tokens and two columns.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from ..codegen import ENTRY, LONG, TYPES, WORD, add_function, add_shared, each, smaller, use_whole_registers
from . import RUN, Packed
from .instructions import (
    BFLOAT,
    BYTE,
    FLOAT,
    HALF,
    Instructions,
    as_float32,
    at,
    buffer,
    copy,
    divided_up,
    intrinsic,
    prefetch,
    scale_at,
    vector,
    zeros,
)
from .weight import Weight

# Rows, tokens and bytes of a row of a tile
TILE = 16
TILE_BYTES = 64 * TILE

# Rows that a product processes at a time, and their runs
STRIP = 2 * TILE
CHUNK = 16

# Most tokens with sums in memory: 32 rows of float32 sums fit into the next cache
TOKENS = 512

# Tiles of sums: for 16 rows and 16 tokens, for the next 16 rows, for the next 16 tokens, and for both
SUMS = (0, 1, 2, 3)
WEIGHTS = (4, 5)
X = (6, 7)

# All eight tiles of 16 rows of 64 bytes, by palette 1
TILES = bytes([1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[16] * 8, *[0] * 8])


def transposed(b: ir.IRBuilder, rows: Sequence[ir.Value]) -> list[ir.Value]:
    """Columns of a square matrix of vectors; its size is a power of two."""
    rows = list(rows)
    count = len(rows)
    step = 1
    while step < count:
        order = [
            [(i & ~step) + (count if i & step else 0) + (step if high else 0) for i in range(count)] for high in (0, 1)
        ]
        masks = [ir.Constant(vector(WORD, count), each_) for each_ in order]
        for i in range(count):
            if not i & step:
                one = rows[i]
                other = rows[i + step]
                rows[i], rows[i + step] = (b.shuffle_vector(one, other, mask) for mask in masks)
        step *= 2
    return rows


def laid_out() -> str:
    """Code of ``loop(start, stop, k, tokens, x, out)``: reorder bfloat16 x [tokens, k], tiles start to stop of tokens.

    out is [tiles, runs of a row, TILE pairs of columns, TILE tokens, 2], zeros beyond k; tokens beyond the last repeat
    the last one.
    """
    module = ir.Module("maskpro_kernels")
    function, b = add_function(module, ENTRY, 4, 2)
    start, stop, k, tokens, x, out = function.args
    whole = b.sdiv(k, LONG(RUN))
    runs = divided_up(b, k, RUN)
    aside = buffer(b, HALF, RUN)
    last = b.sub(tokens, LONG(1))

    def lay_tile(tile: ir.Value) -> None:
        first = b.mul(tile, LONG(TILE))
        rows = [at(b, x, b.mul(smaller(b, b.add(first, LONG(i)), last), k), HALF) for i in range(TILE)]

        def lay(run: ir.Value, given: list[ir.Value]) -> None:
            target = at(b, out, b.mul(b.add(b.mul(tile, runs), run), LONG(TILE_BYTES)), BYTE)
            for i, column in enumerate(transposed(b, given)):
                b.store(column, at(b, target, LONG(64 * i), BYTE), align=64)

        def loaded(pointer: ir.Value) -> ir.Value:
            return b.load(pointer, typ=vector(WORD, TILE), align=1)

        def lay_whole(run: ir.Value) -> None:
            lay(run, [loaded(at(b, row, b.mul(run, LONG(RUN)), HALF)) for row in rows])

        def lay_rest(run: ir.Value) -> None:
            done = b.mul(run, LONG(RUN))
            given = []
            for row in rows:
                b.store(zeros(ir.ArrayType(HALF, RUN)), aside)
                copy(b, at(b, row, done, HALF), aside, b.sub(k, done), HALF)
                given.append(loaded(aside))
            lay(run, given)

        each(b, LONG(0), whole, lay_whole)
        each(b, whole, runs, lay_rest)

    each(b, start, stop, lay_tile)
    b.ret_void()
    add_shared(module, function)
    return str(module)


def product(kind: Packed, use: Instructions, biased: bool) -> str:
    """Code of ``loop(start, stop, k, rows, first, tokens, values, bits, scales, x, bias, out)`` for strips of rows.

    Strips start to stop, of STRIP rows each. x is from ``laid_out``; other arguments as in ``rows.product``. It
    multiplies ``tokens`` tokens from ``first`` on, at most TOKENS; ``first`` is a multiple of TILE.
    """
    return _Product(kind, use, biased).assembly()


class _Product:
    """Builder of the function of ``product``."""

    def __init__(self, kind: Packed, use: Instructions, biased: bool):
        self.kind = kind
        self.biased = biased
        self.module = ir.Module("maskpro_kernels")
        self.function, self.b = add_function(self.module, ENTRY, 6, 6)
        use_whole_registers(self.function)
        self.start, self.stop, self.k, self.rows, self.first, self.tokens, *pointers = self.function.args
        values, bits, self.scales, self.x, self.bias, self.out = pointers
        b = self.b
        self.weight = Weight(b, kind, use, "halves", values, bits, self.k)
        self.row_scales = divided_up(b, self.weight.row_values, kind.group)
        # [CHUNK, STRIP, RUN] weights, and sums [tiles of tokens, STRIP, TILE]
        self.placed = buffer(b, HALF, CHUNK * STRIP * RUN)
        self.sums = buffer(b, FLOAT, STRIP * TOKENS)
        self.bias_aside = buffer(b, TYPES[kind.x], STRIP)
        self.out_aside = buffer(b, TYPES[kind.x], STRIP)

    def assembly(self) -> str:
        b = self.b
        before = buffer(b, BYTE, 64)
        own = buffer(b, BYTE, 64)
        b.store(ir.Constant(ir.ArrayType(BYTE, 64), bytearray(TILES)), own)
        # other libraries of the process may depend on their configuration of tiles
        intrinsic(b, "llvm.x86.sttilecfg", ir.VoidType(), before)
        intrinsic(b, "llvm.x86.ldtilecfg", ir.VoidType(), own)
        each(b, self.start, self.stop, self._strip)
        intrinsic(b, "llvm.x86.ldtilecfg", ir.VoidType(), before)
        b.ret_void()
        add_shared(self.module, self.function)
        return str(self.module)

    def _strip(self, strip: ir.Value) -> None:
        b = self.b
        first = b.mul(strip, LONG(STRIP))
        tiles = divided_up(b, self.tokens, TILE)

        def clear(i: ir.Value) -> None:
            b.store(zeros(vector(FLOAT, TILE)), at(b, self.sums, b.mul(i, LONG(TILE)), FLOAT), align=64)

        def chunk(run: ir.Value) -> None:
            until = smaller(b, self.weight.runs, b.add(run, LONG(CHUNK)))
            self._place(first, run, until)
            pairs = b.mul(b.sdiv(tiles, LONG(2)), LONG(2))
            each(b, LONG(0), pairs, lambda tile: self._multiply(tile, 2, run, until), by=2)
            each(b, pairs, tiles, lambda tile: self._multiply(tile, 1, run, until))

        each(b, LONG(0), b.mul(tiles, LONG(STRIP)), clear)
        each(b, LONG(0), self.weight.runs, chunk, by=CHUNK)
        each(b, LONG(0), tiles, lambda tile: self._write(first, tile))

    def _place(self, first: ir.Value, run: ir.Value, until: ir.Value) -> None:
        """Place the weights of a strip, runs [run, until) of each row, in their columns."""
        b = self.b
        weight = self.weight
        rows = smaller(b, LONG(STRIP), b.sub(self.rows, first))
        direct = weight.within(run, until)
        more = b.icmp_signed("<", until, weight.runs)

        def place_row(i: ir.Value) -> None:
            row = b.add(first, i)
            place = weight.row(row)
            # the next runs, of this strip or of the next one
            following = weight.row(b.select(more, row, b.add(row, LONG(STRIP))))
            ahead = weight.values_of(following, b.select(more, until, LONG(0)))

            def write(vectors: list[ir.Value], here: ir.Value) -> None:
                at_run = b.mul(b.add(b.mul(b.sub(here, run), LONG(STRIP)), i), LONG(RUN))
                b.store(vectors[0], at(b, self.placed, at_run, HALF), align=64)

            def place_direct(here: ir.Value) -> None:
                done = b.mul(b.sub(here, run), LONG(self.kind.kept // self.kind.in_byte))
                prefetch(b, at(b, ahead, done, weight.element))
                write(weight.direct(place, here, self._scale(row, here)), here)

            each(b, run, direct, place_direct)
            each(b, direct, until, lambda here: write(weight.copied(place, here, self._scale(row, here)), here))

        each(b, LONG(0), rows, place_row)

    def _scale(self, row: ir.Value, run: ir.Value) -> ir.Value | None:
        if not self.kind.scaled:
            return None
        b = self.b
        index = b.add(b.mul(row, self.row_scales), b.sdiv(run, LONG(self.kind.scaled_runs)))
        return scale_at(b, self.scales, index, self.kind)

    def _tile(self, name: str, number: int, pointer: ir.Value) -> None:
        """Load or store a tile with adjacent rows."""
        intrinsic(self.b, f"llvm.x86.{name}64", ir.VoidType(), BYTE(number), pointer, LONG(64))

    def _multiply(self, tile: ir.Value, count: int, run: ir.Value, until: ir.Value) -> None:
        """Add the products of the placed runs with ``count`` tiles of tokens to their sums."""
        b = self.b
        numbers = SUMS[: 2 * count]
        sums = at(b, self.sums, b.mul(tile, LONG(STRIP * TILE)), FLOAT)
        places = [at(b, sums, LONG(TILE * TILE * i), FLOAT) for i in range(len(numbers))]
        all_tiles = b.add(b.sdiv(self.first, LONG(TILE)), tile)
        for number, place in zip(numbers, places, strict=True):
            self._tile("tileloadd", number, place)

        def one(here: ir.Value) -> None:
            weights = at(b, self.placed, b.mul(b.sub(here, run), LONG(STRIP * RUN)), HALF)
            for i, number in enumerate(WEIGHTS):
                self._tile("tileloadd", number, at(b, weights, LONG(TILE * RUN * i), HALF))
            for i, number in enumerate(X[:count]):
                at_run = b.add(b.mul(b.add(all_tiles, LONG(i)), self.weight.runs), here)
                self._tile("tileloadd", number, at(b, self.x, b.mul(at_run, LONG(TILE_BYTES)), BYTE))
            for number in numbers:
                operands = BYTE(number), BYTE(WEIGHTS[number % 2]), BYTE(X[number // 2])
                intrinsic(b, "llvm.x86.tdpbf16ps", ir.VoidType(), *operands)

        each(b, run, until, one)
        for number, place in zip(numbers, places, strict=True):
            self._tile("tilestored", number, place)

    def _write(self, first: ir.Value, tile: ir.Value) -> None:
        """Write the sums of a strip and a tile of tokens, token by token."""
        b = self.b
        element = TYPES[self.kind.x]
        rows = smaller(b, LONG(STRIP), b.sub(self.rows, first))
        whole = b.icmp_signed("==", rows, LONG(STRIP))
        token = b.mul(tile, LONG(TILE))
        tokens = smaller(b, LONG(TILE), b.sub(self.tokens, token))
        sums = at(b, self.sums, b.mul(tile, LONG(STRIP * TILE)), FLOAT)
        if self.biased:
            copy(b, at(b, self.bias, first, element), self.bias_aside, rows, element)
        for half in range(2):
            loaded = [
                b.load(at(b, sums, LONG((half * TILE + i) * TILE), FLOAT), typ=vector(FLOAT, TILE), align=64)
                for i in range(TILE)
            ]
            columns = transposed(b, loaded)
            if self.biased:
                given = b.load(at(b, self.bias_aside, LONG(half * TILE), element), typ=vector(element, TILE), align=1)
                columns = [b.fadd(column, as_float32(b, given, self.kind.x)) for column in columns]
            own = b.sub(rows, LONG(half * TILE))
            for i, column in enumerate(columns):
                target = b.add(
                    b.mul(b.add(b.add(self.first, token), LONG(i)), self.rows), b.add(first, LONG(half * TILE))
                )
                pointer = at(b, self.out, target, element)
                rounded = b.bitcast(b.fptrunc(column, vector(BFLOAT, TILE)), vector(element, TILE))
                with b.if_then(b.icmp_signed("<", LONG(i), tokens)):
                    with b.if_else(whole) as (all_, some):
                        with all_:
                            b.store(rounded, pointer, align=1)
                        with some:
                            b.store(rounded, self.out_aside, align=1)
                            copy(b, self.out_aside, pointer, smaller(b, LONG(TILE), own), element)
