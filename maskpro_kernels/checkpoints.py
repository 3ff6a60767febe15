"""Masks and sparse weights as other programs store them, and which patterns a checkpoint holds."""

from __future__ import annotations

import json
import shutil
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .export import write_tensors
from .packed import PackedNM
from .pattern import GROUP_SIZES, NMPattern

# What a weight is stored as in compressed-tensors' format sparse-24-bitmask
COMPRESSED = ("compressed", "bitmask", "shape")
# And in this package's own
PACKED = ("values", "bitmask")
# Settings that would make a loader look for tensors that are no longer there
COMPRESSION_SETTINGS = ("quantization_config", "compression_config", "sparsity_config")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint, each one whole.

    Raises:
        ValueError: if there are none, or one of them is damaged.
    """
    folder = Path(folder)
    files = [folder] if folder.suffix == ".safetensors" else sorted(folder.glob("*.safetensors"))
    if not files:
        told = "which has none" if folder.is_dir() else "which is no folder"
        raise ValueError(f"checkpoint: expected a folder with safetensors files, got {str(folder)!r}, {told}")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"checkpoint: expected a whole safetensors file, got {str(file)!r}: {error}; copy or download it again"
            ) from error
    return files


def read_masks(source: str | Path, layers: Mapping[str, nn.Module], pattern: str | NMPattern) -> dict[str, Tensor]:
    """Masks that another program has learned: bool [out, K] by name of the layer.

    Args:
        source: an .npz file of MaskLLM (each mask flat, packed eight to a byte, the first in the highest bit), a .pt
            file with a dict of bool masks, or a folder of MaskPro with one such mask in a file ``<name>.pt`` each.
            Names may end in ".mask" or ".weight.mask".
        layers: modules with a ``weight`` [out, K], by name; those without a mask are left out.
        pattern: "N:M" or NMPattern: at most N of every M are kept.

    Raises:
        ValueError: if ``source`` holds no such masks, one does not fit its layer, or keeps more than N of M.
    """
    pattern, source = NMPattern(pattern), Path(source)
    masks = {}
    for stored, mask in _stored_masks(source):
        name = stored.removesuffix(".mask").removesuffix(".weight")
        if name not in layers:
            raise ValueError(f"masks: expected masks of the model's linear layers, got one of {stored!r}")
        shape = layers[name].weight.shape
        if mask.dtype == torch.uint8:
            bits = torch.from_numpy(np.unpackbits(mask.numpy()))
            if not shape.numel() <= len(bits) < shape.numel() + 8:
                raise ValueError(f"masks: expected {shape.numel()} bits for {name}, got {len(bits)}")
            mask = bits[: shape.numel()].bool().view(shape)
        if mask.shape != shape:
            raise ValueError(f"masks: expected {list(shape)} for {name}, got {list(mask.shape)}")
        if shape[1] % pattern.m:
            raise ValueError(f"masks: expected rows of whole groups of {pattern.m}, got {shape[1]} columns in {name}")
        most = int(mask.view(shape[0], -1, pattern.m).sum(-1).max())
        if most > pattern.n:
            raise ValueError(f"masks: expected at most {pattern.n} of every {pattern.m} kept, got {most} in {name}")
        masks[name] = mask
    if not masks:
        raise ValueError(f"masks: expected at least one, got none in {str(source)!r}")
    return masks


def _stored_masks(source: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, bool mask, or uint8 with eight to a byte)."""
    if source.suffix == ".npz":
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
        return
    files = sorted(source.glob("*.pt")) if source.is_dir() else [source]
    for file in files:
        try:
            with warnings.catch_warnings(action="ignore"):
                loaded = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            # which of a dozen errors depends on where the damage is; told without torch's advice to load it as a
            # pickle, which runs whatever it holds
            raise ValueError(
                f"masks: expected a file of bool masks, got {str(file)!r}, which is damaged or holds more than tensors"
            ) from error
        found = loaded if isinstance(loaded, Mapping) else {file.stem: loaded}
        for name, mask in found.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                raise ValueError(f"masks: expected bool masks, got {type(mask).__name__} {name!r} in {str(file)!r}")
            if not isinstance(name, str):
                raise ValueError(f"masks: expected names of layers, got {name!r} in {str(file)!r}")
            # sums and products would take another byte for what it is
            if mask.layout != torch.strided or mask.is_meta or (mask.view(torch.uint8) > 1).any():
                raise ValueError(
                    f"masks: expected bool masks whose bytes are 0 or 1, got others in {name} of {str(file)!r}"
                )
            yield name, mask


