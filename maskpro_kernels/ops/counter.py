"""Sources of masks: the counter of a draw, the state in which layers share one, and a mask that is cached."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Counter(NamedTuple):
    """Arguments of the random words of a draw, see ``ops.philox``.

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
        """Seed, step, layer and draw, which all groups of a draw share."""
        return self[:4]

    def keywords(self) -> dict[str, Tensor | int]:
        """Keywords of the public functions: ``score_update_(..., **layer.counter().keywords())``."""
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


class CachedMask:
    """Group codes of a layer's draw that is made once and used several times, and of what they were drawn.

    A copy of a layer holds no draw: a deep copy or a pickle of this is None.
    """

    def __init__(self, codes: Tensor, logits: Tensor, state: CounterState):
        self.codes = codes
        self._of = versions(logits, state)

    def __reduce__(self) -> tuple:
        return type(None), ()

    def codes_of(self, logits: Tensor, state: CounterState) -> Tensor:
        """The codes; RuntimeError if logits, seed, step or draw have changed since the draw."""
        # a compiled graph holds no such numbers
        if not torch.compiler.is_compiling() and self._of != versions(logits, state):
            raise RuntimeError(
                "masks: expected logits, seed, step and draw to stay as they are inside of `drawn`, got some that have "
                "changed; leave it first, and draw again"
            )
        return self.codes


def version_of(tensor: Tensor) -> int | None:
    """Count of the changes of a tensor in place; None in inference mode, which counts none."""
    return None if tensor.is_inference() else tensor._version


def versions(logits: Tensor, state: CounterState) -> list[int | None]:
    """Identities and versions of all that a draw depends on, equal as long as none of these tensors has changed."""
    return [value for x in (logits, state.seed, state.step, state.draw) for value in (id(x), version_of(x))]


# Of a mask that is not drawn
NO_COUNTER = Counter(None, None, None, None, 0, 0)


class MaskSource(NamedTuple):
    """Source of the mask of a matrix [rows, K].

    Attributes:
        tensor: by ``kind``.
        kind: "drawn": drawn from the logits ``tensor`` [rows, K] at ``counter``. "codes": the group codes ``tensor``
            [rows, K / M]. "applied": the weight is under its mask already, as ranks gather it; ``tensor`` has the
            logits that learn, of any shape, or is None.
        n, m: of the pattern.
        inv_temperature: of a draw.
        counter: of a draw.
        codes: group codes [rows, K / M] of a draw that has been made already; None where it has not.
    """

    tensor: Tensor | None
    kind: str
    n: int
    m: int
    inv_temperature: float = 1.0
    counter: Counter = NO_COUNTER
    codes: Tensor | None = None

    @property
    def by_codes(self) -> MaskSource:
        """The mask by its codes where these are there."""
        return self if self.codes is None else MaskSource(self.codes, "codes", self.n, self.m)

    def of(self, tensor: Tensor | None, device: torch.device) -> MaskSource:
        """The mask by that tensor, on the device unless codes are there, which say all."""
        if tensor is not None and self.codes is None and self.kind != "applied":
            tensor = tensor.to(device)
        return self._replace(tensor=tensor)

    def flat(self) -> tuple:
        """Parts as the operations take them: torch.library's schemas know no tuples of tensors and numbers."""
        *source, counter, codes = self
        return *source, *counter, codes

    @classmethod
    def unflat(cls, *parts) -> MaskSource:
        """``flat`` undone."""
        return cls(*parts[:5], Counter(*parts[5:-1]), parts[-1])
