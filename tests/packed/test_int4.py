"""Packed weights with int4 values: their bytes, their scales, layers, and checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.tiny_llama import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

import maskpro_kernels as mk
import maskpro_kernels.hf  # noqa: F401  registers the quantizer
from maskpro_kernels.ops import reference
from maskpro_kernels.packed import bits_a_weight, packed_int4
from maskpro_kernels.prune.finalize import pack, repack

pytestmark = pytest.mark.usefixtures("eager_reference")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PATTERNS = [f"{n}:{m}" for m in (2, 4, 8, 16) for n in range(1, m)]


def sparse(rows: int, k: int, pattern: str = "2:4", dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    codes = mk.top_n_mask(torch.rand(rows, k, generator=generator), pattern)
    return torch.where(mk.expand_mask(codes, pattern), torch.randn(rows, k, generator=generator), 0).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_numbers_of_scales_come_back_at_every_pattern(dtype):
    """Rows of one group of M, of whole bytes, and with a tail after whole blocks of 32."""
    for pattern in map(mk.NMPattern, PATTERNS):
        for groups in (2, 5 * 32 // pattern.n // 2 * 2):
            kept = groups * pattern.n
            generator = torch.Generator().manual_seed(kept)
            numbers = torch.randint(-8, 8, (3, kept), generator=generator, dtype=torch.int8)
            codes = mk.top_n_mask(torch.rand(3, groups * pattern.m, generator=generator), pattern)
            weight = torch.zeros(3, groups * pattern.m)
            scales = torch.tensor([0.5, -1.0, 2.0])[torch.arange(-(-kept // 32)) % 3].expand(3, -1).contiguous()
            each = scales.repeat_interleave(32, dim=1)[:, :kept]
            weight[mk.expand_mask(codes, pattern)] = (numbers * each).flatten()
            bitmask = mk.pack_nm(mk.expand_mask(codes, pattern).to(dtype), pattern).bitmask
            stored = mk.PackedNM(packed_int4(numbers), bitmask, pattern, scales.to(dtype)).check()
            assert stored.kind == "int4" and list(stored.shape) == [3, groups * pattern.m]
            assert_same_bits(stored.unpack() + 0.0, weight.to(dtype) + 0.0)
            assert_same_bits(reference.numbers_of(stored.values), numbers)
            # and once more through the search of scales: the largest is -8 of some scale, or clipped
            again = mk.pack_nm(stored.unpack(), pattern, "int4", 32).check()
            error = (again.unpack().double() - weight.double()).square().sum()
            assert error <= 0.01 * weight.double().square().sum()


@pytest.mark.parametrize("group", [32, 64, 128])
def test_scales_have_a_smaller_error_than_those_of_the_largest_value(group):
    weight = sparse(16, 640, dtype=torch.bfloat16)
    stored = mk.pack_nm(weight, "2:4", "int4", group)
    assert stored.group == group and list(stored.scales.shape) == [16, -(-320 // group)]
    kept = mk.pack_nm(weight, "2:4").values.float()
    errors = []
    for at, scales in zip(range(0, 320, group), stored.scales.float().split(1, dim=1), strict=True):
        block = kept[:, at : at + group]
        numbers = (block / scales).round()
        found = reference.numbers_of(stored.values)[:, at : at + group]
        assert torch.equal(found, numbers.clamp(-8, 7).to(torch.int8))
        largest = block.abs().amax(1, keepdim=True) / 7
        of_largest = ((block / largest).round() * largest - block).square().sum()
        errors.append(((found * scales - block).square().sum() / of_largest).item())
    assert max(errors) < 0.95 and sum(errors) / len(errors) < 0.85
    # of the two ends of the integers the further one is for the largest value, whatever its sign
    assert (stored.scales < 0).any() and (stored.scales > 0).any()


@pytest.mark.parametrize("exponent", [-110, -80, 66, 120])
def test_scales_do_not_depend_on_the_size_of_the_weight(exponent):
    """Whose squares are not finite, or 0; a power of two changes the exponents of scales alone."""
    weight, factor = sparse(8, 256), 2.0**exponent
    weight[0, :128] = 0
    ordinary, extreme = mk.pack_nm(weight, "2:4", "int4"), mk.pack_nm(weight * factor, "2:4", "int4").check()
    assert_same_bits([extreme.values, extreme.scales], [ordinary.values, ordinary.scales * factor])


@pytest.mark.parametrize("exponent", [-140, -126, -20, 127])
def test_scales_of_the_smallest_and_the_largest_numbers(exponent):
    """The smallest are rounded to multiples of 2**-149."""
    weight = sparse(8, 256).clamp(-1, 1) * 2.0**exponent
    error = mk.pack_nm(weight, "2:4", "int4").check().unpack().double() - weight.double()
    assert error.norm() < 0.11 * weight.double().norm()


@pytest.mark.parametrize(("group", "bits"), [(32, 3.25), (64, 3.125), (128, 3.0625)])
def test_bits_a_weight(group, bits):
    stored = mk.pack_nm(sparse(16, 1024, dtype=torch.bfloat16), "2:4", "int4", group)
    assert bits_a_weight([mk.NMLinear(stored)]) == bits


def test_a_changed_half_byte_changes_one_weight():
    stored = mk.pack_nm(sparse(8, 96), "2:4", "int4")
    before, x = stored.unpack(), torch.randn(5, 96)
    kept = (stored.bitmask.unsqueeze(-1) >> torch.arange(8) & 1).flatten(1)
    product = mk.nm_linear(x, stored)
    for row, value in ((0, 0), (3, 31), (7, 47)):
        values = stored.values.clone()
        values[row, value // 2] ^= 1 << 4 * (value % 2)
        other = mk.PackedNM(values, stored.bitmask, "2:4", stored.scales)
        assert (other.unpack() != before).nonzero().tolist() == [[row, int(kept[row].nonzero()[value])]]
        assert (mk.nm_linear(x, other) != product).any(0).nonzero().tolist() == [[row]]


def test_what_int4_cannot_store_is_refused():
    weight = sparse(4, 64)
    numbers, bitmask = torch.zeros(4, 16, dtype=torch.uint8), mk.pack_24(weight).bitmask
    weight[2, weight[2].nonzero()[0]] = float("nan")
    refused = {
        "weight: expected finite values for int4": lambda: mk.pack_nm(weight, "2:4", "int4"),
        "weight: expected an even number of kept values in a row for int4, got 9": (
            lambda: mk.pack_nm(torch.zeros(2, 12), "3:4", "int4")
        ),
        "group: expected one of 32, 64, 128, got 48": lambda: mk.pack_nm(weight, "2:4", "int4", 48),
        "group: expected one of 32, 64, 128, got 64.0": lambda: mk.pack_nm(weight, "2:4", "int4", 64.0),
        "values: expected one of keep, int8, int4": lambda: mk.pack_nm(weight, "2:4", "int2"),
        r"scales: expected \[4, 1\] on cpu beside 2:4 values \[4, 16\], got .*\[4, 3\]": (
            lambda: mk.PackedNM(numbers, bitmask, "2:4", torch.ones(4, 3))
        ),
        # as of int4: of int8 each 128 share a scale
        r"scales: expected \[4, 2\] on cpu beside 2:4 values \[4, 256\], got .*\[4, 4\]": (
            lambda: mk.PackedNM(
                torch.zeros(4, 256, dtype=torch.int8), mk.pack_24(sparse(4, 512)).bitmask, "2:4", torch.ones(4, 4)
            )
        ),
        "scales: expected finite numbers": (
            lambda: mk.PackedNM(numbers, bitmask, "2:4", torch.full((4, 1), torch.nan)).check()
        ),
        "scales: expected them beside int8 or int4 values": lambda: mk.PackedNM(numbers, bitmask, "2:4"),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()


def layer(group: int = 64, dtype=torch.float32) -> mk.Sparse24Linear:
    return mk.Sparse24Linear(mk.pack_nm(sparse(24, 256, dtype=dtype), "2:4", "int4", group), torch.randn(24).to(dtype))


def test_layers():
    one, x = layer(), torch.randn(3, 256)
    assert one.kind == "int4" and "values=int4" in repr(one)
    other = copy.deepcopy(one).bfloat16()
    assert other.values.dtype == torch.uint8 and other.weight.dtype == other.scales.dtype == torch.bfloat16
    other = layer()
    other.load_state_dict(one.state_dict())
    assert_same_bits(other(x), one(x))
    eight = mk.Sparse24Linear(one.packed.stored_as("int8"), one.bias)
    for model, state in ((one, eight.state_dict()), (eight, one.state_dict())):
        with pytest.raises(RuntimeError, match="state_dict: values: expected torch"):
            model.load_state_dict(state, strict=False)
    with pytest.raises(RuntimeError, match="scales"):
        one.load_state_dict(layer(32).state_dict())
    assert one.packed.stored_as("int4").scales is one.scales
    assert one.packed.stored_as("int4", 128).group == 128


def test_models():
    model = nn.Sequential(nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    mk.convert(model, "2:4")
    dense, x = mk.finalize(copy.deepcopy(model)), torch.randn(3, 128)
    packed = copy.deepcopy(dense)
    pack(packed, "2:4", "int4", 32)
    mk.finalize(model, to="packed", values="int4", group=32)
    assert_same_bits(model(x), packed(x))
    torch.testing.assert_close(model(x), dense(x), rtol=0.0, atol=0.2)
    assert model[0].packed.group == 32
    assert repack(model, "int4", 32) == 0 and repack(model, "int4") == 1 and repack(model, "int8") == 2


@pytest.mark.parametrize("group", [64, 32])
def test_checkpoints(group, tmp_path):
    tokens = torch.arange(12).view(2, 6)
    model = tiny_model(intermediate_size=192)
    mk.convert(model, "2:4")
    mk.finalize(model, to="packed", values="int4", group=group).save_pretrained(tmp_path)
    layers = model.config.quantization_config.layers
    expected = {
        name: {"pattern": "2:4", "values": "int4", "group": module.packed.group}
        for name, module in model.named_modules()
        if isinstance(module, mk.NMLinear)
    }
    assert layers == expected and group in {each["group"] for each in layers.values()}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_bits(loaded(tokens).logits, model(tokens).logits)
    loaded.requires_grad_()(tokens, labels=tokens).loss.backward()
