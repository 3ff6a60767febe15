"""Initial masks: by magnitude, Wanda, reconstruction or SparseGPT, at random, of a path, or given as group codes.

A new one is a function like ``magnitude`` and an entry in ``INITIAL_MASKS``. ``convert`` then takes it by its name, and
so does ``maskpro learn --init``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..fsdp import local, part_of, resharded
from ..functional.checks import check_codes, check_exactly_n, check_int
from ..functional.masks import sample_mask, top_n_mask
from ..ops.philox import MAX_STEPS
from ..pattern import NMPattern
from .calibration import check_calibration, input_squares
from .reconstruction import Reconstruction, reconstruct
from .refit import check_refit, refit_layers
from .sparsegpt import sparsegpt as prune_by_sparsegpt
from .stored_mask import is_there, stored_mask

Progress = Callable[[int, int], None]
# A name in INITIAL_MASKS, a path, or group codes by name of the layer
Init = str | Path | Mapping[str, Tensor]


class Dense(NamedTuple):
    """Layers that an initial mask is found for.

    Attributes:
        layers: modules with a dense ``weight`` [out, K], by name.
        pattern: of the mask.
        model: that the layers are part of; "magnitude" and "random" need none.
        calibration: batches for the model, each a tensor, a tuple or a mapping; masks that need no model need none.
        progress: called by a mask that takes minutes, with how many layers are done, and of how many.
        seed: of "random".
    """

    layers: Mapping[str, nn.Module]
    pattern: NMPattern
    model: nn.Module | None = None
    calibration: Iterable | None = None
    progress: Progress | None = None
    seed: int = 0


def magnitude(dense: Dense) -> dict[str, Tensor]:
    """The N largest |w| of each group: group codes [out, K / M] by name, on the devices of the weights."""
    return {name: top_n_mask(local(layer.weight.detach()).abs(), dense.pattern) for name, layer in dense.layers.items()}


def wanda(dense: Dense) -> dict[str, Tensor]:
    """The N largest |w| * ||x|| of each group (Sun et al. 2023, arXiv 2306.11695).

    ||x|| is the norm of the weight's input column over the calibration batches.
    """
    _check_given('batches for init="wanda"', dense.model, dense.calibration)
    squares = input_squares(dense.model, dense.layers, dense.calibration)
    # FSDP2 may have kept gathered what ran last
    resharded(dense.model)
    codes = {}
    for name, layer in dense.layers.items():
        weight = local(layer.weight.detach())
        # a hook on the layer may yet bring its inputs to where the weight is
        norms = squares[name].sqrt().to(weight.device).expand(layer.weight.shape)
        codes[name] = top_n_mask(weight.abs().float() * part_of(norms, layer.weight), dense.pattern)
    return codes


def reconstruction(dense: Dense) -> dict[str, Tensor]:
    """Wanda's masks, improved by ``reconstruct``."""
    return _reconstruction(dense, "none").codes


def sparsegpt(dense: Dense) -> dict[str, Tensor]:
    """The masks of SparseGPT, without its weights, see ``prune/sparsegpt.py``."""
    _check_given('batches for init="sparsegpt"', dense.model, dense.calibration)
    layers, pattern, model, calibration, progress, _ = dense
    return prune_by_sparsegpt(model, layers, pattern, calibration, progress=progress).codes


def random(dense: Dense) -> dict[str, Tensor]:
    """Each of the C(M, N) masks of a group alike: the draw of equal logits, by the seed and the place of the layer.

    It is drawn at the last step that the counter holds, 2**32 - 1. A run ends before it comes there, so that no draw
    of a trainer has the noise of this one, whatever the seeds. Of two weights with equal noise, as less than 4 of 100
    million pairs have, the lower index goes before. Two calls with one seed have the same noise in layers of the same
    place.
    """
    codes = {}
    for place, (name, layer) in enumerate(dense.layers.items()):
        logits = torch.zeros(layer.weight.shape, device=layer.weight.device)
        drawn = sample_mask(logits, dense.pattern, seed=dense.seed, step=MAX_STEPS - 1, layer=place)
        codes[name] = part_of(drawn, layer.weight, dense.pattern.m)
    return codes


INITIAL_MASKS: dict[str, Callable[[Dense], dict[str, Tensor]]] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "reconstruction": reconstruction,
    "sparsegpt": sparsegpt,
    "random": random,
}


