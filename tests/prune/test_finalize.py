"""Finished masks out of a model."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.nets import assert_unchanged, codes_of, snapshot
from torch import nn

import maskpro_kernels as mk

pytestmark = pytest.mark.usefixtures("eager_reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_finalize_bakes_the_masks_in(pattern, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8, dtype=dtype), nn.GELU(), nn.Linear(8, 8, bias=False, dtype=dtype))
    mk.convert(model, pattern)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.logits.normal_()
    codes = [codes_of(model[0]), codes_of(model[2])]
    weights = [model[0].weight.clone(), model[2].weight.clone()]
    x = torch.randn(3, 16, dtype=dtype)
    expected = model.eval()(x)

    assert mk.finalize(model) is model
    assert_same_bits(model(x), expected)
    for layer, code, weight in zip((model[0], model[2]), codes, weights, strict=True):
        kept = mk.expand_mask(code, pattern)
        assert type(layer) is nn.Linear
        assert (layer.in_features, layer.out_features) == (weight.shape[1], weight.shape[0])
        assert_same_bits(layer.weight[kept], weight[kept])
        bits = layer.weight.detach().view(torch.int32 if dtype == torch.float32 else torch.int16)
        assert (bits[~kept] == 0).all()
    assert not any(isinstance(module, mk.MaskedLinear) for module in model.modules())
    assert "0.logits" not in model.state_dict()


@pytest.mark.parametrize("to", ["bad", None, 3])
def test_finalize_refuses_an_unknown_form(to):
    model = nn.Sequential(nn.Linear(8, 8))
    mk.convert(model, "2:4")
    before = snapshot(model)
    with pytest.raises((TypeError, ValueError), match="^to: expected"):
        mk.finalize(model, to=to)
    assert_unchanged(model, before)


def test_finalize_refuses_a_model_without_masks():
    with pytest.raises(ValueError, match="^model: expected a model with MaskedLinear"):
        mk.finalize(nn.Sequential(nn.Linear(8, 8)))


def test_finalize_of_a_lone_layer_gives_an_nn_linear():
    layer = mk.MaskedLinear.from_linear(nn.Linear(8, 4), "2:4").eval()
    x = torch.randn(3, 8)
    expected = layer(x)
    linear = mk.finalize(layer)
    assert type(linear) is nn.Linear
    assert_same_bits(linear(x), expected)
