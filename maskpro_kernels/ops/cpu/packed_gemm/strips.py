"""Products with many tokens by pairs of bfloat16: a strip of 32 rows is expanded into the nearest cache for all tokens.

Of a strip some runs at a time are expanded row by row, then transposed: a vector has two columns of each of 16 rows.
VDPBF16PS multiplies it with two columns of one token. Each lane sums a row, so there is nothing to add up at the end.
"""

from __future__ import annotations

from llvmlite import ir

from ..codegen import ENTRY, I32, I64, add_function, add_shared, for_range, minimum, prefer_512_bit_vectors
from . import RUN, Packed
from .instructions import (
    FLOAT,
    I8,
    I16,
    LINE_BYTES,
    Instructions,
    as_float32,
    broadcast,
    buffer,
    copy,
    gep,
    prefetch,
    transposed,
    vector,
    zeros,
)
from .weight import Weight

LANES = 16

# Rows of a strip, and its vectors of rows
VECTORS = 2
STRIP = VECTORS * LANES

# Runs of a strip that are expanded at a time, and pairs of columns of a run
STRIP_RUNS = 16
RUN_PAIRS = RUN // 2

# Tokens that are multiplied at once: the sums of the first number fill the registers. Fewer are left in the end
TOKENS_AT_ONCE = (12, 4)

# Most tokens of a call, which have sums in memory
TOKENS = 512

PAIRS = vector(I32, LANES)
SUMS = vector(FLOAT, LANES)


