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
from .dtensors import check_logits, is_distributed
from .layer_shard import LayerShard
from .planned_part import CUT_BY, PlannedPart, check_mesh, check_part
from .rows import Params, RowShard, attach_rows, check_row_shard, resharded


def check_shard(argument: str, name: str, layer: nn.Module, pattern: NMPattern, params: Params) -> None:
    """Raise ValueError unless a layer's weight is whole, or the shards are such as a LayerShard takes.

    Args:
        params: of ``resharded``.
    """
    weight, bias = layer.weight, layer.bias
    if id(weight) in params:
        check_row_shard(argument, name, weight, pattern, params)
    elif is_distributed(weight):
        check_part(argument, name, weight.shape, weight.device_mesh, weight.placements, pattern)
        alike = bias is None or getattr(bias, "placements", None) == weight.placements
        if weight.placements[0].dim == 0 and not alike:
            got = bias.placements if is_distributed(bias) else "a plain tensor"
            raise ValueError(f"{argument}: expected a bias that {CUT_BY} has cut as its weight, got {got} in {name}")


def check_meshes(model: nn.Module) -> None:
    """Raise ValueError if ranks that have no part of a model would be waited for: by what all ranks come to."""
    params, world = resharded(model), torch.distributed.get_world_size()
    by_fsdp = {name: one.device_mesh for name, one in model.named_parameters() if id(one) in params}
    # under a plan what it has not cut lies on a part of the mesh
    if by_fsdp and all(mesh.size() != world for mesh in by_fsdp.values()):
        name, mesh = next(iter(by_fsdp.items()))
        raise ValueError(
            f"model: expected a weight that fully_shard has cut into rows, over all ranks, got a mesh of {mesh.size()} "
            f"of {world} in {name.rpartition('.')[0]}"
        )
    for name, one in model.named_parameters():
        if id(one) not in params and is_distributed(one) and one.device_mesh.ndim == 1:
            check_mesh("model", name.rpartition(".")[0], one.device_mesh)


def attach(layers: Mapping[str, nn.Module], model: nn.Module) -> None:
    """Tell the layers, and FSDP2, what this rank has of layers that have been shared out; others stay as they are.

    Args:
        layers: MaskedLinear layers by name.
        model: that holds them.

    Raises:
        ValueError: if one is sharded in a way that has no code. Nothing has changed then.
    """
    # fully_shard may have cut the parts of a plan since
    others = {name: layer for name, layer in layers.items() if not isinstance(layer.shard, RowShard)}
    params = resharded(model) if others else {}
    new = {name: layer for name, layer in others.items() if id(layer.weight) in params or _is_new(layer)}
    for name, layer in new.items():
        check_logits(name, layer)
        check_shard("model", name, layer, layer.pattern, params)
    attach_rows([layer for layer in new.values() if id(layer.weight) in params], params)
    for layer in new.values():
        if id(layer.weight) not in params:
            layer.shard = TensorShard(layer)


def _is_new(layer: nn.Module) -> bool:
    return layer.shard is None and (is_distributed(layer.weight) or is_distributed(layer.logits))


class TensorShard(LayerShard):
    """The rows or the columns of a MaskedLinear that this rank holds.

    Args:
        layer: a MaskedLinear, whose weight and logits are DTensors of one layout.
    """

    cut_by = CUT_BY

    def __init__(self, layer: nn.Module):
        super().__init__(layer)
        self.part = PlannedPart(self.shape, self.mesh, self.placements[0])

    @property
    def weight(self) -> Tensor:
        """[rows, columns], that of this rank."""
        return self._layer.weight._local_tensor

    @property
    def bias(self) -> Tensor | None:
        """What this rank adds to its outputs."""
        return self.part.bias_of(self._layer.bias)

    @property
    def layout(self) -> list:
        return [self.mesh.size(), self.part.apart, str(self.placements), *self.shape]

    def mesh_with_copies(self) -> DeviceMesh:
        """Of all ranks, which all make it: [copies of the layer, its parts]."""
        parts, apart = self.mesh.size(), self.part.apart
        ranks = torch.arange(torch.distributed.get_world_size()).view(-1, parts, apart).movedim(1, -1)
        return DeviceMesh(self.mesh.device_type, ranks.reshape(-1, parts))

    def forward(self, input: Tensor) -> Tensor:
        """The output of an input."""
        return self.through(input, self._layer.product)
