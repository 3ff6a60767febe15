"""Masks as small files, that travel without the weights they were learned on.

A mask file holds the group codes of all masked layers, in as few bits as the pattern needs, see ``subset_ranks``. Where
it was written against an initial mask, and that takes less, it holds what has changed instead: of each group the rank
less that of the initial mask, modulo their number, compressed by zlib. Most are 0.

It is a safetensors file. Its metadata names the base model, the pattern and the run that learned, and holds a digest of
each layer's base weight: on another base it is refused. A digest of everything finds each bit that was changed.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..digests import digest, digest_of_bytes, digest_of_named
from ..files import write_tensors
from ..functional.checks import check_codes, check_exactly_n
from ..functional.masks import top_n_mask
from ..pattern import NMPattern
from ..stored_digests import digests_are_checked
from .subset_ranks import codes_of_ranks, pack_ranks, rank_count, ranks_of, unpack_ranks

FORMAT = "maskpro-mask 1"
# In the metadata
DIGEST, AGAINST = "digest", "against"
NAMES = ("format", "pattern", "dtype", "model", "layers", "provenance", AGAINST)
# The initial mask that the base weights tell; of another one AGAINST is the digest of its file
MAGNITUDE = "magnitude"
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


class InitialMaskNeededError(ValueError):
    """A mask file was written against an initial mask that was not given."""


class BaseLayer(NamedTuple):
    """A layer of the base model.

    Attributes:
        shape: [out, K] of its weight.
        digest: of its weight, in the dtype of the file.
    """

    shape: tuple[int, int]
    digest: str


class MaskHeader:
    """What a mask file tells of its masks, also where an initial mask is needed to read them.

    Args:
        path: of the file.

    Attributes:
        path: of the file.
        digest: of all that is in it, by which other files name it.
        pattern: of the masks.
        dtype: of the base weights that digests are of.
        model: the name of the base model, as whoever wrote the file called it.
        layers: by name.
        provenance: what the file tells of where its masks come from; JSON can hold it.
        needs: None where the file tells its masks alone; MAGNITUDE; or the digest of the file of an initial mask.
        mask_bytes: what the masks take of the file, or what has changed in them; the rest tells what they are.

    Raises:
        ValueError: if it is no mask file, or was damaged or changed.
        OSError: if it cannot be read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file = _opened(self.path)
        metadata = dict(self._file.metadata() or {})
        stored = metadata.pop(DIGEST, None)
        # ahead of the digest: another file may be large
        if metadata.keys() != set(NAMES) or metadata["format"] != FORMAT:
            raise ValueError(f"mask: expected a file that save_masks wrote, {FORMAT}, got {str(path)!r}")
        self.digest = digest_of_named(_ByName(self._file.keys(), self._file.get_tensor), metadata)
        if digests_are_checked() and stored != self.digest:
            raise ValueError(f"mask: expected what was written, got {str(path)!r}, damaged or changed since")
        try:
            self.pattern, self.dtype = NMPattern(metadata["pattern"]), DTYPES[metadata["dtype"]]
            layers = json.loads(metadata["layers"])
            self.layers = {name: BaseLayer((rows, k), found) for name, (rows, k, found) in layers.items()}
            self.provenance = json.loads(metadata["provenance"])
            if not self.layers:
                raise ValueError("no layers")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"mask: expected a file that save_masks wrote, got {str(path)!r}: {error!r}") from error
        self.model, self.needs = metadata["model"], metadata[AGAINST] or None
        self.mask_bytes = sum(math.prod(self._file.get_slice(name).get_shape()) for name in self._file.keys())

    @property
    def base(self) -> str:
        """The fingerprint of the base model: of names, shapes and digests of the layers that have masks."""
        return fingerprint(self.layers)

    @property
    def groups(self) -> int:
        """How many there are in all layers."""
        return sum(rows * k // self.pattern.m for (rows, k), _ in self.layers.values())

    def close(self) -> None:
        """Let the file be closed; nothing can be read from then on."""
        self._file = None


class MaskFile(MaskHeader):
    """A mask file, read a layer at a time.

    Args:
        path: of the file.
        against: the initial mask that it was written against, where it needs the file of one. Else it is left aside.

    Raises:
        ValueError: as ``MaskHeader``; ``InitialMaskNeededError`` if it needs an initial mask that was not given.
        OSError: if it cannot be read.
    """

    def __init__(self, path: str | Path, against: MaskFile | str | None = None):
        super().__init__(path)
        self._against = self._checked_against(against)

    def _checked_against(self, against: MaskFile | str | None) -> MaskFile | None:
        if self.needs in (None, MAGNITUDE):
            return None
        if not isinstance(against, MaskFile):
            got = "no file" if against is None else f"{against!r}, which is no file"
            raise InitialMaskNeededError(
                f"against: expected the initial mask that {str(self.path)!r} was written against, the file of digest "
                f"{self.needs}, got {got}"
            )
        if against.digest != self.needs:
            raise ValueError(
                f"against: expected the initial mask that {str(self.path)!r} was written against, of digest "
                f"{self.needs}, got {str(against.path)!r} of digest {against.digest}"
            )
        return against

    def codes(self, name: str, weight: Tensor | None = None) -> Tensor:
        """Group codes [out, K / M] of a layer, on the CPU.

        Args:
            name: of the layer.
            weight: of the base, needed where the file ``needs`` MAGNITUDE.

        Raises:
            ValueError: if what is stored is no mask of the pattern, or the file was closed.
        """
        if self._file is None:
            raise ValueError(f"mask: expected an open file, got {str(self.path)!r}, which was closed")
        rows, k = self.layers[name].shape
        shape, count = (rows, k // self.pattern.m), rank_count(self.pattern)
        stored = self._file.get_tensor(name)
        if self.needs is None:
            ranks = unpack_ranks(stored, shape[0] * shape[1], self.pattern).view(shape)
        else:
            before = ranks_of(initial_codes(name, weight, self.pattern, self._against), self.pattern)
            ranks = (before + _decompressed(stored, shape, count)) % count
        return codes_of_ranks(ranks, self.pattern)

    def digest_of_codes(self) -> str:
        """Of the masks: the same for equal ones, however they are stored.

        Raises:
            ValueError: as ``codes``; also where the file ``needs`` MAGNITUDE, since no base is at hand.
        """
        return digest_of_named(_ByName(self.layers, self.codes))


def is_mask_file(path: str | Path) -> bool:
    """Whether there is a file at a path that tells that it is one; what else is in it is not looked at."""
    if not Path(path).is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError):
        return False


def _opened(path: Path):
    try:
        if path.is_dir():
            raise ValueError(f"mask: expected a mask file, got {str(path)!r}, a folder; give the file in it")
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"mask: expected a mask file, got {str(path)!r}: {error}") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"mask: expected a mask file, got {str(path)!r}: there is none") from error
    except OSError as error:
        raise OSError(f"mask: expected a mask file, got {str(path)!r}: {error}") from error


