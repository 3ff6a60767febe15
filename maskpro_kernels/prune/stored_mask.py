"""Initial masks out of mask files, runs, and sparse checkpoints of any program."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoints.logits import LOGITS_FILE, load_logits
from ..checkpoints.mask_file import DTYPES, load_masks
from ..digests import digest, digest_of_named
from ..functional.masks import expand_mask, top_n_mask
from ..modules import MaskedLinear
from ..packed import INT8, SPARSE, NMLinear
from ..pattern import NMPattern, codes_of
from ..unfuse import in_linear_form


class StoredMask(NamedTuple):
    """A mask that was read from a path.

    Attributes:
        codes: group codes [out, K / M] by name of the layer, on the CPU.
        kind: "mask file", "run" or "checkpoint".
        digest: of the codes; of a mask file its checksum.
    """

    codes: dict[str, Tensor]
    kind: str
    digest: str


def is_there(path: str | Path) -> bool:
    """True if there is a file or a folder of that name."""
    try:
        # "" is no folder that anyone means
        return path != "" and Path(path).exists()
    except OSError:
        # such as of a name that is too long
        return False


@torch.no_grad()
def stored_mask(path: str | Path, layers: Mapping[str, nn.Module], pattern: str | NMPattern) -> StoredMask:
    """The mask of every layer, out of a file or folder.

    Args:
        path: a mask file; the folder of a run, whose most likely masks are taken; or that of a causal language model,
            with zeros in its weights, packed, or with masks. Such a model is loaded on the CPU, in the dtype of the
            layers. Where a group has fewer weights that are not zero than the pattern keeps, the first weights that are
            zero in the layer as well count as kept, then its largest ones.
        layers: dense ones with a ``weight`` [out, K], by name.
        pattern: "N:M" or NMPattern; that of the masks.

    Warns:
        UserWarning: if kept weights of a run or a checkpoint are not those of the layers, as after SparseGPT or a
            refit, or are rounded to int8; or if groups of a checkpoint were filled up.

    Raises:
        ValueError: the masks are of another base model, pattern or set of layers, or there are none.
        OSError: there is nothing, or it cannot be read.
    """
    pattern, path = NMPattern(pattern), Path(path)
    if path.is_file():
        return _of_mask_file(path, layers, pattern)
    if (path / LOGITS_FILE).is_file():
        return _of_run(path, layers, pattern)
    return _of_checkpoint(path, layers, pattern)


def _of_mask_file(path: Path, layers: Mapping[str, nn.Module], pattern: NMPattern) -> StoredMask:
    with _naming_init():
        masks = load_masks(path)
    _check_pattern(masks.pattern, pattern, path)
    masks.check_base({name: layer.weight.detach() for name, layer in layers.items()})
    return StoredMask({name: masks.codes(name) for name in layers}, "mask file", masks.checksum)


def _of_run(path: Path, layers: Mapping[str, nn.Module], pattern: NMPattern) -> StoredMask:
    with _naming_init():
        learned = load_logits(path / LOGITS_FILE)
    metadata = learned.metadata
    if not {"pattern", "dtype", "dense_weights"} <= metadata.keys() or metadata["dtype"] not in DTYPES:
        raise ValueError(f"init: expected the logits of a run in {str(path / LOGITS_FILE)!r}, got others")
    _check_pattern(NMPattern(metadata["pattern"]), pattern, path)
    _check_layers({name: logits.shape for name, logits in learned.logits.items()}, layers, path)
    own = digest(layer.weight.detach().to(DTYPES[metadata["dtype"]]) for layer in layers.values())
    if own != metadata["dense_weights"]:
        raise ValueError(
            f"model: expected the base of the run in {str(path)!r}, whose weights have the digest "
            f"{metadata['dense_weights']} in {metadata['dtype']}, got weights of digest {own}"
        )
    if learned.weights:
        _warn(path, "the mask of this run was learned over changed weights, and is taken alone")
    for name, logits in learned.logits.items():
        _check_finite("logits", logits, name, path)
    codes = {name: top_n_mask(learned.logits[name], pattern) for name in layers}
    return StoredMask(codes, "run", digest_of_named(codes))


def _of_checkpoint(path: Path, layers: Mapping[str, nn.Module], pattern: NMPattern) -> StoredMask:
    # transformers takes seconds to import
    from ..hf import load_model

    dtype = next(iter(layers.values())).weight.dtype
    with _naming_init():
        sparse, _ = load_model(str(path.absolute()), dtype)
    codes: dict[str, Tensor] = {}
    changed, rounded, filled = [], 0, 0
    with in_linear_form(sparse):
        modules = dict(sparse.named_modules())
        shapes = {
            name: torch.Size((module.out_features, module.in_features))
            for name, module in modules.items()
            if isinstance(module, SPARSE) or (name in layers and isinstance(module, nn.Linear))
        }
        _check_layers(shapes, layers, path)
        for name, layer in layers.items():
            module, weight = modules[name], layer.weight.detach().cpu()
            if isinstance(module, SPARSE):
                _check_pattern(module.pattern, pattern, path)
            if isinstance(module, MaskedLinear):
                _check_finite("logits", module.logits, name, path)
                codes[name] = top_n_mask(module.logits, pattern)
                # dropped weights have moved the logits as well
                kept = torch.ones_like(weight, dtype=torch.bool)
            elif isinstance(module, NMLinear):
                codes[name] = codes_of(module.bitmask, weight.shape[1], pattern.m)
                kept = expand_mask(codes[name], pattern)
            else:
                kept = module.weight != 0
                codes[name], more = _codes_of_zeros(name, module.weight, weight, pattern, path)
                filled += more
            if isinstance(module, NMLinear) and module.kind == INT8:
                rounded += 1
            elif not torch.equal(module.weight[kept], weight[kept]):
                if isinstance(module, MaskedLinear) and not module.weight_changed:
                    raise ValueError(
                        f"model: expected the base that the masks in {str(path)!r} belong to, got other weights in "
                        f"{name}: another model, or this one in another dtype"
                    )
                changed.append(name)
    if changed:
        _warn(
            path,
            f"kept weights of {len(changed)} layers, such as {changed[0]}, are not those of the model, and the mask is "
            "taken alone: they were changed, or are of another model, or of this one in another dtype",
        )
    if rounded:
        _warn(path, f"values of {rounded} layers are rounded to int8: they cannot be compared with those of the model")
    if filled:
        _warn(path, f"{filled} groups keep fewer weights than {pattern}, and were filled up with the largest ones")
    return StoredMask(codes, "checkpoint", digest_of_named(codes))


def _codes_of_zeros(name: str, sparse: Tensor, weight: Tensor, pattern: NMPattern, path: Path) -> tuple[Tensor, int]:
    """(group codes of a weight with zeros; how many groups were filled up by weights of the base)."""
    _check_finite("weights", sparse, name, path)
    kept = sparse != 0
    many = kept.view(len(kept), -1, pattern.m).sum(-1) > pattern.n
    if many.any():
        raise ValueError(
            f"init: expected weights that follow {pattern}, got more in {float(many.float().mean()):.1%} of the groups "
            f"of {name} in {str(path)!r}"
        )
    size = weight.abs().float()
    # what is zero in both changes nothing, and is what was kept, or may as well have been
    size.masked_fill_(weight == 0, torch.finfo(torch.float32).max).masked_fill_(kept, torch.inf)
    codes = top_n_mask(size, pattern)
    more = expand_mask(codes, pattern) & ~kept & (weight != 0)
    return codes, int(more.view(len(kept), -1, pattern.m).any(-1).sum())


@contextmanager
def _naming_init() -> Iterator[None]:
    """Let errors of what is read name the argument ``init``."""
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
    """Raise ValueError unless what is stored are matrices of just these layers."""
    names = sorted(shapes.keys() | layers.keys())
    others = [n for n in names if n not in layers or shapes.get(n) != layers[n].weight.shape]
    if others:
        raise ValueError(
            f"init: expected masks of the {len(layers)} layers that get one in this model, got others in "
            f"{str(path)!r}: {len(others)} differ, such as {others[0]}"
        )


def _warn(path: Path, what: str) -> None:
    # above what reads, ``stored_mask`` and its ``no_grad``
    warnings.warn(f"{path}: {what}", stacklevel=5)
