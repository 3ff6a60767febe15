"""The logits of a model's masked layers in a file."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..files import write_tensors
from ..modules import masked_layers


def save_logits(model: torch.nn.Module, path: str | Path, metadata: dict[str, str]) -> None:
    """Writes the logits of all MaskedLinear modules of a model to a safetensors file.

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
    tensors = {name: layer.logits.detach().contiguous() for name, layer in masked_layers(model).items()}
    write_tensors(tensors, path, metadata)


def load_logits(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Reads what :func:`save_logits` wrote.

    Returns:
        (logits, metadata): module name -> tensor [out, K] in the dtype it was saved in, on the CPU; and the strings.

    Raises:
        ValueError: if the file is not a safetensors file.
        OSError: if it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"path: expected a safetensors file, got {str(path)!r}: {error}") from error
