"""A draw that is made once and used several times: its group codes, as long as they are those of the current draw."""

from __future__ import annotations

import torch
from torch import Tensor

from .counter import CounterState


class HeldDraw:
    """Group codes of a layer's draw, and of what they were drawn.

    A copy of a layer holds no draw: a deep copy or a pickle of this is None.

    Args:
        codes: group codes [out, K / M].
        logits, state: of the layer, as they are at the draw.
    """

    def __init__(self, codes: Tensor, logits: Tensor, state: CounterState):
        self.codes = codes
        self._of = versions(logits, state)

    def __reduce__(self) -> tuple:
        return type(None), ()

    def is_of(self, logits: Tensor, state: CounterState) -> bool:
        """Whether a draw would give the same: the same tensors, of which none has been changed since."""
        return self._of == versions(logits, state)

    def codes_of(self, logits: Tensor, state: CounterState) -> Tensor:
        """The codes.

        Raises:
            RuntimeError: if logits, seed, step or draw have changed since the draw.
        """
        # a compiled graph holds no such numbers
        if not torch.compiler.is_compiling() and not self.is_of(logits, state):
            raise RuntimeError(
                "masks: expected logits, seed, step and draw to stay as they are inside of `drawn`, got some that have "
                "changed; leave it first, and draw again"
            )
        return self.codes


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor has been changed in place; of those of inference mode nobody counts it."""
    return None if tensor.is_inference() else tensor._version


def versions(logits: Tensor, state: CounterState) -> list[int | None]:
    """What a draw from logits is known again by, as long as the tensors live."""
    return [value for x in (logits, state.seed, state.step, state.draw) for value in (id(x), version_of(x))]
