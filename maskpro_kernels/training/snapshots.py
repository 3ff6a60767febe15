"""Snapshots of a run: tensors and state in a file that is seen as a whole or not at all, and that tells its damage.

The name of a file ends in the digest of its bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from ..digests import digest_of_bytes
from ..files import write_whole

# Besides the first: where the newest is damaged, the one before counts
KEPT = 2
# How often a snapshot is in memory while it is written, beside its tensors: safetensors copies the bytes of the file
HELD = 2
NAME = re.compile(r"snapshot-(\d{10})-([0-9a-f]{32})\.safetensors")


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
    for old in [other for other in snapshots_in(folder) if step_of(other) <= step][1:-KEPT]:
        old.unlink()
    return path


def newest_snapshot(
    folder: Path, at_most: int | None = None, run: Mapping | None = None
) -> tuple[int, dict[str, Tensor], dict, list[Path]]:
    """(step, tensors on the CPU, state, files that were passed over) of the newest sound snapshot.

    Args:
        folder: of ``save_snapshot``.
        at_most: of at most that many steps.
        run: of a state whose "run" is this.

    Raises:
        ValueError: if there is none.
    """
    passed = []
    for path in reversed(snapshots_in(folder)):
        if at_most is not None and step_of(path) > at_most:
            continue
        content = _sound(path)
        if content is not None:
            # the digest vouches for the header too
            size = int.from_bytes(content[:8], "little")
            metadata = json.loads(content[8 : 8 + size])["__metadata__"]
            state = json.loads(metadata["state"])
            if metadata["step"] == str(step_of(path)) and (run is None or state.get("run") == run):
                return step_of(path), load(content), state, passed
        passed.append(path)
    told = f", {len(passed)} are damaged or of another run" if passed else ""
    raise ValueError(f"snapshot: expected a sound one in {str(folder)!r}, got none{told}")


def of_other_runs(folder: Path, run_id: str) -> list[Path]:
    """The sound snapshots in a folder that are of other runs than that with this id."""
    others = []
    for path in snapshots_in(folder):
        with suppress(OSError, ValueError, KeyError, TypeError):
            with open(path, "rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            # its tensors need not be read where it is of this run
            if json.loads(header["__metadata__"]["state"])["run"]["id"] != run_id and _sound(path) is not None:
                others.append(path)
    return others


def _sound(path: Path) -> bytes | None:
    """The bytes of a snapshot, or None where they are not those that were written."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return content if digest_of_bytes(content).hex() == NAME.fullmatch(path.name)[2] else None


def step_of(path: Path) -> int:
    return int(NAME.fullmatch(path.name)[1])


def snapshots_in(folder: Path) -> list[Path]:
    """The files of snapshots, by step."""
    return sorted(path for path in folder.glob("snapshot-*.safetensors") if NAME.fullmatch(path.name))
