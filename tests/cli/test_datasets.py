"""`maskpro learn` and `eval` on datasets."""

from __future__ import annotations

import sys

import pytest
from helpers.command import learn, refuses, report
from helpers.rows import texts, write_jsonl
from helpers.tiny_llama import tiny_tokenizer

from maskpro_kernels.cli import main
from maskpro_kernels.learn.trainer import MaskTrainer
from maskpro_kernels.text.batches import windows
from maskpro_kernels.text.sources import load_text

pytestmark = pytest.mark.usefixtures("eager_reference", "datasets_cache")


def test_a_column_of_a_dataset_is_learned_from_and_evaluated(inputs, tmp_path, monkeypatch, capsys):
    taken, take = [], MaskTrainer._next_step

    def taking(trainer):
        step = take(trainer)
        taken.extend(step.batches)
        return step

    monkeypatch.setattr(MaskTrainer, "_next_step", taking)
    path = str(write_jsonl(tmp_path / "rows.jsonl", texts(80, column="body")))
    options = ["--text-column", "body", "--documents", "60", "--other-data", path]
    assert main.main(learn(inputs, tmp_path / "run", "--data", path, *options)) == 0
    calibration = windows(load_text(path, "body", 60)["calibration"], tiny_tokenizer(), 16).tolist()
    assert taken and all(row in calibration for batch in taken for row in batch.tolist())
    assert report(tmp_path / "run")["settings"]["text_column"] == "body"
    assert all("other_perplexity" in row for row in report(tmp_path / "run")["table"])
    capsys.readouterr()
    sizes = ["--device", "cpu", "--eval-length", "24"]
    # the text of the run is that of its documents
    assert main.main(["eval", str(tmp_path / "run"), *sizes]) == 0
    by_run = capsys.readouterr().out
    named = ["--data", path, "--text-column", "body", "--documents", "60"]
    assert main.main(["eval", str(tmp_path / "run"), *named, *sizes]) == 0
    assert capsys.readouterr().out == by_run


@pytest.mark.parametrize("command", ["learn", "eval"])
@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ("--data ROWS --text-column body", ["expected a column 'body' in", "got the columns ['text']"]),
        ("--text-column body", ["text_column: expected a dataset among the texts"]),
        ("--documents 9", ["documents: expected a dataset among the texts"]),
        ("--data ROWS --documents 0", ["documents: expected an int of at least 1, got 0"]),
        ("--data ROWS --eval-length 9999", ["9999 tokens for one window", "--eval-length"]),
        ("--data BROKEN", ["expected a dataset that can be read", "JSON parse error"]),
    ],
)
def test_bad_data_is_refused_in_one_line(inputs, tmp_path, capsys, command, options, messages):
    paths = {"ROWS": str(write_jsonl(tmp_path / "rows.jsonl", texts(60))), "BROKEN": str(tmp_path / "broken.jsonl")}
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n', encoding="utf-8")
    given = [paths.get(word, word) for word in options.split()]
    if command == "learn":
        arguments = learn(inputs, tmp_path / "run", *given)
    else:
        data = [] if "--data" in given else ["--data", str(inputs / "text.txt")]
        arguments = ["eval", str(inputs / "model"), "--device", "cpu", *data, *given]
    assert main.main(arguments) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert all(message in line for message in messages), line


def test_a_dataset_needs_the_library(inputs, tmp_path, capsys, monkeypatch):
    path = str(write_jsonl(tmp_path / "rows.jsonl", texts(60)))
    monkeypatch.setitem(sys.modules, "datasets", None)
    for command in (learn(inputs, tmp_path / "run"), ["eval", str(inputs / "model")]):
        refuses(capsys, tmp_path, [*command, "--data", path], "a dataset needs the package datasets", "pip install")
