"""Importers of files of other programs: checkpoints of compressed-tensors, and masks of MaskLLM and MaskPro.

For a new format of masks, write a function that yields names and masks, and add it to ``MASK_FORMATS``. The command
`maskpro import` calls ``write_plain`` and ``read_masks``.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..files import INDEX, SINGLE, read_object, weight_files, write_tensors
from ..ops.pattern import NMPattern
from ..packed import PackedNM
from . import marlin_24

# Formats of compressed-tensors, whose own reader of the first ended with version 0.14, which needs transformers before
# 5; it never read the last
FORMATS = ("sparse-24-bitmask", "dense", "marlin-24")
# Settings with which a loader would expect compressed tensors
COMPRESSION_SETTINGS = ("quantization_config", "compression_config", "sparsity_config")


def read_masks(source: str | Path, layers: Mapping[str, nn.Module], pattern: str | NMPattern) -> dict[str, Tensor]:
    """Read masks of another program: bool [out, K] by name of the layer.

    Args:
        source: an .npz file of MaskLLM; a .pt file with a dict of masks, as bools or as 0 and 1 in any other dtype; or
            a folder with such an .npz file, or with a file ``<name>.pt`` for each mask. Names may end in ".mask" or
            ".weight.mask".
        layers: modules with a ``weight`` [out, K], by name; the result has only those with a mask.
        pattern: "N:M" or NMPattern: at most N of every M are kept.

    Raises:
        ValueError: if ``source`` has no such masks, or a mask does not fit its layer or keeps more than N of M.
    """
    pattern = NMPattern(pattern)
    source = Path(source)
    arrays = sorted(source.glob("*.npz")) if source.is_dir() else []
    if len(arrays) > 1:
        raise ValueError(f"masks: expected one .npz file in {str(source)!r}, got {len(arrays)}; give the path of one")
    source = arrays[0] if arrays else source
    for file in source.glob("*.pt") if source.is_dir() else [source]:
        # a pipe would block forever
        if not file.is_file():
            raise ValueError(f"masks: expected a file or a folder of files, got {str(file)!r}, which is none")
    masks = {}
    most = max((layer.weight.numel() for layer in layers.values()), default=0)
    for stored, mask in MASK_FORMATS.get(source.suffix, _masks_of_torch)(source, most):
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
        kept = int(mask.view(shape[0], -1, pattern.m).sum(-1).max())
        if kept > pattern.n:
            raise ValueError(f"masks: expected at most {pattern.n} of every {pattern.m} kept, got {kept} in {name}")
        masks[name] = mask
    if not masks:
        raise ValueError(f"masks: expected at least one, got none in {str(source)!r}")
    return masks


def _masks_of_maskllm(source: Path, most: int) -> Iterator[tuple[str, Tensor]]:
    """(name, uint8 [bytes]) of each mask in an .npz file: at most ``most`` elements, the first the highest bit."""
    expected = f"masks: expected an .npz file of MaskLLM, got {str(source)!r}"
    if not zipfile.is_zipfile(source):
        # numpy's error would advise to load it as a pickle
        raise ValueError(f"{expected}, which is damaged or of another kind")
    try:
        with open(source, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            for name in arrays.files:
                with arrays.zip.open(f"{name}.npy") as header:
                    if np.lib.format.read_magic(header) != (1, 0):
                        raise ValueError(f"arrays in version 1.0 of the format expected, {name} is in another one")
                    shape, _, dtype = np.lib.format.read_array_header_1_0(header)
                if dtype != np.uint8 or len(shape) != 1:
                    raise ValueError(f"flat uint8 arrays expected, {name} is {dtype}")
                if shape[0] > (most + 7) // 8:
                    raise ValueError(
                        f"at most {most} bits expected, those of the largest layer, {name} has {shape[0]} bytes"
                    )
                yield name, torch.from_numpy(arrays[name])
    except Exception as error:
        # zipfile, zlib and numpy each raise their own errors for damage
        raise ValueError(f"{expected}: {error}") from error


def _masks_of_torch(source: Path, most: int) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, mask as bool) from a file with a dict of masks, or from a folder with a file for each.

    MaskPro's program writes bool tensors, a file for each mask or one for all. MaskLLM's ``tool_compute_mask_hf.py``
    writes one file of float32 masks, named after their weights (https://github.com/NVlabs/MaskLLM).
    """
    for file in sorted(source.glob("*.pt")) if source.is_dir() else [source]:
        try:
            size = 0
            if zipfile.is_zipfile(file):
                size = sum(member.file_size for member in zipfile.ZipFile(file).infolist())
            if size > file.stat().st_size:
                raise ValueError("torch does not compress tensors, and the sizes in this file exceed its own")
            with warnings.catch_warnings(action="ignore"):
                loaded = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            # the kind of error depends on the place of the damage; torch's message is left out, since it advises to
            # load the file as a pickle, which can run any code
            raise ValueError(
                f"masks: expected a file of masks, got {str(file)!r}, which is damaged or has more than tensors"
            ) from error
        for name, mask in (loaded if isinstance(loaded, Mapping) else {file.stem: loaded}).items():
            plain = isinstance(mask, Tensor) and mask.layout == torch.strided and not mask.is_meta
            if not plain or not isinstance(name, str):
                raise ValueError(f"masks: expected plain tensors by name, got {name!r} in {str(file)!r}")
            # such as a view that repeats one element
            if mask.numel() > most:
                raise ValueError(
                    f"masks: expected at most {most} elements, as the largest layer, got {mask.numel()} in {name}"
                )
            values = mask
            if mask.itemsize == 1:
                # also for bool: sums and products would use other bytes than 0 and 1
                values = mask.view(torch.uint8) if mask.dtype == torch.bool else mask.float()
            if not ((values == 0) | (values == 1)).all():
                raise ValueError(f"masks: expected 0 and 1, or false and true, got others in {name} of {str(file)!r}")
            yield name, mask.bool()


