"""Products with packed weights, and unpacking, by compiled code.

CPU, dtypes and number of tokens determine how a product is computed, see ``method``. Code is compiled once, stored on
disk, and compared with torch's product before its first use.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from ... import reference, unfused
from ...pattern import as_bitmask, bitmask_of, codes_of
from .. import cache, cpu_multiplies
from ..loops import run, warn_of_failure
from . import RUN, Packed

if TYPE_CHECKING:
    from .instructions import Instructions

# Most tokens of a product row by row: if slices follow, strips, and AMX
MAX_ROW_TOKENS = 16
MAX_ROW_TOKENS_WITH_STRIPS = 8
MAX_ROW_TOKENS_WITH_AMX = 4

# Most tokens of a product of integers where there is VDPBF16PS: an activation of 16 bits takes two multiplications of
# bytes, or one of bfloat16
MAX_INTEGER_TOKENS_WITH_BFLOAT16 = 4

# Bytes that stay in a core's cache: of an unpacked slice of rows, and of tokens for tiles
CACHED_BYTES = 1 << 20
# Fewest tokens between two expansions of the weights, even if fewer fit into the cache
MIN_TOKENS = 128

# Tensors of a packed weight: (values, bitmask, scales), None without a bitmask or scales
WeightTensors = tuple[Tensor, Tensor | None, Tensor | None]

# Computes a product of (x, weight, bias)
Product = Callable[[Tensor, WeightTensors, Tensor | None], Tensor]

# Unpacks (weight, first run, number of runs)
Unpacker = Callable[[WeightTensors, int, int], Tensor]

# Fewest weights for another thread: starting it takes as long as one thread for this many
MIN_SHARED_WEIGHTS = 1 << 16


@functools.cache
def available() -> Instructions | None:
    """Best instruction set of this CPU for packed weights, or None."""
    # imported here and below, since it loads LLVM
    from .. import machine
    from . import instructions

    return instructions.best_instructions(machine.features())


def compiled(name: str, addresses: int, build: Callable[..., str], *arguments) -> Callable[..., None]:
    """Compile the code of ``build(*arguments)`` to ``loop(count, threads, *addresses)``."""
    from .. import machine

    features = sorted(feature for feature, available in machine.features().items() if available)
    code, _ = cache.compiled(name, (arguments, features), lambda: (machine.object_code(build(*arguments)), ()))
    return machine.loaded_loop(code, addresses)


def threads(weights: int) -> int:
    return torch.get_num_threads() if weights >= MIN_SHARED_WEIGHTS else 1


@functools.cache
def unpacker(kind: Packed) -> Unpacker | None:
    """Return ``unpack(weight, first, count)``, ``count`` runs of all rows from ``first``, or None."""
    isa = available()
    if isa is None:
        return None
    if kind.scaled and kind.runs_per_scale is None:
        unpack_values = unpacker(Packed(kind.n, kind.m, kind.x, kind.x))

        def unpack_dequantized(weight: WeightTensors, first: int, count: int) -> Tensor:
            values, bitmask, scales = weight
            return unpack_values((reference.dequantized(values, scales, kind.x), bitmask, None), first, count)

        return None if unpack_values is None else unpack_dequantized
    try:
        from . import weight

        unpack = _unpacker(compiled("packed_unpack", 8, weight.unpack, kind, isa), kind)
        _check_unpacker(unpack, kind)
    except Exception as error:
        warn_of_failure(error, "maskpro_kernels unpacks more slowly")
        return None
    return unpack


def _unpacker(loop: Callable[..., None], kind: Packed) -> Unpacker:
    def unpack(weight: WeightTensors, first: int, count: int) -> Tensor:
        values, bitmask, scales = weight
        rows = values.shape[0]
        k = values.shape[1] * kind.values_per_element // kind.n * kind.m
        columns = min(RUN * count, k - RUN * first)
        out = torch.empty((rows, columns), dtype=kind.x, device="cpu")
        addresses = values.data_ptr(), _address(bitmask), _address(scales), out.data_ptr()
        loop(rows, threads(rows * columns), k, first, count, columns, *addresses)
        return out

    return unpack


def _check_unpacker(unpack: Unpacker, kind: Packed) -> None:
    """Raise unless ``unpack`` gives the reference's bits for a sample."""
    generator = torch.Generator("cpu").manual_seed(0)
    rows = 5
    groups = 3 * RUN // kind.m + kind.values_per_element
    scores = torch.rand((rows, groups, kind.m), generator=generator, device="cpu")
    bitmask = _bitmask(scores, kind)
    integers = reference.INTEGERS[kind.x.itemsize]
    kept = groups * kind.n
    shape = (rows, kept * kind.values.itemsize // kind.values_per_element)
    scales = None
    values = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8, device="cpu").view(kind.values)
    if kind.scaled:
        scales = torch.rand((rows, -(-kept // kind.group)), generator=generator, device="cpu").to(kind.x)
    numbers = values if scales is None else reference.dequantized(values, scales, kind.x)
    expected = _unpacked(numbers, bitmask, kind)
    for first, count in ((0, 4), (1, 2)):
        columns = slice(RUN * first, RUN * (first + count))
        weight = unpack((values, bitmask, scales), first, min(count, -(-groups * kind.m // RUN) - first))
        if not torch.equal(weight.view(integers), expected[:, columns].contiguous().view(integers)):
            raise RuntimeError("unpacked weights differ from the reference")


def _bitmask(scores: Tensor, kind: Packed) -> Tensor | None:
    """Bitmask of the N largest scores of each group [rows, groups, M]; None if all weights are kept."""
    return None if kind.whole else bitmask_of(reference.group_top_n_mask(scores, n=kind.n), kind.m)


def _unpacked(numbers: Tensor, bitmask: Tensor | None, kind: Packed) -> Tensor:
    """Unpack a sample by the reference."""
    return numbers if kind.whole else reference.unpack_nm(numbers, bitmask, kind.n, kind.m)


def unpack_nm(values, bitmask, n, m):
    """``reference.unpack_nm``."""
    bitmask = as_bitmask(bitmask, values.shape[1] // n * m, len(values))
    unpack = unpacker(Packed(n, m, values.dtype, values.dtype))
    if unpack is not None:
        return unpack((values, bitmask, None), 0, -(-(values.shape[1] // n * m) // RUN))
    out = torch.empty(values.shape[0], values.shape[1] // n * m, dtype=values.dtype)
    groups, flat = (x.view(reference.INTEGERS[x.itemsize]).view(-1, size) for x, size in ((values, n), (out, m)))
    # codes of a single group in a row may have a stride
    codes = codes_of(bitmask, out.shape[1], m).contiguous().view(-1)
    run(reference.group_unpacked, [groups, codes], out=flat, m=m)
    return out


def method(isa: Instructions | None, tokens: int, kind: Packed) -> str:
    """Method by which a CPU with these instructions computes a product.

    "floats" and "integers": row by row, see ``rows`` and ``gathered``. "tiles": by AMX. "strips": by VDPBF16PS.
    "slices" and "unpack": by torch, with unpacked slices of rows, or without such instructions with the whole unpacked
    weight.
    """
    if isa is None:
        return "unpack"
    if kind.scaled and kind.runs_per_scale is None:
        return "slices"
    max_row_tokens = MAX_ROW_TOKENS
    max_integer_tokens = MAX_ROW_TOKENS
    many = "slices"
    if kind.x == torch.bfloat16 and isa.amx:
        max_row_tokens = MAX_ROW_TOKENS_WITH_AMX
        many = "tiles"
    elif kind.x == torch.bfloat16 and isa.bf16:
        max_row_tokens = MAX_ROW_TOKENS_WITH_STRIPS
        max_integer_tokens = MAX_INTEGER_TOKENS_WITH_BFLOAT16
        many = "strips"
    if tokens > max_row_tokens:
        return many
    integers = kind.scaled and isa.pmaddwd and kind.x != torch.float32 and tokens <= max_integer_tokens
    return "integers" if integers else "floats"


def nm_linear(
    x: Tensor, values: Tensor, bitmask: Tensor | None, scales: Tensor | None, bias: Tensor | None, n: int, m: int
) -> Tensor:
    """x [tokens, K] @ weight [rows, K].T + bias, in the dtype of x; all are contiguous. 1:1 has no bitmask."""
    rows = values.shape[0]
    tokens, k = x.shape
    if not tokens or not rows:
        return x.new_empty(tokens, rows)
    if bitmask is not None and bitmask.dtype != torch.uint8:
        bitmask = as_bitmask(bitmask, k, rows)
    # all larger numbers of tokens share one product
    bounded = min(tokens, MAX_ROW_TOKENS + 1)
    # int4 alone has several sizes of groups
    group = reference.scaled_group(values, scales) if values.dtype == torch.uint8 else reference.SCALED
    product = _product_of(bounded, n, m, values.dtype, x.dtype, group, bias is not None)
    return product(x, (values, bitmask, scales), bias)


def int8_linear(x, values, scales, bias):
    """x [tokens, K] @ weight [rows, K].T + bias, in the dtype of x: every column has a value."""
    return nm_linear(x, values, None, scales, bias, 1, 1)


@functools.cache
def _product_of(tokens: int, n: int, m: int, values: torch.dtype, x: torch.dtype, group: int, biased: bool) -> Product:
    kind = Packed(n, m, values, x, group)
    name = method(available(), tokens, kind)
    # the code of other methods does not depend on the number of tokens
    return _product(name, kind, tokens if name in ("floats", "integers") else MAX_ROW_TOKENS + 1, biased)


def nm_linear_input_grad(
    grad: Tensor, values: Tensor, bitmask: Tensor, scales: Tensor | None, n: int, m: int
) -> Tensor:
    """grad [tokens, rows] @ weight [rows, K], in the dtype of grad: by slices of columns."""
    if scales is not None:
        values = reference.dequantized(values, scales, grad.dtype)
    rows = values.shape[0]
    k = values.shape[1] // n * m
    bitmask = as_bitmask(bitmask, k, rows)
    unpack = unpacker(Packed(n, m, values.dtype, values.dtype))
    if unpack is None or not rows:
        return grad @ unpack_nm(values, bitmask, n, m)
    out = torch.empty((grad.shape[0], k), dtype=grad.dtype, device="cpu")
    runs = -(-k // RUN)
    dtype = grad.dtype if cpu_multiplies(grad.dtype) else torch.float32
    cached_runs = max(1, CACHED_BYTES // (rows * RUN * dtype.itemsize))
    grad = grad.to(dtype)
    for first in range(0, runs, cached_runs):
        columns = slice(RUN * first, min(k, RUN * (first + cached_runs)))
        out[:, columns] = grad @ unpack((values, bitmask, None), first, min(cached_runs, runs - first)).to(dtype)
    return out


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@functools.cache
def _product(name: str, kind: Packed, tokens: int, biased: bool) -> Product:
    """Product by one method, of up to MAX_ROW_TOKENS tokens or of more; if its code fails, it unpacks."""
    if name == "unpack":
        return functools.partial(_by_unpacking, kind)
    try:
        make = {
            "floats": _by_floats,
            "integers": _by_integers,
            "tiles": _by_tiles,
            "strips": _by_strips,
            "slices": _by_slices,
        }[name]
        product = make(kind, tokens, biased)
        _check_product(product, kind, tokens, biased)
    except Exception as error:
        warn_of_failure(error, "packed weights are unpacked for each product")
        return functools.partial(_by_unpacking, kind)
    return product


def _by_unpacking(kind: Packed, x: Tensor, weight: WeightTensors, bias: Tensor | None) -> Tensor:
    values, bitmask, scales = weight
    if kind.whole:
        return unfused.int8_linear(x, values, scales, bias)
    if scales is not None:
        values = reference.dequantized(values, scales, x.dtype)
    return linear(x, unpack_nm(values, bitmask, kind.n, kind.m), bias)


def _check_product(product: Product, kind: Packed, tokens: int, biased: bool) -> None:
    """Raise unless a small product is as close to float64 as torch's: compilers may have bugs."""
    generator = torch.Generator("cpu").manual_seed(0)
    # more rows and runs than are expanded at once; whole steps and scales of each code, and an incomplete last run
    rows = 35
    groups = 17 * RUN // kind.m + kind.values_per_element

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(kind.x)

    bitmask = _bitmask(normal(rows, groups, kind.m).float(), kind)
    values = normal(rows, groups * kind.n)
    x = normal(tokens, groups * kind.m)
    bias = normal(rows) if biased else None
    scales = None
    if kind.scaled:
        scales = normal(rows, -(-values.shape[1] // kind.group)).abs()
        low, high = (-127, 128) if kind.values == torch.int8 else (0, 256)
        shape = rows, values.shape[1] // kind.values_per_element
        values = torch.randint(low, high, shape, generator=generator, device="cpu", dtype=kind.values)
    weight = values, bitmask, scales
    numbers = values if scales is None else reference.dequantized(values, scales, torch.float32)
    dense = _unpacked(numbers, bitmask, kind).double()
    exact = linear(x.double(), dense, None if bias is None else bias.double())
    torch_error = (linear(x, dense.to(kind.x), bias).double() - exact).abs().max()
    error = (product(x, weight, bias).double() - exact).abs().max()
    if not error <= 2 * torch_error + 1e-6 * exact.abs().max():
        raise RuntimeError("a compiled product differs from torch's")


def _loops_of_tokens(tokens: int, at_once: int, make: Callable[[int], Callable]) -> list[tuple[int, Callable]]:
    """(first token, loop for their number) of consecutive tokens, ``at_once`` at a time."""
    loops = {count: make(count) for count in {min(tokens, at_once), tokens % at_once} - {0}}
    return [(first, loops[min(at_once, tokens - first)]) for first in range(0, tokens, at_once)]


def _by_floats(kind: Packed, tokens: int, biased: bool) -> Product:
    from . import rows

    isa = available()
    scaled = kind.scaled
    bfloat16 = rows.multiplies_bfloat16(kind, isa)
    loops = _loops_of_tokens(
        tokens, isa.tokens, lambda count: compiled("packed_floats", 8, rows.float_product, kind, isa, count, biased)
    )
    _, first_loop = loops[0]

    def product(x: Tensor, weight: WeightTensors, bias: Tensor | None) -> Tensor:
        values, bitmask, scales = weight
        shape = x.shape
        rows = values.shape[0]
        k = shape[-1]
        operand = x if bfloat16 else x.float()
        out = torch.empty((*shape[:-1], rows), dtype=x.dtype, device="cpu")
        weight_addresses = values.data_ptr(), _address(bitmask), scales.data_ptr() if scaled else 0
        x_address = operand.data_ptr()
        out_address = out.data_ptr()
        bias_address = bias.data_ptr() if biased else 0
        if len(loops) == 1:
            # decoding runs this: each statement costs
            first_loop(rows, threads(rows * k), k, rows, *weight_addresses, x_address, bias_address, out_address)
            return out
        for first, loop in loops:
            x_first = x_address + first * k * operand.itemsize
            out_first = out_address + first * rows * out.itemsize
            loop(rows, threads(rows * k), k, rows, *weight_addresses, x_first, bias_address, out_first)
        return out

    return product


def _by_integers(kind: Packed, tokens: int, biased: bool) -> Product:
    from . import gathered
    from . import rows as code

    isa = available()
    gathers = code.gathers(kind, isa)
    build = gathered.gathered_product if gathers else code.integer_product
    quantize = compiled("packed_quantizer", 6, code.quantizer, kind, isa)
    loops = _loops_of_tokens(
        tokens, code.INTEGER_TOKENS, lambda count: compiled("packed_integers", 10, build, kind, isa, count, biased)
    )
    float_product = _by_floats(kind, tokens, biased)
    # of the tensor of high bytes, or of 16-bit integers
    high_bytes = 1 if isa.vnni or gathers else 2

    def product(x: Tensor, weight: WeightTensors, bias: Tensor | None) -> Tensor:
        values, bitmask, scales = weight
        rows = values.shape[0]
        k = x.shape[-1]
        blocks = scales.shape[1]
        padded_k = -(-k // code.STEP) * code.STEP
        # integers of two bytes, then scales: one tensor takes less time than two
        quantized = torch.empty(tokens * (2 * padded_k + 4 * blocks), dtype=torch.uint8, device="cpu")
        refused = ctypes.c_int64(0)
        high = quantized.data_ptr()
        low = high + tokens * padded_k
        x_scales = high + 2 * tokens * padded_k
        quantize(tokens, 1, k, x.data_ptr(), high, low, x_scales, ctypes.addressof(refused))
        if refused.value:
            return float_product(x, weight, bias)
        out = torch.empty((*x.shape[:-1], rows), dtype=x.dtype, device="cpu")
        arguments = threads(rows * k), k, rows, values.data_ptr(), _address(bitmask), scales.data_ptr()
        out_address = out.data_ptr()
        bias_address = _address(bias)
        for first, loop in loops:
            x_addresses = high + first * padded_k * high_bytes, low + first * padded_k, x_scales + 4 * first * blocks
            out_first = out_address + first * rows * out.itemsize
            loop(-(-rows // 2) if gathers else rows, *arguments, *x_addresses, bias_address, out_first)
        return out

    return product


def _by_tiles(kind: Packed, tokens: int, biased: bool) -> Product:
    from . import amx

    lay_out = compiled("packed_laid_out", 4, amx.laid_out)
    loop = compiled("packed_tiles", 10, amx.tile_product, kind, available(), biased)

    def product(x: Tensor, weight: WeightTensors, bias: Tensor | None) -> Tensor:
        values, bitmask, scales = weight
        rows = values.shape[0]
        k = x.shape[-1]
        tokens = x.numel() // k
        out = torch.empty((*x.shape[:-1], rows), dtype=x.dtype, device="cpu")
        thread_count = threads(rows * k)
        x_tiles = -(-tokens // amx.TILE)
        laid_out = torch.empty(x_tiles * -(-k // RUN) * amx.TILE_BYTES, dtype=torch.uint8, device="cpu")
        lay_out(x_tiles, thread_count if x_tiles > 1 else 1, k, tokens, x.data_ptr(), laid_out.data_ptr())
        weight_addresses = values.data_ptr(), _address(bitmask), _address(scales)
        cached_tokens = max(MIN_TOKENS, CACHED_BYTES // (k * x.itemsize))
        at_once = min(amx.TOKENS, cached_tokens // amx.TILE * amx.TILE)
        for first in range(0, tokens, at_once):
            count = min(at_once, tokens - first)
            addresses = *weight_addresses, laid_out.data_ptr(), _address(bias), out.data_ptr()
            loop(-(-rows // amx.STRIP), thread_count, k, rows, first, count, *addresses)
        return out

    return product


def _by_strips(kind: Packed, tokens: int, biased: bool) -> Product:
    from . import strips

    loop = compiled("packed_strips", 9, strips.strip_product, kind, available(), biased)

    def product(x: Tensor, weight: WeightTensors, bias: Tensor | None) -> Tensor:
        values, bitmask, scales = weight
        rows = values.shape[0]
        tokens, k = x.shape
        padded = pad(x, (0, strips.x_columns(k) - k))
        out = torch.empty((tokens, rows), dtype=x.dtype, device="cpu")
        weight_addresses = values.data_ptr(), _address(bitmask), _address(scales)
        for first in range(0, tokens, strips.TOKENS):
            count = min(strips.TOKENS, tokens - first)
            addresses = *weight_addresses, padded[first].data_ptr(), _address(bias), out[first].data_ptr()
            loop(-(-rows // strips.STRIP), threads(rows * k), k, rows, count, *addresses)
        return out

    return product


def _by_slices(kind: Packed, tokens: int, biased: bool) -> Product:
    unpack = unpacker(kind)
    if unpack is None:
        raise RuntimeError("code to unpack blocks did not compile")
    dtype = kind.x if cpu_multiplies(kind.x) else torch.float32

    def product(x: Tensor, weight: WeightTensors, bias: Tensor | None) -> Tensor:
        rows = weight[0].shape[0]
        k = x.shape[-1]
        operand = x.to(dtype)
        out = torch.empty((*x.shape[:-1], rows), dtype=x.dtype, device="cpu")
        cached_rows = max(RUN, CACHED_BYTES // (k * dtype.itemsize))
        for first in range(0, rows, cached_rows):
            part = slice(first, min(rows, first + cached_rows))
            sliced = tuple(tensor if tensor is None else tensor[part] for tensor in weight)
            dense = unpack(sliced, 0, -(-k // RUN))
            part_bias = None if bias is None else bias[part].to(dtype)
            out[..., part] = linear(operand, dense.to(dtype), part_bias)
        return out

    return product
