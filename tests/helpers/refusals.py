"""What is refused on several ranks, each in one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

# By name: (what is refused, how the line begins that tells it)
Refused = Mapping[str, tuple[Callable[[], object], str]]


def lines_of(refused: Refused) -> dict[str, str]:
    """What each of them is refused with, on this rank."""
    told = {}
    for name, (call, _) in refused.items():
        with pytest.raises(ValueError) as error:
            call()
        told[name] = str(error.value)
    return told


def assert_lines(told: Mapping[str, str], refused: Refused) -> None:
    """That these are the lines, which may be those of another rank."""
    for name, (_, begin) in refused.items():
        assert told[name].removeprefix("rank 1: ").startswith(begin), (name, told[name])
        assert "\n" not in told[name], name
