"""What runs of a sweep share: samples of the dense model and calibrated initial masks, each made once.

A file is known by all that its content follows from. So a run finds there what it would make itself, or nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..digests import digest, digest_of_bytes, digest_of_named
from ..files import make_folder, write_tensors
from .progress import tell
from .versions import machine, versions

# In the folder of a sweep
SHARED = "shared"


class Found(NamedTuple):
    """What a run has made.

    Attributes:
        tensors: by name; of a file that was read, on the CPU.
        seconds: that it took.
        warned: what was warned of meanwhile.
    """

    tensors: dict[str, Tensor]
    seconds: float = 0.0
    warned: Sequence[str] = ()


def digest_of_parameters(model: torch.nn.Module) -> str:
    """Of all parameters of a model, in the order of their names."""
    return digest(parameter for _, parameter in sorted(model.named_parameters()))


class SharedWork:
    """What runs on one dense model share, in a folder that no other process is at.

    Args:
        folder: of the files; made with the first one.
        model: dense, on the devices where it computes.

    Attributes:
        parameters: the digest of the model's parameters.
    """

    def __init__(self, folder: Path, model: torch.nn.Module):
        self.folder, self.parameters = folder, digest_of_parameters(model)
        self._model = _digest(_computes(model) | {"values": self.parameters})

    def read(self, kind: str, of: Mapping[str, object]) -> Found | None:
        """What a run has made, if any; a damaged file is told, and counts as none.

        Args:
            kind: of what it is.
            of: all that it follows from besides the model, as JSON can hold it.
        """
        path, told = self._place(kind, of)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                metadata = dict(file.metadata() or {})
            stored = metadata.pop("digest")
            if metadata["of"] != told or stored != digest_of_named(tensors, metadata):
                raise ValueError("changed since it was written")
            return Found(tensors, float(metadata["seconds"]), json.loads(metadata["warned"]))
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            tell(f"{path} is damaged, and what it held is made anew: {error!r}")
            return None

    def write(self, kind: str, of: Mapping[str, object], made: Found) -> None:
        """Keep what this run has made, in place of a damaged file. A disk that refuses is told, and the run goes on."""
        path, told = self._place(kind, of)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in made.tensors.items()}
        metadata = {"of": told, "seconds": str(made.seconds), "warned": json.dumps(list(made.warned))}
        try:
            make_folder(self.folder)
            write_tensors(tensors, path, {**metadata, "digest": digest_of_named(tensors, metadata)})
        except OSError as error:
            tell(f"not kept for later runs, which make it anew: {error}")

    def _place(self, kind: str, of: Mapping[str, object]) -> tuple[Path, str]:
        """(path of a file, what it is known by)."""
        known_by = {"kind": kind, "model": self._model, **of}
        told = json.dumps(known_by, sort_keys=True)
        return self.folder / f"{kind}-{_digest(known_by)}.safetensors", told


def _computes(model: torch.nn.Module) -> dict[str, object]:
    """All that a model's logits follow from beside its inputs and the values of its parameters."""
    config = model.config.to_dict()
    # where the weights are is not what they are
    config.pop("_name_or_path", None)
    # what decides the last bit of a sum
    devices = {device: _computes_by(device) for device in {parameter.device for parameter in model.parameters()}}
    return {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "config": json.dumps(config, sort_keys=True, default=str),
        "attention": model.config._attn_implementation,
        "parameters": [(name, devices[parameter.device]) for name, parameter in sorted(model.named_parameters())],
        "buffers": digest_of_named(dict(model.named_buffers())),
        "matmul": torch.get_float32_matmul_precision(),
        "versions": versions(),
    }


def _computes_by(device: torch.device) -> list[object]:
    """What a device is, whichever of several alike."""
    found = machine(device)
    told = [found[name] for name in ("device_name", "processor", "threads")]
    return [device.type, torch.backends.cpu.get_cpu_capability(), *told]


def _digest(of: Mapping[str, object]) -> str:
    return digest_of_bytes(json.dumps(of, sort_keys=True).encode()).hex()
