"""The command `maskpro`: one line tells what is wrong, and an exit code says so."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import warnings
from contextlib import suppress

import torch

from ..extras import missing
from ..ranks import FailedRank, of_torchrun, rank_of_torchrun, under_torchrun
from .config_file import BESIDE_RESUME, options_given, take_config
from .estimator_options import load_estimators
from .evaluate import evaluate
from .export import export
from .import_checkpoint import import_
from .learn import learn
from .parser import build_parser
from .progress import log_told, tell, tell_as, wants_bars
from .speed import speed

# The optional packages that a command needs
PACKAGES = {
    learn: ("transformers", "matplotlib"),
    evaluate: ("transformers",),
    export: ("transformers",),
    import_: ("transformers",),
    speed: ("transformers",),
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command; under torchrun this rank's part of it, of which rank 0 alone prints.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Returns:
        0; 1 where `maskpro speed` finds that models with the same weights differ; 2 after a wrong argument, an
        unreadable file, a loss that is not finite, too little memory of the device or a rank that has ended, told in
        one line on stderr; 130 after SIGINT; 141 where nobody reads what it prints.

    Raises:
        SystemExit: with 2 after arguments that cannot be parsed, or where a rank ends while steps are taken, told in
            one line too; with 0 after ``--help``.
    """
    argv = sys.argv[1:] if argv is None else argv
    load_estimators()
    args = build_parser().parse_args(argv)
    args.bars, code = wants_bars(args), None
    with warnings.catch_warnings(), log_told():
        warnings.showwarning = _tell_warning
        try:
            _check_packages(args, argv)
            args.given = options_given(argv)
            _check_resume(args)
            take_config(args)
            _check_torchrun(args, argv)
            with under_torchrun():
                code = args.run(args)
            if sys.stdout is not None:
                sys.stdout.flush()
        except KeyboardInterrupt:
            # the reader of stderr may have been interrupted as well
            with suppress(OSError):
                tell("maskpro: interrupted")
            return 128 + signal.SIGINT
        except (ValueError, TypeError, OSError, FloatingPointError, FailedRank) as error:
            if isinstance(error, BrokenPipeError) and _nobody_reads():
                return 128 + signal.SIGPIPE
            tell_as("error", error)
            return 2
        except torch.OutOfMemoryError as error:
            rank = rank_of_torchrun()
            where = f"rank {rank}: " if rank else ""
            # of this rank alone: no other can tell
            tell_as("error", f"{where}{error}; take smaller windows or batches, or another --device", by=rank)
            return 2
    return code or 0


def _nobody_reads() -> bool:
    """Whether the reader of stdout has gone; what was still to be printed then goes nowhere."""
    try:
        stdout = sys.stdout.fileno()
    except (AttributeError, OSError):
        # none, or no file
        return False
    poll = select.poll()
    poll.register(stdout, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    # or the end of the process would try it again, with a traceback
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stdout)
    os.close(nowhere)
    return True


def _tell_warning(message: Warning, *_) -> None:
    tell_as("warning", message)


def _check_packages(args: argparse.Namespace, argv: list[str]) -> None:
    """Tell what is not installed before anything is read or written."""
    lacking = missing(*PACKAGES.get(args.run, ()))
    if lacking:
        raise ValueError(f"{argv[0]}: expected {lacking}")


def _check_resume(args: argparse.Namespace) -> None:
    """Settings beside --resume would be without effect."""
    others = args.given - {"--resume", *BESIDE_RESUME}
    if hasattr(args, "resume") and others:
        raise ValueError(
            f"resume: expected no other option but {', '.join(BESIDE_RESUME)}, got {', '.join(sorted(others))}; a run "
            "goes on with its own settings"
        )


def _check_torchrun(args: argparse.Namespace, argv: list[str]) -> None:
    """Raise ValueError for a command that several processes cannot share."""
    if of_torchrun() and os.environ["WORLD_SIZE"] != "1" and args.run is not learn:
        raise ValueError(f"torchrun: expected `learn`, the one command for several ranks, got {argv[0]!r}")
