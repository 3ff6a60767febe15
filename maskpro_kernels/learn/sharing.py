"""The forwards of a step that each rank makes, and the losses that ranks exchange."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from ..ranks import Ranks
from .batches import weighted_mean


class Sharing:
    """The forwards of a step, one for each draw and batch: each rank makes all draws, for its share of the batches.

    Args:
        ranks: that take the step together.
        accumulate: batches a step.
        draws: masks drawn in a step.

    Attributes:
        own: the forwards that this rank makes, as (draw, which of the step's batches).
        ranks, draws: as given.

    Raises:
        ValueError: if ``accumulate`` is no multiple of the ranks.
    """

    def __init__(self, ranks: Ranks, accumulate: int, draws: int):
        if accumulate % ranks.world:
            raise ValueError(f"accumulate: expected a multiple of the {ranks.world} ranks, got {accumulate}")
        self.ranks, self.draws = ranks, draws
        pairs = [(draw, place) for draw in range(draws) for place in range(accumulate)]
        self._by_rank = [[pair for pair in pairs if pair[1] % ranks.world == rank] for rank in range(ranks.world)]
        self.own = self._by_rank[ranks.rank]

    def exchange(
        self, step: int, losses: Sequence[float], weights: Sequence[Fraction], flip_rate: float, order: float = 0.0
    ) -> tuple[list[float], bool]:
        """(loss of every draw, true where ``order`` is the same on all ranks).

        Args:
            step: index of the step.
            losses: of the forwards of this rank.
            weights: of the step's batches in the loss of a draw.
            flip_rate: of the draws.
            order: any number.

        Raises:
            RuntimeError: if the ranks are not at the same step, or have not drawn the same.
        """
        rows = self.ranks.gather([step, flip_rate, order, *losses])
        for name, at in (("step", 0), ("flip rate", 1)):
            others = {rank: row[at] for rank, row in enumerate(rows) if row[at] != rows[0][at]}
            if others:
                raise RuntimeError(
                    f"ranks: expected the {name} of rank 0 on all of them, {rows[0][at]:g}, got by rank {others}"
                )
        of = {}
        for pairs, (_, _, _, *row) in zip(self._by_rank, rows, strict=True):
            of |= zip(pairs, row, strict=True)
        by_draw = [
            weighted_mean([of[draw, place] for place in range(len(weights))], weights) for draw in range(self.draws)
        ]
        return by_draw, all(row[2] == order for row in rows)
