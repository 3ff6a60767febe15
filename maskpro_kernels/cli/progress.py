"""How far a command is: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm

from ..learn.step import StepRecord
from ..ranks import rank_of_torchrun

# How many there are of what takes long, besides those of validation perplexities
LINES = 50


def wants_bars(args: argparse.Namespace) -> bool:
    """Bars are for a terminal, unless it is to be quiet; of several ranks the first has them."""
    return rank_of_torchrun() == 0 and not getattr(args, "quiet", False) and sys.stderr.isatty()


def tell(line: str, by: int = 0) -> None:
    """Write a line to stderr, if this is the rank that is to."""
    if rank_of_torchrun() == by:
        print(line, file=sys.stderr)


def tell_as(kind: str, what: object, by: int = 0) -> None:
    """Tell an error or a warning, whatever its lines, in one."""
    tell(" ".join(f"maskpro: {kind}: {what}".split()), by)


@contextmanager
def log_told() -> Iterator[None]:
    """What the package logs, such as that it compiles, is told in a line each."""
    handler, logger = _Teller(), logging.getLogger(__package__.partition(".")[0])
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


class _Teller(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tell(record.getMessage())


class StepLines:
    """A line at every fiftieth of a run's steps and at each validation perplexity.

    Loss and rate are means since the line before; the time left goes by all that passed since the first step here.
    """

    def __init__(self, steps: int, steps_done: int):
        self.steps, self.before, self.every = steps, steps_done, max(steps // LINES, 1)
        self.began = time.perf_counter()
        self.records: list[StepRecord] = []

    def add(self, record: StepRecord, perplexity: float | None) -> None:
        """Take note of a step, and of the validation perplexity behind it where it was found."""
        self.records.append(record)
        done = record.step + 1
        if perplexity is None and done % self.every and done < self.steps:
            return
        losses = [one.loss for one in self.records if math.isfinite(one.loss)]
        rate = sum(one.tokens for one in self.records) / sum(one.seconds for one in self.records)
        left = (time.perf_counter() - self.began) / (done - self.before) * (self.steps - done)
        tell(
            f"step {done} of {self.steps}: loss {statistics.fmean(losses) if losses else math.nan:.4f}, "
            + (f"validation perplexity {perplexity:.2f}, " if perplexity is not None else "")
            + f"{rate:.0f} tokens a second, {tqdm.format_interval(left)} left"
        )
        self.records.clear()


class Progress:
    """A bar, or a line at every fiftieth part, of what takes long.

    Args:
        what: takes long.
        unit: of which it has many.
        bars: whether to show a bar.
    """

    def __init__(self, what: str, unit: str, bars: bool):
        self.what, self.unit, self.bars = what, unit, bars
        self.bar: tqdm | None = None
        self.began = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        """Take note that so many are done, of so many."""
        if self.bars:
            if self.bar is None:
                self.bar = tqdm(total=total, desc=self.what, unit=self.unit)
            self.bar.update(done - self.bar.n)
            if done == total:
                self.bar.close()
        elif done and (done % max(total // LINES, 1) == 0 or done == total):
            left = (time.perf_counter() - self.began) / done * (total - done)
            tell(f"{self.what}: {self.unit} {done} of {total}, {tqdm.format_interval(left)} left")


def followed(items: Sequence, what: str, bars: bool) -> Iterator:
    """The items one by one, under a bar or with a line at every fiftieth of them."""
    progress = Progress(what, "step", bars)
    progress(0, len(items))
    for done, item in enumerate(items, start=1):
        yield item
        progress(done, len(items))
