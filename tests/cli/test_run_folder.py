"""The folder of a run: of one process, with files that no loader reads as those of the model, and with digests."""

from __future__ import annotations

import json
import math
import re
import shutil

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.command import contents, interrupted, learn, refuses, report
from helpers.tiny_llama import tiny_model
from safetensors.torch import load_file, safe_open, save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader, load
from transformers import AutoModelForCausalLM

from maskpro_kernels.cli import main
from maskpro_kernels.cli.learn import data, evaluation, result, start
from maskpro_kernels.learn.trainer import MaskTrainer

pytestmark = pytest.mark.usefixtures("eager_reference")

TRAINED = "--estimator straight-through --gap 2 --refit weights --train-weights 1e-3".split()
TAUGHT = [*TRAINED, "--loss", "kl"]
DENSE = ["--gap", "2", "--density", "0.6"]


class Killed(BaseException):
    pass


def kill():
    raise Killed


def killed_run(inputs, folder, monkeypatch, options, step=2):
    """A run that was killed before a step."""
    with pytest.raises(Killed):
        interrupted(inputs, folder, monkeypatch, step, ["--steps", "4", "--eval-every", "1", *options], kill)
    return folder


def test_another_process_is_refused_at_once_from_the_first_write_to_the_last(inputs, tmp_path, monkeypatch, capsys):
    """Before it loads anything, and the first one ends as it would alone."""
    output = tmp_path / "run"
    moments = {"perplexity": evaluation, "step": MaskTrainer, "finalize": result}
    seen = set()

    def refused() -> None:
        with monkeypatch.context() as patched:
            patched.setattr(data, "load", None)
            refusal = f"expected a folder that no other process learns in, got {str(output)!r}"
            files = contents(output)
            second = learn(inputs, output, "--steps", "7", "--seed", "5")
            for arguments, argument in ((second, "output"), (["learn", "--resume", str(output)], "resume")):
                capsys.readouterr()
                assert main.main(arguments) == 2
                assert capsys.readouterr().err.splitlines() == [f"maskpro: error: {argument}: {refusal}"]
            assert contents(output) == files

    def with_another(name, function):
        def beside(*arguments, **options):
            if name not in seen:
                seen.add(name)
                refused()
            return function(*arguments, **options)

        return beside

    for name, owner in moments.items():
        monkeypatch.setattr(owner, name, with_another(name, getattr(owner, name)))
    assert main.main(learn(inputs, output)) == 0
    assert seen == moments.keys()
    assert report(output)["settings"]["seed"] == 0 and len(report(output)["steps"]) == 3
    assert json.loads((output / "settings.json").read_text())["options"]["seed"] == 0


def test_a_run_that_ends_while_another_loads_its_model_is_kept(inputs, tmp_path, monkeypatch, capsys):
    load_model = data.load

    def slow_load(*given):
        with monkeypatch.context() as patched:
            patched.setattr(data, "load", load_model)
            assert main.main(learn(inputs, tmp_path / "run")) == 0
        return load_model(*given)

    monkeypatch.setattr(data, "load", slow_load)
    assert main.main(learn(inputs, tmp_path / "run", "--seed", "5")) == 2
    assert "output: expected a new or empty folder, got" in capsys.readouterr().err.splitlines()[-1]
    assert report(tmp_path / "run")["settings"]["seed"] == 0
    assert main.main(["export", str(tmp_path / "run"), str(tmp_path / "dense")]) == 0


