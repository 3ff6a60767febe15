"""Numbers of bytes that tell how they came about."""

from __future__ import annotations


class Amount(int):
    """Bytes, as an int with the formula that they follow from: numbers with words behind them, x, +, - and brackets.

    The sum of two is another one.

    Attributes:
        formula: gives the number.
    """

    formula: str

    def __new__(cls, size: int, formula: str | None = None) -> Amount:
        amount = super().__new__(cls, size)
        amount.formula = f"{size:,} bytes" if formula is None else formula
        return amount

    @classmethod
    def of(cls, count: int, what: str, each: int) -> Amount:
        """``count`` times as many bytes as ``each``."""
        return cls(count * each, f"{count:,} {what} x {each} byte{'s' if each > 1 else ''}")

    def __add__(self, other: int) -> Amount:
        parts = [formula_of(amount) for amount in (self, other) if amount]
        return Amount(int(self) + int(other), " + ".join(parts) or self.formula)

    def __radd__(self, other: int) -> Amount:
        return Amount(other) + self


NOTHING = Amount(0)


def formula_of(size: int) -> str:
    """The formula of an amount; of another int the number alone."""
    return size.formula if isinstance(size, Amount) else f"{size:,} bytes"
