"""Calls that are waited for no longer than a limit: nobody else ends them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def begun(function: Callable[[], Result]) -> tuple[threading.Thread, list[Result]]:
    """(a thread in which a function is called, what will hold its result); the end of the process waits for neither."""
    found: list[Result] = []
    thread = threading.Thread(target=lambda: found.append(function()), daemon=True)
    thread.start()
    return thread, found


def in_time(seconds: float, function: Callable[[], Result]) -> Result | None:
    """What a function gives or raises; None where it takes longer, and is left alone."""

    def told() -> tuple[Result | None, BaseException | None]:
        try:
            return function(), None
        except Exception as error:
            return None, error

    thread, found = begun(told)
    thread.join(seconds)
    if not found:
        return None
    ((result, error),) = found
    if error is not None:
        raise error
    return result
