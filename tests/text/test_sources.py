"""Which text a source gives, in which parts, and which sources are refused."""

from __future__ import annotations

import abc
import inspect
import itertools
import pydoc_data.topics
import re
import sys
import tokenize
from asyncio import queues
from encodings import cp1250
from pydoc_data.topics import topics

import datasets
import pytest
from helpers.pages import pages, write_pages
from helpers.rows import texts, write_jsonl, written

from maskpro_kernels.text.sources import SPLITS, is_dataset, load_documents, load_text

pytestmark = pytest.mark.usefixtures("datasets_cache")


def words_of(text: str) -> set[str]:
    """The paragraphs of a text, whatever their white space."""
    return {" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)} - {""}


def test_pydoc_is_split_by_sorted_topic():
    parts = load_text("pydoc")
    first = topics[min(topics)]
    assert words_of(parts["test"]) >= words_of(first) and not words_of(parts["validation"]) & words_of(first)
    assert set().union(*map(words_of, parts.values())) == set().union(*map(words_of, topics.values()))
    assert all(len(text) > 50_000 for text in parts.values())


def test_stdlib_is_split_by_sorted_module():
    parts = load_text("stdlib")
    assert words_of(parts["test"]) >= words_of(inspect.getsource(abc))
    # what other modules have as well, such as a licence, it may lack
    assert max(len(words_of(inspect.getsource(tokenize)) & words_of(text)) for text in parts.values()) > 50
    assert all(len(text) > 100_000 for text in parts.values())
    # packages are in the calibration text alone, without the text of pydoc and tables
    for module, learned in (queues, True), (pydoc_data.topics, False), (cp1250, False):
        longest = max(words_of(inspect.getsource(module)), key=len)
        assert [longest in words_of(parts[split]) for split in SPLITS] == [learned, False, False]


@pytest.mark.parametrize("source", ["pydoc", "stdlib"])
def test_no_part_holds_text_of_another(source):
    """Not a paragraph, and hardly ever 60 characters in a row: a mask that knew the test text would look too good."""
    parts, span = load_text(source), 60
    paragraphs = [words_of(text) for text in parts.values()]
    assert not any(one & other for one, other in itertools.combinations(paragraphs, 2))
    learned = parts["calibration"]
    held_out = {
        split: [parts[split][i : i + span] for i in range(0, len(parts[split]) - span, 31)] for split in SPLITS[1:]
    }
    sought = {text for pieces in held_out.values() for text in pieces}
    found = {text for i in range(len(learned) - span) if (text := learned[i : i + span]) in sought}
    for pieces in held_out.values():
        assert sum(text in found for text in pieces) < 0.02 * len(pieces)


def test_file_is_split_by_paragraph_without_repeats(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("zéro\n\none\n \t\ntwo\n\n\n\nthree\nstill three\n\nfour\n\nfive\n\nsix", encoding="utf-8")
    assert load_text(str(path)) == {
        "test": "zéro\n\nfive",
        "validation": "one\n\nsix",
        "calibration": "two\n\nthree\nstill three\n\nfour",
    }
    path.write_text("a\n\nb  c\n\na\n\nd\n\nb\nc\n\ne", encoding="utf-8")
    assert load_text(str(path)) == {"test": "a", "validation": "b  c", "calibration": "d\n\ne"}


def test_a_file_that_is_called_like_a_source_goes_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pydoc", "self"):
        (tmp_path / name).write_text("\n\n".join("abcdef"), encoding="utf-8")
        assert load_text(f"./{name}") == load_text(str(tmp_path / name))
    assert len(load_text("pydoc")["test"]) > 1000
    with pytest.raises(ValueError, match="source: expected a text, got 'self', .* write './self'"):
        load_text("self")


# a relative "json" is the name of a reader, too
@pytest.mark.parametrize(
    "kind", ["a.jsonl", "a.jsonl.gz", "we[i]rd *.json", "part.parquet", "saved", "saved splits", "folder", "json"]
)
def test_every_kind_of_dataset_gives_the_same_text(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    rows = texts()
    path = kind if kind == "json" else str(tmp_path / kind)
    # one repeats another
    written(tmp_path / kind, [*rows, rows[3], {"text": ""}, {"text": None}])
    assert is_dataset(path)
    part = {0: "test", 1: "validation"}
    for documents in (None, 10):
        expected = {
            split: [row["text"] for at, row in enumerate(rows[:documents]) if part.get(at % 5, "calibration") == split]
            for split in SPLITS
        }
        assert load_text(path, documents=documents) == {split: "\n\n".join(expected[split]) for split in SPLITS}


@pytest.mark.parametrize(
    ("splits", "validation", "test"),
    [
        (["train", "validation", "test"], ["v0", "v1"], ["t0", "t1"]),
        (["train", "validation"], ["v1"], ["v0"]),
        (["train", "test", "other"], ["t1"], ["t0"]),
    ],
)
def test_held_out_splits_do_not_change(tmp_path, splits, validation, test):
    data = {split: datasets.Dataset.from_dict({"text": [f"{split[0]}0", f"{split[0]}1"]}) for split in splits}
    datasets.DatasetDict(data).save_to_disk(tmp_path / "data")
    expected = {"calibration": ["t0", "t1"], "validation": validation, "test": test}
    assert load_text(str(tmp_path / "data")) == {split: "\n\n".join(expected[split]) for split in SPLITS}


def test_a_name_on_the_hub_with_its_configuration(monkeypatch):
    called, read = [], []

    def load_dataset(*args, streaming):
        called.append((*args, streaming))
        rows = datasets.Dataset.from_list(texts(10))
        return {"train": rows.to_iterable_dataset().map(lambda row: read.append(1) or row) if streaming else rows}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_text("owner/name:small")
    load_text("name")
    load_text("allenai/c4:en", documents=5)
    assert called == [("owner/name", "small", False), ("name", None, False), ("allenai/c4", "en", True)]
    assert len(read) == 5


def test_the_text_column_is_named(tmp_path):
    rows = [{"text": f"t{index}", "body": f"b{index}"} for index in range(5)]
    path = str(write_jsonl(tmp_path / "a.jsonl", rows))
    assert load_text(path)["test"] == "t0" and load_text(path, "body")["test"] == "b0"
    with pytest.raises(
        ValueError, match=r"source: expected a column 'none' in '.*', got the columns \['body', 'text'\]; set one of"
    ):
        load_text(path, "none")


def test_documents_are_read_unchanged(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("w1  w2\n\n\nw1  w2\n", encoding="utf-8")
    assert load_documents(str(tmp_path / "a.txt")) == ["w1  w2\n\n\nw1  w2\n"]
    rows = [{"text": text} for text in ("", "w1", "w1", " ")]
    assert load_documents(str(write_jsonl(tmp_path / "b.jsonl", rows))) == ["", "w1", "w1", " "]
    assert load_documents("pydoc") == [load_text("pydoc")["test"]]
    assert load_documents(str(write_pages(tmp_path / "c.jsonl")), "page") == pages()
    splits = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "test", "validation")}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **_: splits)
    assert load_documents("Salesforce/wikitext:wikitext-2-raw-v1") == ["test"]
    splits.pop("test")
    with pytest.raises(ValueError, match=r"source: expected a split test, or one split alone, in 'a', got \['train'"):
        load_documents("a")


FILES = {
    "empty.txt": (b" \n\n \n", "source: .*got an empty calibration text"),
    "short.txt": (b"one\n\ntwo\n\none", "source: .*got an empty calibration text"),
    "latin.txt": (b"\xff\xfe\n\ntwo\n\nthree", "source: expected UTF-8"),
    "numbers.jsonl": (b'{"text": 3}', "source: expected texts in column 'text' of .*, got int"),
    "repeats.jsonl": (b'{"text": "a"}\n' * 9, "got an empty calibration text"),
    "empty.jsonl": (b"", "source: expected a dataset that can be read, got '.*': no rows in it"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "expected a dataset that can be read, .*: JSON parse error"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_refused(tmp_path, name):
    content, message = FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_text(str(path))


def test_sources_that_are_refused(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    splits = {name: datasets.Dataset.from_list(texts(5)) for name in ("one", "two")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "data")
    for source, message in (
        ("", 'source: expected "pydoc", "stdlib".*got an empty str'),
        ("none.txt", "source: .*'none.txt': no such file or folder; check its name"),
        (str(tmp_path / "folder"), "source: expected a dataset that can be read, .* doesn't contain any data files"),
        ("owner/none", "source: expected a dataset that can be read, got 'owner/none': Couldn't reach"),
        (str(tmp_path / "data"), r"expected a split train, or one split alone, in '.*', got \['one', 'two'\]"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            load_text(source)
    with pytest.raises(ValueError, match="source: expected a text, got the empty '.*'"):
        load_documents(str(tmp_path / "empty.txt"))
    with pytest.raises(TypeError, match="source: expected a str.*int"):
        load_text(3)
    with pytest.raises(ValueError, match="documents: expected an int of at least 1, got 0"):
        load_text("owner/name", documents=0)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"source: .*'wikitext'.*the extra 'data'"):
        load_text("wikitext")
