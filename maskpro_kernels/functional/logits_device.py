"""Where logits live: with their weights, or on another device that has room for them."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .checks import describe


def device_of_logits(device: torch.device | str) -> torch.device:
    """The device that ``logits_device`` names.

    Raises:
        TypeError, ValueError: it names none, or "meta", which holds nothing.
    """
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"logits_device: expected a device or its name, got {describe(device)}")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"logits_device: expected the name of a device, got {device!r}") from error
    if found.type == "meta":
        raise ValueError("logits_device: expected a device that holds what is learnt, got meta")
    return found


def page_locked(logits: Tensor) -> Tensor:
    """The logits in memory that a GPU copies from while it computes; as they are, with a warning, where none is left.

    torch rounds the bytes of each such tensor up to a power of two.
    """
    try:
        return logits.pin_memory()
    except RuntimeError as error:
        told = str(error).partition("\n")[0]
        warnings.warn(f"logits_device: no page-locked memory, each copy of logits is waited for: {told}", stacklevel=3)
        return logits
