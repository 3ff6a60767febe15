"""The command `maskpro`: one line for an error, and exit codes."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version

import torch
from safetensors import SafetensorError

from ..extras import missing
from ..ranks import FailedRank, of_torchrun, rank_of_torchrun, under_torchrun
from .config import COMMANDS, parse
from .evaluate import evaluate
from .export import export
from .import_checkpoint import import_checkpoint
from .inputs import report, report_as
from .learn.command import learn
from .speed import speed

FUNCTIONS = {"learn": learn, "eval": evaluate, "export": export, "import": import_checkpoint, "speed": speed}
PACKAGES = ("maskpro-kernels", "torch", "triton", "transformers", "safetensors")
# Errors of wrong arguments, damaged or forged files, full disks and ended ranks
ERRORS = (
    *(ValueError, TypeError, OSError, MemoryError, OverflowError, RecursionError, SafetensorError, KeyError),
    *(FloatingPointError, FailedRank, torch.OutOfMemoryError),
)


def main(argv: list[str] | None = None) -> int:
    """Run the command; under torchrun this rank's part of it, where rank 0 alone prints.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Returns:
        0; 1 if models with equal weights differ in `maskpro speed`; 2 after an error, which is one line on stderr; 130
        after SIGINT; 141 if the reader of its output has ended.

    Raises:
        SystemExit: with 0 after --help.
    """
    argv = sys.argv[1:] if argv is None else argv
    with warnings.catch_warnings(), printed_log():
        warnings.showwarning = lambda message, *_: report_as("warning", message)
        try:
            code = _run(argv)
            if sys.stdout is not None:
                sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            # the reader of stderr may have ended as well
            with suppress(OSError):
                report("maskpro: interrupted")
            return 128 + signal.SIGINT
        except BrokenPipeError:
            # the end of the process would flush the rest, and fail again
            with suppress(OSError, AttributeError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        except (*ERRORS, RuntimeError) as error:
            # if a rank has ended, the others get torch's RuntimeError; other errors are faults of this package
            if not isinstance(error, ERRORS) and not of_torchrun():
                raise
            _report_error(error, *argv[:1] or [""])
            return 2


def _run(argv: list[str]) -> int:
    if argv[:1] == ["--version"]:
        print(f"python {sys.version.partition(' ')[0]}")
        for package in PACKAGES:
            with suppress(PackageNotFoundError):
                print(package, version(package))
        return 0
    if argv[:1] in ([], ["--help"], ["-h"]):
        print("usage: maskpro COMMAND [OPTIONS]\n\nLearn N:M sparsity masks of language models.\n")
        for name, (options, _) in COMMANDS.items():
            print(f"  {name:<8}{options.__doc__.partition(chr(10))[0]}")
        print("\n`maskpro COMMAND --help` lists its options, `maskpro --version` the versions.")
        return 0
    if argv[0] not in COMMANDS:
        raise ValueError(f"command: expected one of {', '.join(COMMANDS)}, got {argv[0]!r}")
    lacking = missing("transformers", *(["matplotlib"] if argv[0] == "learn" else []))
    if lacking:
        raise ValueError(f"{argv[0]}: expected {lacking}")
    options, arguments = parse(argv[0], argv[1:])
    if of_torchrun() and os.environ["WORLD_SIZE"] != "1" and argv[0] != "learn":
        raise ValueError(f"torchrun: expected `learn`, the one command for several ranks, got {argv[0]!r}")
    with under_torchrun():
        return FUNCTIONS[argv[0]](options, **arguments) or 0


def _with_hyphens(error: BaseException, command: str) -> str:
    """Message of an error, where arguments with underscores have the form of the command's options."""
    message = str(error)
    for name in COMMANDS[command][0].__dataclass_fields__ if command in COMMANDS else ():
        if "_" in name:
            message = re.sub(rf"(^|: ){name}: ", rf"\1--{name.replace('_', '-')}: ", message)
    return message


def _report_error(error: BaseException, command: str) -> None:
    if isinstance(error, torch.OutOfMemoryError):
        # on this rank alone: no other reports it
        rank = rank_of_torchrun()
        prefix = f"rank {rank}: " if rank else ""
        line = " ".join(f"{prefix}{error}; use smaller windows or batches, or another --device".split())
        print(f"maskpro: error: {line}", file=sys.stderr)
    elif isinstance(error, KeyError):
        report_as("error", f"expected an entry {error} in a file, got none")
    elif isinstance(error, (MemoryError, RecursionError)):
        report_as("error", f"{type(error).__name__}: {error}")
    else:
        report_as("error", _with_hyphens(error, command))


@contextmanager
def printed_log() -> Iterator[None]:
    """Print messages of the package's log, such as compilation, a line each."""

    class Printer(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            report(record.getMessage())

    handler = Printer()
    logger = logging.getLogger(__package__.partition(".")[0])
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
