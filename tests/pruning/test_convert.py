"""Masked layers into a model, initial masks, and finished masks out of it."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.enumerated import set_probabilities
from helpers.tiny_llama import tiny_model
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.pruning.gap import flip_rate, gap_for_flip_rate

pytestmark = pytest.mark.usefixtures("eager_reference")

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]


class Net(nn.Module):
    """Linears that fit 2:4, one that does not, one tied to an embedding, and a subclass of nn.Linear."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 8)
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 6, bias=False)
        self.odd = nn.Linear(6, 8)
        self.tied = nn.Linear(8, 10, bias=False)
        self.tied.weight = self.embedding.weight
        self.quantizable = nn.modules.linear.NonDynamicallyQuantizableLinear(8, 8)

    def forward(self, x):
        return self.tied(self.odd(self.second(torch.relu(self.first(self.embedding(x))))))


def snapshot(model: nn.Module) -> dict:
    """Modules by identity, their modes and the bits of their tensors."""
    modules = {name: (id(module), module.training) for name, module in model.named_modules()}
    return {"modules": modules, "tensors": {name: t.clone() for name, t in model.state_dict().items()}}


def assert_as_it_was(model: nn.Module, before: dict) -> None:
    now = snapshot(model)
    assert now["modules"] == before["modules"]
    assert now["tensors"].keys() == before["tensors"].keys()
    for name, tensor in now["tensors"].items():
        torch.testing.assert_close(tensor, before["tensors"][name], rtol=0, atol=0, equal_nan=True)
    assert not any(module._forward_pre_hooks for module in model.modules())


def refused(model: nn.Module, error: type[Exception], message: str, pattern="2:4", **arguments) -> None:
    before = snapshot(model)
    with pytest.raises(error, match=message):
        mk.convert(model, pattern, **arguments)
    assert_as_it_was(model, before)


def token_batches(count: int = 2) -> list[torch.Tensor]:
    return list(torch.randint(0, 10, (count, 3, 5), generator=torch.Generator().manual_seed(1)))


def codes_of(layer: mk.MaskedLinear) -> torch.Tensor:
    return mk.top_n_mask(layer.logits.detach(), layer.pattern)


def test_language_model_keeps_its_head():
    model = tiny_model()
    conversion = mk.convert(model, "2:4")
    layers = [name for name, module in model.named_modules() if isinstance(module, mk.MaskedLinear)]
    assert conversion.converted == layers
    assert len(layers) == 2 * 7
    assert conversion.skipped == {"lm_head": "output head"}
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert conversion.gap == 10.0
    assert model(torch.zeros(1, 4, dtype=torch.long)).logits.isfinite().all()


def test_default_leaves_out_what_does_not_fit_with_the_reason():
    model = Net()
    conversion = mk.convert(model, "2:4")
    assert conversion.converted == ["first", "second"]
    assert conversion.skipped == {
        "odd": "in_features 6 not divisible by 4",
        "tied": "weight tied to an embedding",
        "quantizable": "subclass of nn.Linear: NonDynamicallyQuantizableLinear",
    }
    assert type(model.quantizable) is nn.modules.linear.NonDynamicallyQuantizableLinear
    assert [model.first.layer, model.second.layer] == [0, 1]
    assert model.first.counter_state is model.second.counter_state
    assert model.second.bias is None and model.first.bias is not None


def test_a_second_conversion_takes_other_ids_and_the_same_clock():
    model = Net()
    mk.convert(model, "2:4", ["first"])
    mk.advance(model)
    conversion = mk.convert(model, "4:8", ["second"])
    assert conversion.converted == ["second"]
    assert [model.first.layer, model.second.layer] == [0, 1]
    assert model.first.counter_state is model.second.counter_state
    assert [str(model.first.pattern), str(model.second.pattern)] == ["2:4", "4:8"]


def test_layers_that_share_a_weight_or_have_hooks_are_left_out():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    model[1].weight = model[0].weight
    model[2].register_forward_hook(lambda module, args, output: output + 1)
    conversion = mk.convert(model, "2:4")
    assert conversion.converted == ["3"]
    assert conversion.skipped == {
        "0": "weight tied to another layer",
        "1": "weight tied to another layer",
        "2": "has forward hooks, which its replacement would lose",
    }


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
    assert torch.equal(mk.top_n_mask(model.linear.logits.detach(), "2:4"), mk.top_n_mask(scores, "2:4"))


