"""Where a run of `maskpro learn` reports its steps, beside its own folder."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from ..extras import missing
from ..ranks import rank_of_torchrun
from ..report.scalars import Tracker
from ..report.tensorboard import TensorBoard
from ..report.wandb import WandB, check_login
from .arguments import telling

TRACKERS, NONE = ("tensorboard", "wandb"), "none"


def chosen_trackers(args: argparse.Namespace) -> list[str]:
    """The names that ``--report-to`` gives, without ``none``."""
    return [name for name in getattr(args, "report_to", ()) if name != NONE]


def check_trackers(args: argparse.Namespace) -> None:
    """Raise ValueError if reports are asked for that cannot be made."""
    given = getattr(args, "report_to", [NONE])
    allowed = (*TRACKERS, NONE)
    if isinstance(given, str) or not given or not set(given) <= set(allowed) or len(set(given)) < len(given):
        raise ValueError(f"report_to: expected one or several of {', '.join(allowed)}, each once, got {given!r}")
    if NONE in given and len(given) > 1:
        raise ValueError(f"report_to: expected {NONE} alone, got it with others, {', '.join(given)}; leave it out")
    lacking = [missing(name) for name in chosen_trackers(args)]
    if any(lacking):
        raise ValueError(f"report_to: expected {next(filter(None, lacking))}")
    # it may ask for a key, and rank 0 alone reports
    if "wandb" in given and rank_of_torchrun() == 0:
        with telling("report_to"):
            check_login()


def open_trackers(
    args: argparse.Namespace, settings: Mapping, steps_done: int, validation: Sequence[Mapping], stack: ExitStack
) -> list[Tracker]:
    """The trackers of a run, which ``stack`` closes.

    Raises:
        OSError: if one cannot be opened.
    """
    output, made = Path(args.output), []
    for name in chosen_trackers(args):
        tracker = (
            TensorBoard(output / name, steps_done) if name == "tensorboard" else WandB(output, settings, steps_done)
        )
        made.append(stack.enter_context(tracker))
        tracker.add_validation(validation)
    return made
