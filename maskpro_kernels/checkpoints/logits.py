"""The logits of a model's masked layers in a file, with their weights where these have changed.

Masks that were learned over changed weights mean nothing without them: both are in one file, so that one is never kept
or copied without the other, and whoever reads the logits gets the weights as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from ..files import write_tensors
from ..fsdp import check_not_sharded
from ..modules import MaskedLinear, masked_layers

# The name that a run gives it
LOGITS_FILE = "logits.safetensors"
# In the metadata: the layers whose changed weights are with their logits
CHANGED = "changed_weights"
# Behind the name of its layer, by which its logits go, the name of a weight
WEIGHT = ".weight"


class Logits(NamedTuple):
    """The content of a file of logits.

    Attributes:
        logits: [out, K] by name of the layer, on the CPU.
        weights: [out, K] by name of the layer, on the CPU, where they are not those of the dense model; else none.
        metadata: strings by name.
    """

    logits: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    metadata: dict[str, str]


def save_logits(model: torch.nn.Module, path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write the logits of all MaskedLinear modules of a model to a safetensors file.

    Weights that were refitted or trained are in the same file, under the name of the layer and ".weight".

    Args:
        model: has at least one MaskedLinear.
        path: of the file; an existing file is replaced only once the new one is safe on disk.
        metadata: strings stored beside the tensors, under other names than "changed_weights".

    Raises:
        ValueError: if ``model`` has no MaskedLinear, or one that fully_shard has cut.
        OSError: if the file cannot be written.
    """
    layers = masked_layers(model)
    check_not_sharded(layers, "no rank has all logits, but snapshots of a run do")
    logits = {name: layer.logits.detach() for name, layer in layers.items()}
    write_logits(Logits(logits, changed_weights(layers), dict(metadata)), path)


def write_logits(content: Logits, path: str | Path) -> None:
    """Write what ``load_logits`` reads; OSError if the file cannot be written."""
    metadata, tensors = dict(content.metadata), dict(content.logits)
    if content.weights:
        metadata[CHANGED] = json.dumps(sorted(content.weights))
        tensors |= {name + WEIGHT: weight for name, weight in content.weights.items()}
    write_tensors({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)


def load_logits(path: str | Path) -> Logits:
    """Read what ``save_logits`` wrote: logits, weights where they have changed, and metadata.

    ``prune.refit.put_weights`` gives the weights to the layers of a converted model.

    Raises:
        ValueError: if the file is not a safetensors file.
        OSError: if it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"path: expected a safetensors file, got {str(path)!r}: {error}") from error
    weights = {name: tensors.pop(name + WEIGHT) for name in json.loads(metadata.pop(CHANGED, "[]"))}
    return Logits(tensors, weights, metadata)


def changed_weights(layers: Mapping[str, MaskedLinear]) -> dict[str, torch.Tensor]:
    """The weights of layers that are no longer those of the dense model, by name."""
    return {name: layer.weight.detach() for name, layer in layers.items() if layer.weight_changed}
