"""Tensors that ranks share: the part of a DTensor on each rank, in memory and in files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .ranks import Ranks

# Part of a tensor: its begin in each dimension, and its sizes
Part = tuple[torch.Size, torch.Size]


def is_distributed(tensor: object) -> bool:
    """Return whether a tensor is a DTensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """Return the tensor itself, or this rank's part of a DTensor."""
    return tensor.to_local() if is_distributed(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor itself, or the whole of a DTensor; all ranks of its mesh must call this."""
    return tensor.detach().full_tensor() if is_distributed(tensor) else tensor


def rows_dim(tensor: Tensor) -> int:
    """Return the dimension of a DTensor's mesh that splits its rows; others copy them."""
    return next(dim for dim, placement in enumerate(tensor.placements) if placement.is_shard())


def first_row(tensor: Tensor) -> int:
    """Return the first row of this rank's part of a DTensor that equal parts of rows split."""
    return tensor.device_mesh.get_local_rank(rows_dim(tensor)) * len(tensor.to_local())


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the part of a whole [out, ...] for this rank's rows of a DTensor ``like`` [out, K]; else all."""
    if not is_distributed(like):
        return tensor
    return tensor.narrow(0, first_row(like), len(like.to_local()))


def like_shards(part: Tensor, like: Tensor) -> Tensor:
    """Return a DTensor [out, columns] from this rank's rows [rows, columns], in the layout of another one, [out, K]."""
    from torch.distributed.tensor import DTensor

    columns = part.shape[1]
    shape = torch.Size((len(like), columns))
    stride = (columns, 1)
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=shape, stride=stride, run_check=False)


def sum_over_shards(part: Tensor, like: Tensor) -> Tensor:
    """Return the sum of what each rank computes from its part of a DTensor ``like``, on all ranks; differentiable."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Partial() if placement.is_shard() else Replicate() for placement in like.placements]
    return DTensor.from_local(part, like.device_mesh, placements, run_check=False).full_tensor()


def is_finite(tensor: Tensor) -> bool:
    """Return whether all elements of a tensor, or of the whole of a DTensor, are finite."""
    if not is_distributed(tensor):
        return bool(torch.isfinite(tensor).all())
    return not sum_over_shards((~torch.isfinite(tensor.detach().to_local())).sum(), tensor)


def planned_parts(ranks: Ranks, folder: Path, tensors: Mapping[str, Tensor]) -> Callable[[], Path | None]:
    """Return a function that writes this rank's part of tensors to a file, and returns its path, None without a part.

    All ranks must call this, with access to the same folder. Tensors are DTensors, or equal on all ranks; parts that
    several ranks have are written by one. The function raises OSError if this rank cannot write, and waits for no other
    rank. torch.distributed.checkpoint plans the files, which are safetensors, no pickles. ``ranks`` exchanges the
    plans, since torch's own collectives have a timeout for a rank that writes for long.
    """
    from torch.distributed.checkpoint import DefaultSavePlanner, HuggingFaceStorageWriter

    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)

    def own_plan():
        first = ranks.is_main_process
        planner.set_up_planner(dict(tensors), writer.storage_meta(), first)
        writer.set_up_storage_writer(first)
        local_plan = planner.create_local_plan()
        # without empty tensors, such as those of a rank without rows
        local_plan.items[:] = [item for item in local_plan.items if item.tensor_data.chunk.sizes.numel()]
        return writer.prepare_local_plan(local_plan)

    plans, _ = planner.create_global_plan(ranks.all_gather_object(ranks.run_on_all(own_plan)))
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[ranks.rank])

    def write() -> Path | None:
        written = writer.write_data(plan, planner).wait()
        return folder / written[0].storage_data.relative_path if written else None

    return write


def kinds_of_parts(files: Sequence[Path]) -> dict[str, tuple[list[int], torch.dtype]]:
    """(shape, dtype) of tensors by name, from files with parts of them or with whole ones.

    A missing end of a tensor cannot be noticed: the shape is then smaller. ValueError unless the files have each
    element of a tensor once, in a format that torch reads; OSError or SafetensorError if a file cannot be read.
    """
    try:
        stored = _reader_of(files).read_metadata().state_dict_metadata
    except (KeyError, TypeError, ValueError) as error:
        # an unknown dtype, or wrong offsets of parts
        raise ValueError(
            f"snapshot: expected safetensors that torch reads, got {error!r} in {str(files[0].parent)!r}"
        ) from error
    for name, of in stored.items():
        if not _fill([(part.offsets, part.sizes) for part in of.chunks], of.size):
            raise ValueError(
                f"snapshot: expected each element of {name} once, got parts that lack some or overlap in "
                f"{str(files[0].parent)!r}"
            )
    return {name: (list(of.size), of.properties.dtype) for name, of in stored.items()}


def _fill(parts: Iterable[Part], size: torch.Size) -> bool:
    """Return whether parts cover each element of a tensor once: their sizes add up, and no two of them overlap."""
    parts = sorted(parts)
    if sum(math.prod(sizes) for _, sizes in parts) != size.numel():
        return False
    near: list[Part] = []
    for begin, sizes in parts:
        # compare rows only with the last part, so that time does not grow with the square of the number of ranks
        near = [other for other in near if other[0][0] + other[1][0] > begin[0]]
        if any(_overlap((begin, sizes), other) for other in near):
            return False
        near.append((begin, sizes))
    return True


def _overlap(first: Part, second: Part) -> bool:
    return all(max(a, b) < min(a + size_a, b + size_b) for a, size_a, b, size_b in zip(*first, *second, strict=True))


@torch.no_grad()
def read_parts(files: Iterable[Path], tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors in place from files, a DTensor only with this rank's part; other ranks need not call this.

    Files are safetensors with whole tensors, or with the parts of ``planned_parts``; OSError or SafetensorError if one
    cannot be read.
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
    """torch's reader of safetensors files, for these alone."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint.filesystem import FileSystem

    class Listed(FileSystem):
        def ls(self, path: str) -> Sequence[str]:
            return [str(file) for file in files]

    reader = HuggingFaceStorageReader(".")
    reader.fs = Listed()
    return reader
