"""Cases of a test of which some are slow."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest


def cases(rows: Iterable[tuple], slow: Callable[..., bool]) -> list:
    """For ``parametrize``: rows of arguments, those marked slow for which ``slow(*row)`` holds."""
    return [pytest.param(*row, marks=[pytest.mark.slow] if slow(*row) else []) for row in rows]


def slow(*arguments):
    """For ``parametrize``: a case that the ordinary suite leaves out, since others test the same behaviour."""
    return pytest.param(*arguments, marks=pytest.mark.slow)
