"""A checkpoint under the masks of a file, made from the base's files a tensor at a time: no model is ever in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import ops
from ..counter import MaskSource
from ..files import writing_whole
from ..safetensors_files import INDEX, SINGLE, named_files, read_tensor, tensor_files
from .mask_file import MaskFile, base_layers

WEIGHT = ".weight"
# Of the header of a safetensors file: bytes of its length
LENGTH = 8
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def can_be_copied(mask: MaskFile, folder: Path) -> bool:
    """Whether files in a folder hold the base weight of each masked layer as such, all in the dtype of the mask.

    Else its model has to be loaded, or it is another base: weights may be stored transposed, fused, in another dtype,
    or be damaged.
    """
    try:
        where = tensor_files(named_files(folder))
        if any(name + WEIGHT not in where for name in mask.layers):
            return False
        if _float_dtypes(where) != {NAMES[mask.dtype]}:
            return False
        weights = ((name, read_tensor(where[name + WEIGHT], name + WEIGHT)) for name in mask.layers)
        return base_layers(weights, mask.dtype) == mask.layers
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _float_dtypes(where: Mapping[str, Path]) -> set[str]:
    found = set()
    for file in set(where.values()):
        with safe_open(file, framework="pt") as opened:
            found |= {opened.get_slice(name).get_dtype() for name in opened.keys()}
    return {dtype for dtype in found if dtype.startswith(("F", "BF"))}


def copy_masked(mask: MaskFile, folder: Path, output: Path) -> None:
    """Write the weights of a base to another folder, in the same files, with exact zeros where masks drop a weight.

    Args:
        mask: for whose base ``can_be_copied``.
        folder: of the base.
        output: a folder that is there.

    Raises:
        OSError: if a file cannot be read or written.
    """
    files = named_files(folder)
    for file in files:
        _copy_file(mask, file, output / file.name)
    if folder / SINGLE not in files:
        shutil.copyfile(folder / INDEX, output / INDEX)


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
