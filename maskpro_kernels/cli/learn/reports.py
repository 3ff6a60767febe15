"""Reports of the steps: lines on stderr, and the trackers of ``--report-to``."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from ...learn.estimator import StepRecord
from ..config import Learn
from ..inputs import LINES, report, wants_bars
from .options import trackers_of

# Fields of a step's record for trackers
TRACKED = ("loss", "residual", "advantage", "tracker", "flip_rate")


class StepReports:
    """Reports of the steps of one process, which begins after ``steps_before`` steps."""

    def __init__(self, options: Learn, steps_before: int, trackers: list):
        self.steps = options.steps
        self.steps_before = steps_before
        self.trackers = trackers
        self.began = time.perf_counter()

    def add(self, record: StepRecord, perplexity: float | None) -> None:
        """Report a step, and the validation perplexity after it if there is one."""
        steps_done = record.step + 1
        is_shown = perplexity is not None or steps_done % max(self.steps // LINES, 1) == 0
        if is_shown and not wants_bars():
            seconds_a_step = (time.perf_counter() - self.began) / (steps_done - self.steps_before)
            seconds_left = seconds_a_step * (self.steps - steps_done)
            report(
                f"step {steps_done} of {self.steps}: loss {record.loss:.4f}, "
                + (f"validation perplexity {perplexity:.2f}, " if perplexity is not None else "")
                + f"{record.tokens / record.seconds:.0f} tokens a second, {tqdm.format_interval(seconds_left)} left"
            )
        figures = {f"train/{name}": getattr(record, name) for name in TRACKED if getattr(record, name) is not None}
        figures["train/tokens_per_second"] = record.tokens / record.seconds
        if perplexity is not None:
            figures["eval/perplexity"] = perplexity
        for tracker in self.trackers:
            tracker.log(figures, step=record.step)


@contextmanager
def step_reports(options: Learn, steps_before: int, run: str) -> Iterator[StepReports]:
    """Yield reports with open trackers; a resumed run continues in the one of its id at Weights & Biases."""
    trackers = []
    try:
        for name in trackers_of(options):
            trackers.append(_tracker(name, vars(options), Path(options.output), run))
        yield StepReports(options, steps_before, trackers)
    finally:
        for tracker in trackers:
            tracker.finish()


def _tracker(name: str, options: Mapping, output: Path, run: str):
    from accelerate.state import PartialState
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    PartialState()
    if name == "tensorboard":
        tracker = TensorBoardTracker("tensorboard", logging_dir=output)
    else:
        project = os.environ.get("WANDB_PROJECT", "huggingface")
        tracker = WandBTracker(project, config=options, id=run, resume="allow", dir=str(output))
    tracker.start()
    return tracker
