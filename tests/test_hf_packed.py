"""Checkpoints with packed weights: written, loaded by transformers, refused where they are damaged."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.cases import slow
from helpers.checkpoints import reconfigure, rewrite
from helpers.tiny_llama import tiny_model, tiny_tokenizer
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import maskpro_kernels as mk
from maskpro_kernels import hf
from maskpro_kernels.hf.packed import StoredAs, replace_by_packed
from maskpro_kernels.hf.stored_files import HOW_TO_LOAD
from maskpro_kernels.pattern import NMPattern
from maskpro_kernels.prune.finalize import unpack
from maskpro_kernels.text.perplexity import causal_lm_loss

pytestmark = pytest.mark.usefixtures("eager_reference")

LAYER = "model.layers.0.mlp.down_proj"


def finalized(pattern: str = "2:4", dtype=torch.float32) -> tuple[nn.Module, nn.Module]:
    """The same masked model twice, with exact zeros and packed."""
    model = tiny_model().to(dtype)
    mk.convert(model, pattern)
    return mk.finalize(copy.deepcopy(model)), mk.finalize(model, to="packed")


@pytest.fixture
def folder(tmp_path):
    hf.save_model(finalized()[1], tiny_tokenizer(), tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize(
    ("pattern", "kind", "dtype"),
    [
        ("2:4", mk.Sparse24Linear, torch.bfloat16),
        ("4:8", mk.NMLinear, torch.float32),
        slow("2:4", mk.Sparse24Linear, torch.float32),
        slow("4:8", mk.NMLinear, torch.bfloat16),
    ],
)
def test_a_packed_checkpoint_is_the_dense_one(tmp_path, pattern, kind, dtype):
    dense, packed = finalized(pattern, dtype)
    hf.save_model(packed, tiny_tokenizer(), tmp_path / "packed")
    # loaded as well, for a model that is cast has other rotary frequencies than one that is loaded
    hf.save_model(dense, tiny_tokenizer(), tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
    stored = json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]
    assert stored.pop("digests")["tensors"].keys() == load_file(tmp_path / "packed/model.safetensors").keys()
    assert stored == {
        "quant_method": "maskpro",
        "format": "nm-bitmask",
        "version": 1,
        "loading": HOW_TO_LOAD,
        "patterns": {pattern: [name for name, module in packed.named_modules() if isinstance(module, kind)]},
        "values": "keep",
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=dtype)
    assert type(loaded.get_submodule(LAYER)) is kind and loaded.get_submodule(LAYER).values.dtype == dtype
    tokens = torch.randint(0, 30, (2, 9), generator=torch.Generator().manual_seed(0))
    assert_same_bits(loaded(tokens).logits, dense(tokens).logits)
    generated = [model.generate(tokens, max_new_tokens=20, do_sample=False) for model in (loaded, dense)]
    assert_same_bits(*generated)
    assert torch.isfinite(causal_lm_loss(loaded, tokens))

    loaded.save_pretrained(tmp_path / "again")
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "again"))
    assert_same_bits(again, first)
    assert f"{LAYER}.values" in first and f"{LAYER}.weight" not in first


def test_a_loaded_model_takes_the_dtype_asked_for(folder):
    loaded, _ = hf.load_model(str(folder), torch.bfloat16)
    layer = loaded.get_submodule(LAYER)
    assert layer.values.dtype == torch.bfloat16 and layer.bitmask.dtype == torch.uint8


def test_other_classes_load_it_as_well(folder):
    """Without a head, and with one that the checkpoint does not have."""
    causal = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.arange(12).view(1, 12)
    base = AutoModel.from_pretrained(folder)
    assert type(base.get_submodule(LAYER.removeprefix("model."))) is mk.Sparse24Linear
    assert_same_bits(base(tokens).last_hidden_state, causal.model(tokens).last_hidden_state)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(classifier.score) is nn.Linear and type(classifier.get_submodule(LAYER)) is mk.Sparse24Linear
    base.save_pretrained(folder / "base")
    again = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert_same_bits(again.model(tokens).last_hidden_state, causal.model(tokens).last_hidden_state)


def test_an_unpacked_model_is_saved_as_a_dense_one(folder, tmp_path):
    model, tokenizer = hf.load_model(str(folder), torch.float32)
    expected = model.get_submodule(LAYER).packed.unpack()
    unpack(model)
    hf.save_model(model, tokenizer, tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert_same_bits(loaded.get_submodule(LAYER).weight, expected)


def test_a_module_in_two_places_is_replaced_in_both():
    model = nn.ModuleDict({"a": nn.Linear(8, 4)})
    model["b"] = model["a"]
    replace_by_packed(model, {"a": StoredAs(NMPattern("2:4"))})
    assert model["a"] is model["b"] and type(model["b"]) is mk.Sparse24Linear


def test_sharded_checkpoints(tmp_path):
    _, packed = finalized()
    packed.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_bits(loaded.get_submodule(LAYER).packed.unpack(), packed.get_submodule(LAYER).packed.unpack())


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def flip(tensors):
    tensors[f"{LAYER}.bitmask"][3, 1] ^= 4


def without(*parts):
    def change(tensors):
        for name in [name for name in tensors if name.endswith(tuple(f".{part}" for part in parts))]:
            del tensors[name]

    return change


DAMAGES = {
    "expected a whole safetensors file": truncate,
    f"{LAYER}.bitmask: expected exactly 2 of every 4 kept": rewrite(flip),
    "expected values of the 14 layers that its quantization_config names, such as .*, got 13, none of "
    f"{LAYER}; copy or download the checkpoint again$": rewrite(lambda tensors: tensors.pop(f"{LAYER}.values")),
    "expected bitmask of the 14 layers .* got 0; copy or download the checkpoint again$": rewrite(without("bitmask")),
    "expected values of the 14 layers .* got 0; .* take quantization_config out": rewrite(without("values", "bitmask")),
    f"expected values of the 13 layers .* got 14, also of {LAYER}, which it does not name; take config.json from": (
        reconfigure(lambda config: config["patterns"]["2:4"].remove(LAYER))
    ),
    f"{LAYER}.values: expected .* got torch.int8": (
        rewrite(lambda tensors: tensors.update({f"{LAYER}.values": tensors[f"{LAYER}.values"].to(torch.int8)}))
    ),
    f"{LAYER}.bitmask: expected torch.uint8, got torch.int32": (
        rewrite(lambda tensors: tensors.update({f"{LAYER}.bitmask": tensors[f"{LAYER}.bitmask"].to(torch.int32)}))
    ),
    f"expected names of nn.Linear modules of LlamaForCausalLM, got '{LAYER}.x', which is none of its modules": (
        reconfigure(lambda config: config.update(patterns={"2:4": [f"{LAYER}.x"]}))
    ),
    "got 'model.norm', which is LlamaRMSNorm": reconfigure(
        lambda config: config.update(patterns={"2:4": ["model.norm"]})
    ),
    "expected the name of at least one nn.Linear, got none": reconfigure(lambda config: config.update(patterns={})),
    "expected version 1, got 2": reconfigure(lambda config: config.update(version=2)),
    "expected format 'nm-bitmask', got 'other'": reconfigure(lambda config: config.update(format="other")),
    "pattern: expected N:M": reconfigure(lambda config: config.update(patterns={"2:5": [LAYER]})),
    "expected no others than its own settings, got .'speed'": reconfigure(lambda config: config.update(speed=2)),
}


WRONG_SHAPES = {
    "values": rewrite(lambda tensors: tensors.update({f"{LAYER}.values": tensors[f"{LAYER}.values"][:, 1:].clone()})),
    "bitmask": rewrite(lambda tensors: tensors.update({f"{LAYER}.bitmask": tensors[f"{LAYER}.bitmask"][1:].clone()})),
    "another pattern": reconfigure(lambda config: config.update(patterns={"1:8": [LAYER]})),
}


@pytest.mark.parametrize("damage", WRONG_SHAPES)
def test_parts_of_other_shapes_are_refused(damage, folder):
    """By transformers itself, or because the rest is not claimed."""
    WRONG_SHAPES[damage](folder)
    with (
        hf.without_digests(),
        pytest.raises((ValueError, RuntimeError), match="ignore_mismatched_sizes|expected values of the 1 layers"),
    ):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("told", DAMAGES)
def test_damaged_checkpoints_are_refused(told, folder):
    DAMAGES[told](folder)
    with pytest.raises(ValueError):
        AutoModelForCausalLM.from_pretrained(folder)
    with hf.without_digests(), pytest.raises(ValueError, match=told):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_pattern_that_fits_no_layer_is_refused():
    with pytest.raises(ValueError, match="expected in_features divisible by 8 .*, got 12 in 0"):
        replace_by_packed(nn.Sequential(nn.Linear(12, 4)), {"0": StoredAs(NMPattern("4:8"))})


def test_packed_weights_are_not_made_while_loading(tmp_path):
    hf.save_model(finalized()[0], tiny_tokenizer(), tmp_path)
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=hf.PackedConfig({"2:4": [LAYER]}))


def test_several_patterns_in_one_model(tmp_path):
    model = tiny_model()
    mk.convert(model, "2:4", targets=["*down_proj"])
    mk.finalize(model, to="packed")
    mk.convert(model, "4:8", targets=["*up_proj"])
    mk.finalize(model, to="packed")
    hf.save_model(model, tiny_tokenizer(), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    patterns = [str(module.pattern) for module in loaded.modules() if isinstance(module, mk.NMLinear)]
    assert sorted(patterns) == ["2:4", "2:4", "4:8", "4:8"]
    tokens = torch.arange(12).view(1, 12)
    assert_same_bits(loaded(tokens).logits, model(tokens).logits)


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


@pytest.mark.parametrize("packed", [False, True])
def test_a_checkpoint_says_what_loads_it(packed, tmp_path):
    model = tiny_model()
    mk.convert(model, "2:4")
    (mk.finalize(model, to="packed") if packed else model).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert config["loading"].startswith("import maskpro_kernels.hf")
