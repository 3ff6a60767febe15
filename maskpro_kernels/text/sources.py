"""Texts to learn from and to evaluate on: those that every Python has, text files and datasets."""

from __future__ import annotations

import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from itertools import islice
from pathlib import Path

from ..extras import missing

SPLITS = ("calibration", "validation", "test")
# Sources that every Python has, of different kinds
BUILT_IN = ("stdlib", "pydoc")
# The source that is no text: samples that the model draws itself
SELF = "self"
# The reader of the library `datasets` for each ending of a file's name
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
COMPRESSED = (".gz", ".zst")
# Files that `save_to_disk` writes
SAVED = ("dataset_dict.json", "state.json")
BLANK_LINES = re.compile(r"\n\s*\n")
# Characters of the library's error that are reported: it may list all configurations of a dataset
REASON = 400


def is_path(source: str) -> bool:
    """True of a path that exists; names of built-in sources and "self" never are."""
    if source in (*BUILT_IN, SELF):
        return False
    try:
        return Path(source).exists()
    except OSError:
        # such as of a name that is too long
        return False


def is_dataset(source: str) -> bool:
    """True of what the library `datasets` reads: a folder, a JSON or parquet file, or a name on the hub."""
    if source in (*BUILT_IN, SELF):
        return False
    return not is_path(source) or Path(source).is_dir() or _reader(source) is not None


def load_text(source: str, text_column: str = "text", documents: int | None = None) -> dict[str, str]:
    """Load the text of a source, split into "calibration", "validation" and "test".

    Args:
        source: "pydoc" (the topics of the Python documentation that ship with Python), "stdlib" (the source code of
            Python's standard library: its public modules of one file), the path of a UTF-8 text file, or a dataset:
            a file of JSON lines or parquet, a folder of such files or of ``save_to_disk``, or its name on the Hugging
            Face hub, "name" or "name:config". Datasets need the package ``datasets``. A file that is called pydoc or
            stdlib is given as "./pydoc".
        text_column: the column of a dataset that holds its documents.
        documents: how many documents of each split of a dataset are read, as a stream: nothing behind them is
            downloaded. None: all.

    Returns:
        the texts; documents of a dataset stand in them with a blank line between them.

    The pieces of a text (topics or modules sorted by name, paragraphs between blank lines, documents) go to the test
    text where index % 5 == 0, to the validation text where index % 5 == 1, and to the calibration text otherwise. Of
    paragraphs that differ in white space alone only the first is kept: else a mask could learn the test text by heart,
    since many topics of the documentation repeat others. The splits train, validation and test of a dataset stay as
    they are. Where one of the last two is missing, the other is divided, its documents in turn; without both the
    train split is divided as a text is.

    Raises:
        TypeError: if ``source`` is not a str.
        ValueError: if ``source`` or a split is empty, as of a file with fewer than three different paragraphs,
            ``source`` is "self", which is no text, the file is not UTF-8, a dataset has no train split or no such
            column, ``documents`` is below 1, or ``datasets`` is not installed.
        OSError: if the file or dataset cannot be read.
    """
    _check(source)
    if documents is not None and (not isinstance(documents, int) or documents < 1):
        raise ValueError(f"documents: expected an int of at least 1, got {documents!r}")
    if source == "pydoc":
        from pydoc_data.topics import topics

        texts = _split([topics[name] for name in sorted(topics)])
    elif source == "stdlib":
        folder = Path(sysconfig.get_path("stdlib"))
        names = (name for name in sorted(sys.stdlib_module_names) if not name.startswith("_"))
        paths = (folder / f"{name}.py" for name in names)
        texts = _split([path.read_text(encoding="utf-8") for path in paths if path.is_file()])
    elif is_dataset(source):
        texts = _texts_of_dataset(source, text_column, documents)
    else:
        texts = _split(BLANK_LINES.split(_read_utf8(Path(source))))
    for split in SPLITS:
        if not texts[split].strip():
            raise ValueError(
                f"source: expected text in each of {', '.join(SPLITS)}, got an empty {split} text from {source!r}"
            )
    return texts


def load_documents(source: str, text_column: str = "text") -> list[str]:
    """Load the documents on which a published perplexity is measured, as they are; empty ones are documents too.

    Args:
        source: a UTF-8 text file, which is one document; a dataset as for ``load_text``, whose split test is read, or
            the only one that it has; or "pydoc" or "stdlib", whose test text is one document.
        text_column: the column of a dataset that holds its documents.

    Raises:
        TypeError, ValueError, OSError: as ``load_text``; or if there is no text or no split test.
    """
    _check(source)
    if source in BUILT_IN:
        return [load_text(source)["test"]]
    if is_dataset(source):
        splits = _splits(source)
        name = next(iter(splits)) if len(splits) == 1 else "test"
        if name not in splits:
            raise ValueError(f"source: expected a split test, or one split alone, in {source!r}, got {list(splits)}")
        documents = _documents(source, splits[name], text_column)
    else:
        documents = [_read_utf8(Path(source))]
    if not any(document.strip() for document in documents):
        raise ValueError(f"source: expected a text, got none in {source!r}: it is empty")
    return documents


