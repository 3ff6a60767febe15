"""A run of `maskpro learn` from its first step to its last: what it tells, evaluates and keeps while it learns."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from ..files import discard, write_whole
from ..learn.estimator import Estimator
from ..learn.run import snapshots_in
from ..learn.step import LossFn, StepRecord
from ..learn.trainer import MaskTrainer
from ..ranks import Ranks
from ..report.better_mask import better_mask, lowest
from ..report.better_mask import told as told_of_better
from ..report.parting import told
from .arguments import Told, telling
from .changed_weights import save_start_weights
from .inputs import Inputs
from .mask_files import mask_of_step, save_mask_of_step
from .perplexities import ValidationPerplexities, print_table
from .progress import StepLines, tell, tell_as
from .run_end import save_run_logits, write_results
from .run_files import (
    BEST_MASK,
    LOGITS,
    PROGRESS,
    SETTINGS,
    START_WEIGHTS,
    TEACHER,
    VALIDATION,
    how_to_go_on,
)
from .run_settings import stored_settings
from .signals import Signals
from .start_mask import told_init
from .trackers import open_trackers

# Steps in a row whose loss or gradient may not be finite
MAX_SKIPPED = 9


class LearningRun:
    """A run in its folder; ``begin`` or ``go_on`` comes first, then ``take_steps``, and ``end`` where it has ended.

    Args:
        args: the settings, complete.
        ranks: that learn together. Rank 0 alone evaluates, writes and tells.
        inputs: their model is converted; a new run learns from its logits.
        estimator, loss_fn: of these settings.
        start: what was known before the first step, see ``initial_masks``.

    Attributes:
        seconds: from the dense model to where the run stands, without evaluations.
        signalled: whether a signal has come while steps were taken. Of rank 0 alone.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        ranks: Ranks,
        inputs: Inputs,
        estimator: Estimator,
        loss_fn: LossFn,
        start: Mapping,
    ):
        self.args, self.ranks, self.inputs, self.start = args, ranks, inputs, start
        self.output = Path(args.output)
        self.progress = self.output / PROGRESS
        self.seconds, self.signalled = start["seconds"], False
        self.trainer = MaskTrainer(
            inputs.model,
            loss_fn,
            inputs.calibration,
            estimator,
            seed=args.seed,
            output_dir=self.progress,
            max_skipped=MAX_SKIPPED,
            accumulate=args.accumulate,
        )
        self.validation = ValidationPerplexities(
            self.progress / VALIDATION, inputs.model, inputs.validation, args.eval_every, args.steps, args.bars
        )

    def begin(self) -> None:
        """Take what stands before the first step."""
        try:
            self.trainer.begin(progress=self.args.bars)
            self.start = {**self.start, "run": self.trainer.run_id}
            self.validation.run = self.trainer.run_id
            self.trainer.ranks.first(lambda: save_start_weights(self.inputs.model, self.progress))
            self.trainer.ranks.first(self._evaluate)
            # After the first snapshot: from here on the run can be resumed.
            settings = json.dumps({"settings": stored_settings(self.args), **self.start}, indent=1).encode()
            self.ranks.first(lambda: write_whole(self.output / SETTINGS, settings))
        except BaseException:
            self.trainer.close()
            raise

    def go_on(self) -> None:
        """Go on where the folder stands."""
        with telling("resume", "put back the model, the text and what the folder held when the run was broken off"):
            self.trainer.resume(progress=self.args.bars, check=self._check_run)
        self.validation.restart(self.trainer.steps_done)
        self.seconds += sum(record["seconds"] for record in self.trainer.metrics)
        again = (
            "" if isinstance(self.inputs.calibration, Sequence) else "; their batches were read again, and passed over"
        )
        tell(f"{self.trainer.steps_done} steps were taken before{again}")

    def _check_run(self, run_id: str) -> None:
        """Take up the perplexities of the run with this id; ``Told`` if the settings are not its own, or damage."""
        if self.start["run"] != run_id:
            raise Told(
                f"resume: expected the {SETTINGS} of the run in {str(self.progress)!r}, got another run's; restore it "
                "from a copy"
            )
        self.validation.run = run_id
        self.validation.read()

    def take_steps(self) -> bool:
        """Take the steps that are left, until the run ends or is told to stop; gives whether ``end`` is to come."""
        more = self.ranks.first(self._has_more)
        began, evaluating = time.perf_counter(), self.validation.seconds
        with Signals() as signals:
            if self.ranks.rank > 0:
                if more:
                    self._run(progress=False, after_step=lambda _: signals.came)
                return False
            if more:
                self._run_and_tell(signals)
        self.signalled = signals.came
        self.seconds += time.perf_counter() - began - (self.validation.seconds - evaluating)
        done, steps = self.trainer.steps_done, self.args.steps
        if done == steps:
            return True
        # the signal may have come to another rank
        if not signals.came and self.validation.risen():
            tell(
                f"stopped after {done} steps: the validation perplexity was NaN, or over 10% above the initial mask's, "
                "at two evaluations in a row"
            )
            return True
        with telling("output", how_to_go_on(self.output)):
            save_run_logits(self.args, self.trainer.model, self.start)
        tell(f"stopped after {done} steps; {how_to_go_on(self.output)}")
        return False

    def end(self) -> None:
        """Write what a run leaves at its end, and print its table."""
        better = self._better_mask()
        with telling("output", how_to_go_on(self.output)):
            report = write_results(
                self.args, self.inputs, self.start, self.trainer.metrics, self.validation.rows, better, self.seconds
            )
        # What is learned is in the logits; what a replay starts from stays
        journaled = self.trainer.estimator.journaled
        for old in snapshots_in(self.progress)[1 if journaled else 0 :]:
            discard(old)
        if better is None:
            # no earlier mask is so much better that it is worth its bytes
            (self.progress / BEST_MASK).unlink(missing_ok=True)
        shutil.rmtree(self.progress / TEACHER, ignore_errors=True)
        if not journaled:
            (self.progress / START_WEIGHTS).unlink(missing_ok=True)
        self._tell_of_a_better_mask(better)
        print_table(report["table"])
        flipped, differ = report["flipped_groups"], f"differ from the {told_init(self.args.init)}"
        moved = f"{flipped} of {report['groups']} groups {differ}"
        if flipped is None:
            moved = f"how many of {report['groups']} groups {differ} is not known"
        print(f"{moved}; {report['weights']}; written to {self.output}")
        if report["parting"] is None:
            print("no text of another kind was looked at: name one by --other-data")
        else:
            print(told(report["parting"], self.args.other_data))

    def _better_mask(self) -> dict | None:
        """What ``better_mask`` finds, with the mask's file from the folder of the run on, None if it was not kept."""
        found = better_mask(self.validation.rows)
        if found is None:
            return None
        kept = mask_of_step(self.args, self.progress, found["step"], found["perplexity"], self.validation.run)
        return found | {"file": None if kept is None else kept.relative_to(self.output).as_posix()}

    def _tell_of_a_better_mask(self, better: Mapping | None) -> None:
        """Where validation text was better at an earlier step, tell how to have that step's mask if it was kept."""
        if better is None:
            return
        line = told_of_better(better)
        if better["file"] is None:
            line += "; the better mask was not kept"
        else:
            mask = str(self.output / better["file"])
            command = shlex.join(["maskpro", "import", mask, "--model", self.args.model, "--output", "OUT"])
            line += f"; this command makes a checkpoint of the better mask: {command}"
        tell_as("warning", line)

    def close(self) -> None:
        """Let another process have the folder."""
        self.trainer.close()

    def _evaluate(self) -> None:
        """Find the validation perplexity where the run stands, and tell it."""
        found = self._look(self.trainer.steps_done)
        if not self.args.bars:
            tell(f"step {self.trainer.steps_done} of {self.args.steps}: validation perplexity {found:.2f}")

    def _look(self, step: int) -> float:
        """The validation perplexity behind a step, whose mask is kept if it is the first or the lowest."""
        began = time.perf_counter()
        found = self.validation.find(step)
        # ahead of the perplexity: a run that goes on without it finds it again, and keeps the mask again
        if not self.validation.rows or found < lowest(self.validation.rows)["perplexity"]:
            save_mask_of_step(self.args, self.inputs.model, self.progress, step, found, self.validation.run)
        self.validation.add(step, self._tokens_done(), found)
        self.validation.seconds += time.perf_counter() - began
        return found

    def _tokens_done(self) -> int:
        return sum(record["tokens"] for record in self.trainer.metrics)

    def _has_more(self) -> bool:
        """Whether there are steps to take, by what is known of the validation text."""
        if self.validation.due(self.trainer.steps_done):
            self._evaluate()
        return self.trainer.steps_done < self.args.steps and not self.validation.risen()

    def _run(self, **how) -> None:
        self.trainer.run(self.args.steps - self.trainer.steps_done, **how)

    def _run_and_tell(self, signals: Signals) -> None:
        """Take steps on rank 0: tell them, evaluate between them, and keep the logits where an error comes."""
        lines, done = StepLines(self.args.steps, self.trainer.steps_done), self.trainer.steps_done
        with ExitStack() as stack:
            settings = stored_settings(self.args) | {"output": str(self.output)}
            with telling("report_to", f"{how_to_go_on(self.output)} --report-to none"):
                trackers = open_trackers(self.args, settings, done, self.validation.rows, stack)

            with telling("output", how_to_go_on(self.output)):
                # of where the run was stopped: if it is killed now, they would pass for what it has learned
                (self.output / LOGITS).unlink(missing_ok=True)

            def after_step(record: StepRecord) -> bool:
                step = record.step + 1
                found = self._look(step) if self.validation.due(step) else None
                if not self.args.bars:
                    lines.add(record, found)
                for tracker in trackers:
                    tracker.add(record, self.validation.rows)
                return self.validation.risen() or signals.came

            try:
                self._run(progress=self.args.bars, after_step=after_step)
            except (FloatingPointError, torch.OutOfMemoryError, KeyboardInterrupt, OSError, ValueError):
                done, where = self.trainer.steps_done, self._keep_logits()
                tell(f"stopped after {done} steps; {where}; {how_to_go_on(self.output)}")
                raise

    def _keep_logits(self) -> str:
        """Save what was learned before an error, which stays the one that is told; gives where it is."""
        if self.trainer.broken:
            again = "are rebuilt" if self.trainer.estimator.journaled else "of the last snapshot are taken"
            return f"the next one was broken off in its update, and the logits {again} where the run goes on"
        try:
            save_run_logits(self.args, self.trainer.model, self.start)
        except OSError as error:
            return f"the logits could not be saved: {error}"
        return f"the logits are in {self.output / LOGITS}"
