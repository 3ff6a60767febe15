"""`maskpro learn` and `eval` on datasets: columns, chats, streams, and how runs on them go on."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.cases import slow
from helpers.command import broken_off, learn, refuses, report
from helpers.rows import CHAT_TEMPLATE, chats, texts, write_jsonl
from helpers.tiny_llama import tiny_tokenizer, write_inputs

from maskpro_kernels.checkpoints.logits import load_logits
from maskpro_kernels.cli import main
from maskpro_kernels.learn.trainer import MaskTrainer
from maskpro_kernels.text.data import load_text, windows

pytestmark = pytest.mark.usefixtures("eager_reference", "datasets_cache")

STRAIGHT = "--estimator straight-through --lr 1 --init-batches 2".split()


@pytest.fixture
def folder(tmp_path):
    """A dataset of two files; gives its path."""
    write_jsonl(tmp_path / "data" / "one.jsonl", texts(60))
    write_jsonl(tmp_path / "data" / "two.jsonl", texts(60, seed=1))
    return str(tmp_path / "data")


@pytest.fixture
def taken(monkeypatch):
    """The batches of each step that is taken."""
    seen, take = [], MaskTrainer._next_step

    def taking(trainer):
        step = take(trainer)
        seen.extend(step.batches)
        return step

    monkeypatch.setattr(MaskTrainer, "_next_step", taking)
    return seen


def test_a_column_of_a_dataset_is_learned_from_and_evaluated(inputs, tmp_path, taken, capsys):
    path = str(write_jsonl(tmp_path / "rows.jsonl", [*texts(60, column="body"), *texts(1, column="body")]))
    assert main.main(learn(inputs, tmp_path / "run", "--data", path, "--text-column", "body")) == 0
    told = capsys.readouterr().err
    assert f"1 paragraph repeats another one and is left out of {path!r}" in told
    assert f"validation and test text of {path!r} are documents of its split train that are not learned from" in told
    calibration = windows(load_text(path, "body")["calibration"], tiny_tokenizer(), 16).tolist()
    assert all(row in calibration for batch in taken for row in batch.tolist())
    assert report(tmp_path / "run")["settings"]["text_column"] == "body"
    assert main.main(["eval", str(tmp_path / "run"), "--device", "cpu", "--eval-length", "24"]) == 0
    by_run = capsys.readouterr().out
    options = ["--data", path, "--text-column", "none,body", "--device", "cpu", "--eval-length", "24"]
    assert main.main(["eval", str(tmp_path / "run"), *options]) == 0
    assert capsys.readouterr().out == by_run


@pytest.mark.parametrize("stream", [slow([]), ["--stream"]])
def test_chats_are_learned_from(tmp_path, taken, stream):
    inputs = write_inputs(tmp_path / "inputs")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(inputs / "model")
    path = write_jsonl(tmp_path / "chats.jsonl", chats(60))
    assert main.main(learn(inputs, tmp_path / "run", "--data", str(path), *stream)) == 0
    # the word for a role stands nowhere else as often
    rows = tokenizer(" ".join(tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in chats(60)))
    known = "".join(f" {token}" for token in rows["input_ids"]) + " "
    assert taken and all(f" {' '.join(map(str, row))} " in known for batch in taken for row in batch.tolist())


def test_chats_without_a_template_are_refused(inputs, tmp_path, capsys):
    path = write_jsonl(tmp_path / "chats.jsonl", chats(60))
    for stream in ([], ["--stream"]):
        arguments = learn(inputs, tmp_path / "run", "--data", str(path), *stream)
        cure = "take the tokenizer of a chat model, or a column of texts"
        refuses(capsys, tmp_path, arguments, "data: tokenizer: expected one with a chat template", cure)
        # not that of a text which is too short
        assert main.main(arguments) == 2 and capsys.readouterr().err.endswith(f"{cure}\n")


def test_a_stream_gives_each_step_batches_of_its_own(inputs, tmp_path, folder, taken, capsys):
    assert (
        main.main(
            learn(inputs, tmp_path / "run", *STRAIGHT, "--data", folder, "--stream", "--calibration-batches", "9")
        )
        == 0
    )
    assert len(taken) == 3 and len({tuple(row) for batch in taken for row in batch.tolist()}) == 12
    told = capsys.readouterr().err
    assert f"8 documents of {folder!r} were read for the first 2 batches; 0 of them have fewer than 16 tokens" in told
    settings = report(tmp_path / "run")["settings"]
    assert settings["stream"] is True
    assert (
        main.main(["eval", str(tmp_path / "run"), "--device", "cpu", "--eval-length", "24", "--eval-windows", "5"]) == 0
    )
    # the same windows of the test text
    table = report(tmp_path / "run")["table"]
    assert f"test perplexity {table[-1]['perplexity']:.2f} over 5 windows of 24 tokens" in capsys.readouterr().out


@pytest.mark.slow
def test_calibration_batches_of_a_stream_come_again(inputs, tmp_path, folder, taken):
    assert main.main(learn(inputs, tmp_path / "run", *STRAIGHT, "--data", folder, "--stream", "--steps", "5")) == 0
    assert_same_bits(taken, [taken[index % 2] for index in range(5)])
    assert not torch.equal(taken[0], taken[1])


WAYS = {
    "streamed": [*STRAIGHT, "--calibration-batches", "99"],
    "held": [*STRAIGHT, "--calibration-batches", "2"],
    "reinforce": ["--init-batches", "2"],
    "with samples": [*STRAIGHT, "--calibration-batches", "99", "--accumulate", "2"],
    "with a teacher": [*STRAIGHT, "--calibration-batches", "99", *"--refit weights --loss kl".split()],
}


# what is held before the first step goes on as from a list, of which other tests tell
@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.slow] if way != "streamed" else []) for way in WAYS]
)
def test_a_run_on_a_stream_goes_on_as_if_it_had_not_been_ended(
    inputs, tmp_path, folder, taken, monkeypatch, way, capsys
):
    data = f"{folder}:3,self:1" if way == "with samples" else folder
    options = ["--data", data, "--stream", "--steps", "6", *WAYS[way]]
    assert main.main(learn(inputs, tmp_path / "whole", *options)) == 0
    whole = list(taken)
    taken.clear()

    def interrupt():
        raise KeyboardInterrupt

    assert broken_off(inputs, tmp_path / "run", monkeypatch, 3, options, interrupt) == 130
    capsys.readouterr()
    assert main.main(["learn", "--resume", str(tmp_path / "run"), "--device", "cpu"]) == 0
    again = "; their batches were read again, and passed over" in capsys.readouterr().err
    assert again == (way in ("streamed", "with samples"))
    assert_same_bits(taken, whole)
    assert report(tmp_path / "run")["logits"] == report(tmp_path / "whole")["logits"]


def test_a_dataset_that_has_changed_is_refused(inputs, tmp_path, folder, monkeypatch, capsys):
    options = [*STRAIGHT, "--data", folder, "--stream", "--steps", "6", "--calibration-batches", "99"]

    def interrupt():
        raise KeyboardInterrupt

    assert broken_off(inputs, tmp_path / "run", monkeypatch, 3, options, interrupt) == 130
    write_jsonl(tmp_path / "data" / "one.jsonl", texts(60, seed=7))
    capsys.readouterr()
    assert main.main(["learn", "--resume", str(tmp_path / "run"), "--device", "cpu"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "batches: expected those that the run has taken in its 3 steps" in line
    assert load_logits(tmp_path / "run" / "logits.safetensors")


def test_a_stream_that_cannot_be_read_on_keeps_what_was_learned(inputs, tmp_path, monkeypatch, capsys):
    # more than the library reads at a time
    rows = [json.dumps({"text": f"w{index % 30} w{index // 30} " * 20 + "w" * 100_000}) for index in range(120)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*rows, '{"text": ']) + "\n", encoding="utf-8")
    monkeypatch.setattr("maskpro_kernels.text.stream.BUFFER", 4)
    options = [*STRAIGHT, "--data", str(path), "--stream", "--steps", "60", "--calibration-batches", "99"]
    options += ["--batch-size", "16"]
    assert main.main(learn(inputs, tmp_path / "run", *options)) == 2
    *_, stopped, error = capsys.readouterr().err.splitlines()
    assert "continue with: maskpro learn --resume" in stopped and "the logits are in" in stopped
    assert "maskpro: error: source: expected a dataset that can be read" in error


@pytest.mark.parametrize("stream", [slow([]), ["--stream"]])
def test_the_other_text_may_be_a_dataset(inputs, tmp_path, folder, stream):
    other = write_jsonl(tmp_path / "other.jsonl", texts(60, column="content", seed=5))
    options = ["--data", folder, "--other-data", str(other), "--text-column", "text,content", *stream]
    assert main.main(learn(inputs, tmp_path / "run", *options)) == 0
    assert all("other_perplexity" in row for row in report(tmp_path / "run")["table"])


REFUSED = {
    "no such column": ("--data FOLDER --text-column body", "expected a column 'body' in", "got the columns ['text']"),
    "no column of the other": (
        "--data FOLDER --other-data OTHER",
        "other_data: source: expected a column",
        "['content']",
    ),
    "a column of no dataset": (
        "--text-column body",
        "text_column: expected a dataset among the texts",
        "leave it out",
    ),
    "an empty name": ("--data FOLDER --text-column ,", "text_column: expected names with a comma between them", "','"),
    "a stream of no dataset": ("--stream", "stream: expected a dataset among the texts", "leave it out"),
    "documents that are too short": (
        "--data FOLDER --stream --seq-len 61",
        "61 tokens to learn from",
        "take shorter windows, or do not stream it",
    ),
    "too few windows": ("--data FOLDER --stream --eval-length 9999", "9999 tokens for one window", "--eval-length"),
    "broken rows": ("--data BROKEN", "expected a dataset that can be read", "JSON parse error"),
    "broken rows of a stream": ("--data BROKEN --stream", "expected a dataset that can be read", "JSON parse error"),
    "an empty folder": ("--data EMPTY", "expected a dataset that can be read", "doesn't contain any data files"),
    "no such dataset": ("--data owner/none --stream", "expected a dataset that can be read", "Couldn't reach"),
}


# Options that `learn` alone has
OF_LEARN = ("--other-data", "--seq-len")


@pytest.mark.parametrize(
    ("command", "name"),
    [("learn", name) for name in REFUSED]
    + [("eval", name) for name, (options, *_) in REFUSED.items() if not any(option in options for option in OF_LEARN)],
)
def test_bad_data_is_refused_in_one_line(inputs, tmp_path, folder, capfd, command, name):
    options, *messages = REFUSED[name]
    paths = {"FOLDER": folder, "OTHER": str(write_jsonl(tmp_path / "other.jsonl", texts(20, column="content")))}
    paths |= {"BROKEN": str(tmp_path / "broken.jsonl"), "EMPTY": str(tmp_path / "empty")}
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n', encoding="utf-8")
    (tmp_path / "empty").mkdir()
    given = [paths.get(word, word) for word in options.split()]
    if command == "learn":
        arguments = learn(inputs, tmp_path / "run", *given)
    else:
        data = [] if "--data" in given else ["--data", str(inputs / "text.txt")]
        arguments = ["eval", str(inputs / "model"), "--device", "cpu", "--eval-length", "24", *data, *given]
    refuses(capfd, tmp_path, arguments, *messages)


def test_a_stream_needs_the_library(inputs, tmp_path, folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for command in (learn(inputs, tmp_path / "run"), ["eval", str(inputs / "model")]):
        refuses(
            capsys, tmp_path, [*command, "--data", folder, "--stream"], "stream: expected the package datasets", "pip"
        )
        refuses(capsys, tmp_path, [*command, "--data", folder], "a dataset needs the package datasets", "pip install")


@pytest.mark.slow
def test_texts_that_are_held_are_learned_from_as_without_a_stream_beside_them(inputs, tmp_path, folder):
    for name, options in {"held": [], "other": ["--other-data", folder, "--stream"]}.items():
        assert main.main(learn(inputs, tmp_path / name, *options)) == 0
    assert report(tmp_path / "held")["logits"] == report(tmp_path / "other")["logits"]
    # of which the text of the run is none
    assert main.main(["eval", str(tmp_path / "other"), "--device", "cpu", "--eval-length", "24"]) == 0
