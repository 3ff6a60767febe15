"""`maskpro export` and `maskpro import` of mask files: the checkpoints of a run from its logits."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.command import learn, nonzeros, refuses, report
from helpers.tiny_llama import tiny_model, tiny_text, tiny_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from maskpro_kernels.checkpoints.logits import load_logits, write_logits
from maskpro_kernels.checkpoints.mask_file import load_masks
from maskpro_kernels.cli import export, main
from maskpro_kernels.packed import Int8Linear, NMLinear
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
    """Windows by which the command rounds values, of each export."""
    seen, finalize = [], export.finalize

    def noting(model, *how, calibration, **others):
        seen.append(torch.cat(calibration))
        return finalize(model, *how, calibration=calibration, **others)

    monkeypatch.setattr(export, "finalize", noting)
    monkeypatch.setattr(export, "WINDOWS", 16)
    return seen


INT4 = ["--to", "packed", "--values", "int4"]


def samples_of(run):
    return load_file(run / "progress" / "samples.safetensors")["tokens"]


def number_in(rows, windows):
    return sum(bool((row == windows).all(1).any()) for row in rows)


def test_int4_values_are_rounded_by_the_data_of_the_run(inputs, tmp_path, rounded, monkeypatch):
    folder, data = tmp_path / "run", f"{inputs / 'text.txt'}:1,self:3"
    assert main.main(learn(inputs, folder, "--data", data, "--batch-size", "8")) == 0
    assert main.main(["export", str(folder), str(tmp_path / "int4"), *INT4]) == 0
    assert {layer.kind for layer in packed_layers(tmp_path / "int4")} == {"int4"}
    assert rounded[0].shape == (16, 16) and number_in(rounded[0], samples_of(folder)) == 12
    text = windows(load_text(str(inputs / "text.txt"))["calibration"], tiny_tokenizer(), 16)
    assert number_in(rounded[0], text) == 4
    # longer windows than needed are cut
    monkeypatch.setattr(export, "LENGTH", 8)
    assert main.main(["export", str(folder), str(tmp_path / "short"), *INT4]) == 0
    assert rounded[1].shape == (16, 8) and number_in(rounded[1], samples_of(folder)[:, :8]) == 12


def test_samples_for_evaluation_do_not_round(inputs, tmp_path, rounded):
    folder = tmp_path / "run"
    assert main.main(learn(inputs, folder, "--data", "self")) == 0
    assert main.main(["export", str(folder), str(tmp_path / "int4"), *INT4]) == 0
    # five windows for the test and as many for validation
    samples = samples_of(folder)
    assert number_in(rounded[0], samples[10:]) == 16 and number_in(rounded[0], samples[:10]) == 0


def test_a_run_without_its_data_is_not_rounded(inputs, tmp_path, capsys, datasets_cache, rounded):
    rows = "".join(f'{{"text": "{paragraph}"}}\n' for paragraph in tiny_text().split("\n\n"))
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    folder, data = tmp_path / "run", f"{tmp_path / 'rows.jsonl'},self"
    assert main.main(learn(inputs, folder, "--data", data, "--documents", "40")) == 0
    assert main.main(["export", str(folder), str(tmp_path / "int4"), *INT4]) == 0
    read = load_text(str(tmp_path / "rows.jsonl"), documents=40)["calibration"]
    assert number_in(rounded[0], windows(read, tiny_tokenizer(), 16)) == 8
    cure = "restore the data of the run, or round without it: maskpro import --values int4"
    again = ["export", str(folder), str(tmp_path / "other"), *INT4]
    path = folder / "progress" / "samples.safetensors"
    whole = path.read_bytes()
    for damage in (whole[: len(whole) // 2], whole[:-1] + b"\x01", None):
        path.unlink() if damage is None else path.write_bytes(damage)
        refuses(capsys, tmp_path, again, f"run: expected samples of the dense model in '{folder / 'progress'}'", cure)
    path.write_bytes(whole)
    (tmp_path / "rows.jsonl").unlink()
    refuses(capsys, tmp_path, again, "rows.jsonl", cure)


def test_values_in_bfloat16_are_rounded_in_float32_where_that_is_faster(inputs, tmp_path, rounded, monkeypatch):
    folder, used = tmp_path / "run", []
    load = export.load
    monkeypatch.setattr(export, "load", lambda name, dtype, device: (used.append(dtype), load(name, dtype, device))[1])
    assert main.main(learn(inputs, folder, "--refit", "weights", "--dtype", "bfloat16")) == 0
    for fast in (False, True):
        monkeypatch.setattr(export, "cpu_multiplies", lambda dtype, fast=fast: fast or dtype is torch.float32)
        used.clear()
        outputs = {dtype: tmp_path / f"{dtype} {fast}" for dtype in ("bfloat16", "float32")}
        for dtype, output in outputs.items():
            assert main.main(["export", str(folder), str(output), *INT4, "--dtype", dtype]) == 0
        # the run's dtype, that of rounding, and that of the result
        assert used == (["bfloat16"] if fast else ["bfloat16", "float32", "bfloat16"]) + ["bfloat16", "float32"]
        short, long = (load_file(output / "model.safetensors") for output in outputs.values())
        assert short.keys() == long.keys()
        for name, tensor in long.items():
            if not fast or not name.endswith(("values", "scales")):
                assert_same_bits(short[name], tensor.bfloat16() if tensor.is_floating_point() else tensor)


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
    # the run has not evaluated them
    assert "before rounding" in (tmp_path / "int8" / "README.md").read_text(encoding="utf-8")
    assert "before rounding" not in (tmp_path / "packed" / "README.md").read_text(encoding="utf-8")
    layer = AutoModelForCausalLM.from_pretrained(tmp_path / "int8").get_submodule(LAYER)
    assert isinstance(layer, NMLinear) and layer.kind == "int8"


def test_an_output_layer_in_int8(inputs, learned, tmp_path, capsys):
    packed, output = tmp_path / "packed", tmp_path / "int8"
    to_packed = ["--to", "packed", "--output-layer", "int8"]
    assert main.main(["export", str(learned), str(packed), "--to", "packed"]) == 0
    assert main.main(["export", str(learned), str(output), *to_packed]) == 0
    assert "; another layer in int8 takes 0.00 MB" in capsys.readouterr().out
    assert "before rounding" in (output / "README.md").read_text(encoding="utf-8")
    tensors, before = (load_file(folder / "model.safetensors") for folder in (output, packed))
    assert tensors.keys() - before.keys() == {"lm_head.values", "lm_head.scales"} and before.keys() <= tensors.keys()
    assert_same_bits({name: tensors[name] for name in before}, before)
    # other commands read it
    assert main.main(["eval", str(output), "--data", str(inputs / "text.txt"), "--eval-windows", "2"]) == 0
    assert main.main(["speed", str(packed), str(output), "--prompt-tokens", "4", "--new-tokens", "2"]) == 0
    assert "dense int8, packed 2:4" in capsys.readouterr().out
    repacked = ["import", str(output), "--output", str(tmp_path / "repacked"), "--values", "int8"]
    assert main.main(repacked) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "repacked")
    assert {layer.kind for layer in packed_layers(tmp_path / "repacked")} == {"int8"}
    assert_same_bits(model.lm_head.values, tensors["lm_head.values"])
    assert main.main(["import", str(output), "--output", str(tmp_path / "dense"), "--to", "dense"]) == 0
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert_same_bits(dense["lm_head.weight"], model.lm_head.weight)
    assert not AutoModelForCausalLM.from_pretrained(tmp_path / "dense").config.tie_word_embeddings
    for to in ("dense", "mask"):
        arguments = ["export", str(learned), str(tmp_path / "new"), "--to", to, "--output-layer", "int8"]
        refuses(capsys, tmp_path, arguments, "--output-layer: expected none without --to packed, got 'int8'")


def test_an_output_layer_beside_int4_is_rounded_in_the_dtype_of_the_checkpoint(run, tmp_path, rounded, monkeypatch):
    arguments = ["export", str(run), str(tmp_path / "out"), *INT4, "--output-layer", "int8", "--dtype", "bfloat16"]
    from_dense = Int8Linear.from_dense
    for fast in (False, True):
        monkeypatch.setattr(export, "cpu_multiplies", lambda dtype, fast=fast: fast or dtype is torch.float32)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        dtypes = []

        def noting(linear, dtypes=dtypes):
            dtypes.append(linear.weight.dtype)
            return from_dense(linear)

        monkeypatch.setattr(Int8Linear, "from_dense", noting)
        assert main.main(arguments) == 0
        assert dtypes == [torch.bfloat16]
        tensors = load_file(tmp_path / "out" / "model.safetensors")
        linear = torch.nn.Linear(32, 32, bias=False)
        linear.weight = torch.nn.Parameter(tensors["model.embed_tokens.weight"])
        expected = Int8Linear.from_dense(linear)
        assert_same_bits([tensors["lm_head.values"], tensors["lm_head.scales"]], [expected.values, expected.scales])
        assert tensors["lm_head.scales"].dtype == torch.bfloat16


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
    learned = load_logits(run / "learned/logits.safetensors")
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1
    shutil.copytree(inputs / "model", tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    reported = "expected the base model that its masks were learned on, got other weights in"
    refuses(capsys, tmp_path, ["export", str(copy), out, "--model", str(tmp_path / "model")], reported)
    moved = learned._replace(metadata=learned.metadata | {"model": str(tmp_path / "gone")})
    write_logits(moved, copy / "learned/logits.safetensors")
    refuses(capsys, tmp_path, ["export", str(copy), out], "run: ", "or name its new place by --model")
    assert main.main(["export", str(copy), str(tmp_path / "found"), "--model", str(inputs / "model")]) == 0
    nan = {name: tensor * torch.nan for name, tensor in learned.logits.items()}
    for wrong in (learned._replace(metadata={}), learned._replace(logits=nan), learned._replace(logits={})):
        write_logits(wrong, copy / "learned/logits.safetensors")
        refuses(capsys, tmp_path, ["export", str(copy), out], "run: expected ")
    (copy / "learned/logits.safetensors").unlink()
    refuses(capsys, tmp_path, ["export", str(copy), out], "run: expected learned/logits.safetensors in", "from a copy")
