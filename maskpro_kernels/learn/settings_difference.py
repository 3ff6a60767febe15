"""What is told where a run has other settings than the trainer that is to go on with it."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping

# Entries of a mapping that are told, and the longest list that is told as it is: digests of batches tell nothing
MOST_ENTRIES, LONGEST = 3, 32

_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = _shown.maxlong = 120
_shown.maxlist = 8


def told_difference(own: object, found: object) -> str:
    """The middle of a sentence, "OWN, got FOUND".

    Args:
        own: a setting of the trainer, as JSON has it.
        found: the other one of the run.

    Returns:
        of mappings the first entries that differ, with both values; of other values both where they are short, and of
        long lists from where on they differ.
    """
    if isinstance(own, Mapping) and isinstance(found, Mapping):
        both = own.keys() & found.keys()
        names = [name for name in {**own, **found} if name not in both or own[name] != found[name]]
        more = len(names) - MOST_ENTRIES
        told = [", ".join(_entry(of, name) for name in names[:MOST_ENTRIES]) for of in (own, found)]
        return ", got ".join(told) + (f"; {more} more differ" if more > 0 else "")
    if isinstance(own, (int, str)) or max(len(repr(own)), len(repr(found))) <= LONGEST:
        return f"{own!r}, got {_shown.repr(found)}"
    if isinstance(own, list) and isinstance(found, list):
        if len(own) != len(found):
            return f"of this trainer, got {len(found)} in place of {len(own)}"
        first = next(index for index, pair in enumerate(zip(own, found, strict=True)) if pair[0] != pair[1])
        return f"of this trainer, got others from index {first} on"
    if isinstance(own, Mapping) or isinstance(found, Mapping):
        return f"{_shown.repr(own)}, got {_shown.repr(found)}"
    return "of this trainer, got others"


def _entry(settings: Mapping, name: str) -> str:
    return f"{name} {_shown.repr(settings[name])}" if name in settings else f"no {name}"
