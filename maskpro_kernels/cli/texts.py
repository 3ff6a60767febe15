"""The texts that a command names, and the windows of them that it evaluates."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping

import torch

from ..digests import digest_of_bytes
from ..extras import missing
from ..text.data import Text, has_rows, load_text
from ..text.mixture import shared_out, texts_of
from ..text.records import COLUMNS, check_columns, show_bars
from ..text.stream import StreamedText
from .arguments import telling
from .models import windows_of
from .progress import tell

# The parts of a text that is held, or one whose parts are read as they are asked for
Source = Mapping[str, Text] | StreamedText


def check_sources(args: argparse.Namespace, sources: Iterable[str]) -> None:
    """Check what can be told of datasets before anything is loaded.

    Args:
        args: ``text_column`` and ``stream``, where they are given.
        sources: of all options that name some.

    Raises:
        ValueError: if an option is bad or has no dataset to be of, or datasets cannot be read.
    """
    rows = [source for source in sources if has_rows(source)]
    if hasattr(args, "text_column"):
        check_columns(args.text_column)
    for name in ("text_column", "stream"):
        if hasattr(args, name) and not rows:
            raise ValueError(
                f"{name}: expected a dataset among the texts, since no other has rows, got none; leave it out"
            )
    lacking = missing("datasets")
    if rows and lacking and hasattr(args, "stream"):
        raise ValueError(f"stream: expected {lacking}")


class Texts:
    """The texts of a command, as they are loaded, and what of them is to be told once nothing has been refused.

    Args:
        args: ``bars``; ``text_column`` and ``stream``, where they are given.

    Attributes:
        notes: what is left out of a text, and which its parts are, a line each.
    """

    def __init__(self, args: argparse.Namespace):
        self._column, self._stream = getattr(args, "text_column", COLUMNS), hasattr(args, "stream")
        self._bars = args.bars
        self.notes: list[str] = []

    def of(self, data: str) -> dict[str, Source]:
        """Each source of a list that is a text, by its name; ValueError or OSError as ``load_text``."""
        with telling("data"):
            return {name: self.source(name) for name, _ in texts_of(data)}

    def source(self, name: str) -> Source:
        """The text of one source; ValueError or OSError as ``load_text``."""
        rows = has_rows(name)
        if rows and not missing("datasets"):
            show_bars(self._bars)
        if rows and self._stream:
            return StreamedText(name, self._column, self.notes.append)
        return load_text(name, self._column, self.notes.append)

    def tell_notes(self) -> None:
        for note in self.notes:
            tell(note)


def digest_to_learn(text: Source) -> str | None:
    """Of what a run may learn from, whatever its seed and its windows; None of a streamed text, never read whole."""
    if isinstance(text, StreamedText):
        return None
    return digest_of_bytes(json.dumps(text["calibration"], sort_keys=True, default=str).encode()).hex()


def evaluation_parts(
    args: argparse.Namespace, texts: Mapping[str, Source], split: str, tokenizer
) -> dict[str, tuple[Text, int]]:
    """By name of each text of ``--data`` the part to evaluate, and how many windows of it, as ``shared_out`` says.

    Args:
        texts: those of ``--data``.
        split: "test" or "validation".
        tokenizer: by which a streamed text is read as far as it is needed.
    """
    sources = texts_of(args.data)
    counts = shared_out(sources, args.eval_windows)
    return {
        name: (part_of(args, texts[name], split, count, tokenizer, "data"), count)
        for (name, _), count in zip(sources, counts, strict=True)
    }


def evaluation_windows(
    args: argparse.Namespace, parts: Mapping[str, tuple[Text, int]], split: str, model: torch.nn.Module, tokenizer
) -> torch.Tensor:
    """Windows to evaluate, at most ``--eval-windows``; it is told where one of several texts has fewer than its share.

    Args:
        parts: see ``evaluation_parts``.
        split: "test" or "validation".
    """
    found = []
    for name, (part, count) in parts.items():
        own = windows_of(part, model, tokenizer, args.eval_length, "data", "--eval-length")[:count]
        if len(own) < count and len(parts) > 1:
            tell(
                f"the {split} text of {name!r} has {len(own)} windows of {args.eval_length} tokens, fewer than the "
                f"{count} of its share"
            )
        found.append(own)
    return torch.cat(found)


def windows_of_part(
    args: argparse.Namespace, text: Source, split: str, count: int, model: torch.nn.Module, tokenizer, data: str
) -> torch.Tensor:
    """The first windows of a text's part, at most ``count``.

    Args:
        data: the argument that the text comes from, for errors.
    """
    part = part_of(args, text, split, count, tokenizer, data)
    return windows_of(part, model, tokenizer, args.eval_length, data, "--eval-length")[:count]


def part_of(args: argparse.Namespace, text: Source, split: str, count: int, tokenizer, data: str) -> Text:
    """A text's part; of a streamed one as much as ``count`` windows of ``--eval-length`` take."""
    if not isinstance(text, StreamedText):
        return text[split]
    with telling(data):
        return text.head(split, tokenizer, count * args.eval_length)
