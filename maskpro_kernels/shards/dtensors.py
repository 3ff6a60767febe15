"""What ranks hold of a DTensor, and of a masked layer whose weight and logits are such."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


def is_distributed(tensor: object) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "to_local")


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or the whole of a DTensor, to which all ranks of its mesh have to come."""
    return tensor.detach().full_tensor() if is_distributed(tensor) else tensor


def check_in_memory(
    argument: str, layer: nn.Module, name: str = "weight", weight: Tensor | None = None, sharded: bool = False
) -> None:
    """Raise ValueError unless a layer's weight, by default ``layer.weight``, lies on its device as a whole.

    Args:
        sharded: whether it may be a DTensor as well.
    """
    weight = layer.weight if weight is None else weight
    if weight.is_meta:
        offloads = getattr(getattr(layer, "_hf_hook", None), "offload", False)
        cure = "accelerate offloads it, give it a device in device_map" if offloads else "load it first"
        raise ValueError(f"{argument}: expected weights in memory, got {name} on meta: {cure}")
    if is_distributed(weight) and not sharded:
        raise ValueError(f"{argument}: expected plain tensors as weights, got a DTensor in {name}")


def local(tensor: Tensor) -> Tensor:
    """The tensor itself, or what this rank has of a DTensor."""
    return tensor.to_local() if is_distributed(tensor) else tensor


def offset_of(tensor: Tensor) -> tuple[int, ...]:
    """Where what this rank has of a DTensor begins in the whole, along each dimension."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return offset


def part_of(whole: Tensor, like: Tensor, each: int = 1) -> Tensor:
    """What this rank has of a whole [out, K / each], where it has a part of a DTensor ``like`` [out, K].

    All of it where ``like`` is no DTensor.
    """
    if not is_distributed(like):
        return whole
    (row, column), (rows, columns) = offset_of(like), local(like).shape
    return whole[row : row + rows, column // each : (column + columns) // each]


def like_shards(part: Tensor, like: Tensor) -> Tensor:
    """The DTensor in the layout of another one, [out, K], of which this rank has this part."""
    from torch.distributed.tensor import DTensor

    how = {"shape": like.shape, "stride": (like.shape[1], 1), "run_check": False}
    return DTensor.from_local(part, like.device_mesh, like.placements, **how)


def sum_over_shards(part: Tensor, mesh, placements: Sequence) -> Tensor:
    """The sum over the shards of a DTensor of that layout of what each has of it, on all ranks; differentiable."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    of_sum = [Partial() if placement.is_shard() else Replicate() for placement in placements]
    return DTensor.from_local(part, mesh, of_sum, run_check=False).full_tensor()


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor, or the whole of a DTensor, has finite elements alone."""
    if not is_distributed(tensor):
        return bool(torch.isfinite(tensor).all())
    bad = (~torch.isfinite(tensor.detach().to_local())).sum()
    return not sum_over_shards(bad, tensor.device_mesh, tensor.placements)


class Place(NamedTuple):
    """Where the groups of some rows lie in their layer, as a ``Counter`` has it."""

    group_offset: int
    group_row_stride: int


def check_no_flat_parameters(argument: str, model: nn.Module) -> None:
    """Raise ValueError if FSDP1 has flattened the parameters of a module."""
    for name, module in model.named_modules():
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
            raise ValueError(
                f"{argument}: expected parameters as they are or sharded by fully_shard, got the flat ones of "
                f"FullyShardedDataParallel (FSDP1) in {name or 'the model itself'}"
            )


def check_logits(name: str, layer: nn.Module) -> None:
    """Raise ValueError unless the logits of a layer have the mesh and placements of its weight."""
    if not is_distributed(layer.weight) or not is_distributed(layer.logits):
        weight, logits = ("sharded" if is_distributed(x) else "plain" for x in (layer.weight, layer.logits))
        raise ValueError(
            f"model: expected logits sharded as their weight is, got a {weight} weight and {logits} logits in {name}"
        )
    ways = [(x.device_mesh, x.placements) for x in (layer.weight, layer.logits)]
    if ways[0] != ways[1]:
        raise ValueError(
            f"model: expected logits with the mesh and placements of their weight, {ways[0]}, got {ways[1]} in {name}"
        )


class LayerShard:
    """What this rank holds of a MaskedLinear, whose other parts are on other ranks.

    Args:
        layer: whose weight and logits are DTensors of one layout.

    Attributes:
        shape: of the whole weight.
        mesh, placements: of weight and logits.
        offset: (row, column) of the whole layer at which the part of this rank begins.
        cut_by: what has cut the layer, for messages.
    """

    cut_by: str

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

    def summed(self, part: Tensor) -> Tensor:
        """``sum_over_shards`` of those of the layer."""
        return sum_over_shards(part, self.mesh, self.placements)

    def reshard(self) -> None:
        """Free what may have been kept gathered: the layer has its shards then."""

    @torch.no_grad()
    def bake_into(self, linear: nn.Linear) -> None:
        """Give a layer weight, with zeros where the N largest logits of a group drop it, and bias, and leave them."""
        layer = self._layer
        self.reshard()
        self.weight.copy_(layer.top_n_weight().to_local())
        linear.weight, linear.bias = layer.weight, layer.bias


def check_not_sharded(layers: Mapping[str, nn.Module], reason: str) -> None:
    """Raise ValueError if a MaskedLinear has been cut over ranks."""
    for name, layer in layers.items():
        if layer.shard is not None:
            raise ValueError(f"model: expected whole layers, got {name}, which {layer.shard.cut_by} has cut: {reason}")
