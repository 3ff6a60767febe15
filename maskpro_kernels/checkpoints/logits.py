"""Files of a model's logits, with weights that were refitted or trained.

Masks learned over changed weights are useless without these weights. So one file has both, and nobody can copy or read
one without the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from ..files import digest, write_tensors
from ..fsdp import check_not_sharded
from ..modules import MaskedLinear, masked_layers

# Its name in the folder of a run, and that of the report, which has a digest of the logits
LOGITS_FILE, REPORT = "logits.safetensors", "report.json"
# Key of the metadata that lists the layers with changed weights in the file
CHANGED = "changed_weights"
# A layer's logits have the name of the layer; its weight has this suffix as well
WEIGHT = ".weight"


class Logits(NamedTuple):
    """Content of a file of logits.

    Attributes:
        logits: [out, K] by name of the layer, on the CPU.
        weights: [out, K] by name of the layer, on the CPU; only weights that differ from the dense model's.
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
        path: of the file; an existing file is replaced only once the new one is on disk.
        metadata: strings to store with the tensors; the name "changed_weights" is reserved.

    Raises:
        ValueError: if ``model`` has no MaskedLinear, or one that fully_shard has split.
        OSError: if the file cannot be written.
    """
    layers = masked_layers(model)
    check_not_sharded(layers, "no rank has all logits; snapshots of a run have them")
    logits = {name: layer.logits.detach() for name, layer in layers.items()}
    write_logits(Logits(logits, changed_weights(layers), dict(metadata)), path)


def write_logits(content: Logits, path: str | Path) -> None:
    """Write a file for ``load_logits``; OSError if it cannot be written."""
    metadata, tensors = dict(content.metadata), dict(content.logits)
    if content.weights:
        metadata[CHANGED] = json.dumps(sorted(content.weights))
        tensors |= {name + WEIGHT: weight for name, weight in content.weights.items()}
    write_tensors({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)


def load_logits(path: str | Path) -> Logits:
    """Read a file of ``save_logits``: logits, changed weights and metadata.

    ``prune.refit.put_weights`` writes the weights into the layers of a converted model.

    Raises:
        ValueError: if the file is no safetensors file, or lacks a tensor that its metadata name.
        OSError: if it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
        weights = {name: tensors.pop(name + WEIGHT) for name in json.loads(metadata.pop(CHANGED, "[]"))}
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"path: expected a safetensors file, got {str(path)!r}: {error!r}") from error
    return Logits(tensors, weights, metadata)


def logits_of_run(folder: Path) -> Logits:
    """``load_logits`` of the folder of a run; ValueError if it has ended with others, as its report says."""
    learned, report = load_logits(folder / LOGITS_FILE), folder / REPORT
    own = digest(learned.logits[name] for name in sorted(learned.logits))
    if report.is_file() and json.loads(report.read_bytes()).get("logits") != own:
        raise ValueError(f"expected the logits that {REPORT} has the digest of, got others; restore {LOGITS_FILE}")
    return learned


def changed_weights(layers: Mapping[str, MaskedLinear]) -> dict[str, torch.Tensor]:
    """Weights of layers that differ from those of the dense model, by name."""
    return {name: layer.weight.detach() for name, layer in layers.items() if layer.weight_changed}
