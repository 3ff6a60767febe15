"""An initial mask: found here, or by an earlier run of the sweep that began with the same."""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ..digests import digest, digest_of_named
from ..prune.initial_masks import Init, refitted_masks
from ..prune.reconstruction import Reconstruction
from .inputs import Inputs
from .progress import Progress, tell
from .shared_work import Found

# The built-in masks that take calibration batches, and those that take none. Of another the code is not known
CALIBRATED, UNCALIBRATED = ("wanda", "reconstruction", "sparsegpt"), ("magnitude", "random")
# What a mask is called that runs share, and what it has
SHARED_MASK, PARTS = "mask", Reconstruction._fields


def found_mask(
    args: argparse.Namespace, inputs: Inputs, layers: Mapping[str, nn.Module], name: str, init: Init, refit: str
) -> tuple[Reconstruction, float]:
    """(an initial mask with what is refitted under it, the seconds that it took), here or where it was found.

    Args:
        args: of ``learn``, complete.
        inputs: their model is dense.
        layers: to be converted, by name.
        name: what the mask is called.
        init, refit: as for ``refitted_masks``, which tells what is raised.
    """
    of = None if inputs.shared is None else follows_from(args, inputs, init, refit)
    known = None if of is None else inputs.shared.read(SHARED_MASK, of)
    if known is not None:
        tell(f"{name}: found by an earlier run of the sweep; the {known.seconds:.1f} seconds that it took are counted")
        for warned in known.warned:
            warnings.warn(warned, stacklevel=2)
        return _from_tensors(known.tensors, layers), known.seconds
    began = time.perf_counter()
    progress = Progress(name, "layer", args.bars)
    with _noting_warnings() as warned:
        found = refitted_masks(
            layers, args.pattern, init, refit, inputs.model, inputs.initial_batches, progress, args.seed
        )
    seconds = time.perf_counter() - began
    if of is not None:
        inputs.shared.write(SHARED_MASK, of, Found(_as_tensors(found), seconds, warned))
    return found, seconds


@contextmanager
def _noting_warnings() -> Iterator[list[str]]:
    """What users are warned of within; it is told at the end, also where an earlier run has told the same."""
    noted: list[str] = []
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield noted
    finally:
        noted += [str(each.message) for each in caught if issubclass(each.category, UserWarning)]
        for each in caught:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


def follows_from(args: argparse.Namespace, inputs: Inputs, init: Init, refit: str) -> dict | None:
    """All that a mask follows from beside the model; None of one that takes no time, or whose code is not known."""
    named = isinstance(init, str)
    calibrated = named and init in CALIBRATED
    known = calibrated or not named or init in UNCALIBRATED
    if not known or not (calibrated or refit != "none"):
        return None
    return {
        "pattern": str(args.pattern),
        "init": init if named else digest_of_named(init),
        "refit": refit,
        "batches": digest(inputs.initial_batches),
        "seed": args.seed,
    }


def _as_tensors(found: Reconstruction) -> dict[str, torch.Tensor]:
    """By names that tell codes from weights."""
    return {f"{part}/{name}": tensor for part in PARTS for name, tensor in getattr(found, part).items()}


def _from_tensors(tensors: Mapping[str, torch.Tensor], layers: Mapping[str, nn.Module]) -> Reconstruction:
    """What ``_as_tensors`` was given, on the devices of the layers' weights."""
    parts = {part: {} for part in PARTS}
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        parts[part][name] = tensor.to(layers[name].weight.device)
    return Reconstruction(**parts)
