"""Masks of a tiny model, stored as others store theirs, and checkpoints with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import maskpro_kernels as mk
from helpers.tiny_llama import tiny_tokenizer
from maskpro_kernels import files

# Written by Sparse24BitMaskTensor of compressed-tensors 0.14.0.1: two weights, with -0.0 and with groups of fewer than
# two values; their former weights under names that begin with "dense."
COMPRESSED = Path(__file__).parent / "data" / "sparse24-bitmask.safetensors"
# Written by Marlin24Compressor of compressed-tensors 0.12.2: three weights, of 4 bits with scales for groups of 128
# columns, two and three, and of 8 bits with a scale a row; their integers and scales under names that begin so
MARLIN_24 = Path(__file__).parent / "data" / "marlin-24.safetensors"
LAYER = "model.layers.0.mlp.down_proj"


def layers(model) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def random_masks(model, pattern="2:4") -> dict[str, torch.Tensor]:
    """bool masks of all layers but the head."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: mk.expand_mask(mk.top_n_mask(torch.rand(layer.weight.shape, generator=generator), pattern), pattern)
        for name, layer in layers(model).items()
        if name != "lm_head"
    }


def masked(model, masks):
    for name, mask in masks.items():
        layer = model.get_submodule(name)
        layer.weight.data = torch.where(mask, layer.weight, 0).detach()
    return model


def store(masks, path, how):
    if how == "maskllm":
        np.savez_compressed(path, **{f"{name}.weight.mask": np.packbits(mask.numpy()) for name, mask in masks.items()})
    elif how == "dict":
        torch.save({f"{name}.mask": mask for name, mask in masks.items()}, path)
    else:
        path.mkdir()
        for name, mask in masks.items():
            torch.save(mask, path / f"{name}.pt")
    return path


def compressed_folder(folder, model):
    """A checkpoint in compressed-tensors' format, in two files."""
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    tensors = [{}, {}]
    for i, (name, tensor) in enumerate(state.items()):
        if name.endswith("proj.weight"):
            packed = mk.pack_24(tensor)
            name = name.removesuffix(".weight")
            tensors[i % 2][f"{name}.compressed"] = packed.values
            tensors[(i + 1) % 2][f"{name}.bitmask"] = packed.bitmask
            tensors[i % 2][f"{name}.shape"] = torch.tensor(tensor.shape).view(-1, 1)
        else:
            tensors[i % 2][name] = tensor.clone()
    model.config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    for i, part in enumerate(tensors):
        save_file(part, folder / f"model-{i}.safetensors", {"format": "pt"})
    where = {name: f"model-{i}.safetensors" for i, part in enumerate(tensors) for name in part}
    (folder / files.INDEX).write_text(json.dumps({"weight_map": where}))
    return folder


def marlin_24_tensors(integers: torch.Tensor, scales: torch.Tensor, bits: int) -> tuple[torch.Tensor, ...]:
    """(values, metadata, scales) in the format Marlin 2:4 of integers [out, K] with zeros and scales [out, groups].

    Place by place, by the fragments of ``mma.m16n8k16`` and the order of metadata of its sparse form.
    """
    rows, k = integers.shape
    kept = integers.ne(0).view(rows, -1, 4)
    # two places of each group, the first ones where fewer are not zero
    places = kept.byte().argsort(dim=-1, descending=True, stable=True)[..., :2].sort(-1).values
    values = integers.view(rows, -1, 4).gather(-1, places).view(rows, k // 2) + 2 ** (bits - 1)
    row, column = np.indices((rows, k // 2))
    lane = row % 64 // 8 * 4 + column % 8 // 2
    in_eight = row % 8 // 4 * 4 + column % 16 // 8 * 2 + column % 2
    order = {4: [0, 4, 1, 5, 2, 6, 3, 7], 8: [0, 2, 1, 3, 4, 6, 5, 7]}[bits]
    place = lane * 32 + row % 4 * 8 + np.array(order)[in_eight]
    place += column // 16 * 16 * rows + row // 64 * 1024
    words = np.zeros((k // 32, rows * bits // 2), np.uint32)
    shifted = values.numpy().astype(np.uint32) << (bits * (place % (32 // bits))).astype(np.uint32)
    np.bitwise_or.at(words.reshape(-1), place // (32 // bits), shifted)
    of_groups = (places[..., 0] | places[..., 1] << 2).view(rows, -1, 4).numpy()
    of_words = (of_groups << np.array([0, 4, 8, 12])).sum(-1).astype(np.uint16)
    row, column = np.indices((rows, k // 16))
    other_row = row // 64 * 64 + row % 2 * 2 + row % 8 // 4 + row % 4 // 2 * 32 + row % 64 // 8 * 4
    # blocks of two rows and two columns are transposed
    swapped = column % 2 - other_row % 2
    metadata = np.zeros(rows * k // 16, np.uint16)
    metadata[(column - swapped) // 2 * rows * 2 + (other_row + swapped) * 2 + (column - swapped) % 2] = of_words
    scales = scales.t()
    # as compressed-tensors, which compares a group with half of the columns
    if len(scales) > 1 and k // 2 > 128:
        scales = scales.reshape(-1, 8)[:, [0, 4, 1, 5, 2, 6, 3, 7]].reshape(scales.shape)
    return (
        torch.from_numpy(words.view(np.int32)),
        torch.from_numpy(metadata.view(np.int16)).view(k // 32, 2 * rows),
        scales.contiguous(),
    )


def marlin_24_folder(folder, model, bits=4, group=128, names=("weight_packed", "meta", "scale_packed")):
    """A quantized checkpoint of a model with zeros in the format Marlin 2:4; the model gets its weights."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    for name, tensor in list(tensors.items()):
        if name.endswith("proj.weight"):
            rows, k = tensor.shape
            blocks = tensor.float().view(rows, -1, group or k)
            scales = (blocks.abs().amax(-1) / (2 ** (bits - 1) - 0.5)).half()
            limit = 2 ** (bits - 1)
            integers = (blocks / scales[..., None].float()).round().clamp(-limit, limit - 1)
            weight = (integers * scales[..., None].float()).half().view(rows, k)
            del tensors[name]
            stored = marlin_24_tensors(integers.long().view(rows, k), scales, bits)
            tensors |= {f"{name.removesuffix('.weight')}.{part}": x for part, x in zip(names, stored, strict=True)}
            model.get_parameter(name).data.copy_(weight)
    model.config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group" if group else "channel"}
    scheme = {"targets": ["Linear"], "weights": weights | {"group_size": group}, "input_activations": None}
    settings = {"quant_method": "compressed-tensors", "format": "marlin-24", "config_groups": {"group_0": scheme}}
    if names[0] == "B_24":
        settings = {"quant_method": "gptq", "checkpoint_format": "marlin_24", "bits": bits, "group_size": group or -1}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder


def rewrite(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """A damage to a folder: the tensors of its only file are changed."""

    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})

    return damage


def reconfigure(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """A damage to a folder: its quantization_config is changed."""

    def damage(folder: Path) -> None:
        file = folder / "config.json"
        config = json.loads(file.read_text())
        change(config["quantization_config"])
        file.write_text(json.dumps(config))

    return damage


def forge(path: Path, **changed: str) -> None:
    """Give a mask file other metadata, and the checksum of these."""
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() | changed
    del metadata["checksum"]
    save_file(tensors, path, metadata | {"checksum": files.digest_of_named(tensors, metadata)})
