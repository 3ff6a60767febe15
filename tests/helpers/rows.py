"""Files of rows: what tests of data sets read."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path

from helpers.tiny_llama import WORDS

# A word for a role, for what the tiny tokenizer knows
CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"


def words(count: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def texts(count: int = 40, length: int = 60, column: str = "text", seed: int = 0) -> list[dict[str, str]]:
    return [{column: words(length, seed * 1000 + index)} for index in range(count)]


def chats(count: int = 40, length: int = 30, column: str = "messages") -> list[dict[str, list]]:
    def chat(index: int) -> list[dict[str, str]]:
        roles = {"w0": words(length, index), "w1": words(length, 1000 + index)}
        return [{"role": role, "content": content} for role, content in roles.items()]

    return [{column: chat(index)} for index in range(count)]


def write_jsonl(path: Path, rows: Iterable[Mapping]) -> Path:
    """Write JSON lines, compressed where the name says so."""
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path
