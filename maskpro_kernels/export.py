"""Checkpoints of learned masks: the logits of a model's masked layers, written so that no half file is ever seen."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .journal import sync
from .modules import masked_layers


def check_output(folder: str | Path) -> None:
    """Refuses an output folder that cannot be written or would mix with what is already there; leaves nothing behind.

    Raises:
        ValueError: if ``folder`` exists and is not empty, or it or a folder above it is a file or not writable.
    """
    folder = Path(folder)
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    # Told now: after hours of learning it would be too late.
    if not there.is_dir():
        raise ValueError(f"output: expected a folder, got {str(folder)!r}: {str(there)!r} is a file; give another name")
    try:
        # Permission bits alone do not tell: root, read-only and virtual file systems pass them.
        tempfile.TemporaryDirectory(dir=there).cleanup()
    except OSError as error:
        raise ValueError(f"output: expected a writable folder, got {str(folder)!r}: {error}") from error
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"output: expected a new or empty folder, got {str(folder)!r}, which is not empty; give another"
        )


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


def write_tensors(tensors: dict[str, torch.Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file; one of that name is replaced only once the new one is safe on disk.

    Raises:
        OSError: if the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with disk_errors(path):
            save_file(tensors, temporary, metadata=metadata)
        open_to_others(temporary)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    # The new name is itself lost in a crash unless the folder reaches the disk too.
    sync(path.parent)


def open_to_others(path: str | Path) -> None:
    """Give a file of safetensors, which its owner alone may read, the mode that other new files have."""
    umask = os.umask(0o077)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """What safetensors cannot write, such as to a full disk, is told as an OSError, which its own error is not."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


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
