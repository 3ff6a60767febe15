"""What makes more groups move rightly: straight-through beside other ways to move logits by the same slopes.

All take as many tokens, from the same initial mask. They are judged on the validation parts of texts, since settings
are chosen here; a result is reported on other parts. The score over all of the texts chooses, as masks are learned from
one of them alone. Rows and table are those of ``compare.py``. Each seed has a folder of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from compare import Comparison, parsed, run
from methods import Learner
from variants import Annealed, Consistent, LateBatches, Scheduled, Spread, TrustRegion

from maskpro_kernels.learn.straight_through import StraightThrough

LEARNERS = {
    learner.kind.name: learner
    for learner in (
        Learner(StraightThrough, ({"lr": 0.1}, {"lr": 0.6}, {"max_update": 1.0}, {"max_update": 4.0})),
        Learner(Scheduled, ({"schedule": "constant"}, {"schedule": "warm-up"}, {"schedule": "square root"})),
        Learner(Spread, ({"apart": 25.0},)),
        Learner(Annealed),
        Learner(TrustRegion),
        Learner(Consistent, ({"lr": 0.1},)),
        Learner(LateBatches),
    )
}


class Movement(Comparison):
    """The ways to move logits, on the validation parts of texts."""

    def __init__(self, args: argparse.Namespace):
        super().__init__(args, LEARNERS, "validation", chosen_by="score")

    def batches_of(self, name: str, steps: int) -> Sequence:
        batches = self.batches[:steps]
        if name != LateBatches.name:
            return batches
        if self.args.batch_size % 2:
            raise ValueError(f"batch_size: expected an even number, which can be halved, got {self.args.batch_size}")
        windows = torch.cat(list(batches))
        early, late = windows.split([len(windows) // 2, len(windows) - len(windows) // 2])
        size = self.args.batch_size
        return [*early.split(size // 2), *late.split(2 * size)]


def main(argv: Sequence[str] | None = None) -> None:
    run(Movement, parsed(argv, "compare ways to move the logits of a mask", list(LEARNERS)))


if __name__ == "__main__":
    main()
