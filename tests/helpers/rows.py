"""Files of rows: what tests of datasets read."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path

from helpers.tiny_llama import WORDS


def words(count: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def texts(count: int = 40, length: int = 60, column: str = "text", seed: int = 0) -> list[dict[str, str]]:
    return [{column: words(length, seed * 1000 + index)} for index in range(count)]


def write_jsonl(path: Path, rows: Iterable[Mapping]) -> Path:
    """Write JSON lines, compressed where the name says so."""
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def written(path: Path, rows: list[dict]) -> Path:
    """Write a dataset in the form of its name: a file, or a folder of files or of `save_to_disk`; return its path."""
    import datasets

    table = datasets.Dataset.from_list(rows)
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.name == "saved":
        table.save_to_disk(path)
    elif path.name == "saved splits":
        datasets.DatasetDict({"train": table}).save_to_disk(path)
    elif not path.suffix:
        half = len(rows) // 2
        write_jsonl(path / "one.jsonl", rows[:half])
        write_jsonl(path / "two.jsonl", rows[half:])
    else:
        write_jsonl(path, rows)
    return path
