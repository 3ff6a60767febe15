"""Checkpoints with int8 values: written, loaded by transformers, refused where they are damaged."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.checkpoints import reconfigure, rewrite
from helpers.tiny_llama import tiny_model, tiny_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import maskpro_kernels as mk
from maskpro_kernels import hf
from maskpro_kernels.cli import main
from maskpro_kernels.prune.finalize import pack, unpack

pytestmark = pytest.mark.usefixtures("eager_reference")

LAYER = "model.layers.0.mlp.down_proj"
TOKENS = torch.arange(12).view(1, 12)


@pytest.fixture(scope="module")
def packed():
    model = tiny_model()
    mk.convert(model, "2:4")
    return mk.finalize(model, to="packed", values="int8").eval()


@pytest.fixture
def folder(packed, tmp_path):
    hf.save_model(packed, tiny_tokenizer(), tmp_path / "packed")
    return tmp_path / "packed"


def settings(folder) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_it_comes_back_bit_for_bit(packed, folder, tmp_path):
    assert settings(folder)["values"] == "int8" and settings(folder)["version"] == 1
    stored = load_file(folder / "model.safetensors")
    assert stored[f"{LAYER}.values"].dtype == torch.int8 and stored[f"{LAYER}.scales"].shape == (32, 1)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    layer = loaded.get_submodule(LAYER)
    assert type(layer) is mk.Sparse24Linear and layer.kind == "int8" and "values" in layer._buffers
    assert_same_bits(loaded(TOKENS).logits, packed(TOKENS).logits)
    assert_same_bits(
        *(model.generate(TOKENS, max_new_tokens=8, do_sample=False) for model in (loaded, copy.deepcopy(packed)))
    )
    loaded.save_pretrained(tmp_path / "again")
    assert_same_bits(load_file(tmp_path / "again/model.safetensors"), stored)


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}], ids=["plain", "device_map"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scales_follow_the_dtype_asked_for_and_values_do_not(packed, folder, dtype, options):
    layer = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).get_submodule(LAYER)
    assert layer.scales.dtype == layer.weight.dtype == dtype
    assert_same_bits(layer.values, packed.get_submodule(LAYER).values)
    assert_same_bits(layer.scales, packed.get_submodule(LAYER).scales.to(dtype))


def test_sharded_files(packed, tmp_path):
    packed.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_bits(AutoModelForCausalLM.from_pretrained(tmp_path)(TOKENS).logits, packed(TOKENS).logits)


def test_both_kinds_in_one_model(tmp_path):
    model = tiny_model()
    for target, values in (("*down_proj", "int8"), ("*up_proj", "keep")):
        mk.convert(model, "2:4", targets=[target])
        mk.finalize(model, to="packed", values=values)
    hf.save_model(model, tiny_tokenizer(), tmp_path)
    assert settings(tmp_path)["values"] == {"int8": [f"model.layers.{i}.mlp.down_proj" for i in range(2)]}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    kinds = [module.kind for module in loaded.modules() if isinstance(module, mk.NMLinear)]
    assert sorted(kinds) == ["int8", "int8", "keep", "keep"]
    assert_same_bits(loaded(TOKENS).logits, model(TOKENS).logits)
    assert "The kept values of 2 of them are rounded to int8" in (tmp_path / "README.md").read_text()


def test_a_config_without_the_kind_of_values_keeps_them(tmp_path):
    model = tiny_model()
    mk.convert(model, "2:4")
    mk.finalize(model, to="packed").save_pretrained(tmp_path)
    reconfigure(lambda config: config.pop("values"))(tmp_path)
    with hf.without_digests():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_submodule(LAYER).kind == "keep"
    assert_same_bits(loaded(TOKENS).logits, model(TOKENS).logits)


def test_unpacked_it_is_saved_as_a_dense_one(packed, folder, tmp_path):
    model, tokenizer = hf.load_model(str(folder), torch.float32)
    unpack(model)
    hf.save_model(model, tokenizer, tmp_path / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert_same_bits(loaded.get_submodule(LAYER).weight, packed.get_submodule(LAYER).weight)
    pack(loaded, "2:4", "int8")
    assert loaded.get_submodule(LAYER).kind == "int8"


def test_a_loaded_model_can_be_told_to_learn(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).requires_grad_()
    model(TOKENS, labels=TOKENS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def on(part: str, change) -> object:
    """A damage to a part of LAYER."""
    return rewrite(lambda tensors: tensors.update({f"{LAYER}.{part}": change(tensors[f"{LAYER}.{part}"])}))


def with_one(value: float):
    def change(scales):
        scales[3, 0] = value
        return scales

    return change


KEPT = f"{LAYER}.values"
DAMAGES = {
    "expected 14 packed weights with scales, .*, such as .*, got 13": (
        rewrite(lambda tensors: tensors.pop(f"{LAYER}.scales"))
    ),
    f"{KEPT}: expected torch.int8 beside scales, got BF16": on("values", lambda t: t.bfloat16()),
    f"{KEPT}: expected torch.int8 beside scales, got I32": on("values", lambda t: t.int()),
    "expected values of the 14 layers": rewrite(lambda tensors: tensors.pop(KEPT)),
    f"{LAYER}.scales: expected torch.float32 or .*, got torch.int32": on("scales", lambda t: t.int()),
    f"{LAYER}.scales: expected finite numbers, none below 0": on("scales", with_one(-1.0)),
    f"{LAYER}.scales: expected finite.*": on("scales", with_one(float("nan"))),
    f"{LAYER}.scales: expected .*": on("scales", with_one(float("inf"))),
    f"{LAYER}.bitmask: expected exactly 2 of every 4": on("bitmask", lambda t: t ^ 1),
    "expected values to be one of keep, int8, or names .*, got 'int4'": (
        reconfigure(lambda config: config.update(values="int4"))
    ),
    "expected values to be one of keep, int8, or names .*, got 3": reconfigure(lambda config: config.update(values=3)),
    "got .*'fp8'": reconfigure(lambda config: config.update(values={"fp8": [LAYER]})),
    "expected a list of names as values of int8, got 'x'": (
        reconfigure(lambda config: config.update(values={"int8": "x"}))
    ),
    "expected values of each packed layer once, got 'x' which has no pattern": (
        reconfigure(lambda config: config.update(values={"int8": ["x"]}))
    ),
    f"expected values of each packed layer once, got '{LAYER}' twice": (
        reconfigure(lambda config: config.update(values={"int8": [LAYER], "keep": [LAYER]}))
    ),
    "expected 0 packed weights with scales, .*, got 14, such as": (
        reconfigure(lambda config: config.update(values="keep"))
    ),
    "expected 1 packed weights with scales": reconfigure(lambda config: config.update(values={"int8": [LAYER]})),
}


@pytest.mark.parametrize("told", DAMAGES)
def test_damaged_checkpoints_are_refused(told, folder):
    DAMAGES[told](folder)
    with pytest.raises((TypeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(folder)
    with hf.without_digests(), pytest.raises((TypeError, ValueError), match=told):
        AutoModelForCausalLM.from_pretrained(folder)


def test_scales_of_another_shape_are_refused(folder):
    on("scales", lambda t: t.repeat(1, 2))(folder)
    with hf.without_digests(), pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="model: expected"):
        hf.load_model(str(folder), torch.float32)


def test_scales_beside_other_values_are_refused(tmp_path):
    model = tiny_model()
    mk.convert(model, "2:4")
    mk.finalize(model, to="packed").save_pretrained(tmp_path)
    rewrite(lambda tensors: tensors.update({f"{LAYER}.scales": torch.ones(32, 1)}))(tmp_path)
    with pytest.raises(ValueError, match=f"{KEPT}: expected torch.int8 beside scales, got F32"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_command_tells_damage_in_one_line(folder, capsys):
    on("scales", with_one(-1.0))(folder)
    for command in (
        ["validate", str(folder)],
        ["import", str(folder), "--output", str(folder / "out"), "--to", "dense", "--no-digests"],
    ):
        assert main.main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{LAYER}.scales: expected finite numbers, none below 0" in line
