"""Masks as small files, that travel without the weights they were learned on.

A mask file holds the group codes of all masked layers in as few bits as the pattern needs. A code of N:M is one of
C(M, N), and those are numbered by the rank in the combinatorial number system (Knuth, The Art of Computer Programming
4A, 7.2.1.3): the kept weights at places p_1 < ... < p_N of a group give C(p_1, 1) + ... + C(p_N, N). Several ranks are
the digits of one word of whole bytes, to the base C(M, N): at 2:4 three a byte, 2.67 bits a group where its entropy is
2.58 at most.

It is a safetensors file. Its metadata name the base model, and hold a fingerprint of its weights: on another base it is
refused. A checksum of everything finds each bit that was changed.
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
# Of a word of ranks: what a 64-bit integer with a sign holds
MOST_BYTES = 7


class MaskFile:
    """The content of a mask file, as ``load_masks`` reads it.

    Attributes:
        pattern: of the masks.
        layers: shape [out, K] of each layer's weight, by name.
        model: the name of the base model, as whoever wrote the file called it.
        dtype: of the base weights that the fingerprint is of.
        base: fingerprint of the base: a digest of the names, shapes and weights of the layers.
        provenance: where the masks come from, as whoever wrote the file put it; JSON can hold it.
        checksum: of all that is in the file.
    """

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], checksum: str):
        self.pattern, self.dtype = NMPattern(metadata["pattern"]), DTYPES[metadata["dtype"]]
        self.layers = {name: (rows, k) for name, (rows, k) in json.loads(metadata["layers"]).items()}
        self.model, self.base = metadata["model"], metadata["base"]
        self.provenance, self.checksum = json.loads(metadata["provenance"]), checksum
        self._packed = tensors

    def codes(self, name: str) -> Tensor:
        """Group codes [out, K / M] of a layer, on the CPU."""
        rows, k = self.layers[name]
        shape = (rows, k // self.pattern.m)
        codes, _ = _tables(self.pattern)
        return codes[unpack_ranks(self._packed[name], math.prod(shape), self.pattern).view(shape)]

    def check_base(self, weights: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless the masks belong to these weights [out, K], by name of the layer.

        All ranks come to it where they are DTensors.
        """
        names = sorted(self.layers.keys() | weights.keys())
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        others = [name for name in names if self.layers.get(name) != shapes.get(name)]
        if others:
            raise ValueError(
                f"model: expected the layers that the masks were learned on, those of {self.model}, got {others[0]} of "
                f"shape {shapes.get(others[0], 'none')} where the masks have {self.layers.get(others[0], 'none')}"
            )
        base = _fingerprint([name, digest([weights[name].detach().to(self.dtype)])] for name in names)
        if base != self.base:
            dtypes = {str(weight.dtype).removeprefix("torch.") for weight in weights.values()}
            raise ValueError(
                f"model: expected the base that the masks were learned on, {self.model}, of fingerprint {self.base} in "
                f"{str(self.dtype).removeprefix('torch.')}, got {' and '.join(sorted(dtypes))} weights of fingerprint "
                f"{base}"
            )


def is_mask_file(path: str | Path) -> bool:
    """True where the file at a path says that it is a mask file; what else is in it is not looked at."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format", "").startswith("maskpro-mask")
    except (SafetensorError, OSError):
        return False


def load_masks(path: str | Path) -> MaskFile:
    """Read a mask file.

    To put its masks on a base model: ``convert(model, masks.pattern, targets=list(masks.layers), init=path)``, which
    compares the base, then ``finalize``.

    Raises:
        ValueError: if it is no mask file, or was damaged or changed.
        OSError: if it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            # ahead of the tensors: another file may be large
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
        raise ValueError(f"mask: expected what was written, got {str(path)!r}, damaged or changed since")
    return MaskFile(tensors, metadata, checksum)


def save_masks(path: str | Path, layers: Iterable[tuple[str, Tensor, Tensor]], pattern: str | NMPattern,
               *, model: str, provenance: Mapping[str, object] | None = None) -> MaskFile:  # fmt: skip
    """Write masks into a file, and give what ``load_masks`` reads of it.

    Layers may be made one at a time: no more than one is held, and what the file will hold.

    Args:
        path: of the file; one that is there is replaced once the new one is safe on disk.
        layers: (name, group codes [out, K / M], base weight [out, K]) of each; the weights of one dtype.
        pattern: "N:M" or NMPattern.
        model: the name of the base model.
        provenance: where the masks come from, for who reads the file; JSON has to hold it.

    Raises:
        TypeError, ValueError: an argument is not as above.
        OSError: if the file cannot be written.
    """
    pattern, shapes, digests, packed, dtypes = NMPattern(pattern), {}, [], {}, set()
    for name, codes, weight in layers:
        if name in shapes or weight.dim() != 2 or weight.shape[1] % pattern.m:
            raise ValueError(
                f"layers: expected another name for each, and weights [out, K] with K divisible by {pattern.m}, got "
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
    rank, count = torch.zeros_like(codes), torch.zeros_like(codes)
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
    """(ranks, bytes) of the word that takes the fewest bits a group, and of those the shortest."""
    count = math.comb(pattern.m, pattern.n)
    words = []
    for size in range(1, MOST_BYTES + 1):
        # exactly, where a logarithm of floats could be one too many
        digits = 0
        while count ** (digits + 1) <= 1 << 8 * size:
            digits += 1
        if digits:
            words.append((digits, size))
    return min(words, key=lambda word: (word[1] / word[0], word[1]))


def pack_ranks(ranks: Tensor, pattern: NMPattern) -> Tensor:
    """uint8 [bytes] of ranks, int64 of any shape: whole words, the lowest byte first; missing digits are 0."""
    digits, size = word_size(pattern)
    ranks = ranks.flatten()
    ranks = torch.nn.functional.pad(ranks, (0, -len(ranks) % digits)).view(-1, digits)
    words = torch.zeros(len(ranks), dtype=torch.int64, device="cpu")
    for digit in reversed(ranks.unbind(1)):
        words = words * math.comb(pattern.m, pattern.n) + digit
    return torch.stack([(words >> 8 * byte & 255).to(torch.uint8) for byte in range(size)], dim=1).flatten()


def unpack_ranks(packed: Tensor, length: int, pattern: NMPattern) -> Tensor:
    """The first ``length`` ranks, int64 [length], of what ``pack_ranks`` gave; ValueError if it gave none such."""
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
