"""Initial masks: by magnitude, Wanda, reconstruction or SparseGPT, at random, from a path, or given as group codes.

To add one, write a function like ``magnitude`` and enter it in ``INITIAL_MASKS``. ``convert`` and ``maskpro learn
--init`` then accept its name.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoints.logits import LOGITS_FILE, logits_of_run
from ..checkpoints.mask_file import DTYPES, load_masks
from ..files import digest
from ..functional.checks import as_codes, check_exactly_n, check_int, in_a_line
from ..functional.masks import expand_mask, sample_mask, top_n_mask
from ..modules import MaskedLinear
from ..ops.pattern import NMPattern, as_bitmask, codes_of
from ..ops.philox import MAX_STEPS
from ..packed import KEEP, SPARSE, NMLinear
from ..shards import local, part_of
from ..unfuse import in_linear_form
from .calibration import check_calibration, input_squares
from .reconstruction import Reconstruction, reconstruct
from .refit import refit_layers
from .sparsegpt import sparsegpt as prune_by_sparsegpt

Progress = Callable[[int, int], None]
# A name in INITIAL_MASKS, a path, or by name of the layer group codes or a bool mask
Init = str | Path | Mapping[str, Tensor]


class Dense(NamedTuple):
    """Arguments of a function that computes an initial mask.

    Attributes:
        layers: modules with a dense ``weight`` [out, K], by name.
        pattern: of the mask.
        model: the model of the layers; "magnitude" and "random" need none.
        calibration: batches for the model, each a tensor, a tuple or a mapping; without a model None.
        progress: called with (layers done, layers in all) by masks that take minutes.
        seed: of "random".
    """

    layers: Mapping[str, nn.Module]
    pattern: NMPattern
    model: nn.Module | None = None
    calibration: Iterable | None = None
    progress: Progress | None = None
    seed: int = 0


def magnitude(dense: Dense) -> dict[str, Tensor]:
    """Keep the N largest |w| of each group: group codes [out, K / M] by name, on the devices of the weights."""
    return {name: top_n_mask(local(layer.weight.detach()).abs(), dense.pattern) for name, layer in dense.layers.items()}


def wanda(dense: Dense) -> dict[str, Tensor]:
    """Keep the N largest |w| * ||x|| of each group (Sun et al. 2023, arXiv 2306.11695).

    ||x|| is the norm of the weight's input column over the calibration batches.
    """
    _check_given('batches for init="wanda"', dense.model, dense.calibration)
    squares = input_squares(dense.model, dense.layers, dense.calibration)
    codes = {}
    for name, layer in dense.layers.items():
        weight = local(layer.weight.detach())
        # a hook of the layer may move its inputs to the weight's device
        norms = squares[name].sqrt().to(weight.device).expand(layer.weight.shape)
        codes[name] = top_n_mask(weight.abs().float() * part_of(norms, layer.weight), dense.pattern)
    return codes


def reconstruction(dense: Dense) -> dict[str, Tensor]:
    """Compute Wanda's masks and improve them by ``reconstruct``."""
    return _reconstruction(dense, "none").codes


def sparsegpt(dense: Dense) -> dict[str, Tensor]:
    """Compute the masks of SparseGPT, without its weights, see ``prune/sparsegpt.py``."""
    _check_given('batches for init="sparsegpt"', dense.model, dense.calibration)
    layers, pattern, model, calibration, progress, _ = dense
    return prune_by_sparsegpt(model, layers, pattern, calibration, progress=progress).codes


def random(dense: Dense) -> dict[str, Tensor]:
    """Draw each of the C(M, N) masks of a group with equal probability, by the seed and the layer's index.

    The draw is from equal logits, at the last step of the counter, 2**32 - 1. No run gets that far, so no draw of a
    trainer has the same noise, whatever the seeds. Of two weights with equal noise, in fewer than 4 of 100 million
    pairs, the lower index wins. Two calls with the same seed use the same noise for layers of the same index.
    """
    codes = {}
    for place, (name, layer) in enumerate(dense.layers.items()):
        logits = torch.zeros(layer.weight.shape, device=layer.weight.device)
        drawn = sample_mask(logits, dense.pattern, seed=dense.seed, step=MAX_STEPS - 1, layer=place)
        codes[name] = part_of(drawn, layer.weight)
    return codes


