"""Products with packed weights, and unpacking, by compiled code.

CPU, dtypes and number of tokens determine how a product is computed, see ``way``. Code is compiled once, stored on
disk, and compared with torch's product before its first use.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear

from ... import reference
from ...pattern import as_bitmask, bitmask_of, codes_of
from .. import cache, cpu_multiplies
from ..loops import run, warn_of_failure
from . import RUN, Packed

if TYPE_CHECKING:
    from .instructions import Instructions

# Most tokens of a product in registers, without tiles
FEW = 16
# Most tokens for which registers are faster than tiles, for 16-bit values and for int8
FEWER = 4

# Bytes that stay in a core's cache: of an unpacked block, and of tokens for tiles
CACHED_BYTES = 1 << 20
# Fewest tokens between two placements of the weights, even if fewer fit into the cache
LEAST_TOKENS = 128

# (values, bitmask, scales or None)
Parts = tuple[Tensor, Tensor, Tensor | None]

# Computes a product of (x, parts, bias)
Runner = Callable[[Tensor, Parts, Tensor | None], Tensor]

# Unpacks (parts, first run, number of runs)
Unpacked = Callable[[Parts, int, int], Tensor]

# Fewest weights for another thread: starting it takes as long as one thread for this many
SHARED_WEIGHTS = 1 << 16


@functools.cache
def available() -> Instructions | None:
    """Best instruction set of this CPU for packed weights, or None."""
    # imported here and below, since it loads LLVM
    from .. import machine
    from . import instructions

    return instructions.chosen(machine.features())


def compiled(name: str, arguments: int, build: Callable[..., str], *made_of) -> Callable[..., None]:
    """Compile the code of ``build(*made_of)`` to ``loop(count, threads, *arguments)``."""
    from .. import machine

    features = sorted(feature for feature, has in machine.features().items() if has)
    code, _ = cache.compiled(name, (made_of, features), lambda: (machine.object_code(build(*made_of)), ()))
    return machine.loaded_loop(code, arguments)


def threads(weights: int) -> int:
    return torch.get_num_threads() if weights >= SHARED_WEIGHTS else 1


@functools.cache
def unpacker(kind: Packed) -> Unpacked | None:
    """Return ``unpacked(parts, first, count)``, ``count`` runs of all rows from ``first``, or None."""
    use = available()
    if use is None:
        return None
    if kind.scaled and kind.scaled_runs is None:
        plain = unpacker(Packed(kind.n, kind.m, kind.x, kind.x))

        def dequantized(parts: Parts, first: int, count: int) -> Tensor:
            values, bitmask, scales = parts
            return plain((reference.dequantized(values, scales, kind.x), bitmask, None), first, count)

        return None if plain is None else dequantized
    try:
        from . import weight

        unpacked = _unpacked_by(compiled("packed_unpack", 8, weight.unpack, kind, use), kind)
        _check_unpacked(unpacked, kind)
    except Exception as error:
        warn_of_failure(error, "maskpro_kernels unpacks more slowly")
        return None
    return unpacked


def _unpacked_by(loop: Callable[..., None], kind: Packed) -> Unpacked:
    def unpacked(parts: Parts, first: int, count: int) -> Tensor:
        values, bitmask, scales = parts
        rows = values.shape[0]
        k = values.shape[1] * kind.in_byte // kind.n * kind.m
        columns = min(RUN * count, k - RUN * first)
        out = torch.empty((rows, columns), dtype=kind.x, device="cpu")
        places = values.data_ptr(), bitmask.data_ptr(), _pointer(scales), out.data_ptr()
        loop(rows, threads(rows * columns), k, first, count, columns, *places)
        return out

    return unpacked


def _check_unpacked(unpacked: Unpacked, kind: Packed) -> None:
    """Raise unless ``unpacked`` gives the reference's bits for a sample."""
    generator = torch.Generator("cpu").manual_seed(0)
    rows = 5
    groups = 3 * RUN // kind.m + kind.in_byte
    scores = torch.rand((rows, groups, kind.m), generator=generator, device="cpu")
    bitmask = bitmask_of(reference.group_top_n_mask(scores, n=kind.n), kind.m)
    integers = reference.INTEGERS[kind.x.itemsize]
    kept = groups * kind.n
    shape = (rows, kept * kind.values.itemsize // kind.in_byte)
    scales = None
    values = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8, device="cpu").view(kind.values)
    if kind.scaled:
        scales = torch.rand((rows, -(-kept // kind.group)), generator=generator, device="cpu").to(kind.x)
    parts = values, bitmask, scales
    given = values if scales is None else reference.dequantized(values, scales, kind.x)
    expected = reference.unpack_nm(given, bitmask, kind.n, kind.m)
    for first, count in ((0, 4), (1, 2)):
        columns = slice(RUN * first, RUN * (first + count))
        part = unpacked(parts, first, min(count, -(-groups * kind.m // RUN) - first))
        if not torch.equal(part.view(integers), expected[:, columns].contiguous().view(integers)):
            raise RuntimeError("unpacked weights differ from the reference")


def unpack_nm(values, bitmask, n, m):
    """``reference.unpack_nm``."""
    bitmask = as_bitmask(bitmask, values.shape[1] // n * m, len(values))
    unpacked = unpacker(Packed(n, m, values.dtype, values.dtype))
    if unpacked is not None:
        return unpacked((values, bitmask, None), 0, -(-(values.shape[1] // n * m) // RUN))
    out = torch.empty(values.shape[0], values.shape[1] // n * m, dtype=values.dtype)
    groups, flat = (x.view(reference.INTEGERS[x.itemsize]).view(-1, size) for x, size in ((values, n), (out, m)))
    # codes of a single group in a row may have a stride
    codes = codes_of(bitmask, out.shape[1], m).contiguous().view(-1)
    run(reference.group_unpacked, [groups, codes], out=flat, m=m)
    return out


def way(use: Instructions | None, tokens: int, kind: Packed) -> str:
    """Way in which a CPU with these instructions computes a product.

    "registers" and "octets": a few rows at a time, in floats or in integers, see ``rows`` and ``gathered``. "tiles": by
    AMX. "blocks" and "unpack": by torch, with unpacked blocks of rows, or without such instructions with the whole
    unpacked weight.
    """
    if use is None:
        return "unpack"
    if kind.scaled and kind.scaled_runs is None:
        return "blocks"
    by_tiles = use.tiles and kind.x == torch.bfloat16
    if tokens <= (FEWER if by_tiles else FEW):
        return "octets" if kind.scaled and use.words and kind.x != torch.float32 else "registers"
    return "tiles" if by_tiles else "blocks"


def nm_linear(
    x: Tensor, values: Tensor, bitmask: Tensor, scales: Tensor | None, bias: Tensor | None, n: int, m: int
) -> Tensor:
    """x [tokens, K] @ weight [rows, K].T + bias, in the dtype of x; all are contiguous."""
    rows = values.shape[0]
    tokens, k = x.shape
    if not tokens or not rows:
        return x.new_empty(tokens, rows)
    if bitmask.dtype != torch.uint8:
        bitmask = as_bitmask(bitmask, k, rows)
    # all larger numbers of tokens share one runner
    bounded = min(tokens, FEW + 1)
    # int4 alone has several sizes of groups
    group = reference.scaled_group(values, scales) if values.dtype == torch.uint8 else reference.SCALED
    return _chosen(bounded, n, m, values.dtype, x.dtype, group, bias is not None)(x, (values, bitmask, scales), bias)


@functools.cache
def _chosen(tokens: int, n: int, m: int, values: torch.dtype, x: torch.dtype, group: int, biased: bool) -> Runner:
    kind = Packed(n, m, values, x, group)
    how = way(available(), tokens, kind)
    # the code of other ways does not depend on the number of tokens
    return _runner(how, kind, tokens if how in ("registers", "octets") else FEW + 1, biased)


def nm_linear_input_grad(
    grad: Tensor, values: Tensor, bitmask: Tensor, scales: Tensor | None, n: int, m: int
) -> Tensor:
    """grad [tokens, rows] @ weight [rows, K], in the dtype of grad: by blocks of columns."""
    if scales is not None:
        values = reference.dequantized(values, scales, grad.dtype)
    rows = values.shape[0]
    k = values.shape[1] // n * m
    bitmask = as_bitmask(bitmask, k, rows)
    unpacked = unpacker(Packed(n, m, values.dtype, values.dtype))
    if unpacked is None or not rows:
        return grad @ unpack_nm(values, bitmask, n, m)
    out = torch.empty((grad.shape[0], k), dtype=grad.dtype, device="cpu")
    runs = -(-k // RUN)
    dtype = grad.dtype if cpu_multiplies(grad.dtype) else torch.float32
    at_once = max(1, CACHED_BYTES // (rows * RUN * dtype.itemsize))
    grad = grad.to(dtype)
    for first in range(0, runs, at_once):
        columns = slice(RUN * first, min(k, RUN * (first + at_once)))
        out[:, columns] = grad @ unpacked((values, bitmask, None), first, min(at_once, runs - first)).to(dtype)
    return out


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@functools.cache
def _runner(how: str, kind: Packed, tokens: int, biased: bool) -> Runner:
    """Function for a product in one way, of up to FEW tokens or of more; if its code fails, it unpacks."""
    if how == "unpack":
        return functools.partial(_by_unpacking, kind)
    try:
        made = {"registers": _registers, "octets": _octets, "tiles": _tiles, "blocks": _blocks}[how]
        runner = made(kind, tokens, biased)
        _check_product(runner, kind, tokens, biased)
    except Exception as error:
        warn_of_failure(error, "packed weights are unpacked for each product")
        return functools.partial(_by_unpacking, kind)
    return runner


def _by_unpacking(kind: Packed, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    values, bitmask, scales = parts
    if scales is not None:
        values = reference.dequantized(values, scales, x.dtype)
    return linear(x, unpack_nm(values, bitmask, kind.n, kind.m), bias)


def _check_product(run: Runner, kind: Packed, tokens: int, biased: bool) -> None:
    """Raise unless a small product is as close to float64 as torch's: compilers may have bugs."""
    generator = torch.Generator("cpu").manual_seed(0)
    # more rows than are placed at once; whole steps and scales of each code, and an incomplete last run
    rows = 35
    groups = 9 * RUN // kind.m + kind.in_byte

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(kind.x)

    codes = reference.group_top_n_mask(normal(rows, groups, kind.m).float(), n=kind.n)
    values = normal(rows, groups * kind.n)
    x = normal(tokens, groups * kind.m)
    bias = normal(rows) if biased else None
    scales = None
    if kind.scaled:
        scales = normal(rows, -(-values.shape[1] // kind.group)).abs()
        low, high = (-127, 128) if kind.values == torch.int8 else (0, 256)
        shape = rows, values.shape[1] // kind.in_byte
        values = torch.randint(low, high, shape, generator=generator, device="cpu", dtype=kind.values)
    parts = values, bitmask_of(codes, kind.m), scales
    values = values if scales is None else reference.dequantized(values, scales, torch.float32)
    weight = reference.unpack_nm(values, parts[1], kind.n, kind.m).double()
    exact = linear(x.double(), weight, None if bias is None else bias.double())
    of_torch = (linear(x, weight.to(kind.x), bias).double() - exact).abs().max()
    if not (run(x, parts, bias).double() - exact).abs().max() <= 2 * of_torch + 1e-6 * exact.abs().max():
        raise RuntimeError("a compiled product differs from torch's")


def _pieces(tokens: int, most: int, make: Callable[[int], Callable]) -> list[tuple[int, Callable]]:
    """(first token, loop for their number) of consecutive tokens, ``most`` at a time."""
    made = {count: make(count) for count in {min(tokens, most), tokens % most} - {0}}
    return [(first, made[min(most, tokens - first)]) for first in range(0, tokens, most)]


def _registers(kind: Packed, tokens: int, biased: bool) -> Runner:
    from . import rows

    use = available()
    quantized = kind.scaled
    most = use.tokens // 2 if quantized else use.tokens
    pairs = rows.multiplies_pairs(kind, use)
    pieces = _pieces(
        tokens, most, lambda count: compiled("packed_registers", 8, rows.product, kind, use, count, biased)
    )
    _, one = pieces[0]

    def run(x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
        values, bitmask, scales = parts
        shape = x.shape
        rows = values.shape[0]
        k = shape[-1]
        given = x if pairs else x.float()
        out = torch.empty((*shape[:-1], rows), dtype=x.dtype, device="cpu")
        weight = values.data_ptr(), bitmask.data_ptr(), scales.data_ptr() if quantized else 0
        x_place = given.data_ptr()
        out_place = out.data_ptr()
        bias_place = bias.data_ptr() if biased else 0
        if len(pieces) == 1:
            # decoding runs this: each statement costs
            one(rows, threads(rows * k), k, rows, *weight, x_place, bias_place, out_place)
            return out
        for first, loop in pieces:
            own = x_place + first * k * given.itemsize, bias_place, out_place + first * rows * out.itemsize
            loop(rows, threads(rows * k), k, rows, *weight, *own)
        return out

    return run


def _octets(kind: Packed, tokens: int, biased: bool) -> Runner:
    from . import gathered
    from . import rows as code

    use = available()
    gathers = code.gathers(kind, use)
    build = gathered.gathered_product if gathers else code.octet_product
    as_integers = compiled("packed_integers", 6, code.as_integers, kind, use)
    pieces = _pieces(
        tokens, code.OCTET_TOKENS, lambda count: compiled("packed_octets", 10, build, kind, use, count, biased)
    )
    in_registers = _registers(kind, tokens, biased)
    # of the first part of integers
    part_bytes = 1 if use.octets or gathers else 2

    def run(x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
        values, bitmask, scales = parts
        rows = values.shape[0]
        k = x.shape[-1]
        blocks = scales.shape[1]
        size = -(-k // code.STEP) * code.STEP
        # integers of two bytes, then scales: one tensor takes less time than two
        aside = torch.empty(tokens * (2 * size + 4 * blocks), dtype=torch.uint8, device="cpu")
        refused = ctypes.c_int64(0)
        high = aside.data_ptr()
        low = high + tokens * size
        x_scales_place = high + 2 * tokens * size
        as_integers(tokens, 1, k, x.data_ptr(), high, low, x_scales_place, ctypes.addressof(refused))
        if refused.value:
            return in_registers(x, parts, bias)
        out = torch.empty((*x.shape[:-1], rows), dtype=x.dtype, device="cpu")
        fixed = threads(rows * k), k, rows, values.data_ptr(), bitmask.data_ptr(), scales.data_ptr()
        out_place = out.data_ptr()
        bias_place = _pointer(bias)
        for first, loop in pieces:
            own = high + first * size * part_bytes, low + first * size, x_scales_place + 4 * first * blocks
            loop(-(-rows // 2) if gathers else rows, *fixed, *own, bias_place, out_place + first * rows * out.itemsize)
        return out

    return run


def _tiles(kind: Packed, tokens: int, biased: bool) -> Runner:
    from . import tiles

    lay_out = compiled("packed_laid_out", 4, tiles.laid_out)
    loop = compiled("packed_tiles", 10, tiles.product, kind, available(), biased)

    def run(x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
        values, bitmask, scales = parts
        rows = values.shape[0]
        k = x.shape[-1]
        count = x.numel() // k
        out = torch.empty((*x.shape[:-1], rows), dtype=x.dtype, device="cpu")
        shared = threads(rows * k)
        x_tiles = -(-count // tiles.TILE)
        laid = torch.empty(x_tiles * -(-k // RUN) * tiles.TILE_BYTES, dtype=torch.uint8, device="cpu")
        lay_out(x_tiles, shared if x_tiles > 1 else 1, k, count, x.data_ptr(), laid.data_ptr())
        weight = values.data_ptr(), bitmask.data_ptr(), _pointer(scales)
        fitting = max(LEAST_TOKENS, CACHED_BYTES // (k * x.itemsize))
        at_once = min(tiles.TOKENS, fitting // tiles.TILE * tiles.TILE)
        for first in range(0, count, at_once):
            here = min(at_once, count - first)
            places = *weight, laid.data_ptr(), _pointer(bias), out.data_ptr()
            loop(-(-rows // tiles.STRIP), shared, k, rows, first, here, *places)
        return out

    return run


def _blocks(kind: Packed, tokens: int, biased: bool) -> Runner:
    unpacked = unpacker(kind)
    if unpacked is None:
        raise RuntimeError("code to unpack blocks did not compile")
    dtype = kind.x if cpu_multiplies(kind.x) else torch.float32

    def run(x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
        rows = parts[0].shape[0]
        k = x.shape[-1]
        given = x.to(dtype)
        out = torch.empty((*x.shape[:-1], rows), dtype=x.dtype, device="cpu")
        at_once = max(RUN, CACHED_BYTES // (k * dtype.itemsize))
        for first in range(0, rows, at_once):
            which = slice(first, min(rows, first + at_once))
            weight = unpacked(tuple(part if part is None else part[which] for part in parts), 0, -(-k // RUN))
            own = None if bias is None else bias[which].to(dtype)
            out[..., which] = linear(given, weight.to(dtype), own)
        return out

    return run
