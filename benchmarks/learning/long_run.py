"""REINFORCE as its authors run it, over thousands of steps: perplexity and moved groups on the way.

    python benchmarks/learning/long_run.py --init wanda --steps 10000 --test pydoc stdlib book.txt --output runs/wanda

The settings are the authors' (MaskPro, arXiv 2506.12876): initial logits 10 apart, a learning rate of 50, a decay of
0.99, a draw a step, frozen weights. The batches are the first 64 of ``compare.py``, and repeat. Their losses under the
initial mask are computed before the first step, so each step is one forward.

After every 500 steps ``rows.jsonl`` gets a row. Nothing is chosen by the rows. Seconds are those of the steps and the
losses under the initial mask, without evaluations.

The folder ``progress`` has the trainer's files. Called again with the same arguments, the command continues: after
SIGTERM or SIGINT, which stop it after a step with status 1, and after a kill. With more ``--steps`` it goes on from the
last one. Each initial mask needs a folder of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from compare import Comparison, checked, options
from methods import LEARNERS, state_bytes
from pictures import picture
from rows import table
from torch import Tensor

from maskpro_kernels.cli.learn.steps import StopSignals
from maskpro_kernels.files import write_whole
from maskpro_kernels.learn.estimator import Estimator, LossFn, StepRecord
from maskpro_kernels.learn.journal import JOURNAL
from maskpro_kernels.learn.reinforce import Reinforce
from maskpro_kernels.learn.run import METRICS
from maskpro_kernels.learn.trainer import MaskTrainer
from maskpro_kernels.text.perplexity import causal_lm_loss

REINFORCE = LEARNERS[Reinforce.name]


class Seconds:
    """Seconds of the steps of all processes of a run, in a file with a line for each step: its number, and their sum.

    A process that is killed before it adds those of a step loses them.
    """

    def __init__(self, path: Path, clock: Callable[[], float]):
        self.path = path
        self.clock = clock
        self.total = 0.0
        self.start()

    def resume(self, step: int) -> None:
        """Go on after a step, of those in the file: steps after it are taken again."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        # the last one may be incomplete
        earlier = [line for line in lines if len(line.split()) == 2 and int(line.split()[0]) <= step]
        write_whole(self.path, "".join(f"{line}\n" for line in earlier).encode())
        self.total = float(earlier[-1].split()[1]) if earlier else 0.0
        self.start()

    def start(self) -> None:
        self.began = self.clock()

    def add(self, step: int) -> None:
        """Add the time since the start, or since the last addition, to that of a step."""
        now = self.clock()
        self.total += now - self.began
        self.began = now
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{step} {self.total!r}\n")


