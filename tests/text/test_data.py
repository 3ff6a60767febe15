from __future__ import annotations

import abc
import inspect
import itertools
import re
import sys
import tokenize
from pydoc_data.topics import topics

import pytest
import torch
from helpers.bits import assert_same_bits

from maskpro_kernels.text.data import batches, load_text, windows


def characters(text, verbose=True):
    return {"input_ids": [ord(character) for character in text]}


def words_of(text: str) -> set[str]:
    """The paragraphs of a text, whatever their white space."""
    return {" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)} - {""}


def test_pydoc_is_split_by_sorted_topic():
    texts = load_text("pydoc")
    first = topics[min(topics)]
    assert words_of(texts["test"]) >= words_of(first) and not words_of(texts["validation"]) & words_of(first)
    assert set().union(*map(words_of, texts.values())) == set().union(*map(words_of, topics.values()))
    assert all(len(text) > 50_000 for text in texts.values())


def test_stdlib_is_split_by_sorted_module():
    texts = load_text("stdlib")
    assert words_of(texts["test"]) >= words_of(inspect.getsource(abc))
    # what other modules have as well, such as a licence, it may lack
    assert max(len(words_of(inspect.getsource(tokenize)) & words_of(text)) for text in texts.values()) > 50
    assert all(len(text) > 100_000 for text in texts.values())


@pytest.mark.parametrize("source", ["pydoc", "stdlib"])
def test_no_part_holds_text_of_another(source):
    """Not a paragraph, and hardly ever 60 characters in a row: a mask that knew the test text would look too good."""
    texts, span = load_text(source), 60
    parts = [words_of(text) for text in texts.values()]
    assert not any(one & other for one, other in itertools.combinations(parts, 2))
    known = {texts["calibration"][i : i + span] for i in range(len(texts["calibration"]) - span)}
    for split in ("validation", "test"):
        places = range(0, len(texts[split]) - span, 31)
        assert sum(texts[split][i : i + span] in known for i in places) < 0.02 * len(places)


def test_paragraphs_that_repeat_others_are_left_out(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a\n\nb  c\n\na\n\nd\n\nb\nc\n\ne", encoding="utf-8")
    assert load_text(str(path)) == {"test": "a", "validation": "b  c", "calibration": "d\n\ne"}
    path.write_text("a\n\nb\n\na\n\na", encoding="utf-8")
    with pytest.raises(ValueError, match="expected at least 3 different paragraphs .*, got 2"):
        load_text(str(path))


def test_file_is_split_by_paragraph(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("zéro\n\none\n \t\ntwo\n\n\n\nthree\nstill three\n\nfour\n\nfive\n\nsix", encoding="utf-8")
    assert load_text(str(path)) == {
        "test": "zéro\n\nfive",
        "validation": "one\n\nsix",
        "calibration": "two\n\nthree\nstill three\n\nfour",
    }


def test_a_file_that_is_called_like_a_source_goes_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pydoc", "self"):
        (tmp_path / name).write_text("\n\n".join("abcdef"), encoding="utf-8")
        assert load_text(f"./{name}") == load_text(str(tmp_path / name))
    assert len(load_text("pydoc")["test"]) > 1000
    with pytest.raises(ValueError, match="source: expected a text, got 'self', .* give the path, './self'"):
        load_text("self")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "source: .*at least 3 different paragraphs.*got 0.*the text is empty"),
        (b" \n\n \n", "source: .*at least 3 different paragraphs.*got 0"),
        (b"one\n\ntwo", "source: .*at least 3 different paragraphs.*got 2"),
        (b"\xff\xfe\n\ntwo\n\nthree", "source: expected UTF-8"),
    ],
)
def test_bad_file(tmp_path, content, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_text(str(path))


def test_bad_source(monkeypatch):
    with pytest.raises(ValueError, match='source: expected "pydoc", "stdlib".*got an empty str'):
        load_text("")
    with pytest.raises(TypeError, match="source: expected a str.*int"):
        load_text(3)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"source: .*'wikitext'.*pip install 'maskpro-kernels\[data\]'"):
        load_text("wikitext")


def test_what_is_left_out_of_a_file_is_told(tmp_path):
    path, told = tmp_path / "text.txt", []
    path.write_text("a\n\nb  c\n\na\n\nd\n\nb\nc\n\ne", encoding="utf-8")
    load_text(str(path), tell=told.append)
    assert told == [f"2 paragraphs repeat others and are left out of {str(path)!r}"]
    path.write_text("a\n\nb\n\nc\n\na", encoding="utf-8")
    load_text(str(path), tell=told.append)
    assert told[1:] == [f"1 paragraph repeats another one and is left out of {str(path)!r}"]
    path.write_text("a\n\nb\n\nc", encoding="utf-8")
    load_text(str(path), tell=told.append)
    # what every Python has is no text of the user's
    load_text("pydoc", tell=told.append)
    assert len(told) == 2


def test_windows_do_not_overlap_and_drop_the_remainder():
    cut = windows("abcdefgh", characters, 3)
    assert cut.dtype == torch.int64
    assert cut.tolist() == [[97, 98, 99], [100, 101, 102]]


def test_bad_windows():
    with pytest.raises(ValueError, match="text: expected at least 9 tokens for one window, got 8"):
        windows("abcdefgh", characters, 9)
    with pytest.raises(ValueError, match="length: expected at least 2 tokens, got 1"):
        windows("abcdefgh", characters, 1)


def test_batches_hold_each_window_once_in_a_seeded_order():
    cut = torch.arange(22).view(11, 2)
    shuffled = batches(cut, 3, seed=5)
    assert [tuple(batch.shape) for batch in shuffled] == [(3, 2)] * 3
    rows = [tuple(row) for batch in shuffled for row in batch.tolist()]
    assert len(set(rows)) == 9 and set(rows) <= {tuple(row) for row in cut.tolist()}
    assert_same_bits(shuffled, batches(cut, 3, seed=5))
    assert rows != [tuple(row) for batch in batches(cut, 3, seed=6) for row in batch.tolist()]


@pytest.mark.parametrize("batch_size", [0, 12])
def test_bad_batch_size(batch_size):
    with pytest.raises(ValueError, match=f"batch_size: expected 1 to 11, the number of windows, got {batch_size}"):
        batches(torch.arange(22).view(11, 2), batch_size, seed=0)
