"""`maskpro eval`: by which protocol a text is evaluated, and what a result says of it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from filecmp import cmp
from pathlib import Path

import torch

from ..digests import digest, digest_of_bytes
from ..text.batches import parse_sources, shared_out, texts_of
from ..text.perplexity import perplexity, word_perplexity
from ..text.sources import BUILT_IN, SELF, is_dataset, load_documents
from .arguments import telling
from .models import check_positions, tell_beyond_context, windows_of
from .progress import tell, tell_as
from .shared_options import EVALUATION
from .texts import Texts, check_sources, evaluation_parts, evaluation_windows, show_bars

# What is evaluated where no protocol is named: windows of the parts of texts that runs do not learn from
HELD_OUT = "held-out"
# Named protocols, each with its text and the column of its documents where nothing else is said: by tokens in windows
# of all documents joined by blank lines, as SparseGPT, Wanda and MaskLLM evaluate; and by words, as lm-eval does
TOKENS, WORD = "tokens", "word"
TEXTS = {
    TOKENS: ("Salesforce/wikitext:wikitext-2-raw-v1", "text"),
    WORD: ("EleutherAI/wikitext_document_level:wikitext-2-raw-v1", "page"),
}


class HeldOutText:
    """The texts that are evaluated where no protocol is named: the test parts of those of ``--data``, or of the run.

    Args:
        args: of `maskpro eval`, with ``data`` and what EVALUATION names.
        expected: where the windows have to be those of the table of a run, their digest there.

    Raises:
        ValueError, OSError: if there is no text among them, or one cannot be read.
    """

    def __init__(self, args: argparse.Namespace, expected: str | None = None):
        self._args, self._expected = args, expected
        with telling("eval_windows"):
            shared_out(texts_of(args.data), args.eval_windows)
        check_sources(args, [name for name, _ in parse_sources(args.data)])
        self._texts = Texts(args).of(args.data)
        if not self._texts:
            raise ValueError(
                f"data: expected a text, got {args.data!r}, and samples are no test of a mask; name a text by --data"
            )

    def measure(self, model: torch.nn.Module, tokenizer) -> dict:
        """The result, see ``_result``; ValueError if the texts and the model do not go together."""
        args = self._args
        check_positions(model, eval_length=args.eval_length)
        parts = evaluation_parts(args, self._texts, "test")
        windows = evaluation_windows(args, parts, "test", model, tokenizer)
        tell_beyond_context(model, "eval_length", args.eval_length)
        own = digest([windows])
        if self._expected not in (None, own):
            tell_as(
                "warning",
                f"data: expected the test windows of the run's table, got others of {args.data!r}: the text has "
                "changed since the run, or the tokenizer has, and the figure is not that of the table",
            )
        found = {
            "perplexity": perplexity(model, windows, progress=args.bars),
            "window": args.eval_length,
            "tokens": windows.numel(),
            "windows_digest": own,
        }
        return _result(HELD_OUT, args.data, found, tokenizer)


class ProtocolText:
    """The text of a named protocol, read before a model is loaded.

    Args:
        args: of `maskpro eval`.
        learned_from: the data of the run that is evaluated, if it is one.

    Raises:
        ValueError, OSError: if an argument does not go with the protocol, or the text cannot be read.
    """

    def __init__(self, args: argparse.Namespace, learned_from: str | None):
        self.protocol = args.protocol
        self.kind, self.length = _parsed(args.protocol)
        for name in EVALUATION:
            if hasattr(args, name):
                raise ValueError(
                    f"{name}: expected none with --protocol {self.protocol}, which takes its whole text in windows of "
                    f"its own, got {getattr(args, name)}; leave it out"
                )
        if hasattr(args, "documents"):
            raise ValueError(
                f"documents: expected none with --protocol {self.protocol}, which takes its whole text; leave it out"
            )
        own, column = TEXTS[self.kind]
        given = getattr(args, "data", own)
        sources = parse_sources(given)
        if len(sources) > 1 or sources[0].name == SELF:
            raise ValueError(f"data: expected one text with --protocol {self.protocol}, got {given!r}")
        self.data = sources[0].name
        check_sources(args, [self.data])
        if is_dataset(self.data):
            show_bars(args.bars)
        with telling("data"):
            self.documents = load_documents(
                self.data, getattr(args, "text_column", column if self.data == own else "text")
            )
        self._learned_from, self._bars = learned_from, args.bars

    def _tell_learned(self) -> None:
        """Tell where a run has learned from what is evaluated, or from a file with the same bytes."""
        if self.data in BUILT_IN or self._learned_from is None:
            return
        own = Path(self.data).resolve()
        names = [name for name, _ in parse_sources(self._learned_from) if name not in (*BUILT_IN, SELF)]
        for known in (Path(name).resolve() for name in names):
            if own == known:
                tell(f"{self.data!r} is evaluated as a whole, and the run has learned from parts of it")
            elif own.is_file() and known.is_file() and cmp(own, known, shallow=False):
                tell(f"{self.data!r} has the same bytes as {str(known)!r}, and the run has learned from parts of it")

    def measure(self, model: torch.nn.Module, tokenizer) -> dict:
        """The result, see ``_result``; ValueError if the text and the model do not go together."""
        if self.length is not None:
            check_positions(model, protocol=self.length)
        if self.kind == WORD:
            with telling("data", "give a longer text, or another --protocol"):
                found = word_perplexity(model, tokenizer, self.documents, self.length, self._bars)._asdict()
        else:
            windows = windows_of("\n\n".join(self.documents), model, tokenizer, self.length, "data", "--protocol")
            figure = perplexity(model, windows, batch_size=1, progress=self._bars)
            found = {"perplexity": figure, "window": self.length, "tokens": windows.numel()}
        tell_beyond_context(model, "protocol", found["window"])
        self._tell_learned()
        return _result(self.protocol, self.data, found, tokenizer)


def _parsed(protocol: str) -> tuple[str, int | None]:
    """(kind, tokens of a window); ValueError unless it is "tokens@LENGTH", "word" or "word@LENGTH"."""
    kind, at, length = protocol.partition("@")
    whole = length.isascii() and length.isdigit() and int(length) > 1
    if kind not in TEXTS or (at and not whole) or (kind == TOKENS and not at):
        raise ValueError(
            f"protocol: expected {TOKENS}@LENGTH such as {TOKENS}@2048, {WORD} or {WORD}@LENGTH, with a length of at "
            f"least 2 tokens, got {protocol!r}"
        )
    return kind, int(length) if at else None


def _result(protocol: str, data: str, found: Mapping, tokenizer) -> dict:
    """What a result holds of a text: by which protocol what was found."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    return {
        "protocol": protocol,
        "data": data,
        **found,
        "tokenizer": {
            "class": type(tokenizer).__name__,
            "tokens": len(tokenizer),
            "digest": digest_of_bytes(vocabulary).hex(),
        },
    }


def result_lines(result: Mapping) -> list[str]:
    """The lines that tell a result: the figure, and what it is a figure of."""
    kind, tokenizer = result["protocol"].partition("@")[0], result["tokenizer"]
    figure = f"{result['perplexity']:.2f} over"
    if kind == WORD:
        told = (
            f"word perplexity {figure} {result['words']} words; {result['token_perplexity']:.2f} by token over "
            f"{result['tokens']} tokens, {result['bits_per_byte']:.4f} bits a byte"
        )
    else:
        windows = f"{result['tokens'] // result['window']} windows of {result['window']} tokens"
        told = f"{'test' if kind == HELD_OUT else kind} perplexity {figure} {windows}"
    return [
        told,
        f"protocol {result['protocol']}, windows of {result['window']} tokens, {result['dtype']}; tokenizer "
        f"{tokenizer['class']} of {tokenizer['tokens']} tokens, {tokenizer['digest']}; text {result['data']}",
    ]
