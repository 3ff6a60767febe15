"""Masks that another program has learned, read from any of the formats known and checked against a model's layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...pattern import NMPattern
from . import maskllm, maskpro

# What reads a file, by its suffix; folders and all other files are such as torch saves
MASK_FORMATS = {".npz": maskllm.stored_masks}


def read_masks(source: str | Path, layers: Mapping[str, nn.Module], pattern: str | NMPattern) -> dict[str, Tensor]:
    """Masks that another program has learned: bool [out, K] by name of the layer.

    Args:
        source: an .npz file of MaskLLM, a .pt file with a dict of masks, of bools or of 0 and 1 in any other dtype, or
            a folder with a file ``<name>.pt`` for each mask. Names may end in ".mask" or ".weight.mask".
        layers: modules with a ``weight`` [out, K], by name; those without a mask are left out.
        pattern: "N:M" or NMPattern: at most N of every M are kept.

    Raises:
        ValueError: if ``source`` holds no such masks, one does not fit its layer, or keeps more than N of M.
    """
    pattern, source = NMPattern(pattern), Path(source)
    stored_masks = MASK_FORMATS.get(source.suffix, maskpro.stored_masks)
    masks = {}
    for stored, mask in stored_masks(source):
        name = stored.removesuffix(".mask").removesuffix(".weight")
        if name not in layers:
            raise ValueError(f"masks: expected masks of the model's linear layers, got one of {stored!r}")
        masks[name] = _checked(name, mask, layers[name].weight.shape, pattern)
    if not masks:
        raise ValueError(f"masks: expected at least one, got none in {str(source)!r}")
    return masks


def _checked(name: str, mask: Tensor, shape: torch.Size, pattern: NMPattern) -> Tensor:
    """A mask, bool or uint8 with eight elements to a byte, as bool in the shape of its layer's weight."""
    if mask.dtype == torch.uint8:
        bits = torch.from_numpy(np.unpackbits(mask.numpy()))
        if not shape.numel() <= len(bits) < shape.numel() + 8:
            raise ValueError(f"masks: expected {shape.numel()} bits for {name}, got {len(bits)}")
        mask = bits[: shape.numel()].bool().view(shape)
    if mask.shape != shape:
        raise ValueError(f"masks: expected {list(shape)} for {name}, got {list(mask.shape)}")
    if shape[1] % pattern.m:
        raise ValueError(f"masks: expected rows of whole groups of {pattern.m}, got {shape[1]} columns in {name}")
    most = int(mask.view(shape[0], -1, pattern.m).sum(-1).max())
    if most > pattern.n:
        raise ValueError(f"masks: expected at most {pattern.n} of every {pattern.m} kept, got {most} in {name}")
    return mask
