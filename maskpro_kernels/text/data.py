"""Text for calibration and evaluation: sources, token windows, batches."""

from __future__ import annotations

import errno
import hashlib
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ..extras import missing

SPLITS = ("calibration", "validation", "test")
# Sources that every Python has, of different kinds
BUILT_IN = ("stdlib", "pydoc")
BLANK_LINES = re.compile(r"\n\s*\n")
# The source that is no text: what the model writes itself
SELF = "self"


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


def load_text(source: str) -> dict[str, str]:
    """Text of a source, split into "calibration", "validation" and "test".

    Args:
        source: "pydoc" (the topics of the Python documentation that ship with Python), "stdlib" (the source code of
            Python's standard library: its public modules of one file), the path of a UTF-8 text file, or the name of
            a dataset on the Hugging Face hub, "name" or "name:config" (needs the ``datasets`` package; its train
            split is the calibration text). A file that is called pydoc or stdlib goes by "./pydoc".

    A text's pieces (topics or modules sorted by name, or paragraphs between blank lines) go to the test text where
    index % 5 == 0, to the validation text where index % 5 == 1, and to the calibration text otherwise. Of paragraphs
    that are alike but for white space only the first is taken: else a mask could learn the test text by heart, as of
    the topics of the documentation many repeat others. A dataset's splits stay as they are.

    Raises:
        TypeError: if ``source`` is not a str.
        ValueError: if ``source`` or a split is empty, ``source`` is "self", which is no text, the file is not UTF-8,
            the dataset lacks a split or a text column, or ``datasets`` is not installed.
        OSError: if the file cannot be read.
    """
    if not isinstance(source, str):
        raise TypeError(f'source: expected a str such as "pydoc", got {type(source).__name__}')
    if not source:
        raise ValueError('source: expected "pydoc", "stdlib", a text file or a dataset, got an empty str')
    if source == SELF:
        raise ValueError(
            f"source: expected a text, got {source!r}, the model's own samples; of a file of that name give the path, "
            f"'./{source}'"
        )
    if source == "pydoc":
        texts = _split(_pydoc_topics())
    elif source == "stdlib":
        texts = _split(_stdlib_modules())
    elif is_path(source):
        texts = _split(_paragraphs(Path(source)))
    else:
        texts = _dataset_texts(source)
    for split in SPLITS:
        if not texts[split].strip():
            raise ValueError(
                f"source: expected text in each of {', '.join(SPLITS)}, got an empty {split} text from {source!r}"
            )
    return texts


def windows(text: str, tokenizer: Callable, length: int) -> torch.Tensor:
    """Token ids of a text cut into windows that do not overlap; the remainder is dropped.

    Args:
        text: the text.
        tokenizer: a Hugging Face tokenizer.
        length: tokens in a window, at least 2.

    Returns:
        int64 tensor [windows, length].

    Raises:
        ValueError: if ``length`` is below 2 or the text has fewer than ``length`` tokens.
    """
    if length < 2:
        raise ValueError(f"length: expected at least 2 tokens, got {length}")
    # verbose=False silences the warning that the text is longer than the model's context.
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    if len(ids) < length:
        raise ValueError(f"text: expected at least {length} tokens for one window, got {len(ids)}")
    return ids[: len(ids) // length * length].view(-1, length)


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


def _split(pieces: list[str]) -> dict[str, str]:
    chosen = {split: [] for split in SPLITS}
    for index, piece in enumerate(_without_repeats(pieces)):
        chosen[{0: "test", 1: "validation"}.get(index % 5, "calibration")].append(piece)
    return {split: "\n\n".join(chosen[split]) for split in SPLITS}


def _without_repeats(pieces: Iterable[str]) -> list[str]:
    """Pieces of which each paragraph occurs once; those of which nothing is left are dropped."""
    seen, kept = set(), []
    for piece in pieces:
        new = []
        for paragraph in BLANK_LINES.split(piece):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                new.append(paragraph)
        if new:
            kept.append("\n\n".join(new))
    return kept


def _pydoc_topics() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _stdlib_modules() -> list[str]:
    folder = Path(sysconfig.get_path("stdlib"))
    names = (name for name in sorted(sys.stdlib_module_names) if not name.startswith("_"))
    return [path.read_text(encoding="utf-8") for name in names if (path := folder / f"{name}.py").is_file()]


def _paragraphs(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"source: expected a text file, got the folder {str(path)!r}; give a file in it")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"source: expected UTF-8 text in {str(path)!r}, got {error}; convert it to UTF-8") from error
    pieces = _without_repeats(BLANK_LINES.split(text))
    # Below three paragraphs the rule leaves no calibration text.
    if len(pieces) < len(SPLITS):
        raise ValueError(
            f"source: expected at least {len(SPLITS)} different paragraphs separated by blank lines in {str(path)!r}, "
            f"got {len(pieces)}" + ("" if pieces else " (the text is empty)")
        )
    return pieces


def _dataset_texts(source: str) -> dict[str, str]:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ValueError(
            f'source: expected "pydoc", "stdlib", a text file or a dataset, got {source!r}: there is no such file, and '
            f"a dataset needs {missing('datasets') or error}"
        ) from error
    name, _, config = source.partition(":")
    data = load_dataset(name, config or None)
    texts = {}
    for split, theirs in zip(SPLITS, ("train", "validation", "test"), strict=True):
        if theirs not in data:
            raise ValueError(f"source: expected the splits train, validation and test in {source!r}, got {list(data)}")
        if "text" not in data[theirs].column_names:
            raise ValueError(f'source: expected a column "text" in {source!r}, got {data[theirs].column_names}')
        texts[split] = "\n\n".join(data[theirs]["text"])
    return texts
