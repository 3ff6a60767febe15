"""What a run of `maskpro learn` learns by: its loss, and the teacher of one whose weights change."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from ..ranks import Ranks
from ..text.losses import KINDS, DistillationLoss, distillation_loss
from ..text.teacher import TeacherCache
from ..training.step import LossFn
from .inputs import Inputs
from .progress import tell
from .run_files import PROGRESS

# Folder of the dense model's logits in the progress of a run
TEACHER = "teacher"


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


def loss_of(args: argparse.Namespace, resumed: bool) -> LossFn:
    """The loss of complete settings. Where weights will change, it has a cache of the teacher.

    Args:
        resumed: whether that is in the folder of the run; else it is still empty, and in memory.
    """
    if args.loss == "ce":
        return distillation_loss("ce")
    cache = None
    if args.refit != "none" or getattr(args, "train_weights", None) is not None:
        cache = TeacherCache(folder=Path(args.output) / PROGRESS / TEACHER if resumed else None)
    return distillation_loss(args.loss, args.loss_temperature, cache=cache)


def fill_teacher(args: argparse.Namespace, inputs: Inputs, loss_fn: LossFn, ranks: Ranks) -> None:
    """Ask the dense model about all batches that a run will see, if it will be gone then; ranks share them."""
    if not isinstance(loss_fn, DistillationLoss) or loss_fn.cache is None:
        return
    seen = inputs.calibration
    ranks.all_of(lambda: loss_fn.fill(inputs.model, seen[ranks.rank :: ranks.world], progress=args.bars))
    tell(f"the dense model has been asked about {len(seen)} batches, for it changes")


def keep_teacher(output: Path, loss_fn: LossFn, ranks: Ranks) -> None:
    """Write what ``fill_teacher`` has found into the folder of the run."""
    if isinstance(loss_fn, DistillationLoss) and loss_fn.cache is not None:
        ranks.all_of(lambda: loss_fn.cache.keep_in(output / PROGRESS / TEACHER))
