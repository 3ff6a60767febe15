"""Refusals on several ranks, each in one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

# By name: (what is refused, the beginning of the message)
Refused = Mapping[str, tuple[Callable[[], object], str]]


def lines_of(refused: Refused) -> dict[str, str]:
    """Messages of the refusals on this rank."""
    reported = {}
    for name, (call, _) in refused.items():
        with pytest.raises(ValueError) as error:
            call()
        reported[name] = str(error.value)
    return reported


def assert_lines(reported: Mapping[str, str], refused: Refused) -> None:
    """Assert these messages, perhaps of another rank."""
    for name, (_, begin) in refused.items():
        assert reported[name].removeprefix("rank 1: ").startswith(begin), (name, reported[name])
        assert "\n" not in reported[name], name
