"""Named protocols against computations that follow their definitions token by token."""

from __future__ import annotations

import hashlib
import json
import math
import re
from types import SimpleNamespace

import datasets
import pytest
import torch
from helpers.pages import pages, write_pages
from helpers.tiny_llama import tiny_model, tiny_text, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from maskpro_kernels.text.data import load_text
from maskpro_kernels.text.protocols import (
    Measured,
    Protocol,
    context_length,
    detokenized,
    digest_of_texts,
    load_documents,
    measure,
    parse_protocol,
    rolling_windows,
)

pytestmark = pytest.mark.usefixtures("eager_reference", "datasets_cache")


def log_probability(model, context: list[int], token: int) -> float:
    with torch.no_grad():
        return model(torch.tensor([context])).logits[0, -1].double().log_softmax(-1)[token].item()


def ending_tokenizer(begins: bool = False):
    """With a token that text ends with; or with one that the tokenizer puts in front of each text as well."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "[PAD]"
    if begins:
        tokenizer.bos_token = "[UNK]"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="[UNK] $A", special_tokens=[("[UNK]", tokenizer.bos_token_id)]
        )
    return tokenizer


@pytest.mark.parametrize("length", [8, 16])
def test_wikitext2_counts_all_predicted_tokens_of_windows_alike(length):
    model, tokenizer = tiny_model(), ending_tokenizer(begins=True)
    found = ["w1 w2", "", tiny_text(4), " w3"]
    ids = tokenizer("\n\n".join(found))["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in ids[1:]
    nats, count = 0.0, 0
    for begin in range(0, len(ids) - length + 1, length):
        for end in range(begin + 1, begin + length):
            nats -= log_probability(model, ids[begin:end], ids[end])
            count += 1
    measured = measure(model.train(), tokenizer, found, Protocol("wikitext2", length))
    window = len(ids) // length * length
    assert measured == Measured(pytest.approx(math.exp(nats / count), rel=1e-5), length, window)
    assert window < len(ids) and model.training


@pytest.mark.parametrize(("begins", "length"), [(False, 9), (True, 9), (False, None)])
def test_word_predicts_every_token_once_and_counts_the_words_as_they_were(begins, length):
    model, tokenizer, found = tiny_model(), ending_tokenizer(begins), pages(2)
    limit, nats, count, words, size = length or 64, 0.0, 0, 0, 0
    for document in found:
        ids = tokenizer(detokenized(document))["input_ids"]
        inputs = [tokenizer.bos_token_id if begins else tokenizer.eos_token_id, *ids]
        for index in range(len(ids)):
            begin = index // limit * limit
            # the last window reaches back as far as the model sees
            begin = max(min(begin, len(ids) - limit), 0)
            nats -= log_probability(model, inputs[begin : index + 1], ids[index])
        count += len(ids)
        words += len(re.split(r"\s+", document))
        size += len(document.encode())
    measured = measure(model, tokenizer, found, Protocol("word", length))
    assert measured == Measured(
        pytest.approx(math.exp(nats / words), rel=1e-5),
        limit,
        count,
        words,
        size,
        pytest.approx(math.exp(nats / count), rel=1e-5),
        pytest.approx(nats / size / math.log(2), rel=1e-5),
    )


def test_a_text_that_begins_with_the_token_in_front_gets_no_other():
    model, tokenizer = tiny_model(), ending_tokenizer(begins=True)
    assert measure(model, tokenizer, ["[UNK] w1 w2"], Protocol("word", None)).tokens == 3
    assert measure(model, tokenizer, ["w1 w2"], Protocol("word", None)).tokens == 3


def test_windows_roll():
    assert list(rolling_windows([1, 2, 3, 4, 5], 0, 2)) == [([0, 1], [1, 2]), ([2, 3], [3, 4]), ([3, 4], [5])]
    assert list(rolling_windows([1, 2], 0, 4)) == [([0, 1], [1, 2])]
    assert list(rolling_windows([], 0, 4)) == []


def test_marks_of_wikitext_become_text():
    before = ' = = Bob = = \n 1 @,@ 000 @.@ 5 ( well @-@ known ) , he " says " : Bob \'s N 20 ° C ; what ? no ! \n'
    after = ' == Bob ==\n1,000.5 (well-known), he "says": Bob\'s 1 20°C; what? no!\n'
    assert detokenized(before) == after


def test_names():
    for name in ("wikitext2@2048", "wikitext2@4096", "word", "word@512"):
        assert str(parse_protocol(name)) == name
    assert parse_protocol("word") == ("word", None) and parse_protocol("wikitext2@2048") == ("wikitext2", 2048)
    for name in ("wikitext2", "wikitext2@", "wikitext2@1", "wikitext2@-4", "wikitext@2048", "word@", "word@x", ""):
        with pytest.raises(ValueError, match="protocol: expected wikitext2@LENGTH such as wikitext2@2048, word or"):
            parse_protocol(name)


def test_how_far_a_model_sees():
    assert context_length(tiny_model(), tiny_tokenizer()) == 64
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.config = SimpleNamespace(max_position_embeddings=None, text_config=None)
    assert context_length(model, tokenizer) == 2048
    tokenizer.model_max_length = 99
    assert context_length(model, tokenizer) == 99
    model.config.text_config = SimpleNamespace(n_positions=7)
    assert context_length(model, tokenizer) == 7


def test_documents_are_read_as_they_are(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("w1  w2\n\n\nw1  w2\n", encoding="utf-8")
    assert load_documents(str(tmp_path / "a.txt"), "text") == ["w1  w2\n\n\nw1  w2\n"]
    rows = [{"text": text} for text in ("", "w1", "w1", " ")]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert load_documents(str(tmp_path / "b.jsonl"), "text") == ["", "w1", "w1", " "]
    assert load_documents("pydoc", "text") == [load_text("pydoc")["test"]]
    assert load_documents(str(write_pages(tmp_path / "c.jsonl")), "page,text") == pages()
    splits = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "test", "validation")}
    called = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **_: called.append(args) or splits)
    assert load_documents("Salesforce/wikitext:wikitext-2-raw-v1", "text") == ["test"]
    assert called == [("Salesforce/wikitext", "wikitext-2-raw-v1")]
    splits.pop("test")
    with pytest.raises(ValueError, match=r"source: expected a split test, or one split alone, in 'a', got \['train'"):
        load_documents("a", "text")


def test_texts_that_are_none(tmp_path):
    (tmp_path / "a.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(ValueError, match="source: expected a text, got none in '.*': it is empty"):
        load_documents(str(tmp_path / "a.txt"), "text")
    chat = {"messages": [{"role": "user", "content": "w1"}]}
    (tmp_path / "b.jsonl").write_text(json.dumps(chat) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="source: expected texts, got chats in '.*'; name a column of texts"):
        load_documents(str(tmp_path / "b.jsonl"), "text,messages")


def test_a_text_is_known_by_its_digest():
    assert digest_of_texts(["wé"]) == hashlib.blake2b("wé".encode(), digest_size=16).hexdigest()
    assert len({digest_of_texts(texts) for texts in (["a", "b"], ["ab"], ["b", "a"], ['["a", "b"] '])}) == 4


def test_what_does_not_go_together():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with pytest.raises(ValueError, match="text: expected at least 5 tokens for one window, got 2"):
        measure(model, tokenizer, ["w1 w2"], Protocol("wikitext2", 5))
    with pytest.raises(ValueError, match="tokenizer: expected one with a token that text begins or ends with"):
        measure(model, tokenizer, ["w1 w2"], Protocol("word", None))
    small = tiny_model(vocab_size=8)
    for protocol in (Protocol("wikitext2", 2), Protocol("word", None)):
        with pytest.raises(ValueError, match="model: expected tokens below 8, the size of its vocabulary, got 31"):
            measure(small, ending_tokenizer(), ["w1 w29"], protocol)
