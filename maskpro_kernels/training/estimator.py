"""What an estimator is to the trainer, the run folder and the command."""

from __future__ import annotations

from ..functional.checks import FLOAT32_MAX


def _check_float(name: str, value: float, low: float, high: float, strict: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__} {value!r}")
    if not low <= value <= high or strict and value == low:
        raise ValueError(f"{name}: expected a float {'above' if strict else 'of at least'} {low:g}"
                         + (f" and at most {high:g}" if high < FLOAT32_MAX else "") + f", got {value}")  # fmt: skip
