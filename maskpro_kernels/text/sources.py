"""Texts for training and evaluation: built-in ones of every Python, text files and datasets."""

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
# Texts in every Python, of different kinds
BUILT_IN = ("stdlib", "pydoc")
# The source of samples from the model itself
SELF = "self"
# Readers of the library `datasets` by file suffix
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
COMPRESSED = (".gz", ".zst")
# Files that `save_to_disk` writes
SAVED = ("dataset_dict.json", "state.json")
# Folders of the standard library that are not to learn from: tests, the text of "pydoc", and tables of characters
NOT_LEARNED = {"test", "tests", "idle_test", "pydoc_data", "encodings"}
BLANK_LINES = re.compile(r"\n\s*\n")
# Characters to report of the library's error, which may list all configurations of a dataset
REASON = 400


def is_path(source: str) -> bool:
    """Return whether a source is an existing path; names of built-in texts and "self" are not."""
    if source in (*BUILT_IN, SELF):
        return False
    try:
        return Path(source).exists()
    except OSError:
        # of a name that is too long
        return False


def is_dataset(source: str) -> bool:
    """Return whether the library `datasets` reads a source: a folder, a JSON or parquet file, or a name on the hub."""
    if source in (*BUILT_IN, SELF):
        return False
    return not is_path(source) or Path(source).is_dir() or _reader(source) is not None


def load_text(source: str, text_column: str = "text", documents: int | None = None) -> dict[str, str]:
    """Load the text of a source, split into "calibration", "validation" and "test".

    Args:
        source: "pydoc" (the topics of the Python documentation that ship with Python), "stdlib" (the source code of
            Python's standard library: its public modules, those in packages for calibration alone), the path of a UTF-8
            text file, or a dataset: a file of JSON lines or parquet, a folder of such files or of ``save_to_disk``, or
            its name on the Hugging Face hub, "name" or "name:config". Datasets need the package ``datasets``. For a
            file with the name pydoc or stdlib write "./pydoc".
        text_column: column of a dataset with its documents.
        documents: number of documents to read of each split of a dataset, as a stream: later ones are not downloaded.
            None: all.

    Returns:
        the texts; blank lines separate the documents of a dataset.

    The pieces of a text (topics or modules sorted by name, paragraphs between blank lines, documents) with index % 5 ==
    0 go to the test text, those with index % 5 == 1 to the validation text, and others to the calibration text. Of
    paragraphs that differ only in white space the first alone is kept. Many topics of the documentation repeat others,
    and a mask could learn the test text by heart. The splits train, validation and test of a dataset stay. If only one
    of validation and test exists, its documents are divided between both in turn; without both the train split is
    divided like a text.

    Raises:
        TypeError: if ``source`` is not a str.
        ValueError: if ``source`` or a split is empty, such as for a file with fewer than three different paragraphs,
            ``source`` is "self", the file is not UTF-8, a dataset has no train split or no such column, ``documents``
            is below 1, or ``datasets`` is not installed.
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
        names = [name for name in sorted(sys.stdlib_module_names) if not name.startswith("_")]
        files = filter(Path.is_file, (folder / f"{name}.py" for name in names))
        in_packages = (path for name in names for path in sorted((folder / name).rglob("*.py")))
        learned = (path for path in in_packages if not NOT_LEARNED.intersection(path.relative_to(folder).parts))
        texts = _split(
            (path.read_text(encoding="utf-8") for path in files), (path.read_text(encoding="utf-8") for path in learned)
        )
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
    """Load unchanged documents, as for a published perplexity; empty ones are documents too.

    Args:
        source: a UTF-8 text file, which is one document; a dataset as for ``load_text``, of which the split test is
            read, or the only split; or "pydoc" or "stdlib", whose test text is one document.
        text_column: column of a dataset with its documents.

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
        raise ValueError(f"source: expected a text, got the empty {source!r}")
    return documents


def _check(source: str) -> None:
    if not isinstance(source, str):
        raise TypeError(f'source: expected a str such as "pydoc", got {type(source).__name__}')
    if not source:
        raise ValueError('source: expected "pydoc", "stdlib", a text file or a dataset, got an empty str')
    if source == SELF:
        raise ValueError(
            f"source: expected a text, got {source!r}, the model's own samples; for a file of this name write "
            f"'./{source}'"
        )


def _split(pieces: Iterable[str], learned: Iterable[str] = ()) -> dict[str, str]:
    """Text of each split, with each paragraph once; pieces without a new paragraph do not count.

    ``learned`` are more pieces of the calibration text.
    """
    seen = set()
    chosen = {split: [] for split in SPLITS}

    def new_text(piece: str) -> str:
        new = []
        for paragraph in BLANK_LINES.split(piece):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                new.append(paragraph)
        return "\n\n".join(new)

    for index, text in enumerate(filter(None, map(new_text, pieces))):
        chosen[{0: "test", 1: "validation"}.get(index % 5, "calibration")].append(text)
    chosen["calibration"] += filter(None, map(new_text, learned))
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
    documents_of = {"calibration": read("train")} | {name: read(name) for name in held_out}
    if len(held_out) == 1:
        alone = documents_of[held_out[0]]
        documents_of |= {"test": alone[::2], "validation": alone[1::2]}
    return {split: "\n\n".join(documents_of[split]) for split in SPLITS}


def _reader(source: str) -> str | None:
    path = Path(source)
    return READERS.get((path.with_suffix("") if path.suffix in COMPRESSED else path).suffix)


def _splits(source: str, stream: bool = False) -> dict[str, Iterable[Mapping]]:
    path = Path(source) if is_path(source) else None
    expected = f'source: expected "pydoc", "stdlib", a text file or a dataset, got {source!r}'
    file_like = Path(source).suffix in (*READERS, *COMPRESSED, ".txt")
    if path is None and (source.startswith((".", "/", "~")) or source.count("/") > 1 or file_like):
        raise ValueError(f"{expected}: no such file or folder; check its name")
    lacking = missing("datasets")
    if lacking:
        raise ValueError(f"{expected}: {'' if path else 'no such file, and '}a dataset needs {lacking}")
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
        # absolute: a relative name could be that of a reader
        return dict(datasets.load_dataset(str(path.resolve()), streaming=stream))


def _documents(source: str, rows: Iterable[Mapping], column: str) -> list[str]:
    """Documents of rows, without null values."""
    columns = ()
    documents = []
    with _reading(source):
        for row in rows:
            columns = columns or sorted(row)
            documents.append(row.get(column))
    if documents and column not in columns:
        raise ValueError(
            f"source: expected a column {column!r} in {source!r}, got the columns {columns}; set one of them as the "
            "text column"
        )
    if kinds := {type(document).__name__ for document in documents} - {"str", "NoneType"}:
        raise ValueError(f"source: expected texts in column {column!r} of {source!r}, got {', '.join(sorted(kinds))}")
    return [document for document in documents if document is not None]


@contextmanager
def _reading(source: str) -> Iterator[None]:
    """Convert errors of the library to errors about the source: an OSError stays one, others become ValueError."""
    try:
        yield
    except Exception as error:
        # the outer error only says that something failed
        inner = error.__cause__ or error
        reason = " ".join(str(inner).split())[:REASON] or f"no rows in it ({type(inner).__name__})"
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"source: expected a dataset that can be read, got {source!r}: {reason}") from error
