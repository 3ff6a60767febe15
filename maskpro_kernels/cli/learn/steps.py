"""The steps of a run, with evaluations and reports between them, until it ends or a signal comes."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ...checkpoints.logits import LOGITS_FILE, Logits, changed_weights, save_logits, write_logits
from ...files import make_folder, write_record
from ...learn.estimator import StepRecord
from ...learn.trainer import MaskTrainer
from ...modules import masked_layers
from ...ranks import Ranks, rank_of_torchrun
from ..config import Learn
from ..inputs import FORMAT, PROGRESS, digest_of_weights, naming, report, resume_command, wants_bars
from .data import Data
from .evaluation import VALIDATION, Validation
from .folder import START
from .reports import step_reports
from .start import START_WEIGHTS

# Most tokens of windows whose attention plain products compute in bfloat16 on a CPU: with the backward they are faster
# than torch's function, but need much more memory for longer windows
SHORT = 128


@dataclass
class Run:
    """A run that can take steps after ``begin`` or ``resume``.

    Attributes:
        start: results before the first step.
        validation: validation perplexities.
        seconds: of the run from the dense model, without those of the evaluations.
    """

    options: Learn
    ranks: Ranks
    trainer: MaskTrainer
    data: Data
    start: dict
    validation: Validation = field(init=False)
    seconds: float = field(init=False)

    def __post_init__(self):
        options = self.options
        path = self.progress / VALIDATION
        self.validation = Validation(self.data.validation, path, options.eval_every, options.steps)
        self.seconds = self.start["seconds"]

    @property
    def model(self) -> nn.Module:
        return self.trainer.model

    @property
    def output(self) -> Path:
        return Path(self.options.output)

    @property
    def progress(self) -> Path:
        """Folder of the trainer."""
        return self.output / PROGRESS

    def begin(self) -> None:
        """Prepare the first step; afterwards ``--resume`` can continue the run."""
        self.trainer.begin(progress=wants_bars())
        self.start = {"format": FORMAT, **self.start, "run": self.trainer.run_id}
        self.ranks.run_on_main(self._write_start)

    def _write_start(self) -> None:
        changed = changed_weights(masked_layers(self.model))
        if changed:
            write_logits(Logits({}, changed, {}), self.progress / START_WEIGHTS)
        perplexity = self.evaluate()
        if not wants_bars():
            report(f"step 0 of {self.options.steps}: validation perplexity {perplexity:.2f}")
        write_record(self.progress / START, self.start)

    def resume(self) -> None:
        """Restore logits and validation perplexities from the folder."""
        with naming("resume", "restore the model, the text and the content of the folder when the run was interrupted"):
            self.trainer.resume(progress=wants_bars())
            if self.ranks.is_main_process and self.start["run"] != self.trainer.run_id:
                raise ValueError(f"expected the {START} of this run, got another run's")
        steps_done = self.trainer.steps_done
        if self.ranks.is_main_process:
            self.validation.restore(self.start["run"], steps_done)
        self.seconds += sum(record["seconds"] for record in self.trainer.metrics)
        report(f"{steps_done} steps are done")

    def evaluate(self) -> float:
        """Compute the validation perplexity after the steps that are done, and store it."""
        tokens = sum(record["tokens"] for record in self.trainer.metrics)
        return self.validation.evaluate(self.model, self.start["run"], self.trainer.steps_done, tokens)

    def save_logits(self) -> None:
        """Write the logits, with weights that have changed, and metadata for exports."""
        name = self.options.model
        metadata = {
            "model": str(Path(name).resolve()) if Path(name).exists() else name,
            "pattern": self.options.pattern,
            "dtype": self.options.dtype,
            "weights": digest_of_weights(self.model),
            "dense_weights": self.start["dense_weights"],
            "base": self.start["base"],
            "run": self.start["run"],
        }
        make_folder((self.output / LOGITS_FILE).parent)
        save_logits(self.model, self.output / LOGITS_FILE, metadata)


def take_steps(run: Run) -> bool:
    """Take the remaining steps, until the run ends or a signal comes; return whether it has ended, on rank 0 alone."""
    trainer = run.trainer
    steps = run.options.steps
    has_more = run.ranks.run_on_main(_has_more, run)
    began = time.perf_counter()
    seconds_of_evaluations = run.validation.seconds
    by_products = _has_faster_products(run)
    with StopSignals() as signals, attention(run.model, "eager" if by_products else None):
        if has_more and run.ranks.is_main_process:
            _take_steps_on_main(run, signals, "sdpa" if by_products else None)
        elif has_more:
            trainer.run(steps - trainer.steps_done, progress=False, after_step=signals.have_come)
    if not run.ranks.is_main_process:
        return False
    run.seconds += time.perf_counter() - began - (run.validation.seconds - seconds_of_evaluations)
    if trainer.steps_done == steps:
        return True
    if not signals.came and run.validation.has_diverged():
        report(
            f"stopped after {trainer.steps_done} steps: the validation perplexity was NaN, or over 10% above the "
            "initial mask's, at two evaluations in a row"
        )
        return True
    run.save_logits()
    report(f"stopped after {trainer.steps_done} steps; {resume_command(run.output)}")
    return False


def _has_more(run: Run) -> bool:
    """Return whether steps remain; evaluate first if the process before was interrupted at this point."""
    if run.validation.is_due(run.trainer.steps_done):
        run.evaluate()
    return run.trainer.steps_done < run.options.steps and not run.validation.has_diverged()


def _take_steps_on_main(run: Run, signals: StopSignals, attention_of_evaluations: str | None) -> None:
    trainer = run.trainer
    # logits of an earlier stop: if the run is killed now, they must not look like its result
    (run.output / LOGITS_FILE).unlink(missing_ok=True)
    with step_reports(run.options, trainer.steps_done, run.start["run"]) as reports:

        def after_step(record: StepRecord) -> bool:
            perplexity = None
            if run.validation.is_due(trainer.steps_done):
                with attention(run.model, attention_of_evaluations):
                    perplexity = run.evaluate()
            reports.add(record, perplexity)
            return run.validation.has_diverged() or signals.have_come()

        try:
            trainer.run(run.options.steps - trainer.steps_done, progress=wants_bars(), after_step=after_step)
        except (FloatingPointError, torch.OutOfMemoryError, KeyboardInterrupt, OSError, ValueError):
            if not trainer.broken:
                run.save_logits()
            report(f"stopped after {trainer.steps_done} steps; {resume_command(run.output)}")
            raise


def _has_faster_products(run: Run) -> bool:
    """Return whether plain products compute the attention of the steps faster than torch's function."""
    if not run.trainer.estimator.needs_gradients or run.options.seq_len > SHORT:
        return False
    weight = run.model.get_input_embeddings().weight
    modules = run.model.modules()
    used = {module.config._attn_implementation for module in modules if hasattr(module, "set_attn_implementation")}
    return weight.is_cpu and weight.dtype == torch.bfloat16 and used == {"sdpa"}


@contextmanager
def attention(model: nn.Module, implementation: str | None) -> Iterator[None]:
    """Compute attention by an implementation of transformers; None: by that of the model."""
    if implementation is None:
        yield
        return
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class StopSignals:
    """SIGINT and SIGTERM, which are noted so that the step can end first; a second signal has its usual effect.

    Attributes:
        came: numbers of the signals that have come.
    """

    def __init__(self):
        self.came: list[int] = []
        self._handlers = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # a job in the background must not end by a signal for the foreground
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        self._put_back_handlers()

    def have_come(self, record: StepRecord | None = None) -> bool:
        """Return whether a signal has come; also an ``after_step`` of the trainer."""
        return bool(self.came)

    def _note(self, number: int, frame) -> None:
        self.came.append(number)
        if rank_of_torchrun() == 0 and sys.__stderr__ is not None:
            # without its buffer: the handler may interrupt a write of the same thread, which has the lock
            line = f"{signal.Signals(number).name}: the run stops after this step\n"
            os.write(sys.__stderr__.fileno(), line.encode())
        self._put_back_handlers()

    def _put_back_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
