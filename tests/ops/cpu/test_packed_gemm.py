"""Packed weights on a CPU: every method of a product, on every kind of CPU that this one can pass for."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import warnings

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from helpers.allocated import allocated
from helpers.bits import assert_same_bits
from helpers.cases import cases, slow
from llvmlite import ir
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.ops import reference
from maskpro_kernels.ops.cpu import cache, cpu_multiplies, machine
from maskpro_kernels.ops.cpu.codegen import I32, I64
from maskpro_kernels.ops.cpu.packed_gemm import Packed, products
from maskpro_kernels.ops.cpu.packed_gemm.instructions import (
    I8,
    I16,
    as_float32,
    best_instructions,
    fma,
    intrinsic,
    vector,
    zeros,
)
from maskpro_kernels.ops.pattern import NMPattern, bitmask_of
from maskpro_kernels.packed import VALUE_KINDS, quantized

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PATTERNS = ("1:2", "2:4", "1:4", "3:4", "4:8", "3:8", "8:16", "1:16", "9:16")

# Of Linux: memory that nobody may touch
PROT_NONE = 0

# What LLVM calls the features that each kind of CPU lacks
OFF = {
    "all that it has": (),
    "no AMX": ("amx-tile", "amx-bf16", "amx-int8"),
    "no bfloat16": ("amx-tile", "amx-bf16", "amx-int8", "avx512bf16"),
    "no VBMI2": ("amx-tile", "amx-bf16", "amx-int8", "avx512bf16", "avx512vbmi2"),
    "no AVX-512": tuple(
        name for name in machine.features() if name.startswith(("avx512", "avx10", "amx")) or name == "evex512"
    ),
    "no AVX2": tuple(
        name
        for name in machine.features()
        if name.startswith(
            ("avx", "amx", "fma", "f16c", "evex", "vaes", "vpclmul", "xop", "gfni", "sm3", "sm4", "sha512")
        )
    ),
}


@pytest.fixture
def cpu(monkeypatch):
    """``cpu(kind)``: continue as if this CPU lacked what OFF names."""
    caches = (products._product_of, products._product, products.available, products.unpacker, machine.machine)

    def clear() -> None:
        for function in caches:
            function.cache_clear()

    def lacking(kind: str) -> None:
        features = machine.features() | dict.fromkeys(OFF[kind], False)
        monkeypatch.setattr(machine, "features", lambda: features)
        clear()

    clear()
    yield lacking
    monkeypatch.undo()
    clear()


def packed_case(pattern: str, dtype: torch.dtype, values: str, rows: int, groups: int, seed: int = 0):
    """(A packed weight, the same in its dtype, the same in float64)."""
    generator = torch.Generator().manual_seed(seed)
    n, m = NMPattern(pattern).n, NMPattern(pattern).m
    # an even number of values
    groups += values == "int4" and groups * n % 2
    codes = reference.top_n_mask(torch.rand(rows, groups * m, generator=generator), n=n, m=m)
    kept, scales = torch.randn(rows, groups * n, generator=generator).to(dtype), None
    numbers = kept
    if values != "keep":
        kept, scales = quantized(kept, 128 if values == "int8" else 64, values)
        numbers = reference.dequantized(kept, scales, torch.float32)
    packed = mk.PackedNM(kept, bitmask_of(codes, m), pattern, scales)
    exact = reference.unpack_nm(numbers, packed.bitmask, n=n, m=m)
    return packed, exact.to(dtype), exact.double()


def assert_within_budget(y: torch.Tensor, by_torch: torch.Tensor, exact: torch.Tensor) -> None:
    error, torch_error = ((t.double() - exact).abs().max() for t in (y, by_torch))
    assert error <= 2 * torch_error + 1e-6 * exact.abs().max(), (error, torch_error)


def assert_multiplies(pattern, dtype, values, rows, groups, tokens, biased=True, seed=0):
    """A product and its gradient in x are as near to float64 as torch's with the unpacked weight."""
    packed, weight, exact_weight = packed_case(pattern, dtype, values, rows, groups, seed)
    n, m, k = packed.pattern.n, packed.pattern.m, packed.shape[1]
    generator = torch.Generator().manual_seed(seed + 1)
    x, grad = (torch.randn(tokens, size, generator=generator).to(dtype) for size in (k, rows))
    bias = torch.randn(rows, generator=generator).to(dtype) if biased else None
    parts = packed.values, packed.bitmask, packed.scales
    with warnings.catch_warnings():
        # a method that does not compile would go unseen
        warnings.simplefilter("error")
        y, x_grad = products.nm_linear(x, *parts, bias, n, m), products.nm_linear_input_grad(grad, *parts, n, m)
    exact = nn.functional.linear(x.double(), exact_weight, None if bias is None else bias.double())
    assert_within_budget(y, nn.functional.linear(x, weight, bias), exact)
    assert_within_budget(x_grad, grad @ weight, grad.double() @ weight.double())


