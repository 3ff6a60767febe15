"""Windows of documents that are read as they are asked for: the way the field takes calibration samples of c4."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from .data import (
    Text,
    check_length,
    check_source,
    check_vocabulary,
    generator_of,
    has_rows,
    held_out,
    is_path,
    joined,
    told_parts,
)
from .mixture import Source, in_rounds, turn_by_turn
from .records import COLUMNS, Document, check_columns, documents, load_rows, token_ids, words_of

# Documents that are shuffled together; the parts of a dataset are shuffled as well
BUFFER = 10_000
# Documents in a row that may be too short for a window
MOST_SHORT = 100_000
# Where no split is held out, one document in so many is test text, and another one validation text
ONE_IN = 10


class StreamedText:
    """A dataset whose documents are read when they are asked for, and never held together.

    Test and validation text are the splits of these names. Where one is missing, the other is divided, a document in
    turn. Without both, a document of the train split belongs to a part by a digest of its words: one tenth each is test
    and validation text. So equal documents are of one part.

    Args:
        source: a dataset, as for ``data.load_text``.
        text_column: as there.
        tell: called with a sentence on what the parts are.

    Raises:
        TypeError, ValueError, OSError: as ``data.load_text``; or if ``source`` is none that has rows.
    """

    def __init__(self, source: str, text_column: str = COLUMNS, tell: Callable[[str], object] | None = None):
        check_source(source)
        check_columns(text_column)
        if not has_rows(source):
            raise ValueError(f"source: expected a dataset to stream, got {source!r}, which is read as a whole")
        self.source, self.text_column = source, text_column
        self._splits = load_rows(source, Path(source) if is_path(source) else None, stream=True)
        self._train, self._held = held_out(source, self._splits)
        for split in (self._train, *self._held):
            # its columns are told now, not in the middle of a run
            if next(self._read(split), None) is None:
                raise ValueError(f"source: expected documents in each split, got none in {split} of {source!r}")
        if tell is not None:
            tell(told_parts(source, self._train, self._held))

    def _read(self, split: str) -> Iterator[Document]:
        return documents(self.source, self._splits[split], self.text_column)

    def part(self, part: str) -> Iterator[Document]:
        """The documents of the "test" or "validation" text, in their order."""
        if len(self._held) == 2:
            return self._read(part)
        if self._held:
            return itertools.islice(self._read(self._held[0]), part == "validation", None, 2)
        return (document for document in self._read(self._train) if _part_of(document) == part)

    def head(self, part: str, tokenizer: Callable, tokens: int) -> Text:
        """The first documents of a part, which have that many tokens together; all where they have fewer."""
        found, count = [], 0
        for document in self.part(part):
            found.append(document)
            # without the beginning of text, which a tokenizer puts in front of each alone
            count += len(token_ids(document, tokenizer)) - 1
            if count >= tokens:
                break
        if not found:
            raise ValueError(
                f"source: expected {part} text in {self.source!r}, got no document for it; a dataset as small as this "
                "is better not streamed"
            )
        return joined(found)

    def shuffled(self, seed: int, epoch: int) -> Iterator[Document]:
        """The documents to learn from, in an order of the seed and of how often they have been gone through before."""
        seed = generator_of("documents", seed, epoch).initial_seed()
        rows = self._splits[self._train].shuffle(seed=seed, buffer_size=BUFFER)
        found = documents(self.source, rows, self.text_column)
        return found if self._held else (document for document in found if _part_of(document) == "calibration")


def _part_of(document: Document) -> str:
    number = int.from_bytes(hashlib.blake2b(words_of(document).encode(), digest_size=8).digest(), "little")
    return {0: "test", 1: "validation"}.get(number % ONE_IN, "calibration")


class StreamedWindows(Iterable):
    """Windows of tokens without an end: one at a random place of each document that is long enough, in shuffled order.

    So SparseGPT and Wanda sample c4. A document with fewer tokens than a window is passed over, and one with fewer
    bytes than that without a look at its tokens. Behind the last document they come again, in another order
    and by other windows. Whoever iterates anew gets the same windows.

    Args:
        text: whose documents.
        tokenizer: a Hugging Face tokenizer.
        length: tokens in a window, at least 2.
        seed: of the order and of the places.
        vocabulary: tokens that the model knows; None: any.

    Attributes:
        read: documents that were read since the iteration began.
        short: those of them that were too short.

    Raises:
        ValueError: if ``length`` is below 2; while it goes on, if a document is unfit, or no document, or none of
            100,000 in a row, is long enough.
        OSError: while it goes on, if the documents cannot be read.
    """

    def __init__(self, text: StreamedText, tokenizer: Callable, length: int, seed: int, vocabulary: int | None = None):
        check_length(length)
        self.text, self.tokenizer, self.length, self.seed = text, tokenizer, length, seed
        self.vocabulary = vocabulary
        self.read = self.short = 0

    def __iter__(self) -> Iterator[Tensor]:
        """int64 [length] each."""
        generator = generator_of("places", self.seed, 0)
        self.read = self.short = in_a_row = 0
        for epoch in itertools.count():
            found = False
            for document in self.text.shuffled(self.seed, epoch):
                ids = self._tokens(document)
                self.read += 1
                if len(ids) < self.length:
                    self.short += 1
                    in_a_row += 1
                    if in_a_row == MOST_SHORT:
                        raise self._too_short(f"{MOST_SHORT} in a row are shorter")
                    continue
                found, in_a_row = True, 0
                start = int(torch.randint(len(ids) - self.length + 1, (), generator=generator))
                window = torch.tensor(ids[start : start + self.length], dtype=torch.int64)
                if self.vocabulary is not None:
                    check_vocabulary(window, self.vocabulary)
                yield window
            if not found:
                raise self._too_short(f"all {self.read} are shorter")

    def _tokens(self, document: Document) -> Sequence[int]:
        if isinstance(document, str) and len(document.encode()) < self.length:
            return ()
        return token_ids(document, self.tokenizer)

    def _too_short(self, told: str) -> ValueError:
        return ValueError(
            f"source: expected documents of at least {self.length} tokens to learn from in {self.text.source!r}, but "
            f"{told}; take shorter windows, or do not stream it"
        )


class StreamedBatches(Iterable):
    """Batches without an end, whose windows come from several sources in turn, by their shares.

    Windows that are held come up as in ``MixedBatches``. Whoever iterates anew gets the same batches.

    Args:
        windows: of each source by name: int64 [windows, length], or streamed.
        sources: their shares, see ``parse_sources``.
        batch_size: windows in a batch.
        seed: of the orders of windows that are held.
        device: of the batches.
    """

    def __init__(
        self,
        windows: Mapping[str, Tensor | StreamedWindows],
        sources: Sequence[Source],
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        self._windows = [windows[name] for name, _ in sources]
        self._shares: list[Fraction] = [share for _, share in sources]
        self.batch_size, self.seed, self.device = batch_size, seed, device

    def __iter__(self) -> Iterator[Tensor]:
        """int64 [batch_size, length] each."""
        taken = [
            iter(windows) if isinstance(windows, StreamedWindows) else in_rounds(windows, self.seed, index)
            for index, windows in enumerate(self._windows)
        ]
        whose = turn_by_turn(self._shares)
        while True:
            rows = [next(taken[next(whose)]) for _ in range(self.batch_size)]
            yield torch.stack([row.to(self.device) for row in rows])
