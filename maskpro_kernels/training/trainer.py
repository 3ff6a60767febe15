"""The training loop: forwards under drawn masks, and what the estimator makes of them back to the logits."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from itertools import takewhile
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..functional.checks import FLOAT32_MAX, describe
from ..functional.masks import top_n_mask
from ..modules import MaskedLinear, advance, counter_states, evaluating, masked_layers
from ..ranks import Ranks
from .batches import count_tokens, digest, weighted_mean, weights_of
from .initial_losses import InitialLosses
from .journal import Draw, Entry
from .reinforce import Reinforce
from .run_folder import RunFolder, settings_of
from .score_updates import replay
from .straight_through import StraightThrough

# Who makes which forwards of a step
PARALLEL = ("data", "draws")


@dataclass(frozen=True)
class StepRecord:
    """What one step saw.

    Attributes:
        step: index of the step, from 0.
        loss: loss under the drawn masks: of several batches the mean by ``weights_of``, of several draws their mean.
        residual: with ``Reinforce`` that loss less the loss of the same batches under the initial masks.
        advantage: with ``Reinforce`` the residual less the tracker.
        tracker: with ``Reinforce`` the tracker after the step. All three are None where a step has several draws.
        flip_rate: share of the groups of one layer, another at each step, whose draw left the top-N mask.
        tokens: elements of the batches' input ids.
        seconds: wall-clock time of the step.
    """

    step: int
    loss: float
    residual: float | None
    advantage: float | None
    tracker: float | None
    flip_rate: float
    tokens: int
    seconds: float


class MaskTrainer:
    """Learns the masks of a converted model: with ``Reinforce`` by forward passes alone, else by backward as well.

    ``batches`` is a finite sequence, visited in order and again from the start. For ``Reinforce`` the losses of the
    initial masks m_0, the top-N masks of the logits at the first step, are computed once a batch, before the logits
    move; a batch is known again by what is in it. Behind a step after which the estimator ``refreshes``, m_0 becomes
    the top-N masks of the logits that this step has left, and the losses are computed anew. Modules other than
    MaskedLinear run in eval mode; but with ``StraightThrough`` those whose attribute ``gradient_checkpointing`` is
    true, as blocks of transformers have it, are in training mode themselves (not what is in them), since only then
    they compute their activations anew in backward.

    Where torch.distributed is initialized, all its processes, the ranks, make a trainer of the same model, batches and
    settings and call the same methods. They share the forwards of a step, as ``parallel`` says, tell each other the
    losses, and each does the same update of all logits: with ``Reinforce`` nothing but numbers moves between them, and
    the logits get the bits of one process with the same draws and batches a step, if it computes the same losses. With
    ``StraightThrough`` the slopes are summed up as well, a layer at a time: all ranks have the same bits, those of one
    process but for the order of the sum. Rank 0 alone reads and writes ``output_dir``, and a run may go on with another
    number of ranks.

    Args:
        model: a model with MaskedLinear layers, see ``convert``.
        loss_fn: ``loss_fn(model, batch)`` -> 0-dim tensor. Compute it in float32: in bfloat16 the
            residual drowns in rounding.
        batches: sequence of batches, in whatever form ``loss_fn`` takes.
        estimator: a ``Reinforce`` or ``StraightThrough``, one for each trainer.
        seed: seed of all draws; their step starts at 0. Logits that have been learned need another seed than
            before, or the first draws are those that they have learned from.
        output_dir: folder for what the run leaves, made if missing: ``metrics.jsonl``, a line a step; snapshots of the
            logits; and with ``Reinforce`` a journal, from which the logits of every step can be rebuilt. Where it holds
            a run, that one is gone on with by ``resume``, or nothing is done.
        snapshot_minutes: minutes between snapshots. ``run`` leaves one at its end, too; with ``StraightThrough`` also
            where an error ends it, but for one within an update.
        snapshots: how many are kept, besides the first.
        max_skipped: how many steps in a row may have a loss that is not finite, or with ``StraightThrough`` a
            gradient. They count as done. Such a loss moves nothing; such a gradient leaves the logits of its weights,
            and a warning names the layer. One more ends the run; one that is resumed counts on.
        accumulate: batches a step. The loss of a draw is the mean of theirs, weighted by their tokens: of a mapping the
            "labels" that are not -100, else what is in the "attention_mask", else the elements of the input ids.
        parallel: without effect on one process. "data": every rank makes all draws of a step, for its own share of the
            batches; ``accumulate`` has to be a multiple of the ranks. "draws": every rank makes its own share of the
            draws, for all batches; ``draws`` of ``Reinforce`` has to be a multiple of the ranks.
        timeout: seconds that a rank waits for the others in a step, and for each of their losses of the initial masks.
            As long as it takes it waits for ``after_step`` of ``run``, and, before the first step and where initial
            masks are refreshed, for what rank 0 reads and writes and for settings that are compared.

    Raises:
        TypeError, ValueError: an argument is not as above, or logits are not finite. The model is then
            as it was.

    ``begin``, ``step``, ``run`` and ``resume`` raise ``ranks.MissingRanks``, a RuntimeError, which names the ranks that
    have ended or did not come in time, and ValueError on all ranks where one has another model, batches or settings.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[nn.Module, object], Tensor],
        batches: Sequence,
        estimator: Reinforce | StraightThrough,
        *,
        seed: int,
        output_dir: str | Path | None = None,
        snapshot_minutes: float = 10.0,
        snapshots: int = 2,
        max_skipped: int = 0,
        accumulate: int = 1,
        parallel: str = "data",
        timeout: float = 600.0,
    ):
        self.layers = masked_layers(model)
        if not callable(loss_fn):
            raise TypeError(f"loss_fn: expected a callable, got {type(loss_fn).__name__}")
        if not isinstance(batches, Sequence) or isinstance(batches, str):
            raise TypeError(
                f"batches: expected a sequence, such as list(loader) of a DataLoader, got {type(batches).__name__}"
            )
        if not len(batches):
            raise ValueError("batches: expected at least one batch, got none")
        if not isinstance(estimator, (Reinforce, StraightThrough)):
            raise TypeError(f"estimator: expected Reinforce or StraightThrough, got {type(estimator).__name__}")
        if estimator.taken:
            raise ValueError("estimator: expected a new one, got one that another trainer has taken")
        if isinstance(seed, bool) or not isinstance(seed, int) or not -(1 << 63) <= seed < 1 << 63:
            raise ValueError(f"seed: expected an int of 64 bits, got {seed!r}")
        if isinstance(snapshot_minutes, bool) or not isinstance(snapshot_minutes, (int, float)) or snapshot_minutes < 0:
            raise ValueError(f"snapshot_minutes: expected a number of at least 0, got {snapshot_minutes!r}")
        if isinstance(snapshots, bool) or not isinstance(snapshots, int) or snapshots < 1:
            raise ValueError(f"snapshots: expected an int of at least 1, got {snapshots!r}")
        if isinstance(max_skipped, bool) or not isinstance(max_skipped, int) or max_skipped < 0:
            raise ValueError(f"max_skipped: expected an int of at least 0, got {max_skipped!r}")
        if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
            raise ValueError(f"accumulate: expected an int of at least 1, got {accumulate!r}")
        if parallel not in PARALLEL:
            raise ValueError(f'parallel: expected "data" or "draws", got {parallel!r}')
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < math.inf:
            raise ValueError(f"timeout: expected a number of seconds above 0, got {timeout!r}")
        ranks, draws = Ranks(timeout), estimator.draws if isinstance(estimator, Reinforce) else 1
        check_shares(ranks.world, parallel, accumulate, draws)
        _check_layers(self.layers, estimator)
        self.model = model
        self.loss_fn = loss_fn
        self.batches = batches
        self.estimator = estimator
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.seed = seed
        self.snapshot_minutes, self.snapshots = float(snapshot_minutes), snapshots
        estimator.taken = True
        self.steps_done = 0
        self.max_skipped = max_skipped
        self.accumulate, self.parallel = accumulate, parallel
        self.ranks = ranks
        pairs = [(draw, place) for draw in range(draws) for place in range(accumulate)]
        owners = [(place if parallel == "data" else draw) % ranks.world for draw, place in pairs]
        # By rank: the forwards of a step that it makes, as (draw, which of the step's batches)
        self._shares = [
            [pair for pair, owner in zip(pairs, owners, strict=True) if owner == rank] for rank in range(ranks.world)
        ]
        self._initial_losses = InitialLosses(batches, ranks)
        # Of rank 0 alone
        self._folder: RunFolder | None = None
        if self.output_dir is not None and ranks.rank == 0:
            self._folder = RunFolder(self.output_dir, journaled=isinstance(estimator, Reinforce))
        self._begun = self._broken = False
        self._skipped = 0
        for counter_state in counter_states(model):
            counter_state.seed.fill_(seed)
            counter_state.step.fill_(0)

    @property
    def broken(self) -> bool:
        """Whether the last step was broken off from its update on, or the trainer is closed.

        The logits may then be of no step, or of another one than ``steps_done`` tells.
        """
        return self._broken

    def begin(self, progress: bool = False) -> None:
        """What stands before the first step, which does it where it has not been done.

        With ``Reinforce`` the losses of the initial masks; and in ``output_dir`` the first snapshot and the journal.

        Args:
            progress: whether to show a bar.

        Raises:
            ValueError: if ``output_dir`` holds a run.
            FloatingPointError: if a loss of the initial masks is not finite.
        """
        if self._begun:
            return
        self.ranks.connect()
        if self.output_dir is not None or self.ranks.world > 1:
            run = self._agreed_settings(logits=digest(layer.logits for layer in self.layers.values()))
        if self.output_dir is not None:
            self.ranks.first(lambda: self._start_folder(run))
        if isinstance(self.estimator, Reinforce):
            draws = self.estimator.draws
            losses = self._losses_of_initial_masks(progress) if draws == 1 else []
            if self.output_dir is not None:
                self.ranks.first(lambda: self._folder.start_journal(losses, draws))
        self._begun = True

    def run(
        self, steps: int, progress: bool = True, after_step: Callable[[StepRecord], bool | None] | None = None
    ) -> list[StepRecord]:
        """Take ``steps`` steps under a progress bar and return their records.

        Args:
            steps: how many.
            progress: whether to show the bar.
            after_step: called with the record of every step; true ends the run. The ranks wait for each other's,
                however long it takes, and all end where one is true.

        Raises:
            ValueError: if ``steps`` is not an int of at least 1, or more than ``StraightThrough`` has left.
            FloatingPointError: see ``step``.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps: expected an int of at least 1, got {steps!r}")
        self._check_steps(steps)
        self.begin(progress)
        records = []
        try:
            with tqdm(total=steps, desc="learning", unit="step", disable=not progress or self.ranks.rank > 0) as bar:
                for _ in range(steps):
                    record = self.step()
                    records.append(record)
                    shown = {"loss": f"{record.loss:.4f}"}
                    if record.residual is not None:
                        shown |= {"residual": f"{record.residual:+.2e}", "advantage": f"{record.advantage:+.2e}"}
                    rate = record.tokens / record.seconds
                    bar.set_postfix(**shown, flips=f"{record.flip_rate:.1e}", tokens_per_s=f"{rate:.0f}")
                    bar.update()
                    if self.ranks.on_any(None if after_step is None else partial(after_step, record)):
                        break
        except BaseException:
            self._keep_steps()
            raise
        self._snapshot()
        return records

    def step(self) -> StepRecord:
        """A forward for each draw and batch under newly drawn masks, one update of all logits.

        Raises:
            ValueError: if ``StraightThrough`` gets a loss without gradient, or has taken all its steps.
            FloatingPointError: if the update is not finite: logits and tracker are then as before the step. And where
                more steps in a row than ``max_skipped`` have had a loss, or with ``StraightThrough`` a gradient, that
                is not finite: this one counts as done, too.
            RuntimeError: if the last step was broken off from its update on, or the trainer is closed.
        """
        if self._broken:
            raise RuntimeError(
                "step: expected a trainer whose last step has ended and that is not closed; make another one, and call "
                "resume if there is an output_dir"
            )
        self._check_steps(1)
        self.begin()
        for counter_state in counter_states(self.model):
            counter_state.step.fill_(self.steps_done)
        start = time.perf_counter()
        first = self.steps_done * self.accumulate
        batches = [self.batches[(first + place) % len(self.batches)] for place in range(self.accumulate)]
        if isinstance(self.estimator, Reinforce):
            loss, residual, advantage, flip_rate = self._reinforce(batches)
            tracker, bad = self.estimator.delta if self.estimator.draws == 1 else None, []
        else:
            loss, flip_rate, bad = self._straight_through(batches)
            residual = advantage = tracker = None
        advance(self.model)
        record = StepRecord(
            step=self.steps_done,
            loss=loss,
            residual=residual,
            advantage=advantage,
            tracker=tracker,
            flip_rate=flip_rate,
            tokens=sum(map(count_tokens, batches)),
            seconds=time.perf_counter() - start,
        )
        self._skipped = self._skipped + 1 if bad or not math.isfinite(loss) else 0
        self.steps_done += 1
        self._broken = False
        if self._folder is not None:
            self._folder.add_metrics(asdict(record))
            if time.monotonic() - self._snapshot_time >= 60 * self.snapshot_minutes:
                self._snapshot()
        if self._skipped:
            self._check_skipped(record, bad)
        return record

    def _check_skipped(self, record: StepRecord, bad: Sequence[str]) -> None:
        """Raise FloatingPointError where too many steps have been skipped; ``bad`` are layers by their gradients."""
        told = f"loss of step {record.step}: expected a finite number, got {record.loss}"
        if bad:
            told = f"gradients of step {record.step}: expected finite numbers, got others in {bad}"
        if self._skipped > self.max_skipped:
            others = f", after {self._skipped - 1} others in a row" if self._skipped > 1 else ""
            raise FloatingPointError(told + others)
        if bad and self.ranks.rank == 0:
            # the record does not show it, as it does a loss
            warnings.warn(f"{told}; the logits of their weights are as before", stacklevel=3)

    def resume(self) -> int:
        """Go on with the run in ``output_dir``, which another process has left at any moment; gives its steps.

        With ``Reinforce`` the newest sound snapshot is loaded and the journal's steps behind it are taken again by
        their updates alone: the logits get the bits of a run that was never broken off. With ``StraightThrough`` the
        steps behind the snapshot are lost.

        Damaged snapshots are passed over and set aside, with a warning. What lies beyond the weights and logits of
        the masked layers, the batches and the settings, such as other weights, has to be as it was; so do objects in
        the batches that are neither tensors nor arrays nor plain values.

        Raises:
            ValueError: if the trainer has taken a step or has no ``output_dir``; if there is no run, or one of other
                weights, settings, batches or layers; if the journal, all snapshots or the losses of refreshed initial
                masks are damaged; or if another trainer holds the folder. Nothing has changed then.
        """
        if self._begun:
            raise ValueError("resume: expected a trainer that has taken no step, got one that has")
        if self.output_dir is None:
            raise ValueError("output_dir: expected the folder of a run, got none")
        self.ranks.connect()
        settings = self._agreed_settings()
        restored = self.ranks.first(lambda: self._restore(settings))
        self._begun, self._broken = True, True
        for layer in self.layers.values():
            self.ranks.spread_(layer.logits.detach())
        if isinstance(self.estimator, Reinforce):
            self.estimator.delta, self.estimator.mean_square = restored.estimator
        else:
            self.estimator.set_mean_squares(self.layers, restored.estimator)
        self._initial_losses.losses, self.steps_done = restored.initial_losses, restored.steps
        self._skipped = restored.skipped
        self._broken = False
        for line in restored.warnings if self.ranks.rank == 0 else ():
            warnings.warn(line, stacklevel=2)
        return restored.steps

    def close(self) -> None:
        """Let another trainer have ``output_dir``, and part from the other ranks; this one takes no further step."""
        if self._folder is not None:
            self._folder.close()
            self._broken = self._begun
        self.ranks.close()

    def _agreed_settings(self, **others: str) -> dict:
        """What the run is told from others by, these beside it, once all ranks have the same."""
        settings = settings_of(self.layers, self.estimator, self.batches, self.seed, self.accumulate) | others
        self.ranks.agree(settings | {"parallel": self.parallel})
        return settings

    def _start_folder(self, run: Mapping) -> None:
        self._folder.start(run)
        self._snapshot()

    def _snapshot(self) -> None:
        if self._folder is None:
            return
        state = {}
        if isinstance(self.estimator, StraightThrough):
            state = {"mean_squares": self.estimator.mean_squares(self.layers), "skipped": self._skipped}
        tensors = {name: layer.logits for name, layer in self.layers.items()}
        self._folder.add_snapshot(self.steps_done, tensors, state, self.snapshots)
        self._snapshot_time = time.monotonic()

    def _keep_steps(self) -> None:
        """Behind an error: leave a snapshot of the steps that ``resume`` could not have otherwise."""
        if self._folder is None or self._folder.journaled or self._broken:
            return
        # the error that came first is the one to be told
        with suppress(OSError, RuntimeError):
            self._snapshot()

    def _restore(self, settings: Mapping) -> _Restored:
        """Set the logits to those of the run in ``output_dir``; gives the rest of it."""
        folder = self._folder
        folder.take_over()
        try:
            saved = folder.read(settings)
            refreshed = [entry.step + 1 for entry in saved.entries if self._refreshes(entry)]
            initial_losses = folder.initial_losses(saved, refreshed[-1]) if refreshed else saved.initial_losses
            estimator = copy.copy(self.estimator)
            records = _records_of(saved.entries, estimator)
            folder.go_on(saved, list(map(asdict, records)))
        except BaseException:
            folder.close()
            raise
        # nothing that a disk can refuse from here on
        self._begun, self._broken = True, True
        with torch.no_grad():
            for name, layer in self.layers.items():
                layer.logits.copy_(saved.tensors[name])
        for entry in saved.entries[saved.snapshot_step :]:
            replay(self.layers, self.seed, entry)
        self._snapshot_time = time.monotonic()
        if isinstance(estimator, Reinforce):
            moved = estimator.delta, estimator.mean_square
            skipped = len(list(takewhile(lambda entry: entry.skipped, reversed(saved.entries))))
        else:
            # snapshots of earlier runs do not tell
            moved, skipped = saved.state["mean_squares"], saved.state.get("skipped", 0)
        return _Restored(saved.steps, initial_losses, moved, skipped, saved.warnings)

    def _check_steps(self, steps: int) -> None:
        most = self.estimator.steps if isinstance(self.estimator, StraightThrough) else None
        if most is not None and self.steps_done + steps > most:
            raise ValueError(f"steps: expected at most {most - self.steps_done} more of StraightThrough's {most}, "
                             f"got {steps}")  # fmt: skip

    @torch.inference_mode()
    def _reinforce(self, batches: Sequence) -> tuple[float, float | None, float | None, float]:
        """(loss, residual, advantage, flip rate) of the forwards; the logits move by the scores of their masks.

        Of several draws the mean loss, and neither residual nor advantage.
        """
        estimator, one, weights = self.estimator, self.estimator.draws == 1, weights_of(batches)
        initial_loss = self._initial_loss(batches, weights) if one else 0.0
        own = []
        with self._modes(drawing=True):
            for draw, place in self._shares[self.ranks.rank]:
                with self._drawing(draw):
                    own.append(_value_of(self.loss_fn(self.model, batches[place])))
        flip_rate = self._flip_rate()
        losses, _ = self._exchanged(own, weights, flip_rate)
        skipped = not all(map(math.isfinite, losses))
        before = estimator.delta, estimator.mean_square
        advantages = [0.0] * len(losses) if skipped else estimator.advantages(losses, initial_loss)
        coefs = [estimator.lr * advantage / estimator.draws for advantage in advantages]
        try:
            if not all(abs(coef) <= FLOAT32_MAX for coef in coefs):
                raise FloatingPointError(
                    f"lr * advantage of step {self.steps_done}: expected a float32, got {max(coefs, key=abs)}"
                )
            draws = tuple(Draw(*draw) for draw in zip(range(estimator.draws), losses, coefs, strict=True))
            entry = Entry(self.steps_done, sum(map(count_tokens, batches)), initial_loss, draws, skipped)
            if self._folder is not None:
                # ahead of the update: a run that is killed in between takes the step again from here
                self._folder.journal.append(entry)
        except BaseException:
            estimator.delta, estimator.mean_square = before
            raise
        # until the step has ended logits may have moved in a part of the layers
        self._broken = True
        replay(self.layers, self.seed, entry)
        if self._refreshes(entry):
            # ahead of the next step: from a run that is killed in between it is the same one
            self._initial_losses.losses = None
        loss = math.nan if skipped else math.fsum(losses) / len(losses)
        if skipped or not one:
            return loss, None, None, flip_rate
        return loss, loss - initial_loss, advantages[0], flip_rate

    def _refreshes(self, entry: Entry) -> bool:
        """Whether the initial masks of the steps behind it are those of its logits."""
        return self.estimator.refreshes(entry.draws[0].loss, entry.initial_loss)

    def _exchanged(
        self, own: Sequence[float], weights: Sequence[Fraction], flip_rate: float, way: float = 0.0
    ) -> tuple[list[float], bool]:
        """(loss of every draw, whether ``way`` is the same on all ranks), of the losses of this rank's forwards.

        Raises:
            RuntimeError: if the ranks are not at the same step, or have not drawn the same.
        """
        rows = self.ranks.gather([self.steps_done, flip_rate, way, *own])
        for name, at in (("step", 0), ("flip rate", 1)):
            others = {rank: row[at] for rank, row in enumerate(rows) if row[at] != rows[0][at]}
            if others:
                raise RuntimeError(
                    f"ranks: expected the {name} of rank 0 on all of them, {rows[0][at]:g}, got by rank {others}"
                )
        losses = {}
        for share, (_, _, _, *row) in zip(self._shares, rows, strict=True):
            losses |= zip(share, row, strict=True)
        draws = len(losses) // len(weights)
        by_draw = [
            weighted_mean([losses[draw, place] for place in range(len(weights))], weights) for draw in range(draws)
        ]
        return by_draw, all(row[2] == way for row in rows)

    @contextmanager
    def _drawing(self, draw: int):
        """The layers make this one of a step's draws."""
        try:
            for counter_state in counter_states(self.model):
                counter_state.draw.fill_(draw)
            yield
        finally:
            for counter_state in counter_states(self.model):
                counter_state.draw.fill_(0)

    @torch.enable_grad()
    def _straight_through(self, batches: Sequence) -> tuple[float, float, list[str]]:
        """(loss, flip rate) of the forwards, and layers whose gradient was not finite.

        The logits move in the last backward, which a loss that is not finite does not reach.
        """
        flip_rate, weights = self._flip_rate(), weights_of(batches)
        share, own = self._shares[self.ranks.rank], []
        with (
            self._modes(drawing=True, checkpointing=True),
            self.estimator.attached(self.layers, self.steps_done, self.ranks, len(share)) as backward_pass,
        ):
            for _, place in share[:-1]:
                backward_pass.backward(self._differentiable(batches[place], own), float(weights[place]))
            place = share[-1][1]
            loss = self._differentiable(batches[place], own)
            (value,), alike = self._exchanged(own, weights, flip_rate, backward_pass.way(loss))
            if not math.isfinite(value):
                return value, flip_rate, []
            # until the step has ended logits may have moved in a part of the layers
            self._broken = True
            bad = backward_pass.backward(loss, float(weights[place]), alike)
        return value, flip_rate, bad

    def _differentiable(self, batch, values: list[float]) -> Tensor:
        """The loss of a batch, whose value is appended."""
        loss = self.loss_fn(self.model, batch)
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise ValueError(f"loss_fn: expected a loss with a gradient, got {describe(loss)}")
        values.append(_value_of(loss))
        return loss

    def _losses_of_initial_masks(self, progress: bool) -> list[float]:
        """Loss of every batch under m_0, computed once for each m_0, in the composition the steps will use."""
        initial = self._initial_losses
        if initial.losses is None:
            losses = initial.computed(self._loss_under_top_n_masks, self.steps_done, progress)
            if self.output_dir is not None and self.steps_done:
                # ahead of the steps that are compared with them; those of the first stand in the journal's header
                self.ranks.first(lambda: self._folder.add_initial_losses(self.steps_done, losses))
            initial.losses = losses
        return initial.losses

    @torch.inference_mode()
    def _loss_under_top_n_masks(self, batch) -> float:
        """A forward under the masks that the logits have made likeliest."""
        with self._modes(drawing=False):
            return _value_of(self.loss_fn(self.model, batch))

    def _initial_loss(self, batches: Sequence, weights: Sequence[Fraction]) -> float:
        """Loss under m_0 of the batches of this step."""
        self._losses_of_initial_masks(progress=False)
        return weighted_mean(self._initial_losses.of(batches, self.steps_done * self.accumulate), weights)

    def _flip_rate(self) -> float:
        """Share of groups whose draw left the top-N mask, in the layer whose turn it is."""
        layer = list(self.layers.values())[self.steps_done % len(self.layers)]
        return float((layer.drawn_codes() != top_n_mask(layer.logits_on_device(), layer.pattern)).float().mean())

    @contextmanager
    def _modes(self, drawing: bool, checkpointing: bool = False):
        """Masked layers draw or take their top-N masks, everything else is in eval mode; restored afterwards."""
        with evaluating(self.model):
            for layer in self.layers.values():
                layer.train(drawing)
            for module in self.model.modules():
                if checkpointing and getattr(module, "gradient_checkpointing", False):
                    module.training = True
            yield


