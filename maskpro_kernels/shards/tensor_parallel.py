"""Masked layers whose rows or columns a tensor-parallel plan has shared out over ranks.

Nothing of a layer is gathered. Each rank multiplies with what it has, under the masks of its own groups, which have the
bits of the whole layer. The plan of ``parallelize_module`` or transformers gives the layer a DTensor, and knows from
the one that comes out what ranks have to tell each other.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..pattern import NMPattern
from .dtensors import LayerShard, check_logits, is_distributed, local
from .rows import Params, attach_rows, check_row_shard, resharded


def check_shard(argument: str, name: str, layer: nn.Module, pattern: NMPattern, params: Params) -> None:
    """Raise ValueError unless a layer's weight is whole, or the shards are such as a LayerShard takes.

    Args:
        params: of ``resharded``.
    """
    if id(layer.weight) in params:
        check_row_shard(argument, name, layer.weight, pattern, params)
    elif is_distributed(layer.weight):
        _check_tensor_shard(argument, name, layer, pattern)


def _check_tensor_shard(argument: str, name: str, layer: nn.Module, pattern: NMPattern) -> None:
    weight, mesh, placements = layer.weight, layer.weight.device_mesh, layer.weight.placements
    told = f"{argument}: expected a weight that a tensor-parallel plan has cut into rows or columns"
    if any(placement.is_partial() for placement in placements):
        raise ValueError(f"{told}, got {placements} in {name}: parts of a sum have no mask; redistribute it first")
    if len(placements) != 1 or not placements[0].is_shard():
        raise ValueError(f"{told}, over one dimension of ranks, got {placements} on {mesh} in {name}")
    parts, cut = mesh.size(), placements[0].dim
    each = -(-weight.shape[1] // parts)
    if cut == 1 and each % pattern.m:
        raise ValueError(
            f"{told}, got columns in {name}: {weight.shape[1]} over {parts} ranks are {each} each, which cuts groups "
            f"of {pattern.m}"
        )
    if layer.bias is not None and cut == 0 and getattr(layer.bias, "placements", None) != placements:
        got = layer.bias.placements if is_distributed(layer.bias) else "a plain tensor"
        raise ValueError(f"{told}, and its bias alike, got {got} for the bias of {name}")
    if not _tiles(mesh.mesh.tolist(), torch.distributed.get_world_size()):
        raise ValueError(
            f"{told}, over ranks of one and the same distance, as in a mesh of all ranks, got "
            f"{mesh.mesh.tolist()} of {torch.distributed.get_world_size()} in {name}"
        )


def _tiles(ranks: list[int], world: int) -> bool:
    """Whether these ranks, and others like them, are the lines of a mesh of all ranks."""
    first, parts = ranks[0], len(ranks)
    apart = ranks[1] - first if parts > 1 else 1
    in_line = apart > 0 and ranks == [first + apart * place for place in range(parts)]
    return in_line and world % (parts * apart) == 0 and first // apart % parts == 0


def attach(layers: Mapping[str, nn.Module], model: nn.Module) -> None:
    """Tell the layers, and FSDP2, what this rank has of layers that have been shared out; others stay as they are.

    Args:
        layers: MaskedLinear layers by name.
        model: that holds them.

    Raises:
        ValueError: if one is sharded in a way that has no code. Nothing has changed then.
    """
    alone = {name: layer for name, layer in layers.items() if layer.shard is None}
    params = resharded(model) if alone else {}
    new = {name: layer for name, layer in alone.items() if is_distributed(layer.weight) or is_distributed(layer.logits)}
    for name, layer in new.items():
        check_logits(name, layer)
        check_shard("model", name, layer, layer.pattern, params)
    attach_rows([layer for layer in new.values() if id(layer.weight) in params], params)
    for layer in new.values():
        if layer.shard is None:
            layer.shard = TensorShard(layer)


class TensorShard(LayerShard):
    """The rows or the columns of a MaskedLinear that this rank holds.

    Args:
        layer: a MaskedLinear, whose weight and logits are DTensors of one layout.
    """

    cut_by = "a tensor-parallel plan"

    @property
    def weight(self) -> Tensor:
        """[rows, columns], that of this rank."""
        return self._layer.weight._local_tensor

    @property
    def bias(self) -> Tensor | None:
        """What this rank adds to its outputs: of columns, whose outputs are summed up, the first rank adds it alone."""
        bias = self._layer.bias
        return None if bias is None or (self.cuts_columns and not self.is_first) else local(bias)

    @property
    def is_first(self) -> bool:
        """Whether no rank has what comes before in the layer."""
        return self.mesh.get_local_rank() == 0

    @property
    def cuts_columns(self) -> bool:
        """Whether it has columns, of all rows; else it has rows."""
        return self.placements[0].dim == 1

    @property
    def layout(self) -> list:
        return [self.mesh.size(), self.apart, str(self.placements), *self.shape]

    @property
    def apart(self) -> int:
        """How far the ranks that share the layer are from each other."""
        ranks = self.mesh.mesh.tolist()
        return ranks[1] - ranks[0] if len(ranks) > 1 else 1

    def mesh_with_copies(self) -> DeviceMesh:
        """Of all ranks, which all make it: [copies of the layer, its parts]."""
        parts, apart = self.mesh.size(), self.apart
        ranks = torch.arange(torch.distributed.get_world_size()).view(-1, parts, apart).movedim(1, -1)
        return DeviceMesh(self.mesh.device_type, ranks.reshape(-1, parts))

    def outputs_of(self, vector: Tensor) -> Tensor:
        """A view of the elements of a whole [out] that belong to this rank's rows."""
        first = self.offset[0]
        return vector[first : first + len(self.weight)]

    def forward(self, input: Tensor) -> Tensor:
        """The output [..., out] of an input [..., K], both DTensors: the one cut by features, the other one not, or
        parts of a sum.

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
        y = self._layer.product(x.to_local(grad_placements=None if self.cuts_columns else [Partial()]))
        shape = torch.Size((*y.shape[:-1], self.shape[0]))
        whole = {"shape": shape, "stride": torch.empty(shape, device="meta").stride()}
        return DTensor.from_local(
            y, self.mesh, [Partial() if self.cuts_columns else features], run_check=False, **whole
        )
