"""Text for calibration and evaluation: sources, token windows, batches."""

from __future__ import annotations

import errno
import hashlib
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from .records import COLUMNS, Chat, Document, check_columns, documents, holds_rows, load_rows, token_ids, words_of

# A text, or chats that a tokenizer makes text of
Text = str | list[Chat]

SPLITS = ("calibration", "validation", "test")
# Sources that every Python has, of different kinds
BUILT_IN = ("stdlib", "pydoc")
BLANK_LINES = re.compile(r"\n\s*\n")
# The source that is no text: what the model writes itself
SELF = "self"


class TooFewTokens(ValueError):
    """A text that is too short for what is wanted of it."""


def is_path(source: str) -> bool:
    """Whether a source is a path that exists; a name with a meaning of its own is none, whatever files there are."""
    if source in (*BUILT_IN, SELF):
        return False
    try:
        return Path(source).exists()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


def has_rows(source: str) -> bool:
    """Whether a source is read by rows, which have columns: a dataset on the hub or in files, but no text file."""
    return source not in (*BUILT_IN, SELF) and (not is_path(source) or holds_rows(Path(source)))


def load_text(source: str, text_column: str = COLUMNS, tell: Callable[[str], object] | None = None) -> dict[str, Text]:
    """Text of a source, split into "calibration", "validation" and "test".

    Args:
        source: "pydoc" (the topics of the Python documentation that ship with Python), "stdlib" (the source code of
            Python's standard library: its public modules of one file), the path of a UTF-8 text file, or a dataset:
            a file of JSON lines or parquet, a folder of such files or of ``save_to_disk``, or its name on the Hugging
            Face hub, "name" or "name:config". Datasets need the package ``datasets``. A file that is called pydoc or
            stdlib goes by "./pydoc".
        text_column: of a dataset, names with a comma between them; the first that is there holds its documents, texts
            or chats. A chat is a list of messages, mappings with role and content.
        tell: called with a sentence on what was left out of a file or a dataset, and on what its parts are.

    Returns:
        the texts. Documents of a dataset stand in them with a blank line between them; but chats in a list, for
        ``windows`` to make text of by the tokenizer's chat template.

    A text's pieces (topics or modules sorted by name, paragraphs between blank lines, documents) go to the test text
    where index % 5 == 0, to the validation text where index % 5 == 1, and to the calibration text otherwise. Of
    paragraphs that are alike but for white space only the first is taken, and of equal chats: else a mask could learn
    the test text by heart, as of the topics of the documentation many repeat others. The train, validation and test
    splits of a dataset stay as they are. Where one of the last two is missing, the other is divided, a document in
    turn; without both the train split is, as a text is.

    Raises:
        TypeError: if ``source`` or ``text_column`` is not a str.
        ValueError: if ``source`` or a split is empty, ``source`` is "self", which is no text, the file is not UTF-8,
            a dataset lacks a train split or the columns, or ``datasets`` is not installed.
        OSError: if the file or dataset cannot be read.
    """
    check_source(source)
    tell = tell or (lambda sentence: None)
    check_columns(text_column)
    if source == "pydoc":
        texts, _ = _split(_pydoc_topics())
    elif source == "stdlib":
        texts, _ = _split(_stdlib_modules())
    elif has_rows(source):
        texts = _texts_of_rows(source, text_column, tell)
    else:
        texts, repeats = _split(_paragraphs(Path(source)))
        _tell_repeats(source, texts, repeats, tell)
    for split in SPLITS:
        if not (texts[split].strip() if isinstance(texts[split], str) else texts[split]):
            raise ValueError(
                f"source: expected text in each of {', '.join(SPLITS)}, got an empty {split} text from {source!r}"
            )
    return texts


def check_source(source: str) -> None:
    """Raise TypeError or ValueError unless it can be the name of a text."""
    if not isinstance(source, str):
        raise TypeError(f'source: expected a str such as "pydoc", got {type(source).__name__}')
    if not source:
        raise ValueError('source: expected "pydoc", "stdlib", a text file or a dataset, got an empty str')
    if source == SELF:
        raise ValueError(
            f"source: expected a text, got {source!r}, the model's own samples; of a file of that name give the path, "
            f"'./{source}'"
        )


def windows(text: Text, tokenizer: Callable, length: int) -> torch.Tensor:
    """Token ids of a text cut into windows that do not overlap; the remainder is dropped.

    Args:
        text: the text, or chats, which stand one behind the other by the tokenizer's chat template.
        tokenizer: a Hugging Face tokenizer.
        length: tokens in a window, at least 2.

    Returns:
        int64 tensor [windows, length].

    Raises:
        ValueError: if ``length`` is below 2, the text has fewer than ``length`` tokens, or the tokenizer has no chat
            template for chats.
    """
    check_length(length)
    return cut(tokens_of(text, tokenizer), length)


def check_length(length: int) -> None:
    """Raise ValueError unless windows can have that many tokens."""
    if length < 2:
        raise ValueError(f"length: expected at least 2 tokens, got {length}")


def tokens_of(text: Text, tokenizer: Callable) -> torch.Tensor:
    """int64 [tokens] of a text, or of chats one behind the other; ValueError if the tokenizer cannot take chats."""
    documents = [text] if isinstance(text, str) else text
    return torch.tensor(
        [token for document in documents for token in token_ids(document, tokenizer)], dtype=torch.int64
    )


