"""The rows or columns of a layer that a tensor-parallel plan gives a rank, and what goes into and out of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..pattern import NMPattern
from .dtensors import is_distributed, local, offset_of_layout

CUT_BY = "a tensor-parallel plan"


class PlannedPart:
    """Rows or columns of a layer [out, K].

    Args:
        shape: of the layer.
        mesh: of the ranks that share it.
        placement: by which it is cut over them.

    Attributes:
        mesh: as given.
        cuts_columns: whether these are columns, of all rows; else they are rows.
        rows: (index of the first one, how many they are).
    """

    def __init__(self, shape: torch.Size, mesh: DeviceMesh, placement):
        self.mesh, self.cuts_columns, self._outputs = mesh, placement.dim == 1, shape[0]
        (rows, _), (first, _) = offset_of_layout(shape, mesh, [placement])
        self.rows = first, rows

    @property
    def is_first(self) -> bool:
        """Whether no rank has what comes before in the layer."""
        return self.mesh.get_local_rank() == 0

    @property
    def apart(self) -> int:
        """How far the ranks that share the layer are from each other."""
        ranks = self.mesh.mesh.tolist()
        return ranks[1] - ranks[0] if len(ranks) > 1 else 1

    def outputs_of(self, vector: Tensor) -> Tensor:
        """A view of the elements of a whole [out] that belong to these rows."""
        first, rows = self.rows
        return vector[first : first + rows]

    def bias_of(self, bias: Tensor | None) -> Tensor | None:
        """What this rank adds to its outputs: of columns, whose outputs are summed up, the first rank adds it alone."""
        return None if bias is None or (self.cuts_columns and not self.is_first) else local(bias)

    def through(self, input: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        """The output [..., out] of an input [..., K], both DTensors: one is cut by features, and the other one is not
        cut, or is parts of a sum.

        Args:
            product: gives the output of this part.

        Raises:
            ValueError: if the input is no DTensor of the layer's mesh.
        """
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        if not is_distributed(input) or input.device_mesh != self.mesh:
            got = f"one of {input.device_mesh}" if is_distributed(input) else "a plain tensor"
            raise ValueError(
                f"input: expected a DTensor of {self.mesh}, as the plan gives it that has cut the layer, got {got}"
            )
        features = Shard(input.dim() - 1)
        x = input.redistribute(placements=[features if self.cuts_columns else Replicate()])
        if hasattr(x._local_tensor, "wait"):
            # a collective may be under way, which the kernels do not wait for
            x._local_tensor = x._local_tensor.wait()
        y = product(x.to_local(grad_placements=None if self.cuts_columns else [Partial()]))
        shape = torch.Size((*y.shape[:-1], self._outputs))
        how = {"run_check": False, "shape": shape, "stride": torch.empty(shape, device="meta").stride()}
        return DTensor.from_local(y, self.mesh, [Partial() if self.cuts_columns else features], **how)


def check_part(
    argument: str, name: str, shape: torch.Size, mesh: DeviceMesh, placements: Sequence, pattern: NMPattern
) -> None:
    """Raise ValueError unless a layer of that shape is cut over the ranks of a mesh as a PlannedPart has it."""
    told = f"{argument}: expected a weight that {CUT_BY} has cut into rows or columns"
    if any(placement.is_partial() for placement in placements):
        raise ValueError(f"{told}, got {placements} in {name}: parts of a sum have no mask; redistribute it first")
    if len(placements) != 1 or not placements[0].is_shard():
        raise ValueError(f"{told}, over one dimension of ranks, got {placements} on {mesh} in {name}")
    parts = mesh.size()
    each = -(-shape[1] // parts)
    if placements[0].dim == 1 and each % pattern.m:
        raise ValueError(
            f"{told}, got columns in {name}: {shape[1]} over {parts} ranks are {each} each, which cuts groups of "
            f"{pattern.m}"
        )
    check_mesh(argument, name, mesh)


def check_mesh(argument: str, name: str, mesh: DeviceMesh) -> None:
    """Raise ValueError unless the ranks over which a plan has cut a layer are a line of a mesh of all ranks."""
    ranks, world = mesh.mesh.tolist(), torch.distributed.get_world_size()
    if not _tiles(ranks, world):
        raise ValueError(
            f"{argument}: expected a weight that {CUT_BY} has cut into rows or columns, over ranks of one and the same "
            f"distance, as in a mesh of all ranks, got {ranks} of {world} in {name}"
        )


def _tiles(ranks: list[int], world: int) -> bool:
    """Whether these ranks, and others like them, are the lines of a mesh of all ranks."""
    first, parts = ranks[0], len(ranks)
    apart = ranks[1] - first if parts > 1 else 1
    in_line = apart > 0 and ranks == [first + apart * place for place in range(parts)]
    return in_line and world % (parts * apart) == 0 and first // apart % parts == 0
