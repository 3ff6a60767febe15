"""Datasets as texts: which files are read, which columns, which parts, and what is refused."""

from __future__ import annotations

import sys

import datasets
import pytest
from helpers.cases import cases
from helpers.rows import CHAT_TEMPLATE, chats, texts, write_jsonl, written
from helpers.tiny_llama import tiny_tokenizer

from maskpro_kernels.text import records
from maskpro_kernels.text.data import SPLITS, has_rows, load_text, windows
from maskpro_kernels.text.records import token_ids
from maskpro_kernels.text.stream import StreamedText

pytestmark = pytest.mark.usefixtures("datasets_cache")


KINDS = [
    "a.jsonl",
    "a.jsonl.gz",
    "a.json.xz",
    "a.jsonl.bz2",
    "we[i]rd *.json",
    "part.parquet",
    "saved",
    "saved splits",
    "folder",
    "json",
]


# a relative "json" is the name of a reader, too
@pytest.mark.parametrize("kind", cases(((kind,) for kind in KINDS), slow=lambda kind: kind.endswith((".xz", ".bz2"))))
def test_every_kind_gives_the_same_text(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    rows = texts()
    path = kind if kind == "json" else str(tmp_path / kind)
    written(tmp_path / kind, rows)
    assert has_rows(path)
    assert sorted(StreamedText(path).shuffled(0, 0)) == sorted(
        document for document in (row["text"] for row in rows) if document not in set(held_out_of(path))
    )
    found = load_text(path)
    of = {0: "test", 1: "validation"}
    expected = {
        split: [row["text"] for index, row in enumerate(rows) if of.get(index % 5, "calibration") == split]
        for split in SPLITS
    }
    assert found == {split: "\n\n".join(expected[split]) for split in SPLITS}


def held_out_of(path):
    """The documents that a stream does not learn from."""
    text = StreamedText(path)
    return [*text.part("test"), *text.part("validation")]


def test_documents_that_repeat_others_are_left_out_and_told(tmp_path):
    rows, told = texts(10), []
    path = write_jsonl(tmp_path / "a.jsonl", [*rows, rows[3], {"text": ""}, {"text": None}])
    assert load_text(str(path), tell=told.append) == load_text(str(write_jsonl(tmp_path / "b.jsonl", rows)))
    assert told == [
        f"validation and test text of {str(path)!r} are documents of its split train that are not learned from",
        f"1 paragraph repeats another one and is left out of {str(path)!r}",
    ]


@pytest.mark.parametrize(
    ("splits", "validation", "test"),
    [
        (["train", "validation", "test"], ["v0", "v1"], ["t0", "t1"]),
        (["train", "validation"], ["v1"], ["v0"]),
        (["train", "test", "other"], ["t1"], ["t0"]),
    ],
)
def test_held_out_splits_stay_as_they_are(tmp_path, splits, validation, test):
    data = {split: datasets.Dataset.from_dict({"text": [f"{split[0]}0", f"{split[0]}1"]}) for split in splits}
    datasets.DatasetDict(data).save_to_disk(tmp_path / "data")
    told = []
    found = load_text(str(tmp_path / "data"), tell=told.append)
    expected = {"calibration": ["t0", "t1"], "validation": validation, "test": test}
    assert found == {split: "\n\n".join(expected[split]) for split in SPLITS}
    (line,) = told
    assert ("every other document" in line) == (len({"validation", "test"} & set(splits)) == 1)


def test_a_name_on_the_hub_with_its_configuration(monkeypatch):
    called = []

    def load_dataset(*args, **options):
        called.append((*args, options["streaming"]))
        rows = datasets.Dataset.from_list(texts(10))
        return {"train": rows.to_iterable_dataset() if options["streaming"] else rows}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_text("owner/name:small")
    load_text("name")
    assert next(StreamedText("allenai/c4:en").shuffled(0, 0))
    assert called == [("owner/name", "small", False), ("name", None, False), ("allenai/c4", "en", True)]


def test_the_text_column_is_the_first_that_there_is(tmp_path):
    rows = [{"text": f"t{index}", "messages": None, "body": f"b{index}"} for index in range(5)]
    path = str(write_jsonl(tmp_path / "a.jsonl", rows))
    assert load_text(path)["test"] == "t0"
    assert load_text(path, "body")["test"] == "b0"
    assert load_text(path, "none, body,text")["test"] == "b0"
    with pytest.raises(
        ValueError,
        match=r"source: expected a column 'none' or 'other' in '.*', got the columns \['body', 'messages', 't",
    ):
        load_text(path, "none,other")
    for columns in ("", "text,", "text,text"):
        with pytest.raises(ValueError, match="text_column: expected names with a comma between them"):
            load_text(path, columns)
    with pytest.raises(TypeError, match="text_column: expected a str"):
        load_text(path, 3)


def chat_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.mark.parametrize("kind", ["a.jsonl", "part.parquet"])
def test_chats_become_text_by_the_template(tmp_path, kind):
    rows = chats(10)
    # a key that one message alone has is null in those of the others; a call of a tool has no content
    rows[0]["messages"][0]["name"] = "w3"
    rows[2]["messages"][0]["content"] = None
    path = str(written(tmp_path / kind, [*rows, rows[1]]))
    told = []
    found = load_text(path, tell=told.append)
    assert [len(found[split]) for split in SPLITS] == [6, 2, 2] and "1 chat repeats" in told[1]
    assert found["test"][0] == rows[0]["messages"] and "name" not in found["test"][1][0]
    assert found["calibration"][0][0] == {"role": "w0", "content": None}
    tokenizer = chat_tokenizer()
    flat = [f"{message['role']} {message['content']}" for row in (rows[0], rows[5]) for message in row["messages"]]
    assert windows(found["test"], tokenizer, 124).flatten().tolist() == tokenizer(" ".join(flat))["input_ids"]


def test_a_template_writes_its_own_beginning_of_text():
    tokenizer = chat_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "[PAD]"})
    tokenizer.chat_template = "{{ bos_token }} " + CHAT_TEMPLATE
    seen = []

    def watched(text, **options):
        seen.append(options)
        return tokenizer(text, **options)

    watched.chat_template, watched.apply_chat_template = tokenizer.chat_template, tokenizer.apply_chat_template
    ids = token_ids([{"role": "w0", "content": "w1"}], watched)
    assert ids == [1, 2, 3] and seen == [{"add_special_tokens": False, "verbose": False}]


