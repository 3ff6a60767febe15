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
