"""Documents of the form of WikiText at the level of documents: headings, and marks with spaces around them."""

from __future__ import annotations

import json
import random
from pathlib import Path

from helpers.tiny_llama import WORDS

MARKS = (" @-@ ", " @,@ ", " , ", " . ", " ; ", " ( w1 ) ", ' " w2 " ', " 's ", " N ", "\n ", " \n\n ", " ° ", " ")


def page(seed: int, words: int) -> str:
    draw = random.Random(seed)
    text = "".join(draw.choice(WORDS) + draw.choice(MARKS) for _ in range(words))
    return f" = {draw.choice(WORDS)} = \n \n {text}\n = = {draw.choice(WORDS)} = = \n "


def pages(count: int = 6) -> list[str]:
    """Documents of different lengths, the first of them no longer than a few words."""
    return [page(seed, 3 + 40 * seed) for seed in range(count)]


def write_pages(path: Path, column: str = "page") -> Path:
    """Write them as JSON lines."""
    path.write_text("".join(json.dumps({column: document}) + "\n" for document in pages()), encoding="utf-8")
    return path