def x_columns(k: int) -> int:
    """Number of columns that tokens are padded to: an odd number of runs, which spreads them over a cache's sets."""
    return (-(-k // RUN) | 1) * RUN


def strip_product(kind: Packed, isa: Instructions, biased: bool) -> str:
    """Code of ``loop(start, stop, k, rows, tokens, values, bits, scales, x, bias, out)`` for strips of rows.

    Strips start to stop, of STRIP rows each. bfloat16 x is [tokens, x_columns(k)], zeros beyond k, of at most TOKENS;
    other arguments are as in ``rows.float_product``.
    """
    return StripProduct(kind, isa, biased).assembly()


class StripProduct:
    """Builder of the function of ``strip_product``."""

    def __init__(self, kind: Packed, isa: Instructions, biased: bool):
        self.kind = kind
        self.isa = isa
        self.biased = biased
        self.module = ir.Module("maskpro_kernels")
        self.function, self.b = add_function(self.module, ENTRY, 5, 6)
        prefer_512_bit_vectors(self.function)
        self.start, self.stop, self.k, self.rows, self.tokens, *pointers = self.function.args
        values, bits, scales, self.x, self.bias, self.out = pointers
        b = self.b
        self.weight = Weight(b, kind, isa, "i16", values, bits, self.k, scales)
        self.x_pairs = b.mul(b.or_(self.weight.runs, I64(1)), I64(RUN_PAIRS))
        # [STRIP, STRIP_RUNS * RUN_PAIRS] pairs; the same transposed; sums [tokens, STRIP]
        self.expanded = buffer(b, I32, STRIP * STRIP_RUNS * RUN_PAIRS)
        self.columns = buffer(b, I32, STRIP * STRIP_RUNS * RUN_PAIRS)
        self.sums = buffer(b, FLOAT, STRIP * (TOKENS + TOKENS_AT_ONCE[-1]))
        self.bias_buffer = buffer(b, I16, STRIP)
        self.out_buffer = buffer(b, I16, STRIP)

    def assembly(self) -> str:
        for_range(self.b, self.start, self.stop, self._add_strip)
        self.b.ret_void()
        add_shared(self.module, self.function)
        return str(self.module)

    def _add_strip(self, strip: ir.Value) -> None:
        b = self.b
        first_row = b.mul(strip, I64(STRIP))
        many, few = TOKENS_AT_ONCE
        many_end = b.sub(self.tokens, b.srem(self.tokens, I64(many)))

        def clear(i: ir.Value) -> None:
            b.store(zeros(SUMS), gep(b, self.sums, b.mul(i, I64(LANES)), FLOAT), align=64)

        def multiply_runs(run: ir.Value) -> None:
            run_end = minimum(b, self.weight.runs, b.add(run, I64(STRIP_RUNS)))
            self._expand(first_row, run, run_end)
            pairs = b.mul(b.sub(run_end, run), I64(RUN_PAIRS))
            for_range(b, I64(0), pairs, self._transpose, step=LANES)
            first_pair = b.mul(run, I64(RUN_PAIRS))
            for_range(b, I64(0), many_end, lambda token: self._multiply(token, many, first_pair, pairs), step=many)
            for_range(b, many_end, self.tokens, lambda token: self._multiply(token, few, first_pair, pairs), step=few)

        for_range(b, I64(0), b.mul(b.add(self.tokens, I64(few)), I64(VECTORS)), clear)
        for_range(b, I64(0), self.weight.runs, multiply_runs, step=STRIP_RUNS)
        self._write(first_row)

    def _expand(self, first_row: ir.Value, first_run: ir.Value, run_end: ir.Value) -> None:
        """Expand the weights of a strip, runs [first_run, run_end) of each row, into their columns."""
        b = self.b
        weight = self.weight
        rows = minimum(b, I64(STRIP), b.sub(self.rows, first_row))
        more = b.icmp_signed("<", run_end, weight.runs)
        run_bytes = self.kind.elements_per_run * self.kind.values.itemsize

        def expand_row(i: ir.Value) -> None:
            row = b.add(first_row, i)
            # the next runs, of this strip or of the next one
            next_values, next_bits = weight.row_pointers(b.select(more, row, b.add(row, I64(STRIP))))
            next_run = b.select(more, run_end, I64(0))
            sources = [(next_values, run_bytes)]
            if not self.kind.whole:
                sources.append((next_bits, RUN // 8))
            for pointer, size in sources:
                source = gep(b, pointer, b.mul(next_run, I64(size)), I8)
                for offset in range(0, STRIP_RUNS * size, LINE_BYTES):
                    prefetch(b, gep(b, source, I64(offset), I8))

            def write(vectors: list[ir.Value], run: ir.Value) -> None:
                index = b.add(b.mul(i, I64(STRIP_RUNS)), b.sub(run, first_run))
                b.store(vectors[0], gep(b, self.expanded, b.mul(index, I64(RUN_PAIRS)), I32), align=64)

            weight.load_runs(row, first_run, run_end, write)

        for_range(b, I64(0), rows, expand_row)

    def _transpose(self, first: ir.Value) -> None:
        """Transpose LANES pairs of each row of the expanded strip, from ``first`` on."""
        b = self.b
        for part in range(VECTORS):
            rows = []
            for i in range(LANES):
                index = b.add(first, I64((part * LANES + i) * STRIP_RUNS * RUN_PAIRS))
                rows.append(b.load(gep(b, self.expanded, index, I32), typ=PAIRS, align=64))
            for i, column in enumerate(transposed(b, rows)):
                b.store(column, self._column_pointer(b.add(first, I64(i)), part), align=64)

    def _column_pointer(self, pair: ir.Value, part: int) -> ir.Value:
        b = self.b
        return gep(b, self.columns, b.add(b.mul(pair, I64(STRIP)), I64(part * LANES)), I32)

    def _sum_pointer(self, token: ir.Value, part: int) -> ir.Value:
        b = self.b
        return gep(b, self.sums, b.add(b.mul(token, I64(STRIP)), I64(part * LANES)), FLOAT)

    def _multiply(self, first_token: ir.Value, count: int, first_pair: ir.Value, pairs: ir.Value) -> None:
        """Add the products of the expanded columns with ``count`` tokens to their sums."""
        b = self.b
        last = b.sub(self.tokens, I64(1))
        tokens = [b.add(first_token, I64(i)) for i in range(count)]
        # instead of tokens beyond the last one it is multiplied again
        x_indices = [b.add(b.mul(minimum(b, token, last), self.x_pairs), first_pair) for token in tokens]
        x_pointers = [gep(b, self.x, index, I32) for index in x_indices]
        sum_pointers = [self._sum_pointer(token, part) for token in tokens for part in range(VECTORS)]
        initial = [b.load(pointer, typ=SUMS, align=64) for pointer in sum_pointers]
        before = b.block
        loop = b.append_basic_block()
        done = b.append_basic_block()
        b.branch(loop)
        b.position_at_end(loop)
        pair = b.phi(I64)
        pair.add_incoming(I64(0), before)
        # LLVM would leave variables of so many sums in memory
        totals = [b.phi(SUMS) for _ in initial]
        for total, value in zip(totals, initial, strict=True):
            total.add_incoming(value, before)
        weights = [b.load(self._column_pointer(pair, part), typ=PAIRS, align=64) for part in range(VECTORS)]
        results = []
        for i, pointer in enumerate(x_pointers):
            x = broadcast(b, b.load(gep(b, pointer, pair, I32), typ=I32, align=4), LANES)
            for part, weight in enumerate(weights):
                results.append(self.isa.dot_bfloat16(b, totals[VECTORS * i + part], weight, x))
        following = b.add(pair, I64(1))
        pair.add_incoming(following, loop)
        for total, result in zip(totals, results, strict=True):
            total.add_incoming(result, loop)
        b.cbranch(b.icmp_signed("<", following, pairs), loop, done)
        b.position_at_end(done)
        for pointer, result in zip(sum_pointers, results, strict=True):
            b.store(result, pointer, align=64)

    def _write(self, first_row: ir.Value) -> None:
        """Write the sums of a strip, token by token."""
        b = self.b
        rows = minimum(b, I64(STRIP), b.sub(self.rows, first_row))
        whole = b.icmp_signed("==", rows, I64(STRIP))
        if self.biased:
            copy(b, gep(b, self.bias, first_row, I16), self.bias_buffer, rows, I16)

        def write_token(token: ir.Value) -> None:
            pointer = gep(b, self.out, b.add(b.mul(token, self.rows), first_row), I16)
            results = []
            for part in range(VECTORS):
                y = b.load(self._sum_pointer(token, part), typ=SUMS, align=64)
                if self.biased:
                    bias_pointer = gep(b, self.bias_buffer, I64(part * LANES), I16)
                    bias = b.load(bias_pointer, typ=vector(I16, LANES), align=32)
                    y = b.fadd(y, as_float32(b, bias, self.kind.x))
                results.append(self.isa.round_to_bfloat16(b, y))
            with b.if_else(whole) as (then, otherwise):
                with then:
                    for part, y in enumerate(results):
                        b.store(y, gep(b, pointer, I64(part * LANES), I16), align=1)
                with otherwise:
                    for part, y in enumerate(results):
                        b.store(y, gep(b, self.out_buffer, I64(part * LANES), I16), align=32)
                    copy(b, self.out_buffer, pointer, rows, I16)

        for_range(b, I64(0), self.tokens, write_token)
