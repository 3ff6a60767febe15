"""Snapshots of a run: tensors and state that are seen as a whole or not at all, and that tell their damage.

A snapshot is a file, whose name ends in the digest of its bytes. Where ranks share the rows of layers it is a folder
with a file of each rank, and a manifest of their digests and the state; the name ends in the digest of the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..digests import SIZE, digest_of_bytes
from ..files import discard, sync, write_whole
from ..fsdp import is_distributed
from ..sharded_files import kinds_of_parts, read_parts

# Besides the first: where the newest is damaged, the one before counts
KEPT = 2
# How often a snapshot is in memory while it is written, beside its tensors: safetensors copies the bytes of the file
HELD = 2
NAME = re.compile(r"snapshot-(\d{10})-([0-9a-f]{32})(\.safetensors)?")
MANIFEST = "snapshot.json"


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a snapshot by name. Each is read, as a whole and onto the CPU, when it is asked for.

    Args:
        path: of the snapshot.

    Attributes:
        path: as above.
        kinds: (shape, dtype) by name.
    """

    def __init__(self, path: Path):
        self.path = path
        if path.is_dir():
            self.kinds = kinds_of_parts(tensor_files(path))
        else:
            with safe_open(path, framework="pt") as file:
                # one after the other: all of them are as much as the model's logits
                tensors = ((name, file.get_tensor(name)) for name in file.keys())
                self.kinds = {name: (list(tensor.shape), tensor.dtype) for name, tensor in tensors}

    def __getitem__(self, name: str) -> Tensor:
        shape, dtype = self.kinds[name]
        tensor = torch.empty(shape, dtype=dtype, device="cpu")
        self.read_into({name: tensor})
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.kinds)

    def __len__(self) -> int:
        return len(self.kinds)

    @torch.no_grad()
    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors by their names; of a DTensor only the part of this rank is read."""
        if self.path.is_dir() or any(map(is_distributed, tensors.values())):
            read_parts(tensor_files(self.path), tensors)
            return
        with safe_open(self.path, framework="pt") as file:
            for name, tensor in tensors.items():
                tensor.copy_(file.get_tensor(name))


def save_snapshot(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping) -> Path:
    """Write the snapshot of a step; of those up to that step all but the first and the two newest are removed.

    Args:
        folder: exists.
        step: how many steps have been taken.
        tensors: by name.
        state: JSON can hold it.

    Raises:
        OSError: if it cannot be written; the others are then as they were.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = save(on_cpu, metadata={"step": str(step), "state": json.dumps(state)})
    path = folder / f"snapshot-{step:010}-{digest_of_bytes(content).hex()}.safetensors"
    write_whole(path, content)
    _thin_out(folder, step)
    return path


def folder_aside(folder: Path) -> Path:
    """A new folder in ``folder`` for the files of a snapshot that is not one yet."""
    # its name tells a run that is resumed that it is unfinished
    path = folder / f"{MANIFEST}.{secrets.token_hex(8)}.tmp"
    path.mkdir()
    return path


def publish_snapshot(aside: Path, step: int, digests: Mapping[str, str], state: Mapping) -> Path:
    """``save_snapshot`` of files that ranks have written into a ``folder_aside``, which gets the snapshot's name.

    Args:
        aside: the folder.
        step, state: as for ``save_snapshot``.
        digests: those of the files by their names.
    """
    manifest = json.dumps({"step": step, "state": state, "files": digests}).encode()
    path = aside.with_name(f"snapshot-{step:010}-{digest_of_bytes(manifest).hex()}")
    write_whole(aside / MANIFEST, manifest)
    if _is_sound(path):
        # bit for bit the same, as at the end of a run whose last step has left one
        discard(aside)
    else:
        if path.exists():
            discard(path)
        os.rename(aside, path)
    sync(path.parent)
    for other in snapshots_in(path.parent):
        # the order of what a file tells of itself is left to chance, and so is the digest
        if step_of(other) == step and other != path:
            discard(other)
    _thin_out(path.parent, step)
    return path


def _thin_out(folder: Path, step: int) -> None:
    for old in [other for other in snapshots_in(folder) if step_of(other) <= step][1:-KEPT]:
        discard(old)


def newest_snapshot(
    folder: Path, at_most: int | None = None, run: Mapping | None = None
) -> tuple[int, StoredTensors, dict, list[Path]]:
    """(step, tensors, state, snapshots that were passed over) of the newest sound snapshot.

    Args:
        folder: of ``save_snapshot`` or ``publish_snapshot``.
        at_most: of at most that many steps.
        run: of a state whose "run" is this.

    Raises:
        ValueError: if there is none.
    """
    passed = []
    for path in reversed(snapshots_in(folder)):
        if at_most is not None and step_of(path) > at_most:
            continue
        if _is_sound(path):
            # the digest vouches for these too
            step, state = _told(path)
            if step == step_of(path) and (run is None or state.get("run") == run):
                return step, StoredTensors(path), state, passed
        passed.append(path)
    told = f", {len(passed)} are damaged or of another run" if passed else ""
    raise ValueError(f"snapshot: expected a sound one in {str(folder)!r}, got none{told}")


def of_other_runs(folder: Path, run_id: str) -> list[Path]:
    """The sound snapshots in a folder that are of other runs than that with this id."""
    others = []
    for path in snapshots_in(folder):
        with suppress(OSError, ValueError, KeyError, TypeError):
            # its tensors need not be read where it is of this run
            if _told(path)[1]["run"]["id"] != run_id and _is_sound(path):
                others.append(path)
    return others


def _told(path: Path) -> tuple[int, dict]:
    """(step, state) of a snapshot, by its own words."""
    if path.is_dir():
        manifest = json.loads((path / MANIFEST).read_bytes())
        return manifest["step"], manifest["state"]
    with open(path, "rb") as file:
        metadata = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]
    return int(metadata["step"]), json.loads(metadata["state"])


def _is_sound(path: Path) -> bool:
    """Whether the bytes of a snapshot are those that were written."""
    named = NAME.fullmatch(path.name)[2]
    try:
        if not path.is_dir():
            return digest_of_file(path) == named
        manifest = (path / MANIFEST).read_bytes()
        if digest_of_bytes(manifest).hex() != named:
            return False
        digests = json.loads(manifest)["files"]
        if {file.name for file in tensor_files(path)} != digests.keys():
            return False
        with ThreadPoolExecutor() as threads:
            return list(threads.map(digest_of_file, (path / name for name in digests))) == list(digests.values())
    except OSError:
        return False


def files_of(snapshot: Path) -> list[Path]:
    """All files of a snapshot."""
    return [*tensor_files(snapshot), *([snapshot / MANIFEST] if snapshot.is_dir() else [])]


def tensor_files(snapshot: Path) -> list[Path]:
    """Those that hold its tensors."""
    return sorted(snapshot.glob("*.safetensors")) if snapshot.is_dir() else [snapshot]


def digest_of_file(path: Path) -> str:
    """``digest_of_bytes`` of a file, of which no more than a piece is in memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=SIZE)).hexdigest()


def step_of(path: Path) -> int:
    return int(NAME.fullmatch(path.name)[1])


def snapshots_in(folder: Path) -> list[Path]:
    """The files and folders of snapshots, by step."""
    return sorted(path for path in folder.glob("snapshot-*") if NAME.fullmatch(path.name))