class _ByName(Mapping):
    """Tensors of an open file, each read when it is asked for."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]):
        self._names, self._read = list(names), read

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def save_masks(
    path: str | Path,
    layers: Iterable[tuple[str, Tensor, Tensor]],
    pattern: str | NMPattern,
    *,
    model: str,
    against: MaskFile | str | None = None,
    provenance: Mapping[str, object] | None = None,
) -> MaskFile:
    """Write masks into a file, and open it.

    Layers may be made one at a time: no more than one is held, and what the file will hold.

    Args:
        path: of the file; one that is there is replaced once the new one is safe on disk.
        layers: (name, group codes [out, K / M], base weight [out, K]) of each; the weights of one dtype.
        pattern: "N:M" or NMPattern.
        model: the name of the base model.
        against: a mask that differs in few groups, the open file of one or "magnitude", for a smaller file. It is left
            out where it makes none.
        provenance: what the file shall tell beside that; JSON has to hold it.

    Raises:
        TypeError, ValueError: an argument is not as above, or the initial mask is of another base.
        OSError: if the file cannot be written.
    """
    pattern = NMPattern(pattern)
    if not isinstance(model, str):
        raise TypeError(f"model: expected the name of the base model, got {type(model).__name__}")
    other, told = file_of(against, pattern), _as_json(provenance)
    if other is not None and Path(path).exists() and other.path.samefile(path):
        raise ValueError(f"path: expected another file than that of the initial mask, got {str(path)!r}")
    bases, whole, changed, dtypes = {}, {}, {}, set()
    for name, codes, weight in layers:
        _check_layer(name, codes, weight, pattern, bases)
        dtypes.add(weight.dtype)
        bases |= base_layers([(name, weight)], weight.dtype)
        if other is not None and other.layers.get(name) != bases[name]:
            raise ValueError(
                f"against: expected a mask of the same base, got one of another {name} in {str(other.path)!r}"
            )
        ranks = ranks_of(codes.cpu(), pattern)
        whole[name] = pack_ranks(ranks, pattern)
        if against is not None:
            before = ranks_of(initial_codes(name, weight, pattern, other), pattern)
            changed[name] = _compressed((ranks - before) % rank_count(pattern), rank_count(pattern))
    if len(dtypes) != 1 or not dtypes <= set(DTYPES.values()):
        raise ValueError(f"layers: expected weights of one dtype, float32, bfloat16 or float16, got {dtypes or 'none'}")
    needs, held = "", whole
    if against is not None and _size(changed) < _size(whole):
        needs, held = MAGNITUDE if other is None else other.digest, changed
    metadata = {"pattern": str(pattern), "model": model, "provenance": told, AGAINST: needs}
    _write(path, held, bases, dtypes.pop(), metadata)
    return MaskFile(path, other)


def _write(
    path: str | Path,
    held: Mapping[str, Tensor],
    bases: Mapping[str, BaseLayer],
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> None:
    metadata = {
        **metadata,
        "format": FORMAT,
        "dtype": str(dtype).removeprefix("torch."),
        "layers": json.dumps({name: [*base.shape, base.digest] for name, base in bases.items()}),
    }
    write_tensors(held, path, {**metadata, DIGEST: digest_of_named(held, metadata)})


def _check_layer(name: str, codes: Tensor, weight: Tensor, pattern: NMPattern, known: Mapping[str, BaseLayer]) -> None:
    if name in known or weight.dim() != 2 or weight.shape[1] % pattern.m:
        raise ValueError(
            f"layers: expected another name for each, and weights [out, K] with K divisible by {pattern.m}, got "
            f"{list(weight.shape)} in {name}"
        )
    check_codes("codes", codes, pattern, weight)
    check_exactly_n("codes", codes, pattern)


def _as_json(provenance: Mapping[str, object] | None) -> str:
    try:
        return json.dumps(dict(provenance or {}))
    except (TypeError, ValueError) as error:
        raise TypeError(f"provenance: expected what JSON can hold, got {error}") from error


def file_of(against: MaskFile | str | None, pattern: NMPattern) -> MaskFile | None:
    """The file of an initial mask, None where it has none; ValueError unless it is one of that pattern."""
    if against is None or against == MAGNITUDE:
        return None
    if not isinstance(against, MaskFile):
        raise ValueError(f'against: expected a MaskFile, "magnitude" or None, got {against!r}')
    if against.pattern != pattern:
        raise ValueError(
            f"against: expected a mask of {pattern}, got one of {against.pattern} in {str(against.path)!r}"
        )
    return against


def base_layers(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> dict[str, BaseLayer]:
    """The layers of a base by their (name, weight [out, K]), in a dtype."""
    return {name: BaseLayer(tuple(weight.shape), digest([weight.detach().to(dtype)])) for name, weight in weights}


def fingerprint(layers: Mapping[str, BaseLayer]) -> str:
    """That of a base model: of names, shapes and digests of layers."""
    parts = [[name, *layers[name].shape, layers[name].digest] for name in sorted(layers)]
    return digest_of_bytes(json.dumps(parts).encode()).hex()


def check_fingerprint(mask: MaskFile, found: Mapping[str, BaseLayer]) -> None:
    """Raise ValueError, which tells both fingerprints, unless layers are those of the base that masks belong to."""
    if found == mask.layers:
        return
    names = sorted(mask.layers.keys() | found.keys())
    others = [name for name in names if mask.layers.get(name) != found.get(name)]
    raise ValueError(
        f"model: expected the base that the masks were learned on, {mask.model}, of fingerprint {mask.base}, got one "
        f"of fingerprint {fingerprint(found)}; {len(others)} of {len(names)} layers differ, such as {others[0]}"
    )


def initial_codes(name: str, weight: Tensor | None, pattern: NMPattern, against: MaskFile | None) -> Tensor:
    """Group codes of the initial mask that a file was written against: of another file, or else by magnitude."""
    if against is not None:
        return against.codes(name, weight)
    if weight is None:
        raise ValueError(f"weight: expected that of {name} in the base model, by which its mask is told, got none")
    return top_n_mask(weight.detach().cpu().abs(), pattern)


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _compressed(changes: Tensor, count: int) -> Tensor:
    """uint8 [bytes] of changes of ranks, int64, below ``count``: all lowest bytes first, then the next ones."""
    planes = [(changes >> 8 * byte & 255).to(torch.uint8).flatten() for byte in range(_bytes_of(count))]
    return torch.frombuffer(bytearray(zlib.compress(torch.cat(planes).numpy(), 9)), dtype=torch.uint8)


def _decompressed(stored: Tensor, shape: tuple[int, int], count: int) -> Tensor:
    size = _bytes_of(count) * shape[0] * shape[1]
    try:
        # no more than that, whatever the bytes would unfold to
        content = bytearray(zlib.decompressobj().decompress(stored.numpy(), size + 1))
    except zlib.error as error:
        raise ValueError(f"mask: expected changes compressed by zlib, got others: {error}") from error
    if len(content) != size:
        raise ValueError(f"mask: expected changes of {shape[0] * shape[1]} groups, got others")
    planes = torch.frombuffer(content, dtype=torch.uint8)
    changes = torch.zeros(shape, dtype=torch.int64, device="cpu")
    for byte, plane in enumerate(planes.view(_bytes_of(count), *shape)):
        changes |= plane.to(torch.int64) << 8 * byte
    return changes


def _bytes_of(count: int) -> int:
    """Of a rank below ``count``."""
    return -(-(count - 1).bit_length() // 8)
