"""Straight-through learning of layers that fully_shard has cut: each rank has the slopes of its own rows.

A slope takes the dense weight, and no rank has that of a whole layer. So ranks sum up the loss's derivative in the
masked weight, of which each gets its own rows. The second derivative is an outer product of two vectors, which ranks
exchange.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import ops
from ..functional.checks import FLOAT32_MAX
from .backward import BackwardPass, LayerUpdater


class ShardedPass(BackwardPass):
    """``BackwardPass`` of layers that fully_shard has cut into rows.

    Slopes are summed up in every pass, so that no rank holds those of two whole layers. Logits move behind the last
    one: a rank holds a float32 slope for each weight of its own rows.
    """

    def takes_turns(self) -> bool:
        return True

    def alike(self, loss: Tensor) -> bool:
        own = self.order(loss)
        return all(order == own for (order,) in self.ranks.gather([own]))

    def _end_pass(self) -> None:
        self._finish()
        if self.left:
            return
        moved = [updater for updater in self.updaters.values() if updater.own_slopes is not None]
        own = [(float(updater.own_square()), updater.own_slopes.numel()) for updater in moved]
        rows = self.ranks.gather([value for pair in own for value in pair])
        for at, updater in enumerate(moved):
            pairs = [row[2 * at : 2 * at + 2] for row in rows]
            updater.move(sum(square * count for square, count in pairs if count) / sum(count for _, count in pairs))


class ShardUpdater(LayerUpdater):
    """``LayerUpdater`` of a layer that fully_shard has cut into rows: its logits move behind the last backward.

    Attributes:
        slopes: the loss's derivative in what is gathered of the masked weight, of the pass that is under way.
        factors: of the loss's second derivative there: for each use of the layer in that pass [out] and [K].
        own_slopes: float32 [rows, K], of the rows of this rank, summed up over the passes of all ranks.
    """

    takes_shards = True

    def begin(self, *how) -> None:
        super().begin(*how)
        self.factors: list[tuple[Tensor, Tensor]] = []
        self.own_slopes: Tensor | None = None

    def __call__(self, grad: Tensor, x: Tensor, weight: Tensor, mask: None) -> None:
        squares = ops.column_squares(grad) if self.fisher is None else self.fisher / max(len(x), 1)
        self.slopes = self._added(self.slopes, ops.weight_gradient(grad, x))
        self.factors.append((self.weight * self.how.curvature * squares, ops.column_squares(x)))
        self.backward_pass.take_turns()

    def finish(self) -> None:
        """Add what the backward of one pass has given on all ranks."""
        shard, ranks = self.layer.shard, self.backward_pass.ranks
        device = shard.weight.device
        if self.slopes is None:
            self.slopes = torch.zeros(shard.shape, dtype=torch.float32, device=device)
        first = ranks.sum_of_rows(self.slopes, shard.mesh, shard.mesh_dim, len(shard.weight))
        # freed before the next layer comes
        self.slopes, factors, self.factors = None, self.factors, []
        second = torch.zeros_like(first)
        in_turn = self.backward_pass.in_turn
        uses = 1 if in_turn else max(count for (count,) in ranks.gather([len(factors)]))
        for use in range(int(uses)):
            own = torch.zeros(sum(shard.shape), dtype=torch.float32, device=device)
            if use < len(factors):
                own.copy_(torch.cat(factors[use]))
            told = ranks.gather_vectors(own)[shard.mesh.mesh.flatten().to(device)]
            outputs, inputs = told.split([*shard.shape], 1)
            second.addmm_(shard.part_of(outputs.t()), inputs)
        slope = ops.mask_slope(shard.weight, first, second, self.layer.drawn_codes(), self.layer.pattern.m)
        self.own_slopes = slope if self.own_slopes is None else self.own_slopes.add_(slope)

    def own_square(self) -> Tensor:
        """Mean square of the slopes of this rank's rows."""
        # at a rate of 0 nothing moves
        return self._descend_own(0.0)

    def _descend_own(self, rate: float) -> Tensor:
        logits, counter = self.layer.own_logits, self.layer.counter()
        rate = torch.full((), rate, dtype=torch.float32, device=logits.device)
        return ops.descend_(logits, self.own_slopes, rate, self.how.max_update, self.layer.pattern.m, counter)

    def move(self, square: float) -> None:
        """Move the logits.

        Args:
            square: mean square of the slopes of all rows.
        """
        mean_square = square if self.mean_square is None else self.mean_square
        usable = math.isfinite(mean_square) and mean_square > 0.0
        self._descend_own(min(self.lr / math.sqrt(mean_square), FLOAT32_MAX) if usable else 0.0)
        self.latest = torch.tensor(square, dtype=torch.float32)
        self.layer.cached_mask = None

    def end(self) -> None:
        super().end()
        self.own_slopes, self.factors = None, []