INITIAL_MASKS: dict[str, Callable[[Dense], dict[str, Tensor]]] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "reconstruction": reconstruction,
    "sparsegpt": sparsegpt,
    "random": random,
}


def check_initial_mask(init: Init) -> None:
    """Raise ValueError unless ``init`` names an initial mask, is an existing path, or is a mapping."""
    if isinstance(init, Mapping) or (isinstance(init, str) and init in INITIAL_MASKS):
        return
    # of a name that is too long; "" would be the current folder
    with suppress(OSError):
        if isinstance(init, (str, Path)) and init != "" and Path(init).exists():
            return
    raise ValueError(
        f"init: expected one of {', '.join(INITIAL_MASKS)}, the path of a mask file, a run or a sparse checkpoint, "
        f"or a mapping of names to group codes or bool masks, got {in_a_line(init)}"
    )


def initial_codes(layers: Mapping[str, nn.Module], pattern: str | NMPattern, init: Init,
                  model: nn.Module | None = None, calibration: Iterable | None = None,
                  progress: Progress | None = None, seed: int = 0) -> dict[str, Tensor]:  # fmt: skip
    """Compute group codes of an initial mask for every layer.

    Args:
        layers, model, calibration, progress: as for ``Dense``.
        pattern: "N:M" or NMPattern.
        init: a name in ``INITIAL_MASKS``; the path of a mask file, a run or a sparse checkpoint, see ``stored_mask``;
            or {name: group codes [out, K / M] or bool mask [out, K]}. A name takes precedence over an equal path.
        seed: of "random", in [0, 2**63).

    Returns:
        group codes [out, K / M] by name, on the devices of the weights.

    Raises:
        TypeError, ValueError: an argument is not as above.
        OSError: the path cannot be read.
    """
    pattern = NMPattern(pattern)
    check_initial_mask(init)
    check_int("seed", seed, 1 << 63)
    if isinstance(init, str) and init in INITIAL_MASKS:
        return INITIAL_MASKS[init](Dense(layers, pattern, model, calibration, progress, seed))
    codes = given(layers, pattern, init if isinstance(init, Mapping) else stored_mask(init, layers, pattern))
    return {name: part_of(codes[name], layer.weight) for name, layer in layers.items()}


def refitted_masks(layers: Mapping[str, nn.Module], pattern: NMPattern, init: Init, refit: str,
                   model: nn.Module, calibration: Iterable | None, progress: Progress | None = None,
                   seed: int = 0) -> Reconstruction:  # fmt: skip
    """Compute ``initial_codes``, and with ``refit`` "scales" or "weights" also refitted weights.

    "reconstruction" does both in one pass and chooses its masks for the refit. Other masks do not depend on the refit.
    """
    if refit == "none":
        return Reconstruction(initial_codes(layers, pattern, init, model, calibration, progress, seed), {})
    _check_given(f'batches for refit="{refit}"', model, calibration)
    if init == "reconstruction":
        return _reconstruction(Dense(layers, pattern, model, calibration, progress), refit)
    batches = list(calibration)
    codes = initial_codes(layers, pattern, init, model, batches, seed=seed)
    weights, _ = refit_layers(model, layers, codes, dict.fromkeys(layers, pattern), batches, refit, progress=progress)
    return Reconstruction(codes, weights)


def _reconstruction(dense: Dense, refit: str) -> Reconstruction:
    _check_given('batches for init="reconstruction"', dense.model, dense.calibration)
    dense = dense._replace(calibration=list(dense.calibration))
    return reconstruct(
        dense.model, dense.layers, wanda(dense), dense.pattern, dense.calibration, refit=refit, progress=dense.progress
    )


