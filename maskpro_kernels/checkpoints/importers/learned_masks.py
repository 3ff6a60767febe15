"""Masks that MaskLLM and MaskPro have learned."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...pattern import NMPattern


def read_masks(source: str | Path, layers: Mapping[str, nn.Module], pattern: str | NMPattern) -> dict[str, Tensor]:
    """Masks that another program has learned: bool [out, K] by name of the layer.

    Args:
        source: an .npz file of MaskLLM (each mask flat, packed eight to a byte, the first in the highest bit), a .pt
            file with a dict of bool masks, or a folder of MaskPro with one such mask in a file ``<name>.pt`` each.
            Names may end in ".mask" or ".weight.mask".
        layers: modules with a ``weight`` [out, K], by name; those without a mask are left out.
        pattern: "N:M" or NMPattern: at most N of every M are kept.

    Raises:
        ValueError: if ``source`` holds no such masks, one does not fit its layer, or keeps more than N of M.
    """
    pattern, source = NMPattern(pattern), Path(source)
    masks = {}
    for stored, mask in _stored_masks(source):
        name = stored.removesuffix(".mask").removesuffix(".weight")
        if name not in layers:
            raise ValueError(f"masks: expected masks of the model's linear layers, got one of {stored!r}")
        shape = layers[name].weight.shape
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
        masks[name] = mask
    if not masks:
        raise ValueError(f"masks: expected at least one, got none in {str(source)!r}")
    return masks


def _stored_masks(source: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, bool mask, or uint8 with eight to a byte)."""
    if source.suffix == ".npz":
        expected = f"masks: expected an .npz file of MaskLLM, got {str(source)!r}"
        if not zipfile.is_zipfile(source):
            # numpy would take it for a pickle, and advise to load it as one
            raise ValueError(f"{expected}, which is damaged or of another kind")
        try:
            with open(source, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                for name in arrays.files:
                    # decompressed anew each time it is asked for
                    array = arrays[name]
                    if not isinstance(array, np.ndarray):
                        raise ValueError(f"flat uint8 arrays expected, {name} is none")
                    if array.dtype != np.uint8 or array.ndim != 1:
                        raise ValueError(f"flat uint8 arrays expected, {name} is {array.dtype}")
                    yield name, torch.from_numpy(array)
        except Exception as error:
            # zipfile, zlib and numpy each have errors of their own for damage
            raise ValueError(f"{expected}: {error}") from error
        return
    files = sorted(source.glob("*.pt")) if source.is_dir() else [source]
    for file in files:
        try:
            with warnings.catch_warnings(action="ignore"):
                loaded = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            # which of a dozen errors depends on where the damage is; told without torch's advice to load it as a
            # pickle, which runs whatever it holds
            raise ValueError(
                f"masks: expected a file of bool masks, got {str(file)!r}, which is damaged or holds more than tensors"
            ) from error
        found = loaded if isinstance(loaded, Mapping) else {file.stem: loaded}
        for name, mask in found.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                raise ValueError(f"masks: expected bool masks, got {type(mask).__name__} {name!r} in {str(file)!r}")
            if not isinstance(name, str):
                raise ValueError(f"masks: expected names of layers, got {name!r} in {str(file)!r}")
            # sums and products would take another byte for what it is
            if mask.layout != torch.strided or mask.is_meta or (mask.view(torch.uint8) > 1).any():
                raise ValueError(
                    f"masks: expected bool masks whose bytes are 0 or 1, got others in {name} of {str(file)!r}"
                )
            yield name, mask
