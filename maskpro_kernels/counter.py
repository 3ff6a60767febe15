"""Where a mask comes from: the counter of its draw, the state in which layers share one, and the source of a mask."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Counter(NamedTuple):
    """What the random words of a draw are a function of, see ``ops.philox``.

    Made once, by ``MaskedLinear`` or a public function, and passed whole. ``layer`` and ``draw`` are tensors as seed
    and step are, so that a compiled graph holds none of them: equal blocks and all draws of a step share one.

    Attributes:
        seed, step, layer: 0-dim int64.
        draw: 0-dim int64; int64 [K] of an update by K draws.
        group_offset: index in the whole layer of the first group.
        group_row_stride: groups in a row of the whole layer.
    """

    seed: Tensor
    step: Tensor
    layer: Tensor
    draw: Tensor
    group_offset: int
    group_row_stride: int

    @property
    def key(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What all groups of a draw have in common: seed, step, layer and draw."""
        return self[:4]

    def keywords(self) -> dict[str, Tensor | int]:
        """As the public functions take it: ``score_update_(..., **layer.counter().keywords())``."""
        return self._asdict()


class CounterState(nn.Module):
    """Seed, step and draw id of the draws, 0-dim int64 buffers that all layers of a model share.

    A shared submodule stays shared when the model is moved or copied. Not part of the state_dict, where it
    would stand under every layer as one shared tensor: the layers save seed and step in their extra state.

    Attributes:
        seed: of all draws.
        step: at which the layers draw, see ``advance``.
        draw: which of several draws in a step the layers make. As for the step, a backward through a forward comes
            before the draw changes: torch refuses a later one, "modified by an inplace operation".
    """

    seed: Tensor
    step: Tensor
    draw: Tensor

    def __init__(self, seed: int = 0, device: torch.device | str | None = None):
        super().__init__()
        for name, value in (("seed", seed), ("step", 0), ("draw", 0)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.int64, device=device), persistent=False)


# Of a mask that is not drawn, where one is asked for
NO_COUNTER = Counter(None, None, None, None, 0, 0)


class MaskSource(NamedTuple):
    """Where the mask of a matrix [rows, K] comes from.

    Attributes:
        tensor: by ``kind``.
        kind: "drawn": drawn from the logits ``tensor`` [rows, K] at ``counter``. "codes": the group codes ``tensor``
            [rows, K / M].
        n, m: of the pattern.
        inv_temperature: of a draw.
        counter: of a draw.
        codes: group codes [rows, K / M] of a draw that has been made already; None where it has not.
    """

    tensor: Tensor
    kind: str
    n: int
    m: int
    inv_temperature: float = 1.0
    counter: Counter | None = None
    codes: Tensor | None = None

    @property
    def known(self) -> MaskSource:
        """The same mask, by its codes where these are there."""
        return self if self.codes is None else MaskSource(self.codes, "codes", self.n, self.m)
