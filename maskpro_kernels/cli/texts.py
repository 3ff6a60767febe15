"""The texts that a command names, and the windows of them that it evaluates."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping

import torch

from ..digests import digest_of_bytes
from ..extras import missing
from ..text.batches import shared_out, texts_of
from ..text.sources import is_dataset, load_text
from .arguments import telling
from .models import windows_of
from .progress import tell

# The parts of a text by name
Source = Mapping[str, str]


def check_sources(args: argparse.Namespace, sources: Iterable[str]) -> None:
    """Raise ValueError if an option of datasets is given and none of these sources is a dataset."""
    if any(map(is_dataset, sources)):
        return
    for name in ("text_column", "documents"):
        if hasattr(args, name):
            raise ValueError(f"{name}: expected a dataset among the texts, since no other has rows, got none")


class Texts:
    """The texts of a command, as they are loaded.

    Args:
        args: ``bars``; ``text_column`` and ``documents``, where they are given.
    """

    def __init__(self, args: argparse.Namespace):
        self._args = args

    def of(self, data: str) -> dict[str, Source]:
        """Each source of a list that is a text, by its name; ValueError or OSError as ``load_text``."""
        with telling("data"):
            return {name: self.source(name) for name, _ in texts_of(data)}

    def source(self, name: str) -> Source:
        """The text of one source; ValueError or OSError as ``load_text``."""
        if is_dataset(name):
            show_bars(self._args.bars)
        return load_text(name, getattr(self._args, "text_column", "text"), getattr(self._args, "documents", None))


def show_bars(wanted: bool) -> None:
    """Set if the library `datasets` draws bars while it loads and prepares files, in this process."""
    if not missing("datasets"):
        import datasets

        (datasets.enable_progress_bars if wanted else datasets.disable_progress_bars)()


def digest_to_learn(text: Source) -> str:
    """Of what a run may learn from, whatever its seed and its windows."""
    return digest_of_bytes(text["calibration"].encode()).hex()


def evaluation_parts(args: argparse.Namespace, texts: Mapping[str, Source], split: str) -> dict[str, tuple[str, int]]:
    """By name of each text of ``--data`` the part to evaluate, and how many windows of it, as ``shared_out`` says.

    Args:
        texts: those of ``--data``.
        split: "test" or "validation".
    """
    sources = texts_of(args.data)
    counts = shared_out(sources, args.eval_windows)
    return {name: (texts[name][split], count) for (name, _), count in zip(sources, counts, strict=True)}


def evaluation_windows(
    args: argparse.Namespace, parts: Mapping[str, tuple[str, int]], split: str, model: torch.nn.Module, tokenizer
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
