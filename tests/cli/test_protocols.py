"""`maskpro eval --protocol`."""

from __future__ import annotations

import json

import datasets
import pytest
from helpers.command import refuses
from helpers.pages import pages, write_pages
from helpers.tiny_llama import tiny_model, tiny_text, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from maskpro_kernels.cli import main
from maskpro_kernels.hf import save_model
from maskpro_kernels.text.batches import windows
from maskpro_kernels.text.perplexity import perplexity, word_perplexity

pytestmark = pytest.mark.usefixtures("eager_reference", "datasets_cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a model whose tokenizer has a token that text ends with."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "[PAD]"
    save_model(tiny_model(), tokenizer, folder / "model")
    return folder / "model"


def evaluated(model, *options: object) -> list[str]:
    return ["eval", str(model), "--device", "cpu", "--dtype", "float32", *map(str, options)]


def result(model, output, *options: object) -> dict:
    assert main.main(evaluated(model, *options, "--output", output)) == 0
    return json.loads(output.read_text(encoding="utf-8"))


def test_the_protocols_have_a_text_of_their_own(model, tmp_path, monkeypatch, capsys):
    called = []

    def load_dataset(name, config, **_):
        called.append((name, config))
        rows = {"page": pages(3)} if "document" in name else {"text": ["", *pages(2), ""]}
        return {"train": datasets.Dataset.from_dict({"text": ["w1"]}), "test": datasets.Dataset.from_dict(rows)}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "[PAD]"
    by_tokens = windows("\n\n".join(["", *pages(2), ""]), tokenizer, 32)
    for name, length, expected, over in (
        ("tokens@32", 32, perplexity(tiny_model(), by_tokens, 1), f"{len(by_tokens)} windows of 32 tokens"),
        ("word", 64, word_perplexity(tiny_model(), tokenizer, pages(3)).perplexity, ""),
        ("word@16", 16, word_perplexity(tiny_model(), tokenizer, pages(3), 16).perplexity, ""),
    ):
        found = result(model, tmp_path / f"{name}.json", "--protocol", name)
        assert found["perplexity"] == pytest.approx(expected, rel=1e-5)
        assert (found["protocol"], found["dtype"], found["window"]) == (name, "float32", length)
        assert found["data"].endswith(":wikitext-2-raw-v1") and found["tokenizer"]["tokens"] == 32
        line, named = capsys.readouterr().out.splitlines()
        assert f"perplexity {expected:.2f} over {over}" in line
        assert f"protocol {name}, windows of {length} tokens, float32" in named
    assert called == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1"),
        *2 * [("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1")],
    ]


def test_a_text_file_is_evaluated_as_a_whole(inputs, run, tmp_path, capsys):
    text = inputs / "text.txt"
    found = result(run, tmp_path / "out.json", "--protocol", "tokens@32", "--data", text)
    assert found["tokens"] == 1000 // 32 * 32
    told = capsys.readouterr()
    assert f"'{text}' is evaluated as a whole, and the run has learned from parts of it" in told.err
    assert told.out.splitlines()[2].startswith("2:4 100.00%")
    copy, other = tmp_path / "copy.txt", tmp_path / "other.txt"
    copy.write_text(tiny_text(), encoding="utf-8")
    other.write_text(tiny_text(seed=1), encoding="utf-8")
    result(run, tmp_path / "copy.json", "--protocol", "tokens@32", "--data", copy)
    line = f"'{copy}' has the same bytes as '{text}', and the run has learned from parts of it\n"
    assert capsys.readouterr().err == line
    result(run, tmp_path / "other.json", "--protocol", "tokens@32", "--data", other)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ("--protocol tokens", ["protocol: expected tokens@LENGTH such as tokens@2048, word", "'tokens'"]),
        ("--protocol word --eval-length 32", ["eval_length: expected none with --protocol word", "leave it out"]),
        ("--protocol word --eval-windows 2", ["eval_windows: expected none with --protocol word", "leave it out"]),
        ("--protocol word --data TEXT,pydoc", ["data: expected one text with --protocol word, got"]),
        ("--protocol word --data self", ["data: expected one text with --protocol word, got 'self'"]),
        (
            "--protocol word --data ROWS --documents 3",
            ["documents: expected none with --protocol word", "leave it out"],
        ),
        ("--protocol word --data ROWS --text-column b", ["data: source: expected a column 'b' in", "['page']"]),
        ("--protocol word --data none.txt", ["data: source: expected", "there is no such file or folder"]),
        ("--protocol tokens@1001 --data TEXT", ["data: text: expected at least 1001 tokens", "--protocol"]),
    ],
)
def test_what_does_not_go_with_a_protocol(inputs, tmp_path, capsys, options, messages):
    rows = write_pages(tmp_path / "pages.jsonl")
    options = options.replace("TEXT", str(inputs / "text.txt")).replace("ROWS", str(rows))
    refuses(capsys, tmp_path, evaluated(inputs / "model", *options.split()), *messages)


def test_a_tokenizer_without_a_token_at_an_end_is_no_fault_of_the_text(inputs, tmp_path, capsys):
    arguments = evaluated(inputs / "model", "--protocol", "word", "--data", inputs / "text.txt")
    capsys.readouterr()
    assert main.main(arguments) == 2
    line = capsys.readouterr().err
    assert "tokenizer: expected one with a token that text begins or ends with" in line
    # the same of a model that does not know its tokenizer's tokens
    save_model(tiny_model(vocab_size=8), tiny_tokenizer(), tmp_path / "small")
    arguments = evaluated(tmp_path / "small", "--protocol", "tokens@32", "--data", inputs / "text.txt")
    assert main.main(arguments) == 2
    line = capsys.readouterr().err
    assert line.startswith("maskpro: error: model: expected tokens below 8, ") and "longer text" not in line


def test_windows_beyond_the_positions_of_a_model(inputs, tmp_path, capsys):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    save_model(model, tiny_tokenizer(), tmp_path / "gpt2")
    arguments = evaluated(tmp_path / "gpt2", "--data", inputs / "text.txt", "--protocol")
    refuses(
        capsys, tmp_path, [*arguments, "tokens@17"], "protocol: expected at most 16, which the model has positions for"
    )
    assert main.main([*arguments, "tokens@16"]) == 0
