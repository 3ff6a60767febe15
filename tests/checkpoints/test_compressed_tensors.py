"""Weights that compressed-tensors has stored."""

from __future__ import annotations

import json
import re

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.checkpoints import COMPRESSED, LAYER, compressed_folder, masked, random_masks
from helpers.command import contents
from helpers.tiny_llama import tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import maskpro_kernels as mk
from maskpro_kernels import safetensors_files
from maskpro_kernels.checkpoints import survey
from maskpro_kernels.checkpoints.importers import compressed_tensors
from maskpro_kernels.cli import main

pytestmark = pytest.mark.usefixtures("eager_reference")


def test_what_compressed_tensors_wrote(tmp_path):
    (tmp_path / "in").mkdir()
    tensors = load_file(COMPRESSED)
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    settings = {"model_type": "llama", "quantization_config": {"sparsity_config": {"format": "sparse-24-bitmask"}}}
    (tmp_path / "in" / "config.json").write_text(json.dumps(settings))
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    assert compressed_tensors.write_plain(tmp_path / "in", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("layers.0.down", "layers.1.up"):
        dense, found = tensors[f"dense.{name}"], written[f"{name}.weight"]
        # a value of -0 may be stored as 0
        assert found.dtype == dense.dtype and torch.equal(found, dense)
        assert_same_bits(written[f"dense.{name}"], dense)
        assert not any(f"{name}.{part}" in written for part in ("compressed", "bitmask", "shape"))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "llama"}
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("to", ["dense", "packed"])
def test_import_of_a_compressed_checkpoint(to, tmp_path, capsys):
    model = masked(tiny_model(), random_masks(tiny_model()))
    source = compressed_folder(tmp_path / "in", model)
    arguments = ["import", str(source), "--output", str(tmp_path / "out"), "--to", to, "--dtype", "float32"]
    assert main.main(arguments) == 0
    assert f"{to} 2:4 checkpoint with 14 sparse layers written to" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    layer = loaded.get_submodule(LAYER)
    assert type(layer) is (nn.Linear if to == "dense" else mk.Sparse24Linear)
    tokens = torch.arange(12).view(1, 12)
    assert_same_bits(loaded(tokens).logits, model(tokens).logits)
    if to == "packed":
        # and back
        again = ["import", str(tmp_path / "out"), "--output", str(tmp_path / "dense"), "--to", "dense"]
        capsys.readouterr()
        assert main.main([*again, "--pattern", "4:8"]) == 2
        told = f"pattern: expected that of the packed layers in {str(tmp_path / 'out')!r}, 2:4, got 4:8; leave it out"
        assert told in capsys.readouterr().err and not (tmp_path / "dense").exists()
        assert main.main([*again, "--pattern", "2:4"]) == 0
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
        assert type(loaded.get_submodule(LAYER)) is nn.Linear
        assert_same_bits(loaded(tokens).logits, model(tokens).logits)
        told = "source: expected weights with zeros in them, got .*, which is packed already; `--to dense` unpacks it"
        capsys.readouterr()
        assert main.main(["import", str(tmp_path / "out"), "--output", str(tmp_path / "other")]) == 2
        assert re.search(told, capsys.readouterr().err) and not (tmp_path / "other").exists()


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_import_of_a_checkpoint_in_the_format_dense(tmp_path, capsys, key):
    """Which transformers would load by the package compressed-tensors alone."""
    model = masked(tiny_model(), random_masks(tiny_model()))
    model.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path / "in")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1
    config = tmp_path / "in" / "config.json"
    of_compression = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "quantization_status": "frozen",
        "config_groups": {},
        "sparsity_config": {"format": "dense", "sparsity_structure": "2:4", "targets": ["Linear"]},
    }
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: of_compression}))
    before = contents(tmp_path / "in")
    assert main.main(["import", str(tmp_path / "in"), "--output", str(tmp_path / "out")]) == 0
    assert "packed 2:4 checkpoint with 14 sparse layers written to" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded.get_submodule(LAYER)) is mk.Sparse24Linear
    tokens = torch.arange(12).view(1, 12)
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)
    assert contents(tmp_path / "in") == before and sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_other_settings_of_quantization_are_left_to_transformers(tmp_path):
    tiny_model().save_pretrained(tmp_path / "in")
    config = tmp_path / "in" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    assert not compressed_tensors.write_plain(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop("a.shape"), "expected a.compressed, .bitmask, .shape, got none of .'shape'"),
        (lambda t: t.update({"a.shape": torch.tensor([4, 8, 1])}), "expected two positive integers in a.shape"),
        (lambda t: t.update({"a.shape": torch.tensor([-4, 8])}), "expected two positive integers in a.shape"),
        (
            lambda t: t.update({"a.shape": torch.tensor([2, 3]), "a.compressed": torch.ones(3)}),
            "expected rows of whole groups of 4 in a.shape, got .2, 3.",
        ),
        (lambda t: t.update({"a.shape": torch.tensor([4, 16])}), "expected 32 values of .* in a.compressed"),
        (lambda t: t.update({"a.bitmask": t["a.bitmask"] ^ 1}), "a.bitmask: expected exactly 2 of every 4"),
    ],
)
def test_damaged_compressed_weights_are_refused(change, told, tmp_path):
    packed = mk.pack_24(
        masked(nn.Sequential(nn.Linear(8, 4)), {"0": torch.tensor([[True, True, False, False] * 2] * 4)})[0].weight
    )
    tensors = {"a.compressed": packed.values, "a.bitmask": packed.bitmask, "a.shape": torch.tensor([4, 8])}
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"checkpoint: .*{told}"):
        compressed_tensors.write_plain(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match=f"checkpoint: .*{told}"):
        list(survey.survey(safetensors_files.weight_files(tmp_path)))


@pytest.mark.parametrize("config", ["[]", "{", "\x00"])
def test_a_damaged_config_is_refused(config, tmp_path):
    source = compressed_folder(tmp_path / "in", masked(tiny_model(), random_masks(tiny_model())))
    (source / "config.json").write_text(config)
    with pytest.raises(ValueError, match="checkpoint: expected settings in config.json, got .*download it again"):
        compressed_tensors.write_plain(source, tmp_path / "out")


def test_a_single_shard_keeps_its_index(tmp_path):
    packed = mk.pack_24(torch.zeros(4, 8))
    (tmp_path / "in").mkdir()
    save_file(
        {"a.compressed": packed.values, "a.bitmask": packed.bitmask, "a.shape": torch.tensor([4, 8])},
        tmp_path / "in" / "model-00001-of-00001.safetensors",
    )
    assert compressed_tensors.write_plain(tmp_path / "in", tmp_path / "out")
    index = json.loads((tmp_path / "out" / safetensors_files.INDEX).read_text())
    assert index["weight_map"] == {"a.weight": "model-00001-of-00001.safetensors"}