def cut(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """int64 [windows, length] of tokens, without the remainder; TooFewTokens, a ValueError, without one window."""
    if len(tokens) < length:
        raise TooFewTokens(f"text: expected at least {length} tokens for one window, got {len(tokens)}")
    return tokens[: len(tokens) // length * length].view(-1, length)


def check_vocabulary(windows: torch.Tensor, vocabulary: int) -> None:
    """Raise ValueError if a model that knows that many tokens does not know one of these."""
    if int(windows.max()) >= vocabulary:
        raise ValueError(
            f"model: expected tokens below {vocabulary}, the size of its vocabulary, got {int(windows.max())} of its "
            "tokenizer, which is of another model; put the model's own beside it"
        )


def batches(windows: torch.Tensor, batch_size: int, seed: int) -> list[torch.Tensor]:
    """Full batches of windows, shuffled once; the remainder is dropped.

    Args:
        windows: [windows, length].
        batch_size: windows in a batch.
        seed: of the shuffle; the same seed gives the same batches on every device.

    Returns:
        list of tensors [batch_size, length].

    Raises:
        ValueError: if ``batch_size`` is below 1 or above the number of windows.
    """
    if not 1 <= batch_size <= len(windows):
        raise ValueError(f"batch_size: expected 1 to {len(windows)}, the number of windows, got {batch_size}")
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    full = len(windows) // batch_size
    return list(windows[order[: full * batch_size].to(windows.device)].split(batch_size))


def generator_of(what: str, seed: int, index: int) -> torch.Generator:
    """That of one of many things which are drawn with one seed, each independently of what was drawn before."""
    mixed = hashlib.blake2b(f"{what} {seed} {index}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed, "little"))


def _split(pieces: Sequence[Document]) -> tuple[dict[str, Text], int]:
    """(text of each part, how many paragraphs or chats were left out as repeats of others)."""
    kept, repeats = _without_repeats(pieces)
    chosen = {split: [] for split in SPLITS}
    for index, piece in enumerate(kept):
        chosen[{0: "test", 1: "validation"}.get(index % 5, "calibration")].append(piece)
    return {split: joined(chosen[split]) for split in SPLITS}, repeats


def joined(documents: list[Document]) -> Text:
    """Texts with a blank line between them; chats stay as they are."""
    return "\n\n".join(documents) if all(isinstance(document, str) for document in documents) else documents


def _without_repeats(pieces: Iterable[Document]) -> tuple[list[Document], int]:
    """(pieces of which each paragraph occurs once, without those of which nothing is left; how many were left out)."""
    seen, kept, repeats = set(), [], 0
    for piece in pieces:
        new = []
        for paragraph in BLANK_LINES.split(piece) if isinstance(piece, str) else [piece]:
            words = words_of(paragraph)
            if not words or words in seen:
                repeats += bool(words)
                continue
            seen.add(words)
            new.append(paragraph)
        if new:
            kept.append("\n\n".join(new) if isinstance(piece, str) else piece)
    return kept, repeats


def _tell_repeats(source: str, texts: dict[str, Text], repeats: int, tell: Callable[[str], object]) -> None:
    if repeats:
        what = "paragraph" if isinstance(texts["test"], str) else "chat"
        they = f"{what} repeats another one and is" if repeats == 1 else f"{what}s repeat others and are"
        tell(f"{repeats} {they} left out of {source!r}")


def _pydoc_topics() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _stdlib_modules() -> list[str]:
    folder = Path(sysconfig.get_path("stdlib"))
    names = (name for name in sorted(sys.stdlib_module_names) if not name.startswith("_"))
    return [path.read_text(encoding="utf-8") for name in names if (path := folder / f"{name}.py").is_file()]


def read_utf8(path: Path) -> str:
    """The text of a file; ValueError or OSError unless it is UTF-8 and can be read."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"source: expected UTF-8 text in {str(path)!r}, got {error}; convert it to UTF-8") from error


def _paragraphs(path: Path) -> list[str]:
    pieces = BLANK_LINES.split(read_utf8(path))
    different = len(_without_repeats(pieces)[0])
    # Below three paragraphs the rule leaves no calibration text.
    if different < len(SPLITS):
        raise ValueError(
            f"source: expected at least {len(SPLITS)} different paragraphs separated by blank lines in {str(path)!r}, "
            f"got {different}" + ("" if different else " (the text is empty)")
        )
    return pieces


def _texts_of_rows(source: str, text_column: str, tell: Callable[[str], object]) -> dict[str, Text]:
    """Those of a dataset, whose parts are told."""
    splits = load_rows(source, Path(source) if is_path(source) else None)
    train, held = held_out(source, splits)
    tell(told_parts(source, train, held))

    def read(split: str) -> list[Document]:
        return list(documents(source, splits[split], text_column))

    if not held:
        texts, repeats = _split(read(train))
        _tell_repeats(source, texts, repeats, tell)
        return texts
    found = {split: read(split) for split in held}
    parts = {"calibration": read(train)}
    if len(held) == 1:
        parts |= {"test": found[held[0]][::2], "validation": found[held[0]][1::2]}
    else:
        parts |= found
    return {part: joined(parts[part]) for part in SPLITS}


def held_out(source: str, splits: Iterable[str]) -> tuple[str, list[str]]:
    """(the split to learn from, those of validation and test that there are); ValueError if there is none."""
    names = list(splits)
    if len(names) == 1:
        return names[0], []
    if "train" not in names:
        raise ValueError(f"source: expected a split train, or one split alone, in {source!r}, got {names}")
    return "train", [name for name in ("validation", "test") if name in names]


def told_parts(source: str, train: str, held: list[str]) -> str:
    """A sentence on what a dataset's validation and test text are."""
    if len(held) == 2:
        return f"validation and test text of {source!r} are its splits validation and test"
    if held:
        return f"validation and test text of {source!r} are its split {held[0]}, every other document each"
    return f"validation and test text of {source!r} are documents of its split {train} that are not learned from"
