"""JSON that is checked as it is read: lines and objects carry digests of their own, so that what changed is told."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping

from .digests import digest_of_bytes

LINE = re.compile(rb'(\{.+), "digest": "([0-9a-f]{32})"\}')
# Of an object: the digests of its other entries, by name
SEALS = "digests"


def load_json(content: str | bytes, pairs: Callable[[list[tuple[str, object]]], object] | None = None) -> object:
    """What JSON holds; ValueError if it is none, or nested deeper than Python reads.

    Args:
        pairs: makes an object of its (name, value); by default a dict, in which the last of a name counts.
    """
    try:
        return json.loads(content, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Of ``load_json`` for what people write: a dict; ValueError where a name comes twice."""
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"expected each name once, got {name!r} twice")
        found[name] = value
    return found


def sealed_line(row: Mapping, run: str) -> bytes:
    """A line of JSON that ends in its digest.

    Args:
        row: at least one entry; JSON can hold it.
        run: the id of the run. In another run the line does not count.
    """
    body = json.dumps(row)[:-1].encode()
    return body + f', "digest": "{_seal_of_line(body, run)}"}}\n'.encode()


def rows_of(content: bytes, run: str) -> tuple[list[dict], int]:
    """(what the sound lines of a run hold, how many lines are damaged, cut short, or of another run)."""
    lines = content.split(b"\n")
    # behind the end of the last line
    if not lines[-1]:
        lines.pop()
    found = map(LINE.fullmatch, lines)
    bodies = [line[1] for line in found if line is not None and line[2].decode() == _seal_of_line(line[1], run)]
    return [json.loads(body + b"}") for body in bodies], len(lines) - len(bodies)


def _seal_of_line(body: bytes, run: str) -> str:
    return digest_of_bytes(run.encode(), b"\n", body).hex()


def sealed(entries: Mapping) -> dict:
    """An object with the digests of its entries; of an entry that is an object itself, those of its entries."""
    return {**entries, SEALS: entry_digests(json.loads(json.dumps(entries)))}


def read_sealed(content: bytes) -> tuple[dict, list[str]]:
    """(what was sealed, the names of entries that have changed since).

    An entry of an entry is called by both names, as in "settings.steps".

    Raises:
        ValueError: if it is no JSON, or has no digests.
    """
    found = load_json(content)
    if not isinstance(found, dict) or not isinstance(found.get(SEALS), dict):
        raise ValueError(f"no {SEALS} of its entries")
    stored, own = found.pop(SEALS), entry_digests(found)
    return found, sorted(name for name in stored.keys() | own.keys() if stored.get(name) != own.get(name))


def entry_digests(entries: Mapping) -> dict[str, str]:
    """The digest of each entry of an object as JSON holds it, by name; of an entry that is an object, of its own."""
    parts = {}
    for name, value in entries.items():
        parts |= {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return {name: digest_of_bytes(json.dumps(value, sort_keys=True).encode()).hex() for name, value in parts.items()}
