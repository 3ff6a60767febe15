"""`maskpro eval --protocol`, and `maskpro compare` of what it finds."""

from __future__ import annotations

import json
import warnings

import datasets
import pytest
from helpers.command import refuses
from helpers.pages import pages, write_pages
from helpers.tiny_llama import tiny_model, tiny_text, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from maskpro_kernels.cli import main
from maskpro_kernels.hf import save_model
from maskpro_kernels.report.plots import draw_results
from maskpro_kernels.text.protocols import digest_of_texts, measure, parse_protocol

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
    for name, documents in (("wikitext2@32", ["", *pages(2), ""]), ("word", pages(3)), ("word@16", pages(3))):
        found = result(model, tmp_path / f"{name}.json", "--protocol", name)
        tokenizer = tiny_tokenizer()
        tokenizer.eos_token = "[PAD]"
        expected = measure(tiny_model(), tokenizer, documents, parse_protocol(name))
        texts = documents if name.startswith("word") else ["\n\n".join(documents)]
        assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
        assert (found["protocol"], found["dtype"], found["window"]) == (name, "float32", expected.window)
        assert found["data"].endswith(":wikitext-2-raw-v1") and found["text_digest"] == digest_of_texts(texts)
        assert found["tokenizer"]["tokens"] == 32 and found.get("words") == expected.words
        line, named = capsys.readouterr().out.splitlines()
        windows = "" if name.startswith("word") else f" {expected.tokens // 32} windows of 32 tokens"
        assert f"perplexity {expected.perplexity:.2f} over{windows}" in line
        for part in (f"protocol {name}, windows of {expected.window} tokens, float32", found["text_digest"]):
            assert part in named
    assert called == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1"),
        *2 * [("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1")],
    ]


def test_a_text_file_is_evaluated_as_a_whole(inputs, run, tmp_path, capsys):
    text = inputs / "text.txt"
    found = result(run, tmp_path / "out.json", "--protocol", "wikitext2@32", "--data", text)
    assert found["tokens"] == 1000 // 32 * 32 and found["text_digest"] == digest_of_texts([tiny_text()])
    told = capsys.readouterr()
    assert f"'{text}' is evaluated as a whole, and the run has learned from parts of it" in told.err
    assert told.out.splitlines()[2].startswith("2:4 100.00%")
    copy, other = tmp_path / "copy.txt", tmp_path / "other.txt"
    copy.write_text(tiny_text(), encoding="utf-8")
    other.write_text(tiny_text(seed=1), encoding="utf-8")
    result(run, tmp_path / "copy.json", "--protocol", "wikitext2@32", "--data", copy)
    line = f"'{copy}' has the same bytes as '{text}', and the run has learned from parts of it\n"
    assert capsys.readouterr().err == line
    result(run, tmp_path / "other.json", "--protocol", "wikitext2@32", "--data", other)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ("--protocol wikitext2", ["protocol: expected wikitext2@LENGTH such as wikitext2@2048, word", "'wikitext2'"]),
        ("--protocol word --eval-length 32", ["eval_length: expected none with --protocol word", "leave it out"]),
        ("--protocol word --eval-windows 2", ["eval_windows: expected none with --protocol word", "leave it out"]),
        ("--protocol word --data TEXT,pydoc", ["data: expected one text with --protocol word, got"]),
        ("--protocol word --data self", ["data: expected one text with --protocol word, got 'self'"]),
        ("--protocol word --data ROWS --stream", ["stream: expected none with --protocol word", "leave it out"]),
        ("--protocol word --data ROWS --text-column b", ["data: source: expected a column 'b' in", "['page']"]),
        ("--protocol word --data none.txt", ["data: source: expected", "there is no such file or folder"]),
        ("--protocol wikitext2@1001 --data TEXT", ["data: text: expected at least 1001 tokens", "another --protocol"]),
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
    assert line.startswith("maskpro: error: tokenizer: expected one with a token that text begins or ends with, as `wo")
    assert line.endswith(" without; set its eos_token, or take another protocol\n")
    # the same of a model that does not know its tokenizer's tokens
    save_model(tiny_model(vocab_size=8), tiny_tokenizer(), tmp_path / "small")
    arguments = evaluated(tmp_path / "small", "--protocol", "wikitext2@32", "--data", inputs / "text.txt")
    assert main.main(arguments) == 2
    line = capsys.readouterr().err
    assert line.startswith("maskpro: error: model: expected tokens below 8, ") and "longer text" not in line