# Readers of files by suffix; folders and all other files are read by torch
MASK_FORMATS = {".npz": _masks_of_maskllm}


def write_plain(source: str | Path, output: str | Path) -> bool:
    """Write a checkpoint of compressed-tensors as a plain one with exact zeros; return false if it is none.

    Files in the formats sparse-24-bitmask and marlin-24, also with vLLM's names of its tensors, are decompressed one at
    a time, and those in the format dense are linked to. Settings of compression are removed from the config. Other
    files of the folder are copied.

    Raises:
        ValueError: if the checkpoint has another format, such as another quantized one, a file is damaged or missing,
            or tensors of a weight are missing, twice there or do not fit.
        OSError: if a file cannot be written.
    """
    source = Path(source)
    output = Path(output)
    files = weight_files(source)
    where = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            where |= dict.fromkeys(opened.keys(), file)
    # tensors of each weight, by its name
    names: dict[str, tuple[str, ...]] = {}
    for parts in DECODERS:
        first, second, third = parts
        for stored in where:
            name, _, part = stored.rpartition(".")
            # packed weights of this package have a bitmask, those of others a shape
            if part == first or (part == second and f"{name}.{third}" in where):
                names[name] = parts
    config = source / "config.json"
    settings = read_object(config) if config.is_file() else {}
    compressions = []
    for compression in map(settings.get, COMPRESSION_SETTINGS):
        if isinstance(compression, dict):
            # only those of compressed-tensors, not of other quantizers
            method = compression.get("quant_method", "compressed-tensors")
            if method == "compressed-tensors":
                compressions.append(compression)
    if not names and not compressions:
        return False
    for compression in compressions:
        sparsity = compression.get("sparsity_config")
        formats = [compression.get("format"), sparsity.get("format") if isinstance(sparsity, dict) else None]
        unknown = sorted(str(form) for form in formats if form not in (None, *FORMATS))
        schemes = compression.get("config_groups")
        if unknown or (schemes and "marlin-24" not in formats):
            raise ValueError(
                f"checkpoint: expected weights in the format {' or '.join(FORMATS)} of compressed-tensors, got "
                f"{f'the format {unknown[0]}' if unknown else 'quantized weights'}; decompress it first, with "
                "compressed-tensors"
            )
        if compression.get("kv_cache_scheme") is not None:
            raise ValueError(
                "checkpoint: expected a cache in the model's dtype, got a kv_cache_scheme in config.json, whose scales "
                "would be without a meaning; delete it there to import the weights alone"
            )
        for scheme in schemes.values() if isinstance(schemes, dict) else ():
            marlin_24.check_scheme(scheme)
    for name, parts in names.items():
        missing = [part for part in parts if f"{name}.{part}" not in where]
        if missing:
            raise ValueError(
                f"checkpoint: expected {name}.{', .'.join(parts)}, got none of {missing} in {str(source)!r}"
            )
        if f"{name}.weight" in where:
            raise ValueError(f"checkpoint: expected {name}.weight or {name}.{parts[0]}, got both in {str(source)!r}")
    output.mkdir(parents=True, exist_ok=True)
    if names:
        written = {}
        for file in files:
            tensors = {}
            with safe_open(file, framework="pt") as opened:
                for stored in opened.keys():
                    name, _, part = stored.rpartition(".")
                    parts = names.get(name, ())
                    if part not in parts:
                        tensors[stored] = opened.get_tensor(stored)
                    elif part == parts[0]:
                        compressed = {}
                        for component in parts:
                            key = f"{name}.{component}"
                            with safe_open(where[key], framework="pt") as holder:
                                compressed[component] = holder.get_tensor(key)
                        tensors[f"{name}.weight"] = DECODERS[parts](name, compressed)
            write_tensors(tensors, output / file.name, {"format": "pt"})
            written |= dict.fromkeys(tensors, file.name)
        if [file.name for file in files] != [SINGLE]:
            index = json.dumps({"metadata": {}, "weight_map": written}, indent=2)
            (output / INDEX).write_text(index, encoding="utf-8")
    for other in source.iterdir():
        if other.is_file() and not (names and (other.suffix == ".safetensors" or other.name == INDEX)):
            # plain weights are only read
            link_or_copy = os.symlink if other.suffix == ".safetensors" else shutil.copy
            link_or_copy(other.resolve(), output / other.name)
    if settings:
        kept = {name: value for name, value in settings.items() if name not in COMPRESSION_SETTINGS}
        (output / "config.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    return True


def bitmask_weight(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Weight [out, K] with exact zeros; ValueError if its tensors in the format sparse-24-bitmask do not fit."""
    values = tensors["compressed"]
    bitmask = tensors["bitmask"]
    sizes = tensors["shape"].flatten().tolist()
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes) or sizes[1] % 4:
        raise ValueError(f"checkpoint: expected rows of whole groups of 4 in {name}.shape, got {sizes}")
    rows, k = sizes
    if values.numel() != rows * k // 2 or values.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"checkpoint: expected {rows * k // 2} values of float32, bfloat16 or float16 in {name}.compressed, "
            f"got {values.numel()} of {values.dtype}"
        )
    try:
        return PackedNM(values.reshape(rows, k // 2).contiguous(), bitmask, "2:4").check().unpack()
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint: {name}.{error}") from error


# How a weight is decoded, by the names of its tensors
DECODERS: dict[tuple[str, ...], Callable[[str, Mapping[str, Tensor]], Tensor]] = {
    ("compressed", "bitmask", "shape"): bitmask_weight,
    marlin_24.COMPRESSED_TENSORS: marlin_24.marlin_24_weight,
    marlin_24.VLLM: marlin_24.marlin_24_weight,
}
