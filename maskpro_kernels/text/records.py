"""Documents in rows: JSON lines, parquet, folders of ``save_to_disk``, the hub, as the ``datasets`` library reads them.

A document is a text, or a chat: a list of messages, which the tokenizer's chat template makes a text of.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from itertools import islice
from pathlib import Path

from ..extras import missing
from ..files import can_only_be_a_path

Chat = list[dict]
Document = str | Chat

# The columns that are documents where nothing else is said, the first of them that there is
COLUMNS = "text,messages"
# How the files are read whose names end so
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
# Files of `save_to_disk`
SAVED = ("dataset_dict.json", "state.json")
# Rows of a part of what `save_to_disk` has written, and how many parts there are at most
PART, MOST_PARTS = 1000, 1024
# Rows that are read together
TOGETHER = 64
# Of an error of the library, which may tell all configurations that there are
TOLD = 400


def holds_rows(path: Path) -> bool:
    """Whether what lies at a path is read by rows: a folder, or a file whose name ends as those of ``READERS``."""
    return path.is_dir() or _reader(path) is not None


def _reader(path: Path) -> str | None:
    inner = path.with_suffix("") if path.suffix in COMPRESSED else path
    reader = READERS.get(inner.suffix)
    return None if inner is not path and reader == "parquet" else reader


def load_rows(source: str, path: Path | None, stream: bool = False) -> dict[str, Iterable[Mapping]]:
    """The splits of a dataset by name, each a ``Dataset``, or where they are streamed an ``IterableDataset``.

    Args:
        source: a path, or "name" or "name:config" on the hub.
        path: the path, where it is one.
        stream: whether rows are read when they are asked for, and never held together.

    Raises:
        ValueError: if ``datasets`` is not installed, or cannot read the source.
        OSError: if the source is not there, or its files cannot be read.
    """
    told = f'source: expected "pydoc", "stdlib", a text file or a dataset, got {source!r}'
    if path is None and names_a_file(source):
        raise ValueError(f"{told}: there is no such file or folder; check its name")
    lacking = missing("datasets")
    if lacking:
        raise ValueError(f"{told}: {'' if path else 'there is no such file, and '}a dataset needs {lacking}")
    with _reading(source), _only_errors_raised():
        return _loaded(source, path, stream)


def names_a_file(source: str) -> bool:
    """Whether what is no path that exists can be nothing else; on the hub are "name" and "owner/name"."""
    known = (*READERS, *COMPRESSED, ".txt")
    return can_only_be_a_path(source) or Path(source).suffix in known


def _loaded(source: str, path: Path | None, stream: bool) -> dict:
    import datasets

    if path is None:
        name, _, config = source.partition(":")
        return dict(datasets.load_dataset(name, config or None, streaming=stream))
    if path.is_file():
        return dict(datasets.load_dataset(_reader(path), data_files=escape(str(path)), streaming=stream))
    if not any((path / name).is_file() for name in SAVED):
        # absolute: a relative name may be that of a reader
        return dict(datasets.load_dataset(str(path.resolve()), streaming=stream))
    saved = datasets.load_from_disk(str(path))
    splits = dict(saved) if isinstance(saved, Mapping) else {"train": saved}
    if not stream:
        return splits
    # by parts, whose order is shuffled as well as what is in them
    return {name: rows.to_iterable_dataset(min(len(rows) // PART + 1, MOST_PARTS)) for name, rows in splits.items()}


@contextmanager
def _reading(source: str, kind: type[Exception] = ValueError) -> Iterator[None]:
    """What the library raises is told as an error of the source: OSError where it is one, else of that kind."""
    try:
        yield
    except Exception as error:
        # the outer one says no more than that something failed
        inner = error.__cause__ or error
        reason = " ".join(str(inner).split())[:TOLD] or f"no rows in it ({type(inner).__name__})"
        told = f"source: expected a dataset that can be read, got {source!r}: {reason}"
        raise (OSError if isinstance(error, OSError) else kind)(told) from error


@contextmanager
def _only_errors_raised() -> Iterator[None]:
    """Without the library's log, which tells errors that are raised as well."""
    import datasets

    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)