def test_windows_beyond_the_positions_of_a_model(inputs, tmp_path, capsys):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    save_model(model, tiny_tokenizer(), tmp_path / "gpt2")
    arguments = evaluated(tmp_path / "gpt2", "--data", inputs / "text.txt", "--protocol")
    refuses(capsys, tmp_path, [*arguments, "wikitext2@17"], "protocol: expected windows of at most 16 tokens, which")
    assert main.main([*arguments, "wikitext2@16"]) == 0


@pytest.fixture
def results(model, tmp_path):
    """Files of results: of two protocols and of two texts."""
    for name, seed in (("a.txt", 0), ("b.txt", 1)):
        (tmp_path / name).write_text(tiny_text(8, seed=seed), encoding="utf-8")
    (tmp_path / "same.txt").write_text(tiny_text(8), encoding="utf-8")
    for output, name, text in (
        ("one", "wikitext2@32", "a.txt"),
        ("two", "wikitext2@32", "same.txt"),
        ("word", "word", "a.txt"),
        ("window", "wikitext2@16", "a.txt"),
        ("text", "wikitext2@32", "b.txt"),
    ):
        result(model, tmp_path / f"{output}.json", "--protocol", name, "--data", tmp_path / text)
    return tmp_path


def edit(path, **entries) -> str:
    """A result with other entries beside it; gives its file."""
    found = json.loads(path.read_text(encoding="utf-8"))
    other = path.with_stem(f"{path.stem}-edited")
    other.write_text(json.dumps(found | entries), encoding="utf-8")
    return str(other)


def accuracy(value: float, shots: int = 0) -> dict:
    """What lm-eval finds of a task."""
    metrics = {"alias": "piqa", "acc,none": value, "acc_stderr,none": 0.1}
    return {"results": {"piqa": metrics}, "versions": {"piqa": 1.0}, "n-shot": {"piqa": shots}}


