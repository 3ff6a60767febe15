"""A checkpoint into a model on the meta device that ranks share: each reads its own rows, and none holds the whole."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .files import named_files, weight_files
from .fsdp import is_distributed, resharded
from .sharded_files import kinds_of_parts, read_parts

# Names that one message tells
NAMED = 3
# Of which one may be stored and another loaded: no scale lies beside them
PLAIN = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


class _Held(NamedTuple):
    """A parameter or buffer, and all that hold it.

    Attributes:
        tensor: itself.
        places: (dict of a module that holds it, its name there).
        names: in the model; of a buffer that no checkpoint holds none.
    """

    tensor: Tensor
    places: list[tuple[dict, str]]
    names: list[str]


def load_checkpoint_shards(
    model: nn.Module, checkpoint: str | Path, *, device: torch.device | str | None = None
) -> None:
    """Load a safetensors checkpoint into a model on the meta device, whose parameters ``fully_shard`` has cut.

    Each rank reads its own rows out of the files, by ``torch.distributed.checkpoint``: nothing is sent, and no rank
    holds more of a parameter than its shard. ``convert`` comes behind it. What is not on meta keeps its memory and gets
    the values of the checkpoint. Parameters that are one, such as tied embeddings or those of a shared module, stay
    one; the checkpoint may hold them under any of their names. The dtypes are those of the model: float64, float32,
    bfloat16 and float16 are converted to each other, any other has to be that of the checkpoint.

    Transformers' own models have a loader that does the same and knows the older names of their weights, see
    docs/large-models.md.

    Args:
        model: its parameters and buffers are on meta, or in memory; DTensors or plain ones, of which each rank gets
            the whole.
        checkpoint: folder with ``model.safetensors``, or with an index and the files that it names; else one with other
            safetensors files, wholes or the parts that torch's ``HuggingFaceStorageWriter`` writes; or such a file.
        device: of what is on meta. Default: the device of the meshes, of a model without any the CPU.

    Warns:
        UserWarning: if the checkpoint holds tensors that the model has not.

    Raises:
        ValueError: if there are no such files, they are damaged, some of them are missing, two hold the same, or they
            hold no values, or values of another shape or kind of dtype, for what the model would have in a checkpoint,
            or for what is on meta. The model is then as it was.
        OSError: if a file cannot be read. What is on meta is then there still.
    """
    files = named_files(Path(checkpoint)) or weight_files(checkpoint)
    held = list(_held_by(model))
    stored = _checked(held, files, checkpoint)
    device = _device_of(held) if device is None else torch.device(device)
    new = {name: torch.empty_like(of.tensor, device=device) for name, of in stored.items() if of.tensor.is_meta}
    with torch.no_grad():
        old = {name: of.tensor.detach() for name, of in stored.items() if name not in new}
        read_parts(files, new | old)
    for name, tensor in new.items():
        of = stored[name]
        if isinstance(of.tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=of.tensor.requires_grad)
        for place, key in of.places:
            place[key] = tensor
    # FSDP2 looks for its parameters where the old ones were
    resharded(model)


def _held_by(model: nn.Module) -> Iterator[_Held]:
    """What the modules of a model hold: each tensor once."""
    found: dict[int, _Held] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for place in (module._parameters, module._buffers):
            for key, tensor in place.items():
                if tensor is not None:
                    of = found.setdefault(id(tensor), _Held(tensor, [], []))
                    of.places.append((place, key))
                    if key not in module._non_persistent_buffers_set:
                        of.names.append(f"{prefix}.{key}" if prefix else key)
    return iter(found.values())


def _checked(held: list[_Held], files: list[Path], checkpoint: str | Path) -> Mapping[str, _Held]:
    """What is to be read, by the name under which it is stored.

    Raises:
        ValueError: if something lacks a value, or has one of another shape or kind of dtype.
    """
    try:
        kinds = kinds_of_parts(files, "checkpoint")
    except SafetensorError as error:
        raise ValueError(f"checkpoint: expected whole safetensors files, got {str(checkpoint)!r}: {error}") from error
    stored, lacking = {}, []
    for of in held:
        name = next((name for name in of.names if name in kinds), None)
        if name is not None:
            stored[name] = of
        elif of.names or of.tensor.is_meta:
            lacking.append(of.names[0] if of.names else f"{of.places[0][1]}, a buffer that checkpoints leave out")
    if lacking:
        raise ValueError(
            f"checkpoint: expected values for all of the model that is on meta or stored, got none for "
            f"{_told(lacking)} in {str(checkpoint)!r}; make in memory what is computed, or load by transformers"
        )
    for name, of in stored.items():
        (shape, dtype), own = kinds[name], list(of.tensor.shape)
        if dtype != of.tensor.dtype and not {dtype, of.tensor.dtype} <= PLAIN:
            raise ValueError(
                f"checkpoint: expected {name} as {of.tensor.dtype}, got {dtype} in {str(checkpoint)!r}: what is "
                "quantized has to be dequantized first"
            )
        if shape != own:
            raise ValueError(f"checkpoint: expected {name} of shape {own}, got {shape} in {str(checkpoint)!r}")
    others = sorted(kinds.keys() - {name for of in held for name in of.names})
    if others:
        warnings.warn(f"{checkpoint}: it holds what the model has not, and is left out: {_told(others)}", stacklevel=3)
    return stored


def _told(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _device_of(held: list[_Held]) -> torch.device:
    meshes = [of.tensor.device_mesh for of in held if is_distributed(of.tensor)]
    kind = meshes[0].device_type if meshes else "cpu"
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.get_device_module(kind).current_device())
