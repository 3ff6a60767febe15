"""Resume: a run that another process has left in a folder, at any moment, back into the logits and the estimator."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from ..modules import MaskedLinear
from .estimator import Estimator, StepResult
from .journal import Entry
from .model_masks import ModelMasks
from .run_folder import RunFolder, SavedRun
from .score_updates import replay
from .sharded_run import is_sharded
from .step import StepRecord

# Tensors of an estimator stand under it in a snapshot, beside the logits under the names of their layers
PREFIX = "estimator/"


class RunState(NamedTuple):
    """Where a run stands, beside its tensors.

    Attributes:
        steps: how many are done.
        state: of the estimator.
        initial_losses: loss of each batch under the initial masks; None where they are not known.
        skipped: how many of the last steps in a row had a loss or gradients that were not finite.
        batches: digest of the batches of these steps, where they were no sequence.
    """

    steps: int
    state: Mapping
    initial_losses: list[float] | None
    skipped: int
    batches: str | None = None


def snapshot_of(
    logits: Mapping[str, Tensor],
    estimator: Estimator,
    initial_losses: list[float] | None,
    skipped: int,
    batches: str | None,
) -> tuple[dict[str, Tensor], dict]:
    """(tensors, state) that a run needs to go on; with a journal that tells the rest, the tensors alone.

    Args:
        logits: by the names of their layers.
        initial_losses, skipped, batches: as in ``RunState``.
    """
    tensors = {**logits, **{PREFIX + name: tensor for name, tensor in estimator.tensors().items()}}
    if estimator.journaled:
        return tensors, {}
    state = {"estimator": estimator.state(), "initial_losses": initial_losses, "skipped": skipped}
    return tensors, state | {"batches": batches}


def read_run(
    folder: RunFolder,
    settings: Mapping,
    estimator: Estimator,
    check: Callable[[int, str | None], object],
    check_run: Callable[[str], object] | None = None,
) -> tuple[SavedRun, RunState]:
    """What a folder holds of a run, once it is mended so that the next step finds it as the last has left it.

    Args:
        folder: of the run; from here on no other trainer has it.
        settings: that the run has to have.
        estimator: whose ``recall`` goes through the journal; its state is that of the last step then.
        check: called with the steps and the digest of their batches before the folder is mended; raises ValueError if
            the run cannot go on.
        check_run: the same, called with the id of the run, and earlier.

    Raises:
        ValueError, OSError: as ``RunFolder.read`` and the checks, or if the snapshot holds other tensors of an
            estimator. Folder and estimator are then as they were.
    """
    before = estimator.state()
    folder.take_over()
    try:
        saved = folder.read(settings)
        if check_run is not None:
            check_run(saved.state["run"]["id"])
        _check_tensors(saved, estimator)
        results = list(map(estimator.recall, saved.entries))
        run_state = _of_journal(folder, saved, results, estimator) if folder.journaled else _of_snapshot(saved)
        check(run_state.steps, run_state.batches)
        folder.go_on(saved, [vars(_record(*pair)) for pair in zip(saved.entries, results, strict=True)])
    except BaseException:
        estimator.load_state(before)
        folder.close()
        raise
    return saved, run_state


def _check_tensors(saved: SavedRun, estimator: Estimator) -> None:
    """Raise ValueError unless the snapshot holds the tensors of the estimator, by names, shapes and dtypes."""
    tensors = estimator.tensors().items()
    own = {PREFIX + name: f"{list(tensor.shape)} of {tensor.dtype}" for name, tensor in tensors}
    kinds = saved.tensors.kinds.items()
    held = {name: f"{shape} of {dtype}" for name, (shape, dtype) in kinds if name.startswith(PREFIX)}
    if own != held:
        raise ValueError(
            f"output_dir: expected a snapshot with the tensors of {estimator.name}, "
            f"{sorted(own.items() - held.items())}, got {sorted(held.items() - own.items())}"
        )


def _of_snapshot(saved: SavedRun) -> RunState:
    state = saved.state
    return RunState(saved.steps, state["estimator"], state["initial_losses"], state["skipped"], state["batches"])


def _of_journal(folder: RunFolder, saved: SavedRun, results: list[StepResult], estimator: Estimator) -> RunState:
    refreshed = [entry.step + 1 for entry, result in zip(saved.entries, results, strict=True) if result.refreshes]
    initial_losses = folder.initial_losses(saved, refreshed[-1]) if refreshed else saved.initial_losses
    skipped = len(list(takewhile(lambda entry: entry.skipped, reversed(saved.entries))))
    return RunState(saved.steps, estimator.state(), initial_losses, skipped)


def _record(entry: Entry, result: StepResult) -> StepRecord:
    """What the journal tells of a step: neither its flip rate nor its time."""
    return StepRecord(
        step=entry.step,
        loss=result.loss,
        residual=result.residual,
        advantage=result.advantage,
        tracker=result.tracker,
        flip_rate=math.nan,
        tokens=entry.tokens,
        seconds=0.0,
    )


@torch.no_grad()
def put_back(saved: SavedRun, layers: Mapping[str, MaskedLinear], estimator: Estimator, seed: int) -> None:
    """Set logits and tensors of the estimator to those of the snapshot, and take the journal's steps behind it again.

    They are taken by their updates alone, without a forward pass, and give the bits of a run that was never
    interrupted. Logits whose rows ranks share are left to ``spread_run``.
    """
    tensors = {PREFIX + name: tensor for name, tensor in estimator.tensors().items()}
    if is_sharded(layers):
        saved.tensors.read_into(tensors)
        return
    saved.tensors.read_into(tensors | {name: layer.logits for name, layer in layers.items()})
    masks = ModelMasks(layers)
    for entry in saved.entries[saved.snapshot_step :]:
        replay(masks, seed, entry)
