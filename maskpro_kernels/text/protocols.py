"""Perplexity by named protocols: figures that compare with those that others have found in the same way.

- ``wikitext2@LENGTH``, as SparseGPT, Wanda and MaskLLM evaluate: all documents are joined by blank lines and made into
  tokens once, windows of LENGTH tokens do not overlap, the remainder is dropped, and all predicted tokens count alike.
- ``word`` and ``word@LENGTH``, as the task wikitext of lm-eval does (EleutherAI/lm-evaluation-harness 0.4,
  ``lm_eval/tasks/wikitext``): each document is detokenized and made into tokens on its own, every token is predicted,
  and the sum is divided by the words of the documents as they were. LENGTH is the most tokens that the model sees.

Both take any text. Their own is WikiText-2 (Merity et al. 2016, arXiv 1609.07843), its part test.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from ..digests import digest_of_bytes
from ..modules import evaluating
from ..shards import without_gradients
from .data import (
    BUILT_IN,
    Text,
    TooFewTokens,
    check_source,
    check_vocabulary,
    cut,
    has_rows,
    is_path,
    load_text,
    read_utf8,
    tokens_of,
)
from .perplexity import perplexity
from .records import documents, load_rows

WIKITEXT2, WORD = "wikitext2", "word"
# Where the text of each protocol is, and which columns hold documents where nothing else is said
TEXTS = {
    WIKITEXT2: "Salesforce/wikitext:wikitext-2-raw-v1",
    WORD: "EleutherAI/wikitext_document_level:wikitext-2-raw-v1",
}
PAGES = "page,text"
# The context of a model that tells none, as lm-eval takes it
CONTEXT = 2048
# Positions whose logits are cast to float32 together
POSITIONS = 1024
# What lm-eval's wikitext_detokenizer replaces, in its order; patterns are those of re
DETOKENIZED = (
    (re.escape("s '"), "s'"),
    (r"/' [0-9]/", r"/'[0-9]/"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (re.escape(" @.@ "), "."),
    (" : ", ": "),
    (" ; ", "; "),
    (re.escape(" . "), ". "),
    (" ! ", "! "),
    (re.escape(" ? "), "? "),
    (" , ", ", "),
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


class Protocol(NamedTuple):
    """A named protocol; str() gives its name.

    Attributes:
        kind: "wikitext2" or "word".
        length: tokens of a window; None of "word" where the model tells.
    """

    kind: str
    length: int | None

    def __str__(self) -> str:
        return self.kind if self.length is None else f"{self.kind}@{self.length}"


def parse_protocol(name: str) -> Protocol:
    """The protocol of a name: "wikitext2@LENGTH", "word" or "word@LENGTH"; ValueError unless it is one."""
    kind, at, length = name.partition("@")
    whole = length.isascii() and length.isdigit() and int(length) > 1
    if kind not in TEXTS or (at and not whole) or (kind == WIKITEXT2 and not at):
        raise ValueError(
            f"protocol: expected {WIKITEXT2}@LENGTH such as wikitext2@2048, {WORD} or {WORD}@LENGTH, with a length of "
            f"at least 2 tokens, got {name!r}"
        )
    return Protocol(kind, int(length) if at else None)


@dataclass(frozen=True)
class Measured:
    """What a protocol finds.

    Attributes:
        perplexity: by token, or by word; inf where it exceeds the range of a float.
        window: tokens that the model sees at once, at most.
        tokens: in the windows that were evaluated.
        words: of "word": in the documents as they were, else None.
        bytes: of "word": in these documents, in UTF-8, else None.
        token_perplexity: of "word": what the same sum gives by token, else None.
        bits_per_byte: of "word": what it gives by byte, else None.
    """

    perplexity: float
    window: int
    tokens: int
    words: int | None = None
    bytes: int | None = None
    token_perplexity: float | None = None
    bits_per_byte: float | None = None


def load_documents(source: str, columns: str) -> list[str]:
    """The documents that a protocol evaluates, as they are: empty ones are documents too.

    Args:
        source: a UTF-8 text file, which is one document; a dataset as ``load_text`` takes it, of which the split test
            is read, or the only one; or "pydoc" or "stdlib", whose test part is one document.
        columns: of a dataset, names with a comma between them; the first that is there holds the documents.

    Raises:
        TypeError: if ``source`` or ``columns`` is not a str.
        ValueError: if there is no text in it, no such split or column, documents are chats, or it cannot be read as
            ``load_text`` tells.
        OSError: if it cannot be read.
    """
    check_source(source)
    if source in BUILT_IN:
        return [load_text(source)["test"]]
    if not has_rows(source):
        found = [read_utf8(Path(source))]
    else:
        splits = load_rows(source, Path(source) if is_path(source) else None)
        name = next(iter(splits)) if len(splits) == 1 else "test"
        if name not in splits:
            raise ValueError(f"source: expected a split test, or one split alone, in {source!r}, got {list(splits)}")
        found = list(documents(source, splits[name], columns, empty=True))
    if not all(isinstance(document, str) for document in found):
        raise ValueError(f"source: expected texts, got chats in {source!r}; name a column of texts")
    if not any(document.strip() for document in found):
        raise ValueError(f"source: expected a text, got none in {source!r}: it is empty")
    return found


def joined_by_blank_lines(found: Sequence[str]) -> str:
    """The one text that ``wikitext2`` makes of documents."""
    return "\n\n".join(found)


def digest_of_texts(texts: Sequence[Text]) -> str:
    """BLAKE2b of 16 bytes: of one text that of its UTF-8 bytes, as ``b2sum -l 128`` gives; of several that of a JSON
    list of them.
    """
    whole = texts[0] if len(texts) == 1 and isinstance(texts[0], str) else json.dumps(list(texts))
    return digest_of_bytes(whole.encode()).hex()


def measure(
    model: torch.nn.Module, tokenizer: Callable, found: Sequence[str], protocol: Protocol, progress: bool = False
) -> Measured:
    """What a protocol finds of a model, in eval() mode; every module is then put back into the mode it came in.

    Args:
        model: a Hugging Face causal language model.
        tokenizer: its tokenizer.
        found: the documents.
        protocol: see ``parse_protocol``.
        progress: show a bar on stderr.

    Raises:
        TooFewTokens: a ValueError, if the text is too short for a window.
        ValueError: if the model does not know one of its tokens, or "word" is given a tokenizer without a token that
            text begins or ends with.
    """
    if protocol.kind == WORD:
        return _by_word(model, tokenizer, found, protocol.length or context_length(model, tokenizer), progress)
    windows = cut(tokens_of(joined_by_blank_lines(found), tokenizer), protocol.length)
    check_vocabulary(windows, model.get_input_embeddings().num_embeddings)
    return Measured(perplexity(model, windows, batch_size=1, progress=progress), protocol.length, windows.numel())


def context_length(model: torch.nn.Module, tokenizer: Callable) -> int:
    """How many tokens a model sees at once, by lm-eval's rule: as its config tells, its tokenizer, or CONTEXT."""
    config = getattr(model.config, "text_config", None) or model.config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    told = getattr(tokenizer, "model_max_length", None)
    # transformers puts 10**30 where a tokenizer tells none
    return int(told) if told is not None and told < 1e29 else CONTEXT


