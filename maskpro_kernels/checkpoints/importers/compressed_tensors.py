"""Checkpoints in compressed-tensors' sparse-24-bitmask format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ...files import write_tensors
from ...packed import PackedNM
from ..safetensors_files import INDEX, SINGLE, check_parts, read_tensor, tensor_files, weight_files

# The parts that a weight is stored in
COMPRESSED = ("compressed", "bitmask", "shape")
# Settings that would make a loader look for tensors that are no longer there
COMPRESSION_SETTINGS = ("quantization_config", "compression_config", "sparsity_config")


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
    where = tensor_files(files)
    names = {name.removesuffix(".compressed") for name in where if name.endswith(".compressed")}
    for name in names:
        check_parts(where, name, COMPRESSED)
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
                    parts = [read_tensor(where[f"{name}.{part}"], f"{name}.{part}") for part in COMPRESSED]
                    tensors[f"{name}.weight"] = decompressed_weight(name, *parts)
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