def _check(source: str) -> None:
    if not isinstance(source, str):
        raise TypeError(f'source: expected a str such as "pydoc", got {type(source).__name__}')
    if not source:
        raise ValueError('source: expected "pydoc", "stdlib", a text file or a dataset, got an empty str')
    if source == SELF:
        raise ValueError(
            f"source: expected a text, got {source!r}, the model's own samples; of a file of that name give the path, "
            f"'./{source}'"
        )


def _split(pieces: Iterable[str]) -> dict[str, str]:
    """The text of each split, in which each paragraph occurs once; pieces of which nothing is left do not count."""
    seen, chosen, index = set(), {split: [] for split in SPLITS}, 0
    for piece in pieces:
        new = []
        for paragraph in BLANK_LINES.split(piece):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                new.append(paragraph)
        if new:
            chosen[{0: "test", 1: "validation"}.get(index % 5, "calibration")].append("\n\n".join(new))
            index += 1
    return {split: "\n\n".join(chosen[split]) for split in SPLITS}


def _read_utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"source: expected UTF-8 text in {str(path)!r}, got {error}; convert it to UTF-8") from error


def _texts_of_dataset(source: str, text_column: str, documents: int | None) -> dict[str, str]:
    splits = _splits(source, stream=documents is not None)
    if len(splits) > 1 and "train" not in splits:
        raise ValueError(f"source: expected a split train, or one split alone, in {source!r}, got {list(splits)}")

    def read(split: str) -> list[str]:
        rows = islice(splits[split], documents)
        return [document for document in _documents(source, rows, text_column) if document]

    if len(splits) == 1:
        return _split(read(next(iter(splits))))
    held_out = [name for name in ("validation", "test") if name in splits]
    if not held_out:
        return _split(read("train"))
    parts = {"calibration": read("train")} | {name: read(name) for name in held_out}
    if len(held_out) == 1:
        alone = parts[held_out[0]]
        parts |= {"test": alone[::2], "validation": alone[1::2]}
    return {part: "\n\n".join(parts[part]) for part in SPLITS}


def _reader(source: str) -> str | None:
    path = Path(source)
    return READERS.get((path.with_suffix("") if path.suffix in COMPRESSED else path).suffix)


def _splits(source: str, stream: bool = False) -> dict[str, Iterable[Mapping]]:
    path = Path(source) if is_path(source) else None
    expected = f'source: expected "pydoc", "stdlib", a text file or a dataset, got {source!r}'
    file_like = Path(source).suffix in (*READERS, *COMPRESSED, ".txt")
    if path is None and (source.startswith((".", "/", "~")) or source.count("/") > 1 or file_like):
        raise ValueError(f"{expected}: there is no such file or folder; check its name")
    lacking = missing("datasets")
    if lacking:
        raise ValueError(f"{expected}: {'' if path else 'there is no such file, and '}a dataset needs {lacking}")
    import datasets

    with _reading(source):
        if path is None:
            name, _, config = source.partition(":")
            return dict(datasets.load_dataset(name, config or None, streaming=stream))
        if path.is_file():
            return dict(datasets.load_dataset(_reader(source), data_files=escape(source), streaming=stream))
        if any((path / name).is_file() for name in SAVED):
            saved = datasets.load_from_disk(source)
            return dict(saved) if isinstance(saved, Mapping) else {"train": saved}
        # absolute: a relative name may be that of a reader
        return dict(datasets.load_dataset(str(path.resolve()), streaming=stream))


def _documents(source: str, rows: Iterable[Mapping], column: str) -> list[str]:
    """The documents in rows; those that are null are left out."""
    columns, documents = (), []
    with _reading(source):
        for row in rows:
            columns = columns or sorted(row)
            documents.append(row.get(column))
    if documents and column not in columns:
        raise ValueError(
            f"source: expected a column {column!r} in {source!r}, got the columns {columns}; name one of them as the "
            "text column"
        )
    if others := {type(document).__name__ for document in documents} - {"str", "NoneType"}:
        raise ValueError(f"source: expected texts in column {column!r} of {source!r}, got {', '.join(sorted(others))}")
    return [document for document in documents if document is not None]


@contextmanager
def _reading(source: str) -> Iterator[None]:
    """Errors of the library become errors of the source: an OSError where it is one, else a ValueError."""
    try:
        yield
    except Exception as error:
        # the outer one says no more than that something failed
        inner = error.__cause__ or error
        reason = " ".join(str(inner).split())[:REASON] or f"no rows in it ({type(inner).__name__})"
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"source: expected a dataset that can be read, got {source!r}: {reason}") from error
