"""Documents that are streamed: their parts, windows of them, batches, and that no corpus is held."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import datasets
import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.rows import chats, texts, write_jsonl
from helpers.tiny_llama import tiny_tokenizer

from maskpro_kernels.text import stream
from maskpro_kernels.text.mixture import MixedBatches, parse_sources
from maskpro_kernels.text.stream import StreamedBatches, StreamedText, StreamedWindows

pytestmark = pytest.mark.usefixtures("datasets_cache")

PARTS = ("test", "validation")


@pytest.fixture
def folder(tmp_path):
    """Of two files; gives its path."""
    write_jsonl(tmp_path / "data" / "one.jsonl", texts(60))
    write_jsonl(tmp_path / "data" / "two.jsonl", texts(60, seed=1))
    return str(tmp_path / "data")


def taken(iterable, count):
    return list(itertools.islice(iterable, count))


def test_without_splits_each_document_is_of_one_part(folder):
    told = []
    text = StreamedText(folder, tell=told.append)
    parts = {part: list(text.part(part)) for part in PARTS} | {"calibration": list(text.shuffled(0, 0))}
    assert sorted(sum(parts.values(), [])) == sorted(row["text"] for row in [*texts(60), *texts(60, seed=1)])
    assert all(3 <= len(parts[part]) <= 25 for part in PARTS)
    assert told == [
        f"validation and test text of {folder!r} are documents of its split train that are not learned from"
    ]
    # an equal one is of the same part, wherever it stands
    write_jsonl(Path(folder) / "three.jsonl", texts(60))
    again = StreamedText(folder)
    for part in PARTS:
        assert set(again.part(part)) == set(parts[part])


@pytest.mark.parametrize(
    ("splits", "validation", "test"),
    [
        (["train", "validation", "test"], ["v0", "v1", "v2"], ["t0", "t1", "t2"]),
        (["train", "validation"], ["v1"], ["v0", "v2"]),
    ],
)
def test_held_out_splits(tmp_path, splits, validation, test):
    data = {split: datasets.Dataset.from_dict({"text": [f"{split[0]}{i}" for i in range(3)]}) for split in splits}
    datasets.DatasetDict(data).save_to_disk(tmp_path / "data")
    text = StreamedText(str(tmp_path / "data"))
    assert list(text.part("validation")) == validation and list(text.part("test")) == test
    assert sorted(text.shuffled(0, 0)) == ["t0", "t1", "t2"]


def test_the_head_of_a_part_has_the_tokens_asked_for(folder):
    text, tokenizer = StreamedText(folder), tiny_tokenizer()
    documents = list(text.part("test"))
    assert text.head("test", tokenizer, 61) == "\n\n".join(documents[:2])
    assert text.head("test", tokenizer, 10_000) == "\n\n".join(documents)


def test_windows_are_of_random_places_of_shuffled_documents(folder):
    text, tokenizer = StreamedText(folder), tiny_tokenizer()
    ids = {document: tokenizer(document)["input_ids"] for document in text.shuffled(0, 0)}
    count = len(ids)
    found = taken(StreamedWindows(text, tokenizer, 20, seed=3), 2 * count)
    places = []
    for window in found:
        assert window.dtype == torch.int64
        ((document, place),) = [
            (document, start)
            for document, row in ids.items()
            for start in range(len(row) - 19)
            if row[start : start + 20] == window.tolist()
        ]
        places.append((document, place))
    first, second = places[:count], places[count:]
    # each document once a round, in another order, by another window
    for part in (first, second):
        assert sorted(document for document, _ in part) == sorted(ids)
    assert [document for document, _ in first] != [document for document, _ in second] != list(ids)
    assert len({place for _, place in places}) > 20 and {0, 40} & {place for _, place in places}
    assert sum(dict(first)[document] == place for document, place in second) < count // 4


def test_the_same_seed_gives_the_same_windows(folder):
    tokenizer = tiny_tokenizer()

    def some(seed):
        return taken(StreamedWindows(StreamedText(folder), tokenizer, 20, seed), 30)

    assert_same_bits(some(1), some(1))
    assert not torch.equal(torch.stack(some(1)), torch.stack(some(2)))
    windows = StreamedWindows(StreamedText(folder), tokenizer, 20, 1)
    assert_same_bits(taken(windows, 30), taken(windows, 30))


def test_short_documents_are_passed_over_and_counted(tmp_path, monkeypatch):
    rows = [*texts(30, length=30), *texts(30, length=2, seed=1), *texts(30, length=19, seed=2)]
    text = StreamedText(str(write_jsonl(tmp_path / "a.jsonl", rows)))
    tokenizer, seen = tiny_tokenizer(), []

    def watched(document, **options):
        seen.append(document)
        return tokenizer(document, **options)

    windows = StreamedWindows(text, watched, 20, 0)
    long = sum(len(document.split()) >= 20 for document in text.shuffled(0, 0))
    taken(windows, long)
    assert windows.read - windows.short == long and windows.short > 20
    # fewer bytes than tokens asked for
    assert not [document for document in seen if len(document) < 20]
    with pytest.raises(ValueError, match=r"documents of at least 31 tokens .*a.jsonl', but all \d+ are shorter"):
        next(iter(StreamedWindows(text, tokenizer, 31, 0)))
    monkeypatch.setattr(stream, "MOST_SHORT", 7)
    with pytest.raises(ValueError, match="but 7 in a row are shorter"):
        next(iter(StreamedWindows(text, tokenizer, 31, 0)))


def test_batches_hold_streamed_and_held_windows_by_their_shares(folder):
    held = torch.arange(50).view(10, 5) + 100
    windows = {"a": StreamedWindows(StreamedText(folder), tiny_tokenizer(), 5, 0), "b": held}
    sources = parse_sources("a:3,b:1")
    found = taken(StreamedBatches(windows, sources, 4, seed=2), 30)
    assert all(batch.shape == (4, 5) and (batch[:, 0] >= 100).sum() == 1 for batch in found)
    # those that are held come as they do in a mixture
    mixture = MixedBatches({"a": held, "b": held}, sources, 4, 30, seed=2)
    own = [batch[batch[:, 0] >= 100] for batch in found]
    turns = [int((batch[:, 0] >= 100).nonzero()) for batch in found]
    assert_same_bits(own, [batch[turn : turn + 1] for batch, turn in zip(mixture, turns, strict=True)])
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        StreamedBatches(windows, sources, 0, seed=2)


def test_only_what_is_asked_for_is_read(tmp_path, monkeypatch):
    """A file of which the end cannot be read gives windows of its beginning."""
    monkeypatch.setattr(stream, "BUFFER", 4)
    # more than the library reads at a time
    rows = [json.dumps({"text": f"{index} w{index % 30} " * 3000}) for index in range(600)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*rows, '{"text": ']) + "\n", encoding="utf-8")
    text = StreamedText(str(path))
    windows = StreamedWindows(text, tiny_tokenizer(), 20, 0)
    assert len(taken(windows, 50)) == 50 and windows.read < 100
    assert text.head("test", tiny_tokenizer(), 100)
    with pytest.raises(OSError, match="source: expected a dataset that can be read, .*JSON parse error"):
        list(text.part("test"))


def test_chats_are_streamed_too(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    text = StreamedText(str(write_jsonl(tmp_path / "a.jsonl", chats(40))))
    assert isinstance(text.head("test", tokenizer, 10), list)
    assert len(taken(StreamedWindows(text, tokenizer, 60, 0), 30)) == 30
    with pytest.raises(ValueError, match="tokenizer: expected one with a chat template"):
        next(iter(StreamedWindows(text, tiny_tokenizer(), 60, 0)))


def test_what_cannot_be_streamed(tmp_path, folder):
    for source in ("pydoc", str(tmp_path / "text.txt")):
        (tmp_path / "text.txt").write_text("a\n\nb\n\nc", encoding="utf-8")
        with pytest.raises(ValueError, match="source: expected a dataset to stream, got .*, which is read as a whole"):
            StreamedText(source)
    with pytest.raises(ValueError, match=r"expected a column 'other' in .*, got the columns \['text'\]"):
        StreamedText(folder, "other")
    empty = write_jsonl(tmp_path / "empty.jsonl", [{"text": ""}])
    with pytest.raises(ValueError, match="expected documents in each split, got none in train"):
        StreamedText(str(empty))
    one = write_jsonl(tmp_path / "one.jsonl", texts(1))
    with pytest.raises(ValueError, match="got no document for it; a dataset as small as this is better not streamed"):
        text = StreamedText(str(one))
        [text.head(part, tiny_tokenizer(), 10) for part in PARTS]
    with pytest.raises(ValueError, match="length: expected at least 2 tokens, got 1"):
        StreamedWindows(StreamedText(folder), tiny_tokenizer(), 1, 0)
    with pytest.raises(ValueError, match="model: expected tokens below 3, the size of its vocabulary"):
        next(iter(StreamedWindows(StreamedText(folder), tiny_tokenizer(), 20, 0, vocabulary=3)))
