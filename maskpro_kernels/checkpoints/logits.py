"""The logits of a model's masked layers in a file, with their weights where these have changed.

Masks that were learned over changed weights mean nothing without them: both are in one file, so that one is never kept
or copied without the other. Whoever reads the logits gets the weights as well, or is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from ..files import write_tensors
from ..modules import MaskedLinear, masked_layers
from ..training.batches import digest

# In the metadata of logits: the digest of the changed weights with them
CHANGED = "changed_weights"
# What a tensor of weights is called, behind the name of its layer, which its logits go by
WEIGHT = ".weight"


class Learned(NamedTuple):
    """What ``save_logits`` wrote.

    Attributes:
        logits: [out, K] by name of the layer, on the CPU.
        weights: [out, K] by name of the layer, on the CPU, where they are not those of the dense model; else none.
        metadata: the strings.
    """

    logits: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    metadata: dict[str, str]


def save_logits(model: torch.nn.Module, path: str | Path, metadata: Mapping[str, str]) -> None:
    """Writes the logits of all MaskedLinear modules of a model to a safetensors file.

    Weights that were refitted or trained are in the same file, under the name of the layer and ".weight". The metadata
    tell their digest.

    Args:
        model: has at least one MaskedLinear.
        path: of the file; an existing file is replaced only once the new one is safe on disk.
        metadata: strings stored beside the tensors.

    Raises:
        TypeError: if ``metadata`` holds something else than strings.
        ValueError: if ``model`` has no MaskedLinear.
        OSError: if the file cannot be written.
    """
    wrong = next((item for item in metadata.items() if not all(isinstance(part, str) for part in item)), None)
    if wrong is not None:
        raise TypeError(f"metadata: expected strings as names and values, got {wrong!r}")
    layers = masked_layers(model)
    logits = {name: layer.logits.detach() for name, layer in layers.items()}
    write_learned(Learned(logits, changed_weights(layers), dict(metadata)), path)


def write_learned(learned: Learned, path: str | Path) -> None:
    """Write what ``load_learned`` reads; OSError if the file cannot be written."""
    metadata, tensors = dict(learned.metadata), dict(learned.logits)
    if learned.weights:
        metadata[CHANGED] = _digest(learned.weights)
        tensors |= {name + WEIGHT: weight for name, weight in learned.weights.items()}
    write_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def load_logits(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Reads what ``save_logits`` wrote of layers with the weights of the dense model.

    Returns:
        (logits, metadata): module name -> tensor [out, K] in the dtype it was saved in, on the CPU; and the strings.

    Raises:
        ValueError: if the file is not a safetensors file, or its logits belong to changed weights.
        OSError: if it cannot be read.
    """
    logits, metadata = _read(path)
    if CHANGED in metadata:
        raise ValueError(
            f"path: expected logits over the weights of the dense model, got {str(path)!r}, whose masks are nothing "
            "without the changed weights in it; load_learned reads both"
        )
    return logits, metadata


def load_learned(path: str | Path) -> Learned:
    """Reads what ``save_logits`` wrote, with the weights where these have changed.

    ``pruning.refit.put_weights`` gives them to the layers of a converted model.

    Raises:
        ValueError: if the file is not a safetensors file, or the weights in it are damaged or those of other masks.
        OSError: if the file cannot be read.
    """
    tensors, metadata = _read(path)
    if CHANGED not in metadata:
        return Learned(tensors, {}, metadata)
    of_layers = {name: name + WEIGHT for name in tensors if name + WEIGHT in tensors}
    weights = {name: tensors.pop(stored) for name, stored in of_layers.items()}
    if _digest(weights) != metadata[CHANGED]:
        raise ValueError(
            f"path: expected the changed weights that the masks belong to, got damaged ones or others in {str(path)!r}"
        )
    return Learned(tensors, weights, metadata)


def changed_weights(layers: Mapping[str, MaskedLinear]) -> dict[str, torch.Tensor]:
    """The weights of layers that are no longer those of the dense model, by name."""
    return {name: layer.weight.detach() for name, layer in layers.items() if layer.weight_changed}


def save_weights(weights: Mapping[str, torch.Tensor], path: Path) -> str:
    """Write weights into a safetensors file, which is then there as a whole or not at all; gives their digest."""
    found = _digest(weights)
    write_tensors({name: weight.cpu().contiguous() for name, weight in weights.items()}, path, {"digest": found})
    return found


def load_weights(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    """(weights, their digest) as ``save_weights`` wrote them; ValueError where the file is not there or damaged."""
    if not path.is_file():
        raise ValueError(f"path: expected the changed weights that the masks belong to in {str(path)!r}, got no file")
    weights, metadata = _read(path)
    found = _digest(weights)
    if metadata.get("digest") != found:
        raise ValueError(
            f"path: expected the changed weights that the masks belong to, got damaged ones in {str(path)!r}"
        )
    return weights, found


def _digest(weights: Mapping[str, torch.Tensor]) -> str:
    """Of names and weights: two layers of one shape are not to change places."""
    whole = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        whole.update(f"{name} {digest([weights[name]])}\n".encode())
    return whole.hexdigest()


def _read(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"path: expected a safetensors file, got {str(path)!r}: {error}") from error