class LongRun(Comparison):
    """The rows of a run, which one process after the other continues."""

    unshared = (*Comparison.unshared, "picture")

    def learn_until(self, steps: int) -> bool:
        """Take the steps that are missing, and add the rows; return whether it has ended, without a signal."""
        self.initial_rows()
        return self.take_steps(Reinforce.name, REINFORCE.options, steps, self.args.output)

    def initial_rows(self) -> None:
        """The rows of the dense model and of the initial mask, before any conversion."""
        self.dense  # noqa: B018
        self.one_shot(self.args.init)

    def take_steps(self, name: str, settings: Mapping, steps: int, folder: Path, accumulate: int = 1) -> bool:
        """Take the steps that a learner with these settings lacks, and add its rows on the way.

        Args:
            name: of the learner.
            settings: of the rows.
            steps: to end at.
            folder: of the trainer's files and the seconds.
            accumulate: batches a step.

        Returns:
            False if a signal came.
        """
        progress = folder / "progress"
        estimator = self.estimator_of(name, settings, steps)
        codes = self.put_start(estimator)
        trainer = MaskTrainer(
            self.model,
            self.loss_of(name),
            self.batches_of(name, steps),
            estimator,
            seed=self.args.seed,
            output_dir=progress,
            accumulate=accumulate,
        )
        digests = self.initial_digests(codes)
        with closing(trainer), StopSignals() as signals:
            seconds = Seconds(folder / "seconds.txt", self.clock)
            if (progress / JOURNAL).exists() or (progress / METRICS).exists():
                trainer.resume()
                seconds.resume(trainer.steps_done)
            else:
                trainer.begin()
                seconds.add(0)

            def after_step(record: StepRecord) -> bool:
                seconds.add(record.step + 1)
                return signals.have_come()

            while True:
                done = trainer.steps_done
                is_due = done > 0 and (done % self.args.every == 0 or done == steps)
                # the process before may have ended without the row of its last step
                if is_due and self.rows.find(name, settings, done) is None:
                    figures = {**digests, "changed_groups": self.changed(codes)}
                    state = state_bytes(estimator, trainer.layers)
                    self.rows.add([self.row_of(estimator, settings, done, seconds.total, state, **figures)])
                if done >= steps or signals.came:
                    # also after the last step: another learner may follow
                    return not signals.came
                seconds.start()
                count = min(self.args.every - done % self.args.every, steps - done)
                trainer.run(count, progress=False, after_step=after_step)

    def batches_of(self, name: str, steps: int) -> Sequence:
        return self.batches[: self.args.batches]

    def put_start(self, estimator: Estimator) -> dict[str, Tensor]:
        """Set logits and weights to those that a learner starts from; return the group codes by layer."""
        codes, _ = self.initial(self.args.init)
        self.put_mask(codes, self.gap_of(estimator))
        return codes

    def loss_of(self, name: str) -> LossFn:
        """The loss that a learner descends."""
        return causal_lm_loss

    def row_of(self, estimator: Estimator, settings: Mapping, *figures: float, **learner_figures: object) -> dict:
        """A row of the present result of a learner."""
        return self.row(estimator.name, settings, *figures, **learner_figures)

    def estimator_of(self, name: str, settings: Mapping, steps: int) -> Estimator:
        """A learner for so many steps."""
        return self.learners[name].kind(**settings)


def draw(rows: Sequence[Mapping], init: str, path: Path) -> None:
    """A picture of the score over the steps, and of the number of groups that moved."""
    (initial,) = (row for row in rows if row["method"] == init)
    rows = sorted((row for row in rows if row["method"] == Reinforce.name), key=lambda row: row["steps"])
    steps = [row["steps"] for row in rows]
    with picture(path) as axes:
        scores = axes.plot([0, *steps], [initial["score"], *(row["score"] for row in rows)], "o-", label="score")
        axes.axhline(initial["score"], color="gray", linewidth=0.8)
        axes.set(yscale="log", xlabel="steps", ylabel="perplexity, times that of the dense model")
        groups_axes = axes.twinx()
        groups = groups_axes.plot(
            [0, *steps], [0, *(row["changed_groups"] for row in rows)], "s--", color="C1", label="groups"
        )
        groups_axes.set(ylabel="groups that moved")
        axes.legend(handles=[*scores, *groups])


def long_options(description: str) -> argparse.ArgumentParser:
    """The options of comparisons, and those of batches that repeat and of rows on the way."""
    parser = options(description)
    parser.add_argument("--batches", type=int, default=64, help="distinct batches, which repeat (default: %(default)s)")
    parser.add_argument("--every", type=int, default=500, help="steps from a row to the next (default: %(default)s)")
    return parser


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = long_options("REINFORCE as its authors run it, with rows on the way")
    parser.set_defaults(init="wanda", steps=[10000])
    parser.add_argument("--picture", type=Path, metavar="FILE", help="picture to write")
    args = checked(parser, argv)
    for name in ("batches", "every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    if len(args.steps) > 1 or args.steps[0] < args.batches:
        parser.error(f"--steps: expected one number of at least {args.batches}, the batches, got {args.steps}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parsed(argv)
    try:
        run = LongRun(args)
        has_ended = run.learn_until(args.steps[0])
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(table(run.rows.rows), end="")
    if args.picture is not None:
        draw(run.rows.rows, args.init, args.picture)
        print(f"curve: {args.picture}")
    if not has_ended:
        raise SystemExit("stopped by a signal; the same command continues")


if __name__ == "__main__":
    main()