def given(layers: Mapping[str, nn.Module], pattern: NMPattern, init: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Check given masks of whole layers, bool or as group codes, and return the codes."""
    unknown = sorted(init.keys() - layers.keys())
    missing = sorted(layers.keys() - init.keys())
    if unknown or missing:
        raise ValueError(f"init: expected codes for exactly the layers converted; unknown {unknown}, missing {missing}")
    codes = {}
    for name, layer in layers.items():
        mask = init[name].to(layer.weight.device) if isinstance(init[name], Tensor) else init[name]
        codes[name] = as_codes(f"init[{name!r}]", mask, pattern, layer.weight)
        if codes[name] is mask:
            check_exactly_n(f"init[{name!r}]", mask, pattern)
    return codes


def _check_given(expected: str, model: nn.Module | None, calibration: Iterable | None) -> None:
    if model is None or calibration is None:
        raise ValueError(f"calibration: expected {expected}, got none")
    check_calibration(calibration)


@torch.no_grad()
def stored_mask(path: str | Path, layers: Mapping[str, nn.Module], pattern: str | NMPattern) -> dict[str, Tensor]:
    """Read masks from a mask file, a run, or a sparse checkpoint of any program.

    Args:
        path: a mask file; the folder of a run, for its top-N masks; or that of a causal language model with zeros in
            its weights, packed weights, or masks. The model is loaded on the CPU, in the dtype of the layers. If fewer
            than N weights of a group are not zero, more count as kept: first those that are zero in the layer as well,
            then the largest of the layer.
        layers: dense ones with a ``weight`` [out, K], by name.
        pattern: "N:M" or NMPattern; that of the masks.

    Returns:
        group codes [out, K / M] by name of the layer, on the CPU.

    Warns:
        UserWarning: if kept weights of a run or a checkpoint differ from those of the layers, as after SparseGPT or a
            refit, or are rounded to integers; or if groups of a checkpoint had fewer than N weights that are not zero.

    Raises:
        ValueError: the masks are of another base model, pattern or set of layers, or there are none.
        OSError: the path does not exist or cannot be read.
    """
    pattern = NMPattern(pattern)
    path = Path(path)
    if path.is_file():
        with _naming_init():
            masks = load_masks(path)
        _check_pattern(masks.pattern, pattern, path)
        masks.check_base({name: layer.weight.detach() for name, layer in layers.items()})
        return {name: masks.codes(name) for name in layers}
    codes, notes = (_of_run if (path / LOGITS_FILE).is_file() else _of_checkpoint)(path, layers, pattern)
    for note in notes:
        warnings.warn(f"{path}: {note}", stacklevel=3)
    return codes


def _of_run(path: Path, layers: Mapping[str, nn.Module], pattern: NMPattern) -> tuple[dict[str, Tensor], list[str]]:
    """(group codes, warnings)."""
    with _naming_init():
        learned = logits_of_run(path)
    metadata = learned.metadata
    if not {"pattern", "dtype", "dense_weights"} <= metadata.keys() or metadata["dtype"] not in DTYPES:
        raise ValueError(f"init: expected the logits of a run in {str(path / LOGITS_FILE)!r}, got others")
    _check_pattern(NMPattern(metadata["pattern"]), pattern, path)
    _check_layers({name: logits.shape for name, logits in learned.logits.items()}, layers, path)
    base_digest = digest(layer.weight.detach().to(DTYPES[metadata["dtype"]]) for layer in layers.values())
    if base_digest != metadata["dense_weights"]:
        raise ValueError(
            f"model: expected the base of the run in {str(path)!r}, whose weights have the digest "
            f"{metadata['dense_weights']} in {metadata['dtype']}, got weights of digest {base_digest}"
        )
    for name, logits in learned.logits.items():
        _check_finite("logits", logits, name, path)
    notes = ["this run learned its mask over changed weights; only the mask is used"] if learned.weights else []
    return {name: top_n_mask(learned.logits[name], pattern) for name in layers}, notes


def _of_checkpoint(
    path: Path, layers: Mapping[str, nn.Module], pattern: NMPattern
) -> tuple[dict[str, Tensor], list[str]]:
    """(group codes, warnings)."""
    # transformers takes seconds to import
    from ..hf import load_model

    with _naming_init():
        sparse, _ = load_model(str(path.absolute()), next(iter(layers.values())).weight.dtype)
    codes: dict[str, Tensor] = {}
    changed = []
    rounded = []
    filled = 0
    with in_linear_form(sparse):
        modules = dict(sparse.named_modules())
        shapes = {
            name: torch.Size((module.out_features, module.in_features))
            for name, module in modules.items()
            if isinstance(module, SPARSE) or (name in layers and isinstance(module, nn.Linear))
        }
        _check_layers(shapes, layers, path)
        for name, layer in layers.items():
            module = modules[name]
            weight = layer.weight.detach().cpu()
            if isinstance(module, SPARSE):
                _check_pattern(module.pattern, pattern, path)
            if isinstance(module, MaskedLinear):
                _check_finite("logits", module.logits, name, path)
                codes[name] = top_n_mask(module.logits, pattern)
                # with trained logits, dropped weights matter as well: compare all
                kept = torch.ones_like(weight, dtype=torch.bool)
            elif isinstance(module, NMLinear):
                bitmask = as_bitmask(module.bitmask, weight.shape[1], len(weight))
                codes[name] = codes_of(bitmask, weight.shape[1], pattern.m)
                kept = expand_mask(codes[name], pattern)
            else:
                _check_finite("weights", module.weight, name, path)
                kept = module.weight != 0
                many = float((kept.view(len(kept), -1, pattern.m).sum(-1) > pattern.n).float().mean())
                if many:
                    raise ValueError(
                        f"init: expected weights that follow {pattern}, got more in {many:.1%} of the groups of {name} "
                        f"in {str(path)!r}"
                    )
                # weights that are zero in both: keeping them changes nothing, and perhaps they were kept
                size = weight.abs().float().masked_fill_(weight == 0, torch.finfo(torch.float32).max)
                codes[name] = top_n_mask(size.masked_fill_(kept, torch.inf), pattern)
                added = expand_mask(codes[name], pattern) & ~kept & (weight != 0)
                filled += int(added.view(len(kept), -1, pattern.m).any(-1).sum())
            if isinstance(module, NMLinear) and module.kind != KEEP:
                rounded.append(module.kind)
            elif not torch.equal(module.weight[kept], weight[kept]):
                if isinstance(module, MaskedLinear) and not module.weight_changed:
                    raise ValueError(
                        f"model: expected the base model of the masks in {str(path)!r}, got other weights in "
                        f"{name}: another model, or this one in another dtype"
                    )
                changed.append(name)
    notes = []
    if changed:
        notes.append(
            f"kept weights of {len(changed)} layers, such as {changed[0]}, differ from the model's, and only the mask "
            "is used: they were changed, or are of another model, or of this one in another dtype"
        )
    if rounded:
        kinds = " and ".join(sorted(set(rounded)))
        notes.append(f"values of {len(rounded)} layers are rounded to {kinds} and cannot be compared with the model's")
    if filled:
        notes.append(f"{filled} groups keep fewer weights than {pattern}; the largest others were added")
    return codes, notes


@contextmanager
def _naming_init() -> Iterator[None]:
    """Add the argument ``init`` to errors of reading."""
    try:
        yield
    except (ValueError, OSError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"init: {re.sub('^(mask|path|model): ', '', str(error))}") from error


def _check_pattern(stored: NMPattern, pattern: NMPattern, path: Path) -> None:
    if stored != pattern:
        raise ValueError(f"init: expected a mask of {pattern}, got one of {stored} in {str(path)!r}")


def _check_finite(what: str, values: Tensor, name: str, path: Path) -> None:
    if not values.isfinite().all():
        raise ValueError(f"init: expected finite {what} in {str(path)!r}, got others in {name}")


def _check_layers(shapes: Mapping[str, torch.Size], layers: Mapping[str, nn.Module], path: Path) -> None:
    names = sorted(shapes.keys() | layers.keys())
    differing = [n for n in names if n not in layers or shapes.get(n) != layers[n].weight.shape]
    if differing:
        raise ValueError(
            f"init: expected masks of this model's {len(layers)} masked layers, got others in "
            f"{str(path)!r}: {len(differing)} differ, such as {differing[0]}"
        )
