"""What a rank holds of a masked layer that ranks share, whatever has cut it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..parallel_plan import takes_parts
from .dtensors import Place, like_shards, offset_of, part_of, sum_over_shards
from .planned_part import PlannedPart


class LayerShard:
    """What this rank holds of a MaskedLinear, whose other parts are on other ranks.

    Args:
        layer: whose weight and logits are DTensors of one layout.

    Attributes:
        shape: of the whole weight.
        mesh, placements: of weight and logits.
        offset: (row, column) of the whole layer at which the part of this rank begins.
        cut_by: what has cut the layer, for messages.
        part: what a tensor-parallel plan gives this rank, which fully_shard may have cut again; None without a plan.
    """

    cut_by: str
    part: PlannedPart | None = None

    def __init__(self, layer: nn.Module):
        self._layer = layer
        self.shape, self.mesh, self.placements = layer.weight.shape, layer.weight.device_mesh, layer.weight.placements
        self.offset = offset_of(layer.weight)

    @property
    def logits(self) -> Tensor:
        """[rows, columns], those of this rank."""
        return self._layer.logits._local_tensor

    @property
    def place(self) -> Place:
        m = self._layer.pattern.m
        groups, (row, column) = self.shape[1] // m, self.offset
        return Place(row * groups + column // m, groups)

    def distributed(self, part: Tensor) -> Tensor:
        """The DTensor [out, K] of which this rank has this part."""
        return like_shards(part, self._layer.logits)

    def part_of(self, tensor: Tensor) -> Tensor:
        """What this rank has of a whole [out, K]."""
        return part_of(tensor, self._layer.logits)

    def through(self, input: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        """The output of an input, see ``PlannedPart.through``, or of the plain part of one, see ``takes_parts``."""
        if self.part is None or takes_parts(self._layer):
            return product(input)
        return self.part.through(input, product)

    def outputs_of(self, vector: Tensor) -> Tensor:
        """The elements of a whole [out] that belong to outputs of this rank."""
        return vector if self.part is None else self.part.outputs_of(vector)

    def summed(self, part: Tensor) -> Tensor:
        """``sum_over_shards`` of those of the layer."""
        return sum_over_shards(part, self.mesh, self.placements)

    def reshard(self) -> None:
        """Free what may have been kept gathered: the layer has its shards then."""

    @torch.no_grad()
    def bake_into(self, linear: nn.Linear) -> None:
        """Leave a layer weight, with zeros where the N largest logits of a group drop it, and bias."""
        layer = self._layer
        self.reshard()
        self.weight.copy_(layer.top_n_weight().to_local())
        linear.weight, linear.bias = layer.weight, layer.bias
        # layer and shard hold each other, and would hold these beside the parameter that experts are put together in
        layer.weight = layer.bias = None
