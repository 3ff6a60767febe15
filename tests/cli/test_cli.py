from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path

import pytest
import torch
from helpers.command import contents, learn, refuses, report
from helpers.full_disk import files_of_at_most
from helpers.routes import route_to_the_eager_reference
from helpers.tiny_llama import tiny_model, tiny_text, tiny_tokenizer, write_inputs
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from maskpro_kernels.checkpoints.logits import load_logits
from maskpro_kernels.cli import held_out, learning_run, main, run_end
from maskpro_kernels.cli import learn as learning
from maskpro_kernels.modules import MaskedLinear
from maskpro_kernels.text.data import load_text, windows
from maskpro_kernels.text.perplexity import perplexity
from maskpro_kernels.training.batches import digest
from maskpro_kernels.training.trainer import MaskTrainer

pytestmark = pytest.mark.usefixtures("eager_reference")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Folder with a tiny model, `model`, and a text, `text.txt`."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def run(inputs):
    """Folder of a finished run."""
    output = inputs / "runs" / "one"
    with pytest.MonkeyPatch.context() as monkeypatch:
        route_to_the_eager_reference(monkeypatch)
        assert main.main(learn(inputs, output)) == 0
    return output


def nonzeros(model, name, m=4):
    return (model.get_submodule(name).weight.view(-1, m) != 0).sum(1)


def test_learn_writes_a_checkpoint_that_has_the_perplexity_it_reports(inputs, run):
    written = report(run)
    model = AutoModelForCausalLM.from_pretrained(run)
    tokenizer = AutoTokenizer.from_pretrained(run)
    assert len(written["converted"]) == 14 and "lm_head" not in written["converted"]
    dense = tiny_model()
    for name in written["converted"]:
        assert (nonzeros(model, name) == 2).all()
        weight, kept = dense.get_submodule(name).weight, model.get_submodule(name).weight
        assert torch.equal(kept, weight * (kept != 0))
    test = windows(load_text(str(inputs / "text.txt"))["test"], tokenizer, 24)[:5]
    table = {row["method"]: row for row in written["table"]}
    assert list(table) == ["dense", "magnitude", "wanda", "reinforce"]
    assert table["reinforce"]["perplexity"] == pytest.approx(perplexity(model, test), rel=1e-6)
    assert table["dense"]["perplexity"] == pytest.approx(perplexity(dense, test), rel=1e-6)
    assert all(row["seconds"] >= 0 for row in table.values())


def test_learn_writes_the_whole_record(run):
    written = report(run)
    assert sorted(os.listdir(run)) == sorted(
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
        + ["logits.safetensors", "report.json", "report.html", "residual.png", "perplexity.png"]
        + ["settings.json", "progress"]
    )
    assert written["pattern"] == "2:4" and written["settings"]["seed"] == 0 and written["gap"] == 10
    assert {"python", "torch", "transformers"} <= set(written["versions"])
    assert len(written["steps"]) == 3
    assert {"step", "loss", "residual", "advantage", "tracker", "flip_rate"} <= set(written["steps"][0])
    assert written["flipped_groups"] == sum(written["flipped_groups_by_layer"].values())
    assert (run / "residual.png").read_bytes().startswith(b"\x89PNG")
    logits, metadata = load_logits(run / "logits.safetensors")
    assert logits.keys() == set(written["converted"]) and metadata["pattern"] == "2:4"
    assert written["groups"] == sum(tensor.numel() for tensor in logits.values()) // 4


def test_learn_prints_the_table(inputs, tmp_path, capsys):
    assert main.main(learn(inputs, tmp_path, "--pattern", "1:4", "--init", "magnitude", "--flip-rate", "0.05")) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].split() == ["method", "test", "perplexity", "seconds", "from", "dense"]
    assert [line.split()[0] for line in lines[1:5]] == ["dense", "magnitude", "wanda", "reinforce"]
    assert "groups differ from the magnitude mask" in lines[5]
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (nonzeros(model, "model.layers.1.mlp.down_proj") == 1).all()
    assert report(tmp_path)["settings"]["flip_rate"] == 0.05


