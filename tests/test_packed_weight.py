"""A packed weight on its own: moved, cast and shown."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import assert_same_bits

import maskpro_kernels as mk

pytestmark = pytest.mark.usefixtures("eager_reference")


def sparse() -> torch.Tensor:
    """[8, 32], two of every four kept."""
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    weight.view(-1, 4)[:, 2:] = 0
    return weight


@pytest.mark.parametrize("values", ["keep", "int8"])
def test_a_packed_weight_is_moved_and_cast_as_its_layer_is(values):
    packed = mk.pack_nm(sparse(), "2:4", values)
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


@pytest.mark.parametrize(("values", "nbytes"), [("keep", 8 * 16 * 4 + 8 * 4), ("int8", 8 * 16 + 8 * 4 + 8 * 4)])
def test_a_packed_weight_is_shown_in_a_line(values, nbytes):
    packed = mk.pack_nm(sparse(), "2:4", values)
    shown = f"shape=[8, 32], pattern=2:4, values={values}, dtype=torch.float32, device=cpu, nbytes={nbytes}"
    assert repr(packed) == f"PackedNM({shown})"
