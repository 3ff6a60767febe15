"""`maskpro eval`: one table of runs and models, by each protocol."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers.command import learn, refuses, report
from helpers.pages import pages, write_pages
from helpers.tiny_llama import tiny_model, tiny_text, tiny_tokenizer
from transformers import AutoModelForCausalLM

from maskpro_kernels.cli import main
from maskpro_kernels.cli.inputs import print_table
from maskpro_kernels.text.batches import windows
from maskpro_kernels.text.perplexity import perplexity, word_perplexity
from maskpro_kernels.text.sources import load_text

pytestmark = pytest.mark.usefixtures("eager_reference")

CPU = ["--device", "cpu", "--dtype", "float32"]


def rows_of(printed: str) -> dict[str, list[float]]:
    """Figures by the name of their row."""
    rows = [line.rsplit("  ", line.count("  ")) for line in printed.splitlines()[1:]]
    return {row[0].strip(): [float(word) for word in row[1:] if word.strip()] for row in rows}


def test_runs_are_below_their_dense_model_with_the_figures_of_their_tables(inputs, run, tmp_path, capsys):
    assert main.main(learn(inputs, tmp_path / "other", "--pattern", "1:4")) == 0
    packed = tmp_path / "packed"
    assert main.main(["export", str(run), str(packed), "--to", "packed"]) == 0
    capsys.readouterr()
    output = tmp_path / "figures.json"
    arguments = ["eval", str(run), str(tmp_path / "other"), str(packed), "--device", "cpu", "--output", str(output)]
    assert main.main(arguments) == 0
    found = json.loads(output.read_text())
    assert found["dtype"] == "float32" and found["data"] == str(inputs / "text.txt")
    text = str(inputs / "text.txt")
    figures = {row["method"]: row[text] for row in found["rows"]}
    tables = [report(folder)["table"] for folder in (run, tmp_path / "other")]
    assert figures[f"dense {inputs / 'model'}"] == tables[0][0]["perplexity"]
    assert figures[str(run)] == pytest.approx(tables[0][-1]["perplexity"], rel=1e-6) == figures[str(packed)]
    assert figures[str(tmp_path / "other")] == pytest.approx(tables[1][-1]["perplexity"], rel=1e-6)
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split() == ["held-out", "perplexity,", "float32", text]
    assert [line.split()[0] for line in printed.splitlines()[1:]] == ["dense", *map(str, arguments[1:4])]


def test_any_texts_of_any_model(inputs, tmp_path, capsys):
    (tmp_path / "two.txt").write_text(tiny_text(seed=1), encoding="utf-8")
    one, two = str(inputs / "text.txt"), str(tmp_path / "two.txt")
    sizes = ["--eval-windows", "2", "--eval-length", "24"]
    output = tmp_path / "out.json"
    arguments = ["eval", str(inputs / "model"), "--data", f"{one},{two}", *sizes, *CPU, "--output", str(output)]
    assert main.main(arguments) == 0
    (row,) = json.loads(output.read_text())["rows"]
    for text in (one, two):
        expected = perplexity(tiny_model(), windows(load_text(text)["test"], tiny_tokenizer(), 24)[:2])
        assert row[text] == pytest.approx(expected, rel=1e-6)


def test_protocols_take_whole_texts(inputs, run, tmp_path, capsys, datasets_cache):
    path = str(write_pages(tmp_path / "pages.jsonl"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run), tiny_tokenizer()
    found = {}
    for name, more in {"tokens": ["--eval-length", "24"], "word": []}.items():
        output = tmp_path / f"{name}.json"
        arguments = ["eval", str(inputs / "model"), "--protocol", name, "--data", path, "--text-column", "page"]
        code = main.main([*arguments, *more, *CPU, "--output", str(output)])
        if name == "word":
            # a tokenizer without a token that text begins with
            assert code == 2 and "tokenizer: expected a token for the beginning" in capsys.readouterr().err
            continue
        assert code == 0
        (found[name],) = json.loads(output.read_text())["rows"]
    expected = perplexity(tiny_model(), windows("\n\n".join(pages()), tokenizer, 24), batch_size=1)
    assert found["tokens"][path] == pytest.approx(expected, rel=1e-6)
    tokenizer.eos_token = "[PAD]"
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    output = tmp_path / "words.json"
    arguments = ["eval", str(tmp_path / "model"), "--protocol", "word", "--data", path, "--text-column", "page"]
    assert main.main([*arguments, *CPU, "--output", str(output)]) == 0
    (row,) = json.loads(output.read_text())["rows"]
    measured = word_perplexity(model, tokenizer, pages())
    assert row[path] == pytest.approx(measured.perplexity, rel=1e-6)
    assert row[f"{path}, bits a byte"] == pytest.approx(measured.bits_per_byte, rel=1e-6)


def test_a_run_whose_base_has_moved_is_evaluated_without_it(run, tmp_path, capsys):
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    content = report(moved)
    content["settings"]["model"] = str(tmp_path / "gone")
    (moved / "report.json").write_text(json.dumps(content))
    assert main.main(["eval", str(moved), *CPU]) == 0
    captured = capsys.readouterr()
    assert f"the dense model {tmp_path / 'gone'} has moved: it is left out" in captured.err
    assert len(captured.out.splitlines()) == 2


def test_columns_are_as_wide_as_their_figures(capsys):
    rows = [{"method": "a", "x": 123456.789}, {"method": "a much longer name", "x": 1.0}]
    print_table(rows, {"x": ("x", 2)}, "of")
    assert capsys.readouterr().out.splitlines() == [
        "of                          x",
        "a                   123456.79",
        "a much longer name       1.00",
    ]


def test_what_cannot_be_evaluated_is_refused(inputs, run, tmp_path, capsys):
    model = str(inputs / "model")
    refuses(capsys, tmp_path, ["eval", model], "data: expected --data, since only runs have texts")
    neither = "models: expected the folder of a run or of a model, got 'runs/none', which is no folder; an id"
    refuses(capsys, tmp_path, ["eval", "runs/none"], neither)
    refuses(capsys, tmp_path, ["eval", str(run), "--data", "self"], "samples are no test of a mask")
    refuses(capsys, tmp_path, ["eval", str(run), "--output", str(run / "report.json")], "output: expected a new file")
    refuses(capsys, tmp_path, ["eval", str(run), "--output", "/none/file"], "output: expected a new file")
    arguments = ["eval", model, "--data", str(inputs / "text.txt"), "--eval-length", "9999", *CPU]
    for option in ("documents", "eval-windows"):
        more = [f"--{option}", "2", "--protocol", "tokens"]
        refuses(capsys, tmp_path, [*arguments, *more], f"{option}: expected none with --protocol tokens, got 2")
    refuses(
        capsys, tmp_path, arguments, "--eval-length: expected windows of at most 64 tokens, the context of the model"
    )
