"""Packed N:M weights: the format bit for bit, products under the interpreter against the reference, the modules."""

from __future__ import annotations

import copy
import itertools
import mmap
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.cases import cases, slow
from helpers.routes import take_route
from helpers.tiny_llama import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

import maskpro_kernels as mk
from maskpro_kernels import NMPattern, ops
from maskpro_kernels import packed as packed_file
from maskpro_kernels.ops import reference
from maskpro_kernels.ops.cpu.packed_gemm import products
from maskpro_kernels.ops.pattern import GROUP_SIZES, bitmask_of, codes_of
from maskpro_kernels.ops.triton import packed_gemm as kernels_file
from maskpro_kernels.packed import HUGE_PAGE, hold_in_huge_pages, move_into_huge_pages, page_ranges
from maskpro_kernels.prune.finalize import repack

PATTERNS = ["1:2", "1:4", "2:4", "3:4", "1:8", "4:8", "5:8", "8:16", "11:16", "1:16", "15:16"]
MULTIPLIED = ["2:4", "1:4", "4:8", "8:16"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PAGE = mmap.PAGESIZE
KERNEL_OF = {"vector": "packed_vector", "tiles": "packed_linear", "unpack": "unpack"}


def sparse(rows: int, k: int, pattern: str, dtype=torch.float32, seed=0, kept_zeros=0.0) -> torch.Tensor:
    """A weight that follows the pattern; some of what it keeps may be zero too."""
    generator = torch.Generator().manual_seed(seed)
    codes = mk.top_n_mask(torch.rand(rows, k, generator=generator), pattern)
    weight = torch.randn(rows, k, generator=generator).to(dtype)
    weight[torch.rand(rows, k, generator=generator) < kept_zeros] = 0
    return torch.where(mk.expand_mask(codes, pattern), weight, 0)


def test_2_4_by_hand():
    weight = torch.tensor([[0, 1, 0, 2, 3, 4, 0, 0, 0, 0, 5, 6], [7, 0, 0, 8, 0, 9, 10, 0, 0, 11, 0, 0]]).bfloat16()
    packed = mk.pack_24(weight)
    assert packed.values.tolist() == [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 0, 11]]
    # the last group of row 1 has one value: a zero is stored beside it, the first there is
    assert packed.bitmask.tolist() == [[0b0011_1010, 0b1100], [0b0110_1001, 0b0011]]
    assert packed.shape == (2, 12) and packed.nbytes == 2 * 12 + 4
    assert_same_bits(packed.check().unpack(), weight)


@pytest.mark.parametrize(
    ("pattern", "weight", "values", "bitmask"),
    [
        ("1:4", [0, 0, 5, 0, 6, 0, 0, 0], [5, 6], [0b0001_0100]),
        ("4:8", [0, 1, 2, 0, 0, 3, 0, 4], [1, 2, 3, 4], [0b1010_0110]),
        ("1:2", [0, 1, 2, 0, 3, 0, 0, 4], [1, 2, 3, 4], [0b1001_0110]),
        ("8:16", [1, 2, 3, 4, *[0] * 8, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8], [0b1111, 0b1111_0000]),
        ("1:16", [*[0] * 15, 9], [9], [0, 0b1000_0000]),
    ],
)
def test_other_patterns_by_hand(pattern, weight, values, bitmask):
    packed = mk.pack_nm(torch.tensor([weight]).float(), pattern)
    assert packed.values.tolist() == [values] and packed.bitmask.tolist() == [bitmask]
    assert packed.unpack().tolist() == [weight]


