"""The logits of a model's masked layers in a file, with their weights where these have changed.

Masks that were learned over changed weights mean nothing without them: both are in one file, so that one is never kept
or copied without the other. Whoever reads the logits gets the weights as well, or is refused.

A digest of all that is in the file, names and metadata included, is in its metadata. Whatever reads the file checks it,
but within ``stored_digests.without_digests``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from ..digests import digest_of_named
from ..files import write_tensors
from ..fsdp import check_not_sharded
from ..modules import MaskedLinear, masked_layers
from ..stored_digests import digests_are_checked

# What a run calls it
LOGITS_FILE = "logits.safetensors"
# In the metadata: the digest of all else in the file; and of logits the layers whose changed weights are with them
DIGEST, CHANGED = "digest", "changed_weights"
# What a tensor of weights is called, behind the name of its layer, which its logits go by
WEIGHT = ".weight"
ON_PURPOSE = (
    "where it was made on purpose, read it by load_learned within maskpro_kernels.stored_digests.without_digests(), "
    "and write it by write_learned"
)


class Learned(NamedTuple):
    """What ``save_logits`` wrote.

    Attributes:
        logits: [out, K] by name of the layer, on the CPU.
        weights: [out, K] by name of the layer, on the CPU, where they are not those of the dense model; else none.
        metadata: the strings.
        digest: of the file that this was read from; else empty.
    """

    logits: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    metadata: dict[str, str]
    digest: str = ""


def save_logits(model: torch.nn.Module, path: str | Path, metadata: Mapping[str, str]) -> str:
    """Writes the logits of all MaskedLinear modules of a model to a safetensors file.

    Weights that were refitted or trained are in the same file, under the name of the layer and ".weight". Beside the
    metadata stands a digest of names, shapes, dtypes, bytes and metadata, see ``digests``, by which damage is found.

    Args:
        model: has at least one MaskedLinear.
        path: of the file; an existing file is replaced only once the new one is safe on disk.
        metadata: strings stored beside the tensors, under other names than "digest" and "changed_weights".

    Returns:
        The digest.

    Raises:
        TypeError: if ``metadata`` holds something else than strings.
        ValueError: if ``model`` has no MaskedLinear, or one that fully_shard has cut; or ``metadata`` has one of those
            names.
        OSError: if the file cannot be written.
    """
    wrong = next((item for item in metadata.items() if not all(isinstance(part, str) for part in item)), None)
    if wrong is not None:
        raise TypeError(f"metadata: expected strings as names and values, got {wrong!r}")
    own = sorted(metadata.keys() & {DIGEST, CHANGED})
    if own:
        raise ValueError(f"metadata: expected other names than {DIGEST!r} and {CHANGED!r}, got {', '.join(own)}")
    layers = masked_layers(model)
    check_not_sharded(layers, "no rank has all logits, but snapshots of a run do")
    logits = {name: layer.logits.detach() for name, layer in layers.items()}
    return write_learned(Learned(logits, changed_weights(layers), dict(metadata)), path)


def write_learned(learned: Learned, path: str | Path) -> str:
    """Write what ``load_learned`` reads, and give its digest; OSError if the file cannot be written."""
    metadata, tensors = dict(learned.metadata), dict(learned.logits)
    if learned.weights:
        metadata[CHANGED] = json.dumps(sorted(learned.weights))
        tensors |= {name + WEIGHT: weight for name, weight in learned.weights.items()}
    return _write(tensors, path, metadata)


def load_logits(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Reads what ``save_logits`` wrote of layers with the weights of the dense model.

    Returns:
        (logits, metadata): module name -> tensor [out, K] in the dtype it was saved in, on the CPU; and the strings.

    Raises:
        ValueError: if the file is not a safetensors file, was changed or damaged, or its logits belong to changed
            weights.
        OSError: if it cannot be read.
    """
    logits, metadata, _ = _read(path)
    if CHANGED in metadata:
        raise ValueError(
            f"path: expected logits over the weights of the dense model, got {str(path)!r}, whose masks are nothing "
            "without the changed weights in it; load_learned reads both"
        )
    return logits, metadata


def load_learned(path: str | Path) -> Learned:
    """Reads what ``save_logits`` wrote, with the weights where these have changed.

    ``prune.refit.put_weights`` gives them to the layers of a converted model.

    Raises:
        ValueError: if the file is not a safetensors file, or was changed or damaged.
        OSError: if it cannot be read.
    """
    tensors, metadata, digest = _read(path)
    weights = {name: tensors.pop(name + WEIGHT) for name in json.loads(metadata.get(CHANGED, "[]"))}
    return Learned(tensors, weights, metadata, digest)


def changed_weights(layers: Mapping[str, MaskedLinear]) -> dict[str, torch.Tensor]:
    """The weights of layers that are no longer those of the dense model, by name."""
    return {name: layer.weight.detach() for name, layer in layers.items() if layer.weight_changed}


def save_weights(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write weights into a safetensors file, which is then there as a whole or not at all, with their digest."""
    _write(weights, path, {})


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Weights as ``save_weights`` wrote them; ValueError where the file is not there, changed or damaged."""
    if not path.is_file():
        raise ValueError(f"path: expected the changed weights that the masks belong to in {str(path)!r}, got no file")
    weights, _, _ = _read(path)
    return weights


def _write(tensors: Mapping[str, torch.Tensor], path: str | Path, metadata: Mapping[str, str]) -> str:
    found = digest_of_named(tensors, metadata)
    on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_tensors(on_cpu, path, {**metadata, DIGEST: found})
    return found


def _read(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str], str]:
    """(tensors, metadata, digest) of a file; ValueError unless they are as they were written."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"path: expected a safetensors file, got {str(path)!r}: {error}") from error
    stored, found = metadata.pop(DIGEST, None), digest_of_named(tensors, metadata)
    if not digests_are_checked():
        return tensors, metadata, found
    if stored is None:
        raise ValueError(
            f"path: expected a file with a {DIGEST} of what is in it, got none in {str(path)!r}, which another program "
            f"or an earlier version wrote; {ON_PURPOSE}"
        )
    if stored != found:
        raise ValueError(
            f"path: expected what was written, got {str(path)!r}, which was damaged or changed since; {ON_PURPOSE}"
        )
    return tensors, metadata, found
