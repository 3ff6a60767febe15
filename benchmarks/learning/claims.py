"""The paper's claim at a scale that runs here: REINFORCE, straight-through and initial masks, over several seeds.

    python benchmarks/learning/claims.py --data pydoc:0.5,self:0.5 --test pydoc stdlib book.txt --output runs/claims

All learners take the same batches, each once, from the same initial mask. A batch is one forward of straight-through,
and two of REINFORCE, whose residual needs the loss under the initial mask as well. REINFORCE takes its authors'
settings, and those that of some flip rates and learning rates end lowest on validation text. They are chosen by the
first seed alone, after fewer steps; the test texts judge nothing.

Each seed has its own folder of rows, as in ``compare.py``, so the command resumes. It prints means over the seeds, with
the sample standard deviation.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence

from compare import Comparison, checked, options
from methods import OF_REINFORCE, OF_STRAIGHT_THROUGH, ONE_SHOT, FlipRate, Learner
from rows import best, settings_text, spread

from maskpro_kernels.learn.reinforce import Reinforce
from maskpro_kernels.learn.straight_through import StraightThrough

# What the first seed tries. The more groups flip, the more a loss differs, and the further one rate moves the logits.
SEARCH = [
    {"flips": flips, "lr": lr}
    for flips, rates in {2e-4: (150, 500), 1e-3: (30, 100), 1e-2: (3, 10)}.items()
    for lr in rates
]
LEARNERS = {
    learner.kind.name: learner
    for learner in (
        Learner(StraightThrough, OF_STRAIGHT_THROUGH),
        Learner(Reinforce, OF_REINFORCE, gap=10.0),
        Learner(FlipRate, {**OF_REINFORCE, "flips": 1e-2}),
    )
}


class Claims(Comparison):
    """The rows of one seed."""

    def __init__(self, args: argparse.Namespace):
        super().__init__(args, LEARNERS)

    def without_steps(self) -> None:
        """The rows of the dense model and of masks that take no steps, before any conversion."""
        self.dense  # noqa: B018
        for name in ONE_SHOT:
            self.one_shot(name)

    def tuned(self, steps: int) -> Mapping:
        """The settings of ``FlipRate`` that end lowest on validation text after so many steps."""
        candidates = [{**LEARNERS[FlipRate.name].options, **changes} for changes in SEARCH]
        rows = self.rows_of([(FlipRate.name, settings, steps) for settings in candidates])
        return best(rows, FlipRate.name, steps)["settings"]

    def rows_of(self, requests: Sequence[tuple[str, Mapping, int]]) -> list[dict]:
        """One for each method, settings and steps; learned where it is missing."""
        for request in requests:
            self.learn(*request)
        return [self.rows.find(*request) for request in requests]


def summary(by_seed: Sequence[Sequence[Mapping]]) -> str:
    """Markdown: each row over the seeds, which are the same for all rows."""
    texts = list(by_seed[0][0]["perplexity"])
    lines = [["method", "settings", "steps", *texts, "score", "groups that moved", "seconds"]]
    lines.append(["---", "---", "---:", *["---:"] * (len(texts) + 3)])
    for rows in zip(*by_seed, strict=True):
        first = rows[0]
        figures = [spread([row["perplexity"][text] for row in rows], 2) for text in texts]
        moved, seconds = (round(statistics.fmean(row[name] for row in rows)) for name in ("changed_groups", "seconds"))
        figures += [spread([row["score"] for row in rows], 2), f"{moved:,}", f"{seconds:,}"]
        lines.append([first["method"], settings_text(first["settings"]), str(first["steps"]), *figures])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = options("compare REINFORCE, straight-through and initial masks over several seeds")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from --seed on (default: %(default)s)")
    args = vars(checked(parser, argv))
    seeds = args.pop("seeds")
    if seeds < 1:
        parser.error(f"--seeds: expected at least 1, got {seeds}")
    search_steps = min(args["steps"])
    steps = max(args["steps"])
    requests = [("dense", {}, 0), *((name, {}, 0) for name in ONE_SHOT)]
    by_seed = []
    try:
        for seed in range(args["seed"], args["seed"] + seeds):
            claims = Claims(argparse.Namespace(**args | {"seed": seed, "output": args["output"] / f"seed-{seed}"}))
            claims.without_steps()
            if not by_seed:
                tuned = claims.tuned(search_steps)
                learners = {kind: LEARNERS[kind.name].options for kind in (StraightThrough, Reinforce)} | {
                    FlipRate: tuned
                }
                requests += [(kind.name, settings, steps) for kind, settings in learners.items()]
            by_seed.append(claims.rows_of(requests))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(summary(by_seed), end="")


if __name__ == "__main__":
    main()