@pytest.mark.usefixtures("eager_reference")
@hypothesis.given(
    n_of_m=st.sampled_from(GROUP_SIZES).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m))),
    rows=st.integers(1, 5),
    groups=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
    kept_zeros=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_packing_and_unpacking_give_back_every_bit(n_of_m, rows, groups, dtype, seed, kept_zeros):
    n, m = n_of_m
    weight = sparse(rows, groups * m, f"{n}:{m}", dtype, seed, kept_zeros)
    packed = mk.pack_nm(weight, f"{n}:{m}")
    assert packed.values.shape == (rows, groups * n) and packed.bitmask.shape == (rows, -(-groups * m // 8))
    assert_same_bits(packed.check().unpack(), weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_value_keeps_its_bits(dtype):
    bits = torch.randint(-(1 << 15), 1 << 15, (64, 32), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    values = (bits.to(torch.int16) if dtype.itemsize == 2 else bits * 65537).view(dtype)
    codes = mk.top_n_mask(torch.rand(64, 64), "2:4")
    unpacked = mk.PackedNM(values, bitmask_of(codes, 4), "2:4").unpack()
    assert_same_bits(unpacked[mk.expand_mask(codes, "2:4")].view(64, 32), values)


def test_minus_zero_is_stored_where_there_is_room():
    weight = torch.tensor([[-0.0, 1.0, 0.0, 0.0, -0.0, -0.0, 3.0, 4.0]])
    unpacked = mk.pack_24(weight).unpack()
    assert unpacked.signbit().tolist() == [[True, *[False] * 7]]
    assert torch.equal(unpacked, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torchs_own_compression_stores_the_same_values_at_the_same_places(dtype):
    conversions = pytest.importorskip("torch.sparse._semi_structured_conversions")
    weight = sparse(64, 128, "2:4", dtype)
    packed = mk.pack_24(weight)
    values, metadata = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    assert_same_bits(packed.values, values)
    assert_same_bits(conversions.sparse_semi_structured_to_dense_cutlass(packed.values, metadata), packed.unpack())


@pytest.mark.parametrize("m", GROUP_SIZES)
def test_bitmasks_of_codes_and_back(m):
    codes = mk.top_n_mask(torch.randn(3, 7 * m), NMPattern(f"{m - 1}:{m}"))
    bitmask = bitmask_of(codes, m)
    assert_same_bits(codes_of(bitmask, 7 * m, m), codes)
    bits = (bitmask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1)
    assert_same_bits(bits[:, : 7 * m].bool(), mk.expand_mask(codes, f"{m - 1}:{m}"))
    assert not bits[:, 7 * m :].any()


@pytest.mark.parametrize(
    ("pattern", "dtype"),
    cases(
        itertools.product(PATTERNS, DTYPES), slow=lambda pattern, dtype: pattern == "1:16" and dtype != torch.bfloat16
    ),
    ids=str,
)
def test_the_kernel_unpacks_as_the_reference_does(pattern, dtype, launched):
    n, m = NMPattern(pattern).n, NMPattern(pattern).m
    packed = mk.pack_nm(sparse(37, 5 * m, pattern, dtype), pattern)
    assert_same_bits(packed.unpack(), reference.unpack_nm(packed.values, packed.bitmask, n=n, m=m))
    assert launched["unpack"] == 1


@pytest.mark.parametrize(
    ("pattern", "dtype"),
    [
        pytest.param(p, d, marks=[] if (p, d) == ("2:4", torch.bfloat16) else pytest.mark.slow)
        for p in ("2:4", "1:4", "4:8")
        for d in DTYPES
    ],
)
def test_the_compiled_reference_unpacks_as_the_eager_one(pattern, dtype):
    n, m = NMPattern(pattern).n, NMPattern(pattern).m
    # whole bytes of the bitmask in a row, and not
    for groups in (40, 41):
        packed = mk.pack_nm(sparse(523, groups * m, pattern, dtype), pattern)
        expected = reference.unpack_nm(packed.values, packed.bitmask, n=n, m=m)
        assert_same_bits(products.unpack_nm(packed.values, packed.bitmask, n=n, m=m), expected)


def within_budget(y, by_torch, exact) -> bool:
    error, of_torch = ((t.double() - exact).abs().max() for t in (y, by_torch))
    return bool(error <= 2 * of_torch + 1e-6 * exact.abs().max())


@hypothesis.given(
    pattern=st.sampled_from(MULTIPLIED),
    dtype=st.sampled_from(DTYPES),
    # the kernel of one token runs row by row in the interpreter
    tokens_and_rows=st.tuples(st.just(1), st.integers(1, 30)) | st.tuples(st.integers(2, 80), st.integers(1, 300)),
    k=st.sampled_from([64, 96, 160, 512, 576, 1536, 4096]),
    values=st.sampled_from(mk.packed.VALUE_KINDS),
    biased=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@hypothesis.settings(max_examples=4)
def test_products_stay_within_the_error_budget(pattern, dtype, tokens_and_rows, k, values, biased, seed):
    tokens, rows = tokens_and_rows
    generator = torch.Generator().manual_seed(seed)
    weight = sparse(rows, k, pattern, dtype, seed)
    x = torch.randn(tokens, k, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype) if biased else None
    packed = mk.pack_nm(weight, pattern, values)
    # the kernels multiply what is unpacked, each value rounded to the dtype
    weight = packed.unpack()
    y = mk.nm_linear(x, packed, bias)
    exact = nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert y.dtype == dtype and y.shape == (tokens, rows)
    assert within_budget(y, nn.functional.linear(x, weight, bias), exact)


@pytest.mark.parametrize("pattern", [p if p == "2:4" else slow(p) for p in MULTIPLIED])
@pytest.mark.parametrize(
    ("tokens", "kernel"), [(1, "packed_vector"), (2, "packed_linear"), (64, "packed_linear"), (65, "unpack")]
)
def test_the_route_goes_by_tokens(tokens, kernel, pattern, launched):
    n, m = NMPattern(pattern).n, NMPattern(pattern).m
    for values in mk.packed.VALUE_KINDS:
        packed, x = mk.pack_nm(sparse(4, 128, pattern, torch.bfloat16), pattern, values), torch.randn(tokens, 128)
        launched.clear()
        mk.nm_linear(x.bfloat16(), packed)
        assert {name for name in KERNEL_OF.values() if launched[name]} == {kernel}
        assert KERNEL_OF[kernels_file.route(x.bfloat16(), packed.values, packed.bitmask, n, m)] == kernel


@pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float16)])
@pytest.mark.parametrize(("values", "group"), [("int8", 128), slow("int4", 32), ("int4", 64), slow("int4", 128)])
def test_kernels_place_integers_times_the_scale_of_their_block(values, group, dtype):
    """Unit vectors read the weight out: more than a block in a row, and scales that differ from block to block."""
    weight = sparse(5, 576, "2:4", dtype) * torch.logspace(-2, 2, 576).to(dtype)
    packed = mk.pack_nm(weight, "2:4", values, group)
    assert packed.scales.shape == (5, -(-288 // group)) and packed.scales.unique().numel() >= 14
    for columns in (torch.arange(0, 576, 36), torch.tensor([511])):
        x = torch.eye(576)[columns].to(dtype)
        # without the sign of zeros times a negative scale
        assert_same_bits(mk.nm_linear(x, packed) + 0.0, packed.unpack()[:, columns].t().contiguous() + 0.0)


def in_wider_rows(part):
    """Copy a row into a matrix with another column."""
    return part if part is None else torch.cat([part, part[:, :1]], 1).repeat(2, 1)[:1, :-1]


@pytest.mark.parametrize("values", ["keep", "int8", "int4"])
def test_a_single_row_may_have_any_stride(values):
    packed, x = mk.pack_nm(sparse(1, 128, "2:4", torch.bfloat16), "2:4", values), torch.randn(3, 128).bfloat16()
    own = mk.PackedNM(*map(in_wider_rows, (packed.values, packed.bitmask)), "2:4", in_wider_rows(packed.scales))
    for tokens in (1, 3):
        assert_same_bits(mk.nm_linear(x[:tokens], own), mk.nm_linear(x[:tokens], packed))
    codes = mk.top_n_mask(torch.randn(1, 128), "2:4")
    products = [mk.codes_linear(x, packed.unpack(), each, pattern="2:4") for each in (codes, in_wider_rows(codes))]
    assert_same_bits(*products)


def test_what_no_kernel_multiplies_is_unpacked(launched):
    for pattern, dtype, k in (("2:4", torch.float32, 64), ("3:4", torch.bfloat16, 64), ("2:4", torch.bfloat16, 72)):
        weight = sparse(8, k, pattern, dtype)
        x = torch.randn(1, k).to(dtype)
        y = mk.nm_linear(x, mk.pack_nm(weight, pattern))
        torch.testing.assert_close(y, nn.functional.linear(x, weight))
    assert launched["unpack"] == 3 and not launched["packed_vector"]


@pytest.mark.parametrize("pattern", cases(((p,) for p in PATTERNS), slow=lambda p: p == "1:16"))
def test_gradients_are_those_of_the_unpacked_weight(pattern):
    m = NMPattern(pattern).m
    weight, x, bias = sparse(6, 3 * m, pattern), torch.randn(2, 3, 3 * m), torch.randn(6)
    packed = mk.pack_nm(weight, pattern)
    operands = [x.requires_grad_(), bias.requires_grad_()]
    y = mk.nm_linear(x, packed, bias)
    upstream = torch.randn_like(y)
    ours = torch.autograd.grad(y, operands, upstream)
    dense = nn.functional.linear(x, weight.requires_grad_(), bias)
    *expected, weight_grad = torch.autograd.grad(dense, [*operands, weight], upstream)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other)
    packed.values.requires_grad_()
    values_grad, *again = torch.autograd.grad(mk.nm_linear(x, packed, bias), [packed.values, *operands], upstream)
    assert_same_bits(again, list(ours))
    layer = mk.NMLinear(packed)
    layer.values.requires_grad_()
    (by_weight,) = torch.autograd.grad(nn.functional.linear(x, layer.weight, bias), [layer.values], upstream)
    torch.testing.assert_close(by_weight, values_grad)
    places = mk.PackedNM(values_grad, packed.bitmask, pattern)
    kept = mk.PackedNM(torch.ones_like(values_grad), packed.bitmask, pattern).unpack()
    torch.testing.assert_close(places.unpack(), weight_grad * kept)


@pytest.mark.parametrize("route", ["kernels", "compiled"])
def test_second_derivatives_are_those_of_the_unpacked_weight(route, monkeypatch):
    if route == "compiled":
        take_route(monkeypatch, "compiled")
    weight, x = sparse(6, 16, "2:4"), torch.randn(3, 16, requires_grad=True)
    packed = mk.pack_24(weight)
    packed.values.requires_grad_()
    dense = packed.unpack().detach().requires_grad_()

    def second(y, parameter):
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [x, parameter])

    ours, of_values = second(mk.nm_linear(x, packed), packed.values)
    expected, of_weight = second(nn.functional.linear(x, dense), dense)
    near = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(ours, expected, **near)
    places = mk.PackedNM(of_values, packed.bitmask, "2:4").unpack()
    kept = mk.PackedNM(torch.ones_like(of_values), packed.bitmask, "2:4").unpack()
    torch.testing.assert_close(places, of_weight * kept, **near)


@pytest.mark.parametrize("route", ["kernels", "compiled"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_activations_and_biases_of_any_strides(route, tokens, monkeypatch):
    take_route(monkeypatch, route)
    packed = mk.pack_24(sparse(8, 16, "2:4", torch.bfloat16))
    x = torch.randn(16, 2 * tokens).bfloat16().t()[::2]
    bias = torch.randn(16).bfloat16()[::2]
    expected = nn.functional.linear(x, packed.unpack(), bias)
    assert not x.is_contiguous() and not bias.is_contiguous()
    torch.testing.assert_close(mk.nm_linear(x, packed, bias), expected)


class Subclass(torch.Tensor):
    pass


CALLS = {
    "autocast": lambda layer, x: torch.autocast("cpu")(layer)(x),
    "a negation": lambda layer, x: layer(torch._neg_view(-x)),
    "a tensor of another type": lambda layer, x: layer(x.as_subclass(Subclass)),
    "a trace": lambda layer, x: torch.jit.trace(layer, x, check_trace=False)(x),
    "a graph": lambda layer, x: torch.compile(layer, backend="eager", fullgraph=True)(x),
    "an exported program": lambda layer, x: torch.export.export(layer, (x,)).module()(x),
    "a replica": lambda layer, x: replica(layer)(x),
}


def replica(layer: mk.NMLinear) -> mk.NMLinear:
    """As DataParallel and FSDP make them, with plain attributes for parameters."""
    copy = layer._replicate_for_data_parallel()
    for name in ("values", "bias"):
        setattr(copy, name, getattr(layer, name).detach())
    assert not copy._parameters.get("values")
    return copy


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("route", ["kernels", "compiled"])
@pytest.mark.parametrize("name", CALLS)
def test_torch_sees_a_layer(name, route, monkeypatch):
    take_route(monkeypatch, route)
    layer = mk.NMLinear(mk.pack_24(sparse(8, 32, "2:4")), torch.randn(8))
    x = torch.randn(4, 32)
    y = CALLS[name](layer, x)
    tolerance = 1e-5 if y.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(y.float(), layer(x), rtol=tolerance, atol=tolerance)


def test_parts_on_other_devices_are_named():
    layer = mk.NMLinear(mk.pack_24(sparse(8, 32, "2:4")), torch.randn(8))
    x = torch.randn(1, 32)
    with pytest.raises(ValueError, match="bitmask: expected a tensor on the values' device cpu"):
        packed_file.packed_linear(x, layer.values, layer.bitmask.to("meta"), None, None, layer.pattern)
    with pytest.raises(ValueError, match=r"bias: expected a tensor \[8\] of torch.float32 on cpu"):
        packed_file.packed_linear(x, layer.values, layer.bitmask, None, layer.bias.detach().to("meta"), layer.pattern)


def test_float64_is_refused():
    with pytest.raises(TypeError, match="dtype: expected float32, bfloat16 or float16, got torch.float64"):
        mk.NMLinear(mk.pack_24(sparse(8, 32, "2:4")), None).double()


def test_a_state_dict_of_values_alone_is_checked():
    layer = mk.Sparse24Linear(mk.pack_24(sparse(8, 16, "2:4")))
    with pytest.raises(RuntimeError, match="values: expected a contiguous matrix"):
        layer.load_state_dict({"values": torch.randn(8, 8).t()}, strict=False, assign=True)


@pytest.mark.parametrize("compiled", [False, slow(True)])
def test_packed_layers_are_fine_tuned(compiled):
    """Their zeros stay, and a step goes where the dense layer's goes under the same mask."""
    torch.manual_seed(0)
    linear = nn.Linear(32, 8)
    with torch.no_grad():
        linear.weight.view(-1, 4)[:, 1:3] = 0.0
    # the layers share no bias
    layer, mask = mk.Sparse24Linear.from_dense(copy.deepcopy(linear)), linear.weight.detach() != 0
    assert not layer.values.requires_grad
    layer.requires_grad_()
    optimizers = [torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.0) for module in (layer, linear)]
    forward = torch.compile(layer, fullgraph=True) if compiled else layer
    x, target = torch.randn(16, 32), torch.randn(16, 8)
    losses = []
    for _ in range(3):
        for module, optimizer in zip((forward, linear), optimizers, strict=True):
            loss = (module(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            if module is linear:
                linear.weight.grad *= mask
            else:
                losses.append(float(loss))
            optimizer.step()
    torch.testing.assert_close(layer.packed.unpack(), linear.weight.detach(), rtol=1e-4, atol=1e-5)
    assert losses[2] < losses[0] and ((layer.packed.unpack() != 0).view(-1, 4).sum(1) == 2).all()


@pytest.mark.parametrize("biased", [pytest.param(False, marks=pytest.mark.slow), True])
def test_opcheck(biased):
    packed = mk.pack_24(sparse(8, 32, "2:4"))
    torch.library.opcheck(ops.unpack_nm, (packed.values, packed.bitmask, 2, 4))
    bias = torch.randn(8, requires_grad=True) if biased else None
    x = torch.randn(3, 32, requires_grad=True)
    torch.library.opcheck(ops.nm_linear, (x.detach(), packed.values, packed.bitmask, None, None, 2, 4))
    with_gradients = ops.differentiable_nm_linear
    torch.library.opcheck(with_gradients, (x, packed.values, packed.bitmask, None, bias, 2, 4))
    torch.library.opcheck(with_gradients, (x, packed.values.requires_grad_(), packed.bitmask, None, bias, 2, 4))


def test_nothing_comes_of_nothing(launched):
    packed = mk.pack_24(torch.zeros(0, 16))
    assert packed.values.shape == (0, 8) and packed.unpack().shape == (0, 16)
    assert mk.nm_linear(torch.ones(3, 16), packed).shape == (3, 0)
    for values in ("int8", "int4"):
        stored = mk.pack_nm(torch.zeros(0, 16), "2:4", values)
        assert stored.unpack().shape == (0, 16) and stored.scales.shape == (0, 1)
        assert mk.nm_linear(torch.ones(3, 16), stored).shape == (3, 0)
    launched.clear()
    assert mk.nm_linear(torch.ones(0, 16), mk.pack_24(sparse(4, 16, "2:4"))).shape == (0, 4)
    # pack_24 finds the places
    assert set(launched) == {"top_n_mask"}


@pytest.mark.parametrize("shape", [(32,), (5, 32), (2, 3, 32), (0, 32)])
def test_inputs_of_any_shape(shape):
    weight = sparse(8, 32, "2:4")
    x = torch.randn(shape)
    torch.testing.assert_close(mk.sparse24_linear(x, mk.pack_24(weight)), nn.functional.linear(x, weight))


def test_inputs_and_values_may_lie_anywhere(launched):
    weight = sparse(8, 64, "2:4", torch.bfloat16)
    packed = mk.pack_24(weight)
    values, bitmask = (
        torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in (packed.values, packed.bitmask)
    )
    x = torch.randn(64, 3).bfloat16().t()
    expected = nn.functional.linear(x, weight)
    torch.testing.assert_close(mk.nm_linear(x, mk.PackedNM(values, bitmask, "2:4")), expected)
    # words cannot be loaded from there
    assert launched["unpack"] == 1
    assert_same_bits(products.unpack_nm(values, bitmask, n=2, m=4), weight)


def test_autocast():
    weight, x = sparse(8, 64, "2:4"), torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = mk.nm_linear(x, mk.pack_24(weight), torch.ones(8))
        expected = nn.functional.linear(x, weight, torch.ones(8))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)


def test_a_backward_inside_of_autocast_runs_in_the_dtype_of_its_forward():
    x = torch.randn(3, 64, requires_grad=True)
    upstream = torch.randn(3, 8)
    packed = mk.pack_24(sparse(8, 64, "2:4"))
    expected, inside = (mk.nm_linear(x, packed) for _ in range(2))
    (expected,) = torch.autograd.grad(expected, x, upstream)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(inside, x, upstream)
    assert_same_bits(found, expected)


class TestModules:
    def test_from_dense_computes_as_the_dense_layer(self):
        linear = nn.Linear(64, 24).requires_grad_(False).eval()
        linear.weight.copy_(sparse(24, 64, "4:8"))
        layer = mk.NMLinear.from_dense(linear, "4:8")
        x = torch.randn(5, 64)
        torch.testing.assert_close(layer(x), linear(x))
        assert not layer.training and layer.values.shape == (24, 32) and str(layer.pattern) == "4:8"

    def test_from_masked_computes_as_the_masked_layer_in_eval_mode(self):
        masked = mk.MaskedLinear.from_linear(nn.Linear(64, 24), "2:4").eval()
        x = torch.randn(5, 64)
        for layer in (mk.Sparse24Linear.from_masked(masked), mk.NMLinear.from_masked(masked)):
            torch.testing.assert_close(layer(x), masked(x))

    def test_state_dict_and_dtype(self):
        weights = [sparse(24, 64, "2:4", seed=seed) for seed in range(2)]
        layers = [mk.Sparse24Linear(mk.pack_24(weight), torch.randn(24)) for weight in weights]
        layers[1].load_state_dict(layers[0].state_dict())
        assert_same_bits(layers[1].packed.unpack(), weights[0])
        narrow = layers[1].to(torch.bfloat16)
        assert narrow.bitmask.dtype == torch.uint8 and narrow.values.dtype == torch.bfloat16
        assert_same_bits(narrow.packed.unpack(), weights[0].bfloat16())

    def test_a_damaged_state_dict_is_refused(self):
        layer = mk.Sparse24Linear(mk.pack_24(sparse(24, 64, "2:4")))
        before = layer.packed.unpack()
        for name, change in {
            "bitmask": lambda t: t ^ 1,
            "bitmask of": lambda t: t[:, :-1].clone(),
            "values": lambda t: t[:, :-2].clone(),
        }.items():
            state = {key: value.clone() for key, value in layer.state_dict().items()}
            state[name.split()[0]] = change(state[name.split()[0]])
            with pytest.raises(RuntimeError, match="bitmask: expected|size mismatch for values"):
                layer.load_state_dict(state)
            assert_same_bits(layer.packed.unpack(), before)

    def test_finalize_to_packed(self):
        for pattern, kind in (("2:4", mk.Sparse24Linear), ("4:8", mk.NMLinear)):
            model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
            mk.convert(model, pattern)
            x = torch.randn(3, 64)
            expected = model(x)
            assert mk.finalize(model, to="packed") is model
            assert type(model[0]) is kind and type(model[2]) is kind
            torch.testing.assert_close(model(x), expected)


@pytest.mark.usefixtures("eager_reference")
def test_compiles_as_a_whole():
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    mk.convert(model, "2:4")
    mk.finalize(model, to="packed")
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    whole = torch.compile(model, fullgraph=True, backend=backend)
    for tokens in (2, 3, 17):
        x = torch.randn(tokens, 64)
        assert_same_bits(whole(x), model(x))
    assert len(graphs) <= 2


WEIGHT = sparse(4, 16, "2:4")
PACKED = mk.PackedNM(*(lambda p: (p.values, p.bitmask))(mk.pack_24(WEIGHT)), "2:4")
BAD_CALLS = {
    "weight: expected at most 2 nonzero of every 4 values, got 4 in row 0, columns 0 to 3": (
        lambda: mk.pack_24(torch.ones(4, 16))
    ),
    "weight: expected .* divisible by 4": lambda: mk.pack_24(torch.zeros(4, 18)),
    "weight: expected a dense tensor of float32, bfloat16 or float16, got": lambda: mk.pack_24(
        torch.zeros(4, 16, dtype=torch.int8)
    ),
    "pattern: expected N:M": lambda: mk.pack_nm(WEIGHT, "2:5"),
    "packed: expected a PackedNM": lambda: mk.nm_linear(torch.ones(1, 16), WEIGHT),
    r"x: expected a tensor \[..., 16\]": lambda: mk.nm_linear(torch.ones(1, 12), PACKED),
    "x: expected the weight's dtype": lambda: mk.nm_linear(torch.ones(1, 16).bfloat16(), PACKED),
    "dtype: expected float32, bfloat16 or float16, got torch.float64": (
        lambda: mk.Sparse24Linear(PACKED).double()(torch.ones(1, 16, dtype=torch.float64))
    ),
    r"bias: expected a tensor \[4\]": lambda: mk.nm_linear(torch.ones(1, 16), PACKED, torch.ones(5)),
    r"bias: expected \[4\] of": lambda: mk.NMLinear(PACKED, torch.ones(5)),
    "values: expected rows of a multiple of 2 values": lambda: mk.PackedNM(torch.ones(4, 7), PACKED.bitmask, "2:4"),
    r"bitmask: expected \[4, 2\]": lambda: mk.PackedNM(PACKED.values, PACKED.bitmask[:, :1].clone(), "2:4"),
    "bitmask: expected a tensor of torch.uint8": lambda: mk.PackedNM(PACKED.values, PACKED.bitmask.int(), "2:4"),
    "bitmask: expected exactly 2 of every 4": lambda: mk.PackedNM(PACKED.values, PACKED.bitmask ^ 1, "2:4").check(),
    "bitmask: expected no bits beyond the 4": (
        lambda: mk.PackedNM(torch.ones(1, 2), torch.tensor([[0x33]], dtype=torch.uint8), "2:4").check()
    ),
    "linear: expected nn.Linear": lambda: mk.NMLinear.from_dense(nn.ReLU(), "2:4"),
    "layer: expected MaskedLinear": lambda: mk.NMLinear.from_masked(nn.Linear(16, 4)),
    "to: expected one of dense, packed, got 'sparse'": lambda: mk.finalize(nn.Linear(16, 4), to="sparse"),
}


@pytest.mark.parametrize("reported", BAD_CALLS)
def test_bad_arguments_are_named(reported):
    with pytest.raises((TypeError, ValueError), match=reported):
        BAD_CALLS[reported]()


@pytest.mark.parametrize("values", ["keep", "int8"])
def test_a_packed_weight_is_moved_and_cast_as_its_layer_is(values):
    packed = mk.pack_nm(sparse(8, 32, "2:4"), "2:4", values)
    for asked in ((torch.bfloat16,), ("cpu", torch.float16), (torch.empty(1, dtype=torch.bfloat16),)):
        moved, layer = packed.to(*asked), mk.NMLinear(packed).to(*asked).packed
        assert moved.kind == values and moved.dtype == layer.dtype != torch.float32
        assert_same_bits([moved.values, moved.bitmask, moved.unpack()], [layer.values, layer.bitmask, layer.unpack()])
    assert packed.to("cpu", non_blocking=True) is packed and packed.to(dtype=torch.float32) is packed
    on_meta = packed.to("meta")
    assert on_meta.values.is_meta and on_meta.bitmask.is_meta and (on_meta.scales is None or on_meta.scales.is_meta)
    with pytest.raises(TypeError, match="dtype: expected float32, bfloat16 or float16, got torch.int8|floating"):
        packed.to(torch.int8)
    with pytest.raises(TypeError, match="dtype: expected float32, bfloat16 or float16, got torch.float64"):
        packed.to(torch.float64)


@pytest.mark.parametrize("values", ["keep", "int8", "int4"])
def test_a_cast_to_a_dtype_without_numbers_as_large_is_refused(values):
    """Also where scales fit, but not their products with integers."""
    weight = sparse(8, 32, "2:4")
    weight /= weight.abs().max()
    name = "values" if values == "keep" else "scales"
    reported = f"^{name}: expected weights within 65504, the largest number of torch.float16, got up to "
    for size in (1e5, 1e9, -1e9):
        packed = mk.pack_nm(weight * size, "2:4", values)
        layer = mk.NMLinear(packed)
        for cast in (lambda: packed.to(torch.float16), layer.half, nn.Sequential(layer).half):  # noqa: B023
            with pytest.raises(ValueError, match=reported):
                cast()
        assert layer.packed.dtype == torch.float32
        assert packed.to(torch.bfloat16).unpack().isfinite().all()
    for size in (0.01, 57344):
        assert mk.pack_nm(weight * size, "2:4", values).to(torch.float16).unpack().isfinite().all()


@pytest.mark.parametrize(("values", "nbytes"), [("keep", 8 * 16 * 4 + 8 * 4), ("int8", 8 * 16 + 8 * 4 + 8 * 4)])
def test_a_packed_weight_is_shown_in_a_line(values, nbytes):
    packed = mk.pack_nm(sparse(8, 32, "2:4"), "2:4", values)
    shown = f"shape=[8, 32], pattern=2:4, values={values}, dtype=torch.float32, device=cpu, nbytes={nbytes}"
    assert repr(packed) == f"PackedNM({shown})"


def test_ranges_are_whole_pages_of_neighbours_and_hold_little_else():
    memory = torch.empty(8 * HUGE_PAGE, dtype=torch.uint8)

    class Piece:
        """A tensor with memory of its own at a place in ``memory``."""

        def __init__(self, start: int, size: int):
            self.start, self.size = memory.data_ptr() + start, size

        def numel(self):
            return self.size

        def data_ptr(self):
            return self.start

        @property
        def nbytes(self):
            return self.size

    whole = Piece(3 * PAGE + 100, HUGE_PAGE), Piece(HUGE_PAGE + 100 * PAGE, HUGE_PAGE)
    small, scattered = Piece(6 * HUGE_PAGE, PAGE), (Piece(5 * HUGE_PAGE, PAGE), Piece(6 * HUGE_PAGE - PAGE, PAGE))
    found = page_ranges([small, *whole, Piece(0, 0)])
    assert all(start % PAGE == end % PAGE == 0 for start, end in found)
    end = whole[1].start + HUGE_PAGE
    assert found == [(whole[0].start // PAGE * PAGE, -(-end // PAGE) * PAGE)]
    assert not page_ranges([*scattered, small])


def test_tensors_stay_what_and_where_they_are():
    tensors = [torch.randn(1 << 20), torch.randint(0, 256, (5 << 20,), dtype=torch.uint8), torch.randn(3)]
    before = [(x.data_ptr(), x.clone()) for x in tensors]
    move_into_huge_pages(tensors)
    for x, (place, content) in zip(tensors, before, strict=True):
        assert x.data_ptr() == place and torch.equal(x, content)


def test_only_the_user_moves_packed_weights(tmp_path, monkeypatch):
    moved = []
    monkeypatch.setattr(packed_file, "move_into_huge_pages", lambda tensors: moved.extend(tensors))
    model = tiny_model()
    mk.convert(model, "2:4")
    mk.finalize(model, to="packed").save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    repack(loaded, "int8")
    assert moved == []
    hold_in_huge_pages(loaded)
    assert len(moved) == 3 * 14


def test_a_system_that_refuses_or_has_no_such_call_changes_nothing(monkeypatch):
    asked = []
    system = SimpleNamespace(madvise=lambda *args: asked.append(args) or -1)
    monkeypatch.setattr(packed_file.ctypes, "CDLL", lambda _: system)
    move_into_huge_pages([torch.ones(HUGE_PAGE), torch.ones(HUGE_PAGE, device="meta")])
    assert len(asked) == 1 and asked[0][2] == packed_file.MADV_COLLAPSE
    del system.madvise
    move_into_huge_pages([torch.ones(HUGE_PAGE)])
