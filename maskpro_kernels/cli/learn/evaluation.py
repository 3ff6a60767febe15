"""Evaluations of a run: the rows of its table, and the validation perplexities between steps."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from ...files import write_record
from ...text.perplexity import perplexity
from ..config import Learn
from ..inputs import FORMAT, Progress, naming, read_progress

VALIDATION = "validation.json"
# Learning stops if the validation perplexity exceeds the initial mask's by this factor twice in a row
DIVERGED = 1.1


def table_row(method: str, model: nn.Module, tests: Mapping[str, Tensor], seconds: float) -> dict:
    """Evaluate a model by test windows: a row of the table, with the seconds from the dense model."""
    figures = {
        name: perplexity(model, test, progress=Progress(f"evaluation of {method}", "window"))
        for name, test in tests.items()
    }
    return {"method": method, **figures, "seconds": seconds}


def name_in_table(method: str, options: Learn, changes: Sequence[str] = ()) -> str:
    """Name of a mask in the table, with changes of the weights and a density."""
    density = [] if options.density is None else [f"density {options.density:g}"]
    return ", ".join([method, *changes, *density])


def changes_of_weights(options: Learn, trained: bool = False) -> list[str]:
    return [f"{options.refit} refitted"] * (options.refit != "none") + ["weights trained"] * trained


class Validation:
    """Validation perplexities of a run, which are stored in ``validation.json``.

    Args:
        windows: of the validation text.
        path: of the file.
        every: number of steps from an evaluation to the next.
        steps: number of steps of the run, whose last one is evaluated too.

    Attributes:
        rows: step, tokens of the steps before, and perplexity of each evaluation.
        seconds: time of the evaluations of this process.
    """

    def __init__(self, windows: Tensor, path: Path, every: int, steps: int):
        self.windows = windows
        self.path = path
        self.every = every
        self.steps = steps
        self.rows: list[dict] = []
        self.seconds = 0.0

    def restore(self, run: str, steps: int) -> None:
        """Read the rows of the first ``steps`` steps; ValueError if the file is damaged, or of another run."""
        with naming("resume"):
            stored = read_progress(self.path)
        if stored["run"] != run:
            raise ValueError(f"resume: expected the {VALIDATION} of this run, got another run's")
        self.rows = [row for row in stored["rows"] if row["step"] <= steps]

    def is_due(self, step: int) -> bool:
        """Return whether to evaluate after so many steps."""
        measured = bool(self.rows) and self.rows[-1]["step"] == step
        return not measured and (step % self.every == 0 or step >= self.steps)

    def evaluate(self, model: nn.Module, run: str, step: int, tokens: int) -> float:
        """Compute and store the perplexity; FloatingPointError if it is not finite before the first step."""
        began = time.perf_counter()
        value = perplexity(model, self.windows, progress=Progress("validation", "window"))
        if not self.rows and not math.isfinite(value):
            raise FloatingPointError(
                f"validation perplexity at step {step}: expected a finite number, got {value}; use another --dtype, "
                "--init or --data"
            )
        self.rows.append({"step": step, "tokens": tokens, "perplexity": value})
        write_record(self.path, {"format": FORMAT, "run": run, "rows": self.rows})
        self.seconds += time.perf_counter() - began
        return value

    def has_diverged(self) -> bool:
        """Return whether the last two perplexities are NaN or over 10% above the initial mask's."""
        if len(self.rows) < 3:
            return False
        limit = DIVERGED * self.rows[0]["perplexity"]
        return not any(row["perplexity"] <= limit for row in self.rows[-2:])
