"""Snapshots of a run: tensors and state in a file that is seen as a whole or not at all, and that tells its damage.

The name of a file ends in the digest of its bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from .journal import write_whole

NAME = re.compile(r"snapshot-(\d{10})-([0-9a-f]{32})\.safetensors")


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def save_snapshot(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping, keep: int) -> Path:
    """Write the snapshot of a step and remove all but the newest ``keep`` and the first.

    Args:
        folder: exists.
        step: how many steps have been taken.
        tensors: by name.
        state: JSON can hold it.
        keep: at least 1.

    Raises:
        OSError: if it cannot be written; the others are then as they were.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = save(on_cpu, metadata={"step": str(step), "state": json.dumps(state)})
    path = folder / f"snapshot-{step:010}-{_digest(content)}.safetensors"
    write_whole(path, content)
    for old in sorted(_snapshots(folder))[1:-keep]:
        old.unlink()
    return path


def newest_snapshot(folder: Path, at_most: int | None = None) -> tuple[int, dict[str, Tensor], dict, list[Path]]:
    """(step, tensors on the CPU, state, damaged files that were passed over) of the newest sound snapshot.

    Args:
        folder: of ``save_snapshot``.
        at_most: of at most that many steps.

    Raises:
        ValueError: if there is none.
    """
    damaged = []
    for path in sorted(_snapshots(folder), reverse=True):
        step, digest = NAME.fullmatch(path.name).groups()
        if at_most is not None and int(step) > at_most:
            continue
        content = path.read_bytes()
        if _digest(content) != digest:
            damaged.append(path)
            continue
        # the digest vouches for the header too
        size = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + size])["__metadata__"]
        if metadata["step"] != str(int(step)):
            damaged.append(path)
            continue
        return int(step), load(content), json.loads(metadata["state"]), damaged
    told = f", {len(damaged)} are damaged" if damaged else ""
    raise ValueError(f"snapshot: expected a sound one in {str(folder)!r}, got none{told}")


def _snapshots(folder: Path) -> list[Path]:
    return [path for path in folder.glob("snapshot-*.safetensors") if NAME.fullmatch(path.name)]
