"""Models taken apart and put together again."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers.architectures import loss_of, tiny

import maskpro_kernels as mk
from maskpro_kernels import hf
from maskpro_kernels.linear_form import as_built, as_linears, expert_groups, taken_apart
from maskpro_kernels.pruning.finalize import pack, unpack

FORMS = ["GPT-2", "Mixtral", "gpt-oss", "torch TransformerEncoder"]
pytestmark = pytest.mark.usefixtures("eager_reference")


@pytest.mark.parametrize("name", FORMS)
def test_apart_it_computes_the_same_and_shares_its_memory(name):
    model, batch = tiny(name)
    expected, pointers = loss_of(model, batch), {x.untyped_storage().data_ptr() for x in model.parameters()}
    as_linears(model)
    assert taken_apart(model)
    assert {x.untyped_storage().data_ptr() for x in model.parameters()} == pointers
    torch.testing.assert_close(loss_of(model, batch), expected, rtol=0.0, atol=1e-6)
    again = copy.deepcopy(model)
    as_built(model)
    # the copy's layers are its own
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(loss_of(again, batch), expected, rtol=0.0, atol=1e-6)
    as_built(again)
    torch.testing.assert_close(loss_of(again, batch), expected, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_undone_the_very_parameters_are_there(name):
    model, _ = tiny(name)
    before, printed = list(model.named_parameters()), repr(model)
    as_linears(model).undo(model)
    after = list(model.named_parameters())
    assert [name for name, _ in before] == [name for name, _ in after] and repr(model) == printed
    assert all(old is new for (_, old), (_, new) in zip(before, after, strict=True))


@pytest.mark.parametrize("name", FORMS)
def test_a_conversion_that_fails_leaves_it_as_it_was(name):
    model, batch = tiny(name)
    before, printed = dict(model.named_parameters()), repr(model)
    with pytest.raises(ValueError, match="targets"):
        mk.convert(model, "2:4", targets=["nothing"])
    assert repr(model) == printed and all(before[key] is x for key, x in model.named_parameters())


@pytest.mark.parametrize("name", FORMS)
def test_finalized_it_is_the_model_of_its_authors(name):
    """Parameters of the same names and shapes, under masks that keep half of what multiplies."""
    model, batch = tiny(name)
    shapes = {key: x.shape for key, x in model.state_dict().items()}
    mk.convert(model, "2:4", calibration=[batch], init="reconstruction", refit="weights")
    expected = loss_of(model, batch)
    pickled = pickle.loads(pickle.dumps(model))
    for one in (model, pickled):
        mk.finalize(one)
        assert {key: x.shape for key, x in one.state_dict().items()} == shapes
        torch.testing.assert_close(loss_of(one, batch), expected, rtol=0.0, atol=1e-6)
    conversion = pack(model, "2:4")
    assert len(conversion.converted) >= 8 and conversion.masked_share > 0.96
    torch.testing.assert_close(loss_of(model, batch), expected, rtol=0.0, atol=1e-6)
    unpack(model)
    assert {key: x.shape for key, x in model.state_dict().items()} == shapes
    torch.testing.assert_close(loss_of(model, batch), expected, rtol=0.0, atol=1e-6)


def test_layers_that_share_a_parameter_still_do():
    model, _ = tiny("GPT-2")
    first, second = (block.mlp.c_fc for block in model.transformer.h)
    second.weight = first.weight
    as_linears(model)
    first, second = (block.mlp.c_fc for block in model.transformer.h)
    assert first is not second and first.weight is second.weight
    as_linears(model).undo(model)
    conversion = mk.convert(model, "2:4", targets=None)
    assert conversion.skipped["transformer.h.0.mlp.c_fc"] == "weight tied to another layer"


def test_what_has_hooks_is_left_out():
    model, _ = tiny("GPT-2")
    model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda *_: None)
    conversion = mk.convert(model, "2:4")
    assert "hooks" in conversion.skipped["transformer.h.0.mlp.c_fc"]
    assert conversion.unmasked["transformer.h.0.mlp.c_fc.weight"] == conversion.skipped["transformer.h.0.mlp.c_fc"]


def test_names_have_to_be_of_what_can_be_taken_apart():
    model, _ = tiny("GPT-2")
    printed = repr(model)
    with pytest.raises(ValueError, match="names: .*'transformer.h.0.ln_1': it is none"):
        as_linears(model, ["transformer.h.0.mlp.c_fc", "transformer.h.0.ln_1"])
    assert repr(model) == printed
    as_linears(model, ["transformer.h.0.mlp.c_fc"])
    assert taken_apart(model) == ["transformer.h.0.mlp.c_fc"]


def test_a_dense_model_that_is_apart_is_not_saved(tmp_path):
    """transformers would load the transposed weights of square layers as they are."""
    model, _ = tiny("GPT-2")
    as_linears(model)
    hf.tell_config(model)
    with pytest.raises(ValueError, match="as_built"):
        model.save_pretrained(tmp_path)
    as_built(model)
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).config.to_dict().get("quantization_config") is None


def test_experts_are_used_in_products_alone():
    model, _ = tiny("Mixtral")
    as_linears(model)
    weight = model.model.layers[0].mlp.experts.gate_up_proj[0]
    with pytest.raises(TypeError, match="experts: expected a product with the matrix of one, got add"):
        torch.add(torch.ones(2), weight)


@pytest.mark.parametrize("init", ["wanda", "reconstruction"])
def test_experts_without_a_token_get_masks_by_magnitude(init):
    model, _ = tiny("Mixtral")
    # it goes to two experts of the four of each layer
    one_token = torch.tensor([[7]])
    with pytest.warns(UserWarning, match="8 matrices of experts saw no token, such as model.layers.0.mlp.experts"):
        mk.convert(model, "2:4", calibration=[one_token], init=init, refit="none" if init == "wanda" else "weights")
    starving = 0
    for layer in expert_groups(model):
        by_magnitude = mk.top_n_mask(layer.weight.detach().abs(), "2:4")
        starving += torch.equal(mk.top_n_mask(layer.logits.detach(), "2:4"), by_magnitude)
    assert starving == 8
    if init == "reconstruction":
        assert sum(not layer.weight_changed for layer in expert_groups(model)) == 8


def test_experts_draw_noise_of_their_own_and_only_where_they_are_used():
    model, batch = tiny("Mixtral")
    with torch.no_grad():
        experts = model.model.layers[0].mlp.experts.gate_up_proj
        experts[1] = experts[0]
    mk.convert(model, "2:4", gap=1.0)
    layers = list(expert_groups(model))
    assert len({layer.layer for layer in layers}) == len(layers) == 16
    first, second, *_ = layers
    assert torch.equal(first.logits, second.logits) and not torch.equal(first.drawn_codes(), second.drawn_codes())
