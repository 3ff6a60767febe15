"""The training loop: steps of an estimator, and the folder of the run."""

from __future__ import annotations

import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..files import digest
from ..fsdp import resetting
from ..functional.checks import check_no_flat_parameters, describe
from ..functional.masks import expand_mask, top_n_mask
from ..modules import (
    MaskedLinear,
    advance,
    agree_on_shards,
    check_finite,
    counter_states,
    is_sharded,
    masked_layers,
    without_gradients,
)
from ..ops.philox import MAX_STEPS
from ..ranks import Ranks
from ..shards import is_distributed
from .estimator import Entry, Estimator, LossFn, Step, StepRecord, StepResult, check_float, check_whole, top_n_loss
from .model_masks import ModelMasks, least_margin
from .run import PREFIX, RunFolder, SavedRun, restore, settings_of, write_parts
from .snapshots import StoredTensors, newest_snapshot
from .step_batches import BatchCycle, BatchStream, InitialLosses, weighted_mean

LOGGER = logging.getLogger(__name__)


class MaskTrainer:
    """Learn the masks of a converted model by steps of an estimator.

    The trainer visits the batches in order, and again from the start. All modules but the masked layers run in eval
    mode. If the estimator runs backward, as ``StraightThrough`` does, a module whose attribute
    ``gradient_checkpointing`` is true is in training mode itself, its children not. Otherwise it would not compute its
    activations again in backward.

    ``Reinforce`` compares losses with those under the initial masks m_0, the top-N masks of the logits at the first
    step. The trainer computes these once a batch, before the logits move; it recognizes a batch by its content. When a
    step ``refreshes``, m_0 becomes the top-N masks of the logits after that step.

    If torch.distributed is initialized, all its processes (ranks) make a trainer with the same model, batches and
    settings, and call the same methods. They share the batches of a step and exchange their losses; each makes the same
    update of all logits. With ``Reinforce`` ranks exchange only numbers. The logits then have the bits of one process
    with the same draws and batches a step, if it computes the same losses. With ``StraightThrough`` ranks also sum the
    slopes, a layer at a time: all ranks have the same bits, which differ from those of one process only by the order of
    the sum. Rank 0 alone reads and writes ``output_dir``, and a run may resume with another number of ranks. If
    ``fully_shard`` of torch has split the layers into rows, each rank has the logits of its own rows alone. All ranks
    then take part in each forward, and each writes its rows of a snapshot, so they need a common disk.

    Args:
        model: a model with MaskedLinear layers, see ``convert``.
        loss_fn: ``loss_fn(model, batch)`` -> 0-dim tensor. Compute it in float32: in bfloat16 rounding is larger than
            the residual.
        batches: sequence of batches, in any form that ``loss_fn`` takes. Or another iterable, such as a DataLoader:
            ``StraightThrough`` then takes batches one by one, and starts again at the end; ``Reinforce`` loads those of
            all its ``steps`` into a list now.
        estimator: a ``Reinforce``, a ``StraightThrough`` or another ``Estimator``, one for each trainer.
        seed: seed of all draws; the step starts at 0. To train learned logits further, use another seed: otherwise the
            first draws repeat those that the logits have learned from.
        output_dir: folder of the run, made if missing. It gets ``metrics.jsonl`` with a line for each step; snapshots
            of the logits, the first and the two newest; and with ``Reinforce`` a journal, which restores the logits of
            any step. To continue a run in the folder, call ``resume``.
        snapshot_minutes: minutes between snapshots. ``run`` also writes one at its end. Without a journal it also
            writes one after an error, unless the error came within an update.
        max_skipped: number of steps in a row whose loss, or with ``StraightThrough`` a gradient, may be not finite.
            They count as done. After such a loss nothing moves. Such a gradient moves no weight of its layer, and not
            the logits of the weights that have it; a warning names the layer. One more such step ends the run. A
            resumed run continues the count.
        accumulate: batches a step. The loss of a draw is the mean of their losses, weighted by tokens: in a mapping the
            "labels" other than -100, else the ones of the "attention_mask", else the elements of the input ids. Each
            rank takes its share of the batches, so ``accumulate`` must be a multiple of the number of ranks.
        timeout: seconds that a rank waits for the others in a step, and for each of their losses under the initial
            masks. There is no limit for ``after_step`` of ``run``, for the comparison of settings, and for files that
            rank 0 reads and writes before the first step and when initial masks are refreshed.

    Raises:
        TypeError, ValueError: an argument is not as above, logits are not finite, or with ``Reinforce`` all gaps are
            too wide for a draw to change a mask. The model is then unchanged. For layers cut into rows ``begin`` raises
            it.

    Warns:
        UserWarning: if all ``steps`` of ``StraightThrough`` together cannot change a mask, or with slopes of the usual
            size change none. ``begin``: if ``Reinforce``
            gets draws that change less than one group on average.

    ``begin``, ``step``, ``run`` and ``resume`` raise torch's RuntimeError if another rank has ended or is not there in
    time, and ValueError on all ranks if one has another model, batches or settings.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, batches: Iterable, estimator: Estimator, *,
                 seed: int, output_dir: str | Path | None = None, snapshot_minutes: float = 10.0,
                 max_skipped: int = 0, accumulate: int = 1, timeout: float = 600.0):  # fmt: skip
        self.layers = masked_layers(model)
        check_no_flat_parameters("model", model)
        if not callable(loss_fn):
            raise TypeError(f"loss_fn: expected a callable, got {type(loss_fn).__name__}")
        _check_batches(batches)
        if not isinstance(estimator, Estimator):
            raise TypeError(f"estimator: expected an Estimator, such as Reinforce(), got {type(estimator).__name__}")
        if estimator.taken:
            raise ValueError("estimator: expected a new one, got one that another trainer has taken")
        check_whole("seed", seed, -(1 << 63), (1 << 63) - 1)
        check_float("snapshot_minutes", snapshot_minutes, 0.0, math.inf)
        check_whole("max_skipped", max_skipped, 0)
        check_whole("accumulate", accumulate, 1)
        check_float("timeout", timeout, 0.0, strict=True)
        try:
            folders = () if output_dir is None else (Path(output_dir), *Path(output_dir).absolute().parents)
            if not all(folder.is_dir() for folder in folders if folder.exists()):
                raise NotADirectoryError("there is a file")
        except (TypeError, OSError) as error:
            raise ValueError(f"output_dir: expected a folder, got {describe(output_dir)}: {error}") from error
        self.ranks = Ranks(timeout)
        self._sharded = is_sharded(self.layers)
        if accumulate % self.ranks.world_size:
            raise ValueError(f"accumulate: expected a multiple of the {self.ranks.world_size} ranks, got {accumulate}")
        _check_layers(self.layers, estimator)
        if not self._sharded or self.ranks.world_size == 1:
            # for rows ``begin`` checks: here a rank would wait for one that has raised for its own rows
            check_finite(self.layers)
            if estimator.max_logit_travel > 0.0:
                least = least_margin(self.layers, estimator.usual_logit_travel)
                _check_reach(estimator, least, self.ranks.is_main_process)
        self._batches = _batches_of_steps(batches, estimator, accumulate, self.ranks)
        self.model = model
        self.loss_fn = loss_fn
        self.batches = batches
        self.estimator = estimator
        self.seed = seed
        self.accumulate = accumulate
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.snapshot_minutes = float(snapshot_minutes)
        self.max_skipped = max_skipped
        self.masks = ModelMasks(self.layers)
        self.steps_done = 0
        self._initial_losses = InitialLosses(self._batches.sequence, self.ranks, self._sharded)
        # on rank 0 alone
        self._folder: RunFolder | None = None
        if self.output_dir is not None and self.ranks.is_main_process:
            self._folder = RunFolder(self.output_dir, estimator)
        self._snapshot_time = time.monotonic()
        self._begun = False
        self._broken = False
        self._skipped = 0
        self._initial_masks: dict[str, Tensor] | None = None
        estimator.taken = True
        for counter_state in counter_states(model):
            counter_state.seed.fill_(seed)
            counter_state.step.fill_(0)

    @property
    def broken(self) -> bool:
        """True if the last step ended within its update, so that logits belong to no step, or the trainer is closed."""
        return self._broken

    @property
    def metrics(self) -> list[dict]:
        """Fields of ``StepRecord`` for each step of the run in ``output_dir``; on rank 0 alone."""
        return [] if self._folder is None else self._folder.rows

    @property
    def run_id(self) -> str | None:
        """Unique id of the run in ``output_dir``; None before the run begins. On rank 0 alone."""
        return None if self._folder is None else self._folder.run.get("id")

    def begin(self, progress: bool = False) -> None:
        """Prepare the run: ``step`` calls it if the user has not; ``progress`` shows a bar.

        With ``Reinforce`` it computes the losses under the initial masks. In ``output_dir`` it writes the first
        snapshot and the journal. It reports how many groups a draw changes on average, or that masks are fixed, beside
        the bar or to the log.

        Raises:
            ValueError: if ``output_dir`` holds a run.
            FloatingPointError: if a loss under the initial masks is not finite.
        """
        if self._begun:
            return
        self.ranks.connect()
        self.estimator.begin(self.layers)
        if self.output_dir is not None or self.ranks.world_size > 1:
            settings = self._agreed_settings(with_logits=True)
        if self._sharded and self.ranks.world_size > 1:
            margin = least_margin(self.layers, self.estimator.usual_logit_travel)
            least = min(rank_margin for (rank_margin,) in self.ranks.all_gather_numbers([margin]))
            _check_reach(self.estimator, least, self.ranks.is_main_process)
        if self.output_dir is not None:
            self.ranks.run_on_main(self._start_folder, settings)
            if self._sharded:
                self._save_snapshot()
        with resetting(self.model):
            losses = self._losses_of_initial_masks(progress) if self.estimator.needs_initial_losses else []
        if self.output_dir is not None and self.estimator.journaled:
            self.ranks.run_on_main(RunFolder.start_journal, self._folder, losses)
        if self.output_dir is None:
            self._initial_masks = {name: _top_n(layer).cpu() for name, layer in self.layers.items()}
        self._report_flips(progress)
        self._begun = True

    def _start_folder(self, settings: Mapping) -> None:
        self._folder.start(settings)
        if not self._sharded:
            # an error of rank 0 alone ends all ranks
            self._save_snapshot()

    def moved(self) -> int | None:
        """Count the groups whose N largest logits differ from those before the first step.

        None before the first step. With ``output_dir`` its first snapshot has these masks: None if it is damaged, and
        on ranks other than 0. Without it the memory of the host has them, a byte a group (4 bytes for M = 16). For
        layers that are cut over ranks all ranks must call it, and all get the number.
        """
        masks = self._initial_masks if self.output_dir is None else self._first_masks()
        if masks is None:
            return None
        moved = 0
        for name, layer in self.layers.items():
            masks_now = _top_n(layer)
            of_layer = (masks_now != masks[name].to(masks_now.device)).sum()
            moved += int(of_layer if layer.shard is None else layer.shard.summed(of_layer))
        return moved

    def weights_moved(self) -> float | None:
        """Length of the change of kept weights that learn, divided by their length before the first step.

        Both are over the present masks of all layers. None before ``begin``, without weights that learn, without
        ``output_dir``, if its first snapshot is damaged, and on ranks other than 0.
        """
        learned = self.estimator.learned_weights()
        if not learned or self.output_dir is None or not self._begun or not self.ranks.is_main_process:
            return None
        first = self._first_tensors()
        if first is None:
            return None
        change = 0.0
        length = 0.0
        for name, tensor in learned.items():
            layer = self.layers[name]
            # of 16 bits those that the model has: in float32 it may have moved by less than their rounding
            weight = layer.weight.detach().float()
            before = torch.empty_like(weight)
            first.read_into({PREFIX + tensor: before})
            kept = expand_mask(_top_n(layer).to(weight.device), layer.pattern)
            before *= kept
            length += float(before.square().sum(dtype=torch.float64))
            change += float((weight * kept - before).square_().sum(dtype=torch.float64))
        return math.sqrt(change / length) if length else 0.0

    def _first_masks(self) -> dict[str, Tensor] | None:
        """Top-N masks of the first snapshot: of this rank's rows, or of whole layers on rank 0 alone."""
        first = None
        if self._begun and self._sharded:
            first = self.ranks.run_on_main(self._first_tensors)
        elif self._begun and self.ranks.is_main_process:
            first = self._first_tensors()
        if first is None:
            return None
        masks = {}
        for name, layer in self.layers.items():
            logits = torch.empty_like(layer.logits.detach())
            first.read_into({name: logits})
            local = logits.to_local() if is_distributed(logits) else logits
            masks[name] = top_n_mask(local, layer.pattern)
        return masks

    def _first_tensors(self) -> StoredTensors | None:
        with suppress(OSError, ValueError):
            _, tensors, _, _ = newest_snapshot(self.output_dir, 0, self._folder.run)
            return tensors
        return None

    def _report_flips(self, progress: bool) -> None:
        """Report how many groups a draw changes on average; warn if these are too few for the estimator."""
        if self.estimator.max_logit_travel == 0.0:
            if self.ranks.is_main_process:
                _report("masks are fixed: only weights learn", progress)
            return
        flips = self.masks.expected_flips()
        if not self.ranks.is_main_process:
            return
        groups = sum(layer.logits.numel() // layer.pattern.m for layer in self.layers.values())
        number = f"{flips:,.0f}" if flips >= 10 else f"{flips:.3g}"
        line = f"a draw changes {number} of {groups:,} groups on average, a share of {flips / groups:.2g}"
        if self.estimator.needs_flips and flips < 1:
            warnings.warn(
                f"{line}: most draws are the initial masks, from which {type(self.estimator).__name__} learns nothing; "
                f"convert with a smaller gap, such as that of a flip_rate of {10 / groups:.1g}",
                stacklevel=4,
            )
        else:
            _report(line, progress)

    def run(
        self, steps: int, progress: bool = True, after_step: Callable[[StepRecord], bool | None] | None = None
    ) -> list[StepRecord]:
        """Take ``steps`` steps under a progress bar and return their records.

        Args:
            after_step: called with the record of each step; if it returns true, the run ends. Ranks wait for each
                other's without a time limit, and all end if one returns true.

        Warns:
            UserWarning: about layers without a gradient, such as those that the loss does not depend on.

        Raises:
            TypeError, ValueError: if ``steps`` is not an int of at least 1, or more than the estimator allows.
            FloatingPointError: see ``step``.
        """
        check_whole("steps", steps, 1)
        self._check_steps(steps)
        self.begin(progress)
        records = []
        try:
            with tqdm(
                total=steps, desc="learning", unit="step", disable=not progress or not self.ranks.is_main_process
            ) as bar:
                for _ in range(steps):
                    record = self.step()
                    records.append(record)
                    numbers = {"residual": record.residual, "advantage": record.advantage}
                    signed = {name: f"{number:+.2e}" for name, number in numbers.items() if number is not None}
                    rate = f"{record.tokens / record.seconds:.0f}"
                    bar.set_postfix(
                        loss=f"{record.loss:.4f}", **signed, flips=f"{record.flip_rate:.1e}", tokens_per_s=rate
                    )
                    bar.update()
                    if self.ranks.on_any(None if after_step is None else partial(after_step, record)):
                        break
        except BaseException:
            # without a journal ``resume`` needs it. Ranks with rows cannot: the others may not take part
            if not (self.broken or self.estimator.journaled or self._sharded) and self._folder is not None:
                # raise the first error
                with suppress(OSError, RuntimeError, ValueError):
                    self._save_snapshot()
            raise
        if self.output_dir is not None:
            self._save_snapshot()
        unlearned = self.estimator.layers_without_gradient()
        if 0 < len(unlearned) < len(self.layers) and self.ranks.is_main_process:
            share = sum(self.layers[name].weight.numel() for name in unlearned)
            share /= sum(layer.weight.numel() for layer in self.layers.values())
            message = (
                f"no finite gradient other than 0 in {len(unlearned)} layers, {share:.1%} of the weights with a mask"
            )
            warnings.warn(f"{message}; they have not learned: {', '.join(unlearned)}", stacklevel=2)
        return records

    def step(self) -> StepRecord:
        """Take a step: a forward for each draw and batch, then one update.

        Masks are newly drawn and logits move, unless masks are fixed and only weights learn.

        Raises:
            ValueError: if a loss has no gradient, all steps are taken, an iterator of batches has ended, or
                ``output_dir`` has another lock or journal.
            FloatingPointError: if the update is not finite: logits and tracker are then unchanged. Also if the loss, or
                with ``StraightThrough`` a gradient, was not finite in more steps in a row than ``max_skipped``: this
                step then counts as done.
            RuntimeError: if the last step ended within its update, or the trainer is closed. Also, with an
                ``output_dir``, in a process that was forked from that of the trainer.
        """
        if self.broken:
            raise RuntimeError(
                "step: expected an open trainer whose last step was complete, got another; make a new one, and call "
                "resume if there is an output_dir"
            )
        self._check_steps(1)
        self.begin()
        for counter_state in counter_states(self.model):
            counter_state.step.fill_(self.steps_done)
        start = time.perf_counter()
        with torch.enable_grad() if self.estimator.needs_gradients else without_gradients(self.model):
            batches = self._batches.of_step(self.steps_done)
            step = Step(self, batches, self._initial_loss, self._begin_update)
            with resetting(self.model):
                result = self.estimator.step(step)
        step.check_updates()
        if result.refreshes:
            # a run that is killed before the next step resumes to the same step
            self._initial_losses.losses = None
        advance(self.model)
        record = result.record(step.index, step.tokens, step.flip_rate, time.perf_counter() - start)
        self._skipped = self._skipped + 1 if result.bad_layers or not math.isfinite(result.loss) else 0
        self.steps_done += 1
        self._broken = False
        if self._folder is not None:
            self._folder.add_row(asdict(record))
        if self.output_dir is not None and self._snapshot_is_due():
            self._save_snapshot()
        if self._skipped:
            self._check_skipped(record, result)
        return record

    def resume(self, progress: bool = False, check: Callable[[str], object] | None = None) -> int:
        """Continue the run in ``output_dir``, which may have ended at any moment, and return the number of its steps.

        It loads the newest intact snapshot and sets damaged ones aside, with a warning. With ``Reinforce`` it then
        applies the updates of the later steps in the journal: the logits get the bits of a run that was never
        interrupted. If initial masks were refreshed after the snapshot, it computes their losses again. Without a
        journal, as with ``StraightThrough``, the steps after the snapshot are lost.

        Batches that are not a sequence are iterated up to the current step; they must be those of the run. ``resume``
        compares the parameters and stored buffers of the model, batches and settings. It does not compare objects in
        batches that are neither tensors nor arrays nor plain values: the user must keep these the same.

        Args:
            progress: whether to show a bar.
            check: called with the id of the run before anything changes, on rank 0. Its errors are raised.

        Raises:
            ValueError: if the trainer has taken a step or has no ``output_dir``; if there is no run, or one of another
                version, other weights, settings, batches or layers; if the journal, all snapshots or the losses of
                refreshed initial masks are damaged; or if another trainer uses the folder. Nothing has changed then,
                except that batches of an iterator may be consumed.
        """
        if self._begun:
            raise ValueError("resume: expected a trainer that has taken no step, got one that has")
        if self.output_dir is None:
            raise ValueError("output_dir: expected the folder of a run, got none")
        self.ranks.connect()
        self.estimator.begin(self.layers)
        settings = self._agreed_settings()
        saved = self.ranks.run_on_main(self._read_folder, settings, progress, check)
        self.ranks.run_on_all(self._skip_batches, saved)
        self._begun = True
        self._broken = True
        self._initial_losses.losses = saved.initial_losses
        refresh = partial(self._refresh_losses, saved.refreshed, progress)
        with resetting(self.model):
            restore(saved, self.ranks, self.layers, self.estimator, self.seed, refresh)
        self.estimator.load_state(saved.state)
        self.steps_done = saved.steps
        self._skipped = saved.skipped
        self._snapshot_time = time.monotonic()
        self._broken = False
        for line in saved.warnings if self.ranks.is_main_process else ():
            warnings.warn(line, stacklevel=2)
        return saved.steps

    def _read_folder(self, settings: Mapping, progress: bool, check: Callable[[str], object] | None) -> SavedRun:
        saved = self._folder.resume(settings, partial(self._batches.skip, progress=progress), check)
        # no disk error can come from here on
        self._begun = True
        self._broken = True
        return saved

    def _skip_batches(self, saved: SavedRun) -> None:
        if not self.ranks.is_main_process:
            self._batches.skip(saved.steps, saved.batches, progress=False)

    def _refresh_losses(self, step: int, progress: bool) -> None:
        self.steps_done = step
        self._losses_of_initial_masks(progress)

    def close(self) -> None:
        """Release ``output_dir`` for another trainer and leave the other ranks; this trainer takes no further step."""
        if self._folder is not None:
            self._folder.close()
            self._broken = self._begun
        self.ranks.close()

    def _begin_update(self, entry: Entry | None) -> None:
        if self._folder is not None:
            # before the update: a run that is killed in between resumes from this entry
            self._folder.add_entry(entry)
        # until the step ends, perhaps only some layers have moved
        self._broken = True

    def _agreed_settings(self, with_logits: bool = False) -> dict:
        """Settings that a resumed run must share, after a check that all ranks have the same."""
        agree_on_shards(self.ranks, self.layers)
        batches = self._batches.sequence
        settings = settings_of(
            self.model, self.layers, self.estimator, batches, self.seed, self.accumulate, self.loss_fn
        )
        if with_logits:
            settings["logits"] = digest(layer.logits for layer in self.layers.values())
        if self.ranks.world_size > 1:
            name = getattr(self.loss_fn, "__qualname__", type(self.loss_fn).__qualname__)
            self.ranks.agree(settings | {"loss_fn": name})
        return settings

    def _snapshot_is_due(self) -> bool:
        is_due = time.monotonic() - self._snapshot_time >= 60 * self.snapshot_minutes
        # by the clock of rank 0, the only writer unless layers are cut into rows
        return self.ranks.all_gather_object(is_due)[0] if self._sharded else is_due

    def _save_snapshot(self) -> None:
        step = self.steps_done
        estimator = self.estimator
        tensors = {name: layer.logits.detach() for name, layer in self.layers.items()}
        tensors |= {PREFIX + name: tensor for name, tensor in estimator.tensors().items()}
        state = {
            "estimator": estimator.state(),
            "initial_losses": self._initial_losses.losses,
            "skipped": self._skipped,
            "batches": self._batches.digest_before(step),
        }
        if self._sharded:
            write_parts(self._folder, self.ranks, step, tensors, state)
        elif self._folder is not None:
            self._folder.add_snapshot(step, tensors, state)
        self._snapshot_time = time.monotonic()

    def _losses_of_initial_masks(self, progress: bool) -> list[float]:
        """Loss of each batch under m_0, computed once for each m_0, with the batches of the steps."""
        initial = self._initial_losses
        if initial.losses is None:
            loss_of = partial(top_n_loss, self.model, self.layers, self.loss_fn)
            initial.losses = initial.compute(loss_of, self.steps_done, progress)
        return initial.losses

    def _initial_loss(self, batches: Sequence, weights: Sequence[Fraction]) -> float:
        self._losses_of_initial_masks(progress=False)
        return weighted_mean(self._initial_losses.of(batches, self.steps_done * self.accumulate), weights)

    def _check_steps(self, steps: int) -> None:
        remaining = MAX_STEPS - 1 - self.steps_done
        if steps > remaining:
            raise ValueError(f"steps: expected at most {remaining} more, as the counter allows, got {steps}")
        limit = self.estimator.steps
        if limit is not None and self.steps_done + steps > limit:
            raise ValueError(
                f"steps: expected at most {limit - self.steps_done} more of {type(self.estimator).__name__}'s {limit}, "
                f"got {steps}"
            )

    def _check_skipped(self, record: StepRecord, result: StepResult) -> None:
        message = f"loss of step {record.step}: expected a finite number, got {record.loss}"
        if result.bad_layers:
            names = list(result.bad_layers)
            message = f"gradients of step {record.step}: expected finite numbers, got others in {names}"
        if self._skipped > self.max_skipped:
            earlier = f", after {self._skipped - 1} others in a row" if self._skipped > 1 else ""
            raise FloatingPointError(message + earlier)
        if result.bad_layers and self.ranks.is_main_process:
            warnings.warn(f"{message}; these layers moved only in part, or not at all", stacklevel=3)


def _report(line: str, progress: bool) -> None:
    """Write a line beside the progress bar, or to the log if there is none."""
    if progress:
        tqdm.write(line, file=sys.stderr)
    else:
        LOGGER.info(line)


def _top_n(layer: MaskedLinear) -> Tensor:
    return top_n_mask(layer.own_logits.detach(), layer.pattern)


def _check_batches(batches: object) -> None:
    if not isinstance(batches, Iterable) or isinstance(batches, (str, bytes, Mapping, Tensor)):
        raise TypeError(
            f"batches: expected an iterable of batches, such as a list or a DataLoader, got {type(batches).__name__}"
        )
    if isinstance(batches, Sequence) and not len(batches):
        raise ValueError("batches: expected at least one batch, got none")


def _batches_of_steps(
    batches: Iterable, estimator: Estimator, accumulate: int, ranks: Ranks
) -> BatchCycle | BatchStream:
    """Cycle over a sequence; take another iterable one by one, or as a list if all batches are needed at the start."""
    if isinstance(batches, Sequence):
        return BatchCycle(batches, accumulate)
    if not (estimator.needs_initial_losses or estimator.journaled):
        return BatchStream(batches, accumulate, ranks)
    if estimator.steps is None:
        raise ValueError(
            f"estimator: expected a number of steps, such as {type(estimator).__name__}(steps=1000), since all "
            "batches are loaded before the first step and they are not a sequence, got steps=None"
        )
    sequence = list(islice(batches, estimator.steps * accumulate))
    _check_batches(sequence)
    return BatchCycle(sequence, accumulate)


def _check_layers(layers: Mapping[str, MaskedLinear], estimator: Estimator) -> None:
    by_id = {}
    for name, layer in layers.items():
        # shards of one layer start at different groups
        other = by_id.setdefault((layer.layer, layer.group_offset), name)
        if other != name:
            raise ValueError(
                f"model: expected another layer id in each layer, so that noise differs, "
                f"got {layer.layer} in {other} and {name}"
            )
        if layer.logits.is_meta or layer.weight.is_meta:
            raise ValueError(
                f"model: expected weights and logits in memory, got some on meta in {name}; a library that offloads "
                f"weights would lose the updates of logits"
            )
        if estimator.needs_gradients:
            if not layer.logits.requires_grad:
                raise ValueError(f"model: expected logits that require a gradient, got frozen ones in {name}")
            if not layer.own_logits.is_contiguous():
                raise ValueError(f"model: expected contiguous logits, got {layer.own_logits.stride()} in {name}")


def _check_reach(estimator: Estimator, least: float, warn: bool) -> None:
    """Warn if no mask can change, or none is likely to, given the smallest gap ``least``.

    ValueError if no mask can change and the estimator needs changed draws.
    """
    travel = estimator.max_logit_travel
    if least > travel and estimator.needs_flips:
        raise ValueError(
            f"model: expected a kept and a dropped logit at most {travel:g} apart, got at least {least:.4g}: noise "
            f"crosses no wider gap, and {type(estimator).__name__} learns only from draws that change a mask; "
            "give convert a smaller gap"
        )
    if least > travel and warn:
        warnings.warn(
            f"no mask will change: all steps together can cross a gap of {travel:g}, but the smallest gap is "
            f"{least:.4g}; set more steps or a smaller gap, or in Python a larger max_update",
            stacklevel=3,
        )
    elif least > estimator.usual_logit_travel and warn:
        warnings.warn(
            f"few masks will change, if any: with slopes of their root mean square all steps together cross a gap of "
            f"{estimator.usual_logit_travel:.3g}, but the smallest gap is {least:.4g}; set a higher lr, more steps or "
            "a smaller gap",
            stacklevel=3,
        )
