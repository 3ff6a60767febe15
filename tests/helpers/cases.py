"""Cases of tests, some of them slow."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest


def cases(rows: Iterable[tuple], slow: Callable[..., bool]) -> list:
    """For ``parametrize``: rows of arguments, marked slow if ``slow(*row)`` is true."""
    return [pytest.param(*row, marks=[pytest.mark.slow] if slow(*row) else []) for row in rows]


def slow(*arguments):
    """For ``parametrize``: a case that the ordinary suite leaves out, since others test the same behaviour."""
    return pytest.param(*arguments, marks=pytest.mark.slow)