def test_chats_need_a_template():
    chat = chats(1)[0]["messages"]
    with pytest.raises(
        ValueError, match="tokenizer: expected one with a chat template, .* take the tokenizer of a chat"
    ):
        token_ids(chat, tiny_tokenizer())
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="tokenizer: expected a chat that its template takes, got: roles must alt"):
        token_ids(chat, tokenizer)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": 3}], "source: expected a text or a list of messages, got int in row 0 of column 'text'"),
        ([{"text": [1]}], "source: expected a text or a list of messages, got list in row 0"),
        ([{"text": [{"from": "a"}]}], r"source: expected messages with role and content, got one with \['from'\]"),
        ([{"text": "a"}] * 9, "got an empty calibration text"),
        ([], "source: expected a dataset that can be read, got '.*': no rows in it"),
    ],
)
def test_bad_rows(tmp_path, rows, message):
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        load_text(str(path))


def test_what_cannot_be_read_is_told_without_a_word_of_the_library(tmp_path, monkeypatch, capfd):
    records.show_bars(False)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"text": \n', encoding="utf-8")
    with pytest.raises(ValueError, match="source: expected a dataset that can be read, .*bad.jsonl': JSON parse error"):
        load_text(str(bad))
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="source: expected a dataset that can be read, .* doesn't contain any data files"):
        load_text(str(tmp_path / "folder"))
    with pytest.raises(OSError, match="source: expected a dataset that can be read, got 'owner/none': Couldn't reach"):
        load_text("owner/none")
    splits = {name: datasets.Dataset.from_list(texts(5)) for name in ("one", "two")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "data")
    capfd.readouterr()
    with pytest.raises(ValueError, match=r"expected a split train, or one split alone, in '.*', got \['one', 'two'\]"):
        load_text(str(tmp_path / "data"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"a dataset needs the package datasets, .*maskpro-kernels\[data\]"):
        load_text(str(bad))
    assert capfd.readouterr() == ("", "")
