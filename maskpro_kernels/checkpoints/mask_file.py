"""Mask files: small files of masks, without the weights.

A mask file has the group codes of all masked layers, in few bits. Each of the C(M, N) codes has a number, its rank in
the combinatorial number system (Knuth, The Art of Computer Programming 4A, 7.2.1.3): kept weights at places p_1 < ... <
p_N of a group have the rank C(p_1, 1) + ... + C(p_N, N). Several ranks are the digits, in base C(M, N), of a word of
whole bytes. For 2:4 a byte has three ranks: 2.67 bits a group, where the entropy is at most 2.58.

It is a safetensors file. Its metadata name the base model and contain a fingerprint of its weights, so that another
base is refused. A checksum over everything detects each changed bit.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import digest, digest_of_bytes, digest_of_named, write_tensors
from ..functional.checks import check_codes, check_exactly_n
from ..ops.pattern import NMPattern

FORMAT = "maskpro-mask 2"
METADATA = ("format", "pattern", "dtype", "model", "layers", "base", "provenance")
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
# Bytes of a word of ranks, so that a signed 64-bit integer can represent it
MOST_BYTES = 7


class MaskFile:
    """Content of a mask file, as ``load_masks`` reads it.

    Attributes:
        pattern: of the masks.
        layers: shape [out, K] of each layer's weight, by name.
        model: name of the base model, as given by the writer of the file.
        dtype: dtype of the base weights for the fingerprint.
        base: fingerprint of the base: a digest of the names, shapes and weights of the layers.
        provenance: origin of the masks, as given by the writer: JSON values.
        checksum: of the whole file.
    """

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], checksum: str):
        self.pattern = NMPattern(metadata["pattern"])
        self.dtype = DTYPES[metadata["dtype"]]
        self.layers = {name: (rows, k) for name, (rows, k) in json.loads(metadata["layers"]).items()}
        self.model = metadata["model"]
        self.base = metadata["base"]
        self.provenance = json.loads(metadata["provenance"])
        self.checksum = checksum
        self._packed = tensors

    def codes(self, name: str) -> Tensor:
        """Group codes [out, K / M] of a layer, on the CPU."""
        rows, k = self.layers[name]
        shape = (rows, k // self.pattern.m)
        codes, _ = _tables(self.pattern)
        return codes[unpack_ranks(self._packed[name], math.prod(shape), self.pattern).view(shape)]

    def check_base(self, weights: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless the masks belong to these weights [out, K], by name of the layer.

        If they are DTensors, all ranks must call it.
        """
        names = sorted(self.layers.keys() | weights.keys())
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        differing = [name for name in names if self.layers.get(name) != shapes.get(name)]
        if differing:
            raise ValueError(
                f"model: expected the layers of the masks' base model, {self.model}, got {differing[0]} of shape "
                f"{shapes.get(differing[0], 'none')}, but in the masks {self.layers.get(differing[0], 'none')}"
            )
        base = _fingerprint([name, digest([weights[name].detach().to(self.dtype)])] for name in names)
        if base != self.base:
            dtypes = {str(weight.dtype).removeprefix("torch.") for weight in weights.values()}
            raise ValueError(
                f"model: expected the masks' base model, {self.model}, with fingerprint {self.base} in "
                f"{str(self.dtype).removeprefix('torch.')}, got {' and '.join(sorted(dtypes))} weights with "
                f"fingerprint {base}"
            )