def test_weights_are_shared_not_copied():
    model = Net()
    addresses = {name: getattr(model, name).weight.data_ptr() for name in ("first", "second")}
    mk.convert(model, "2:4")
    assert addresses == {name: getattr(model, name).weight.data_ptr() for name in addresses}


@pytest.mark.parametrize(
    ("targets", "converted"),
    [
        (["first"], ["first"]),
        (["*s*"], ["first", "second"]),
        (("second", "first"), ["first", "second"]),
        (["f[a-z]rst", "?ied"], ["first", "tied"]),
    ],
)
def test_targets_are_patterns_on_names(targets, converted):
    model = Net()
    conversion = mk.convert(model, "2:4", targets)
    assert conversion.converted == converted
    left = [name for name in ("first", "second", "odd", "tied") if name not in converted]
    assert conversion.skipped.pop("quantizable").startswith("subclass of nn.Linear")
    assert conversion.skipped == dict.fromkeys(left, "matches no target")
    assert [getattr(model, name).layer for name in converted] == list(range(len(converted)))


def test_targets_by_projection_in_a_language_model():
    model = tiny_model()
    conversion = mk.convert(model, "2:4", [f"*.{name}" for name in PROJECTIONS])
    assert len(conversion.converted) == 2 * len(PROJECTIONS)
    assert {name.rsplit(".")[-1] for name in conversion.converted} == set(PROJECTIONS)
    assert len({module.layer for module in model.modules() if isinstance(module, mk.MaskedLinear)}) == 8


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"targets": "first"}, TypeError, "^targets: expected a sequence .*got the str 'first'"),
        ({"targets": 3}, TypeError, "^targets: "),
        ({"targets": [3]}, TypeError, "^targets: "),
        ({"targets": []}, ValueError, "^targets: "),
        ({"targets": ["first", "third"]}, ValueError, "^targets: .*'third' matches none"),
        ({"targets": ["embedding"]}, ValueError, "^targets: .*'embedding' matches none"),
        ({"targets": ["first", "odd"]}, ValueError, "^targets: .*divisible by 4, got 6 in odd"),
        ({"pattern": "4:2"}, ValueError, "^pattern: "),
        ({"pattern": "2:5"}, ValueError, "^pattern: "),
        ({"pattern": 24}, TypeError, "^pattern: "),
        ({"pattern": "2:32"}, ValueError, "^model: .*2:32 fits"),
        ({"gap": -1.0}, ValueError, "^gap: "),
        ({"gap": math.nan}, ValueError, "^gap: "),
        ({"gap": None}, TypeError, "^gap: "),
        ({"flip_rate": 0.0}, ValueError, "^flip_rate: "),
        ({"flip_rate": 0.99}, ValueError, "^flip_rate: "),
        ({"flip_rate": math.nan}, ValueError, "^flip_rate: "),
        ({"flip_rate": "0.1"}, (TypeError, ValueError), "^flip_rate: "),
        ({"flip_rate": 0.01, "gap": 9.0}, ValueError, "^flip_rate: expected gap or flip_rate, not both"),
        ({"init": "random"}, ValueError, "^init: "),
        ({"init": None}, (TypeError, ValueError), "^init: "),
        ({"init": "wanda"}, ValueError, "^calibration: "),
        ({"init": "wanda", "calibration": []}, ValueError, "^calibration: expected at least one batch"),
        ({"init": "wanda", "calibration": 3}, TypeError, "^calibration: "),
        ({"init": "wanda", "calibration": torch.ones(3, 8)}, TypeError, "^calibration: .*got Tensor"),
        ({"init": "reconstruction", "calibration": {"x": torch.ones(3, 8)}}, TypeError, "^calibration: .*got dict"),
    ],
)
def test_bad_argument_leaves_the_model_as_it_was(arguments, error, message):
    refused(Net(), error, message, **arguments)


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Sequential(nn.Embedding(4, 4))])
def test_model_without_linears_is_refused(model):
    refused(model, ValueError, "^model: expected a module that contains nn.Linear")
    refused(nn.Linear(8, 8), ValueError, "got none; a single layer is converted by MaskedLinear.from_linear$")
    model = nn.Sequential(nn.Linear(8, 8))
    mk.convert(model, "2:4")
    refused(model, ValueError, "got none, but MaskedLinear: it has been converted; finalize it first$")


