"""Models unfused and fused again."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from helpers.architectures import loss_of, tiny
from helpers.cases import cases
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.modules import masked_layers
from maskpro_kernels.prune.finalize import pack, unpack
from maskpro_kernels.unfuse import Conv1DForm, as_built, as_linears, expert_groups, in_linear_form, unfused_modules

FORMS = ["GPT-2", "Mixtral", "gpt-oss"]
pytestmark = pytest.mark.usefixtures("eager_reference")


@pytest.mark.parametrize("name", FORMS)
def test_apart_it_computes_the_same_and_shares_its_memory(name):
    model, batch = tiny(name)
    expected, pointers = loss_of(model, batch), {x.untyped_storage().data_ptr() for x in model.parameters()}
    as_linears(model)
    assert unfused_modules(model)
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
    with in_linear_form(model):
        assert unfused_modules(model)
    after = list(model.named_parameters())
    assert [name for name, _ in before] == [name for name, _ in after] and repr(model) == printed
    assert all(old is new for (_, old), (_, new) in zip(before, after, strict=True))


@pytest.mark.parametrize("name", FORMS)
def test_a_conversion_that_fails_changes_nothing(name):
    model, batch = tiny(name)
    before, printed = dict(model.named_parameters()), repr(model)
    with pytest.raises(ValueError, match="targets"):
        mk.convert(model, "2:4", targets=["nothing"])
    assert repr(model) == printed and all(before[key] is x for key, x in model.named_parameters())


@pytest.mark.parametrize("name", cases(((name,) for name in FORMS), slow=lambda name: name == "Mixtral"))
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
    as_built(model)
    first, second = (block.mlp.c_fc for block in model.transformer.h)
    assert type(first).__name__ == "Conv1D" and first.weight is second.weight
    conversion = mk.convert(model, "2:4", targets=None)
    assert conversion.skipped["transformer.h.0.mlp.c_fc"] == "weight tied to another layer"


def patched(module: nn.Module) -> None:
    module.forward = module.forward


@pytest.mark.parametrize(
    ("change", "reported"),
    [
        (lambda module: module.register_forward_hook(lambda *_: None), "hooks"),
        (lambda module: module.register_full_backward_hook(lambda *_: None), "hooks"),
        (patched, "forward of its own"),
    ],
)
@pytest.mark.filterwarnings("ignore:model.*of its matrix weights")
def test_what_its_replacement_would_lose_is_left_out(change, reported):
    model, _ = tiny("GPT-2")
    name = "transformer.h.0.mlp.c_fc"
    change(model.get_submodule(name))
    conversion = mk.convert(model, "2:4")
    assert reported in conversion.skipped[name] and conversion.unmasked[f"{name}.weight"] == conversion.skipped[name]
    model, _ = tiny("LLaMA")
    name = "model.layers.0.mlp.up_proj"
    change(model.get_submodule(name))
    assert reported in mk.convert(model, "2:4").skipped[name]
    # these stay where they are
    model, _ = tiny("Mixtral")
    change(model.model.layers[0].mlp.experts)
    assert mk.convert(model, "2:4").masked_share > 0.9 or change is patched


def test_a_module_that_cannot_be_unfused_changes_nothing(monkeypatch):
    model, _ = tiny("Mixtral")
    model.extra = tiny("GPT-2").model.transformer.h[0].mlp
    printed, parameters = repr(model), dict(model.named_parameters())

    def fails(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(Conv1DForm, "unfuse", fails)
    with pytest.raises(RuntimeError, match="no"):
        mk.convert(model, "2:4")
    assert repr(model) == printed
    assert all(parameters[name] is x for name, x in model.named_parameters())


def test_weights_of_experts_learn_one_by_one():
    """Views of one parameter, which a step changes while others are still to have their gradients."""
    for name in ("Mixtral", "GPT-2"):
        model, batch = tiny(name)
        mk.convert(model, "2:4", gap=1.0)
        before = [layer.weight.clone() for layer in masked_layers(model).values()]
        estimator = mk.StraightThrough(lr=0.5, steps=2, train_weights=1e-2)
        mk.MaskTrainer(model, loss_of, [batch], estimator, seed=0).run(2, progress=False)
        after = [layer.weight for layer in masked_layers(model).values()]
        assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_experts_that_do_more_than_multiply_are_left_out(monkeypatch):
    model, batch = tiny("Mixtral")
    expected, kind = loss_of(model, batch), type(model.model.layers[0].mlp.experts)
    eager = kind.forward.__wrapped__

    def in_float32(self, *args):
        assert self.gate_up_proj[0].float().dtype == torch.float32
        return eager(self, *args)

    monkeypatch.setattr(kind, "forward", functools.wraps(in_float32)(lambda self, *args: in_float32(self, *args)))
    with pytest.warns(UserWarning, match="of its matrix weights"):
        conversion = mk.convert(model, "2:4", targets=None)
    assert "more with the matrices than multiply" in conversion.skipped["model.layers.0.mlp.experts"]
    torch.testing.assert_close(loss_of(mk.finalize(model), batch), expected, rtol=1.0, atol=1.0)


def test_a_refit_reports_experts_without_a_token():
    model, _ = tiny("Mixtral")
    mk.convert(model, "2:4")
    done = []
    with pytest.warns(UserWarning, match="12 matrices of experts got no token, such as .*, and keep their masks and"):
        shares = mk.refit(model, [torch.tensor([[7]])], progress=lambda *numbers: done.append(numbers))
    assert len(shares) == 20 and done[-1] == (32, 32)
    assert sum(not layer.weight_changed for layer in masked_layers(model).values()) == 12


def test_names_have_to_be_of_what_can_be_unfused():
    model, _ = tiny("GPT-2")
    printed = repr(model)
    with pytest.raises(ValueError, match="names: .*'transformer.h.0.ln_1': it is none"):
        as_linears(model, ["transformer.h.0.mlp.c_fc", "transformer.h.0.ln_1"])
    assert repr(model) == printed
    as_linears(model, ["transformer.h.0.mlp.c_fc"])
    assert unfused_modules(model) == ["transformer.h.0.mlp.c_fc"]


def test_experts_are_used_in_products_alone():
    model, _ = tiny("Mixtral")
    as_linears(model)
    weight = model.model.layers[0].mlp.experts.gate_up_proj[0]
    with pytest.raises(TypeError, match="experts: expected a product with the matrix of one, got add"):
        torch.add(torch.ones(2), weight)


@pytest.mark.parametrize("init", ["wanda", "reconstruction", "sparsegpt"])
def test_experts_without_a_token_get_masks_by_magnitude(init):
    model, _ = tiny("Mixtral")
    # it goes to two experts of the four of each layer
    one_token = torch.tensor([[7]])
    with pytest.warns(UserWarning, match="12 matrices of experts got no token, such as model.layers.0.mlp.experts"):
        mk.convert(
            model, "2:4", calibration=[one_token], init=init, refit="weights" if init == "reconstruction" else "none"
        )
    starving = 0
    for layer in expert_groups(model):
        by_magnitude = mk.top_n_mask(layer.weight.detach().abs(), "2:4")
        starving += torch.equal(mk.top_n_mask(layer.logits.detach(), "2:4"), by_magnitude)
    assert starving == 12
    if init == "reconstruction":
        assert sum(not layer.weight_changed for layer in expert_groups(model)) == 12


def test_experts_draw_noise_of_their_own_and_only_where_they_are_used():
    model, batch = tiny("Mixtral")
    with torch.no_grad():
        experts = model.model.layers[0].mlp.experts.gate_up_proj
        experts[1] = experts[0]
    mk.convert(model, "2:4", gap=1.0)
    layers = list(expert_groups(model))
    assert len({layer.layer for layer in layers}) == len(layers) == 24
    first, second, *_ = layers
    assert torch.equal(first.logits, second.logits) and not torch.equal(first.drawn_codes(), second.drawn_codes())