def test_no_loader_takes_the_weights_of_a_run_for_those_of_its_model(inputs, tmp_path, monkeypatch):
    """Neither one of every safetensors file, nor one of every tensor by name."""
    output = tmp_path / "run"
    assert main.main(learn(inputs, output, *TAUGHT)) == 0
    stopped = killed_run(inputs, tmp_path / "stopped", monkeypatch, TAUGHT)
    assert [path.name for path in output.glob("*.safetensors")] == ["model.safetensors"]
    assert not list(stopped.glob("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(output)
    # names of the model's tensors, also of those that it shares
    names = {*model.state_dict(), *load_file(output / "model.safetensors")}
    others = [path for folder in (output, stopped) for path in folder.rglob("*.safetensors")]
    others.remove(output / "model.safetensors")
    assert len(others) > 4
    for path in others:
        with safe_open(path, framework="pt") as file:
            assert not names & set(file.keys()), path
    expected = load_file(output / "model.safetensors")
    loaded = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
    load(loaded, storage_reader=HuggingFaceStorageReader(str(output)))
    assert_same_bits(loaded, expected)
    assert_same_bits({name: model.state_dict()[name] for name in expected}, expected)


# Embeddings, norms and a masked layer
CHANGED = (
    "model.embed_tokens.weight",
    "model.layers.1.input_layernorm.weight",
    "model.norm.weight",
    "model.layers.0.mlp.up_proj.weight",
)


def test_another_base_is_neither_exported_nor_learned_further(inputs, tmp_path, monkeypatch, capsys):
    base = tmp_path / "model"
    shutil.copytree(inputs / "model", base)
    runs = {"ended": tmp_path / "ended", "killed": tmp_path / "killed"}
    arguments = ["--model", str(base), *DENSE]
    assert main.main(learn(inputs, runs["ended"], *arguments)) == 0
    killed_run(inputs, runs["killed"], monkeypatch, arguments)
    skipped = report(runs["ended"])["skipped"]
    left_dense = next(name for name, reason in skipped.items() if reason == start.COSTLY)
    refusal = f"got other weights in {str(base)!r}"
    for name in (*CHANGED, f"{left_dense}.weight"):
        model = tiny_model()
        with torch.no_grad():
            model.get_parameter(name).mul_(1.5)
        model.save_pretrained(base)
        refuses(capsys, tmp_path, ["export", str(runs["ended"]), str(tmp_path / "out")], refusal)
        refuses(
            capsys, tmp_path, ["learn", "--resume", str(runs["killed"])], "resume: expected the base model", refusal
        )
    for to in ("packed", "mask"):
        refuses(capsys, tmp_path, ["export", str(runs["ended"]), str(tmp_path / "out"), "--to", to], refusal)
    shutil.copytree(inputs / "model", base, dirs_exist_ok=True)
    assert main.main(["export", str(runs["ended"]), str(tmp_path / "out")]) == 0
    assert main.main(["learn", "--resume", str(runs["killed"])]) == 0


def damages(path):
    """Contents of a file with one of three bits flipped, and of a half of it or nothing."""
    whole = path.read_bytes()
    for number in range(3):
        at = (2 * number + 1) * len(whole) // 6
        yield whole[:at] + bytes([whole[at] ^ 1 << number]) + whole[at + 1 :]
    yield whole[: len(whole) // 2]
    yield b""


def test_damage_that_would_decide_a_run_is_refused_by_name(inputs, tmp_path, monkeypatch, capsys):
    output = killed_run(inputs, tmp_path / "run", monkeypatch, TAUGHT)
    whole = tmp_path / "whole"
    shutil.copytree(output, whole)
    assert main.main(["learn", "--resume", str(whole)]) == 0
    resume = ["learn", "--resume", str(output)]

    def refused() -> str:
        capsys.readouterr()
        assert main.main(resume) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("maskpro: error: ")
        return line

    for name in ("start.json", "validation.json", "teacher/teacher.json", "teacher/*.safetensors"):
        path = sorted((output / "progress").glob(name))[0]
        content = path.read_bytes()
        for damaged in damages(path):
            path.write_bytes(damaged)
            assert path.name in refused()
        # that the others are missing cannot be known before the step that needs them
        if name in ("validation.json", "teacher/teacher.json"):
            path.unlink()
            refused()
        path.write_bytes(content)
    assert main.main(resume) == 0
    for key in ("validation", "logits"):
        assert report(output)[key] == report(whole)[key]
    found, expected = ([row["perplexity"] for row in report(run)["table"]] for run in (output, whole))
    assert found == expected


def test_a_run_that_has_lost_its_report_is_exported_but_only_with_its_logits(inputs, tmp_path, capsys):
    """Straight-through has no journal, and at its end no snapshot: all commands give the same advice."""
    output = tmp_path / "run"
    assert main.main(learn(inputs, output, *TRAINED)) == 0
    (output / "report.json").unlink()
    advice = f"its run has ended, but report.json is missing: .*maskpro export {output} FOLDER"
    for words in (["eval", str(output)], ["speed", str(output)], ["learn", "--resume", str(output)]):
        refuses(capsys, tmp_path, words)
        assert main.main(words) == 2
        assert re.search(advice, capsys.readouterr().err)
    refuses(capsys, tmp_path, learn(inputs, output), "its run has ended, but report.json is missing: ")
    assert main.main(["export", str(output), str(tmp_path / "again")]) == 0
    assert f"maskpro: warning: '{output}' has no report.json" in capsys.readouterr().err
    expected = load_file(output / "model.safetensors")
    assert_same_bits(load_file(tmp_path / "again" / "model.safetensors"), expected)
    path = output / "learned/logits.safetensors"
    content = path.read_bytes()
    refusal = "run: expected a file of logits, got "
    for damaged in damages(path):
        path.write_bytes(damaged)
        refuses(capsys, tmp_path, ["export", str(output), str(tmp_path / "new")], refusal)
    path.write_bytes(content)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    del metadata["maskpro-digest"]
    save_file(load_file(path), path, metadata)
    refusal = "run: expected report.json in "
    refuses(capsys, tmp_path, ["export", str(output), str(tmp_path / "new")], refusal, "the digest of the logits")


def test_a_run_with_a_journal_that_has_lost_its_report_writes_it_again(inputs, run, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(run, output)
    (output / "report.json").unlink()
    refuses(capsys, tmp_path, ["eval", str(output)], f"continue with: maskpro learn --resume {output}")
    assert main.main(["learn", "--resume", str(output)]) == 0
    for key in ("logits", "flipped_groups", "converted"):
        assert report(output)[key] == report(run)[key]


@pytest.mark.parametrize("damaged", [b"", b"{", b"\xff", b"[]", b"{}"])
def test_damaged_settings_of_a_run_that_has_ended_are_reported(run, tmp_path, capsys, damaged):
    """They decide only exports in int4."""
    output = tmp_path / "run"
    shutil.copytree(run, output)
    (output / "settings.json").write_bytes(damaged)
    warning = "maskpro: warning: run: expected "
    for words in (["export", str(output), str(tmp_path / "dense")], ["eval", str(output), "--device", "cpu"]):
        assert main.main(words) == 0
        (line,) = (line for line in capsys.readouterr().err.splitlines() if "warning" in line)
        assert line.startswith(warning) and str(output / "settings.json") in line
        assert line.endswith("only `--resume` and an export in int4 need it")
    words = ["export", str(output), str(tmp_path / "int4"), "--to", "packed", "--values", "int4"]
    assert main.main(words) == 2
    assert f"in '{output / 'settings.json'}'" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "int4").exists()


def test_settings_that_were_changed_since_the_first_step_are_refused_by_name(inputs, tmp_path, monkeypatch, capsys):
    output = killed_run(inputs, tmp_path / "run", monkeypatch, [])
    path = output / "settings.json"
    content = path.read_text()
    resume = ["learn", "--resume", str(output)]
    for old, new, reported in (
        (
            '"init": "wanda"',
            '"init": "random"',
            "resume: expected init 'wanda', with which the run began, got 'random'",
        ),
        ('"eval_every": 1', '"eval_every": 2', "resume: expected eval_every 1, with which the run began, got 2 in"),
        ('"seed": 0', '"seed": 1', "resume: expected seed 0, with which the run began, got 1 in"),
        ('"seed"', '"sEed"', "resume: options: expected names of options of `maskpro learn` in"),
        ('"seed": 0', '"seed": "x"', "argument --seed: invalid int value: 'x'"),
    ):
        assert old in content
        path.write_text(content.replace(old, new))
        refuses(capsys, tmp_path, resume, reported)
    path.write_text(content)
    assert main.main(resume) == 0


@pytest.mark.parametrize("way", ["reinforce", "straight-through"])
def test_lost_or_damaged_metrics_are_reported_as_unknown(inputs, tmp_path, monkeypatch, capsys, way):
    options = ["--gap", "2"] if way == "reinforce" else [*TRAINED]
    output = killed_run(inputs, tmp_path / "run", monkeypatch, options, step=3)
    if way == "straight-through":
        # a stop writes a snapshot, a kill does not
        assert interrupted(inputs, tmp_path / "other", monkeypatch, 3, ["--steps", "4", *options], interrupt) == 130
        output = tmp_path / "other"
    path = output / "progress" / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    flipped = (lines[1].replace(b"loss", b"lose"), lines[1].replace(b'"tokens": 6', b'"tokens": 7'))
    for number, damaged in enumerate((b"", *flipped) if way == "reinforce" else (b"",)):
        copy = tmp_path / str(number)
        shutil.copytree(output, copy)
        (copy / "progress" / "metrics.jsonl").write_bytes(b"".join([lines[0], damaged, *lines[2:]]))
        capsys.readouterr()
        assert main.main(["learn", "--resume", str(copy)]) == 0
        captured = capsys.readouterr()
        assert "metrics.jsonl has no intact lines of 1 of 3 steps, the first step 1" in captured.err
        steps = report(copy)["steps"]
        assert [row["step"] for row in steps] == [0, 1, 2, 3]
        assert math.isnan(steps[1]["seconds"]) and math.isnan(steps[1]["flip_rate"])
        assert math.isnan(steps[1]["loss"]) == (way == "straight-through")
        assert next(line for line in captured.out.splitlines() if line.startswith(way)).endswith("nan")


def interrupt():
    raise KeyboardInterrupt


def test_a_damaged_first_snapshot_leaves_the_moved_groups_unknown(inputs, tmp_path, monkeypatch, capsys):
    assert interrupted(inputs, tmp_path / "run", monkeypatch, 3, ["--steps", "4", *TRAINED], interrupt) == 130
    first = next((tmp_path / "run" / "progress").glob("snapshot-0000000000-*"))
    first.write_bytes(first.read_bytes()[:-1] + b"x")
    assert main.main(["learn", "--resume", str(tmp_path / "run")]) == 0
    assert "an unknown number of 4,608 groups differ from the initial mask" in capsys.readouterr().out
    assert report(tmp_path / "run")["flipped_groups"] is None