def decompress(source: str | Path, output: str | Path) -> int:
    """Write a checkpoint in compressed-tensors' sparse-24-bitmask format as a plain one with exact zeros.

    Files are decompressed one at a time. The config loses its settings of compression; what else the folder holds
    is copied.

    Returns:
        How many weights were decompressed; with none, nothing is written.

    Raises:
        ValueError: if a file is damaged, or parts of a weight are missing or do not agree.
        OSError: if a file cannot be written.
    """
    source, output = Path(source), Path(output)
    files = weight_files(source)
    where = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            where |= dict.fromkeys(opened.keys(), file)
    names = {name.removesuffix(".compressed") for name in where if name.endswith(".compressed")}
    for name in names:
        _check_parts(where, name, COMPRESSED)
    if not names:
        return 0
    output.mkdir(parents=True, exist_ok=True)
    written = {}
    for file in files:
        tensors = {}
        with safe_open(file, framework="pt") as opened:
            for stored in opened.keys():
                name, _, part = stored.rpartition(".")
                if name not in names or part not in COMPRESSED:
                    tensors[stored] = opened.get_tensor(stored)
                elif part == "compressed":
                    parts = [_tensor(where[f"{name}.{part}"], f"{name}.{part}") for part in COMPRESSED]
                    tensors[f"{name}.weight"] = _decompressed(name, *parts)
        write_tensors(tensors, output / file.name, {"format": "pt"})
        written |= dict.fromkeys(tensors, file.name)
    if [file.name for file in files] != [SINGLE]:
        (output / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": written}, indent=2), encoding="utf-8")
    for other in source.iterdir():
        if other.is_file() and other.suffix != ".safetensors" and other.name != INDEX:
            shutil.copy(other, output / other.name)
    config = output / "config.json"
    if config.exists():
        settings = _settings(config)
        kept = {name: value for name, value in settings.items() if name not in COMPRESSION_SETTINGS}
        config.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    return len(names)


def _settings(config: Path) -> dict:
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError(f"a {type(settings).__name__}")
        return settings
    except ValueError as error:
        raise ValueError(
            f"checkpoint: expected settings in {config.name}, got {error}; copy or download it again"
        ) from error


def _check_parts(where: Mapping[str, Path], name: str, parts: Iterable[str]) -> None:
    missing = [part for part in parts if f"{name}.{part}" not in where]
    if missing:
        raise ValueError(f"checkpoint: expected {name}.{', .'.join(parts)}, got none of {missing}")


def _tensor(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)


def _decompressed(name: str, values: Tensor, bitmask: Tensor, shape: Tensor) -> Tensor:
    sizes = shape.flatten().tolist()
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"checkpoint: expected two positive integers in {name}.shape, got {sizes}")
    rows, k = sizes
    if k % 4:
        raise ValueError(f"checkpoint: expected rows of whole groups of 4 in {name}.shape, got {sizes}")
    if values.numel() != rows * k // 2 or values.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"checkpoint: expected {rows * k // 2} values of float32, bfloat16 or float16 in {name}.compressed, "
            f"got {values.numel()} of {values.dtype}"
        )
    try:
        return PackedNM(values.reshape(rows, k // 2).contiguous(), bitmask, "2:4").check().unpack()
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint: {name}.{error}") from error


@dataclass(frozen=True)
class Survey:
    """What a weight of a checkpoint holds.

    Attributes:
        name: of the weight.
        shape: [out, K].
        density: share of its values that are not zero.
        negative_zeros: how many are -0.0.
        patterns: for each M that divides K, the smallest N:M that it follows, N < M; the tightest first.
        packed: whether it is stored packed.
    """

    name: str
    shape: tuple[int, int]
    density: float
    negative_zeros: int
    patterns: tuple[str, ...]
    packed: bool

    @property
    def alignment(self) -> int:
        """The largest power of two that divides K."""
        return self.shape[1] & -self.shape[1]


def survey(files: Iterable[Path]) -> Iterator[Survey]:
    """Of every matrix in these safetensors files, one at a time in memory; packed ones are unpacked.

    Raises:
        ValueError: if a packed weight is damaged.
    """
    where = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            where |= dict.fromkeys(opened.keys(), file)
    for stored in sorted(where):
        name, _, part = stored.rpartition(".")
        form = _form(where, name)
        if form is None or part not in form:
            tensor = _tensor(where[stored], stored)
            if tensor.dim() == 2 and tensor.is_floating_point():
                # floats of 8 bits know few operations
                yield _surveyed(stored, tensor.float() if tensor.itemsize == 1 else tensor, packed=False)
        elif part == form[0]:
            _check_parts(where, name, form)
            parts = [_tensor(where[f"{name}.{other}"], f"{name}.{other}") for other in form]
            weight = _decompressed(name, *parts) if form == COMPRESSED else _unpacked(name, *parts)
            yield _surveyed(f"{name}.weight", weight, packed=True)


def _form(where: Mapping[str, Path], name: str) -> tuple[str, ...] | None:
    """The parts that a weight is stored in, by the file of each tensor; None where it is not packed."""
    if f"{name}.compressed" in where:
        return COMPRESSED
    bitmask = f"{name}.bitmask"
    if f"{name}.values" in where and bitmask in where:
        with safe_open(where[bitmask], framework="pt") as opened:
            # other programs have tensors of these names too
            if opened.get_slice(bitmask).get_dtype() == "U8":
                return PACKED
    return None


def _unpacked(name: str, values: Tensor, bitmask: Tensor) -> Tensor:
    """A packed weight whose pattern is not told beside it: the first M in whose groups equally many are kept."""
    if values.dim() != 2 or bitmask.dim() != 2:
        raise ValueError(
            f"checkpoint: expected matrices {name}.values and {name}.bitmask, got {list(values.shape)} and "
            f"{list(bitmask.shape)}"
        )
    per_row = values.shape[1]
    for m in GROUP_SIZES:
        for k in range(8 * bitmask.shape[1], 8 * bitmask.shape[1] - 8, -1):
            n, rest = divmod(per_row * m, k) if k > 0 and k % m == 0 else (0, 1)
            if rest or not 1 <= n < m:
                continue
            try:
                return PackedNM(values, bitmask, f"{n}:{m}").check().unpack()
            except (TypeError, ValueError):
                continue
    raise ValueError(f"checkpoint: expected a bitmask in {name} that keeps N of every M for some N:M, got another")


def _surveyed(name: str, weight: Tensor, packed: bool) -> Survey:
    rows, k = weight.shape
    kept = weight != 0
    patterns = []
    for m in GROUP_SIZES:
        if k and k % m == 0:
            most = int(kept.view(rows, -1, m).sum(-1).max()) if rows else 0
            if 1 <= most < m:
                patterns.append((most / m, m, f"{most}:{m}"))
    negative = int((weight.signbit() & ~kept).sum())
    density = float(kept.float().mean()) if weight.numel() else 0.0
    return Survey(name, (rows, k), density, negative, tuple(text for *_, text in sorted(patterns)), packed)
