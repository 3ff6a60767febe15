"""`maskpro export`."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.command import refuses, report, reseal
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskpro_kernels.checkpoints.logits import Logits, load_logits, write_logits
from maskpro_kernels.cli import main

pytestmark = pytest.mark.usefixtures("eager_reference")


def test_export_rebuilds_the_checkpoint(run, tmp_path):
    """In the dtype of the run where none is given."""
    assert main.main(["export", str(run), str(tmp_path / "float32")]) == 0
    assert main.main(["export", str(run), str(tmp_path / "bfloat16"), "--dtype", "bfloat16"]) == 0
    learned, exported, short = map(
        AutoModelForCausalLM.from_pretrained, (run, tmp_path / "float32", tmp_path / "bfloat16")
    )
    assert short.dtype == torch.bfloat16
    state = exported.state_dict()
    assert state.keys() == learned.state_dict().keys()
    for name, tensor in learned.state_dict().items():
        assert_same_bits(tensor, state[name])
        assert_same_bits(tensor.bfloat16(), short.state_dict()[name])


def test_export_refuses_other_base_weights(inputs, run, tmp_path, capsys):
    """Whatever the dtype to be written; replayed logits tell which they were too."""
    assert main.main(["replay", str(run), "--output", str(tmp_path / "replayed"), "--device", "cpu"]) == 0
    logits, metadata = load_logits(run / "logits.safetensors")
    assert load_logits(tmp_path / "replayed")[1] == metadata
    model = AutoModelForCausalLM.from_pretrained(inputs / "model")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(inputs / "model").save_pretrained(tmp_path / "model")
    (tmp_path / "run").mkdir()
    metadata["model"] = str(tmp_path / "model")
    write_logits(Logits(logits, {}, metadata), tmp_path / "run" / "logits.safetensors")
    export = ["export", str(tmp_path / "run"), str(tmp_path / "out")]
    told = "that its masks were learned on, got others; put back the base model as it was"
    for more in ([], ["--dtype", "bfloat16"]):
        refuses(capsys, tmp_path, [*export, *more], f"run: expected the weights of {metadata['model']!r}", told)


@pytest.fixture
def moved(inputs, run, tmp_path):
    """(Folder of a run whose base model is gone, where that is now)."""
    gone, now, copy = tmp_path / "gone", tmp_path / "now", tmp_path / "run"
    shutil.copytree(inputs / "model", now)
    shutil.copytree(run, copy)
    learned = load_logits(run / "logits.safetensors")
    learned.metadata["model"] = str(gone)
    logits_file = write_logits(learned, copy / "logits.safetensors")
    reseal(copy / "report.json", lambda told: told.update(logits_file=logits_file))
    return copy, now


def test_a_base_model_that_has_moved_is_named(inputs, run, moved, tmp_path, capsys):
    folder, now = moved
    export = ["export", str(folder), str(tmp_path / "out")]
    refuses(capsys, tmp_path, export, "put back the base model of the run, or name its new place by --model")
    assert main.main([*export, "--model", str(now)]) == 0
    assert f"checkpoint of {now} written" in capsys.readouterr().out
    assert_same_bits(
        *(dict(AutoModelForCausalLM.from_pretrained(path).state_dict()) for path in (run, tmp_path / "out"))
    )
    assert "`now`" in (tmp_path / "out" / "README.md").read_text()


def test_another_model_in_its_place_is_refused(moved, tmp_path, capsys):
    folder, now = moved
    model = AutoModelForCausalLM.from_pretrained(now)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1
    model.save_pretrained(now)
    export = ["export", str(folder), str(tmp_path / "out"), "--model"]
    refuses(capsys, tmp_path, [*export, str(now)], f"expected the weights of {str(now)!r}", "got others")
    refuses(capsys, tmp_path, [*export, str(tmp_path / "none")], "model: expected", "no such folder")


def test_replayed_logits_are_taken_where_the_model_has_moved(run, moved, tmp_path, capsys):
    """Their metadata, and so the digest of their file, are others than those in the report."""
    folder, now = moved
    settings = json.loads((folder / "settings.json").read_text())
    settings["settings"]["model"] = str(now)
    (folder / "settings.json").write_text(json.dumps(settings))
    logits = folder / "logits.safetensors"
    export = ["export", str(folder), str(tmp_path / "out")]
    logits.unlink()
    assert main.main(["replay", str(folder), "--output", str(logits), "--device", "cpu"]) == 0
    assert load_logits(logits)[1]["model"] == str(now)
    assert main.main(export) == 0
    (folder / "settings.json").rename(tmp_path / "settings.json")
    other = [*export[:2], str(tmp_path / "other")]
    refuses(capsys, tmp_path, other, "the logits that report.json tells of")
    (tmp_path / "settings.json").rename(folder / "settings.json")
    learned = load_logits(logits)
    next(iter(learned.logits.values()))[0, 0] += 1
    write_logits(learned, logits)
    assert main.main(other) == 2
    assert "the logits that report.json tells of, got others" in capsys.readouterr().err.splitlines()[-1]


def test_export_packs(run, tmp_path, inputs, capsys):
    assert main.main(["export", str(run), str(tmp_path / "packed"), "--to", "packed"]) == 0
    assert f"packed 2:4 checkpoint of {inputs / 'model'} written to" in capsys.readouterr().out
    learned, packed = map(AutoModelForCausalLM.from_pretrained, (run, tmp_path / "packed"))
    tokens = torch.arange(12).view(1, 12)
    assert_same_bits(packed(tokens).logits, learned(tokens).logits)
    data = ["--data", str(inputs / "text.txt"), "--device", "cpu", "--eval-windows", "5", "--eval-length", "24"]
    assert main.main(["eval", str(tmp_path / "packed"), *data, "--dtype", "float32"]) == 0
    assert f"perplexity {report(run)['table'][-1]['perplexity']:.2f} over" in capsys.readouterr().out


def test_export_refuses_what_is_no_run(inputs, run, tmp_path, capsys):
    output = str(tmp_path / "output")
    refuses(capsys, tmp_path, ["export", str(inputs / "model"), output], "logits.safetensors")
    refuses(capsys, tmp_path, ["export", str(run), str(run)], "output: expected a new or empty folder")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "logits.safetensors").write_text("nothing")
    refuses(capsys, tmp_path, ["export", str(broken), output], "path: expected a safetensors file")
    write_logits(Logits({"linear": torch.zeros(2, 4)}, {}, {"model": "x"}), broken / "logits.safetensors")
    refuses(capsys, tmp_path, ["export", str(broken), output], "run: expected logits of `maskpro learn`")
