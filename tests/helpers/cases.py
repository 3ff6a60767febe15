"""Cases of a test of which some are slow."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest


def cases(rows: Iterable[tuple], slow: Callable[..., bool]) -> list:
    """For ``parametrize``: rows of arguments, those marked slow for which ``slow(*row)`` holds."""
    return [pytest.param(*row, marks=[pytest.mark.slow] if slow(*row) else []) for row in rows]