def is_mask_file(path: str | Path) -> bool:
    """Return whether the header of a file says that it is a mask file; the rest is not checked."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format", "").startswith("maskpro-mask")
    except (SafetensorError, OSError):
        return False


def load_masks(path: str | Path) -> MaskFile:
    """Read a mask file.

    To apply its masks to a base model, call ``convert(model, masks.pattern, targets=list(masks.layers), init=path)``,
    which compares the base, then ``finalize``.

    Raises:
        ValueError: if it is not a mask file, or was damaged or changed.
        OSError: if it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            # before the tensors are read: another file may be large
            if not metadata.get("format", "").startswith("maskpro-mask"):
                raise ValueError("metadata of another kind")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"mask: expected a mask file, got {str(path)!r}: {error}") from error
    except OSError as error:
        raise type(error)(f"mask: expected a mask file, got {str(path)!r}: {error}") from error
    if metadata["format"] != FORMAT:
        raise ValueError(f"mask: expected {FORMAT}, got {metadata['format']!r} in {str(path)!r}, of another version")
    stored = metadata.pop("checksum", None)
    checksum = digest_of_named(tensors, metadata)
    if stored != checksum or metadata.keys() != set(METADATA):
        raise ValueError(f"mask: expected an unchanged file, got {str(path)!r}, which was damaged or changed")
    try:
        masks = MaskFile(tensors, metadata, checksum)
        if unpaired := masks.layers.keys() ^ tensors.keys():
            raise ValueError(f"a layer without a tensor, or a tensor without a layer, {min(unpaired)!r}")
        if not all(type(size) is int and size >= 0 for shape in masks.layers.values() for size in shape):
            raise ValueError(f"layers {metadata['layers']}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"mask: expected metadata of a mask file, got others in {str(path)!r}: {error}") from error
    return masks


def save_masks(path: str | Path, layers: Iterable[tuple[str, Tensor, Tensor]], pattern: str | NMPattern,
               *, model: str, provenance: Mapping[str, object] | None = None) -> MaskFile:  # fmt: skip
    """Write masks into a file, and return its content as ``load_masks`` would.

    ``layers`` may be a generator: it keeps one layer in memory at a time, and the content of the file.

    Args:
        path: of the file; an existing file is replaced once the new one is on disk.
        layers: (name, group codes [out, K / M], base weight [out, K]) of each; all weights of one dtype.
        pattern: "N:M" or NMPattern.
        model: name of the base model.
        provenance: origin of the masks, for readers of the file: JSON values.

    Raises:
        TypeError, ValueError: an argument is not as above.
        OSError: if the file cannot be written.
    """
    pattern = NMPattern(pattern)
    shapes = {}
    digests = []
    packed = {}
    dtypes = set()
    for name, codes, weight in layers:
        if name in shapes or weight.dim() != 2 or weight.shape[1] % pattern.m:
            raise ValueError(
                f"layers: expected distinct names, and weights [out, K] with K divisible by {pattern.m}, got "
                f"{list(weight.shape)} in {name}"
            )
        check_codes("codes", codes, pattern, weight)
        check_exactly_n("codes", codes, pattern)
        shapes[name] = tuple(weight.shape)
        digests.append([name, digest([weight])])
        dtypes.add(weight.dtype)
        _, ranks = _tables(pattern)
        packed[name] = pack_ranks(ranks[codes.cpu().to(torch.int64)], pattern)
    if len(dtypes) != 1 or not dtypes <= set(DTYPES.values()):
        raise ValueError(f"layers: expected weights of one dtype, float32, bfloat16 or float16, got {dtypes or 'none'}")
    metadata = {
        "format": FORMAT,
        "pattern": str(pattern),
        "dtype": str(dtypes.pop()).removeprefix("torch."),
        "model": model,
        "layers": json.dumps(shapes),
        "base": _fingerprint(digests),
        "provenance": json.dumps(dict(provenance or {})),
    }
    checksum = digest_of_named(packed, metadata)
    write_tensors(packed, path, {**metadata, "checksum": checksum})
    return MaskFile(packed, metadata, checksum)


def _fingerprint(digests: Iterable[list[str]]) -> str:
    return digest_of_bytes(json.dumps(sorted(digests)).encode()).hex()


@functools.cache
def _tables(pattern: NMPattern) -> tuple[Tensor, Tensor]:
    """(codes by rank, in the pattern's dtype; int64 ranks by code, 0 where N weights are not kept)."""
    codes = torch.arange(1 << pattern.m, device="cpu")
    rank = torch.zeros_like(codes)
    count = torch.zeros_like(codes)
    for place in range(pattern.m):
        kept = codes >> place & 1
        count += kept
        binomials = torch.tensor([math.comb(place, count) for count in range(pattern.m + 1)], device="cpu")
        rank += kept * binomials[count]
    kept = count == pattern.n
    by_rank = torch.zeros(math.comb(pattern.m, pattern.n), dtype=torch.int64, device="cpu")
    by_rank[rank[kept]] = codes[kept]
    return by_rank.to(pattern.code_dtype), torch.where(kept, rank, 0)


def word_size(pattern: NMPattern) -> tuple[int, int]:
    """(ranks, bytes) of the word with the fewest bits a group; of several the shortest."""
    count = math.comb(pattern.m, pattern.n)
    words = []
    for size in range(1, MOST_BYTES + 1):
        # by integers: a logarithm of floats could give one too many
        digits = 0
        while count ** (digits + 1) <= 1 << 8 * size:
            digits += 1
        if digits:
            words.append((digits, size))
    return min(words, key=lambda word: (word[1] / word[0], word[1]))


def pack_ranks(ranks: Tensor, pattern: NMPattern) -> Tensor:
    """Pack int64 ranks of any shape into uint8 [bytes]: whole words, lowest byte first; missing digits are 0."""
    digits, size = word_size(pattern)
    ranks = ranks.flatten()
    ranks = torch.nn.functional.pad(ranks, (0, -len(ranks) % digits)).view(-1, digits)
    words = torch.zeros(len(ranks), dtype=torch.int64, device="cpu")
    for digit in reversed(ranks.unbind(1)):
        words = words * math.comb(pattern.m, pattern.n) + digit
    return torch.stack([(words >> 8 * byte & 255).to(torch.uint8) for byte in range(size)], dim=1).flatten()


def unpack_ranks(packed: Tensor, length: int, pattern: NMPattern) -> Tensor:
    """Unpack the first ``length`` ranks, int64 [length], of ``pack_ranks``; ValueError if there are fewer."""
    digits, size = word_size(pattern)
    count = -(-length // digits)
    if packed.dtype != torch.uint8 or packed.shape != (count * size,):
        raise ValueError(f"packed: expected uint8 [{count * size}], got {packed.dtype} {list(packed.shape)}")
    words = torch.zeros(count, dtype=torch.int64, device="cpu")
    for byte in reversed(packed.view(-1, size).unbind(1)):
        words = words << 8 | byte
    ranks = []
    for _ in range(digits):
        ranks.append(words % math.comb(pattern.m, pattern.n))
        words = words // math.comb(pattern.m, pattern.n)
    if words.any():
        raise ValueError(f"packed: expected words of {digits} ranks, got larger ones")
    return torch.stack(ranks, dim=1).flatten()[:length]
