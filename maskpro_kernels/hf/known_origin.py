"""What is known of the origin of a checkpoint, from the card in its folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import ModelCard

from .model_card import BEFORE_ROUNDING, CARD, DENSE, MASK_ALONE, MASK_ALONE_ROUNDED, OWN, Origin, is_own

BASE = re.compile(r"This is (?:\[(?P<hub>[^\]]+)\]\(|`(?P<local>[^`]+)`)")


def known_origin(folder: str | Path) -> Origin | None:
    """What a card tells that ``write_card`` has written; of another card its base model; None where that is nothing.

    The patterns are left out: the model itself tells them.
    """
    try:
        text = (Path(folder) / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    if not is_own(text):
        return _of_metadata(text)
    first, *others = re.split(r"\n## (.+)\n", text[: OWN.search(text).start()])
    sections = dict(zip(others[::2], others[1::2], strict=True))
    # metadata, title, base model, what became of its weights, how they are stored
    _, _, base, *changed, _ = first.strip().split("\n\n")
    named = BASE.match(base)
    table, texts = _table(sections.get("Perplexity", ""))
    changed = "\n\n".join(changed)
    return Origin(
        base_model=None if named is None else named["hub"] or named["local"],
        on_hub=named is not None and named["hub"] is not None,
        changed=changed.replace(MASK_ALONE_ROUNDED, MASK_ALONE) or None,
        rounded=MASK_ALONE_ROUNDED in changed or BEFORE_ROUNDING in sections.get("Perplexity", ""),
        table=table,
        texts=texts,
        settings=dict(_rows(sections.get("Settings", ""))),
        versions=dict(_rows(sections.get("Versions", ""))),
    )


def _of_metadata(text: str) -> Origin | None:
    try:
        base = ModelCard(text, ignore_metadata_errors=True).data.base_model
    except Exception:
        # metadata that is no YAML, or none of a card
        return None
    if isinstance(base, list) and len(base) == 1:
        (base,) = base
    return Origin(base_model=base, on_hub=True) if isinstance(base, str) else None


def _rows(section: str) -> Iterator[list[str]]:
    """The cells of each row of a table of Markdown, below its head."""
    lines = [line for line in section.splitlines() if line.startswith("|")]
    for line in lines[2:]:
        yield [cell.replace("\\|", "|") for cell in line.removeprefix("| ").removesuffix(" |").split(" | ")]


def _table(section: str) -> tuple[list[dict], tuple[str, ...]]:
    """(rows of perplexities, the names of their texts)."""
    head = next((line for line in section.splitlines() if line.startswith("|")), None)
    if head is None:
        return [], Origin().texts
    texts = head.removeprefix("| ").removesuffix(" |").split(" | ")[1:]
    names = ("method", "perplexity", "other_perplexity")
    rows = []
    for method, *found in _rows(section):
        cells = ["dense" if method == DENSE else method, *map(float, found)]
        rows.append(dict(zip(names, cells, strict=False)))
    return rows, tuple(texts)
