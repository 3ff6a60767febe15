"""The settings of a run of `maskpro learn`: completed from the command line, checked, and as its files hold them."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from ..functional.checks import LARGEST_GAP, check_gap
from ..learn.estimator import Estimator
from ..pattern import NMPattern
from ..prune.convert import gap_for_flip_rate
from ..ranks import Ranks
from ..text.batches import in_a_batch, other_kind, parse_sources, resolved, shared_out, texts_of
from ..text.sources import SELF, is_path
from .arguments import DTYPES, check_device_map, check_least, device_of, telling
from .changed_weights import REFITTED
from .config_file import eval_every_of
from .estimator_options import class_of, complete_options
from .losses import complete_loss
from .models import is_path_of_model
from .start_mask import is_path_of_mask
from .texts import check_sources
from .trackers import check_trackers

# What a run learns from, and how many windows the model draws at most, where nothing is said
DATA, SAMPLES = "stdlib:0.5,self:0.5", 2048
# Of this process, not of the run
NO_SETTINGS = ("run", "given", "config", "quiet", "bars")


def complete(args: argparse.Namespace) -> Estimator:
    """Put in what the command line left out, check what can be told before anything is loaded; gives the estimator.

    Raises:
        ValueError, TypeError: if an argument is missing, out of its range, or does not go with another.
    """
    for name in ("model", "output"):
        if not hasattr(args, name):
            raise ValueError(f"{name}: expected --{name}, or --resume alone, got none")
    pattern = NMPattern(args.pattern)
    for name in ("dtype", "logits_dtype"):
        if getattr(args, name) not in DTYPES:
            raise ValueError(f"{name}: expected one of {', '.join(DTYPES)}, got {getattr(args, name)!r}")
    if args.refit not in REFITTED:
        raise ValueError(f"refit: expected one of {', '.join(REFITTED)}, got {args.refit!r}")
    for name, value in class_of(args).run_defaults._asdict().items():
        setattr(args, name, getattr(args, name, value))
    args.eval_every = getattr(args, "eval_every", eval_every_of(args.steps))
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


def check_process(args: argparse.Namespace, ranks: Ranks) -> None:
    """Check how a run computes and where it reports, which may be another way each time it goes on.

    Of a model that is spread over devices there is no ``device`` then.

    Raises:
        TypeError, ValueError: if this machine cannot, or the ranks cannot share the work.
    """
    if hasattr(args, "device_map"):
        check_device_map(args.device_map)
        # the default of the command line alone: both together are refused there
        vars(args).pop("device", None)
    elif not hasattr(args, "device"):
        raise ValueError("device: expected one in the settings of the run, or a device_map, got none; give --device")
    else:
        device_of(args.device)
    if hasattr(args, "logits_device"):
        device_of(args.logits_device, "logits_device")
    check_checkpointing(args)
    check_ranks(args, ranks)
    check_trackers(args)


def check_checkpointing(args: argparse.Namespace) -> None:
    """Raise TypeError or ValueError unless what is asked for can be, with the estimator of a run."""
    if not isinstance(args.gradient_checkpointing, bool):
        raise TypeError(f"gradient_checkpointing: expected true or false, got {args.gradient_checkpointing!r}")
    if args.gradient_checkpointing and not class_of(args).needs_gradients:
        raise ValueError(
            f"gradient_checkpointing: expected an estimator with a backward pass, got {args.estimator!r}, which keeps "
            "no activations; leave it out"
        )


def logits_of(args: argparse.Namespace) -> dict:
    """The arguments of ``convert`` for the logits of a run."""
    return {
        "gap": args.gap,
        "logits_dtype": DTYPES[args.logits_dtype],
        "logits_device": getattr(args, "logits_device", None),
    }


def _complete_gap(args: argparse.Namespace, pattern: NMPattern) -> None:
    """Check the gap, or find that of ``--flip-rate``."""
    if not (math.isfinite(args.gap) and args.gap > 0):
        raise ValueError(f"gap: expected a positive number, got {args.gap}")
    if hasattr(args, "flip_rate"):
        args.gap = gap_for_flip_rate(args.flip_rate, pattern)
    check_gap(args.gap, DTYPES[args.logits_dtype])
    if class_of(args).needs_flips and args.gap > LARGEST_GAP:
        raise ValueError(f"gap: expected at most {LARGEST_GAP:g}, which is as far as noise reaches, got {args.gap}")


def check_ranks(args: argparse.Namespace, ranks: Ranks) -> None:
    """Raise ValueError unless the ranks can share the work, and each can take a device of its own."""
    if ranks.world == 1:
        return
    if args.accumulate % ranks.world:
        raise ValueError(f"accumulate: expected a multiple of the {ranks.world} ranks, got {args.accumulate}")
    if hasattr(args, "device_map"):
        raise ValueError(
            f"device_map: expected none under torchrun, where each rank has a model on a device of its own, got "
            f"{args.device_map!r}; give --device, or start one process"
        )
    if device_of(args.device).type != "cpu" and torch.device(args.device).index is not None:
        raise ValueError(
            f"device: expected one without a number, for each rank takes that of its own, got {args.device!r}"
        )


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
    if is_path_of_mask(settings["init"]):
        settings["init"] = str(Path(settings["init"]).resolve())
    settings["data"] = resolved(settings["data"])
    return settings
