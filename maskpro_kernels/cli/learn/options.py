"""Options of `maskpro learn`: defaults by estimator, and all checks that need no model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ...extras import missing
from ...functional.checks import LARGEST_GAP, check_gap
from ...learn.estimator import Estimator
from ...learn.reinforce import Reinforce
from ...learn.straight_through import StraightThrough
from ...ops.pattern import NMPattern
from ...prune.initial_masks import INITIAL_MASKS
from ...text.batches import resolved, split_by_share, texts_of
from ..config import Learn
from ..inputs import check_least, device_of, naming

# Defaults of options by estimator; None: all batches
DEFAULTS = {
    "straight-through": {"init": "reconstruction", "gap": 15.0, "calibration_batches": None, "steps": 200, "lr": 0.3},
    "reinforce": {"init": "wanda", "gap": 10.0, "calibration_batches": 16, "steps": 1000, "lr": 50.0},
}
# Options that may change when a run resumes
CHANGEABLE = ("device", "gradient_checkpointing", "report_to")


def complete(options: Learn, world_size: int = 1, resuming: bool = False) -> Learn:
    """Add the defaults of the estimator to options, and check all that needs no model.

    Raises:
        ValueError, TypeError: if an option is missing, out of its range, or excluded by another.
    """
    for name in ("model", "output"):
        if getattr(options, name) is None:
            raise ValueError(f"{name}: expected --{name}, or --resume alone, got none")
    pattern = NMPattern(options.pattern)
    set_options = {name: value for name, value in vars(options).items() if value is not None}
    defaults = dict(DEFAULTS[options.estimator])
    if options.estimator == "straight-through" and options.train_weights is not None:
        # no logit moves
        del defaults["lr"]
        if options.lr is not None:
            raise ValueError(f"lr: expected none with --train-weights, which fixes masks, got {options.lr}")
    options = dataclasses.replace(options, **defaults | set_options)
    if options.eval_every is None:
        options.eval_every = max(options.steps // 5, 1)
    check_least(options, steps=0, batch_size=1, accumulate=1, seq_len=2, calibration_batches=1)
    check_least(options, eval_windows=1, eval_every=1, seed=0, documents=1)
    if options.seed >= 1 << 63:
        raise ValueError(f"seed: expected an int below 2**63, got {options.seed}")
    check_gap(options.gap)
    if options.density is not None and not pattern.n / pattern.m < options.density < 1:
        raise ValueError(
            f"density: expected above {pattern.n / pattern.m:g}, that of {pattern}, and below 1, got {options.density}"
        )
    if options.estimator == "reinforce":
        _check_reinforce(options)
    if options.init not in INITIAL_MASKS and not resuming and not Path(options.init).exists():
        raise ValueError(
            f"init: expected one of {', '.join(INITIAL_MASKS)}, or the path of a mask file, a run or a sparse "
            f"checkpoint, got {options.init!r}"
        )
    with naming("data"):
        texts = texts_of(options.data)
    with naming("eval_windows"):
        split_by_share(texts, options.eval_windows)
    if not options.steps and options.train_weights is not None:
        raise ValueError(f"train_weights: expected none with --steps 0, got {options.train_weights}")
    _check_ranks(options, world_size)
    if options.device != "auto":
        device_of(options.device)
    for name in trackers_of(options):
        if missing("accelerate", name):
            raise ValueError(f"report_to: expected {missing('accelerate', name)}")
    # refuses settings out of their range now
    estimator_of(options)
    return dataclasses.replace(options, pattern=str(pattern))


def _check_reinforce(options: Learn) -> None:
    if options.gap > LARGEST_GAP:
        raise ValueError(f"gap: expected at most {LARGEST_GAP:g}, which noise can cross, got {options.gap}")
    for name in ("train_weights", "gradient_checkpointing"):
        if getattr(options, name):
            raise ValueError(f"{name}: expected none with --estimator reinforce, which uses no gradients")


def _check_ranks(options: Learn, world_size: int) -> None:
    if options.accumulate % world_size:
        raise ValueError(f"accumulate: expected a multiple of the {world_size} ranks, got {options.accumulate}")
    if world_size > 1 and options.device not in (None, "cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, since each rank uses its own, got {options.device!r}")


def estimator_of(options: Learn) -> Estimator:
    """Make the estimator of complete options; ValueError or TypeError if one is out of its range."""
    if options.estimator == "reinforce":
        return Reinforce(lr=options.lr)
    rate = {} if options.lr is None else {"lr": options.lr}
    # without steps there is no gap to cross
    return StraightThrough(steps=options.steps or None, train_weights=options.train_weights, **rate)


def trackers_of(options: Learn) -> tuple[str, ...]:
    """Names of the trackers of ``report_to``."""
    return {"none": (), "all": ("tensorboard", "wandb")}.get(options.report_to, (options.report_to,))


def batches_of_steps(options: Learn) -> int:
    """Most distinct batches of the steps; without steps one, as a trainer has at least one."""
    all_steps = max(options.steps, 1) * options.accumulate
    return all_steps if options.calibration_batches is None else min(options.calibration_batches, all_steps)


def with_absolute_paths(options: Learn) -> dict:
    """Options by name, with absolute paths."""
    stored = {name: value for name, value in vars(options).items() if name not in ("output", "resume")}
    if Path(options.model).exists():
        stored["model"] = str(Path(options.model).resolve())
    if options.init not in (None, *INITIAL_MASKS):
        stored["init"] = str(Path(options.init).resolve())
    return stored | {"data": resolved(options.data)}
