"""Effect of each choice in the paper's update if scalars are enough: one change at a time, on a character model.

    python benchmarks/learning/ablations.py

The model, its text and its batches are those of ``characters.py``, as are the settings that a row does not name. Each
row has the learning rate at which, with the first seed, validation text ends with the lowest loss; a star marks one
that is the first or the last of those tried. The test text judges nothing. Seeds are those of batches, draws and random
initial masks. The dense model is one and the same, and so is held-out text.

A row shows the loss of test text under the initial mask and under the learned one, and the share of what the initial
mask has cost that is regained: means over the seeds, with the sample standard deviation. All rows make as many forwards
to learn, those under the initial mask included. What calibrates the initial mask comes on top, and is less text where
there are fewer batches.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

from characters import BATCHES, PATTERN, CharacterModel, Problem, Text, trained
from rows import finite, spread

# Of the rows that do not name another
BASE = {"flip_rate": 0.01, "init": "wanda", "pattern": PATTERN, "alpha": 0.99, "draws": 1, "batches": BATCHES}
# By heading, the option and its values. At the paper's gap of 10 a share of 1.4e-4 of the groups leaves the mask.
ABLATIONS: dict[str, tuple[str, Sequence]] = {
    "flip rate": ("flip_rate", (1.4e-4, 1e-3, 1e-2, 1e-1)),
    "decay of the tracker": ("alpha", (0.0, 0.9, 0.99, 1.0)),
    "draws a step": ("draws", (1, 4)),
    "batches": ("batches", (1, 8, 64, 512)),
    "initial mask": ("init", ("wanda", "reconstruction", "magnitude", "random")),
    "pattern": ("pattern", ("2:4", "1:4", "4:8", "8:16")),
}


class Row(NamedTuple):
    """Results of runs that differ only in their seeds.

    Attributes:
        lr: learning rate.
        is_extreme: whether the learning rate is the lowest or the highest of those tried.
        initial, learned: losses of test text in nats a character, by seed.
        dense: likewise, without a mask.
    """

    lr: float
    is_extreme: bool
    initial: list[float]
    learned: list[float]
    dense: list[float]

    @property
    def regained(self) -> list[float]:
        """Share of what the initial mask has cost, by seed."""
        losses = zip(self.initial, self.learned, self.dense, strict=True)
        return [(initial - learned) / (initial - dense) for initial, learned, dense in losses]


class Ablations:
    """The runs on one model.

    Args:
        text: of the model.
        model: dense; it stays so.
        forwards: of each run.
        lrs: learning rates to choose from.
        seeds: how many, from 0 on.
    """

    def __init__(self, text: Text, model: CharacterModel, forwards: int, lrs: Sequence[float], seeds: int):
        self.text = text
        self.model = model
        self.forwards = forwards
        self.lrs = lrs
        self.seeds = seeds
        # rows that change nothing are the same
        self._runs = cache(self._run)

    def row(self, changed: Mapping) -> Row:
        """Run the settings ``BASE`` with changes."""
        settings = tuple((BASE | dict(changed)).items())
        lr = min(self.lrs, key=lambda lr: finite(self._runs(settings, lr, 0)[1]["validation"]))
        runs = [self._runs(settings, lr, seed) for seed in range(self.seeds)]
        return Row(
            lr, lr in (min(self.lrs), max(self.lrs)), *([losses[i]["test"] for losses in runs] for i in range(3))
        )

    def _run(self, settings: tuple, lr: float, seed: int) -> tuple[dict, dict, dict]:
        """Losses under the initial mask, under the learned one, and of the dense model."""
        options = dict(settings)
        problem = Problem(self.text, self.model, seed, options.pop("batches"))
        initial, learned = problem.learned(lr, counts=[self.forwards], seed=seed, **options)
        return initial, learned, problem.losses(self.model)


def markdown_row(heading: str, value: object, row: Row) -> str:
    """Markdown."""
    cells = [heading, f"{value}", f"{row.lr:g}{'*' * row.is_extreme}", *map(spread, (row.initial, row.learned))]
    return f"| {' | '.join([*cells, spread([100 * share for share in row.regained], 0, '%')])} |"


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="choices of REINFORCE, on a character model", allow_abbrev=False)
    parser.add_argument("--width", type=int, default=16, help="of the hidden layers (default: %(default)s)")
    parser.add_argument("--forwards", type=int, default=8000, help="of each run (default: %(default)s)")
    parser.add_argument("--lrs", nargs="+", type=float, default=[0.6, 2.0, 6.0, 20.0, 60.0], help="to try")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: %(default)s)")
    parser.add_argument("--train-steps", type=int, default=3000, help="of the dense model (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=ABLATIONS, default=list(ABLATIONS), metavar="HEADING")
    args = parser.parse_args(argv)
    if min(args.lrs) <= 0:
        parser.error(f"--lrs: expected learning rates above 0, got {min(args.lrs):g}")
    max_batches = max(ABLATIONS["batches"][1]) if "batches" in args.only else BATCHES
    if args.forwards <= max_batches:
        parser.error(f"--forwards: expected more than {max_batches}, one a batch, got {args.forwards}")
    if args.seeds < 1:
        parser.error(f"--seeds: expected at least 1, got {args.seeds}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parsed(argv)
    text = Text.load("pydoc")
    model = trained(text, args.width, args.train_steps)
    ablations = Ablations(text, model, args.forwards, args.lrs, args.seeds)
    print(f"test loss of the dense model: {Problem(text, model).losses(model)['test']:.3f}\n")
    print("| choice | value | lr | initial loss | learned | regained |\n|---|---|---:|---:|---:|---:|")
    for heading in args.only:
        option, values = ABLATIONS[heading]
        for value in values:
            print(markdown_row(heading, value, ablations.row({option: value})), flush=True)


if __name__ == "__main__":
    main()
