"""`maskpro export`."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.command import refuses, report
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskpro_kernels.checkpoints.logits import Learned, load_logits, write_learned
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
    """In the dtype of the run, where the logits tell which they were; replayed logits tell it too."""
    assert main.main(["replay", str(run), "--output", str(tmp_path / "replayed"), "--device", "cpu"]) == 0
    logits, metadata = load_logits(run / "logits.safetensors")
    assert load_logits(tmp_path / "replayed")[1] == metadata
    model = AutoModelForCausalLM.from_pretrained(inputs / "model")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(inputs / "model").save_pretrained(tmp_path / "model")
    (tmp_path / "run").mkdir()
    metadata["model"] = str(tmp_path / "model")
    write_learned(Learned(logits, {}, metadata), tmp_path / "run" / "logits.safetensors")
    export = ["export", str(tmp_path / "run"), str(tmp_path / "out")]
    told = "that its masks were learned on, got others; put back the base model as it was"
    refuses(capsys, tmp_path, export, f"run: expected the weights of {metadata['model']!r}", told)
    assert main.main([*export, "--dtype", "bfloat16"]) == 0


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
    write_learned(Learned({"linear": torch.zeros(2, 4)}, {}, {"model": "x"}), broken / "logits.safetensors")
    refuses(capsys, tmp_path, ["export", str(broken), output], "run: expected logits of `maskpro learn`")
