"""Masks that ranks find together, of layers that fully_shard has cut over them.

All ranks run the same batches. Of one layer at a time they gather the dense weight, and each works on a share of its
rows. A cut model runs with the weights that it holds: while a block is worked on, its weights are overwritten by masked
ones, and put back behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager

import torch
from torch import Tensor, nn

from ..fsdp import is_distributed, like_shards, local, part_of, resetting, resharded, whole
from ..functional.masks import expand_mask
from ..pattern import NMPattern
from ..ranks import Ranks
from .calibration import LayerMasks


class ShardedMasks(LayerMasks):
    """Masks of layers that ranks share. All ranks come to each call.

    Args:
        model: that holds the layers.
        layers: as for ``LayerMasks``.
        codes: group codes [rows, columns / M] of what this rank has.
        patterns: of the codes.

    Attributes:
        codes, weights: of what this rank has.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        codes: Mapping[str, Tensor],
        patterns: Mapping[str, NMPattern],
    ):
        super().__init__(layers, codes, patterns)
        self._model = model
        # FSDP2 frees what it has gathered where a block ends
        self.may_stop = not resharded(model)
        self._ranks = Ranks()
        # of the block that is worked on, dense
        self._dense: dict[str, Tensor] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """With weights of which those of one block are masked; they are dense again behind it.

        Raises:
            FailedRank, ValueError: another rank has failed.
        """
        with closing(self._ranks):
            self._ranks.connect()
            try:
                with resetting(self._model):
                    yield
            finally:
                self._leave_block()

    def enter_block(self, block: nn.Module) -> None:
        self._leave_block()
        inside = set(block.modules())
        for name, layer in self.layers.items():
            if layer in inside:
                self._dense[name] = local(layer.weight.detach()).clone()
                self._mask(name)

    def dense(self, name: str) -> Tensor:
        resharded(self._model)
        return whole(like_shards(self._dense[name], self.layers[name].weight))

    def whole_codes(self, name: str) -> Tensor:
        resharded(self._model)
        return whole(like_shards(self.codes[name], self.layers[name].weight, self.patterns[name].m))

    def by_rows(self, function: Callable[..., Sequence[Tensor]], *tensors: Tensor) -> Sequence[Tensor]:
        """As by one process; each rank works on a share of the rows, whatever its own part of the layer."""
        sizes = self._rows_each(len(tensors[0]))
        own = [tensor.split(sizes)[self._ranks.rank] for tensor in tensors] if sizes else tensors
        found = self._ranks.all_of(lambda: function(*own))
        return [self._joined(rows, sizes) for rows in found] if sizes else found

    def _rows_each(self, out: int) -> list[int]:
        """How many of so many rows each rank works on; none where they are fewer than ranks, which all work on all."""
        world = self._ranks.world
        return [out // world + (rank < out % world) for rank in range(world)] if out >= world else []

    def _joined(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """[sum of sizes, ...], of which each rank has so many rows."""
        # as bytes: not every backend gathers every dtype
        flat = rows.contiguous().view(len(rows), -1).view(torch.uint8)
        padded = nn.functional.pad(flat, (0, 0, 0, max(sizes) - len(rows)))
        parts = self._ranks.gather_vectors(padded.flatten()).view(len(sizes), *padded.shape)
        joined = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        return joined.view(rows.dtype).view(-1, *rows.shape[1:])

    def put(self, name: str, codes: Tensor, weight: Tensor | None = None) -> None:
        resharded(self._model)
        like = self.layers[name].weight
        self.codes[name] = part_of(codes, like, self.patterns[name].m).clone()
        if weight is not None:
            self.weights[name] = part_of(weight, like).clone()
        self._mask(name)

    @torch.no_grad()
    def _mask(self, name: str) -> None:
        weight = self.weights.get(name, self._dense[name])
        kept = expand_mask(self.codes[name], self.patterns[name])
        local(self.layers[name].weight).copy_(torch.where(kept, weight, 0.0))

    @torch.no_grad()
    def _leave_block(self) -> None:
        resharded(self._model)
        for name, dense in self._dense.items():
            local(self.layers[name].weight).copy_(dense)
        self._dense.clear()


def masks_of(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    codes: Mapping[str, Tensor],
    patterns: Mapping[str, NMPattern],
) -> LayerMasks:
    """Masks of whole layers, or of layers that ranks share, whose codes are those of this rank."""
    if any(is_distributed(layer.weight) for layer in layers.values()):
        return ShardedMasks(model, layers, codes, patterns)
    return LayerMasks(layers, codes, patterns)
