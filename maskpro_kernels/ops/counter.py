"""Sources of masks: the counter of a draw, the counter state that layers share, and cached masks."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Place(NamedTuple):
    """Place of some rows' groups in their layer: fields of a ``Counter``."""

    group_offset: int
    group_row_stride: int


class Counter(NamedTuple):
    """Arguments of the random words of a draw, see ``ops.philox``.

    ``MaskedLinear`` or a public function makes it once. ``layer`` and ``draw`` are tensors like seed and step, so that
    no compiled graph contains their values: equal blocks and all draws of a step share one graph.

    Attributes:
        seed, step, layer: 0-dim int64.
        draw: 0-dim int64; int64 [K] for an update by K draws.
        group_offset: index of the first group in the whole layer.
        group_row_stride: groups in a row of the whole layer.
    """

    seed: Tensor
    step: Tensor
    layer: Tensor
    draw: Tensor
    group_offset: int
    group_row_stride: int

    # a schema of torch.library
    SCHEMA = "Tensor seed, Tensor step, Tensor layer, Tensor draw, int group_offset, int group_row_stride"

    @property
    def key(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Seed, step, layer and draw, which all groups of a draw share."""
        return self[:4]

    def keywords(self) -> dict[str, Tensor | int]:
        """Keywords of the public functions: ``score_update_(..., **layer.counter().keywords())``."""
        return self._asdict()

    def flat(self) -> tuple:
        """Arguments of an operation by ``SCHEMA``."""
        return tuple(self)

    @classmethod
    def unflat(cls, *arguments) -> Counter:
        """Make a counter of the arguments that ``flat`` returned."""
        return cls(*arguments)


class CounterState(nn.Module):
    """Seed, step and draw id of the draws, 0-dim int64 buffers that all layers of a model share.

    A shared submodule stays shared when the model is moved or copied. It is not part of the state_dict, which would
    contain it once for each layer. The layers save seed and step in their extra state.

    Attributes:
        seed: of all draws.
        step: the current step, see ``advance``.
        draw: id of the current draw in the step. Call backward before step or draw change: torch refuses it later,
            "modified by an inplace operation".
    """

    seed: Tensor
    step: Tensor
    draw: Tensor

    def __init__(self, seed: int = 0, device: torch.device | str | None = None):
        super().__init__()
        for name, value in (("seed", seed), ("step", 0), ("draw", 0)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.int64, device=device), persistent=False)


class CachedMask:
    """Group codes of a draw that is used several times, with the versions of the logits and counter it was drawn from.

    A deep copy or a pickle of it is None, so a copy of a layer has no draw.
    """

    def __init__(self, codes: Tensor, logits: Tensor, state: CounterState):
        self.codes = codes
        self._of = versions(logits, state)

    def __reduce__(self) -> tuple:
        return type(None), ()

    def codes_of(self, logits: Tensor, state: CounterState) -> Tensor:
        """The codes; RuntimeError if logits, seed, step or draw have changed since the draw."""
        # a compiled graph cannot read versions
        if not torch.compiler.is_compiling() and self._of != versions(logits, state):
            raise RuntimeError(
                "masks: expected logits, seed, step and draw not to change inside of `drawn`, got some that have "
                "changed; leave the context, and draw again"
            )
        return self.codes


class KeptCodes:
    """Group codes of the N largest of logits, kept while the logits stay as they are.

    A deep copy or a pickle of it is None. Writes through ``logits.data`` are not noticed: torch does not count them.
    """

    def __init__(self, codes: Tensor, logits: Tensor):
        self.codes = codes
        # an id would be that of another tensor some day
        self._logits = weakref.ref(logits)
        self._state = _state_of(logits, codes.device)

    def __reduce__(self) -> tuple:
        return type(None), ()

    def are_of(self, logits: Tensor, device: torch.device) -> bool:
        """Return whether the codes are those of ``logits`` as they are now, on ``device`` and its current stream."""
        return self._logits() is logits and self._state == _state_of(logits, device)


def _state_of(logits: Tensor, device: torch.device) -> tuple:
    # another stream might read codes before they are written
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    return logits._version, logits.data_ptr(), logits.dtype, logits.device, logits.shape, device, stream


def version_of(tensor: Tensor) -> int | None:
    """Number of in-place changes of a tensor; None in inference mode, which does not count them."""
    return None if tensor.is_inference() else tensor._version


def versions(logits: Tensor, state: CounterState) -> list[int | None]:
    """Identities and versions of the tensors that a draw depends on; they change when one of the tensors does."""
    return [value for x in (logits, state.seed, state.step, state.draw) for value in (id(x), version_of(x))]


# The counter of a mask that is not drawn
NO_COUNTER = Counter(None, None, None, None, 0, 0)


class MaskSource(NamedTuple):
    """Source of the mask of a matrix [rows, K].

    Attributes:
        tensor: by ``kind``.
        kind: "drawn": drawn from the logits ``tensor`` [rows, K] at ``counter``. "codes": given by the group codes
            ``tensor`` [rows, K / M]. "applied": ranks have gathered a weight that is masked already; ``tensor`` is the
            logits that learn, of any shape, or None.
        n, m: of the pattern.
        inv_temperature: 1 / temperature of a draw. It has no default: torch.compile(dynamic=True) would make that a
            dynamic input.
        counter: of a draw.
        codes: group codes [rows, K / M] of a draw, if it has been made; else None.
    """

    tensor: Tensor | None
    kind: str
    n: int
    m: int
    inv_temperature: float
    counter: Counter = NO_COUNTER
    codes: Tensor | None = None

    # a schema of torch.library
    SCHEMA = (
        "Tensor? source, str kind, int n, int m, float inv_temperature, Tensor? seed, Tensor? step, Tensor? layer, "
        "Tensor? draw, int group_offset, int group_row_stride, Tensor? codes"
    )

    @property
    def by_codes(self) -> MaskSource:
        """Mask of kind "codes" if there are codes, else itself."""
        return self if self.codes is None else MaskSource(self.codes, "codes", self.n, self.m, 1.0)

    def of(self, tensor: Tensor | None, device: torch.device) -> MaskSource:
        """Mask with another tensor, moved to the device unless there are codes, which suffice."""
        if tensor is not None and self.codes is None and self.kind != "applied":
            tensor = tensor.to(device)
        return self if tensor is self.tensor else self._replace(tensor=tensor)

    def on(self, device: torch.device) -> MaskSource:
        """Mask on a device."""
        return self.of(self.tensor, device)

    def flat(self) -> tuple:
        """Arguments of an operation by ``SCHEMA``."""
        *source, counter, codes = self
        return *source, *counter, codes

    @classmethod
    def unflat(cls, *arguments) -> MaskSource:
        """Make a source of the arguments that ``flat`` returned."""
        return cls(*arguments[:5], Counter(*arguments[5:-1]), arguments[-1])
