"""Snapshots of a run: ``snapshot-STEP-DIGEST.safetensors`` has the tensors and the state after a step.

If layers are cut over ranks, a snapshot is a folder with a file of each rank and a manifest of their digests. The first
snapshot and those of the two newest steps are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..files import SIZE, digest_of_bytes, discard, sync, write_whole
from ..shards import is_distributed, kinds_of_parts, read_parts

SNAPSHOT = re.compile(r"snapshot-(\d{10})-([0-9a-f]{32})(\.safetensors)?")
MANIFEST = "snapshot.json"
# Snapshots to keep besides the first: if the newest is damaged, the one before is used
KEPT = 2


class StoredTensors(Mapping[str, Tensor]):
    """Tensors of a snapshot by name, read at access, and their ``kinds`` (shape, dtype)."""

    def __init__(self, path: Path):
        self.path = path
        if path.is_dir():
            self.kinds = kinds_of_parts(tensor_files(path))
        else:
            with safe_open(path, framework="pt") as file:
                # one after the other: together they are as large as the model's logits
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
        """Fill tensors by name; for a DTensor read only the rows of this rank."""
        if self.path.is_dir() or any(map(is_distributed, tensors.values())):
            read_parts(tensor_files(self.path), tensors)
            return
        with safe_open(self.path, framework="pt") as file:
            for name, tensor in tensors.items():
                tensor.copy_(file.get_tensor(name))


def save_snapshot(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping) -> Path:
    """Write the snapshot after a step; of those up to it keep the first and those of the two newest steps."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = save(on_cpu, metadata={"step": str(step), "state": json.dumps(state)})
    path = folder / f"snapshot-{step:010}-{digest_of_bytes(content).hex()}.safetensors"
    write_whole(path, content)
    _remove_old_snapshots(path)
    return path


def folder_aside(folder: Path) -> Path:
    """Make a folder for the files of all ranks, which ``publish_snapshot`` turns into a snapshot."""
    # the name marks it as unfinished for a resumed run
    path = folder / f"{MANIFEST}.{secrets.token_hex(8)}.tmp"
    path.mkdir()
    return path


def publish_snapshot(aside: Path, step: int, digests: Mapping[str, str], state: Mapping) -> Path:
    """Make a snapshot of the folder ``aside``, where ranks have written files with these digests by name."""
    manifest = json.dumps({"step": step, "state": state, "files": digests}).encode()
    path = aside.with_name(f"snapshot-{step:010}-{digest_of_bytes(manifest).hex()}")
    write_whole(aside / MANIFEST, manifest)
    if read_state(path) is not None:
        # the same bits, as at the end of a run whose last step wrote a snapshot
        discard(aside)
    else:
        if path.exists():
            discard(path)
        os.rename(aside, path)
    sync(path.parent)
    _remove_old_snapshots(path)
    return path


def _remove_old_snapshots(newest: Path) -> None:
    older = [path for path in snapshots_in(newest.parent) if step_of(path) < step_of(newest)]
    # the order of entries in a file is random, and so is its digest
    same = [path for path in snapshots_in(newest.parent) if step_of(path) == step_of(newest) and path != newest]
    for old in (*older[1 : 1 - KEPT], *same):
        discard(old)


def newest_snapshot(
    folder: Path, at_most: int | None = None, run: Mapping | None = None
) -> tuple[int, StoredTensors, dict, list[Path]]:
    """(step, tensors, state, unusable newer snapshots) of the newest intact snapshot; ValueError if there is none.

    If given, it has at most ``at_most`` steps, and a state whose "run" is ``run``.
    """
    unusable = []
    for path in reversed(snapshots_in(folder)):
        if at_most is not None and step_of(path) > at_most:
            continue
        step, state = read_state(path) or (None, {})
        if step == step_of(path) and (run is None or state.get("run") == run):
            return step, StoredTensors(path), state, unusable
        unusable.append(path)
    reason = f", {len(unusable)} are damaged or of another run" if unusable else ""
    raise ValueError(f"snapshot: expected an intact one in {str(folder)!r}, got none{reason}")


def read_state(path: Path) -> tuple[int, dict] | None:
    """(step, state) of a snapshot; None if it is damaged."""
    digest_in_name = SNAPSHOT.fullmatch(path.name)[2]
    try:
        if not path.is_dir():
            if digest_of_file(path) != digest_in_name:
                return None
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
            return int(metadata["step"]), json.loads(metadata["state"])
        manifest = (path / MANIFEST).read_bytes()
        if digest_of_bytes(manifest).hex() != digest_in_name:
            return None
        content = json.loads(manifest)
        files = {file.name: file for file in tensor_files(path)}
        with ThreadPoolExecutor() as threads:
            digests = dict(zip(files, threads.map(digest_of_file, files.values()), strict=True))
        return (content["step"], content["state"]) if digests == content["files"] else None
    except OSError:
        return None


def tensor_files(snapshot: Path) -> list[Path]:
    return sorted(snapshot.glob("*.safetensors")) if snapshot.is_dir() else [snapshot]


def digest_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, _empty_digest).hexdigest()


def _empty_digest() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=SIZE)


def step_of(snapshot: Path) -> int:
    return int(SNAPSHOT.fullmatch(snapshot.name)[1])


def snapshots_in(folder: Path) -> list[Path]:
    """Files and folders of snapshots, by step."""
    return sorted(path for path in folder.glob("snapshot-*") if SNAPSHOT.fullmatch(path.name))
