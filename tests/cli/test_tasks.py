"""`maskpro eval --tasks`: tasks of lm-eval on models that are dense, masked and packed."""

from __future__ import annotations

import json
import sys

import pytest
from helpers.command import contents, refuses
from helpers.lm_eval_task import DOCUMENTS, NAME, leave_own_tasks_aside, write_models, write_task
from helpers.tiny_llama import tiny_text, tiny_tokenizer

from maskpro_kernels.cli import main
from maskpro_kernels.cli.tasks import task_names

pytestmark = pytest.mark.usefixtures("eager_reference")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder with models, a text and a task."""
    folder = tmp_path_factory.mktemp("tasks")
    write_models(folder)
    write_task(folder / "tasks")
    (folder / "text.txt").write_text(tiny_text(), encoding="utf-8")
    return folder


@pytest.fixture
def own_tasks_alone(datasets_cache, monkeypatch):
    leave_own_tasks_aside(monkeypatch)


def evaluated(place, model: str, *options: str) -> list[str]:
    tasks = ["--tasks", NAME, "--include-path", str(place / "tasks")]
    return ["eval", str(place / model), "--device", "cpu", "--dtype", "float32", *tasks, *options]


@pytest.mark.ecosystem
def test_a_model_says_the_same_dense_masked_and_packed(place, own_tasks_alone, tmp_path, capsys):
    told, found = [], []
    for kind in ("dense", "masked", "packed"):
        assert main.main(evaluated(place, kind, "--output", str(tmp_path / f"{kind}.json"))) == 0
        captured = capsys.readouterr()
        told.append(captured.out.splitlines())
        assert captured.err == ""
        found.append(json.loads((tmp_path / f"{kind}.json").read_text(encoding="utf-8"))["tasks"])
    assert told[0] == told[1] == told[2] and found[0] == found[1] == found[2]
    result = found[0]["results"][NAME]
    assert [line.split() for line in told[0]] == [
        ["task", "metric", "value", "stderr"],
        [NAME, "acc", f"{result['acc,none']:.4f}", f"{result['acc_stderr,none']:.4f}"],
    ]
    assert 0 <= result["acc,none"] <= 1 and found[0]["n-samples"][NAME]["effective"] == DOCUMENTS


@pytest.mark.ecosystem
def test_the_limit_and_a_text_beside_the_tasks(place, own_tasks_alone, tmp_path, capsys):
    more = f"--limit 5 --batch-size 2 --data {place / 'text.txt'} --eval-length 24".split()
    assert main.main(evaluated(place, "packed", *more, "--output", str(tmp_path / "out.json"))) == 0
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert found["tasks"]["n-samples"][NAME]["effective"] == found["tasks"]["limit"] == 5
    line, _, *table = capsys.readouterr().out.splitlines()
    windows = f"{found['tokens'] // 24} windows of 24 tokens"
    assert line == f"test perplexity {found['perplexity']:.2f} over {windows}" and len(table) == 2


@pytest.mark.ecosystem
@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["--tasks", "whch_word"], ["tasks: expected one that lm-eval knows, got 'whch_word', such as which_word"]),
        (["--tasks", "xyz"], ["got 'xyz'", "`lm-eval ls tasks` lists them"]),
        (["--tasks", f"{NAME},"], ["tasks: expected names of tasks with a comma between them"]),
        (["--limit", "0"], ["limit: expected at least 1, got 0"]),
        (["--batch-size", "0"], ["batch_size: expected at least 1, got 0"]),
        (["--include-path", "nowhere"], ["include_path: expected a folder with YAML files of tasks, got 'nowhere'"]),
    ],
)
def test_bad_tasks_are_refused_before_a_model_is_read(place, own_tasks_alone, capsys, options, messages):
    refuses(capsys, place, evaluated(place, "no model", *options), *messages)


@pytest.mark.ecosystem
def test_a_task_whose_data_is_lost_is_told_in_a_line(place, own_tasks_alone, tmp_path, capsys):
    broken = write_task(tmp_path / "tasks")
    (broken / "documents.jsonl").unlink()
    arguments = evaluated(place, "dense", "--include-path", str(broken), "--output", str(tmp_path / "out.json"))
    refuses(capsys, tmp_path, arguments, "tasks: lm-eval ended with FileNotFoundError", "documents.jsonl")


@pytest.mark.ecosystem
def test_a_tokenizer_without_ends_is_told(place, own_tasks_alone, tmp_path, capsys):
    write_models(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    refuses(capsys, tmp_path, evaluated(tmp_path, "dense", "--include-path", str(place / "tasks")), "set its eos_token")


def test_the_papers_set_is_one_name():
    papers = ["hellaswag", "race", "piqa", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]
    assert task_names("paper") == papers
    assert task_names("boolq, paper,piqa") == ["boolq", *papers]


@pytest.mark.parametrize("option", ["--include-path .", "--limit 2", "--batch-size 2"])
def test_options_of_tasks_need_tasks(inputs, capsys, option):
    arguments = ["eval", str(inputs / "model"), "--data", str(inputs / "text.txt"), *option.split()]
    refuses(capsys, inputs, arguments, f"{option.split()[0][2:].replace('-', '_')}: expected --tasks beside it, got")


def test_an_output_that_is_there_is_kept(inputs, capsys):
    output = inputs / "text.txt"
    arguments = ["eval", str(inputs / "model"), "--data", str(output), "--output", str(output)]
    refuses(capsys, inputs, arguments, "output: expected a new file in a folder that exists")


def test_perplexities_are_written_too(inputs, tmp_path, capsys):
    arguments = ["eval", str(inputs / "model"), "--data", str(inputs / "text.txt"), "--eval-length", "24"]
    assert main.main([*arguments, "--dtype", "float32", "--output", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert found.keys() == {
        "model", "dtype", "protocol", "data", "perplexity", "window", "tokens", "windows_digest", "tokenizer",
        "text_digest",
    }  # fmt: skip
    assert (found["protocol"], found["window"], found["dtype"]) == ("held-out", 24, "float32")
    assert f"perplexity {found['perplexity']:.2f} over {found['tokens'] // 24} windows" in capsys.readouterr().out


def test_without_lm_eval_its_extra_is_told(inputs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    before = contents(inputs)
    assert main.main(["eval", str(inputs / "model"), "--tasks", "arc_easy"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "maskpro: error: tasks: expected the package lm_eval, which is not installed "
        "(pip install 'maskpro-kernels[eval]')"
    )
    assert contents(inputs) == before
