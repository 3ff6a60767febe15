"""Runs of a model whose layers ranks share: what such a run takes, and its logits to rank 0 and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..modules import MaskedLinear
from ..ranks import Ranks
from ..shards import RowShard, whole
from .estimator import Estimator
from .model_masks import ModelMasks
from .run_folder import SavedRun
from .score_updates import replay


def is_sharded(layers: Mapping[str, MaskedLinear]) -> bool:
    """Whether ranks share them: all of them, see ``check_sharding``."""
    return any(layer.shard is not None for layer in layers.values())


def check_sharding(layers: Mapping[str, MaskedLinear], parallel: str) -> None:
    """Raise ValueError unless ranks that share layers can learn their masks together."""
    if not is_sharded(layers):
        return
    first = next(iter(layers))
    cuts = {name: None if layer.shard is None else layer.shard.cut_by for name, layer in layers.items()}
    cut = next(name for name in layers if cuts[name] is not None)
    for name, layer in layers.items():
        if cuts[name] != cuts[cut]:
            raise ValueError(
                f"model: expected {cuts[cut]} to cut all masked layers or none, got {cut}, which it has cut, and "
                f"{name}, which {cuts[name] or 'nothing'} has"
            )
        if layer.shard.mesh != layers[first].shard.mesh:
            raise ValueError(
                f"model: expected one mesh for all masked layers, got {layers[first].shard.mesh} in {first} and "
                f"{layer.shard.mesh} in {name}"
            )
    if parallel != "data" and isinstance(layers[first].shard, RowShard):
        raise ValueError(
            f'parallel: expected "data" in a model that fully_shard has cut, got {parallel!r}: all ranks gather rows '
            "of one draw"
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
        ranks.limit(shard.mesh)


def logits_on_first(ranks: Ranks, layers: Mapping[str, MaskedLinear]) -> dict[str, Tensor]:
    """The whole logits [out, K] by name, on rank 0 alone where ranks share them: one layer after the other."""
    found = {}
    with ranks.naming_lost():
        for name, layer in layers.items():
            logits = whole(layer.logits)
            if layer.shard is None:
                found[name] = logits
            elif ranks.rank == 0:
                found[name] = logits.cpu()
    return found


@torch.no_grad()
def spread_run(
    ranks: Ranks, layers: Mapping[str, MaskedLinear], estimator: Estimator, seed: int, saved: SavedRun | None = None
) -> None:
    """Give all ranks the logits and the tensors of an estimator that rank 0 has read.

    Args:
        saved: what rank 0 has read and, where ranks share layers, not put into the logits: each then takes its part of
            the snapshot, and the journal's steps behind it. None on other ranks.
    """
    if is_sharded(layers):
        for name, layer in layers.items():
            own = layer.own_logits
            logits = torch.empty(layer.shard.shape, dtype=own.dtype, device=own.device)
            if saved is not None:
                logits.copy_(saved.tensors[name])
            ranks.spread_(logits)
            own.copy_(layer.shard.part_of(logits))
        masks = ModelMasks(layers)
        for entry in ranks.gather_objects(None if saved is None else saved.entries[saved.snapshot_step :])[0]:
            replay(masks, seed, entry)
    else:
        for layer in layers.values():
            ranks.spread_(layer.logits.detach())
    for tensor in estimator.tensors().values():
        ranks.spread_(tensor)
