"""Checkpoints with masked and with packed layers: written, loaded by transformers, refused where they are damaged."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from helpers import moe_jobs
from helpers.architectures import tiny
from helpers.bits import assert_same_bits
from helpers.checkpoints import reconfigure, rewrite
from helpers.small_trainer import logits_of
from helpers.tiny_llama import tiny_model, tiny_tokenizer
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    LlamaForCausalLM,
)
from transformers.quantizers import auto as quantizers

import maskpro_kernels as mk
from maskpro_kernels import hf
from maskpro_kernels.modules import CounterState, masked_layers
from maskpro_kernels.packed import SPARSE, dense_layer
from maskpro_kernels.prune.finalize import unpack
from maskpro_kernels.text.perplexity import causal_lm_loss

pytestmark = pytest.mark.usefixtures("eager_reference")

LAYER = "model.layers.0.mlp.down_proj"
TOKENS = torch.randint(0, 30, (2, 9), generator=torch.Generator().manual_seed(0))
FORMS = ["masked", "packed", "int8"]


def converted(**how) -> nn.Module:
    """A model whose masks have moved, at step 3 of seed 5."""
    model = tiny_model()
    mk.convert(model, "2:4", gap=1.0, **how)
    for layer in masked_layers(model).values():
        noise = torch.randn(layer.logits.shape, generator=torch.Generator().manual_seed(layer.layer))
        layer.logits.data += noise.to(layer.logits.dtype)
    model.get_submodule(LAYER).counter_state.seed.fill_(5)
    model.get_submodule(LAYER).counter_state.step.fill_(3)
    model.get_submodule(LAYER).weight_changed = True
    return model


def made(form: str, pattern: str = "2:4", **settings) -> nn.Module:
    model = tiny_model(**settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    mk.convert(model, pattern)
    if form != "masked":
        output_layer = "int8" if form == "output" else "keep"
        mk.finalize(model, to="packed", values="int8" if form == "int8" else "keep", output_layer=output_layer)
    return model.eval()


def written(folder) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("saved_by", ["save_pretrained", "save_model"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_and_draws_come_back(saved_by, dtype, tmp_path):
    model = converted(logits_dtype=dtype)
    if saved_by == "save_pretrained":
        model.save_pretrained(tmp_path)
    else:
        hf.save_model(model, tiny_tokenizer(), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_bits(logits_of(loaded), logits_of(model))
    assert_same_bits(loaded.eval()(TOKENS).logits, model.eval()(TOKENS).logits)
    assert_same_bits(loaded.train()(TOKENS).logits, model.train()(TOKENS).logits)
    mk.advance(loaded)
    mk.advance(model)
    assert_same_bits(loaded(TOKENS).logits, model(TOKENS).logits)
    layer = loaded.get_submodule(LAYER)
    assert layer.weight_changed and not loaded.model.layers[1].mlp.down_proj.weight_changed
    assert layer.counter_state is loaded.model.layers[1].mlp.down_proj.counter_state
    assert not layer.weight.requires_grad and layer.logits.requires_grad
    # and once more, by the config that it was loaded with
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert_same_bits(again.train()(TOKENS).logits, loaded(TOKENS).logits)


def test_a_loaded_model_continues_learning_as_the_saved_one(tmp_path):
    converted().save_pretrained(tmp_path)
    models = [converted(), AutoModelForCausalLM.from_pretrained(tmp_path)]
    for model in models:
        estimator = mk.StraightThrough(lr=0.5, steps=2)
        mk.MaskTrainer(model, causal_lm_loss, [TOKENS], estimator, seed=0).run(2, progress=False)
    assert_same_bits(*map(logits_of, models))


@pytest.mark.parametrize(("form", "pattern"), [("packed", "2:4"), ("packed", "4:8"), ("int8", "2:4")])
def test_packed_weights_come_back(form, pattern, tmp_path):
    model = made(form, pattern)
    hf.save_model(model, tiny_tokenizer(), tmp_path / "packed")
    kind = mk.Sparse24Linear if pattern == "2:4" else mk.NMLinear
    config = written(tmp_path / "packed")["quantization_config"]
    names = [name for name, layer in model.named_modules() if isinstance(layer, mk.NMLinear)]
    assert config["layers"] == dict.fromkeys(
        names, {"pattern": pattern, "values": "keep" if form == "packed" else form}
    )
    assert config["quant_method"] == "maskpro" and config["loading"].startswith("import maskpro_kernels.hf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    layer = loaded.get_submodule(LAYER)
    assert type(layer) is kind and ("values" in layer._buffers) == (form == "int8")
    assert_same_bits(loaded(TOKENS).logits, model(TOKENS).logits)
    assert_same_bits(*(each.generate(TOKENS, max_new_tokens=8, do_sample=False) for each in (loaded, model)))
    loaded.save_pretrained(tmp_path / "again")
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "again"))
    assert_same_bits(again, first)
    assert f"{LAYER}.values" in first and f"{LAYER}.weight" not in first
    # transformers makes all parameters trainable
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    loaded.requires_grad_()(TOKENS, labels=TOKENS).loss.backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_an_output_layer_in_int8_comes_back(tied, tmp_path, monkeypatch):
    model = made("output", tie_word_embeddings=tied)
    hf.save_model(model, tiny_tokenizer(), tmp_path / "first")
    config = written(tmp_path / "first")
    assert config["quantization_config"]["layers"]["lm_head"] == {"values": "int8"}
    assert config["quantization_config"]["version"] == 1 and not config["tie_word_embeddings"]
    stored = load_file(tmp_path / "first" / "model.safetensors")
    assert {name for name in stored if name.startswith("lm_head.")} == {"lm_head.values", "lm_head.scales"}
    assert_same_bits(stored["model.embed_tokens.weight"], model.model.embed_tokens.weight)
    assert "Rounded to int8, with all weights: `lm_head`." in (tmp_path / "first/README.md").read_text(encoding="utf-8")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "first", output_loading_info=True)
    assert not any(report.values()) and type(loaded.lm_head) is mk.Int8Linear
    assert_same_bits(loaded(TOKENS).logits, model(TOKENS).logits)
    assert_same_bits(*(each.generate(TOKENS, max_new_tokens=8, do_sample=False) for each in (loaded, model)))
    loaded.save_pretrained(tmp_path / "again")
    assert_same_bits(load_file(tmp_path / "again" / "model.safetensors"), stored)
    short = hf.load_model(str(tmp_path / "first"), torch.bfloat16)[0].lm_head
    assert short.values.dtype == torch.int8 and short.scales.dtype == torch.bfloat16
    assert_same_bits(AutoModel.from_pretrained(tmp_path / "first")(TOKENS)[0], model.model(TOKENS)[0])
    expected = loaded(TOKENS).logits
    loaded.requires_grad_()(TOKENS, labels=TOKENS).loss.backward()
    assert loaded.model.embed_tokens.weight.grad is not None
    dense = loaded.dequantize()
    assert type(dense.lm_head) is nn.Linear and dense.lm_head.weight is not dense.model.embed_tokens.weight
    torch.testing.assert_close(dense(TOKENS).logits, expected)
    dense.save_pretrained(tmp_path / "dense")
    assert_same_bits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")(TOKENS).logits, dense(TOKENS).logits)
    monkeypatch.delitem(quantizers.AUTO_QUANTIZATION_CONFIG_MAPPING, "maskpro")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "first")


def test_without_packed_layers_an_output_layer_in_int8_is_guarded_too(tmp_path, monkeypatch):
    model = made("output")
    for name, layer in list(model.named_modules()):
        if isinstance(layer, mk.NMLinear):
            model.set_submodule(name, dense_layer(layer))
    hf.save_model(model, tiny_tokenizer(), tmp_path)
    assert_same_bits(AutoModelForCausalLM.from_pretrained(tmp_path)(TOKENS).logits, model(TOKENS).logits)
    assert "**Import `maskpro_kernels.hf`" in (tmp_path / "README.md").read_text(encoding="utf-8")
    monkeypatch.delitem(quantizers.AUTO_QUANTIZATION_CONFIG_MAPPING, "maskpro")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_a_loaded_model_takes_the_dtype_asked_for(form, tmp_path):
    hf.save_model(made(form), tiny_tokenizer(), tmp_path)
    layer = hf.load_model(str(tmp_path), torch.bfloat16)[0].get_submodule(LAYER)
    assert layer.weight.dtype == torch.bfloat16
    if form == "masked":
        assert layer.logits.dtype == torch.float32
    else:
        assert layer.bitmask.dtype == torch.uint8
        assert layer.values.dtype == (torch.int8 if form == "int8" else torch.bfloat16)
    assert hf.load_model(str(tmp_path))[0].get_submodule(LAYER).weight.dtype == torch.float32


@pytest.mark.parametrize("form", FORMS)
def test_other_classes_load_it_as_well(form, tmp_path):
    """Without a head, and with one that the checkpoint does not have."""
    made(form).save_pretrained(tmp_path)
    causal, base = AutoModelForCausalLM.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)
    assert_same_bits(base(TOKENS).last_hidden_state, causal.model(TOKENS).last_hidden_state)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(classifier.score) is nn.Linear and isinstance(classifier.get_submodule(LAYER), SPARSE)
    base.save_pretrained(tmp_path / "base")
    again = AutoModel.from_pretrained(tmp_path / "base")
    assert_same_bits(again(TOKENS).last_hidden_state, causal.model(TOKENS).last_hidden_state)


def test_layers_of_a_head_that_the_class_has_not_are_left_out(tmp_path):
    bert = tiny("BERT").model
    mk.convert(bert, "2:4", gap=3.0)
    bert.save_pretrained(tmp_path)
    classifier = BertForSequenceClassification.from_pretrained(tmp_path)
    assert_same_bits(logits_of(classifier), logits_of(bert.bert))


class OneModuleTwice(LlamaForCausalLM):
    _tied_weights_keys = {"model.layers.1.mlp.up_proj": "model.layers.0.mlp.up_proj"}

    def __init__(self, config):
        super().__init__(config)
        self.model.layers[1].mlp.up_proj = self.model.layers[0].mlp.up_proj
        self.post_init()


@pytest.mark.parametrize("to", ["masked", "packed"])
def test_a_model_that_puts_one_module_in_two_places_comes_back(to, tmp_path):
    model = OneModuleTwice(tiny_model().config).eval()
    mk.convert(model, "2:4")
    if to == "packed":
        mk.finalize(model, to)
    model.save_pretrained(tmp_path)
    loaded = OneModuleTwice.from_pretrained(tmp_path)
    assert loaded.model.layers[1].mlp.up_proj is loaded.model.layers[0].mlp.up_proj
    assert_same_bits(loaded(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("form", FORMS)
def test_sharded_checkpoints(form, tmp_path):
    model = made(form)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_bits(AutoModelForCausalLM.from_pretrained(tmp_path)(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("to", ["dense", "packed"])
def test_a_finalized_model_is_saved_as_what_it_is(to, tmp_path):
    converted().save_pretrained(tmp_path / "masked")
    for name, model in (("made", converted()), ("loaded", AutoModelForCausalLM.from_pretrained(tmp_path / "masked"))):
        expected = model.eval()(TOKENS).logits
        mk.finalize(model, to=to)
        model.save_pretrained(tmp_path / name)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert type(loaded.get_submodule(LAYER)) is (nn.Linear if to == "dense" else mk.Sparse24Linear)
        assert_same_bits(loaded(TOKENS).logits, expected)
        assert ("quantization_config" in written(tmp_path / name)) == (to == "packed")


def test_an_unpacked_model_is_saved_as_a_dense_one(tmp_path):
    hf.save_model(made("packed"), tiny_tokenizer(), tmp_path / "packed")
    model, tokenizer = hf.load_model(str(tmp_path / "packed"), torch.float32)
    expected = model.get_submodule(LAYER).packed.unpack()
    unpack(model)
    hf.save_model(model, tokenizer, tmp_path / "dense")
    assert "quantization_config" not in written(tmp_path / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert_same_bits(loaded.get_submodule(LAYER).weight, expected)


def test_several_patterns_and_kinds_in_one_model(tmp_path):
    model = tiny_model()
    mk.convert(model, "2:4", targets=["*down_proj"])
    mk.finalize(model, to="packed", values="int8")
    mk.convert(model, "4:8", targets=["*up_proj"])
    mk.finalize(model, to="packed")
    mk.convert(model, "2:4", targets=["*gate_proj"])
    hf.save_model(model.eval(), tiny_tokenizer(), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    kinds = {name.rpartition(".")[2]: hf.timing.stored_as(layer) for name, layer in loaded.named_modules()}
    assert kinds["down_proj"] == "packed 2:4 int8" and kinds["up_proj"] == "packed 4:8"
    assert kinds["gate_proj"] == "masked 2:4"
    assert_same_bits(loaded(TOKENS).logits, model(TOKENS).logits)


def test_a_copy_and_a_wrapped_model_are_saved_whole(tmp_path):
    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model

    model = tiny_model()
    mk.convert(Wrapper(model), "2:4", targets=["*.down_proj"])
    copy.deepcopy(model).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_bits(logits_of(loaded), logits_of(model))
    assert len(masked_layers(loaded)) == 2


def test_a_model_within_another_is_saved_with_its_own_masks(tmp_path):
    whole = tiny("LLaVA").model
    mk.convert(whole, "2:4", gap=3.0)
    inner = whole.model.language_model
    inner.save_pretrained(tmp_path / "inner")
    assert_same_bits(logits_of(type(inner).from_pretrained(tmp_path / "inner")), logits_of(inner))
    whole.save_pretrained(tmp_path / "whole")
    assert_same_bits(logits_of(type(whole).from_pretrained(tmp_path / "whole")), logits_of(whole))


@pytest.mark.parametrize("values", ["keep", "int8"])
def test_layers_put_in_and_taken_out_by_hand_are_described(values, tmp_path):
    model = mk.finalize(made("masked"))
    model.set_submodule(LAYER, mk.NMLinear.from_dense(model.get_submodule(LAYER), "2:4", values))
    hf.save_model(model, tiny_tokenizer(), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_bits(loaded(TOKENS).logits, model(TOKENS).logits)
    unpack(loaded.model.layers)
    hf.describe(loaded)
    loaded.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in written(tmp_path / "dense")
    # a part that was converted
    mk.convert(loaded.model.layers, "2:4")
    hf.describe(loaded)
    loaded.save_pretrained(tmp_path / "masked")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "masked")
    assert_same_bits(logits_of(again), logits_of(loaded))


def test_another_model_of_the_same_config_is_refused_and_a_pickle_is_not(tmp_path):
    model = converted()
    AutoModelForCausalLM.from_config(model.config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="remove quantization_config"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.save(model, tmp_path / "model.pt")
    torch.load(tmp_path / "model.pt", weights_only=False).save_pretrained(tmp_path / "again")
    assert_same_bits(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits_of(model))


def test_what_another_library_has_quantized_is_refused():
    model = tiny_model()
    model.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ValueError, match="model: expected a config without quantization_config, got BitsAndB"):
        mk.convert(model, "2:4")
    assert not any(isinstance(layer, SPARSE) for layer in model.modules())


def test_what_cannot_come_back_is_refused(tmp_path):
    model = converted()
    model.model.layers[1].mlp.down_proj.layer = 0
    hf.describe(model)
    model.save_pretrained(tmp_path / "ids")
    model = converted()
    model.model.layers[1].mlp.down_proj.counter_state = CounterState(9)
    model.save_pretrained(tmp_path / "seeds")
    for folder, message in (("ids", "with a layer id of its own"), ("seeds", "expected one seed and one step for all")):
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path / folder)
    model = tiny_model()
    model.model.layers[0].mlp.shard = mk.MaskedLinear(torch.ones(4, 8), None, torch.ones(4, 8), "2:4", group_offset=8)
    with pytest.raises(ValueError, match="model: expected whole layers, got a shard in model.layers.0.mlp.shard"):
        hf.save_model(model, tiny_tokenizer(), tmp_path / "shard")


def test_without_the_import_transformers_refuses_packed_weights(tmp_path, monkeypatch):
    """Otherwise it would make random weights for these layers, with a warning."""
    for values in ("keep", "int8", "int4"):
        model = mk.finalize(converted(), to="packed", values=values)
        hf.save_model(model, tiny_tokenizer(), tmp_path / values)
        again, report = AutoModelForCausalLM.from_pretrained(tmp_path / values, output_loading_info=True)
        assert not any(report.values())
        # a model that was loaded writes the same
        again.save_pretrained(tmp_path / f"{values} again")
        for folder in (values, f"{values} again"):
            with monkeypatch.context() as patched:
                patched.delitem(quantizers.AUTO_QUANTIZATION_CONFIG_MAPPING, "maskpro")
                with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
                    AutoModelForCausalLM.from_pretrained(tmp_path / folder)


@pytest.mark.slow
def test_without_the_import_transformers_prints_what_it_does_not_know(tmp_path):
    """It gives the dense model of one with masks; but not without a word."""
    converted().save_pretrained(tmp_path)
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Unknown quantization type, got maskpro" in done.stderr and "logits" in done.stderr


def on(part: str, change):
    """A damage to a part of LAYER."""
    return rewrite(lambda tensors: tensors.update({f"{LAYER}.{part}": change(tensors[f"{LAYER}.{part}"])}))


def without(*parts):
    return rewrite(lambda tensors: [tensors.pop(f"{LAYER}.{part}") for part in parts])


def on_head(part: str, change):
    """A damage to a part of the output layer."""
    return rewrite(lambda tensors: tensors.update({f"lm_head.{part}": change(tensors[f"lm_head.{part}"])}))


def without_head(*parts):
    return rewrite(lambda tensors: [tensors.pop(f"lm_head.{part}") for part in parts])


def layer_is(**settings):
    return reconfigure(lambda config: config["layers"].update({LAYER: settings}))


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def with_id_99(state):
    state[0] = 99
    return state


def flip(bitmask):
    bitmask[3, 1] ^= 4
    return bitmask


def with_one(value: float):
    def change(scales):
        scales[3, 0] = value
        return scales

    return change


DAMAGES = [
    ("masked", "expected logits of 14 layers .*, got 13", without("logits")),
    ("masked", "expected the extra state of each masked layer", without("_extra_state")),
    ("masked", "expected extra state of shape .8., got .7.", on("_extra_state", lambda state: state[:7].clone())),
    ("masked", "expected one seed and one step", on("_extra_state", lambda state: torch.full((8,), 99))),
    ("masked", "expected the extra state of each masked layer", on("_extra_state", with_id_99)),
    ("masked", "expected logits of F32 or BF16 or F16", on("logits", lambda logits: logits.to(torch.int8))),
    ("masked", "expected the extra state of a whole 1:4 layer", layer_is(pattern="1:4", layer=6)),
    ("masked", "expected the pattern, and layer or values, of", layer_is(pattern="2:4")),
    ("masked", "expected names in layers of each in shared", reconfigure(lambda c: c.update(shared={LAYER: "a"}))),
    ("masked", "expected names in layers of each in", reconfigure(lambda c: c.update(shared=[LAYER]))),
    ("masked", "expected names in layers of each", reconfigure(lambda c: c.update(shared={LAYER: [1]}))),
    ("masked", "expected the pattern, and layer or values, of", layer_is(layer=6)),
    ("masked", "shared: expected names of nn.Linear", reconfigure(lambda c: c["shared"].update(a=LAYER))),
    ("masked", "pattern: expected N:M", layer_is(pattern="2:5", layer=6)),
    ("masked", "expected version 1 .*got version 2", reconfigure(lambda config: config.update(version=2))),
    ("masked", "expected version 1 without other settings", reconfigure(lambda config: config.update(speed=1))),
    ("packed", "expected a whole safetensors file|invalid|incomplete", truncate),
    ("packed", f"{LAYER}.bitmask: expected exactly 2 of every 4 kept", on("bitmask", flip)),
    ("packed", "expected values of 14 layers .* got 13; copy or download", without("values")),
    ("packed", "expected values of 14 layers .* got 13", without("values", "bitmask")),
    ("packed", "expected values of 13 layers", reconfigure(lambda config: config["layers"].pop(LAYER))),
    ("packed", f"{LAYER}.scales: expected them beside int8 or int4", on("values", lambda them: them.to(torch.int8))),
    ("packed", f"{LAYER}.bitmask: expected .*uint8, got .*int32", on("bitmask", lambda mask: mask.int())),
    ("packed", "which is none of its modules", reconfigure(lambda config: config["layers"].update(
        {f"{LAYER}.x": config["layers"].pop(LAYER)}))),
    ("packed", "got 'model.norm', which is LlamaRMSNorm", reconfigure(lambda config: config["layers"].update(
        {"model.norm": config["layers"].pop(LAYER)}))),
    ("packed", "expected scales of 0 layers", rewrite(lambda tensors: tensors.update(
        {f"{LAYER}.scales": torch.ones(32, 1)}))),
    ("packed", "scales of 1 layers", layer_is(pattern="2:4", values="int8")),
    ("packed", "without adapters of peft, got base_layer", rewrite(lambda tensors: tensors.update(
        {f"{LAYER}.base_layer.values": tensors.pop(f"{LAYER}.values")}))),
    ("int8", "expected scales of 14 layers .*, got 13", without("scales")),
    ("int8", "values: expected torch.int8 beside scales", on("values", lambda values: values.bfloat16())),
    ("int8", f"{LAYER}.scales: expected .*float32 or .*, got .*int32", on("scales", lambda t: t.int())),
    ("int8", f"{LAYER}.scales: expected finite numbers of at least 0", on("scales", with_one(-1.0))),
    ("int8", f"{LAYER}.scales: expected finite", on("scales", with_one(float("nan")))),
    ("int8", f"{LAYER}.bitmask: expected exactly 2 of every 4", on("bitmask", lambda mask: mask ^ 1)),
    ("int8", "expected the pattern, and layer or values", layer_is(pattern="2:4", values="int4")),
    ("int8", "expected scales of 13 layers", layer_is(pattern="2:4", values="keep")),
    ("int8", "expected values of 14 layers .*, got 13", without("bitmask")),
    ("int8", "expected values of 13 layers", layer_is(values="int8")),
    ("output", "int8 values and scales of 1 layers without a bitmask .*, got 0; copy", without_head("scales")),
    ("output", "int8 values and scales of 1 layers .*, got 0", without_head("values", "scales")),
    ("output", "int8 values and scales of 0 layers .*, got 1", reconfigure(lambda c: c["layers"].pop("lm_head"))),
    ("output", "int8 values and scales of 1 layers .*, got 0", on_head("values", lambda values: values.float())),
    ("output", "lm_head.scales: expected finite numbers of at least 0", on_head("scales", with_one(-1.0))),
    ("output", "lm_head.scales: expected finite", on_head("scales", with_one(float("inf")))),
    ("output", "expected the pattern, and layer or values, of lm_head", reconfigure(lambda c: c["layers"].update(
        lm_head={"values": "int4"}))),
    ("output", "expected the pattern, and layer or values, of lm_head", reconfigure(lambda c: c["layers"].update(
        lm_head={"values": "int8", "group": 64}))),
    # by transformers itself
    ("output", "ignore_mismatched_sizes", on_head("values", lambda values: values[:, 1:].clone())),
    ("output", "ignore_mismatched_sizes", on_head("scales", lambda scales: scales.repeat(1, 2))),
    ("packed", "ignore_mismatched_sizes", on("values", lambda values: values[:, 1:].clone())),
    ("packed", "ignore_mismatched_sizes", on("bitmask", lambda mask: mask[1:].clone())),
    ("packed", "ignore_mismatched_sizes", layer_is(pattern="1:8", values="keep")),
    ("int8", "ignore_mismatched_sizes", on("scales", lambda scales: scales.repeat(1, 2))),
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forms")
    for form in (*FORMS, "output"):
        made(form).save_pretrained(folder / form)
    return folder


@pytest.mark.parametrize(
    ("form", "message", "damage"), DAMAGES, ids=[f"{form}: {reported}" for form, reported, _ in DAMAGES]
)
def test_damaged_checkpoints_are_refused(form, message, damage, folders, tmp_path):
    for file in (folders / form).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    with pytest.raises((ValueError, RuntimeError), match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_packed_weights_are_not_made_while_loading(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config = hf.SparseConfig({LAYER: {"pattern": "2:4", "values": "keep"}})
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_a_dequantized_model_is_an_ordinary_dense_one(form, tied, tmp_path):
    made(form, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True).save_pretrained(tmp_path / "sparse")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "sparse")
    expected = model(TOKENS).logits
    weights = {
        name: layer.top_n_weight() if form == "masked" else layer.packed.unpack()
        for name, layer in model.named_modules()
        if isinstance(layer, SPARSE)
    }
    assert model.is_quantized
    dense = model.dequantize()
    assert dense is model and not any(isinstance(layer, SPARSE) for layer in dense.modules())
    assert_same_bits({name: dense.get_submodule(name).weight for name in weights}, weights)
    torch.testing.assert_close(dense(TOKENS).logits, expected)
    assert not dense.is_quantized and not hasattr(dense, "hf_quantizer") and not hasattr(dense, "quantization_method")
    assert (dense.lm_head.weight is dense.model.embed_tokens.weight) == tied
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in written(tmp_path / "dense")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    assert_same_bits(again(TOKENS).logits, dense(TOKENS).logits)
    # transformers refuses that of quantized models
    assert dense.half().dtype == torch.float16


def test_a_dequantized_model_has_one_dtype(tmp_path):
    made("packed").save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    dense = model.dequantize(torch.bfloat16)
    assert {parameter.dtype for parameter in dense.parameters()} == {torch.bfloat16}
    assert_same_bits(dense.model.rotary_emb.inv_freq, frequencies)


def test_dequantized_modules_are_fused_again(tmp_path):
    model, batch = tiny("GPT-2")
    built = {name: type(module).__name__ for name, module in model.named_modules()}
    mk.convert(model, "2:4")
    mk.finalize(model, to="packed").save_pretrained(tmp_path)
    assert "transformer.h.0.attn.c_attn" in written(tmp_path)["quantization_config"]["taken_apart"]
    dense = type(model).from_pretrained(tmp_path).dequantize().eval()
    assert {name: type(module).__name__ for name, module in dense.named_modules()} == built
    unpack(model)
    torch.testing.assert_close(dense(**batch).logits, model.eval()(**batch).logits)


def test_dense_matrices_of_what_is_unfused_have_to_be_stored(tmp_path):
    """Transformers would load a checkpoint that lacks them, with random values in their place."""
    model = AutoModelForCausalLM.from_pretrained(moe_jobs.write_checkpoint(tmp_path / "dense"))
    mk.convert(model, "2:4", targets=["*.down_proj.*"])
    model.save_pretrained(tmp_path / "masked")
    lacking = f"{moe_jobs.EXPERTS}.linears.gate_proj.0"
    rewrite(lambda tensors: tensors.pop(f"{lacking}.weight"))(tmp_path / "masked")
    with pytest.raises(
        ValueError, match=f"^checkpoint: expected the matrices of {moe_jobs.EXPERTS}, .* of {lacking}; "
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path / "masked")


@pytest.mark.slow
def test_smollm2_packed(tmp_path):
    """The linears take 9/16 of the bytes; the same logits and the same 50 greedy tokens in float32."""
    model, tokenizer = hf.load_model(hf.SMOLLM2, torch.bfloat16)
    names = mk.convert(model, "2:4").converted
    hf.save_model(mk.finalize(copy.deepcopy(model)), tokenizer, tmp_path / "dense")
    hf.save_model(mk.finalize(model, to="packed"), tokenizer, tmp_path / "packed")
    dense, packed = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "packed"))
    stored = sum(packed[f"{name}.{part}"].nbytes for name in names for part in ("values", "bitmask"))
    assert stored == pytest.approx(9 / 16 * sum(dense[f"{name}.weight"].nbytes for name in names), rel=0.01)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / n, dtype=torch.float32) for n in ("dense", "packed")]
    tokens = tokenizer("The mask of a weight matrix", return_tensors="pt").input_ids
    assert_same_bits(*(model(tokens).logits for model in models))
    expected, ours = (model.generate(tokens, max_new_tokens=50, do_sample=False) for model in models)
    assert ours.shape[1] == tokens.shape[1] + 50
    assert_same_bits(ours, expected)
