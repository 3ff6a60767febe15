"""The curvature of a loss that offers a ``fisher_loss``: squares of the gradients of outputs under sampled labels."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from .. import ops
from ..counter import MaskSource
from ..functional.checks import describe
from ..modules import MaskedLinear
from .step import Step


class FisherSquares:
    """The second factor of F, see ``ops.straight_through_grad``, of each layer: a running mean over Fisher passes.

    A Fisher pass is a forward and a backward of ``loss_fn.fisher_loss(model, batch, seed)``, whose gradient squared has
    the curvature of the loss as its mean. What a layer keeps is the sum over tokens of the squares of its outputs'
    gradients, times the number of tokens: over those of another batch it stays the same. The first passes count alike,
    later ones by ``decay``.

    Args:
        layers: by name.
        decay: share of the running mean that a pass leaves, in [0, 1).

    Attributes:
        squares: float32 [out] of each layer, on the device of its weight; zeros before the first pass.
        passes: how many passes each layer has had.
    """

    def __init__(self, layers: Mapping[str, MaskedLinear], decay: float):
        self.layers, self.decay = layers, decay
        self.squares = {
            name: torch.zeros(len(layer.weight), dtype=torch.float32, device=layer.weight.device)
            for name, layer in layers.items()
        }
        self.passes = dict.fromkeys(layers, 0)
        self._warned = False

    def known(self) -> dict[str, Tensor]:
        """The squares of layers that have had a pass."""
        return {name: square for name, square in self.squares.items() if self.passes[name]}

    def after_pass(self, step: Step) -> dict[str, Tensor]:
        """What ``known`` becomes by a Fisher pass over the batches of a step, within its ``drawing``; nothing changes.

        All ranks get the same. Layers that the pass does not reach, or in which a square is not finite, are as before;
        of the latter rank 0 warns once.
        """
        found = {name: torch.zeros_like(square) for name, square in self.squares.items()}
        reached = dict.fromkeys(self.layers, 0.0)
        for _, place in step.sharing.own:
            weight = float(step.weights[place])
            for name, square in self._squares_of(step, place).items():
                found[name] += weight * square
                reached[name] += weight
        # one transfer, and one collective on several ranks
        device = next(iter(found.values())).device
        shares = torch.tensor(list(reached.values()), dtype=torch.float32, device=device)
        flat = torch.cat([*(square.to(device) for square in found.values()), shares])
        step.sharing.ranks.sum_(flat)
        *parts, shares = flat.split([*(len(square) for square in found.values()), len(shares)])
        finite = torch.stack([part.isfinite().all() for part in parts])
        after, bad = self.known(), []
        # again one transfer
        usable, came = torch.stack([finite & (shares > 0), shares > 0]).tolist()
        for name, part, share, is_usable, has_come in zip(found, parts, shares, usable, came, strict=True):
            if is_usable:
                own = self.squares[name]
                after[name] = own.lerp((part / share).to(own.device), max(1.0 - self.decay, 1.0 / self._next(name)))
            elif has_come:
                bad.append(name)
        if bad and step.sharing.ranks.rank == 0:
            self._warn(step.index, bad)
        return after

    def _warn(self, step: int, bad: list[str]) -> None:
        if not self._warned:
            warnings.warn(
                f"fisher_loss of step {step}: expected finite squares of gradients, got others in {bad}; these layers "
                "go by earlier passes, or by their own gradient where there was none. This is told once",
                stacklevel=2,
            )
        self._warned = True

    def _next(self, name: str) -> int:
        return self.passes[name] + 1

    def take(self, after: Mapping[str, Tensor]) -> None:
        """Go on from what ``after_pass`` has given."""
        for name, square in after.items():
            if square is not self.squares[name]:
                self.squares[name].copy_(square)
                self.passes[name] = self._next(name)

    def _squares_of(self, step: Step, place: int) -> dict[str, Tensor]:
        """Of one batch, of the layers that backward reaches."""
        with self._attached() as collectors:
            loss = step.loss_fn.fisher_loss(step.model, step.batches[place], _seed_of(step, place))
            if not (isinstance(loss, Tensor) and loss.requires_grad):
                raise ValueError(f"loss_fn: expected a fisher_loss with a gradient, got {describe(loss)}")
            torch.autograd.backward(loss, inputs=[layer.logits for layer in self.layers.values()])
        return {name: c.total / c.uses for name, c in collectors.items() if c.uses}

    @contextmanager
    def _attached(self) -> Iterator[dict[str, _Collector]]:
        before = {name: layer.logits_backward for name, layer in self.layers.items()}
        collectors = {name: _Collector() for name in self.layers}
        try:
            for name, layer in self.layers.items():
                layer.logits_backward = collectors[name]
            yield collectors
        finally:
            for name, layer in self.layers.items():
                layer.logits_backward = before[name]


def _seed_of(step: Step, place: int) -> int:
    """Of the labels of a batch: another one for each step and batch of a run."""
    told = f"fisher labels {step.seed} {step.index} {place}".encode()
    return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "big") >> 1


class _Collector:
    """A ``logits_backward`` that sums up the squares of a layer's output gradients, by its uses in a pass.

    Attributes:
        moves_logits: true, for what it keeps is of one pass, and of no compiled graph; see ``MaskedLinear``.
        takes_shards: see ``check_takes_shards``.
    """

    moves_logits = takes_shards = True

    def __init__(self):
        self.total: Tensor | float = 0.0
        self.uses = 0

    def __call__(self, grad: Tensor, x: Tensor, weight: Tensor, mask: MaskSource) -> None:
        self.total = self.total + ops.column_squares(grad) * len(grad)
        self.uses += 1
