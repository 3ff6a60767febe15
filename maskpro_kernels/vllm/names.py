"""Names of layers in the files of a checkpoint, for those in its config."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from itertools import takewhile

from ..hf.quantizer import COPY_AGAIN


def matched(file_names: Iterable[str], config_names: Iterable[str]) -> dict[str, str]:
    """For each name of a layer in the files the name in the config that shares most of its beginning and end.

    Both have the same numbers, of layers and experts, and the same last word.
    """
    by_key: dict[tuple, list[str]] = {}
    for name in config_names:
        by_key.setdefault(_key(name), []).append(name)
    found = {}
    for name in file_names:
        candidates = by_key.get(_key(name), ())
        if not candidates:
            raise ValueError(
                f"checkpoint: expected {name} in the layers of its quantization_config, got none of this name; "
                f"{COPY_AGAIN}, with its config.json"
            )
        found[name] = max(candidates, key=functools.partial(_words_in_common, name))
    layers: dict[str, str] = {}
    for name, layer in found.items():
        if layers.setdefault(layer, name) != name:
            raise ValueError(
                f"checkpoint: expected one layer of the name {layer}, got {layers[layer]} and {name}; {COPY_AGAIN}, "
                "with its config.json"
            )
    return found


def _key(name: str) -> tuple:
    """(numbers, last word)."""
    words = name.split(".")
    return tuple(word for word in words if word.isdigit()), [word for word in words if not word.isdigit()][-1]


def _words_in_common(name: str, other: str) -> int:
    """Number of words with which both names begin, and of those with which both end."""
    words = name.split(".")
    other_words = other.split(".")
    return _beginning(words, other_words) + _beginning(words[::-1], other_words[::-1])


def _beginning(words: list[str], other_words: list[str]) -> int:
    pairs = zip(words, other_words, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
