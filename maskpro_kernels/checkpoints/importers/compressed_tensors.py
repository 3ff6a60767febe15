"""Checkpoints of compressed-tensors, in its formats sparse-24-bitmask and dense."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ...checked_json import load_json
from ...files import write_tensors
from ...packed import PackedNM
from ...safetensors_files import INDEX, SINGLE, check_parts, read_tensor, tensor_files, weight_files

# The parts that a weight is stored in
COMPRESSED = ("compressed", "bitmask", "shape")
FORMATS = ("sparse-24-bitmask", "dense")
# Settings that would make a loader look for tensors that are no longer there
COMPRESSION_SETTINGS = ("quantization_config", "compression_config", "sparsity_config")


def write_plain(source: str | Path, output: str | Path) -> bool:
    """Write a checkpoint of compressed-tensors as a plain one with exact zeros, if it is one; gives whether it is.

    Files in the format sparse-24-bitmask are decompressed one at a time, those in the format dense are linked to. The
    config loses its settings of compression; what else the folder holds is copied.

    Raises:
        ValueError: if the checkpoint is in another format, such as a quantized one, a file is damaged, or parts of a
            weight are missing or do not agree.
        OSError: if a file cannot be written.
    """
    source, output = Path(source), Path(output)
    files = weight_files(source)
    where = tensor_files(files)
    names = {name.removesuffix(".compressed") for name in where if name.endswith(".compressed")}
    config = source / "config.json"
    settings = _settings(config) if config.exists() else {}
    compressed = any(_of_compressed_tensors(settings.get(name)) for name in COMPRESSION_SETTINGS)
    if not names and not compressed:
        return False
    _check_format(settings)
    for name in names:
        check_parts(where, name, COMPRESSED)
    output.mkdir(parents=True, exist_ok=True)
    if names:
        _decompress(files, where, names, output)
    for other in source.iterdir():
        if other.is_file() and not (names and (other.suffix == ".safetensors" or other.name == INDEX)):
            # plain weights are read, and not written
            link_or_copy = os.symlink if other.suffix == ".safetensors" else shutil.copy
            link_or_copy(other.resolve(), output / other.name)
    if settings:
        kept = {name: value for name, value in settings.items() if name not in COMPRESSION_SETTINGS}
        (output / "config.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    return True


def _of_compressed_tensors(settings: object) -> bool:
    """Whether a part of a config is that of compressed-tensors, and of no other quantizer."""
    return isinstance(settings, dict) and settings.get("quant_method", "compressed-tensors") == "compressed-tensors"


def _check_format(settings: dict) -> None:
    """Raise ValueError unless weights are stored as such, or in the format sparse-24-bitmask."""
    for name in COMPRESSION_SETTINGS:
        part = settings.get(name)
        if not _of_compressed_tensors(part):
            continue
        sparsity = part.get("sparsity_config")
        formats = {part.get("format"), sparsity.get("format") if isinstance(sparsity, dict) else None} - {None}
        others = sorted(map(str, formats - set(FORMATS)))
        if others or part.get("config_groups"):
            told = f"the format {others[0]}" if others else "quantized weights"
            raise ValueError(
                f"checkpoint: expected weights in the format {' or '.join(FORMATS)} of compressed-tensors, got {told}; "
                "decompress it with compressed-tensors first"
            )


def _decompress(files: Sequence[Path], where: Mapping[str, Path], names: Collection[str], output: Path) -> None:
    """Write the files of a checkpoint with whole weights in the place of their parts."""
    written = {}
    for file in files:
        tensors = {}
        with safe_open(file, framework="pt") as opened:
            for stored in opened.keys():
                name, _, part = stored.rpartition(".")
                if name not in names or part not in COMPRESSED:
                    tensors[stored] = opened.get_tensor(stored)
                elif part == "compressed":
                    parts = [read_tensor(where[f"{name}.{part}"], f"{name}.{part}") for part in COMPRESSED]
                    tensors[f"{name}.weight"] = decompressed_weight(name, *parts)
        write_tensors(tensors, output / file.name, {"format": "pt"})
        written |= dict.fromkeys(tensors, file.name)
    if [file.name for file in files] != [SINGLE]:
        (output / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": written}, indent=2), encoding="utf-8")


def _settings(config: Path) -> dict:
    try:
        settings = load_json(config.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError(f"a {type(settings).__name__}")
        return settings
    except ValueError as error:
        raise ValueError(
            f"checkpoint: expected settings in {config.name}, got {error}; copy or download it again"
        ) from error


def decompressed_weight(name: str, values: Tensor, bitmask: Tensor, shape: Tensor) -> Tensor:
    """The weight [out, K] whose parts these are, with exact zeros.

    Raises:
        ValueError: if the parts do not agree.
    """
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
