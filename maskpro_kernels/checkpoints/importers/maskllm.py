"""Masks in the format of MaskLLM: an .npz file, each mask flat and eight to a byte."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def stored_masks(source: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, uint8 [bytes]): the first element of a mask stands in the highest bit of the first byte.

    Raises:
        ValueError: if the file is of another kind or damaged.
    """
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
