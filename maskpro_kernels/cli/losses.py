"""What a run of `maskpro learn` learns by: its loss, and the teacher of one whose weights change."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from ..learn.step import LossFn
from ..ranks import Ranks
from ..text.losses import KINDS, DistillationLoss, TeacherCache, distillation_loss
from .arguments import telling
from .changed_weights import changes_weights
from .inputs import Inputs
from .progress import tell
from .run_files import PROGRESS, TEACHER


def complete_loss(args: argparse.Namespace) -> None:
    """Check the loss, and put in its temperature where the command line left it out; ValueError if one is bad."""
    if args.loss not in KINDS:
        raise ValueError(f"loss: expected one of {', '.join(KINDS)}, got {args.loss!r}")
    if args.loss != "ce":
        args.loss_temperature = getattr(args, "loss_temperature", 1.0)
        if not (math.isfinite(args.loss_temperature) and args.loss_temperature > 0):
            raise ValueError(f"loss_temperature: expected a positive number, got {args.loss_temperature}")
    elif hasattr(args, "loss_temperature"):
        raise ValueError(
            f"loss_temperature: expected none, for it is of kl and ce+kl alone, got {args.loss_temperature}; leave it "
            "out"
        )


def loss_of(args: argparse.Namespace) -> LossFn:
    """The loss of complete settings. Where weights will change, it has a cache of the teacher in the run's folder."""
    if args.loss == "ce":
        return distillation_loss("ce")
    cache = None
    if changes_weights(args):
        cache = TeacherCache(folder=Path(args.output) / PROGRESS / TEACHER)
    return distillation_loss(args.loss, args.loss_temperature, cache=cache)


def fill_teacher(args: argparse.Namespace, inputs: Inputs, loss_fn: LossFn, ranks: Ranks) -> None:
    """Ask the dense model about all batches of a run, if it will be gone then; ranks share them.

    Each batch is written as soon as it is asked about, and is not asked about again.

    Raises:
        ValueError: if the folder holds what another model has said, or is none that all ranks see.
        OSError: if it cannot be written.
    """
    if not isinstance(loss_fn, DistillationLoss) or loss_fn.cache is None:
        return
    batches, folder = inputs.calibration, str(loss_fn.cache.folder)
    tell(f"asking the dense model about {len(batches)} batches, for it changes; what it says is kept in {folder}")

    def fill() -> None:
        with telling("cache", f"it is in {folder!r}: give another --output, or remove that folder"):
            loss_fn.fill(inputs.model, batches[ranks.rank :: ranks.world], progress=args.bars)

    ranks.all_of(fill)