def detokenized(document: str) -> str:
    """A document of WikiText as text, by lm-eval's ``wikitext_detokenizer``."""
    for pattern, text in DETOKENIZED:
        document = re.sub(pattern, text, document)
    return document


def _by_word(
    model: torch.nn.Module, tokenizer: Callable, found: Sequence[str], length: int, progress: bool
) -> Measured:
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is None:
        raise ValueError(
            f"tokenizer: expected one with a token that text begins or ends with, as `word` needs it, got "
            f"{type(tokenizer).__name__} without; set its eos_token, or take another protocol"
        )
    tokens = [_tokens_to_predict(detokenized(document), tokenizer, first) for document in found]
    windows = [window for own in tokens for window in rolling_windows(own, first, length)]
    if not windows:
        raise TooFewTokens("text: expected at least 1 token, got none")
    every = torch.tensor([first, *chain.from_iterable(tokens)])
    check_vocabulary(every, model.get_input_embeddings().num_embeddings)
    words = sum(len(re.split(r"\s+", document)) for document in found)
    size = sum(len(document.encode()) for document in found)
    nats, count = 0.0, sum(map(len, tokens))
    with without_gradients(model), evaluating(model):
        for inputs, targets in tqdm(windows, desc="perplexity", disable=not progress, leave=False):
            nats += _nats(model, inputs, targets)
    return Measured(_exp(nats / words), length, count, words, size, _exp(nats / count), nats / size / math.log(2))


def _tokens_to_predict(text: str, tokenizer: Callable, first: int) -> list[int]:
    """With the special tokens of the tokenizer, unless the text begins with what would be the first one."""
    special = {"add_special_tokens": False} if text.startswith(tokenizer.decode(first)) else {}
    # verbose=False silences the warning that the text is longer than the model's context
    return tokenizer(text, verbose=False, **special)["input_ids"]


def rolling_windows(tokens: Sequence[int], first: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """(inputs, targets) by which each token is predicted once; targets are those of the last inputs.

    A window has at most ``length`` inputs and as many targets, the last one the targets that are left, behind as many
    inputs of the window before as there is room for: ``get_rolling_token_windows`` of lm-eval with a context of one.

    Args:
        tokens: of a document.
        first: the token in front of them.
        length: at least 2.
    """
    inputs = [first, *tokens]
    for begin in range(0, len(tokens), length):
        end = min(begin + length, len(tokens))
        yield inputs[max(end - length, 0) : end], list(tokens[begin:end])


def _nats(model: torch.nn.Module, inputs: list[int], targets: list[int]) -> float:
    """Minus the log-likelihood of the targets, which the logits of the last inputs predict, in float32."""
    device = next(model.parameters()).device
    logits = model(torch.tensor([inputs], device=device), use_cache=False).logits[0, -len(targets) :]
    wanted = torch.tensor(targets, device=logits.device)
    return sum(
        F.cross_entropy(part.float(), own, reduction="sum").item()
        for part, own in zip(logits.split(POSITIONS), wanted.split(POSITIONS), strict=True)
    )


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
