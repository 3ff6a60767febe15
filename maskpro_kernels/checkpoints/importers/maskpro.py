"""Masks in the format of MaskPro's own program: bool tensors in .pt files."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor


def stored_masks(source: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, bool mask) from a file that holds a dict of them, or from a folder with a file ``<name>.pt`` for each.

    Raises:
        ValueError: if a file is of another kind or damaged.
    """
    for file in sorted(source.glob("*.pt")) if source.is_dir() else [source]:
        loaded = _load(file)
        masks = loaded if isinstance(loaded, Mapping) else {file.stem: loaded}
        for name, mask in masks.items():
            _check_mask(name, mask, file)
            yield name, mask


def _load(file: Path) -> object:
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # Which of a dozen errors it is depends on the place of the damage. Torch's message is left out: it advises to
        # load the file as a pickle, which runs whatever it holds.
        raise ValueError(
            f"masks: expected a file of bool masks, got {str(file)!r}, which is damaged or holds more than tensors"
        ) from error


def _check_mask(name: object, mask: object, file: Path) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise ValueError(f"masks: expected bool masks, got {type(mask).__name__} {name!r} in {str(file)!r}")
    if not isinstance(name, str):
        raise ValueError(f"masks: expected names of layers, got {name!r} in {str(file)!r}")
    # sums and products would take another byte for what it is
    if mask.layout != torch.strided or mask.is_meta or (mask.view(torch.uint8) > 1).any():
        raise ValueError(f"masks: expected bool masks whose bytes are 0 or 1, got others in {name} of {str(file)!r}")