@pytest.mark.parametrize("model", [None, "smollm2-135m", {}])
def test_model_must_be_a_module(model):
    with pytest.raises(TypeError, match="^model: expected nn.Module"):
        mk.convert(model, "2:4")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("init", ["magnitude", "wanda"])
def test_weights_that_are_not_finite_are_named(init, value):
    model = Net()
    with torch.no_grad():
        model.second.weight[1, 2] = value
    refused(model, ValueError, "^model: expected finite weights.* in second$", init=init, calibration=token_batches())


def test_weights_in_float64_are_refused():
    refused(Net().double(), TypeError, "^model: .*float64 in first")


def test_magnitude_keeps_the_largest_weights():
    model = Net()
    weight = model.first.weight.detach().clone()
    mk.convert(model, "2:4", init="magnitude", gap=6.0)
    groups = weight.abs().view(16, 2, 4)
    kept = (groups >= groups.topk(2).values[..., 1:]).view(16, 8)
    assert torch.equal(model.first.logits, torch.where(kept, 6.0, 0.0))


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
    assert torch.equal(model.first.logits, torch.where(kept, 10.0, 0.0))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_wanda_restores_the_mode_of_every_module():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8))
    model.train()
    model[1].eval()
    mk.convert(model, "2:4", init="wanda", calibration=[torch.randn(3, 8)])
    assert [module.training for module in model] == [True, False, True]


def test_wanda_names_the_layer_that_sees_no_input():
    model = Net()
    model.unused = nn.Linear(8, 8)
    refused(model, ValueError, r"^calibration: .*\['unused'\] saw no input", init="wanda", calibration=token_batches())


def test_wanda_leaves_no_hook_behind_when_a_batch_fails():
    refused(Net(), Exception, "index out of range", init="wanda", calibration=[torch.tensor([[99]])])


def given_codes() -> dict[str, torch.Tensor]:
    return {
        "first": torch.full((16, 2), 0b1010, dtype=torch.uint8),
        "second": torch.full((6, 4), 0b0110, dtype=torch.uint8),
    }


def test_codes_are_taken_as_given():
    model, codes = Net(), given_codes()
    mk.convert(model, "2:4", init=codes, gap=3.0)
    assert torch.equal(codes_of(model.first), codes["first"])
    assert torch.equal(model.second.logits, torch.tensor([0.0, 3.0, 3.0, 0.0]).repeat(6, 4))
    assert codes.keys() == {"first", "second"}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"second": None}, TypeError, r"^init\['second'\]: "),
        ({"third": torch.zeros(1, dtype=torch.uint8)}, ValueError, r"^init: .*unknown \['third'\]"),
        ({"first": torch.full((16, 3), 3, dtype=torch.uint8)}, ValueError, r"^init\['first'\]: .*shape \(16, 2\)"),
        ({"first": torch.full((2, 16), 3, dtype=torch.uint8)}, ValueError, r"^init\['first'\]: .*shape \(16, 2\)"),
        ({"second": torch.full((6, 4), 3)}, TypeError, r"^init\['second'\]: .*uint8.*int64"),
        (
            {"second": torch.full((6, 4), 7, dtype=torch.uint8)},
            ValueError,
            r"^init\['second'\]: .*exactly 2 of every 4",
        ),
        (
            {"second": torch.full((6, 4), 0, dtype=torch.uint8)},
            ValueError,
            r"^init\['second'\]: .*exactly 2 of every 4",
        ),
        ({"second": torch.full((6, 4), 0b10011, dtype=torch.uint8)}, ValueError, r"^init\['second'\]: .*exactly 2"),
    ],
)
def test_wrong_codes_are_refused(changes, error, message):
    refused(Net(), error, message, init=given_codes() | changes)


def test_missing_codes_are_refused():
    refused(Net(), ValueError, r"^init: .*missing \['second'\]", init={"first": given_codes()["first"]})


@pytest.mark.parametrize("pattern", ["1:2", "1:4", "2:4", "3:4", "2:8", "4:8", "8:16"])
@pytest.mark.parametrize("gap", [0.0, 1.0, 7.0, 20.0])
def test_flip_rate_of_a_gap_is_that_of_the_enumerated_sets(pattern, gap):
    n, m = map(int, pattern.split(":"))
    logits = torch.tensor([gap] * n + [0.0] * (m - n))
    # the sum over the other sets: 1 - p would leave few digits at large gaps
    others = set_probabilities(logits, n)[1:].sum().item()
    assert flip_rate(gap, pattern) == pytest.approx(others, rel=1e-10)


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "8:16", "16:32"])
@pytest.mark.parametrize("gap", [0.0, 0.5, 10.0, 25.9])
def test_gap_for_flip_rate_is_the_inverse(pattern, gap):
    assert gap_for_flip_rate(flip_rate(gap, pattern), pattern) == pytest.approx(gap, abs=1e-6)