@pytest.mark.parametrize(
    ("kind", "values", "dtype"),
    cases(
        itertools.product(OFF, VALUE_KINDS, DTYPES),
        slow=lambda kind, values, dtype: dtype != torch.bfloat16 and (kind, values) != ("all that it has", "int4"),
    ),
    ids=str,
)
def test_every_kind_of_cpu_multiplies(kind, values, dtype, cpu):
    cpu(kind)
    # as few as are decoded, more than a row takes at a time, tiles and a half, and slices; two calls of strips
    for tokens in (1, 7, 13, 40, 257, *[520] * (kind == "no AMX")):
        assert_multiplies("2:4", dtype, values, 35, 41, tokens)


@pytest.mark.parametrize(
    ("kind", "pattern", "values"),
    cases(
        itertools.product(("all that it has", "no VBMI2", "no AVX-512"), PATTERNS, VALUE_KINDS),
        slow=lambda kind, pattern, values: values == "int8" or kind == "no VBMI2" or pattern in ("1:2", "3:4", "1:16"),
    ),
)
def test_every_pattern_is_multiplied(kind, pattern, values, cpu):
    cpu(kind)
    groups = (136 if values == "keep" else 520) // NMPattern(pattern).m + 1
    assert_multiplies(pattern, torch.bfloat16, values, 33, groups, 2)


@pytest.mark.slow
@hypothesis.given(
    pattern=st.sampled_from(PATTERNS),
    dtype=st.sampled_from(DTYPES),
    values=st.sampled_from(VALUE_KINDS),
    rows=st.integers(1, 100),
    groups=st.integers(1, 90),
    tokens=st.sampled_from((1, 2, 4, 5, 8, 16, 17, 33, 257, 600)),
    biased=st.booleans(),
    seed=st.integers(0, 2**31),
)
@hypothesis.settings(max_examples=40)
def test_products_of_any_shape(pattern, dtype, values, rows, groups, tokens, biased, seed):
    assert_multiplies(pattern, dtype, values, rows, groups, tokens, biased, seed)


def test_threads_share_a_product():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for values in VALUE_KINDS:
            for tokens in (1, 8, 300):
                assert_multiplies("2:4", torch.bfloat16, values, 291, 144, tokens)
        # more than the cache holds at a time
        assert_multiplies("2:4", torch.bfloat16, "keep", 70, 1100, 300)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("processor", "features", "fast"),
    [
        ("x86_64", {"avx512f": True, "avx512bf16": False}, False),
        ("x86_64", {"avx512bf16": True}, True),
        ("AMD64", {"amx-bf16": True}, True),
        ("x86_64", {"avxneconvert": True}, True),
        ("aarch64", {}, True),
    ],
)
def test_bfloat16_is_fast_where_the_processor_multiplies_it(processor, features, fast, monkeypatch):
    """oneDNN supports it on every CPU with AVX-512, by float32 where that has no bfloat16."""
    monkeypatch.setattr("platform.machine", lambda: processor)
    monkeypatch.setattr(machine, "features", lambda: features)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert cpu_multiplies(torch.bfloat16) == fast and cpu_multiplies(torch.float32)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False, raising=False)
    assert not cpu_multiplies(torch.bfloat16)


