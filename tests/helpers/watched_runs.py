"""Runs of a small trainer in a watched folder: the steps that they report, and resumed runs."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from helpers.disk_model import put
from helpers.power_cuts import NOTHING, State, Watched
from helpers.small_trainer import a_trainer_in, logits_of
from maskpro_kernels.files import digest
from maskpro_kernels.learn.journal import Journal
from maskpro_kernels.learn.run import METRICS, RunFolder
from maskpro_kernels.learn.trainer import MaskTrainer

STEPS, BETWEEN_SNAPSHOTS = 40, 5
# Of metrics.jsonl, what does not depend on time, and what the journal knows too
COLUMNS = ("step", "loss", "residual", "advantage", "tracker", "tokens")

# Digest of the tensors, and the metrics
Learned = tuple[str, list[list]]


class SmallRun:
    """A run in the folder ``run`` below a root, with a snapshot every fifth step.

    Args:
        root: of the folder, which may be watched.
        how: by which estimator of ``a_trainer_in``.
        steps: of the whole run.
    """

    def __init__(self, root: Path, how: str, steps: int = STEPS):
        self.how, self.steps, self.folder = how, steps, root / "run"
        self.trainer = a_trainer_in(self.folder, how)

    def take(self) -> Learned:
        """Take the remaining steps, and return the learned tensors."""
        trainer = self.trainer
        trainer.begin()
        while trainer.steps_done < self.steps:
            trainer.snapshot_minutes = 0.0 if (trainer.steps_done + 1) % BETWEEN_SNAPSHOTS == 0 else math.inf
            trainer.step()
        trainer.close()
        return self._digest(), self._metrics()

    def place(self) -> tuple:
        """State of the run: runs in the same state have the same steps before them."""
        others = ((path.name, path.read_bytes()) for path in self.folder.rglob("*") if path.is_file())
        files = sorted((name, content) for name, content in others if name != METRICS)
        return self.trainer.steps_done, self._digest(), repr(self.trainer.estimator.state()), self._metrics(), files

    def _digest(self) -> str:
        return digest([*logits_of(self.trainer.model), *self.trainer.estimator.tensors().values()])

    def _metrics(self) -> list[list]:
        path = self.folder / METRICS
        rows = map(json.loads, path.read_text().splitlines() if path.exists() else ())
        return [[row[name] for name in COLUMNS] for row in rows]

    def resume(self, acknowledged: int) -> int:
        """Continue, or begin again if no step was reported: a run may then be refused, in one line.

        Args:
            acknowledged: steps that must not be lost.

        Returns:
            The steps that are done; ``NOTHING`` where it begins again.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                steps = self.trainer.resume()
        except ValueError as error:
            line = str(error)
            assert acknowledged == NOTHING, f"{acknowledged} steps were reported as done: {line}"
            assert ": expected " in line and "\n" not in line, line
            self.trainer = a_trainer_in(self.folder, self.how)
            return NOTHING
        assert steps >= acknowledged, f"{steps} steps are left of {acknowledged} that were reported as done"
        return steps


@contextmanager
def reported(watched: Watched, monkeypatch, of: type = MaskTrainer) -> Iterator[None]:
    """Note what a run reports: that its ``begin`` has ended, then each record of its journal, or each snapshot.

    Args:
        of: what begins.
    """
    begin, append, add = of.begin, Journal.append, RunFolder.add_snapshot

    def begun(run, *given, **named) -> None:
        begin(run, *given, **named)
        watched.acknowledge(0)

    def appended(journal, entry) -> None:
        append(journal, entry)
        watched.acknowledge(entry.step + 1)

    def added(folder, step, *given) -> None:
        add(folder, step, *given)
        if step and not folder.estimator.journaled:
            watched.acknowledge(step)

    with monkeypatch.context() as patched:
        patched.setattr(of, "begin", begun)
        patched.setattr(Journal, "append", appended)
        patched.setattr(RunFolder, "add_snapshot", added)
        yield


def watched_run(root: Path, how: str, monkeypatch, **watch) -> tuple[Watched, Learned]:
    """(state after a power cut at each operation of a run, logits of the run)."""
    root.mkdir()
    with Watched(root, **watch) as watched, reported(watched, monkeypatch):
        learned = SmallRun(root, how).take()
    return watched, learned


def resumed(state: State, root: Path, how: str, steps: int = STEPS) -> SmallRun:
    """Continue a run from a state; reported steps must not be lost."""
    put(state.tree, root)
    run = SmallRun(root, how, steps)
    run.resume(state.acknowledged)
    return run


class Continued:
    """Results of runs that continue from states; only the first of equal states is run."""

    def __init__(self, how: str, steps: int = STEPS):
        self.how, self.steps = how, steps
        self._known: list[tuple[tuple, Learned]] = []

    def learned(self, state: State, root: Path) -> Learned:
        """Result of a state in a new folder; reported steps must not be lost."""
        run = resumed(state, root, self.how, self.steps)
        place = run.place()
        for other, learned in self._known:
            if other == place:
                run.trainer.close()
                return learned
        self._known.append((place, run.take()))
        return self._known[-1][1]


def thinned(states: Iterable[State], number: int | None) -> list[State]:
    """So many of them, evenly; None: all."""
    states = list(states)
    if number is None or len(states) <= number:
        return states
    return [states[index * len(states) // number] for index in range(number)]
