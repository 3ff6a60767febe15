"""Masks to begin with, out of what is stored: mask files, runs, and sparse checkpoints of any kind."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoints.logits import LOGITS_FILE, load_learned
from ..checkpoints.mask_file import DTYPES, MAGNITUDE, InitialMaskNeededError, MaskFile, base_layers, check_fingerprint
from ..digests import digest, digest_of_named
from ..functional.masks import expand_mask, top_n_mask
from ..modules import MaskedLinear
from ..packed import INT8, SPARSE, NMLinear
from ..pattern import NMPattern, codes_of
from ..shards import part_of, whole
from ..unfuse import in_linear_form

# Of another base, as far as weights tell
ANOTHER = "another model, or this one in another dtype"
# Of a file that tells changes alone
APPLIED = "; make a checkpoint of it by `maskpro apply MASK MODEL OUT --against FILE`, and give that"


class StoredMask(NamedTuple):
    """A mask that was read from a path.

    Attributes:
        codes: group codes [out, K / M] by name of the layer, on the CPU.
        kind: what it was read from: "mask file", "run" or "checkpoint".
        digest: of the mask file, or of the logits of the run, by which other files name them; of a checkpoint that of
            its masks.
    """

    codes: dict[str, Tensor]
    kind: str
    digest: str


def is_there(path: str | Path) -> bool:
    """Whether there is a file or a folder of that name."""
    try:
        # "" is no folder that anyone means
        return path != "" and Path(path).exists()
    except OSError:
        # such as of a name that is too long
        return False


@torch.no_grad()
def stored_mask(
    path: str | Path,
    layers: Mapping[str, nn.Module],
    pattern: str | NMPattern,
    *,
    trust_remote_code: bool = False,
) -> StoredMask:
    """The mask of every layer out of what is stored; ``convert`` takes its codes, or the path itself, as ``init``.

    Of a mask file, layers that are cut over ranks get the codes of what this rank has. All ranks come to it.

    Args:
        path: a mask file; the folder of a run, whose most likely masks count; or that of a causal language model, with
            zeros in its weights, packed, or with its masks as ``save_pretrained`` writes them. Such a model is loaded
            on the CPU, in the dtype of the layers. Where a group has fewer weights that are not zero than the pattern
            keeps, the first weights that are zero in the layer as well count as kept, then its largest ones.
        layers: dense ones with a ``weight`` [out, K], by name.
        pattern: "N:M" or NMPattern; that of the masks.
        trust_remote_code: as for ``hf.load_model``.

    Warns:
        UserWarning: if the masks belong to other weights than those of the layers: refitted or trained ones, or such
            that cannot be compared; or if groups of a checkpoint were filled up.

    Raises:
        TypeError, ValueError: the masks are of another base model, pattern or set of layers, or there are none; an
            argument is not as above.
        OSError: there is nothing, or it cannot be read.
    """
    if not isinstance(path, (str, Path)):
        raise TypeError(f"path: expected a str or a Path, got {type(path).__name__}")
    if not is_there(path):
        raise FileNotFoundError(f"path: expected a mask file, a run or a sparse checkpoint, got {str(path)!r}: none")
    if not layers:
        raise ValueError("layers: expected at least one, got none")
    pattern, path = NMPattern(pattern), Path(path)
    if path.is_file():
        return _of_mask_file(path, layers, pattern)
    if (path / LOGITS_FILE).is_file():
        return _of_run(path, layers, pattern)
    return _of_checkpoint(path, layers, pattern, trust_remote_code)


@contextmanager
def _telling(cure: str = "") -> Iterator[None]:
    """Errors of what is read begin with ``path``."""
    try:
        yield
    except (ValueError, OSError) as error:
        told = str(error)
        for argument in ("mask: ", "against: ", "path: ", "model: "):
            told = told.removeprefix(argument)
        if isinstance(error, InitialMaskNeededError):
            cure = APPLIED
        raise (OSError if isinstance(error, OSError) else ValueError)(f"path: {told}{cure}") from error


@contextmanager
def opened_mask_file(path: str | Path) -> Iterator[MaskFile]:
    """A mask file that needs no other one; raises as ``stored_mask``."""
    with _telling("; give a mask file that needs no other, or a folder"):
        mask = MaskFile(path)
    with closing(mask):
        yield mask


def _of_mask_file(path: Path, layers: Mapping[str, nn.Module], pattern: NMPattern) -> StoredMask:
    with opened_mask_file(path) as mask:
        _check_pattern(mask.pattern, pattern, path)
        weights = {name: layer.weight.detach() for name, layer in layers.items()}
        try:
            check_fingerprint(mask, base_layers(weights.items(), mask.dtype))
        except ValueError as error:
            raise ValueError(f"{error}{_other_dtype(mask.dtype, layers)}") from None
        with _telling():
            # of DTensors what this rank has, one layer after the other
            base = whole if mask.needs == MAGNITUDE else lambda weight: None
            codes = {name: part_of(mask.codes(name, base(of)), of, pattern.m).clone() for name, of in weights.items()}
    return StoredMask(codes, "mask file", mask.digest)


def _of_run(path: Path, layers: Mapping[str, nn.Module], pattern: NMPattern) -> StoredMask:
    with _telling():
        learned = load_learned(path / LOGITS_FILE)
    told = learned.metadata
    if not {"pattern", "dtype", "dense_weights"} <= told.keys() or told["dtype"] not in DTYPES:
        raise ValueError(
            f"path: expected the logits of a run in {str(path / LOGITS_FILE)!r}, got others; remove that file"
        )
    _check_pattern(NMPattern(told["pattern"]), pattern, path)
    _check_layers({name: logits.shape for name, logits in learned.logits.items()}, layers, path)
    dtype = DTYPES[told["dtype"]]
    found = digest(layer.weight.detach().to(dtype) for layer in layers.values())
    if found != told["dense_weights"]:
        raise ValueError(
            f"model: expected the base of the run in {str(path)!r}, whose weights have the digest "
            f"{told['dense_weights']}, got weights of digest {found}{_other_dtype(dtype, layers)}"
        )
    if learned.weights:
        _warn(path, "the mask of this run was learned over changed weights, and is taken alone")
    for name, logits in learned.logits.items():
        _check_finite("logits", logits, name, path / LOGITS_FILE)
    codes = {name: top_n_mask(learned.logits[name], pattern) for name in layers}
    return StoredMask(codes, "run", learned.digest)


def _of_checkpoint(
    path: Path, layers: Mapping[str, nn.Module], pattern: NMPattern, trust_remote_code: bool
) -> StoredMask:
    # transformers takes seconds to import
    from ..hf import load_model

    dtype = next(iter(layers.values())).weight.dtype
    with _telling():
        sparse, _ = load_model(str(path.absolute()), dtype, trust_remote_code=trust_remote_code)
    read = _Reading(path, pattern)
    with in_linear_form(sparse):
        modules = dict(sparse.named_modules())
        stored = {
            name: torch.Size((module.out_features, module.in_features))
            for name, module in modules.items()
            if isinstance(module, SPARSE) or (name in layers and isinstance(module, nn.Linear))
        }
        _check_layers(stored, layers, path)
        codes = {name: read.codes(name, modules[name], layer.weight.detach().cpu()) for name, layer in layers.items()}
    for told in read.told():
        _warn(path, told)
    return StoredMask(codes, "checkpoint", digest_of_named(codes))


class _Reading:
    """Masks out of the layers of a checkpoint, and what is to be told of them.

    Attributes:
        changed: names of layers whose kept weights are not those of the model.
        rounded: names of layers whose weights cannot be compared.
        filled: groups in which weights count as kept that the checkpoint has dropped.
    """

    def __init__(self, path: Path, pattern: NMPattern):
        self.path, self.pattern = path, pattern
        self.changed, self.rounded, self.filled = [], [], 0

    def codes(self, name: str, layer: nn.Module, weight: Tensor) -> Tensor:
        """Group codes of a layer, beside its weight in the base; ValueError if it has none of the pattern."""
        if isinstance(layer, MaskedLinear):
            return self._of_masked(name, layer, weight)
        if isinstance(layer, NMLinear):
            return self._of_packed(name, layer, weight)
        return self._of_zeros(name, layer.weight, weight)

    def _of_masked(self, name: str, layer: MaskedLinear, weight: Tensor) -> Tensor:
        _check_pattern(layer.pattern, self.pattern, self.path)
        _check_finite("logits", layer.logits, name, self.path)
        if not torch.equal(layer.weight, weight):
            if not layer.weight_changed:
                raise ValueError(
                    f"model: expected the base that the masks in {str(self.path)!r} belong to, got other weights in "
                    f"{name}: {ANOTHER}"
                )
            self.changed.append(name)
        return top_n_mask(layer.logits, self.pattern)

    def _of_packed(self, name: str, layer: NMLinear, weight: Tensor) -> Tensor:
        _check_pattern(layer.pattern, self.pattern, self.path)
        codes = codes_of(layer.bitmask, weight.shape[1], self.pattern.m)
        if layer.kind == INT8:
            self.rounded.append(name)
        elif not torch.equal(layer.weight, torch.where(expand_mask(codes, self.pattern), weight, 0.0)):
            self.changed.append(name)
        return codes

    def _of_zeros(self, name: str, sparse: Tensor, weight: Tensor) -> Tensor:
        _check_finite("weights", sparse, name, self.path)
        kept = sparse != 0
        many = kept.view(len(kept), -1, self.pattern.m).sum(-1) > self.pattern.n
        if many.any():
            share = float(many.float().mean())
            raise ValueError(
                f"path: expected weights that follow {self.pattern}, got more in {share:.1%} of the groups of {name} "
                f"in {str(self.path)!r}; `maskpro validate` tells which pattern they follow"
            )
        size = weight.abs().float()
        # what is zero in both changes nothing, and is what was kept, or may as well have been
        size.masked_fill_(weight == 0, torch.finfo(torch.float32).max).masked_fill_(kept, torch.inf)
        codes = top_n_mask(size, self.pattern)
        more = expand_mask(codes, self.pattern) & ~kept & (weight != 0)
        self.filled += int(more.view(len(kept), -1, self.pattern.m).any(-1).sum())
        if not torch.equal(sparse[kept], weight[kept]):
            self.changed.append(name)
        return codes

    def told(self) -> Iterator[str]:
        """What is to be told, in sentences."""
        if self.changed:
            yield (
                f"kept weights of {len(self.changed)} layers, such as {self.changed[0]}, are not those of the model: "
                f"they were changed, or are of {ANOTHER}; the mask is taken alone"
            )
        if self.rounded:
            yield f"whether it is of this model is not known: values of {len(self.rounded)} layers are rounded to int8"
        if self.filled:
            yield (
                f"{self.filled} groups have fewer weights than {self.pattern} keeps, and were filled up with the "
                "largest ones of the model"
            )


def _check_pattern(found: NMPattern, pattern: NMPattern, path: Path) -> None:
    if found != pattern:
        raise ValueError(f"path: expected a mask of {pattern}, got one of {found} in {str(path)!r}")


def _check_finite(what: str, values: Tensor, name: str, path: Path) -> None:
    if not values.isfinite().all():
        raise ValueError(f"path: expected finite {what} in {str(path)!r}, got others in {name}")


def _check_layers(stored: Mapping[str, torch.Size], layers: Mapping[str, nn.Module], path: Path) -> None:
    """Raise ValueError unless what is stored, by its shapes, are matrices of just these layers."""
    lacking = [name for name in layers if name not in stored]
    others = [name for name in stored if name not in layers]
    others += [name for name in layers if name in stored and stored[name] != layers[name].weight.shape]
    if lacking or others:
        told = f"none for {lacking[0]}" if lacking else f"one for {others[0]}, of shape {list(stored[others[0]])}"
        raise ValueError(
            f"path: expected masks of the {len(layers)} layers that get one in this model, got {told} in {str(path)!r}"
        )


def _other_dtype(dtype: torch.dtype, layers: Mapping[str, nn.Module]) -> str:
    """What to do where weights differ, and it may be their dtype."""
    found = next(iter(layers.values())).weight.dtype
    if found == dtype:
        return ""
    told = (str(name).removeprefix("torch.") for name in (dtype, found))
    return "; the masks belong to weights in {}, and these are in {}: load the model in that dtype".format(*told)


def _warn(path: Path, what: str) -> None:
    # above what reads, ``stored_mask`` and its ``no_grad``
    warnings.warn(f"{path}: {what}", stacklevel=5)