@pytest.mark.parametrize("rate", [0.0, 1e-12, 0.9, 1.0, -0.1, math.nan, "0.1", True, None])
def test_flip_rate_out_of_reach_is_refused(rate):
    with pytest.raises((TypeError, ValueError), match="^flip_rate: "):
        gap_for_flip_rate(rate, "2:4")


def test_draws_flip_at_the_rate_asked_for():
    rate, groups = 0.02, 40_000
    model = nn.Sequential(nn.Linear(400, 400))
    conversion = mk.convert(model, "2:4", flip_rate=rate)
    assert flip_rate(conversion.gap, "2:4") == pytest.approx(rate, rel=1e-6)
    flipped = int((model[0].drawn_codes() != codes_of(model[0])).sum())
    assert abs(flipped - rate * groups) < 4 * math.sqrt(groups * rate * (1 - rate))


def test_a_linear_under_two_names_stays_one_module():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared))
    conversion = mk.convert(model, "2:4")
    assert conversion.converted == ["0"]
    assert isinstance(model[0], mk.MaskedLinear)
    assert model[2][0] is model[0]
    mk.finalize(model)
    assert type(model[0]) is nn.Linear
    assert model[2][0] is model[0]


def test_a_linear_under_two_names_answers_to_both():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared))
    mk.convert(model, "2:4", targets=["2.0"])
    assert isinstance(model[2][0], mk.MaskedLinear)
    assert model[2][0] is model[0]


def test_converting_twice_finds_nothing_left():
    model = nn.Sequential(nn.Linear(8, 8))
    mk.convert(model, "2:4")
    refused(model, ValueError, "^model: ")


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
    assert torch.equal(model(x), expected)
    for layer, code, weight in zip((model[0], model[2]), codes, weights, strict=True):
        kept = mk.expand_mask(code, pattern)
        assert type(layer) is nn.Linear
        assert (layer.in_features, layer.out_features) == (weight.shape[1], weight.shape[0])
        assert torch.equal(layer.weight[kept], weight[kept])
        bits = layer.weight.detach().view(torch.int32 if dtype == torch.float32 else torch.int16)
        assert (bits[~kept] == 0).all()
    assert not any(isinstance(module, mk.MaskedLinear) for module in model.modules())
    assert "0.logits" not in model.state_dict()


@pytest.mark.parametrize("training", [True, False])
def test_finalize_keeps_the_mode(training):
    model = nn.Sequential(nn.Linear(8, 8)).train(training)
    mk.convert(model, "2:4")
    assert mk.finalize(model)[0].training is training


@pytest.mark.parametrize("to", ["bad", None, 3])
def test_finalize_refuses_an_unknown_form(to):
    model = nn.Sequential(nn.Linear(8, 8))
    mk.convert(model, "2:4")
    before = snapshot(model)
    with pytest.raises((TypeError, ValueError), match="^to: expected"):
        mk.finalize(model, to=to)
    assert_as_it_was(model, before)


def test_finalize_refuses_a_model_without_masks():
    with pytest.raises(ValueError, match="^model: expected a model with MaskedLinear"):
        mk.finalize(nn.Sequential(nn.Linear(8, 8)))


def test_layers_that_a_fast_path_reads_past_are_left_out():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(layer, nn.Linear(8, 8))
    conversion = mk.convert(model, "2:4")
    assert conversion.converted == ["1"]
    assert "fast path" in conversion.skipped["0.linear1"] and "fast path" in conversion.skipped["0.linear2"]
    with pytest.raises(ValueError, match="targets.*0.linear1"):
        mk.convert(nn.Sequential(layer), "2:4", targets=["*linear1"])


def test_finalize_of_a_lone_layer_gives_an_nn_linear():
    layer = mk.MaskedLinear.from_linear(nn.Linear(8, 4), "2:4").eval()
    x = torch.randn(3, 8)
    expected = layer(x)
    linear = mk.finalize(layer)
    assert type(linear) is nn.Linear and torch.equal(linear(x), expected)
