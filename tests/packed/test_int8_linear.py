"""``Int8Linear``: layers with int8 values of all weights, and output layers that become such."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers.allocated import allocated
from helpers.bits import assert_same_bits
from helpers.routes import take_route
from helpers.tiny_llama import tiny_model
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels import ops
from maskpro_kernels.ops import unfused
from maskpro_kernels.ops.cpu.packed_gemm import products
from maskpro_kernels.ops.reference import SCALED
from maskpro_kernels.packed import Int8Linear, hold_in_huge_pages
from maskpro_kernels.prune.finalize import unpack

pytestmark = pytest.mark.usefixtures("eager_reference")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def dense(k: int = 200, dtype=torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(k, 24, bias=bias).to(dtype)


def layer(k: int = 200, dtype=torch.float32, bias: bool = True) -> Int8Linear:
    return Int8Linear.from_dense(dense(k, dtype, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_the_nearest(dtype):
    linear, rounded = dense(dtype=dtype), layer(dtype=dtype)
    assert rounded.values.shape == (24, 200) and rounded.scales.shape == (24, 2) and rounded.scales.dtype == dtype
    assert linear.bias.requires_grad and not rounded.bias.requires_grad
    assert_same_bits(rounded.bias, linear.bias)
    each = rounded.scales.double().repeat_interleave(SCALED, dim=1)[:, :200]
    assert ((rounded.values * each - linear.weight.double()).abs() <= each * (0.5 + 2.0**-18)).all()
    # the block's largest value has no smaller scale
    assert (rounded.values.abs()[:, :SCALED].amax(1) >= 126).all() and rounded.values.abs().max() <= 127
    assert_same_bits(rounded.weight, (rounded.values.float() * each.float()).to(dtype))
    assert rounded.nbytes == 24 * 200 + 24 * 2 * dtype.itemsize


@pytest.mark.parametrize("route", ["eager", "kernels", "compiled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products(route, dtype, monkeypatch):
    take_route(monkeypatch, route)
    # several slices of rows
    monkeypatch.setattr(unfused, "DEQUANTIZED", 1000)
    rounded = layer(dtype=dtype)
    for shape in ((3, 200), (200,), (2, 0, 200), (2, 5, 200)):
        x = torch.randn(shape).to(dtype)
        with torch.no_grad():
            y = rounded(x)
        expected = nn.functional.linear(x.double(), rounded.weight.double(), rounded.bias.double())
        assert y.dtype == dtype and y.shape == expected.shape
        torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("bias", [True, False])
def test_the_operation_keeps_the_contract_of_torch(bias):
    rounded = layer(bias=bias)
    arguments = (torch.randn(3, 200), rounded.values, rounded.scales, rounded.bias)
    torch.library.opcheck(ops.int8_linear, arguments)


def test_gradients_are_those_of_the_dense_layer():
    rounded = layer()
    rounded.requires_grad_()
    linear = nn.Linear(200, 24)
    linear.load_state_dict({"weight": rounded.weight, "bias": rounded.bias})
    xs = [torch.ones(3, 200, requires_grad=True) for _ in range(2)]
    for each, x in zip((rounded, linear), xs, strict=True):
        each(x).square().sum().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad)
    torch.testing.assert_close(rounded.bias.grad, linear.bias.grad)
    x = torch.randn(3, 200)
    torch.testing.assert_close(torch.func.vmap(rounded)(x[:, None])[:, 0], linear(x))
    tangents = [torch.func.jvp(each, (x,), (x,))[1] for each in (rounded, linear)]
    torch.testing.assert_close(*tangents)


def test_a_compiled_layer_and_autocast():
    rounded, x = layer(), torch.randn(3, 200)
    compiled = torch.compile(rounded, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), rounded(x))
        with torch.autocast("cpu", torch.bfloat16):
            y = rounded(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), rounded(x), rtol=2e-2, atol=2e-2)
    with torch.inference_mode():
        torch.testing.assert_close(rounded(x), nn.functional.linear(x, rounded.weight, rounded.bias))


def test_a_dtype_changes_the_scales_alone():
    rounded = layer()
    cast = copy.deepcopy(rounded).to(torch.bfloat16)
    assert cast.values.dtype == torch.int8 and cast.scales.dtype == cast.bias.dtype == torch.bfloat16
    assert_same_bits(cast.values, rounded.values)
    rounded.scales.fill_(1e30)
    with pytest.raises(ValueError, match="scales: expected weights within 65504"):
        rounded.half()
    with pytest.raises(TypeError, match="dtype: expected float32, bfloat16 or float16"):
        rounded.double()


def test_copies_and_state_dicts():
    rounded, x = layer(), torch.randn(3, 200)
    assert set(rounded.state_dict()) == {"values", "scales", "bias"}
    other = Int8Linear.from_dense(nn.Linear(200, 24))
    other.load_state_dict(rounded.state_dict())
    for each in (copy.deepcopy(rounded), pickle.loads(pickle.dumps(rounded)), other):
        assert_same_bits(each(x), rounded(x))
    assert repr(rounded) == "Int8Linear(in_features=200, out_features=24, bias=True)"
    damaged = {**rounded.state_dict(), "scales": rounded.scales * torch.nan}
    with pytest.raises(RuntimeError, match="scales: expected finite numbers of at least 0, got others"):
        other.load_state_dict(damaged)
    with pytest.raises(RuntimeError, match="values: expected torch.int8, got"):
        other.load_state_dict({**rounded.state_dict(), "values": rounded.values.float()})
    with pytest.raises(RuntimeError, match="scales: expected torch.float32 or torch.bfloat16 or torch.float16, got"):
        other.load_state_dict({**rounded.state_dict(), "scales": rounded.scales.double()}, assign=True)
    assert_same_bits(other(x), rounded(x))


def test_arguments_are_checked():
    rounded = layer()
    parts = rounded.values, rounded.scales, rounded.bias.detach()
    for index, wrong, message in (
        (0, parts[0].float(), "values: expected a tensor of torch.int8"),
        (0, parts[0][0], r"values: expected a matrix \[out, K\]"),
        (1, parts[1].double(), "scales: expected a tensor of torch.float32 or"),
        (1, parts[1][:, :1], r"scales: expected \[24, 2\] of torch.float32"),
        (2, parts[2].half(), r"bias: expected \[24\] of torch.float32"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            Int8Linear(*parts[:index], wrong, *parts[index + 1 :])
    with pytest.raises(TypeError, match="linear: expected nn.Linear, got ReLU"):
        Int8Linear.from_dense(nn.ReLU())
    linear = dense()
    linear.weight.data[2, 3] = torch.inf
    with pytest.raises(ValueError, match="weight: expected finite values for int8"):
        Int8Linear.from_dense(linear)
    for x in (torch.randn(3, 199), torch.randn(3, 200).double()):
        with pytest.raises((TypeError, ValueError), match="x: expected"):
            rounded(x)
    rounded.scales[0, 0] = -1
    with pytest.raises(ValueError, match="scales: expected finite numbers of at least 0"):
        rounded.check()


def test_no_dense_weight_is_made(monkeypatch):
    """On a CPU that multiplies packed weights."""
    take_route(monkeypatch, "compiled")
    # poisoned buffers are kept
    monkeypatch.setattr(products, "torch", torch)
    rounded = Int8Linear.from_dense(nn.Linear(1024, 4096).bfloat16())
    for tokens in (1, 40):
        x = torch.randn(tokens, 1024).bfloat16()
        with torch.no_grad():
            rounded(x)
            # a dense weight has 8 MiB
            assert allocated(lambda x=x: rounded(x)).peak < 4 << 20


def test_values_and_scales_are_moved_into_huge_pages(monkeypatch):
    moved = []
    monkeypatch.setattr("maskpro_kernels.packed.move_into_huge_pages", moved.extend)
    rounded = layer()
    hold_in_huge_pages(nn.Sequential(rounded, nn.Linear(24, 2)))
    assert [id(tensor) for tensor in moved] == [id(rounded.values), id(rounded.scales)]


TOKENS = torch.arange(12).view(2, 6)


@pytest.mark.parametrize("tied", [True, False])
def test_finalize_rounds_the_output_layer(tied):
    model = tiny_model(tie_word_embeddings=tied)
    mk.convert(model, "2:4")
    embedding = model.model.embed_tokens.weight
    weight = model.lm_head.weight.clone()
    mk.finalize(model, to="packed", output_layer="int8")
    head = model.get_output_embeddings()
    assert type(head) is Int8Linear and model.model.embed_tokens.weight is embedding
    assert_same_bits(head.weight, Int8Linear(*rounded_of(weight)).weight)
    assert not model.config.tie_word_embeddings and not model.all_tied_weights_keys
    # nothing ties it again
    model.tie_weights()
    assert model.get_output_embeddings() is head
    logits = model(TOKENS).logits
    expected = nn.functional.linear(model.model(TOKENS).last_hidden_state, head.weight)
    torch.testing.assert_close(logits, expected)
    unpack(model)
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is not model.model.embed_tokens.weight
    assert_same_bits(model(TOKENS).logits, expected)


def rounded_of(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    linear = nn.Linear(1, 1, bias=False)
    linear.weight = nn.Parameter(weight)
    rounded = Int8Linear.from_dense(linear)
    return rounded.values, rounded.scales


def test_models_without_such_an_output_layer_are_refused(monkeypatch):
    model = tiny_model()
    mk.convert(model, "2:4")
    with pytest.raises(ValueError, match="output_layer: expected one of keep, int8, got 'int4'"):
        mk.finalize(model, to="packed", output_layer="int4")
    with pytest.raises(ValueError, match='output_layer: expected "keep" beside dense layers, got'):
        mk.finalize(model, output_layer="int8")
    linear = nn.Sequential(nn.Linear(64, 8))
    mk.convert(linear, "2:4")
    with pytest.raises(ValueError, match="output_layer: expected a model whose output layer is an nn.Linear, got none"):
        mk.finalize(linear, to="packed", output_layer="int8")
    assert isinstance(linear[0], mk.MaskedLinear)
    with monkeypatch.context() as patch:
        patch.setattr(model, "get_output_embeddings", lambda: nn.Linear(64, 8))
        with pytest.raises(ValueError, match="output_layer: expected one of the modules of .*, got another Linear"):
            mk.finalize(model, to="packed", output_layer="int8")
    model.lm_head.weight.data[1, 2] = torch.nan
    with pytest.raises(ValueError, match="model: lm_head.weight: expected finite values for int8, got others"):
        mk.finalize(model, to="packed", output_layer="int8")
    assert model.config.tie_word_embeddings and isinstance(model.lm_head, nn.Linear)


def test_a_tied_output_layer_of_an_encoder_decoder_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 32, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, tie_word_embeddings=True))
    mk.convert(model, "2:4")
    with pytest.raises(ValueError, match="expected a decoder, or an output layer of its own, got T5For"):
        mk.finalize(model, to="packed", output_layer="int8")
