"""`maskpro eval` and `maskpro compare`."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest
from helpers.command import learn, refuses, report
from helpers.damage import edit
from helpers.tiny_llama import tiny_text, tiny_tokenizer, write_inputs
from transformers import GPT2Config, GPT2LMHeadModel

from maskpro_kernels.cli import evaluate, main, replay
from maskpro_kernels.hf import save_model

pytestmark = pytest.mark.usefixtures("eager_reference")


def test_eval_of_a_run_and_of_a_model(inputs, run, capsys):
    options = f"--data {inputs / 'text.txt'} --eval-windows 5 --eval-length 24 --device cpu".split()
    table = {row["method"]: row["perplexity"] for row in report(run)["table"]}
    assert main.main(["eval", str(run), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"test perplexity {table['reinforce']:.2f} over 5 windows of 24 tokens"
    assert lines[2] == f"the dense model there: {table['dense']:.2f}, by the run's table"
    assert lines[3] == f"2:4 100.00% of {report(run)['groups']} groups have at most 2 nonzeros"
    assert main.main(["eval", str(inputs / "model"), *options, "--dtype", "float32"]) == 0
    line, named = capsys.readouterr().out.splitlines()
    assert line == f"test perplexity {table['dense']:.2f} over 5 windows of 24 tokens"
    assert named.startswith("protocol held-out, windows of 24 tokens, float32; tokenizer ")


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


def test_eval_of_a_mask_file_tells_what_makes_a_model_of_it(inputs, run, tmp_path, capsys):
    mask, text = tmp_path / "mine.mask", str(inputs / "text.txt")
    assert main.main(["export", str(run), str(mask), "--to", "mask"]) == 0
    told = f"model: expected a model, got '{mask}', a mask file; put it on its model first, by `maskpro apply {mask} "
    refuses(capsys, tmp_path, ["eval", str(mask), "--data", text], told)
    # any other file lies in a folder of a model, if anywhere
    told = f"model: expected a folder, got the file '{text}'; give the folder that it lies in"
    refuses(capsys, tmp_path, ["eval", text, "--data", text], told)
    weights = inputs / "model" / "model.safetensors"
    refuses(capsys, tmp_path, ["eval", str(weights), "--data", text], "give the folder that it lies in")


def test_eval_refuses_a_folder_without_a_model(inputs, run, tmp_path, capsys):
    arguments = ["eval", str(inputs / "runs"), "--data", str(inputs / "text.txt")]
    refuses(capsys, tmp_path, arguments, "model: expected a folder with a config.json")


@pytest.mark.pictures
def test_compare_puts_runs_into_one_table(inputs, run, tmp_path, capsys):
    other = tmp_path / "other"
    options = "--init magnitude --estimator straight-through --eval-every 1".split()
    assert main.main(learn(inputs, other, *options)) == 0
    capsys.readouterr()
    picture = tmp_path / "perplexity.png"
    assert main.main(["compare", str(run), str(other), "--picture", str(picture)]) == 0
    lines = [line.rsplit(maxsplit=3) for line in capsys.readouterr().out.splitlines()[1:]]
    names = ["dense", "magnitude", "wanda", f"reinforce: {run}", f"straight-through: {other}"]
    assert [name for name, *_ in lines] == names
    assert [perplexity for _, perplexity, *_ in lines[3:]] == [
        f"{report(folder)['table'][-1]['perplexity']:.2f}" for folder in (run, other)
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")
    refuses(capsys, tmp_path, ["compare", str(run), "--picture", str(picture)], "picture: expected a new file")
    refuses(capsys, tmp_path, ["compare", str(run), str(inputs)], "run: expected a folder written by `maskpro learn`")
    edit(other / "report.json", eval_tokens=7)
    refuses(capsys, tmp_path, ["compare", str(run), str(other)], "expected the same eval_tokens in all, got 120 and 7")


def test_eval_refuses_a_broken_report(inputs, run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "broken")
    (tmp_path / "broken" / "report.json").write_text('{"model": "x"}')
    arguments = ["eval", str(tmp_path / "broken"), "--data", str(inputs / "text.txt")]
    refuses(capsys, tmp_path, arguments, "run: expected a report of `maskpro learn`")


def test_windows_longer_than_a_model_has_positions_for_are_refused(inputs, tmp_path, capsys):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    save_model(model, tiny_tokenizer(), tmp_path / "gpt2")
    text = ["--data", str(inputs / "text.txt"), "--device", "cpu", "--dtype", "float32", "--eval-windows", "2"]
    long = [*text, "--eval-length", "17"]
    told = "eval_length: expected at most 16, which the model has positions for, got 17"
    refuses(capsys, tmp_path, ["eval", str(tmp_path / "gpt2"), *long], told)
    assert main.main(["eval", str(tmp_path / "gpt2"), *text, "--eval-length", "16"]) == 0


def test_eval_of_a_run_takes_the_windows_of_its_table(run, tmp_path, capsys):
    output = tmp_path / "found.json"
    assert main.main(["eval", str(run), "--device", "cpu", "--output", str(output)]) == 0
    windows = report(run)["eval_tokens"] // 24
    figure = f"{report(run)['table'][-1]['perplexity']:.2f} over {windows} windows of 24 tokens"
    assert f"test perplexity {figure}\n" in capsys.readouterr().out
    assert json.loads(output.read_bytes())["dense_perplexity"] == report(run)["table"][0]["perplexity"]
    # and given ones go before, each by itself; the table tells nothing of the dense model there
    for other, count in (("--eval-windows 2", 2), ("--dtype bfloat16", windows)):
        assert main.main(["eval", str(run), "--device", "cpu", *other.split()]) == 0
        out = capsys.readouterr().out
        assert f"over {count} windows of 24 tokens\n" in out and "dense model" not in out


def test_a_text_that_has_changed_since_the_run_is_told(inputs, tmp_path, capsys):
    own = write_inputs(tmp_path)
    assert main.main(learn(own, tmp_path / "run")) == 0
    arguments = ["eval", str(tmp_path / "run"), "--device", "cpu"]
    changed = f"maskpro: warning: data: expected the test windows of the run's table, got others of '{own / 'text.txt'}"
    capsys.readouterr()
    assert main.main(arguments) == 0
    assert capsys.readouterr().err == ""
    # behind the test text of five windows
    text = tiny_text()
    (own / "text.txt").write_text(f"{text}\n\nw1 w2 w3", encoding="utf-8")
    assert main.main(arguments) == 0
    assert capsys.readouterr().err == ""
    (own / "text.txt").write_text(f"w1 w2 w3\n\n{text}", encoding="utf-8")
    assert main.main(arguments) == 0
    told = capsys.readouterr()
    assert told.err.startswith(changed) and told.err.count("\n") == 1
    assert f"{report(tmp_path / 'run')['table'][-1]['perplexity']:.2f} over" not in told.out
    # the table has no figure of other windows, or of a text that is named
    for others in ("--eval-windows 2", f"--data {own / 'text.txt'}"):
        assert main.main([*arguments, *others.split()]) == 0
        assert capsys.readouterr().err == ""


def test_windows_beyond_the_context_of_a_model_are_told(inputs, tmp_path, capsys):
    text = f"--data {inputs / 'text.txt'} --device cpu --dtype float32".split()
    told = "expected windows of at most 64 tokens, the model's context (max_position_embeddings), got 65;"
    for options, name in (("--eval-length 6{}", "eval_length"), ("--protocol tokens@6{}", "protocol")):
        for last in (4, 5):
            capsys.readouterr()
            assert main.main(["eval", str(inputs / "model"), *text, *options.format(last).split()]) == 0
            line = capsys.readouterr().err
            assert line.startswith(f"maskpro: warning: {name}: {told}") if last == 5 else line == ""
    assert main.main(learn(inputs, tmp_path / "run", "--eval-length", "65", "--steps", "1")) == 0
    assert f"maskpro: warning: eval_length: {told}" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--eval-windows 5", "--eval-length 24", "--stream", "--text-column text"])
def test_options_of_texts_are_refused_beside_tasks_alone(inputs, capsys, option):
    name = option.split()[0][2:].replace("-", "_")
    arguments = ["eval", str(inputs / "model"), "--tasks", "arc_easy", *option.split()]
    refuses(capsys, inputs, arguments, f"{name}: expected none with --tasks alone, which take no text, got")


@pytest.mark.parametrize("command", ["eval", "compare", "plan", "replay", "export"])
def test_a_folder_that_takes_no_files_is_refused_first(inputs, run, tmp_path, capsys, command):
    arguments = {
        "eval": ["eval", str(tmp_path / "no model"), "--data", str(inputs / "text.txt"), "--output", "/proc/new"],
        "compare": ["compare", str(run), "--picture", "/proc/new"],
        "plan": ["plan", str(inputs / "model"), "--device-memory", "24GB", "--output", "/proc/new"],
        "replay": ["replay", str(run), "--output", "/proc/new"],
        "export": ["export", str(run), "/proc/new", "--to", "mask"],
    }
    name = "picture" if command == "compare" else "output"
    told = f"{name}: expected a new file in a writable folder, got '/proc/new': "
    refuses(capsys, tmp_path, arguments[command], told)


@pytest.mark.parametrize("command", ["eval", "replay"])
def test_what_was_found_is_printed_where_it_cannot_be_written(run, tmp_path, capsys, monkeypatch, command):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(evaluate, "write_whole", full)
    monkeypatch.setattr(replay, "write_logits", full)
    assert main.main([command, str(run), "--device", "cpu", "--output", str(tmp_path / "new")]) == 2
    found = {"eval": f"{report(run)['table'][-1]['perplexity']:.2f} over", "replay": report(run)["logits"]}
    captured = capsys.readouterr()
    assert found[command] in captured.out
    assert captured.err.endswith("maskpro: error: output: [Errno 28] No space left on device\n")