def test_learn_by_straight_through_from_reconstruction_masks(inputs, tmp_path, capsys):
    options = "--init reconstruction --estimator straight-through --steps 6 --eval-every 2 --lr 1".split()
    assert main.main(learn(inputs, tmp_path / "run", *options)) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:6]]
    assert rows == ["dense", "magnitude", "wanda", "reconstruction", "straight-through"]
    written = report(tmp_path / "run")
    assert written["gap"] == 15 and written["settings"]["lr"] == 1
    assert [row["step"] for row in written["validation"]] == [0, 2, 4, 6]
    # batches of 4 windows of 16 tokens
    assert [row["tokens"] for row in written["validation"]] == [0, 128, 256, 384]
    assert all(step["residual"] is None and step["loss"] > 0 for step in written["steps"])
    assert not (tmp_path / "run" / "residual.png").exists()
    assert (tmp_path / "run" / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert written["flipped_groups"] > 0


def test_learning_stops_where_the_held_out_perplexity_rises(inputs, tmp_path, capsys, monkeypatch):
    values = iter([10.0] * 3 + [10.0, 12.0, 10.5, 11.5, 11.2] + [9.0] * 2)
    monkeypatch.setattr(held_out, "perplexity", lambda *args, **options: next(values))
    assert main.main(learn(inputs, tmp_path / "run", "--steps", "9", "--eval-every", "1")) == 0
    assert "stopped after 4 steps: at two evaluations in a row the validation perplexity was" in capsys.readouterr().err
    written = report(tmp_path / "run")
    assert [row["perplexity"] for row in written["validation"]] == [10.0, 12.0, 10.5, 11.5, 11.2]
    assert len(written["steps"]) == 4


def test_learning_stops_where_the_held_out_perplexity_is_no_number(inputs, tmp_path, capsys, monkeypatch):
    values = iter([10.0] * 3 + [10.0, float("nan"), 10.5, float("nan"), float("nan")] + [9.0])
    monkeypatch.setattr(held_out, "perplexity", lambda *args, **options: next(values))
    assert main.main(learn(inputs, tmp_path / "run", "--steps", "9", "--eval-every", "1")) == 0
    assert "stopped after 4 steps: at two evaluations in a row the validation perplexity was" in capsys.readouterr().err


@pytest.mark.parametrize("found", [float("nan"), float("inf")])
def test_an_initial_mask_without_a_held_out_perplexity_is_refused(inputs, tmp_path, capsys, monkeypatch, found):
    values = iter([10.0] * 3 + [found])
    monkeypatch.setattr(held_out, "perplexity", lambda *args, **options: next(values))
    assert main.main(learn(inputs, tmp_path / "deep" / "run")) == 2
    told = f"validation perplexity at step 0: expected a finite number, got {found}; take another --dtype"
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"maskpro: error: {told}")
    assert contents(tmp_path) == {}


