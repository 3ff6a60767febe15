"""Checks of the numbers that estimators and the trainer take."""

from __future__ import annotations

from ..functional.checks import FLOAT32_MAX


def check_float(name: str, value: float, low: float, high: float = FLOAT32_MAX, strict: bool = False) -> None:
    """Raise unless ``value`` lies in [low, high], or with ``strict`` above ``low``.

    Raises:
        TypeError: if it is no number.
        ValueError: if it lies elsewhere.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__} {value!r}")
    if not low <= value <= high or strict and value == low:
        least, most = "above" if strict else "of at least", f" and at most {high:g}" if high < FLOAT32_MAX else ""
        raise ValueError(f"{name}: expected a float {least} {low:g}{most}, got {value}")


def check_whole(name: str, value: int, low: int, high: int | None = None) -> None:
    """Raise unless ``value`` is an int of at least ``low``, and at most ``high`` where one is given.

    Raises:
        TypeError: if it is no int.
        ValueError: if it lies elsewhere.
    """
    expected = f"of at least {low}" if high is None else f"in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int {expected}, got {type(value).__name__} {value!r}")
    if value < low or high is not None and value > high:
        raise ValueError(f"{name}: expected an int {expected}, got {value}")
