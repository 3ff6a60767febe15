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
        raise ValueError(
            f"{argument}: expected plain tensors as weights, got a DTensor in {name}; of a model that ranks share "
            "convert takes refit, and MaskTrainer learns"
        )


def local(tensor: Tensor) -> Tensor:
    """The tensor itself, or what this rank has of a DTensor."""
    return tensor.to_local() if is_distributed(tensor) else tensor


def offset_of_layout(shape: torch.Size, mesh, placements: Sequence) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(Shape of what this rank has of a DTensor of that layout, where it begins in the whole)."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(shape, mesh, placements)


def offset_of(tensor: Tensor) -> tuple[int, ...]:
    """Where what this rank has of a DTensor begins in the whole, along each dimension."""
    _, offset = offset_of_layout(tensor.shape, tensor.device_mesh, tensor.placements)
    return offset


def part_of(whole: Tensor, like: Tensor, each: int = 1) -> Tensor:
    """What this rank has of a whole [out, K / each], where it has a part of a DTensor ``like`` [out, K].

    All of it where ``like`` is no DTensor.
    """
    if not is_distributed(like):
        return whole
    (row, column), (rows, columns) = offset_of(like), local(like).shape
    return whole[row : row + rows, column // each : (column + columns) // each]


def like_shards(part: Tensor, like: Tensor, each: int = 1) -> Tensor:
    """The DTensor [out, K / each] in the layout of another one, [out, K], of which this rank has this part."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size((like.shape[0], like.shape[1] // each))
    how = {"shape": shape, "stride": (shape[1], 1), "run_check": False}
    return DTensor.from_local(part, like.device_mesh, like.placements, **how)


def whole_input(input: Tensor, layer: nn.Module) -> Tensor:
    """The input [..., K] of a layer of which a tensor-parallel plan may have given this rank a part.

    All ranks that share the layer come to it.
    """
    if is_distributed(input):
        return input.full_tensor()
    weight = layer.weight
    if not is_distributed(weight) or input.shape[-1] == weight.shape[1]:
        return input
    from torch.distributed.tensor import DTensor, Shard

    # transformers gives a layer that is cut into columns those of the input
    shape = torch.Size((*input.shape[:-1], weight.shape[1]))
    how = {"run_check": False, "shape": shape, "stride": torch.empty(shape, device="meta").stride()}
    return DTensor.from_local(input, weight.device_mesh, [Shard(input.dim() - 1)], **how).full_tensor()


def sum_over_shards(part: Tensor, mesh, placements: Sequence) -> Tensor:
    """The sum over the shards of a DTensor of that layout of what each has of it, on all ranks; differentiable."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    # of rows that are cut twice the shards are strided, and told to be none
    of_sum = [Partial() if hasattr(placement, "dim") else Replicate() for placement in placements]
    total = DTensor.from_local(part, mesh, of_sum, run_check=False)
    for at in range(mesh.ndim - 1):
        # of several at once torch warns
        of_sum[at] = Replicate()
        total = total.redistribute(placements=of_sum)
    return total.full_tensor()


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


def check_not_wrapped(layers: Mapping[str, nn.Module]) -> None:
    """Raise ValueError if fully_shard was given a layer itself: another one in its place would not be gathered."""
    for name, layer in layers.items():
        if hasattr(layer, "reshard"):
            raise ValueError(
                f"model: expected fully_shard around what holds masked layers, got one around "
                f"{name or 'the only one'} itself"
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


def check_not_sharded(layers: Mapping[str, nn.Module], reason: str) -> None:
    """Raise ValueError if a MaskedLinear has been cut over ranks."""
    for name, layer in layers.items():
        if layer.shard is not None:
            raise ValueError(f"model: expected whole layers, got {name}, which {layer.shard.cut_by} has cut: {reason}")
