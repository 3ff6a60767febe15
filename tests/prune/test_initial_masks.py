"""Initial masks by name: by the weights alone, and by their inputs; and the calibration batches that they take."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.command import learn, report
from helpers.nets import Net, refused, token_batches
from helpers.tiny_llama import write_inputs
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.cli import main
from maskpro_kernels.prune import initial_masks
from maskpro_kernels.prune.calibration import calls_of, input_moments, input_squares, layer_inputs
from maskpro_kernels.prune.initial_masks import initial_codes

pytestmark = pytest.mark.usefixtures("eager_reference")


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def smallest(dense):
    """An initial mask of no use."""
    return {name: mk.top_n_mask(-layer.weight.detach().abs(), dense.pattern) for name, layer in dense.layers.items()}


def test_a_new_initial_mask_is_one_function_and_one_entry(monkeypatch):
    monkeypatch.setitem(initial_masks.INITIAL_MASKS, "smallest", smallest)
    model = two_layers()
    expected = initial_codes(layers_of(model), "2:4", "smallest")
    mk.convert(model, "2:4", init="smallest")
    for name in ("0", "2"):
        assert_same_bits(mk.top_n_mask(model.get_submodule(name).logits.detach(), "2:4"), expected[name])


@pytest.mark.parametrize("init", ["randm", None, 3, ["magnitude"]])
def test_an_unknown_initial_mask_is_refused_before_the_model_runs(init):
    with pytest.raises(ValueError, match="init: expected one of magnitude, wanda, reconstruction, sparsegpt, random, "):
        initial_codes({}, "2:4", init)


@pytest.mark.parametrize("init", ["wanda", "reconstruction", "sparsegpt"])
@pytest.mark.parametrize("calibration", [None, torch.ones(3, 8), {"input": torch.ones(3, 8)}, 3, []], ids=str)
def test_masks_of_what_layers_see_need_batches(init, calibration):
    model = two_layers()
    with pytest.raises((TypeError, ValueError), match="^calibration: expected"):
        initial_codes(layers_of(model), "2:4", init, model, calibration)


def test_a_model_takes_tensors_tuples_and_mappings():
    x, y = torch.ones(1), torch.zeros(1)
    assert calls_of([x, (x, y), [x], {"input": x}]) == [((x,), {}), ((x, y), {}), ((x,), {}), ((), {"input": x})]


def test_what_layers_see_is_summed_over_batches_and_hooks_are_removed():
    model = two_layers()
    batches = [torch.randn(2, 3, 8), torch.randn(5, 8)]
    flat = torch.cat([batch.view(-1, 8) for batch in batches])
    with torch.no_grad():
        inputs = {"0": flat, "2": model[1](model[0](flat))}
    squares = input_squares(model, layers_of(model), iter(batches))
    moments = input_moments(model, calls_of(batches), [model[0], nn.Linear(2, 2), model[2]])
    assert moments[1] is None
    for name, (gram, cross) in zip(("0", "2"), (moments[0], moments[2]), strict=True):
        torch.testing.assert_close(squares[name], inputs[name].square().sum(0))
        torch.testing.assert_close(gram.detach(), inputs[name].T @ inputs[name])
        assert cross is None
    # of another model, as the dense one: X^T D
    of_other = layer_inputs(two_layers(), calls_of(batches), [model[0], model[2]])
    assert of_other == [[], []]
    dense = [[2.0 * x.detach() for x in of_layer] for of_layer in layer_inputs(model, calls_of(batches), [model[2]])]
    ((_, cross),) = input_moments(model, calls_of(batches), [model[2]], dense=dense)
    torch.testing.assert_close(cross.detach(), 2.0 * inputs["2"].T @ inputs["2"])
    # of other tokens, as those of experts that no other module routes to: fewer, more, or in batches of other sizes
    for others in ([dense[0][:1]], [dense[0] * 2], [dense[0][::-1]]):
        ((gram, cross),) = input_moments(model, calls_of(batches), [model[2]], dense=others)
        assert cross is None and torch.equal(gram, moments[2].gram)
    with pytest.raises(RuntimeError):
        input_squares(model, layers_of(model), [torch.ones(2, 3)])
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e30])
@pytest.mark.parametrize("init", ["wanda", "reconstruction", "sparsegpt"])
@pytest.mark.parametrize("layer", ["0", "2"])
def test_inputs_that_are_not_finite_are_refused_with_the_layer(layer, init, value):
    model, bad = two_layers(), torch.ones(3, 8)
    if layer == "0":
        bad[1, 2] = value
    else:
        model[1].register_forward_hook(lambda module, args, y: y.index_fill(0, torch.tensor([1]), value))
    message = f"^calibration: expected inputs whose squares are finite in float32, got others in {layer}$"
    refused(model, ValueError, message, init=init, calibration=[torch.ones(3, 8), bad])
    codes = dict.fromkeys(("0", "2"), mk.top_n_mask(torch.ones(8, 8), "2:4"))
    refused(model, ValueError, message, init={**codes, "2": codes["2"][:4]}, calibration=[bad], refit="scales")


def test_a_forward_pass_ends_where_nothing_after_it_is_wanted():
    model = two_layers()
    reached = []
    model[2].register_forward_pre_hook(lambda *_: reached.append(True))
    input_moments(model, calls_of([torch.ones(2, 8)] * 3), [model[0]], stop=True)
    assert not reached
    input_moments(model, calls_of([torch.ones(2, 8)] * 3), [model[0]])
    assert len(reached) == 3


def test_the_command_starts_from_a_new_initial_mask(tmp_path, monkeypatch):
    monkeypatch.setitem(initial_masks.INITIAL_MASKS, "smallest", smallest)
    arguments = learn(write_inputs(tmp_path), tmp_path / "run", "--init", "smallest", "--estimator", "straight-through")
    assert main.main(arguments) == 0
    table = report(tmp_path / "run")["table"]
    assert [row["method"] for row in table] == ["dense", "magnitude", "wanda", "smallest", "straight-through"]


def test_wanda_sees_inputs_given_by_keyword():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(8, 4)

        def forward(self, x):
            return self.linear(input=x)

    x = torch.randn(5, 8) * torch.arange(8)
    model = ByKeyword()
    scores = model.linear.weight.detach().abs() * x.norm(dim=0)
    mk.convert(model, "2:4", init="wanda", calibration=[x])
    assert_same_bits(mk.top_n_mask(model.linear.logits.detach(), "2:4"), mk.top_n_mask(scores, "2:4"))


@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping", "generator"])
def test_wanda_weighs_by_the_norm_of_the_inputs(form):
    model, batches = Net(), token_batches()
    inputs = model.embedding(torch.cat(batches)).detach().reshape(-1, 8).double()
    scores = model.first.weight.detach().abs().double() * inputs.square().sum(0).sqrt()
    groups = scores.view(16, 2, 4)
    kept = (groups >= groups.topk(2).values[..., 1:]).view(16, 8)
    assert not torch.equal(kept, mk.expand_mask(mk.top_n_mask(model.first.weight.detach().abs(), "2:4"), "2:4"))
    calibration = {
        "tensor": batches,
        "tuple": [(batch,) for batch in batches],
        "mapping": [{"x": batch} for batch in batches],
        "generator": (batch for batch in batches),
    }[form]
    mk.convert(model, "2:4", init="wanda", calibration=calibration)
    assert_same_bits(model.first.logits, torch.where(kept, 10.0, 0.0))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_wanda_restores_the_mode_of_every_module():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8))
    model.train()
    model[1].eval()
    mk.convert(model, "2:4", init="wanda", calibration=[torch.randn(3, 8)])
    assert [module.training for module in model] == [True, False, True]