def _value_of(loss: Tensor | float) -> float:
    if not (loss.numel() == 1 if isinstance(loss, Tensor) else isinstance(loss, Real)):
        raise ValueError(f"loss_fn: expected a 0-dim tensor or a number, got {describe(loss)}")
    return float(loss.detach() if isinstance(loss, Tensor) else loss)


def check_shares(world: int, parallel: str, accumulate: int, draws: int) -> None:
    """Raise ValueError unless that many ranks can share the forwards of a step, as ``parallel`` says, alike."""
    shared, parts = ("accumulate", accumulate) if parallel == "data" else ("draws", draws)
    if parts % world:
        raise ValueError(f'{shared}: expected a multiple of the {world} ranks with parallel="{parallel}", got {parts}')


def _check_layers(layers: Mapping[str, MaskedLinear], estimator: Reinforce | StraightThrough) -> None:
    """Raise ValueError unless the estimator can move the logits of these layers."""
    by_id = {}
    for name, layer in layers.items():
        # shards of one layer start at groups of their own
        other = by_id.setdefault((layer.layer, layer.group_offset), name)
        if other != name:
            raise ValueError(
                f"model: expected another layer id in each layer, or they draw the same noise, "
                f"got {layer.layer} in {other} and {name}"
            )
        if layer.logits.is_meta or layer.weight.is_meta:
            raise ValueError(
                f"model: expected weights and logits in memory, got some on meta in {name}; what offloads weights "
                f"loses what their logits learn"
            )
        if not torch.isfinite(layer.logits).all():
            raise ValueError(f"model: expected finite logits, got NaN or infinity in {name}")
        if isinstance(estimator, StraightThrough):
            if not layer.logits.requires_grad:
                raise ValueError(f"model: expected logits that require a gradient, got frozen ones in {name}")
            if not layer.logits.is_contiguous():
                raise ValueError(f"model: expected contiguous logits, got {layer.logits.stride()} in {name}")


class _Restored(NamedTuple):
    """What a run goes on with, beside its logits: the state of its estimator is what that moves by."""

    steps: int
    initial_losses: list[float] | None
    estimator: tuple[float, float | None] | dict[str, float]
    skipped: int
    warnings: list[str]


def _records_of(entries: Sequence[Entry], estimator: Reinforce) -> list[StepRecord]:
    """What the journal tells of its steps; ``estimator`` is moved through them."""
    records = []
    for entry in entries:
        losses, one = [draw.loss for draw in entry.draws], len(entry.draws) == 1
        advantages = [None] if entry.skipped else estimator.advantages(losses, entry.initial_loss)
        record = StepRecord(
            step=entry.step,
            loss=math.fsum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.nan,
            residual=losses[0] - entry.initial_loss if one and not entry.skipped else None,
            advantage=advantages[0] if one else None,
            tracker=estimator.delta if one else None,
            flip_rate=math.nan,
            tokens=entry.tokens,
            seconds=0.0,
        )
        records.append(record)
    return records
