"""Masks as torch saves them: bool tensors of MaskPro's program, floats or integers of MaskLLM's, in .pt files.

MaskPro writes a file for each mask or one for all; MaskLLM's ``tool_compute_mask_hf.py`` one of float32 masks, named
after their weights (https://github.com/NVlabs/MaskLLM).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor


def stored_masks(source: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, mask as bool) from a file that holds a dict of them, or from a folder with a file ``<name>.pt`` for each.

    Raises:
        ValueError: if a file is of another kind or damaged.
    """
    for file in sorted(source.glob("*.pt")) if source.is_dir() else [source]:
        loaded = _load(file)
        masks = loaded if isinstance(loaded, Mapping) else {file.stem: loaded}
        for name, mask in masks.items():
            _check_mask(name, mask, file)
            yield name, mask.bool()


def _load(file: Path) -> object:
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # Which of a dozen errors it is depends on the place of the damage. Torch's message is left out: it advises to
        # load the file as a pickle, which runs whatever it holds.
        raise ValueError(
            f"masks: expected a file of masks, got {str(file)!r}, which is damaged or holds more than tensors"
        ) from error


def _check_mask(name: object, mask: object, file: Path) -> None:
    if not isinstance(mask, Tensor):
        raise ValueError(f"masks: expected tensors, got {type(mask).__name__} {name!r} in {str(file)!r}")
    if not isinstance(name, str):
        raise ValueError(f"masks: expected names of layers, got {name!r} in {str(file)!r}")
    if mask.layout != torch.strided or mask.is_meta or mask.is_complex() or mask.is_quantized:
        kind = "meta" if mask.is_meta else mask.layout if mask.layout != torch.strided else mask.dtype
        raise ValueError(f"masks: expected plain tensors, got {kind} in {name} of {str(file)!r}")
    # of bool too: sums and products would take another byte for what it is
    values = mask.view(torch.uint8) if mask.dtype == torch.bool else mask.float() if mask.itemsize == 1 else mask
    if not ((values == 0) | (values == 1)).all():
        raise ValueError(f"masks: expected 0 and 1, or false and true, alone, got others in {name} of {str(file)!r}")