def test_another_text_has_its_own_column(inputs, run, tmp_path, capsys):
    """It neither moves a mask nor is the text that learning stops by; compare shows it where it is the same."""
    other = tmp_path / "other.txt"
    other.write_text(tiny_text(seed=1), encoding="utf-8")
    assert main.main(learn(inputs, tmp_path / "run", "--other-data", str(other))) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()[:5]]
    assert table[0] == "method test perplexity on the other text seconds from dense".split()
    plain, both = report(run), report(tmp_path / "run")
    assert both["settings"]["other_data"] == str(other) and both["validation"] == plain["validation"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    test = windows(load_text(str(other))["test"], AutoTokenizer.from_pretrained(tmp_path / "run"), 24)[:5]
    for row, same, printed in zip(both["table"], plain["table"], table[1:], strict=True):
        assert row["perplexity"] == same["perplexity"]
        assert printed[1:3] == [f"{row['perplexity']:.2f}", f"{row['other_perplexity']:.2f}"]
    assert both["table"][-1]["other_perplexity"] == pytest.approx(perplexity(model, test), rel=1e-6)
    copy, changed = tmp_path / "copy", tmp_path / "changed"
    shutil.copytree(tmp_path / "run", copy)
    shutil.copytree(tmp_path / "run", changed)
    both["table"][0]["other_perplexity"] += 1
    (changed / "report.json").write_text(json.dumps(both))
    for another, shown in (copy, True), (run, False), (changed, False):
        assert main.main(["compare", str(tmp_path / "run"), str(another)]) == 0
        printed = capsys.readouterr().out
        assert ("on the other text" in printed) == shown and len(printed.splitlines()) == 6, printed


def test_seconds_count_from_the_dense_model(run):
    table = {row["method"]: row["seconds"] for row in report(run)["table"]}
    assert table["reinforce"] > table["wanda"] > 0


def test_the_same_seed_gives_the_same_logits(inputs, run, tmp_path):
    assert main.main(learn(inputs, tmp_path / "again")) == 0
    assert main.main(learn(inputs, tmp_path / "other", "--seed", "1")) == 0
    first, again, other = (
        load_logits(folder / "logits.safetensors")[0] for folder in (run, tmp_path / "again", tmp_path / "other")
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_eval_of_a_run_and_of_a_model(inputs, run, capsys):
    options = f"--data {inputs / 'text.txt'} --eval-windows 5 --eval-length 24 --device cpu".split()
    table = {row["method"]: row["perplexity"] for row in report(run)["table"]}
    assert main.main(["eval", str(run), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"test perplexity {table['reinforce']:.2f} over 120 tokens"
    assert lines[1] == f"2:4 100.00% of {report(run)['groups']} groups have at most 2 nonzeros"
    assert main.main(["eval", str(inputs / "model"), *options, "--dtype", "float32"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"test perplexity {table['dense']:.2f} over 120 tokens"]


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
        assert torch.equal(tensor, state[name])
        assert torch.equal(tensor.bfloat16(), short.state_dict()[name])


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
    save_file(logits, tmp_path / "run" / "logits.safetensors", metadata=metadata)
    export = ["export", str(tmp_path / "run"), str(tmp_path / "out")]
    told = "that its masks were learned on, got others; put back the base model as it was"
    refuses(capsys, tmp_path, export, f"run: expected the weights of {metadata['model']!r}", told)
    assert main.main([*export, "--dtype", "bfloat16"]) == 0
    del metadata["weights"]
    save_file(logits, tmp_path / "run" / "logits.safetensors", metadata=metadata)
    export = [*export[:-1], str(tmp_path / "other")]
    refuses(capsys, tmp_path, export, "run: expected logits of `maskpro learn`, got a file without ['weights']")


def test_export_packs(run, tmp_path, inputs, capsys):
    assert main.main(["export", str(run), str(tmp_path / "packed"), "--to", "packed"]) == 0
    assert f"packed 2:4 checkpoint of {inputs / 'model'} written to" in capsys.readouterr().out
    learned, packed = map(AutoModelForCausalLM.from_pretrained, (run, tmp_path / "packed"))
    tokens = torch.arange(12).view(1, 12)
    assert torch.equal(packed(tokens).logits, learned(tokens).logits)
    data = ["--data", str(inputs / "text.txt"), "--device", "cpu", "--eval-windows", "5", "--eval-length", "24"]
    assert main.main(["eval", str(tmp_path / "packed"), *data, "--dtype", "float32"]) == 0
    assert f"perplexity {report(run)['table'][-1]['perplexity']:.2f} over" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--pattern", "4:2", "pattern: expected N:M with"),
        ("--pattern", "2:5", "pattern: expected N:M with"),
        ("--pattern", "two", 'pattern: expected "N:M"'),
        ("--steps", "0", "steps: expected at least 1, got 0"),
        ("--batch-size", "0", "batch_size: expected at least 1, got 0"),
        ("--batch-size", "1000", "batch_size: expected 1 to"),
        ("--seq-len", "1", "seq_len: expected at least 2, got 1"),
        ("--seq-len", "100000", "text: expected at least 100000 tokens"),
        ("--calibration-batches", "0", "calibration_batches: expected at least 1, got 0"),
        ("--init-batches", "0", "init_batches: expected at least 1, got 0"),
        ("--eval-every", "0", "eval_every: expected at least 1, got 0"),
        ("--eval-windows", "0", "eval_windows: expected at least 1, got 0"),
        ("--eval-length", "100000", "text: expected at least 100000 tokens"),
        ("--gap", "27", "gap: expected at most 26"),
        ("--gap", "0", "gap: expected a positive number, got 0"),
        ("--gap", "nan", "gap: expected a positive number, got nan"),
        ("--flip-rate", "1", "flip_rate: expected a float in [1.5e-11, 0.8333] for 2:4, got 1.0"),
        ("--lr", "nan", "lr"),
        ("--alpha", "1.5", "alpha"),
        ("--seed", "-1", "seed: expected at least 0, got -1"),
        ("--seed", "9223372036854775808", "seed: expected an int below 2**63"),
        ("--device", "abacus", "device: expected a device of this machine, got 'abacus'"),
        ("--model", "/no/such/folder", "no such folder"),
        ("--data", "EMPTY", "the text is empty"),
        ("--data", "FOLDER", "source: expected a text file, got the folder"),
        ("--other-data", "EMPTY", "other_data: source: expected at least 3 paragraphs"),
        ("--output", "FULL", "output: expected a new or empty folder"),
    ],
)
def test_learn_refuses_bad_input(inputs, tmp_path, capsys, option, value, message):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    places = {"EMPTY": tmp_path / "empty.txt", "FOLDER": tmp_path, "FULL": tmp_path / "full"}
    refuses(capsys, tmp_path, learn(inputs, tmp_path / "output", option, str(places.get(value, value))), message)


def test_learn_refuses_a_model_without_linears(inputs, tmp_path, capsys, monkeypatch):
    class Unigram(torch.nn.Embedding):
        def forward(self, input_ids, use_cache=False):
            return type("Output", (), {"logits": super().forward(input_ids)})

    monkeypatch.setattr("maskpro_kernels.hf.load_model", lambda name, dtype: (Unigram(40, 40), tiny_tokenizer()))
    refuses(capsys, tmp_path, learn(inputs, tmp_path / "output"), "Linear")


def test_learn_refuses_non_finite_weights(inputs, tmp_path, capsys, monkeypatch):
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    monkeypatch.setattr("maskpro_kernels.hf.load_model", lambda name, dtype: (model, tiny_tokenizer()))
    refuses(capsys, tmp_path, learn(inputs, tmp_path / "output"), "model.layers.1.mlp.up_proj")


def test_learn_refuses_to_run_without_matplotlib(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    refuses(capsys, tmp_path, learn(inputs, tmp_path / "output"), "pip install 'maskpro-kernels[cli]'")


def test_reinforce_has_no_bound_of_a_step(inputs, tmp_path, capsys):
    arguments = learn(inputs, tmp_path / "output", "--max-update", "1")
    refuses(capsys, tmp_path, arguments, "max_update: expected none, for it is of straight-through alone")


def test_straight_through_has_no_alpha(inputs, tmp_path, capsys):
    arguments = learn(inputs, tmp_path / "output", "--estimator", "straight-through", "--alpha", "0.5")
    refuses(capsys, tmp_path, arguments, "alpha: expected none, for it is of reinforce alone")


def test_gap_excludes_flip_rate(inputs, tmp_path, capsys):
    with pytest.raises(SystemExit) as refusal:
        main.main(learn(inputs, tmp_path / "output", "--gap", "5", "--flip-rate", "0.1"))
    assert refusal.value.code == 2
    assert "not allowed with" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--eval-windows", "0"), "eval_windows: expected at least 1"),
        (("--data", "EMPTY"), "the text is empty"),
        (("--device", "abacus"), "device: expected"),
    ],
)
def test_eval_refuses_bad_input(inputs, tmp_path, capsys, change, message):
    (tmp_path / "empty.txt").touch()
    change = [str(tmp_path / "empty.txt") if part == "EMPTY" else part for part in change]
    arguments = ["eval", str(inputs / "model"), "--data", str(inputs / "text.txt"), *change]
    refuses(capsys, tmp_path, arguments, message)


def test_eval_refuses_a_missing_model(inputs, tmp_path, capsys):
    arguments = ["eval", str(tmp_path / "missing"), "--data", str(inputs / "text.txt")]
    refuses(capsys, tmp_path, arguments, "no such folder")


def test_eval_refuses_a_folder_without_a_model(inputs, run, tmp_path, capsys):
    arguments = ["eval", str(inputs / "runs"), "--data", str(inputs / "text.txt")]
    refuses(capsys, tmp_path, arguments, "model: expected a folder with a config.json")


def test_compare_puts_runs_into_one_table(inputs, run, tmp_path, capsys):
    other = tmp_path / "other"
    options = "--init magnitude --estimator straight-through --eval-every 1".split()
    assert main.main(learn(inputs, other, *options)) == 0
    capsys.readouterr()
    picture = tmp_path / "perplexity.png"
    assert main.main(["compare", str(run), str(other), "--picture", str(picture)]) == 0
    lines = [line.rsplit(maxsplit=2) for line in capsys.readouterr().out.splitlines()[1:]]
    names = ["dense", "magnitude", "wanda", f"reinforce: {run}", f"straight-through: {other}"]
    assert [name for name, *_ in lines] == names
    assert [perplexity for _, perplexity, _ in lines[3:]] == [
        f"{report(folder)['table'][-1]['perplexity']:.2f}" for folder in (run, other)
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")
    refuses(capsys, tmp_path, ["compare", str(run), "--picture", str(picture)], "picture: expected a new file")
    refuses(capsys, tmp_path, ["compare", str(run), str(inputs)], "run: expected a folder written by `maskpro learn`")
    changed = report(other) | {"eval_tokens": 7}
    (other / "report.json").write_text(json.dumps(changed))
    refuses(capsys, tmp_path, ["compare", str(run), str(other)], "expected the same eval_tokens in all, got 120 and 7")


def test_export_refuses_what_is_no_run(inputs, run, tmp_path, capsys):
    output = str(tmp_path / "output")
    refuses(capsys, tmp_path, ["export", str(inputs / "model"), output], "logits.safetensors")
    refuses(capsys, tmp_path, ["export", str(run), str(run)], "output: expected a new or empty folder")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "logits.safetensors").write_text("nothing")
    refuses(capsys, tmp_path, ["export", str(broken), output], "path: expected a safetensors file")
    save_file({"linear": torch.zeros(2, 4)}, broken / "logits.safetensors", metadata={"model": "x"})
    refuses(capsys, tmp_path, ["export", str(broken), output], "run: expected logits of `maskpro learn`")


def test_eval_refuses_a_broken_report(inputs, run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "broken")
    (tmp_path / "broken" / "report.json").write_text('{"model": "x"}')
    arguments = ["eval", str(tmp_path / "broken"), "--data", str(inputs / "text.txt")]
    refuses(capsys, tmp_path, arguments, "run: expected a report of `maskpro learn`")


@pytest.mark.parametrize(
    "error",
    [
        FloatingPointError("loss of step 2: expected a finite number"),
        torch.OutOfMemoryError("CUDA out of memory"),
        KeyboardInterrupt(),
    ],
)
def test_a_run_that_stops_early_keeps_what_it_learned(inputs, tmp_path, capsys, monkeypatch, error):
    step = MaskTrainer.step

    def failing(trainer):
        if trainer.steps_done == 2:
            raise error
        return step(trainer)

    monkeypatch.setattr(MaskTrainer, "step", failing)
    code, line = (
        (130, "maskpro: interrupted") if isinstance(error, KeyboardInterrupt) else (2, f"maskpro: error: {error}")
    )
    assert main.main(learn(inputs, tmp_path / "run")) == code
    told = capsys.readouterr().err
    assert "stopped after 2 steps; the logits are in" in told and line in told
    assert main.main(["export", str(tmp_path / "run"), str(tmp_path / "checkpoint")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    assert (nonzeros(model, "model.layers.1.mlp.down_proj") <= 2).all()


def test_a_run_that_is_interrupted_in_an_update_saves_no_half_of_it(inputs, run, tmp_path, capsys, monkeypatch):
    """Logits of a part of the layers have moved: those of the step are rebuilt from the journal."""
    update, updates = MaskedLinear.moving_logits, []

    def interrupted(layer):
        updates.append(layer)
        # the fifth layer of the third step
        if len(updates) == 2 * 14 + 5:
            raise KeyboardInterrupt
        return update(layer)

    with monkeypatch.context() as patched:
        patched.setattr(MaskedLinear, "moving_logits", interrupted)
        assert main.main(learn(inputs, tmp_path / "run")) == 130
    told = "stopped after 2 steps; the next one was broken off in its update, and the logits are rebuilt where the run"
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run" / "logits.safetensors").exists()
    assert main.main(["learn", "--resume", str(tmp_path / "run")]) == 0
    assert report(tmp_path / "run")["logits"] == report(run)["logits"]


STRAIGHT_THROUGH = ("--estimator", "straight-through", "--lr", "1")


def test_a_straight_through_run_that_is_interrupted_in_an_update_saves_no_half_of_it(
    inputs, tmp_path, capsys, monkeypatch
):
    step, update = MaskTrainer.step, MaskedLinear.moving_logits

    def interrupted(layer):
        if layer.layer == 5:
            raise KeyboardInterrupt
        return update(layer)

    def failing(trainer):
        if trainer.steps_done == 2:
            patched.setattr(MaskedLinear, "moving_logits", interrupted)
        return step(trainer)

    with monkeypatch.context() as patched:
        patched.setattr(MaskTrainer, "step", failing)
        assert main.main(learn(inputs, tmp_path / "run", *STRAIGHT_THROUGH)) == 130
    told = "stopped after 2 steps; the next one was broken off in its update, and the logits of the last snapshot are"
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run" / "logits.safetensors").exists()
    assert main.main(["learn", "--resume", str(tmp_path / "run")]) == 0


def test_a_straight_through_run_bears_a_loss_that_is_not_finite(inputs, tmp_path, monkeypatch):
    finite, calls = learning_run.causal_lm_loss, []

    def loss_fn(model, batch):
        calls.append(torch.is_grad_enabled())
        return finite(model, batch) * (math.nan if sum(calls) == 2 else 1.0)

    monkeypatch.setattr(learning_run, "causal_lm_loss", loss_fn)
    assert main.main(learn(inputs, tmp_path / "run", *STRAIGHT_THROUGH)) == 0
    losses = [row["loss"] for row in report(tmp_path / "run")["steps"]]
    assert [math.isfinite(loss) for loss in losses] == [step != 1 for step in range(len(losses))] and len(losses) > 2


def on_a_full_disk(function):
    def limited(*args):
        with files_of_at_most(4096):
            return function(*args)

    return limited


def test_a_full_disk_hides_neither_what_ended_a_run_nor_how_to_go_on(inputs, run, tmp_path, capsys, monkeypatch):
    step, output = MaskTrainer.step, tmp_path / "run"

    def failing(trainer):
        if trainer.steps_done == 2:
            raise FloatingPointError("loss of step 2: expected a finite number")
        return step(trainer)

    with monkeypatch.context() as patched:
        patched.setattr(MaskTrainer, "step", failing)
        patched.setattr(run_end, "save_logits", on_a_full_disk(run_end.save_logits))
        assert main.main(learn(inputs, output)) == 2
    *_, told, error = capsys.readouterr().err.splitlines()
    assert told.startswith("stopped after 2 steps; the logits could not be saved: ") and "File too large" in told
    assert told.endswith(f"; go on with: maskpro learn --resume {output}")
    assert error == "maskpro: error: loss of step 2: expected a finite number"
    assert main.main(["learn", "--resume", str(output)]) == 0
    assert report(output)["logits"] == report(run)["logits"]


@pytest.mark.parametrize("failing", ["save_logits", "save", "draw_perplexity", "write_html"])
def test_a_disk_that_is_full_at_the_end_of_a_run(inputs, run, tmp_path, capsys, monkeypatch, failing):
    output = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(run_end, failing, on_a_full_disk(getattr(run_end, failing)))
        assert main.main(learn(inputs, output)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("maskpro: error: output: ") and "File too large" in error
    assert error.endswith(f"; go on with: maskpro learn --resume {output}")
    assert not (output / "report.json").exists()
    assert main.main(["learn", "--resume", str(output)]) == 0
    assert report(output)["logits"] == report(run)["logits"]
    learned, resumed = (load_file(folder / "model.safetensors") for folder in (run, output))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in learned.items())


def test_versions_are_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(["--version"])
    lines = capsys.readouterr().out.splitlines()
    assert not ended.value.code and f"torch {torch.__version__}" in lines and lines[0].startswith("python 3.")


def test_all_that_a_run_leaves_is_on_disk_before_its_report(inputs, tmp_path, monkeypatch):
    sync, replace, done = os.fsync, os.replace, []

    def synced(descriptor):
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def replaced(source, target):
        replace(source, target)
        done.append(("replaced", Path(target)))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    output = tmp_path / "deep" / "run"
    assert main.main(learn(inputs, output)) == 0
    before = done[: done.index(("replaced", output / "report.json"))]
    files = {path for path in output.iterdir() if path.is_file()} - {output / "report.json"}
    assert files <= set(before)
    # their names too, and those of the folders
    assert max(map(before.index, files)) < len(before) - 1 - before[::-1].index(output)
    assert {tmp_path, tmp_path / "deep"} <= set(before)


# Writes lines until a signal comes
TALKATIVE = """
import sys
from maskpro_kernels.cli.signals import Signals
with Signals() as signals:
    print("ready", flush=True)
    while not signals.came:
        print("x" * 200, file=sys.stderr)
print("ended")
"""


def test_a_signal_in_the_midst_of_a_write_to_a_slow_pipe(monkeypatch):
    # without its buffer there would be nothing to break
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    reading, writing = os.pipe()
    with subprocess.Popen([sys.executable, "-c", TALKATIVE], stdout=subprocess.PIPE, stderr=writing) as child:
        os.close(writing)
        assert child.stdout.readline() == b"ready\n"
        before = filled = 0
        while not 0 < filled == before:
            time.sleep(0.2)
            before, filled = filled, struct.unpack("i", ioctl(reading, termios.FIONREAD, bytes(4)))[0]
        child.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        with open(reading, "rb") as pipe:
            told = pipe.read()
        assert child.stdout.read() == b"ended\n", told[-1000:]
    assert child.returncode == 0 and b"SIGTERM: the run stops after this step\n" in told


def test_an_interrupt_before_the_first_step_is_told_in_a_line(inputs, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(learning, "initial_masks", interrupted)
    before = contents(tmp_path)
    assert main.main(learn(inputs, tmp_path / "out")) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "maskpro: interrupted"
    assert contents(tmp_path) == before


def test_a_reader_that_has_gone_ends_a_command_without_a_word(inputs):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "maskpro_kernels", "validate", str(inputs / "model")]
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert ended.returncode == 141 and ended.stderr == b""
    # and where there is none from the start
    command = f"{shlex.join(command)} >&-"
    assert subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE).returncode == 0


def test_a_pipe_that_breaks_elsewhere_is_an_error(inputs, tmp_path, capsys, monkeypatch):
    def broken(*_):
        raise BrokenPipeError("download")

    monkeypatch.setattr(learning, "read_inputs", broken)
    assert main.main(learn(inputs, tmp_path / "out")) == 2
    assert "download" in capsys.readouterr().err


WAYS = {
    "reinforce": [],
    "several draws": ["--draws", "2"],
    "straight-through": ["--estimator", "straight-through", "--lr", "1"],
}


def learned_logits(folder):
    logits, _ = load_logits(folder / "logits.safetensors")
    return logits


def broken_off(inputs, folder, monkeypatch, step, options, break_off):
    """A run of 6 steps that is broken off before a step."""
    take = MaskTrainer.step

    def broken(trainer):
        if trainer.steps_done == step:
            break_off()
        return take(trainer)

    # a job in the background is started with SIGINT ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(MaskTrainer, "step", broken)
            return main.main(learn(inputs, folder, *options))
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_the_run_goes_on(inputs, tmp_path, capsys, monkeypatch, number, how):
    options = [*WAYS[how], "--steps", "6", "--eval-every", "2"]
    assert main.main(learn(inputs, tmp_path / "whole", *options)) == 0
    capsys.readouterr()
    run = tmp_path / "run"
    assert broken_off(inputs, run, monkeypatch, 3, options, lambda: os.kill(os.getpid(), number)) == 0
    assert f"stopped after 4 steps; go on with: maskpro learn --resume {run}" in capsys.readouterr().err
    assert not (run / "report.json").exists()
    assert main.main(["learn", "--resume", str(run), "--device", "cpu"]) == 0
    assert "4 steps were taken before" in capsys.readouterr().err
    whole, resumed = report(tmp_path / "whole"), report(run)
    for name in ("validation", "flipped_groups", "settings", "gap", "converted"):
        different = {"output"} if name == "settings" else set()
        one, other = ({k: v for k, v in x.items() if k not in different} if isinstance(x, dict) else x
                      for x in (whole[name], resumed[name]))  # fmt: skip
        assert one == other, name
    assert [row["loss"] for row in whole["steps"]] == [row["loss"] for row in resumed["steps"]]
    expected = learned_logits(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in learned_logits(run).items())
    assert [row["perplexity"] for row in whole["table"]] == [row["perplexity"] for row in resumed["table"]]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("step", [0, 2, 5])
def test_a_run_that_was_killed_goes_on(inputs, tmp_path, monkeypatch, how, step):
    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    options = [*WAYS[how], "--steps", "6", "--eval-every", "3"]
    assert main.main(learn(inputs, tmp_path / "whole", *options)) == 0
    with pytest.raises(Killed):
        broken_off(inputs, tmp_path / "run", monkeypatch, step, options, kill)
    assert main.main(["learn", "--resume", str(tmp_path / "run")]) == 0
    expected = learned_logits(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in learned_logits(tmp_path / "run").items())
    assert report(tmp_path / "run")["validation"] == report(tmp_path / "whole")["validation"]


def test_replay_rebuilds_the_logits(run, inputs, tmp_path, capsys):
    file = tmp_path / "logits.safetensors"
    assert main.main(["replay", str(run), "--output", str(file), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    replayed, learned = load_file(file), learned_logits(run)
    assert replayed.keys() == learned.keys()
    assert all(torch.equal(tensor, replayed[name]) for name, tensor in learned.items())
    assert out == f"3 steps of 3, logits {digest(learned[name] for name in sorted(learned))}\n"
    assert report(run)["logits"] in out
    assert main.main(["replay", str(run), "--steps", "0", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("0 steps of 3, logits ")


def test_a_damaged_first_snapshot_does_not_keep_a_run_from_its_end(inputs, tmp_path, capsys, monkeypatch):
    options = ["--steps", "6", "--eval-every", "3"]
    assert main.main(learn(inputs, tmp_path / "whole", *options)) == 0
    run = tmp_path / "run"
    assert broken_off(inputs, run, monkeypatch, 3, options, lambda: os.kill(os.getpid(), signal.SIGTERM)) == 0
    first = sorted(run.glob("progress/snapshot-*"))[0]
    first.write_bytes(first.read_bytes()[:-1])
    assert main.main(["learn", "--resume", str(run)]) == 0
    assert "how many groups differ from the initial mask is not known" in capsys.readouterr().err
    expected = learned_logits(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in learned_logits(run).items())
    assert (
        report(run)["flipped_groups_by_layer"] == {} and report(run)["logits"] == report(tmp_path / "whole")["logits"]
    )


def test_a_run_without_its_progress_is_not_begun_anew(inputs, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    assert broken_off(inputs, run, monkeypatch, 1, [], lambda: os.kill(os.getpid(), signal.SIGTERM)) == 0
    shutil.rmtree(run / "progress")
    capsys.readouterr()
    assert main.main(["learn", "--resume", str(run)]) == 2
    assert "output_dir: expected a folder with a journal" in capsys.readouterr().err


def test_what_cannot_be_resumed_or_replayed(run, inputs, tmp_path, capsys):
    refuses(capsys, tmp_path, ["learn", "--resume", str(tmp_path)], "resume: expected a folder in which")
    refuses(capsys, tmp_path, ["learn", "--resume", str(run)], "resume: expected a run that has not ended")
    refuses(
        capsys,
        tmp_path,
        ["learn", "--resume", str(run), "--steps", "9"],
        "but --device, --parallel and --quiet, got --steps",
    )
    refuses(capsys, tmp_path, ["learn", "--data", "pydoc"], "model: expected --model, or --resume alone, got none")
    refuses(
        capsys, tmp_path, ["replay", str(tmp_path)], "run: expected a folder of `maskpro learn --estimator reinforce`"
    )
    refuses(
        capsys, tmp_path, ["replay", str(run), "--steps", "4"], "steps: expected 0 to 3, those of the journal, got 4"
    )
    refuses(capsys, tmp_path, ["replay", str(run), "--output", str(run)], "output: expected a new file")
    shutil.copytree(run, tmp_path / "copy")
    journal = tmp_path / "copy" / "progress" / "journal"
    content = journal.read_bytes()
    journal.write_bytes(content[:-60] + b"?" + content[-59:])
    refuses(capsys, tmp_path, ["replay", str(tmp_path / "copy")], "journal: expected a whole record of step 1 at byte")
    journal.write_bytes(content[:-1])
    assert main.main(["replay", str(tmp_path / "copy")]) == 0
    captured = capsys.readouterr()
    assert "the last record is cut short by a crash: 46 bytes are left out" in captured.err
    assert captured.out.startswith("2 steps of 2")
    nowhere = str(tmp_path / "none" / "file")
    refuses(capsys, tmp_path, ["replay", str(run), "--output", nowhere], "output: expected a new file in a folder that")
    both = learn(inputs, tmp_path / "new", "--draws", "2", "--alpha", "0.5")
    refuses(capsys, tmp_path, both, "alpha: expected none beside several draws")
    (snapshot,) = journal.parent.glob("snapshot-*")
    snapshot.write_bytes(snapshot.read_bytes()[:-1])
    refuses(capsys, tmp_path, ["replay", str(tmp_path / "copy")], "snapshot: expected a sound one")


@pytest.mark.parametrize(
    "command", [[], ["learn"], ["eval"], ["compare"], ["export"], ["import"], ["validate"], ["replay"]]
)
def test_help(capsys, command):
    with pytest.raises(SystemExit) as end:
        main.main([*command, "--help"])
    assert end.value.code == 0
    assert "usage: maskpro" in capsys.readouterr().out
