"""`maskpro export` and `maskpro import` of mask files: the checkpoints of a run from its logits."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.command import learn, nonzeros, refuses, report
from helpers.tiny_llama import tiny_model, tiny_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from maskpro_kernels.checkpoints.logits import load_logits, write_logits
from maskpro_kernels.checkpoints.mask_file import load_masks
from maskpro_kernels.cli import export, main
from maskpro_kernels.packed import NMLinear
from maskpro_kernels.text.batches import windows
from maskpro_kernels.text.sources import load_text

pytestmark = pytest.mark.usefixtures("eager_reference")

LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def refitted(inputs, tmp_path_factory):
    from helpers.routes import route_to_the_eager_reference

    folder = tmp_path_factory.mktemp("refitted") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        route_to_the_eager_reference(monkeypatch)
        assert main.main(learn(inputs, folder, "--refit", "weights")) == 0
    return folder


@pytest.fixture(params=["run", "refitted"])
def learned(request):
    return request.getfixturevalue(request.param)


def test_dense_checkpoints_are_those_of_the_run(learned, tmp_path, capsys):
    assert main.main(["export", str(learned), str(tmp_path / "dense")]) == 0
    assert capsys.readouterr().out.startswith("dense 2:4 checkpoint of ")
    expected = load_file(learned / "model.safetensors")
    assert_same_bits(load_file(tmp_path / "dense" / "model.safetensors"), expected)
    assert main.main(["export", str(learned), str(tmp_path / "short"), "--dtype", "bfloat16"]) == 0
    for name, tensor in load_file(tmp_path / "short" / "model.safetensors").items():
        assert_same_bits(tensor, expected[name].bfloat16())
    # the card shows what the run has found
    card = (tmp_path / "dense" / "README.md").read_text(encoding="utf-8")
    assert f"{report(learned)['table'][-1]['perplexity']:.2f}" in card and "2:4" in card


@pytest.fixture
def rounded(monkeypatch):
    """Windows, of each export, by which the command rounds values."""
    seen, finalize = [], export.finalize

    def noting(model, *how, calibration, **others):
        seen.append(torch.cat(calibration))
        return finalize(model, *how, calibration=calibration, **others)

    monkeypatch.setattr(export, "finalize", noting)
    monkeypatch.setattr(export, "WINDOWS", 16)
    return seen


INT4 = ["--to", "packed", "--values", "int4"]


def test_int4_values_are_rounded_by_the_data_of_the_run(run, inputs, tmp_path, capsys, rounded):
    of_both = tmp_path / "run"
    assert main.main(learn(inputs, of_both, "--data", f"{inputs / 'text.txt'}:1,self:3", "--batch-size", "8")) == 0
    assert main.main(["export", str(of_both), str(tmp_path / "int4"), *INT4]) == 0
    assert {layer.kind for layer in packed_layers(tmp_path / "int4")} == {"int4"}
    assert main.main(["export", str(run), str(tmp_path / "by text"), *INT4]) == 0
    samples = load_file(of_both / "progress" / "samples.safetensors")["tokens"]
    text = windows(load_text(str(inputs / "text.txt"))["calibration"], tiny_tokenizer(), 128)
    assert [batch.shape for batch in rounded] == [(16, 16), (16, 128)]
    assert sum(bool((row == samples).all(1).any()) for row in rounded[0]) == 12
    assert all((row == text).all(1).any() for row in rounded[1])
    (of_both / "progress" / "samples.safetensors").unlink()
    cure = "int4 values are rounded by the data of the run, restore it"
    refuses(capsys, tmp_path, ["export", str(of_both), str(tmp_path / "other"), *INT4], "samples.safetensors", cure)


def test_int4_values_in_bfloat16_are_rounded_in_float32_where_that_is_faster(refitted, tmp_path, rounded, monkeypatch):
    monkeypatch.setattr(export, "default_dtype", lambda device: "float32")
    stored = {}
    for dtype in ("float32", "bfloat16"):
        assert main.main(["export", str(refitted), str(tmp_path / dtype), *INT4, "--dtype", dtype]) == 0
        stored[dtype] = load_file(tmp_path / dtype / "model.safetensors")
    assert stored["float32"].keys() == stored["bfloat16"].keys()
    for name, tensor in stored["float32"].items():
        assert_same_bits(stored["bfloat16"][name], tensor.bfloat16() if tensor.is_floating_point() else tensor)


def packed_layers(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    return [layer for layer in model.modules() if isinstance(layer, NMLinear)]


def test_packed_checkpoints_give_the_logits_of_the_run(learned, tmp_path, capsys):
    tokens = torch.arange(12).view(1, 12)
    assert main.main(["export", str(learned), str(tmp_path / "packed"), "--to", "packed"]) == 0
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert_same_bits(packed(tokens).logits, AutoModelForCausalLM.from_pretrained(learned)(tokens).logits)
    reported = capsys.readouterr().out
    assert "14 packed layers take 17.00 bits a weight" in reported or "14 packed layers take" in reported
    int8 = ["export", str(learned), str(tmp_path / "int8"), "--to", "packed", "--values", "int8"]
    assert main.main(int8) == 0
    assert "values of 14 rounded to int8" in capsys.readouterr().out
    layer = AutoModelForCausalLM.from_pretrained(tmp_path / "int8").get_submodule(LAYER)
    assert isinstance(layer, NMLinear) and layer.kind == "int8"


def test_a_mask_travels_without_its_weights(inputs, run, refitted, tmp_path, capsys):
    mask = tmp_path / "mask"
    assert main.main(["export", str(run), str(mask), "--to", "mask"]) == 0
    assert capsys.readouterr().out.startswith(f"2:4 mask of {inputs / 'model'} written to {mask}")
    assert load_masks(mask).model == "model" and mask.stat().st_size < 20_000
    expected = load_file(run / "model.safetensors")
    for name, more in {"dense": ["--to", "dense"], "packed": []}.items():
        arguments = ["import", str(mask), "--model", str(inputs / "model"), "--output", str(tmp_path / name), *more]
        assert main.main(arguments) == 0
    assert_same_bits(load_file(tmp_path / "dense" / "model.safetensors"), expected)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").get_submodule(LAYER)
    assert_same_bits(packed.packed.unpack(), expected[f"{LAYER}.weight"])
    out = ["--output", str(tmp_path / "out")]
    arguments = ["import", str(mask), "--model", str(inputs / "model"), "--pattern", "4:8", *out]
    refuses(capsys, tmp_path, arguments, f"pattern: expected 2:4, as '{mask}' is stored, got 4:8")
    refuses(capsys, tmp_path, ["import", str(mask), *out], "model: expected the base model of the mask file")
    other = tiny_model()
    other.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1
    shutil.copytree(inputs / "model", tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    arguments = ["import", str(mask), "--model", str(tmp_path / "other"), *out]
    refuses(capsys, tmp_path, arguments, "expected the masks' base model, model, with fingerprint")
    refuses(capsys, tmp_path, ["export", str(refitted), str(tmp_path / "new"), "--to", "mask"], "got changed weights")
    content = bytearray(mask.read_bytes())
    content[-1] ^= 1
    mask.write_bytes(content)
    arguments = ["import", str(mask), "--model", str(inputs / "model"), *out]
    refuses(capsys, tmp_path, arguments, "mask: expected an unchanged file", "which was damaged or changed")


def test_packed_checkpoints_are_imported_dense_and_packed_otherwise(run, tmp_path, capsys):
    packed = tmp_path / "packed"
    assert main.main(["import", str(run), "--output", str(packed)]) == 0
    assert "left dense: lm_head" in capsys.readouterr().err
    assert main.main(["import", str(packed), "--output", str(tmp_path / "dense"), "--to", "dense"]) == 0
    expected = load_file(run / "model.safetensors")
    assert_same_bits(load_file(tmp_path / "dense" / "model.safetensors"), expected)
    assert main.main(["import", str(packed), "--output", str(tmp_path / "int8"), "--values", "int8"]) == 0
    refuses(capsys, tmp_path, ["import", str(packed), "--output", str(tmp_path / "new")], "which is packed already")
    arguments = ["import", str(packed), "--output", str(tmp_path / "new"), "--to", "dense", "--pattern", "4:8"]
    refuses(capsys, tmp_path, arguments, f"pattern: expected 2:4, as '{packed}' is stored, got 4:8")
    arguments = ["import", str(run), "--output", str(tmp_path / "new"), "--pattern", "1:4"]
    assert main.main(arguments) == 2
    assert "pattern: " in capsys.readouterr().err.splitlines()[-1]
    assert (nonzeros(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), LAYER) == 2).all()


def test_another_base_model_or_logits_are_refused(inputs, run, tmp_path, capsys):
    copy, out = tmp_path / "run", str(tmp_path / "out")
    shutil.copytree(run, copy)
    learned = load_logits(run / "logits.safetensors")
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1
    shutil.copytree(inputs / "model", tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    reported = "that its masks were learned on, got others; name the original base model by --model"
    refuses(capsys, tmp_path, ["export", str(copy), out, "--model", str(tmp_path / "model")], reported)
    moved = learned._replace(metadata=learned.metadata | {"model": str(tmp_path / "gone")})
    write_logits(moved, copy / "logits.safetensors")
    refuses(capsys, tmp_path, ["export", str(copy), out], "run: ", "or name its new place by --model")
    assert main.main(["export", str(copy), str(tmp_path / "found"), "--model", str(inputs / "model")]) == 0
    nan = {name: tensor * torch.nan for name, tensor in learned.logits.items()}
    for wrong in (learned._replace(metadata={}), learned._replace(logits=nan), learned._replace(logits={})):
        write_logits(wrong, copy / "logits.safetensors")
        refuses(capsys, tmp_path, ["export", str(copy), out], "run: expected ")
    (copy / "logits.safetensors").unlink()
    refuses(capsys, tmp_path, ["export", str(copy), out], "run: expected logits.safetensors in", "from a copy")
