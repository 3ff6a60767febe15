"""Models measured side by side: what is timed, in which order, and whether outputs agree."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers.architectures import tiny
from helpers.tiny_llama import WORDS, tiny_model
from torch import nn
from transformers import BertConfig, BertModel, GenerationConfig

from maskpro_kernels import NMLinear, convert, finalize
from maskpro_kernels.hf import measure_speed, timing
from maskpro_kernels.hf.timing import (
    WARM_UP,
    Spread,
    first_difference,
    greedy,
    plain_generation,
    rounding_of,
    stored_as,
)
from maskpro_kernels.unfuse import replace_modules

pytestmark = pytest.mark.usefixtures("eager_reference")

PROMPT = torch.arange(12).view(2, 6) % len(WORDS)
LAYER = "model.layers.1.mlp.up_proj"


def converted(model=None):
    model = tiny_model() if model is None else model
    convert(model, "2:4")
    return model


def int8():
    model = finalize(converted())
    linears = {id(m): m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
    replace_modules(model, {key: NMLinear.from_dense(linear, "2:4", "int8") for key, linear in linears.items()})
    return model


@pytest.fixture(scope="module")
def models():
    """Equal weights in three formats, rounded to int8, and dense."""
    return {
        "sparse": finalize(converted()),
        "packed": finalize(converted(), to="packed"),
        "masked": converted().eval(),
        "int8": int8(),
        "base": tiny_model(),
    }


def test_models_are_compared_with_the_first_one_of_their_weights(models):
    twice = {**models, "base again": tiny_model()}
    report = measure_speed(twice, PROMPT, new_tokens=4, rounds=1)
    found = {agreement.model: agreement for agreement in report.agreements}
    assert {name: found[name].other for name in found} == {
        "packed": "sparse", "masked": "sparse", "int8": "sparse", "base": "sparse", "base again": "base",
    }  # fmt: skip
    assert [name for name in found if found[name].differs_in is None] == ["packed", "masked", "base again"]
    assert report.agree and all(found[name].holds for name in found)
    assert str(found["packed"]) == "packed: same weights as sparse; same 4 tokens"
    assert str(found["base"]).startswith("base: other weights than sparse, first in model.layers.0.self_attn.q_proj.")
    first = "first in model.layers.0.self_attn.q_proj.weight; same"
    assert str(found["int8"]).startswith(f"int8: weights rounded to integers, else those of sparse, {first}")
    assert [name for name in found if found[name].is_rounded] == ["int8"]
    assert [model.stored for model in report.models][:5] == [
        "dense",
        "packed 2:4",
        "masked 2:4",
        "packed 2:4 int8",
        "dense",
    ]
    sizes = {model.name: model.weight_bytes for model in report.models}
    assert sizes["int8"] < sizes["packed"] < sizes["sparse"] < sizes["masked"]


def test_a_weight_that_differs_is_named(models):
    changed = copy.deepcopy(models["packed"])
    changed.get_submodule(LAYER).values[3, 5] += 0.5
    assert first_difference(changed, models["sparse"]) == f"{LAYER}.weight"
    assert first_difference(models["packed"], changed) == f"{LAYER}.weight"
    shallow = copy.deepcopy(models["base"])
    del shallow.model.layers[1]
    assert first_difference(shallow, models["base"]).startswith("model.layers.1.")
    assert first_difference(models["base"], shallow).startswith("model.layers.1.")
    assert first_difference(tiny_model(rope_theta=500.0), tiny_model()) == "model.rotary_emb.inv_freq"


def test_rounding_to_int8_is_distinguished_from_other_weights(models):
    """Of the rounded model, at any place, within rounding."""
    order = {name: models[name] for name in ("base", "int8", "packed")}
    packed, found = measure_speed(order, PROMPT, new_tokens=2, rounds=1).agreements[::-1]
    assert (packed.other, packed.is_rounded) == ("int8", True) and (found.other, found.is_rounded) == ("base", False)
    changed = copy.deepcopy(models["int8"])
    assert first_difference(changed, models["sparse"], rounded=True) is None
    changed.get_submodule(LAYER).values[3, 5] -= 2
    assert first_difference(changed, models["sparse"], rounded=True) == f"{LAYER}.weight"
    assert first_difference(models["packed"], changed, rounded=True) == f"{LAYER}.weight"


def test_an_output_layer_in_int8_is_a_rounded_weight(models):
    rounded = finalize(converted(), to="packed", output_layer="int8")
    assert stored_as(rounded) == "dense int8, packed 2:4"
    assert first_difference(rounded, models["sparse"]) == "lm_head.weight"
    assert first_difference(rounded, models["sparse"], rounded=True) is None
    assert first_difference(models["packed"], rounded, rounded=True) is None
    (found,) = measure_speed({"sparse": models["sparse"], "rounded": rounded}, PROMPT, 2, rounds=1).agreements
    assert str(found).startswith("rounded: weights rounded to integers, else those of sparse, first in lm_head.weight;")
    rounded.lm_head.values[3, 5] -= 3
    assert first_difference(rounded, models["sparse"], rounded=True) == "lm_head.weight"


def test_weights_of_modules_that_are_unfused_are_compared():
    dense, packed = (finalize(converted(tiny("GPT-2").model), to=to) for to in ("dense", "packed"))
    assert stored_as(packed) == "packed 2:4" and first_difference(packed, dense) is None
    assert [type(dense.transformer.h[0].mlp.c_fc).__name__] == ["Conv1D"]
    with torch.no_grad():
        dense.transformer.h[1].mlp.c_proj.weight[3, 2] += 1
    assert first_difference(packed, dense) == "transformer.h.1.mlp.c_proj.weight"


def parted(distance: float):
    """Two models of the same weights, of which one favours another token, whose logit lies below by that part."""
    first = tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        token = int(first(PROMPT).logits[0, -1].argmax())
        another = (token + 1) % len(WORDS)
        first.lm_head.weight[another] = first.lm_head.weight[token] * (1 - distance)
    other = copy.deepcopy(first)

    def favour(module, args, logits):
        logits[..., another] *= 1 + 2 * distance

    other.lm_head.register_forward_hook(favour)
    return {"one": first, "two": other}


def test_a_near_tie_is_reported_and_no_difference():
    report = measure_speed(parted(1e-6), PROMPT, new_tokens=4, rounds=1)
    (found,) = report.agreements
    assert found.differs_in is None and found.same_tokens == 0 and 0 < found.gap <= found.rounding < 1e-4
    assert report.agree and "same tokens up to 0 of 4; then two candidates are equal within rounding" in str(found)


def test_tokens_that_rounding_does_not_explain_are_a_difference():
    report = measure_speed(parted(1e-2), PROMPT, new_tokens=4, rounds=1)
    (found,) = report.agreements
    assert found.differs_in is None and found.gap > found.rounding and not report.agree
    assert "THE MODELS DIFFER" in str(found)


@pytest.mark.parametrize("where", [slice(3, 4), slice(None)])
def test_logits_that_are_no_numbers_are_a_difference(where):
    models = parted(1e-6)

    def spoiled(module, args, logits):
        logits[..., where] = torch.nan

    models["one"].lm_head.register_forward_hook(spoiled)
    assert not measure_speed(models, PROMPT, new_tokens=3, rounds=1).agree


def test_rounding_is_in_units_of_the_largest_logit():
    logits = torch.tensor([-1.0, 0.25, -20.0, torch.inf])
    assert rounding_of(logits, torch.bfloat16) == 4 * 16 * 2.0**-7
    assert rounding_of(logits, torch.float16) == 4 * 16 * 2.0**-10
    assert rounding_of(logits, torch.float32) == 64 * 16 * 2.0**-23
    assert rounding_of(torch.zeros(3), torch.float32) == 0


def test_models_alternate(models, monkeypatch):
    names, order = {id(model): name for name, model in models.items()}, []

    def noted(model, *args, **how):
        order.append(names[id(model)])
        return greedy(model, *args, **how)

    monkeypatch.setattr(timing, "greedy", noted)
    three = {name: models[name] for name in ("sparse", "packed", "masked")}
    report = measure_speed(three, PROMPT, new_tokens=2, rounds=2)
    a, b, c = three
    # after what each writes to be compared
    assert WARM_UP == 1 and order[3:] == [a, b, c, b, c, a, c, a, b]
    assert all(len(model.prefill_seconds) == len(model.step_seconds) == 2 for model in report.models)


def test_rates_are_tokens_over_seconds(models, monkeypatch):
    # a clock that continues by a second each time somebody looks
    seconds = iter(range(10_000))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: float(next(seconds))))
    done = []
    report = measure_speed({"one": models["base"]}, PROMPT, 5, 3, lambda *progress: done.append(progress))
    (model,) = report.models
    assert (report.batch_size, report.prompt_tokens, report.new_tokens) == (2, 6, 5)
    assert model.prefill_seconds == model.step_seconds == [1.0] * 3
    assert report.prefill_rate(model) == Spread(12, 12, 12) and report.decode_rate(model) == Spread(2, 2, 2)
    assert model.device_bytes is None
    assert done == [(0, 3), (0, 3), (1, 3), (2, 3), (3, 3)]


def test_quartiles():
    assert Spread.from_values([5.0, 1.0, 4.0, 2.0, 3.0]) == Spread(3, 2, 4)
    assert Spread.from_values([7.0]) == Spread(7, 7, 7)


def test_what_a_checkpoint_says_of_generation_is_left_aside(models):
    model = tiny_model()
    with plain_generation(model):
        expected = greedy(model, PROMPT, 6)
    every = list(range(len(WORDS)))
    own = GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=5.0, eos_token_id=every, pad_token_id=0)
    model.generation_config = own
    with plain_generation(model):
        assert torch.equal(greedy(model, PROMPT, 6), expected)
    assert model.generation_config is own
    assert measure_speed({"base": models["base"], "same": model}, PROMPT, 6, 1).agreements[0].same_tokens == 6


def test_modes_come_back(models):
    model = copy.deepcopy(models["base"]).train()
    measure_speed({"one": model}, PROMPT, 2, 1)
    assert model.training and model.model.layers[0].training


def test_it_refuses_what_it_cannot_measure(models):
    base = models["base"]
    bert = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    for given, reported in [
        (({}, PROMPT), "models: expected at least one"),
        (({"a": bert}, PROMPT), "models: expected models that generate, got BertModel as 'a'"),
        (
            ({"a": base, "b": tiny_model(vocab_size=40)}, PROMPT),
            "models: expected one vocabulary, got 32 tokens in 'a'",
        ),
        (
            ({"a": base, "b": tiny_model().to("meta")}, PROMPT),
            "models: expected all on the prompt's cpu, got 'b' on meta",
        ),
        (({"a": base}, PROMPT.float()), "prompt: expected int64 .rows, tokens., got torch.float32"),
        (({"a": base}, PROMPT[0]), r"prompt: expected int64 \[rows, tokens\]"),
        (({"a": base}, PROMPT + 100), "prompt: expected tokens below 32, the vocabulary, got 100 to 111"),
        (({"a": base}, PROMPT, 1), "new_tokens: expected at least 2, got 1"),
        (({"a": base}, PROMPT, 2, 0), "rounds: expected at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=f"^{reported}"):
            measure_speed(*given)