@pytest.mark.parametrize("values", [slow("int8"), "int4"])
def test_products_of_bytes_are_right_on_any_cpu(values, cpu, monkeypatch):
    """With VPEXPANDB and VPDPBUSD in plain operations."""

    class Plain(type(products.available())):
        vnni = True

        def expand(self, b, values, bits):
            if values.type.count != 64:
                return super().expand(b, values, bits)
            out, one = zeros(values.type), I64(1)
            for lane in range(64):
                below = intrinsic(b, "llvm.ctpop.i64", I64, b.and_(bits, I64((1 << lane) - 1)))
                kept = b.trunc(b.and_(b.lshr(bits, I64(lane)), one), ir.IntType(1))
                value = b.select(kept, b.extract_element(values, below), I8(0))
                out = b.insert_element(out, value, I64(lane))
            return out

        def dot_i8(self, b, total, unsigned, signed):
            for first in range(4):
                lanes = ir.Constant(vector(I32, 16), list(range(first, 64, 4)))
                x, weights = (b.shuffle_vector(operand, operand, lanes) for operand in (unsigned, signed))
                total = b.add(total, b.mul(b.zext(x, total.type), b.sext(weights, total.type)))
            return total

    isa = Plain(machine.features())
    isa.vnni = True
    isa.amx = False
    monkeypatch.setattr(products, "available", lambda: isa)
    for pattern, tokens in (("2:4", 1), ("1:8", 9)):
        assert_multiplies(pattern, torch.bfloat16, values, 5, 1100 // NMPattern(pattern).m + 1, tokens)


@pytest.mark.parametrize("values", ["keep", slow("int8"), "int4"])
def test_strips_are_right_on_any_cpu(values, monkeypatch):
    """With VPEXPANDW, VCVTNEPS2BF16 and VDPBF16PS in plain operations."""

    class Plain(type(products.available())):
        def expand(self, b, values, bits):
            if values.type.count != 32:
                return super().expand(b, values, bits)
            out = zeros(values.type)
            for lane in range(32):
                below = intrinsic(b, "llvm.ctpop.i32", I32, b.and_(bits, I32((1 << lane) - 1)))
                kept = b.trunc(b.lshr(bits, I32(lane)), ir.IntType(1))
                value = b.select(kept, b.extract_element(values, below), I16(0))
                out = b.insert_element(out, value, I32(lane))
            return out

        def round_to_bfloat16(self, b, values):
            integers = vector(I32, values.type.count)

            def each(number):
                return ir.Constant(integers, [number] * integers.count)

            bits = b.bitcast(values, integers)
            is_odd = b.and_(b.lshr(bits, each(16)), each(1))
            rounded = b.lshr(b.add(bits, b.add(is_odd, each(0x7FFF))), each(16))
            return b.trunc(rounded, vector(I16, integers.count))

        def dot_bfloat16(self, b, total, weights, x):
            pairs = vector(I16, 32)
            for first in range(2):
                lanes = ir.Constant(vector(I32, 16), list(range(first, 32, 2)))
                operands = [b.bitcast(operand, pairs) for operand in (weights, x)]
                operands = [b.shuffle_vector(operand, operand, lanes) for operand in operands]
                total = fma(b, *(as_float32(b, operand, torch.bfloat16) for operand in operands), total)
            return total

    isa = Plain(machine.features())
    isa.bf16 = True
    isa.amx = False
    monkeypatch.setattr(products, "available", lambda: isa)
    for pattern, tokens, k in (("2:4", 9, 1100), ("1:8", 31, 640)):
        assert_multiplies(pattern, torch.bfloat16, values, 35, k // NMPattern(pattern).m, tokens)


@pytest.mark.parametrize("pattern", ["2:4", "1:8"])
@pytest.mark.parametrize("group", [32, 128])
def test_other_groups_of_int4_values(group, pattern):
    torch.manual_seed(0)
    n, m = NMPattern(pattern).n, NMPattern(pattern).m
    codes = reference.top_n_mask(torch.rand(70, 2400 // n * m), n=n, m=m)
    weight = torch.where(mk.expand_mask(codes, pattern), torch.randn(70, 2400 // n * m), 0).bfloat16()
    packed = mk.pack_nm(weight, pattern, "int4", group)
    for tokens in (1, 3, 20):
        x = torch.randn(tokens, weight.shape[1]).bfloat16()
        y = products.nm_linear(x, packed.values, packed.bitmask, packed.scales, None, n, m)
        dense = packed.unpack()
        assert_within_budget(y, nn.functional.linear(x, dense), x.double() @ dense.double().t())


def int8_case(rows: int, k: int, dtype: torch.dtype):
    """(int8 values and scales of all weights, the same in float64)."""
    generator = torch.Generator().manual_seed(k)
    values, scales = quantized(torch.randn(rows, k, generator=generator).to(dtype))
    return (values, scales), reference.dequantized(values, scales, torch.float32).double()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    cases(itertools.product(OFF, DTYPES), slow=lambda kind, dtype: kind == "no bfloat16" and dtype != torch.bfloat16),
    ids=str,
)
def test_every_kind_of_cpu_multiplies_int8_values_of_all_weights(kind, dtype, cpu):
    cpu(kind)
    for rows, k in ((35, 577), (70, 256), (3, 5)):
        weight, exact_weight = int8_case(rows, k, dtype)
        for tokens, biased in ((1, True), (13, False), (40, True), (257, True)):
            x, bias = torch.randn(tokens, k).to(dtype), torch.randn(rows).to(dtype) if biased else None
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                y = products.int8_linear(x, *weight, bias)
            by_torch = nn.functional.linear(x, reference.dequantized(*weight, dtype), bias)
            exact = nn.functional.linear(x.double(), exact_weight, bias if bias is None else bias.double())
            assert_within_budget(y, by_torch, exact)


@pytest.mark.parametrize("kind", ["all that it has", "no VBMI2", "no AVX-512"])
def test_nothing_beyond_the_last_int8_value_is_read(kind, cpu):
    cpu(kind)
    guarded = Guarded()
    for dtype in (torch.bfloat16, torch.float32):
        for k in (128, 65, 544):
            weight, _ = int8_case(3, k, dtype)
            for tokens in (1, 6, 20):
                tensors = (torch.randn(tokens, k).to(dtype), *weight, torch.randn(3).to(dtype))
                products.int8_linear(*map(guarded.at_the_end, tensors))


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_integers_are_multiplied_without_a_dense_weight(values, monkeypatch):
    # poisoned buffers are kept
    monkeypatch.setattr(products, "torch", torch)
    packed, _, _ = packed_case("2:4", torch.bfloat16, values, 1024, 1024)
    parts = packed.values, packed.bitmask, packed.scales
    for tokens in (16, 64):
        x = torch.randn(tokens, 4096).bfloat16()
        products.nm_linear(x, *parts, None, 2, 4)
        # a dense weight has 8 MiB
        assert allocated(lambda x=x: products.nm_linear(x, *parts, None, 2, 4)).peak < 3 << 20


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("all that it has", {"keep": "floats floats" + " tiles" * 5, "int8": "integers integers" + " tiles" * 5}),
        ("no AMX", {"keep": "floats " * 4 + "strips " * 3, "int8": "integers integers floats floats" + " strips" * 3}),
        ("no bfloat16", {"keep": "floats " * 6 + "slices", "int8": "integers " * 6 + "slices"}),
        ("no VBMI2", {"keep": "floats " * 6 + "slices", "int8": "integers " * 6 + "slices"}),
        ("no AVX2", {"keep": "unpack " * 7, "int8": "unpack " * 7}),
    ],
)
def test_the_method_depends_on_the_cpu_and_the_tokens(kind, expected):
    features = dict.fromkeys(
        ("avx512f", "avx512bw", "avx512vl", "f16c", "avx512vbmi2", "avx512bf16", "avx512vnni", "amx-tile", "amx-bf16"),
        True,
    )
    isa = best_instructions(features | {"avx2": True, "fma": True} | dict.fromkeys(OFF[kind], False))
    for values, dtype in (("keep", torch.bfloat16), ("int8", torch.int8), ("int8", torch.uint8)):
        methods = [
            products.method(isa, tokens, Packed(2, 4, dtype, torch.bfloat16)) for tokens in (1, 4, 5, 8, 9, 16, 17)
        ]
        assert methods == expected[values].split()


@pytest.mark.parametrize(
    ("kind", "pattern"),
    cases(
        itertools.product(("all that it has", "no VBMI2", "no AVX-512", "no AVX2"), PATTERNS),
        slow=lambda kind, pattern: kind == "no VBMI2" or pattern not in ("2:4", "3:8", "8:16"),
    ),
)
def test_unpacking_keeps_every_bit(kind, pattern, cpu):
    cpu(kind)
    n, m = NMPattern(pattern).n, NMPattern(pattern).m
    for dtype in DTYPES:
        for groups in (1, 70 // m + 1, 192 // m):
            packed, _, _ = packed_case(pattern, dtype, "keep", 5, groups)
            # bytes that any operation on numbers would change
            packed.values.view(reference.INTEGERS[dtype.itemsize])[0, 0] = -1
            got, expected = (
                route.unpack_nm(packed.values, packed.bitmask, n=n, m=m).view(torch.uint8)
                for route in (products, reference)
            )
            assert_same_bits(got, expected)


class Guarded:
    """Memory that ends where nothing may be read: the next page is no one's."""

    def __init__(self):
        self.libc, self.maps = ctypes.CDLL(None, use_errno=True), []

    def at_the_end(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy whose last byte is the last one before such a page."""
        pages = -(-tensor.nbytes // mmap.PAGESIZE)
        memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
        self.maps.append(memory)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        end = whole.data_ptr() + pages * mmap.PAGESIZE
        assert self.libc.mprotect(ctypes.c_void_p(end), ctypes.c_size_t(mmap.PAGESIZE), PROT_NONE) == 0
        start = pages * mmap.PAGESIZE - tensor.nbytes
        copy = whole[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return copy.copy_(tensor)


@pytest.mark.parametrize(
    ("pattern", "values", "kind"),
    cases(
        itertools.product(
            ("2:4", "9:16", "3:8", "1:16"), VALUE_KINDS, ("all that it has", "no AVX-512", "no AMX", "no VBMI2")
        ),
        slow=lambda pattern, values, kind: pattern in ("3:8", "1:16") or kind in ("no AMX", "no VBMI2"),
    ),
)
def test_nothing_beyond_the_last_value_is_read(pattern, values, kind, cpu):
    """Rows that end at a page's end, of whole runs and not, beside bitmasks that keep all, as damaged ones may."""
    cpu(kind)
    n, m = NMPattern(pattern).n, NMPattern(pattern).m
    guarded = Guarded()
    for dtype in (torch.bfloat16, torch.float32):
        # whole runs, a part of one, and blocks of scales
        for groups in (128 // m, 64 // m + 1, 544 // m):
            packed, _, _ = packed_case(pattern, dtype, values, 3, groups)
            for bitmask in (packed.bitmask, torch.full_like(packed.bitmask, 255)):
                parts = [None if x is None else guarded.at_the_end(x) for x in (packed.values, bitmask, packed.scales)]
                for tokens in (1, 6, 20):
                    x = guarded.at_the_end(torch.randn(tokens, packed.shape[1]).to(dtype))
                    bias = guarded.at_the_end(torch.randn(3).to(dtype))
                    products.nm_linear(x, *parts, bias, n, m)
                if packed.scales is None:
                    products.nm_linear_input_grad(torch.randn(1, 3).to(dtype), *parts, n, m)


@pytest.mark.parametrize("fast", [True, False])
def test_slices_are_multiplied_in_a_dtype_that_is_fast_on_the_cpu(fast, cpu, monkeypatch):
    cpu("no AVX-512")
    multiplied = set()

    def linear(x, weight, bias):
        multiplied.update((x.dtype, weight.dtype))
        return nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(products, "cpu_multiplies", lambda dtype: fast)
    monkeypatch.setattr(products, "linear", linear)
    packed, weight, exact = packed_case("2:4", torch.bfloat16, "int4", 8, 64)
    x, bias = torch.randn(20, 256).bfloat16(), torch.randn(8).bfloat16()
    # the check of the first use among them
    multiplied.clear()
    y = products.nm_linear(x, packed.values, packed.bitmask, packed.scales, bias, 2, 4)
    assert y.dtype == torch.bfloat16 and (torch.float32 in multiplied) == (not fast)
    assert_within_budget(y, nn.functional.linear(x, weight, bias), x.double() @ exact.T + bias.double())


def test_what_does_not_compile_is_unpacked(cpu, monkeypatch):
    monkeypatch.setattr(machine, "object_code", lambda assembly: b"")
    monkeypatch.setattr(cache, "compiled", lambda name, key, make: make())
    packed, weight, exact = packed_case("2:4", torch.bfloat16, "keep", 8, 16)
    x = torch.randn(1, 64).bfloat16()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        y = products.nm_linear(x, packed.values, packed.bitmask, None, None, 2, 4)
    expected = ["packed weights are unpacked for each product", "maskpro_kernels unpacks more slowly"]
    # the loop of the reference, unless an earlier test has loaded it
    rest = ["maskpro_kernels runs eagerly on CPU"][: len(warned) - 2]
    assert [str(warning.message).rpartition("; ")[2] for warning in warned] == expected + rest
    assert_within_budget(y, nn.functional.linear(x, weight), x.double() @ exact.T)


def test_what_multiplies_wrongly_is_not_used(cpu, monkeypatch):
    by_floats = products._by_floats

    def wrong(*args):
        product = by_floats(*args)
        return lambda *tensors: product(*tensors) * 1.5

    monkeypatch.setattr(products, "_by_floats", wrong)
    packed, weight, exact = packed_case("2:4", torch.bfloat16, "keep", 8, 16)
    x = torch.randn(1, 64).bfloat16()
    with pytest.warns(UserWarning, match="differs from torch's"):
        y = products.nm_linear(x, packed.values, packed.bitmask, None, None, 2, 4)
    assert_within_budget(y, nn.functional.linear(x, weight), x.double() @ exact.T)


@pytest.mark.parametrize("values", VALUE_KINDS)
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_numbers_that_are_not_finite_go_where_they_do_with_a_dense_weight(values, tokens):
    packed, weight, _ = packed_case("2:4", torch.bfloat16, values, 8, 128)
    for odd in (float("inf"), -float("inf"), float("nan")):
        x = torch.randn(tokens, 512).bfloat16()
        x[0, 300] = odd
        y = products.nm_linear(x, packed.values, packed.bitmask, packed.scales, None, 2, 4)
        dense = nn.functional.linear(x, weight)
        assert torch.equal(y.isnan(), dense.isnan()) and torch.equal(y.isposinf(), dense.isposinf())
        assert not y[0].isfinite().any() and y[1:].isfinite().all()


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("size", [30.0, 1e2, 1e3, 1e4, 1e5])
@pytest.mark.parametrize("values", ["int8", "int4"])
def test_a_large_column_that_is_dropped_does_not_blur_the_others(values, size, tokens):
    """Integers with a scale for each block would; nothing of such a column is in the product that could hide it."""
    packed, weight, exact = packed_case("2:4", torch.bfloat16, values, 64, 256)
    dropped = weight[:, 300] == 0
    x = torch.randn(tokens, 1024)
    x[:, 300] = size
    x = x.bfloat16()
    y = products.nm_linear(x, packed.values, packed.bitmask, packed.scales, None, 2, 4)
    rows = (y[:, dropped], nn.functional.linear(x, weight[dropped]), x.double() @ exact[dropped].T)
    assert dropped.sum() > 10
    assert_within_budget(*rows)


@pytest.mark.parametrize("number", [-8, 7])
def test_sums_of_the_largest_integers_are_exact(number):
    """Of bytes in 16 bits: four pairs of 8 * 255 at most."""
    values = torch.full((3, 64), (number & 15) * 17, dtype=torch.uint8)
    bitmask = torch.full((3, 32), 0x33, dtype=torch.uint8)
    for sign in (torch.ones(256), -torch.ones(256), torch.tensor([1.0, -1.0] * 128)):
        x = sign[None].bfloat16()
        y = products.nm_linear(x, values, bitmask, torch.ones(3, 2).bfloat16(), None, 2, 4)
        assert y.tolist() == [[number * float(sign.view(-1, 4)[:, :2].sum())] * 3]


def test_integers_hold_tokens_of_any_size():
    """Tokens so small that a scale of theirs would vanish, and one of zeros."""
    packed, weight, exact = packed_case("2:4", torch.bfloat16, "int8", 16, 256)
    for factor in (1.0, 1e-30, 1e30):
        x = torch.randn(3, 1024) * factor
        x[2] = 0.0
        x = x.bfloat16()
        y = products.nm_linear(x, packed.values, packed.bitmask, packed.scales, None, 2, 4)
        assert_within_budget(y, nn.functional.linear(x, weight), x.double() @ exact.T)


def test_what_unpacks_wrongly_is_not_used(cpu, monkeypatch):
    unpacker = products._unpacker

    def wrong(*args):
        unpack = unpacker(*args)
        return lambda *arguments: unpack(*arguments).flip(0)

    monkeypatch.setattr(products, "_unpacker", wrong)
    packed, weight, _ = packed_case("2:4", torch.bfloat16, "keep", 8, 16)
    with pytest.warns(UserWarning, match="differ from the reference"):
        assert_same_bits(products.unpack_nm(packed.values, packed.bitmask, n=2, m=4), weight)


def test_tiles_that_the_system_does_not_permit_are_not_used(monkeypatch):
    has = {"avx512f": True, "amx-tile": True, "amx-bf16": True}
    monkeypatch.setattr(machine.binding, "get_host_cpu_features", lambda: has)
    for permitted in (True, False):
        monkeypatch.setattr(machine, "_tiles_permitted", lambda permitted=permitted: permitted)
        machine.features.cache_clear()
        assert machine.features() == has | {"amx-tile": permitted, "amx-bf16": permitted}
    monkeypatch.undo()
    machine.features.cache_clear()
