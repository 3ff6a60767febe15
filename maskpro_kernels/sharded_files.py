"""Files of tensors whose rows ranks share: each rank writes and reads its own part of them, and none has a whole.

The engine is ``torch.distributed.checkpoint``: its planners tell which part of a tensor lies where, its storage writes
and reads safetensors. Its own collectives are not used. Ranks tell each other their plans by ``Ranks``, which names one
that is lost, and does not give up one that writes for long. A file is no pickle, unlike torch's own format.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .ranks import Ranks

# Of a tensor: where it begins in each dimension, and its sizes
Part = tuple[torch.Size, torch.Size]


def planned_parts(ranks: Ranks, folder: Path, tensors: Mapping[str, Tensor]) -> Callable[[], Path | None]:
    """What writes this rank's part of tensors into a file of its own, which is on disk then; None where it has none.

    All ranks come to the plan. Of what several of them have, one writes it. What it gives raises OSError where this
    rank cannot write; it waits for no other rank.

    Args:
        folder: exists, and all ranks see it.
        tensors: by name, the same on all ranks: DTensors, and tensors that are alike on all of them.
    """
    from torch.distributed.checkpoint import DefaultSavePlanner, HuggingFaceStorageWriter

    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)

    def own_plan():
        first = ranks.rank == 0
        planner.set_up_planner(dict(tensors), writer.storage_meta(), first)
        writer.set_up_storage_writer(first)
        own = planner.create_local_plan()
        # without what has no elements, as of a rank that has no rows
        own.items[:] = [item for item in own.items if item.tensor_data.chunk.sizes.numel()]
        return writer.prepare_local_plan(own)

    plans, _ = planner.create_global_plan(ranks.gather_objects(ranks.all_of(own_plan)))
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[ranks.rank])

    def write() -> Path | None:
        written = writer.write_data(plan, planner).wait()
        return folder / written[0].storage_data.relative_path if written else None

    return write


def kinds_of_parts(files: Sequence[Path], argument: str = "snapshot") -> dict[str, tuple[list[int], torch.dtype]]:
    """(shape, dtype) of the tensors of which files hold parts or wholes, by name.

    Files may lack the end of a tensor, which they do not tell: it is then of a smaller shape.

    Args:
        files: as for ``read_parts``; in one folder.
        argument: what messages call them.

    Raises:
        ValueError: if they do not hold each element of a tensor once, or hold what torch does not read.
        OSError, SafetensorError: if a file cannot be read.
    """
    try:
        found = _reader_of(files).read_metadata().state_dict_metadata
    except (KeyError, TypeError, ValueError) as error:
        # a dtype that it does not know, or places of parts that are none
        raise ValueError(
            f"{argument}: expected safetensors that torch reads, got {error!r} in {str(files[0].parent)!r}"
        ) from error
    for name, of in found.items():
        if not _fill([(part.offsets, part.sizes) for part in of.chunks], of.size):
            raise ValueError(
                f"{argument}: expected each element of {name} once, got parts that lack some or overlap in "
                f"{str(files[0].parent)!r}"
            )
    return {name: (list(of.size), of.properties.dtype) for name, of in found.items()}


def _fill(parts: Iterable[Part], size: torch.Size) -> bool:
    """Whether parts hold each element of a tensor once: as many as it has, and no two of them the same."""
    parts = sorted(parts)
    if sum(math.prod(sizes) for _, sizes in parts) != size.numel():
        return False
    near: list[Part] = []
    for begin, sizes in parts:
        # of rows only the last part is compared, so that many ranks do not take the square of their number
        near = [other for other in near if other[0][0] + other[1][0] > begin[0]]
        if any(_overlap((begin, sizes), other) for other in near):
            return False
        near.append((begin, sizes))
    return True


def _overlap(one: Part, other: Part) -> bool:
    return all(max(a, b) < min(a + size_a, b + size_b) for a, size_a, b, size_b in zip(*one, *other, strict=True))


@torch.no_grad()
def read_parts(files: Iterable[Path], tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors in place with what files hold of them, of a DTensor this rank's part; other ranks need not come.

    Args:
        files: safetensors with wholes, or with the parts of ``planned_parts``.
        tensors: by their names there, of the same shapes.

    Raises:
        OSError, SafetensorError: if a file cannot be read.
    """
    from torch.distributed.checkpoint import DefaultLoadPlanner

    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    reader = _reader_of(files)
    metadata = reader.read_metadata()
    planner.set_up_planner(dict(tensors), metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plans = planner.create_global_plan([reader.prepare_local_plan(planner.create_local_plan())])
    (plan,) = reader.prepare_global_plan(plans)
    reader.read_data(planner.finish_plan(plan), planner).wait()


def _reader_of(files: Iterable[Path]):
    """torch's reader of the safetensors files in a folder, for these alone."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint.filesystem import FileSystem

    class Listed(FileSystem):
        def ls(self, path: str) -> Sequence[str]:
            return [str(file) for file in files]

    reader = HuggingFaceStorageReader(".")
    reader.fs = Listed()
    return reader