def show_bars(wanted: bool) -> None:
    """Whether the library draws bars while it loads and prepares files, in this process."""
    import datasets

    (datasets.enable_progress_bars if wanted else datasets.disable_progress_bars)()


def check_columns(columns: str) -> list[str]:
    """The names in a list of columns with commas between them.

    Raises:
        TypeError, ValueError: if it is no str, or a name in it is empty or comes twice.
    """
    if not isinstance(columns, str):
        raise TypeError(f'text_column: expected a str such as "text", got {type(columns).__name__}')
    names = [name.strip() for name in columns.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(f"text_column: expected names with a comma between them, each once, got {columns!r}")
    return names


def documents(source: str, rows: Iterable[Mapping], columns: str, empty: bool = False) -> Iterator[Document]:
    """The documents in rows, one after the other; rows whose document is null are passed over.

    Args:
        source: whose rows they are, for errors.
        rows: mappings by column.
        columns: names with commas between them; the first of these that there is holds the documents.
        empty: whether empty texts are documents too; else they are passed over.

    Raises:
        ValueError: if no column is there, the error lists those that are, or one holds neither texts nor chats.
        OSError: if the rows cannot be read.
    """
    names, column = check_columns(columns), None
    for index, row in enumerate(_read(source, rows)):
        if column is None:
            column = next((name for name in names if name in row), None)
        if column is None:
            raise ValueError(
                f"source: expected a column {' or '.join(map(repr, names))} in {source!r}, got the columns "
                f"{sorted(row)}; name one of them as the text column"
            )
        value = row.get(column)
        if value or (empty and value == ""):
            yield value if isinstance(value, str) else _chat(value, f"row {index} of column {column!r} of {source!r}")


def _read(source: str, rows: Iterable[Mapping]) -> Iterator[Mapping]:
    """The rows; what fails while they are read is told as an error of the source."""
    iterator, failed = iter(rows), None
    while failed is None:
        chunk: list[Mapping] = []
        try:
            # some together: to silence the library costs more than to read a row
            with _reading(source, OSError), _only_errors_raised():
                for row in islice(iterator, TOGETHER):
                    chunk.append(row)
        except OSError as error:
            failed = error
        yield from chunk
        if failed is None and len(chunk) < TOGETHER:
            return
    raise failed


def _chat(value: object, where: str) -> Chat:
    """A chat as it was written: keys that other messages alone have are null in the rows of a table."""
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise ValueError(f"source: expected a text or a list of messages, got {type(value).__name__} in {where}")
    for message in value:
        if "role" not in message or "content" not in message:
            keys = list(message)
            raise ValueError(f"source: expected messages with role and content, got one with {keys} in {where}")
    always = ("role", "content")
    return [{key: part for key, part in message.items() if part is not None or key in always} for message in value]


def words_of(document: Document | dict) -> str:
    """What makes two documents, paragraphs or messages the same: their words, whatever stands between them."""
    return " ".join(document.split()) if isinstance(document, str) else json.dumps(document, sort_keys=True)


def token_ids(document: Document, tokenizer: Callable) -> list[int]:
    """The tokens of a document, of a chat those of its text by the tokenizer's chat template.

    Raises:
        ValueError: if there is no chat template, or it refuses the chat.
    """
    # verbose=False silences the warning that the text is longer than the model's context.
    if isinstance(document, str):
        return tokenizer(document, verbose=False)["input_ids"]
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "tokenizer: expected one with a chat template, since the documents are chats, got one without; take the "
            "tokenizer of a chat model, or a column of texts"
        )
    try:
        text = tokenizer.apply_chat_template(document, tokenize=False)
    except Exception as error:
        # jinja's errors, and whatever a template raises
        raise ValueError(f"tokenizer: expected a chat that its template takes, got: {error}") from error
    # which the template writes itself
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
