"""The settings of a run of `maskpro learn`: completed from the command line, checked, and as its files hold them."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from ..extras import missing
from ..pattern import NMPattern
from ..pruning.gap import LARGEST_GAP, gap_for_flip_rate
from ..ranks import Ranks
from ..text.data import is_path
from ..text.mixture import SELF, in_a_batch, other_kind, parse_sources, resolved, shared_out, texts_of
from ..training.estimator import Estimator
from ..training.sharing import PARALLEL, check_shares
from .arguments import DTYPES, check_least, device_of, telling
from .changed_weights import REFITTED
from .estimator_options import class_of, complete_options
from .losses import complete_loss
from .models import is_path_of_model
from .texts import check_sources

# What a run learns from, and how many windows the model draws at most, where nothing is said
DATA, SAMPLES = "pydoc:0.5,self:0.5", 2048
# Of this process, not of the run
NO_SETTINGS = ("run", "device_given", "parallel", "quiet", "bars")


def complete(args: argparse.Namespace) -> Estimator:
    """Put in what the command line left out, check what can be told before anything is loaded; gives the estimator.

    Raises:
        ValueError, TypeError: if an argument is missing, out of its range, or does not go with another.
    """
    for name in ("model", "output"):
        if not hasattr(args, name):
            raise ValueError(f"{name}: expected --{name}, or --resume alone, got none")
    pattern = NMPattern(args.pattern)
    if args.dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {args.dtype!r}")
    if args.refit not in REFITTED:
        raise ValueError(f"refit: expected one of {', '.join(REFITTED)}, got {args.refit!r}")
    for name, value in class_of(args).run_defaults._asdict().items():
        setattr(args, name, getattr(args, name, value))
    args.eval_every = getattr(args, "eval_every", max(args.steps // 5, 1))
    check_least(args, steps=1, batch_size=1, accumulate=1, seq_len=2, init_batches=1)
    check_least(args, eval_windows=1, eval_length=2, eval_every=1, seed=0)
    if args.calibration_batches is not None:
        check_least(args, calibration_batches=1)
    if args.seed >= 1 << 63:
        raise ValueError(f"seed: expected an int below 2**63, got {args.seed}")
    _complete_gap(args, pattern)
    _complete_texts(args)
    complete_loss(args)
    return complete_options(args)


def _complete_texts(args: argparse.Namespace) -> None:
    """Check what a run learns from, and find a text of another kind to look at."""
    args.data = getattr(args, "data", DATA)
    shares = dict(parse_sources(args.data))
    with telling("eval_windows"):
        shared_out(texts_of(args.data), args.eval_windows)
    other = other_kind(args.data)
    if other is not None:
        args.other_data = getattr(args, "other_data", other)
    check_sources(args, [*shares, *([args.other_data] if hasattr(args, "other_data") else [])])
    if SELF in shares:
        args.samples = getattr(args, "samples", SAMPLES)
        check_least(args, samples=in_a_batch(shares[SELF], args.batch_size))
    elif hasattr(args, "samples"):
        raise ValueError(
            f"samples: expected none, since {SELF!r} is not in --data {args.data}, got {args.samples}; leave it out"
        )


def _complete_gap(args: argparse.Namespace, pattern: NMPattern) -> None:
    """Check the gap, or find that of ``--flip-rate``."""
    if not (math.isfinite(args.gap) and args.gap > 0):
        raise ValueError(f"gap: expected a positive number, got {args.gap}")
    if hasattr(args, "flip_rate"):
        args.gap = gap_for_flip_rate(args.flip_rate, pattern)
    if class_of(args).needs_flips and args.gap > LARGEST_GAP:
        raise ValueError(f"gap: expected at most {LARGEST_GAP:g}, which is as far as noise reaches, got {args.gap}")


def parallel_of(args: argparse.Namespace) -> str:
    """How the ranks share the forwards of a step."""
    return getattr(args, "parallel", PARALLEL[0])


def check_ranks(args: argparse.Namespace, ranks: Ranks, draws: int) -> None:
    """Raise ValueError unless the ranks can share the work, and each can take a device of its own."""
    check_shares(ranks.world, parallel_of(args), args.accumulate, draws)
    if device_of(args.device).type != "cpu" and ranks.world > 1 and torch.device(args.device).index is not None:
        raise ValueError(
            f"device: expected one without a number, for each rank takes that of its own, got {args.device!r}"
        )


def check_tensorboard(args: argparse.Namespace) -> None:
    """Raise ValueError if scalars are asked for that cannot be written."""
    lacking = missing("tensorboard") if hasattr(args, "tensorboard") else None
    if lacking:
        raise ValueError(f"tensorboard: expected {lacking}")


def reported_settings(args: argparse.Namespace) -> dict:
    """The settings as a report has them, beside which the gap stands: with a flip rate it was not given.

    Paths are absolute, so that a run which went on elsewhere tells the same.
    """
    settings = stored_settings(args) | {"output": args.output}
    return {name: value for name, value in settings.items() if name != "gap"}


def stored_settings(args: argparse.Namespace) -> dict:
    """The settings by which a run goes on, from whatever folder."""
    settings = {name: value for name, value in vars(args).items() if name not in (*NO_SETTINGS, "output")}
    if is_path_of_model(settings["model"]):
        settings["model"] = str(Path(settings["model"]).resolve())
    if "other_data" in settings and is_path(settings["other_data"]):
        settings["other_data"] = str(Path(settings["other_data"]).resolve())
    settings["data"] = resolved(settings["data"])
    return settings
