"""Masks and refitted weights that are found layer by layer, and the model that runs under those there are so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from ..functional.linear import codes_linear
from ..pattern import NMPattern


class LayerMasks:
    """Masks of layers that one process has as a whole.

    Args:
        layers: nn.Linear or alike, by name, with their dense weights.
        codes: group codes [out, K / M] to start from, by the same names.
        patterns: of the codes.

    Attributes:
        codes: by name, those there are so far.
        weights: refitted ones [out, K] by name, as tensors of their own.
    """

    # whether a forward pass may end inside of a block
    may_stop = True

    def __init__(self, layers: Mapping[str, nn.Module], codes: Mapping[str, Tensor], patterns: Mapping[str, NMPattern]):
        self.layers, self.patterns = layers, patterns
        self.codes, self.weights = dict(codes), {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """With layers that multiply under the masks, and with the refitted weights."""
        with masked_forwards(self.layers, self.codes, self.weights, self.patterns):
            yield

    def enter_block(self, block: nn.Module) -> None:
        """Told ahead of the layers of a block; no block before it runs again."""

    def dense(self, name: str) -> Tensor:
        """The dense weight [out, K]."""
        return self.layers[name].weight.detach()

    def whole_codes(self, name: str) -> Tensor:
        """The group codes [out, K / M]."""
        return self.codes[name]

    def by_rows(self, function: Callable[..., Sequence[Tensor]], *tensors: Tensor) -> Sequence[Tensor]:
        """What a function gives of tensors [out, ...]: others, whose rows each follow from the same rows of these."""
        return function(*tensors)

    def put(self, name: str, codes: Tensor, weight: Tensor | None = None) -> None:
        """Give a layer group codes, and a refitted weight if there is one: whole ones."""
        self.codes[name] = codes
        if weight is not None:
            self.weights[name] = weight


@contextmanager
def masked_forwards(
    layers: Mapping[str, nn.Module],
    codes: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    patterns: Mapping[str, NMPattern],
) -> Iterator[None]:
    """With layers that multiply under the masks, and with the weights, that stand in ``codes`` and ``weights`` then.

    A layer without one in ``weights`` has its own, and one without codes no mask.
    """

    def forward(name, layer):
        def multiply(input: Tensor) -> Tensor:
            # in place of a forward to which a hook might have brought its input
            input = input.to(layer.weight.device)
            weight = weights.get(name, layer.weight)
            if name not in codes:
                return nn.functional.linear(input, weight, layer.bias)
            return codes_linear(input, weight, codes[name], layer.bias, pattern=patterns[name])

        return multiply

    before = {layer: layer.__dict__.get("forward") for layer in layers.values()}
    try:
        for name, layer in layers.items():
            layer.forward = forward(name, layer)
        yield
    finally:
        for layer, own in before.items():
            del layer.forward
            if own is not None:
                layer.forward = own
