"""REINFORCE with the best settings that a short search gives, for a number of forwards from reconstruction's mask.

    python benchmarks/learning/forwards.py --test pydoc stdlib book.txt --output runs/forwards

The advantage is normalized, so that its root mean square is 1. The learning rate follows from the advantage that is
enough for a mask: a draw whose loss is so much better than those of others, ``enough`` root mean squares, moves the
groups that it has flipped at once, and a worse one needs the help of others. Draws a step, flip rate, batches a step
and ``enough`` are tried one at a time, with ``--search-forwards`` each, and judged on validation text. On SmolLM2 the
best of a short search goes too far in a long run, see docs/claims.md. The best takes ``--forwards``.

A forward is of one batch under one mask. With one draw a step, those under the initial mask count too.

The batches are those of ``long_run.py``, and rows and interruptions as well.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from compare import checked
from long_run import LongRun, long_options
from methods import FlipRate, Learner
from rows import finite, table

from maskpro_kernels.prune.convert import gap_for_flip_rate

FIRST = {"draws": 4, "flips": 1e-3, "accumulate": 1, "enough": 2.0}
# Each instead of the one of FIRST
SEARCH = (
    {"draws": 1},
    {"draws": 16},
    {"flips": 1.4e-4},
    {"flips": 1e-2},
    {"accumulate": 4},
    {"enough": 1.5},
    {"enough": 2.7},
)
LEARNER = Learner(FlipRate, FIRST, SEARCH)


class Forwards(LongRun):
    """The rows of the search, and of the best setting with all forwards."""

    def __init__(self, args: argparse.Namespace):
        super().__init__(args, {FlipRate.name: LEARNER})

    def search(self) -> Mapping | None:
        """The settings with the lowest perplexity of validation text; None if a signal came."""
        self.initial_rows()
        rows = []
        for i, settings in enumerate(LEARNER.candidates()):
            folder = self.args.output / f"search-{i}"
            steps = self.steps_of(settings, self.args.search_forwards)
            if self.rows.find(FlipRate.name, settings, steps) is None and not self.go_on(settings, steps, folder):
                return None
            # its snapshots are large
            shutil.rmtree(folder, ignore_errors=True)
            rows.append(self.rows.find(FlipRate.name, settings, steps))
        return min(rows, key=lambda row: finite(row["validation"]))["settings"]

    def learn_with(self, settings: Mapping) -> bool:
        """Take the steps of all forwards; return whether they ended, without a signal."""
        return self.go_on(settings, self.steps_of(settings, self.args.forwards), self.args.output)

    def steps_of(self, settings: Mapping, forwards: int) -> int:
        """Steps that take as many forwards, or fewer by less than a step."""
        if settings["draws"] == 1:
            # one for each batch
            forwards -= self.args.batches
        return forwards // (settings["draws"] * settings["accumulate"])

    def go_on(self, settings: Mapping, steps: int, folder: Path) -> bool:
        return self.take_steps(FlipRate.name, settings, steps, folder, settings["accumulate"])

    def estimator_of(self, name: str, settings: Mapping, steps: int) -> FlipRate:
        draws = settings["draws"]
        flips = settings["flips"]
        gap = gap_for_flip_rate(flips, self.pattern)
        # scores in a group with one flip: 1 of the weight that comes in; of the one that is left out
        # -(1 / N + ... + 1), its chances when each of the N weights was drawn
        distance = 1.0 + sum(1.0 / left for left in range(1, self.pattern.n + 1))
        lr = draws * gap / (distance * settings["enough"])
        return FlipRate(lr=lr, normalize=True, draws=draws, flips=flips)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = long_options("REINFORCE with the best of a few settings, for a number of forwards")
    for name, value in {"forwards": 3000, "search-forwards": 320}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="(default: %(default)s)")
    args = checked(parser, argv)
    most = max(settings["draws"] * settings["accumulate"] for settings in LEARNER.candidates())
    least = args.batches + most
    for name in ("batches", "every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    for name in ("forwards", "search_forwards"):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(args, name)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parsed(argv)
    try:
        run = Forwards(args)
        chosen = run.search()
        has_ended = chosen is not None and run.learn_with(chosen)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(table(run.rows.rows), end="")
    if not has_ended:
        raise SystemExit("stopped by a signal; the same command continues")


if __name__ == "__main__":
    main()
