"""A checkpoint under the masks of a file, made from the base's files a tensor at a time: no model is ever in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .. import ops
from ..counter import MaskSource
from ..files import writing_whole
from ..safetensors_files import named_files, read_tensor, tensor_files
from .mask_file import MaskFile, base_layers, check_fingerprint

WEIGHT = ".weight"
# Of a checkpoint beside its weights; a README.md would be that of the base
COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")
# Of the header of a safetensors file: bytes of its length
LENGTH = 8


def can_be_copied(mask: MaskFile, folder: Path) -> bool:
    """Whether a folder holds the base weight of each masked layer as such, in the dtype that the mask is of.

    Else its model has to be loaded: weights may be stored transposed, fused or in another dtype.
    """
    where = tensor_files(named_files(folder))
    if any(name + WEIGHT not in where for name in mask.layers):
        return False
    floats = set()
    for name, file in where.items():
        with safe_open(file, framework="pt") as opened:
            stored = opened.get_slice(name)
            if stored.get_dtype().startswith(("F", "BF")):
                floats.add(stored.get_dtype())
            layer = mask.layers.get(name.removesuffix(WEIGHT))
            if layer is not None and name.endswith(WEIGHT) and tuple(stored.get_shape()) != layer.shape:
                return False
    return floats == {{torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[mask.dtype]}


def copy_masked(mask: MaskFile, folder: Path, output: Path) -> None:
    """Write the checkpoint in a folder to another one, with exact zeros where the masks drop a weight.

    Args:
        mask: for whose base ``can_be_copied``.
        folder: of the base.
        output: a folder that is there.

    Raises:
        ValueError: if the base has other weights than the masks were learned on. Nothing has been written then.
        OSError: if a file cannot be read or written.
    """
    files = named_files(folder)
    check_base(mask, files)
    for file in files:
        _copy_file(mask, file, output / file.name)
    for path in {path for pattern in COPIED for path in folder.glob(pattern)}:
        shutil.copyfile(path, output / path.name)


def check_base(mask: MaskFile, files: list[Path]) -> None:
    """Raise ValueError, which tells both fingerprints, unless files hold the base weights of the masks."""
    where = tensor_files(files)
    weights = ((name, read_tensor(where[name + WEIGHT], name + WEIGHT)) for name in mask.layers)
    check_fingerprint(mask, base_layers(weights, mask.dtype))


def _copy_file(mask: MaskFile, source: Path, target: Path) -> None:
    with open(source, "rb") as file, writing_whole(target) as written:
        start = file.read(LENGTH)
        header = file.read(int.from_bytes(start, "little"))
        # shapes and dtypes stay, and so does the header
        written.write(start + header)
        tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        # as they lie in the file, which has no gaps
        for name in sorted(tensors, key=lambda name: tensors[name]["data_offsets"]):
            begin, end = tensors[name]["data_offsets"]
            # not by a map of the file: its pages would count as memory of the process
            content = bytearray(file.read(end - begin))
            layer = name.removesuffix(WEIGHT)
            if layer in mask.layers and layer != name:
                weight = torch.frombuffer(content, dtype=mask.dtype).view(mask.layers[layer].shape)
                content = _bytes_of(_masked(mask, layer, weight))
            written.write(content)


def _masked(mask: MaskFile, layer: str, weight: Tensor) -> Tensor:
    codes = mask.codes(layer, weight)
    return ops.masked_weight(weight, MaskSource(codes, "codes", mask.pattern.n, mask.pattern.m))


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.flatten().view(torch.uint8).numpy())
