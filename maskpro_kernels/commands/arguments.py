"""Checks of what the command line gives."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
DTYPE = "bfloat16"


@contextmanager
def naming(argument: str) -> Iterator[None]:
    """Errors of what is made of an argument begin with its name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from error


def check_least(args: argparse.Namespace, **least: int) -> None:
    """Raise ValueError unless each argument is at least as large as told."""
    for name, low in least.items():
        if getattr(args, name) < low:
            raise ValueError(f"{name}: expected at least {low}, got {getattr(args, name)}")


def device_of(name: str) -> torch.device:
    """The device of that name; ValueError where this machine has none."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: expected a device of this machine, got {name!r}: {error}") from error


def new_file(args: argparse.Namespace, name: str) -> Path | None:
    """The path that an argument gives, if any; ValueError unless a new file can stand there."""
    if not hasattr(args, name):
        return None
    path = Path(getattr(args, name))
    if path.exists() or not path.parent.is_dir():
        raise ValueError(f"{name}: expected a new file in a folder that exists, got {str(path)!r}")
    return path
