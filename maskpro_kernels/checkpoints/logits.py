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

from ..files import digest, digest_of_named, write_tensors
from ..modules import MaskedLinear, check_not_sharded, masked_layers

# In the folder of a run. A folder of its own, since loaders of checkpoints read every safetensors file beside the model
LOGITS_FILE = "learned/logits.safetensors"
# Report of a run, with a digest of the logits
REPORT = "report.json"
# Prefixes of a layer's tensors: no model has such names, so a loader cannot take them for its weights
LOGITS = "logits/"
WEIGHTS = "weights/"
# Metadata of a file: the digest of its tensors and of its other metadata
DIGEST = "maskpro-digest"


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

    Weights that were refitted or trained are in the same file. Names of logits begin with "logits/", those of weights
    with "weights/".

    Args:
        model: has at least one MaskedLinear.
        path: of the file; an existing file is replaced only once the new one is on disk.
        metadata: strings to store with the tensors.

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
    tensors = {LOGITS + name: logits for name, logits in content.logits.items()}
    tensors |= {WEIGHTS + name: weight for name, weight in content.weights.items()}
    on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    metadata = dict(content.metadata)
    write_tensors(on_cpu, path, metadata | {DIGEST: digest_of_named(on_cpu, metadata)})


def load_logits(path: str | Path) -> Logits:
    """Read a file of ``save_logits``: logits, changed weights and metadata.

    ``prune.refit.put_weights`` writes the weights into the layers of a converted model.

    Raises:
        ValueError: if the file is no safetensors file, has other tensors, or is damaged.
        OSError: if it cannot be read.
    """
    return _read(path)[0]


def _read(path: str | Path) -> tuple[Logits, bool]:
    """(content of a file, whether the file has a digest of it, which earlier versions did not write)."""
    content = Logits({}, {}, {})
    stored = {}
    try:
        with safe_open(path, framework="pt") as file:
            content.metadata.update(file.metadata() or {})
            for stored_name in file.keys():
                kind, slash, name = stored_name.partition("/")
                tensors = {LOGITS: content.logits, WEIGHTS: content.weights}.get(kind + slash)
                if tensors is None:
                    raise ValueError(f"expected names that begin with {LOGITS} or {WEIGHTS}, got {stored_name!r}")
                stored[stored_name] = file.get_tensor(stored_name)
                tensors[name] = stored[stored_name]
        expected = content.metadata.pop(DIGEST, None)
        if expected not in (None, digest_of_named(stored, content.metadata)):
            raise ValueError("expected content of the digest that it has, got other content; restore it from a copy")
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"path: expected a file of logits, got {str(path)!r}: {error}") from error
    return content, expected is not None


def logits_of_run(folder: Path) -> Logits:
    """``load_logits`` of the folder of a run.

    Raises:
        ValueError: as for ``load_logits``; if the run has ended with other logits, as its report says; or neither the
            file nor a report has a digest of the logits.
    """
    learned, has_digest = _read(folder / LOGITS_FILE)
    report = folder / REPORT
    if not report.is_file():
        if not has_digest:
            raise ValueError(f"expected {REPORT} in {str(folder)!r}, which has the digest of the logits, got none")
        return learned
    logits_digest = digest(learned.logits[name] for name in sorted(learned.logits))
    if json.loads(report.read_bytes()).get("logits") != logits_digest:
        raise ValueError(f"expected the logits that {REPORT} has the digest of, got others; restore {LOGITS_FILE}")
    return learned


def changed_weights(layers: Mapping[str, MaskedLinear]) -> dict[str, torch.Tensor]:
    """Weights of layers that differ from those of the dense model, by name."""
    return {name: layer.weight.detach() for name, layer in layers.items() if layer.weight_changed}
