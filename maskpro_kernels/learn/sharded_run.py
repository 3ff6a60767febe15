"""Runs of a model whose layers ranks share: what such a run takes, and how its ranks go on from a snapshot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ..modules import MaskedLinear
from ..ranks import Ranks


def is_sharded(layers: Mapping[str, MaskedLinear]) -> bool:
    """Whether ranks share them: all of them, see ``check_sharding``."""
    return any(layer.shard is not None for layer in layers.values())


def check_sharding(layers: Mapping[str, MaskedLinear]) -> None:
    """Raise ValueError unless ranks that share layers can learn their masks together."""
    if not is_sharded(layers):
        return
    first = next(iter(layers))
    cut = next(name for name, layer in layers.items() if layer.shard is not None)
    for name, layer in layers.items():
        if layer.shard is None:
            raise ValueError(
                f"model: expected fully_shard to cut all masked layers or none, got {cut}, which it has cut, and "
                f"{name}, which it has not"
            )
        if layer.shard.mesh != layers[first].shard.mesh:
            raise ValueError(
                f"model: expected one mesh for all masked layers, got {layers[first].shard.mesh} in {first} and "
                f"{layer.shard.mesh} in {name}"
            )


def check_finite(layers: Mapping[str, MaskedLinear]) -> None:
    """Raise ValueError unless the logits that this rank has are finite."""
    for name, layer in layers.items():
        if not torch.isfinite(layer.own_logits).all():
            raise ValueError(f"model: expected finite logits, got NaN or infinity in {name}")


def agree_on_shards(ranks: Ranks, layers: Mapping[str, MaskedLinear]) -> None:
    """Raise ValueError on all ranks unless they have the same layers on meshes that fit, with finite logits.

    All weights are shards then.
    """
    if not is_sharded(layers):
        return
    shards = {name: layer.shard for name, layer in layers.items()}
    ranks.agree({name: shard.layout for name, shard in shards.items()})
    ranks.all_of(lambda: check_finite(layers))
    for shard in shards.values():
        shard.reshard()


def check_seen(path: Path) -> None:
    """Raise ValueError unless this rank sees what rank 0 has in ``output_dir``."""
    if not path.exists():
        raise ValueError(
            f"output_dir: expected a folder on a disk that all ranks share, got {str(path.parent)!r}, in which this "
            f"rank misses {path.name}"
        )
