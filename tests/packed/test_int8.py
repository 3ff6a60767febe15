"""Packed weights with int8 values: how they are rounded, what they take, and the layers that hold them."""

from __future__ import annotations

import copy
import pickle

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.tiny_llama import tiny_model
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.kept_zeros import KeptZeros
from maskpro_kernels.ops.reference import SCALED
from maskpro_kernels.packed import bits_a_weight
from maskpro_kernels.prune.finalize import pack, repack, unpack

pytestmark = pytest.mark.usefixtures("eager_reference")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def sparse(rows: int, k: int, pattern: str = "2:4", dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    codes = mk.top_n_mask(torch.rand(rows, k, generator=generator), pattern)
    weight = torch.randn(rows, k, generator=generator)
    return torch.where(mk.expand_mask(codes, pattern), weight, 0).to(dtype)


def layer(k: int = 64, dtype=torch.float32) -> mk.Sparse24Linear:
    return mk.Sparse24Linear(mk.pack_nm(sparse(24, k, dtype=dtype), "2:4", "int8"), torch.randn(24).to(dtype))


def blocks_of(packed: mk.PackedNM, kept: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(kept weights, int8 values, scale of each row) of each block, in float64."""
    return [
        (kept[:, at : at + SCALED].double(), packed.values[:, at : at + SCALED].double(), scale.double().unsqueeze(1))
        for at, scale in zip(range(0, kept.shape[1], SCALED), packed.scales.unbind(1), strict=True)
    ]


class TestRounding:
    @hypothesis.given(
        pattern=st.sampled_from(["2:4", "1:4", "4:8", "3:4", "15:16"]),
        dtype=st.sampled_from(DTYPES),
        groups=st.integers(1, 70),
        # float16 weights whose scales are subnormal, and some so small that no scale is small enough
        exponent=st.integers(-24, 12),
        seed=st.integers(0, 2**32 - 1),
    )
    # a value just beyond the middle between two integers, but for the rounding of its quotient
    @hypothesis.example(pattern="15:16", dtype=torch.float32, groups=33, exponent=0, seed=702685876)
    @hypothesis.settings(max_examples=60)
    def test_each_value_is_off_by_half_a_scale_at_most(self, pattern, dtype, groups, exponent, seed):
        pattern = mk.NMPattern(pattern)
        weight = (sparse(3, groups * pattern.m, str(pattern), torch.float64, seed) * 2.0**exponent).to(dtype)
        kept = mk.pack_nm(weight, pattern).values
        packed = mk.pack_nm(weight, pattern, "int8").check()
        assert packed.dtype == dtype and packed.scales.dtype == dtype and packed.values.dtype == torch.int8
        for before, values, scale in blocks_of(packed, kept):
            # quotients up to 127 are rounded to float32, by 2^-18 at most
            assert ((values * scale - before).abs() <= scale * (0.5 + 2.0**-18)).all()
            assert values.abs().max() <= 127
            # the scale is the least number of its dtype that reaches the largest
            largest = before.abs().amax(1, keepdim=True)
            assert (127 * scale * (1 + 1e-6) >= largest).all()
            below = torch.nextafter(scale.to(dtype), torch.zeros((), dtype=dtype)).double()
            assert ((127 * below < largest * (1 + 1e-6)) | (scale == 0)).all()

    def test_scales_are_those_of_blocks_of_128_values_of_a_row(self):
        weight = torch.zeros(2, 600)
        # of 300 kept values the last 44 have a block of their own
        weight[0, 0], weight[0, 255], weight[0, 256], weight[1, 599] = 1.27, -2.54, 127.0, 0.0127
        packed = mk.pack_nm(weight, "2:4", "int8")
        torch.testing.assert_close(packed.scales, torch.tensor([[0.02, 1.0, 0.0], [0.0, 0.0, 0.0001]]))
        assert packed.values.shape == (2, 300) and packed.values.min() == -127
        torch.testing.assert_close(packed.unpack()[0, [0, 255, 256]], torch.tensor([1.28, -2.54, 127.0]))

    @pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
    def test_what_is_not_finite_is_refused(self, value):
        weight = sparse(4, 64)
        weight[2, weight[2].nonzero()[0]] = value
        assert mk.pack_nm(weight, "2:4").values.isfinite().logical_not().sum() == 1
        with pytest.raises(ValueError, match="weight: expected finite values for int8"):
            mk.pack_nm(weight, "2:4", "int8")

    @pytest.mark.parametrize(("pattern", "bits"), [("2:4", 5.0625), ("1:4", 3.03125), ("4:8", 5.0625)])
    def test_bits_a_weight(self, pattern, bits):
        """8 bits for N of M, one bit, and 16 bits for each 128 kept."""
        packed = mk.pack_nm(sparse(16, 1024, pattern, torch.bfloat16), pattern, "int8")
        assert 8 * packed.nbytes / packed.shape.numel() == bits == bits_a_weight([mk.NMLinear(packed)])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_stored_in_another_way_and_back(self, dtype):
        kept = mk.pack_nm(sparse(8, 320, dtype=dtype), "2:4")
        packed = kept.stored_as("int8")
        assert_same_bits([packed.values, packed.scales], list(of_int8(mk.pack_nm(kept.unpack(), "2:4", "int8"))))
        again = packed.stored_as("keep")
        assert again.kind == "keep" and again.values.dtype == dtype and again.bitmask is packed.bitmask
        assert_same_bits(again.unpack(), packed.unpack())
        assert packed.stored_as("int8") is packed
        with pytest.raises(ValueError, match="values: expected one of keep, int8, int4, got 'int2'"):
            packed.stored_as("int2")


def of_int8(packed: mk.PackedNM) -> tuple[torch.Tensor, torch.Tensor]:
    return packed.values, packed.scales


class TestLayers:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_a_dtype_changes_the_scales_alone(self, dtype):
        one = layer(k=512)
        other = copy.deepcopy(one).to(dtype)
        assert other.values.dtype == torch.int8 and other.scales.dtype == other.bias.dtype == dtype
        assert_same_bits(other.values, one.values)
        assert other.packed.dtype == other.weight.dtype == dtype
        x = torch.randn(3, 512).to(dtype)
        torch.testing.assert_close(other(x), nn.functional.linear(x, other.weight, other.bias), rtol=2e-2, atol=2e-2)
        assert copy.deepcopy(one).half().scales.dtype == torch.float16

    def test_gradients_go_past_the_values(self):
        one = layer()
        model = nn.Sequential(one, nn.Linear(24, 4)).requires_grad_()
        assert {name for name, p in model.named_parameters() if p.requires_grad} == {"0.bias", "1.weight", "1.bias"}
        x = torch.randn(3, 64, requires_grad=True)
        model(x).sum().backward()
        assert all(p.grad is not None for p in [*model.parameters(), x])
        model.requires_grad_(False)

    def test_copies_give_the_same(self):
        one, x = layer(), torch.randn(3, 64)
        for other in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
            assert_same_bits(other(x), one(x))
            assert other.kind == "int8" and "values=int8" in repr(other)

    def test_state_dicts(self):
        one, other = layer(), mk.Sparse24Linear(mk.pack_nm(torch.zeros(24, 64), "2:4", "int8"), torch.zeros(24))
        assert set(one.state_dict()) == {"values", "bitmask", "scales", "bias"}
        other.load_state_dict(one.state_dict())
        assert_same_bits(other.packed.unpack(), one.packed.unpack())

    def test_other_kinds_of_values_are_refused(self):
        """Also if nobody asks for missing keys: int8 values would else pass as weights."""
        kinds = layer(), mk.Sparse24Linear(mk.pack_24(sparse(24, 64)), torch.zeros(24))
        for one, other in (kinds, kinds[::-1]):
            before = copy.deepcopy(one.state_dict())
            with pytest.raises(RuntimeError, match="state_dict: values: expected .*, got"):
                one.load_state_dict(other.state_dict(), strict=False)
            assert_same_bits(one.state_dict(), before)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
    def test_scales_that_are_none_are_refused(self, value):
        state = copy.deepcopy(layer().state_dict())
        state["scales"][3, 0] = value
        with pytest.raises(RuntimeError, match="state_dict: scales: expected finite numbers of at least 0"):
            layer().load_state_dict(state)


def masked() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    mk.convert(model, "2:4")
    return model


class TestModels:
    def test_finalize_rounds_and_unpack_gives_what_was_rounded(self):
        model = masked()
        dense, x = mk.finalize(copy.deepcopy(model)), torch.randn(3, 64)
        mk.finalize(model, to="packed", values="int8")
        assert [type(module) for module in model] == [mk.Sparse24Linear, nn.ReLU, mk.Sparse24Linear]
        assert model[0].kind == "int8" and not model[0].training
        torch.testing.assert_close(model(x), dense(x), rtol=0.0, atol=0.05)
        weight = model[0].weight.clone()
        unpack(model)
        assert type(model[0]) is nn.Linear and model[0].weight.dtype == torch.float32
        assert_same_bits(model[0].weight.detach(), weight)
        assert not model[0].weight.requires_grad
        pack(model, "2:4", "int8")
        assert model[2].kind == "int8"

    def test_repack(self):
        model = mk.finalize(masked(), to="packed")
        assert repack(model, "int8") == 2 and repack(model, "int8") == 0
        weight = model[0].weight
        assert repack(model, "keep") == 2 and type(model[0].values) is nn.Parameter
        assert_same_bits(model[0].weight, weight)

    def test_a_weight_that_is_not_finite_is_named_and_nothing_changes(self):
        model = masked()
        model[2].weight.data[3] = float("nan")
        with pytest.raises(ValueError, match="model: 2.weight: expected finite values for int8"):
            mk.finalize(model, to="packed", values="int8")
        assert all(isinstance(model[at], mk.MaskedLinear) for at in (0, 2))

    def test_kept_zeros_have_nothing_to_keep(self):
        model = tiny_model()
        mk.convert(model, "2:4")
        mk.finalize(model, to="packed", values="int8")
        with pytest.raises(ValueError, match="a packed model needs no KeptZeros"):
            KeptZeros(model.requires_grad_(), "2:4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_number_stays_finite(dtype):
    largest = torch.finfo(dtype).max
    linear = nn.Linear(64, 2, bias=False).to(dtype)
    with torch.no_grad():
        linear.weight[0, 3] = largest
        linear.weight[1, 5] = -largest
    weight = mk.Int8Linear.from_dense(linear).weight
    assert weight.isfinite().all()
    step = largest / 127
    assert abs(weight[0, 3].item() - largest) < step and abs(weight[1, 5].item() + largest) < step