@pytest.mark.pictures
def test_results_of_one_protocol_and_text_stand_in_one_table(results, capsys):
    capsys.readouterr()
    one, two = str(results / "one.json"), edit(results / "two.json", tasks=accuracy(0.5))
    picture = results / "picture.png"
    assert main.main(["compare", one, two, "--picture", str(picture)]) == 0
    told = capsys.readouterr()
    head, *rows = told.out.splitlines()
    assert head.split() == "result dtype tokens wikitext2@32 perplexity piqa acc".split() and told.err == ""
    found = json.loads((results / "one.json").read_text(encoding="utf-8"))["perplexity"]
    assert [row.split() for row in rows] == [
        [one, "float32", "160", f"{found:.2f}", "-"],
        [two, "float32", "160", f"{found:.2f}", "0.5000"],
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_two_protocols_or_texts_are_not_put_into_one_column(results, inputs, run, capsys):
    one = str(results / "one.json")
    for other, what, came in (
        ("word.json", "protocol", "got wikitext2@32 in"),
        ("window.json", "protocol", "wikitext2@16 in"),
        ("text.json", "text", f"{results / 'b.txt'} ("),
    ):
        path = str(results / other)
        refuses(capsys, results, ["compare", one, path], f"run: expected the same {what} in a column, got", came, path)
    tasks = [edit(results / f"{name}.json", tasks=accuracy(0.5, shots)) for name, shots in (("one", 0), ("two", 5))]
    refuses(capsys, results, ["compare", *tasks], "run: expected the same n-shot of piqa in a column, got 0 in", "5 in")
    refuses(capsys, results, ["compare", one, str(run)], "run: expected folders of runs alone, or files of `maskpro ev")
    refuses(capsys, results, ["compare", str(results / "a.txt")], "run: expected a folder written by", "a.txt")
    for wrong in (
        {"perplexity": "3"},
        {"protocol": 3, "window": None, "text_digest": 0, "tasks": []},
        {"dtype": 1},
        {"tokens": "3"},
    ):
        refuses(capsys, results, ["compare", edit(results / "one.json", **wrong)], "or a file of `maskpro eval")


def test_other_windows_of_a_text_are_not_put_into_one_column(results, model, capsys):
    a, b = results / "a.txt", results / "b.txt"
    for output, data, windows, length in (
        ("few", a, 2, 8),
        ("more", a, 3, 8),
        ("named", results / "same.txt", 2, 8),
        ("even", f"{a}:0.5,{b}:0.5", 4, 8),
        ("uneven", f"{a}:0.75,{b}:0.25", 4, 8),
    ):
        options = ("--data", data, "--eval-windows", windows, "--eval-length", length)
        result(model, results / f"{output}.json", *options)
    few, more, named, even, uneven = (
        str(results / f"{name}.json") for name in ("few", "more", "named", "even", "uneven")
    )
    told = f"run: expected the same number of tokens in a column, got 16 in windows of 8 in '{few}' and 24 in '{more}';"
    refuses(capsys, results, ["compare", few, more], told, "evaluate both with the same --eval-windows")
    told = f"run: expected the same windows in a column, got others in '{uneven}' than in '{even}'"
    refuses(capsys, results, ["compare", even, uneven], told, "shares of --data")
    without = json.loads((results / "few.json").read_text(encoding="utf-8"))
    del without["windows_digest"]
    (results / "without.json").write_text(json.dumps(without), encoding="utf-8")
    refuses(capsys, results, ["compare", str(results / "without.json")], "or a file of `maskpro eval", "windows_digest")
    # another tokenizer has other tokens, and the table tells how many
    other = edit(results / "more.json", tokenizer={"class": "Other", "tokens": 9, "digest": "0"})
    capsys.readouterr()
    for second, tokens in ((named, "16"), (other, "24")):
        assert main.main(["compare", few, second]) == 0
        assert [row.split()[2] for row in capsys.readouterr().out.splitlines()] == ["tokens", "16", tokens]


def test_figures_in_two_dtypes_are_told_below_the_table(results, capsys):
    one, two = str(results / "one.json"), edit(results / "two.json", dtype="bfloat16")
    capsys.readouterr()
    assert main.main(["compare", one, two, str(results / "two.json")]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    assert line == (
        f"the dtypes differ, float32 in {one}, {results / 'two.json'}; bfloat16 in {two}: --dtype of `maskpro eval` "
        "sets one"
    )
    # one has the tasks alone, the other a perplexity alone: nothing stands beside another dtype
    tasks = results / "tasks.json"
    tasks.write_text(json.dumps({"dtype": "bfloat16", "tasks": accuracy(0.5)}), encoding="utf-8")
    assert main.main(["compare", one, str(tasks)]) == 0
    assert "the dtypes differ" not in capsys.readouterr().out


def test_a_file_that_is_no_text_is_refused_in_a_short_line(results, capsys):
    binary = results / "few.mask"
    binary.write_bytes(b"\xff\x00" * 9999)
    told = f"or a file of `maskpro eval --output`, got '{binary}': no text in UTF-8"
    refuses(capsys, results, ["compare", str(binary), str(results / "one.json")], told)
    assert main.main(["compare", str(binary)]) == 2
    assert len(capsys.readouterr().err) < 300 + len(str(binary))


def test_perplexities_by_token_of_two_tokenizers_are_told(results, capsys):
    tokenizer = {"class": "Other", "tokens": 9, "digest": "0"}
    capsys.readouterr()
    assert main.main(["compare", str(results / "one.json"), edit(results / "two.json", tokenizer=tokenizer)]) == 0
    assert "have different tokenizers, and perplexities by token do not compare then" in capsys.readouterr().err
    assert main.main(["compare", str(results / "word.json"), edit(results / "word.json", tokenizer=tokenizer)]) == 0
    assert capsys.readouterr().err == ""


def test_results_with_long_names_leave_room_for_their_bars(tmp_path):
    rows = {f"{'folder/' * 30}{name}": {"perplexity": 3.5} for name in ("one", "two")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_results(rows, {"perplexity": "wikitext2@2048"}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
