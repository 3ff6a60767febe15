"""Checks of what the command line gives."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from ..files import check_takes_files
from ..packed import KEEP

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
DTYPE = "bfloat16"


def _number_of(kind: Callable, expected: str) -> Callable:
    """A type of argparse, whose errors tell what was expected."""

    def parsed(text: str):
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None

    return parsed


whole, number = _number_of(int, "a whole number"), _number_of(float, "a number")


# What accelerate spreads a model by itself by
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def device_map(text: str) -> str | dict:
    """The type of ``--device-map``: one of DEVICE_MAPS, or a JSON object of devices by modules."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}: {error}") from None


def check_device_map(value: object) -> None:
    """Raise ValueError unless it is one of DEVICE_MAPS, or holds devices of this machine."""
    if isinstance(value, str) and value in DEVICE_MAPS:
        return
    if not isinstance(value, Mapping) or not value:
        raise ValueError(
            f"device_map: expected {', '.join(DEVICE_MAPS)} or a JSON object of devices by modules, such as "
            f'{{"": "cuda:0"}}, got {value!r}'
        )
    for name, device in value.items():
        told = f"device_map: {name!r}"
        if isinstance(device, bool) or not isinstance(device, (int, str)):
            raise ValueError(f"{told}: expected a device, such as 0 or 'cuda:0', got {device!r}")
        device_of(f"cuda:{device}" if isinstance(device, int) else device, told)


class Told(ValueError):
    """An error that begins with an argument already, and ends with what to do."""


@contextmanager
def telling(argument: str, cure: str | None = None, of: type[ValueError] | None = None) -> Iterator[None]:
    """Errors of what is made of an argument begin with its name, and end with what to do.

    Args:
        argument: its name.
        cure: what to do.
        of: the only errors that are the argument's, where others have names of their own.

    Raises:
        ValueError, OSError: what came, as told.
    """
    try:
        yield
    except Told:
        raise
    except (ValueError, OSError) as error:
        if of is not None and not isinstance(error, of):
            raise
        told = str(error).removeprefix(f"{argument}: ")
        told = f"{argument}: {told}" + (f"; {cure}" if cure else "")
        raise (OSError if isinstance(error, OSError) else ValueError)(told) from error


def check_least(args: argparse.Namespace, **least: int) -> None:
    """Raise ValueError unless each argument is at least as large as told."""
    for name, low in least.items():
        if getattr(args, name) < low:
            raise ValueError(f"{name}: expected at least {low}, got {getattr(args, name)}")


def device_of(name: str, argument: str = "device") -> torch.device:
    """The device of that name; ValueError, which begins with that of an argument, where this machine has none."""
    there = ", ".join(["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))])
    expected = f"{argument}: expected a device of this machine, got {name!r}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{expected}, of no known kind; there is {there}") from error
    if device.type == "meta":
        raise ValueError(f"{expected}, which does not compute; there is {there}")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{expected}: {reason}; there is {there}") from error


def values_kind(args: argparse.Namespace) -> str:
    """How packed values are to be stored; ValueError where that is told of dense ones."""
    if args.to != "packed" and hasattr(args, "values"):
        raise ValueError(f"values: expected none without --to packed, got {args.values!r}; leave it out")
    return getattr(args, "values", KEEP)


def new_file(args: argparse.Namespace, name: str) -> Path | None:
    """The path that an argument gives, if any; ValueError unless a new file can be written there."""
    if not hasattr(args, name):
        return None
    path = Path(getattr(args, name))
    expected = f"{name}: expected a new file in a folder that exists, got {str(path)!r}"
    if path.exists():
        raise ValueError(f"{expected}, which exists: give another name")
    if not path.parent.is_dir():
        raise ValueError(f"{expected}, whose folder does not: make it first")
    try:
        check_takes_files(path.parent)
    except OSError as error:
        raise ValueError(f"{name}: expected a new file in a writable folder, got {str(path)!r}: {error}") from error
    return path