def check_initial_mask(init: Init) -> None:
    """Raise ValueError unless ``init`` names an initial mask, is the path of what is there, or is a mapping."""
    if isinstance(init, Mapping) or (isinstance(init, str) and init in INITIAL_MASKS):
        return
    if not isinstance(init, (str, Path)) or not is_there(init):
        raise ValueError(
            f"init: expected one of {', '.join(INITIAL_MASKS)}, the path of a mask file, a run or a sparse checkpoint, "
            f"or a mapping of names to group codes, got {init!r}"
        )


def initial_codes(
    layers: Mapping[str, nn.Module],
    pattern: str | NMPattern,
    init: Init,
    model: nn.Module | None = None,
    calibration: Iterable | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Group codes of an initial mask for every layer.

    Args:
        layers, model, calibration, progress: as for ``Dense``.
        pattern: "N:M" or NMPattern.
        init: a name in ``INITIAL_MASKS``; the path of a mask file, a run or a sparse checkpoint, see ``stored_mask``;
            or {name: group codes [out, K / M]}. A name goes before a path of that name.
        seed: of "random", in [0, 2**63).

    Returns:
        group codes [out, K / M] by name, on the devices of the weights.

    Raises:
        TypeError, ValueError: an argument is not as above.
        OSError: what lies at the path cannot be read.
    """
    pattern = NMPattern(pattern)
    check_initial_mask(init)
    check_int("seed", seed, 1 << 63)
    if isinstance(init, str) and init in INITIAL_MASKS:
        return INITIAL_MASKS[init](Dense(layers, pattern, model, calibration, progress, seed))
    codes = given(layers, pattern, init if isinstance(init, Mapping) else stored_mask(init, layers, pattern).codes)
    return {name: part_of(codes[name], layer.weight, pattern.m) for name, layer in layers.items()}


def refitted_masks(
    layers: Mapping[str, nn.Module],
    pattern: str | NMPattern,
    init: Init,
    refit: str,
    model: nn.Module,
    calibration: Iterable | None,
    progress: Progress | None = None,
    seed: int = 0,
) -> Reconstruction:
    """Group codes of an initial mask for every layer, and weights refitted under it.

    "reconstruction" does both in one pass, and its masks are chosen for the refit. Other masks stay as without one.

    Args:
        layers, pattern, init, model, calibration, progress, seed: as for ``initial_codes``.
        refit: "scales" or "weights", see ``refit``; or "none".

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    pattern = NMPattern(pattern)
    check_initial_mask(init)
    check_refit(refit)
    if refit == "none":
        return Reconstruction(initial_codes(layers, pattern, init, model, calibration, progress, seed), {})
    _check_given(f'batches for refit="{refit}"', model, calibration)
    if init == "reconstruction":
        return _reconstruction(Dense(layers, pattern, model, calibration, progress), refit)
    batches = list(calibration)
    codes = initial_codes(layers, pattern, init, model, batches, seed=seed)
    patterns = dict.fromkeys(layers, pattern)
    weights, _ = refit_layers(model, layers, codes, patterns, batches, refit, progress=progress)
    return Reconstruction(codes, weights)


def _reconstruction(dense: Dense, refit: str) -> Reconstruction:
    _check_given('batches for init="reconstruction"', dense.model, dense.calibration)
    layers, pattern, model, calibration, progress, _ = dense = dense._replace(calibration=list(dense.calibration))
    return reconstruct(model, layers, wanda(dense), pattern, calibration, refit=refit, progress=progress)


def given(layers: Mapping[str, nn.Module], pattern: NMPattern, init: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Group codes that the caller has, checked: of whole layers."""
    unknown, missing = sorted(init.keys() - layers.keys()), sorted(layers.keys() - init.keys())
    if unknown or missing:
        raise ValueError(f"init: expected codes for exactly the layers converted; unknown {unknown}, missing {missing}")
    codes = {}
    for name, layer in layers.items():
        codes[name] = init[name].to(layer.weight.device) if isinstance(init[name], Tensor) else init[name]
        check_codes(f"init[{name!r}]", codes[name], pattern, layer.weight)
        check_exactly_n(f"init[{name!r}]", codes[name], pattern)
    return codes


def _check_given(expected: str, model: nn.Module | None, calibration: Iterable | None) -> None:
    """Raise unless there is a model with calibration batches."""
    if model is None or calibration is None:
        raise ValueError(f"calibration: expected {expected}, got none")
    check_calibration(calibration)
