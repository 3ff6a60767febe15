"""Masked layers into a model."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.enumerated import set_probabilities
from helpers.nets import Net, codes_of, refused, token_batches
from helpers.tiny_llama import tiny_model
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.prune.convert import flip_rate, gap_for_flip_rate
from maskpro_kernels.prune.finalize import pack

pytestmark = pytest.mark.usefixtures("eager_reference")


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
    addresses = {name: getattr(model, name).weight.data_ptr() for name in ("first", "second")}
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
    # weights are shared, not copied
    assert addresses == {name: getattr(model, name).weight.data_ptr() for name in addresses}


def test_a_second_conversion_takes_other_ids_and_the_same_counter_state():
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
        "2": "has hooks, which its replacement would lose",
    }


def test_layers_that_share_weight_and_bias_get_one_mask():
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)))
    model[2].weight = model[0].weight
    layers, x = list(model), torch.randn(4, 8)
    with pytest.raises(ValueError, match="calibration"):
        mk.convert(model, "2:4", init="wanda", calibration=[x * float("nan")])
    assert list(model) == layers
    mk.convert(model, "2:4", ["1"])
    assert [model[0], model[2]] == layers[::2]
    # inputs of both places choose the mask
    calls = nn.Sequential(layers[0], nn.Linear(8, 8), layers[0]).requires_grad_(False)
    calls[1].load_state_dict({"weight": torch.eye(8), "bias": torch.zeros(8)})
    mk.convert(calls, "2:4", ["0"], init="wanda", calibration=[x])
    model[1] = nn.Identity()
    conversion = mk.convert(model, "2:4", init="wanda", calibration=[x])
    assert conversion.converted == ["0"] and conversion.masked_share == 1 and model[0] is model[2]
    torch.testing.assert_close(model[0].logits, calls[0].logits)
    mk.finalize(model)
    dense = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)))
    dense[0].weight = dense[1].weight = model[0].weight
    last = dense[2]
    assert pack(dense, "2:4").converted == ["0"] and dense[0] is dense[1] and dense[2] is last


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


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"targets": "first"}, TypeError, "^targets: expected a sequence .*got the str 'first'"),
        ({"targets": []}, ValueError, "^targets: "),
        ({"targets": ["first", "third"]}, ValueError, "^targets: .*'third' matches none"),
        ({"targets": ["first", "odd"]}, ValueError, "^targets: .*divisible by 4, got 6 in odd"),
        ({"pattern": "2:5"}, ValueError, "^pattern: "),
        ({"gap": -1.0}, ValueError, "^gap: "),
        ({"flip_rate": 0.99}, ValueError, "^flip_rate: "),
        ({"flip_rate": 0.01, "gap": 9.0}, ValueError, "^flip_rate: expected gap or flip_rate, not both"),
        ({"init": "sparse"}, ValueError, "^init: "),
        ({"init": "random", "seed": -1}, ValueError, "^seed: "),
        ({"init": "wanda"}, ValueError, "^calibration: "),
        ({"init": "wanda", "calibration": []}, ValueError, "^calibration: expected at least one batch"),
        ({"calibration": "abc"}, TypeError, "^calibration: expected an iterable of batches, got str"),
        ({"init": "wanda", "calibration": torch.ones(3, 8)}, TypeError, "^calibration: .*got Tensor"),
        ({"init": "reconstruction", "calibration": {"x": torch.ones(3, 8)}}, TypeError, "^calibration: .*got dict"),
    ],
)
def test_bad_argument_changes_nothing(arguments, error, message):
    refused(Net(), error, message, **arguments)


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Sequential(nn.Embedding(4, 4))])
def test_model_without_linears_is_refused(model):
    refused(model, ValueError, "^model: expected a module that contains nn.Linear")
    refused(nn.Linear(8, 8), ValueError, "got none; convert a single layer by MaskedLinear.from_linear$")
    model = nn.Sequential(nn.Linear(8, 8))
    mk.convert(model, "2:4")
    refused(model, ValueError, "got none; it has MaskedLinear layers: finalize it before you convert it again$")


@pytest.mark.parametrize("model", [None, "smollm2-135m", {}])
def test_model_must_be_a_module(model):
    with pytest.raises(TypeError, match="^model: expected nn.Module"):
        mk.convert(model, "2:4")


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("init", ["magnitude", "wanda"])
def test_weights_that_are_not_finite_are_named(init, value):
    model = Net()
    with torch.no_grad():
        model.second.weight[1, 2] = value
    refused(model, ValueError, "^model: expected finite weights.* in second$", init=init, calibration=token_batches())


def test_weights_in_float64_are_refused():
    refused(Net().double(), TypeError, "^model: .*float64 in first")


def given_codes() -> dict[str, torch.Tensor]:
    return {
        "first": torch.full((16, 2), 0b1010, dtype=torch.uint8),
        "second": torch.full((6, 4), 0b0110, dtype=torch.uint8),
    }


def test_codes_are_taken_as_given():
    model, codes = Net(), given_codes()
    mk.convert(model, "2:4", init=codes, gap=3.0)
    assert_same_bits(codes_of(model.first), codes["first"])
    assert_same_bits(model.second.logits, torch.tensor([0.0, 3.0, 3.0, 0.0]).repeat(6, 4))
    assert codes.keys() == {"first", "second"}


def test_bool_masks_count_as_their_codes():
    model = Net()
    mk.convert(model, "2:4", init={name: mk.expand_mask(codes, "2:4") for name, codes in given_codes().items()})
    for name, codes in given_codes().items():
        assert_same_bits(codes_of(getattr(model, name)), codes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"second": None}, TypeError, r"^init\['second'\]: "),
        ({"second": torch.ones(6, 16, dtype=torch.bool)}, ValueError, r"^init\['second'\]: expected exactly 2 of"),
        ({"second": torch.ones(6, 4, dtype=torch.bool)}, ValueError, r"^init\['second'\]: .*mask \[6, 16\] .*got"),
        ({"second": torch.ones(6, 16)}, TypeError, r"^init\['second'\]: .*bool mask, got .*float32"),
        ({"third": torch.zeros(1, dtype=torch.uint8)}, ValueError, r"^init: .*unknown \['third'\]"),
        ({"first": torch.full((16, 3), 3, dtype=torch.uint8)}, ValueError, r"^init\['first'\]: .*shape \[16, 2\]"),
        ({"second": torch.full((6, 4), 3)}, TypeError, r"^init\['second'\]: .*uint8.*int64"),
        ({"second": torch.full((6, 4), 0b10011, dtype=torch.uint8)}, ValueError, r"^init\['second'\]: .*exactly 2"),
    ],
)
def test_wrong_codes_are_refused(changes, error, message):
    refused(Net(), error, message, init=given_codes() | changes)
    refused(Net(), ValueError, r"^init: .*missing \['second'\]", init={"first": given_codes()["first"]})


def test_a_linear_under_two_names_stays_one_module():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared))
    # it answers to both
    conversion = mk.convert(model, "2:4", targets=["2.0"])
    assert conversion.converted == ["0"]
    assert isinstance(model[0], mk.MaskedLinear)
    assert model[2][0] is model[0]
    mk.finalize(model)
    assert type(model[0]) is nn.Linear
    assert model[2][0] is model[0]


def test_attention_of_torch_and_its_encoder_are_left_out_with_the_reason():
    """They multiply with weights past the modules that hold them, where a mask would do nothing."""
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 8))
    model[0].self_attn.out_proj = nn.Linear(8, 8)
    with pytest.warns(UserWarning, match="of its matrix weights"):
        conversion = mk.convert(model, "2:4")
    assert conversion.converted == ["1"]
    assert "fast path" in conversion.skipped["0.linear1"] and "fast path" in conversion.skipped["0.linear2"]
    for name, matrix in (("0.self_attn", "in_proj_weight"), ("0.self_attn.out_proj", "weight")):
        assert "nn.MultiheadAttention" in conversion.skipped[name]
        assert conversion.unmasked[f"{name}.{matrix}"] == conversion.skipped[name]
    for target in ("*linear1", "*out_proj"):
        with pytest.raises(ValueError, match="targets.*0.(linear1|self_attn.out_proj)"):
            mk.convert(model, "2:4", targets=[target])


@pytest.mark.parametrize(
    ("how", "total"),
    [
        ({"init": "sparsegpt"}, 14),
        ({"init": "reconstruction"}, 14),
        ({"init": "magnitude", "refit": "scales"}, 14),
        ({"init": "wanda"}, None),
    ],
)
def test_progress_reports_how_many_layers_are_done(how, total, eager_reference):
    reported: list[tuple[int, int]] = []
    mk.convert(
        tiny_model(), "2:4", calibration=token_batches(2), progress=lambda *counts: reported.append(counts), **how
    )
    assert reported == ([] if total is None else [(done, total) for done in range(total + 1)])


@pytest.mark.parametrize("pattern", ["1:2", "1:4", "2:4", "3:4", "2:8", "4:8", "8:16"])
@pytest.mark.parametrize("gap", [0.0, 1.0, 7.0, 20.0])
def test_flip_rate_of_a_gap_is_that_of_the_enumerated_sets(pattern, gap):
    n, m = map(int, pattern.split(":"))
    logits = torch.tensor([gap] * n + [0.0] * (m - n))
    # the sum over the other sets: 1 - p would leave few digits at large gaps
    others = set_probabilities(logits, n)[1:].sum().item()
    assert flip_rate(gap, pattern) == pytest.approx(others, rel=1e-10)


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "8:16"])
@pytest.mark.parametrize("gap", [0.0, 0.5, 10.0, 25.9])
def test_gap_for_flip_rate_is_the_inverse(pattern, gap):
    assert gap_for_flip_rate(flip_rate(gap, pattern), pattern) == pytest.approx(gap, abs=1e-6)


def test_draws_flip_at_the_rate_asked_for():
    rate, groups = 0.02, 40_000
    model = nn.Sequential(nn.Linear(400, 400))
    conversion = mk.convert(model, "2:4", flip_rate=rate)
    assert flip_rate(conversion.gap, "2:4") == pytest.approx(rate, rel=1e-6)
    flipped = int((model[0].drawn_codes() != codes_of(model[0])).sum())
    assert abs(flipped - rate * groups) < 4 * math.sqrt(groups * rate * (1 - rate))
