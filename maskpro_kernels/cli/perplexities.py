"""Test perplexities by method, as a table, and validation perplexities by step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..digests import rows_of, sealed_line
from ..files import write_whole
from ..text.perplexity import perplexity
from .arguments import Told

# Training stops where the validation perplexity is above the initial mask's by this factor at two evaluations in a row
DIVERGED = 1.1


def table_row(
    method: str, model: torch.nn.Module, tests: Mapping[str, torch.Tensor], seconds: float, bars: bool
) -> dict:
    """The perplexity of each test text; seconds from the dense model to the mask."""
    perplexities = {name: perplexity(model, test, progress=bars) for name, test in tests.items()}
    return {"method": method, **perplexities, "seconds": seconds}


def print_table(table: Sequence[Mapping]) -> None:
    """Print the columns that all rows have."""
    width = max(16, *(len(row["method"]) for row in table))
    # from the dense model to each mask: those of the mask that learning started from are in those of the learned one
    columns = {"perplexity": ("test perplexity", 2), "other_perplexity": ("on the other text", 2)}
    columns["seconds"] = ("seconds from dense", 1)
    columns = {name: column for name, column in columns.items() if all(name in row for row in table)}
    print(f"{'method':<{width}}" + "".join(f"  {title}" for title, _ in columns.values()))
    for row in table:
        figures = (f"{row[name]:>{len(title) + 2}.{digits}f}" for name, (title, digits) in columns.items())
        print(f"{row['method']:<{width}}" + "".join(figures))


class ValidationPerplexities:
    """Perplexities of the validation text by step, each written down as soon as it is known.

    Attributes:
        run: the id of the run, known once it has begun or goes on.
        seconds: that evaluations have taken.
    """

    def __init__(
        self, path: Path, model: torch.nn.Module, validation: torch.Tensor, every: int, steps: int, bars: bool
    ):
        self.path, self.model, self.validation, self.every, self.steps = path, model, validation, every, steps
        self.bars, self.run = bars, ""
        self.rows: list[dict] = []
        self.seconds = 0.0

    def read(self) -> None:
        """Take up the rows of another process; ``Told``, a ValueError, where they are damaged."""
        if not self.path.exists():
            return
        rows, damaged = rows_of(self.path.read_bytes(), self.run)
        if damaged or (rows and not math.isfinite(rows[0]["perplexity"])):
            found = f"{damaged} others" if damaged else f"{rows[0]['perplexity']} in the first"
            raise Told(
                f"resume: expected a perplexity of this run in each line of {str(self.path)!r}, got {found}; move the "
                "file away to go on without those of the steps before"
            )
        self.rows = rows

    def restart(self, steps_done: int) -> None:
        """Leave out the rows of steps that are taken again."""
        self.rows = [row for row in self.rows if row["step"] <= steps_done]

    def due(self, step: int) -> bool:
        known = bool(self.rows) and self.rows[-1]["step"] == step
        return not known and (step % self.every == 0 or step >= self.steps)

    def find(self, step: int) -> float:
        """The validation perplexity behind a step.

        Raises:
            FloatingPointError: if the first one, by which the others are judged, is not finite.
        """
        value = perplexity(self.model, self.validation, progress=self.bars)
        if not self.rows and not math.isfinite(value):
            raise FloatingPointError(
                f"validation perplexity at step {step}: expected a finite number, got {value}; take "
                "another --dtype, --init or --data"
            )
        return value

    def add(self, step: int, tokens: int, value: float) -> None:
        """Write down the perplexity behind a step."""
        self.rows.append({"step": step, "tokens": tokens, "perplexity": value})
        write_whole(self.path, b"".join(sealed_line(row, self.run) for row in self.rows))

    def risen(self) -> bool:
        """Whether the last two validation perplexities are NaN or over 10% above the initial mask's."""
        return len(self.rows) > 2 and not any(
            row["perplexity"] <= DIVERGED * self.rows[0]["perplexity"] for row in self.rows[-2:]
        )
