"""What `maskpro validate` tells of a mask file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

from ..checkpoints.mask_file import MAGNITUDE, MaskFile, MaskHeader, is_mask_file
from ..stored_digests import digests_are_checked
from .mask_files import told_mask_size

# Of the settings of a run, those that tell most of what its mask is
SETTINGS = ("estimator", "init", "data", "steps", "seed")


def taken_for_a_mask_file(path: Path) -> bool:
    """Whether a path is taken for a mask file: not that of a checkpoint, which may be damaged as well."""
    return path.is_file() and (path.suffix != ".safetensors" or is_mask_file(path))


def print_mask_file(path: Path) -> None:
    """Print what a mask file holds, once it is known to be whole.

    Raises:
        ValueError: if it is no mask file, or was damaged or changed.
        OSError: if it cannot be read.
    """
    try:
        with closing(MaskHeader(path)) as header:
            # such masks are read, which checks each code
            masks = _digest_of_codes(path) if header.needs is None else None
            lines = list(_told(header, masks))
    except (ValueError, OSError) as error:
        told = str(error).removeprefix("mask: ")
        if not is_mask_file(path):
            told = f"expected a folder with safetensors files, one such file, or a mask file, got {str(path)!r}: {told}"
        raise (OSError if isinstance(error, OSError) else ValueError)(f"checkpoint: {told}") from error
    width = max(len(name) for name, _ in lines)
    for name, told in lines:
        print(f"{name:<{width}}  {told}")


def _digest_of_codes(path: Path) -> str:
    with closing(MaskFile(path)) as mask:
        return mask.digest_of_codes()


def _told(mask: MaskHeader, masks: str | None) -> Iterator[tuple[str, str]]:
    """(name, what is told) of each line; what others may have written comes with its control characters escaped."""
    yield "mask file", f"{mask.pattern}, {len(mask.layers)} layers, {mask.groups:,} groups"
    yield "size", told_mask_size(mask.path.stat().st_size, mask)
    dtype = str(mask.dtype).removeprefix("torch.")
    yield "base model", f"{mask.model!r}, weights in {dtype}, fingerprint {mask.base}"
    if mask.needs is None:
        yield "initial mask", "none needed"
    elif mask.needs == MAGNITUDE:
        yield "initial mask", "that by magnitude, which the base tells: no file is needed"
    else:
        yield "initial mask", f"needed, the file of digest {mask.needs}: name it by `maskpro apply --against`"
    yield from _told_provenance(mask.provenance)
    if masks is not None:
        yield "masks", masks
    checked = "what is in the file has it" if digests_are_checked() else "not compared"
    yield "file digest", f"{mask.digest}, {checked}"


def _told_provenance(provenance: object) -> Iterator[tuple[str, str]]:
    found = provenance if isinstance(provenance, Mapping) else {}
    yield "run", json.dumps(found["run"]) if found.get("run") is not None else "not told"
    if "of" in found:
        yield "masks of", json.dumps(found["of"])
    origin = found.get("origin")
    settings = origin.get("settings") if isinstance(origin, Mapping) else None
    if isinstance(settings, Mapping):
        told = [f"{name}={json.dumps(settings[name])}" for name in SETTINGS if name in settings]
        yield "settings", ", ".join(told) or "not told"
