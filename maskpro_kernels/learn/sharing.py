"""Which batches of a step each rank takes, and what the ranks send each other of their losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TypeVar

from ..modules import MaskedLinear
from ..ranks import Ranks
from .batches import weighted_mean

Result = TypeVar("Result")


class Shares:
    """Equal shares of forwards, of which each rank takes one; those that make each forward together take the same.

    Args:
        ranks: of the run.
        layers: of which a tensor-parallel plan may have shared out all over some ranks, see ``check_sharding``.

    Attributes:
        ranks: of the run.
        own: which of the shares this rank takes.
        count: how many there are.
    """

    def __init__(self, ranks: Ranks, layers: Mapping[str, MaskedLinear]):
        self.ranks = ranks
        shard = next(iter(layers.values())).shard
        part = None if shard is None else shard.part
        parts, apart = (1, 1) if part is None else (part.mesh.size(), part.apart)
        of = [rank // (parts * apart) * apart + rank % apart for rank in range(ranks.world)]
        self.own, self.count = of[ranks.rank], ranks.world // parts
        self._firsts = [of.index(share) for share in range(self.count)]

    def by_share(self, rows: Sequence[Result]) -> list[Result]:
        """Of what each rank has given that of each share, by the first rank that takes it."""
        return [rows[rank] for rank in self._firsts]


class Sharing:
    """The forwards of a step, one for each draw and batch. Each rank makes all draws, for its share of the batches.

    Args:
        shares: of the batches, over all ranks that take the step.
        accumulate: batches a step.
        draws: masks drawn in a step.

    Attributes:
        own: the forwards that this rank makes, as (draw, which of the step's batches).
        shares: of the batches.
        draws: masks drawn in a step.

    Raises:
        ValueError: if ``accumulate`` is no multiple of the shares.
    """

    def __init__(self, shares: Shares, accumulate: int, draws: int):
        if accumulate % shares.count:
            raise ValueError(f"accumulate: expected a multiple of the {shares.count} ranks, got {accumulate}")
        self.ranks, self.draws, self.shares = shares.ranks, draws, shares
        self._by_share = [
            [(draw, place) for draw in range(draws) for place in range(share, accumulate, shares.count)]
            for share in range(shares.count)
        ]
        self.own = self._by_share[shares.own]

    def exchange(
        self, step: int, losses: Sequence[float], weights: Sequence[Fraction], flip_rate: float, order: float = 0.0
    ) -> tuple[list[float], bool]:
        """(loss of every draw, whether ``order`` is the same on all ranks).

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
        for share, (_, _, _, *row) in zip(self._by_share, self.shares.by_share(rows), strict=True):
            of |= zip(share, row, strict=True)
        draws = len(of) // len(weights)
        by_draw = [weighted_mean([of[draw, place] for place in range(len(weights))], weights) for draw in range(draws)]
        return by_draw, all(row[2] == order for row in rows)
