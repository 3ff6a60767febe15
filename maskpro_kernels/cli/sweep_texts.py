"""Texts that have changed since runs of a sweep learned from them."""

from __future__ import annotations

from collections.abc import Mapping

from ..text.data import has_rows, is_path, load_text
from .texts import digest_to_learn


def told_changes(runs: Mapping[str, Mapping]) -> list[str]:
    """A sentence for each text file from which a run would learn other text now.

    Args:
        runs: the figures of those that have finished, by name.
    """
    digests: dict[str, str | None] = {}
    others: dict[str, list[str]] = {}
    for run, found in runs.items():
        # whoever moves a text changes its place in the report by hand
        for source, learned in zip(found["texts"], found["learned_texts"], strict=False):
            if source not in digests:
                digests[source] = _digest_now(source)
            if digests[source] not in (None, learned):
                others.setdefault(source, []).append(run)
    return [
        f"{source!r} has changed since {len(names)} of the finished runs learned from it, such as {names[0]}: they "
        "stay as they are, in rows or tables of their own; give another --output to learn all from what it is now"
        for source, names in others.items()
    ]


def _digest_now(source: str) -> str | None:
    """Of a text file; None of what is no such file any more, and of a dataset, which may take minutes to read."""
    try:
        return digest_to_learn(load_text(source)) if is_path(source) and not has_rows(source) else None
    except (OSError, ValueError):
        return None
