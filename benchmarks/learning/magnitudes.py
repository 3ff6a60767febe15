"""Learners of all weights whose mask is the N largest magnitudes of each group: SR-STE and CAST.

SR-STE (Zhou et al. 2021, arXiv 2102.04010) multiplies by the masked weights, and moves kept and dropped weights by the
gradient of the masked ones. The gradient of a dropped weight w gets ``decay`` * w in addition, so that the weight is
kept less easily again. The mask is chosen anew in each step. Here Adam takes this gradient; the paper has momentum.

CAST (Huang et al. 2025, arXiv 2509.25996) multiplies by all weights, times a learned scale for each block of a row. Its
AdamS adds lambda_t * sign(w) to the first moment of weights outside the mask; the sum moves the weights, and its square
enters the second moment. lambda_t rises over the steps, so that at the end little is left to drop. The mask is chosen
anew every 10 steps. The dense model teaches.

What the paper leaves open, or is not like it, here: the steps of Adam are those of the authors' earlier trainer (AST,
arXiv 2407.20584), with the L1 decay where that has an L2 decay. lambda_t is relative to the root mean square of the
layer's gradients, and rises linearly. Rates fall linearly to 0, without a warm-up. Blocks have 64 columns.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from relaxed import RelaxedMask
from torch import Tensor

from maskpro_kernels.functional.masks import expand_mask, top_n_mask
from maskpro_kernels.learn.estimator import check_float
from maskpro_kernels.modules import MaskedLinear

# Columns of a row that share a scale of CAST
BLOCK = 64


class Magnitudes(RelaxedMask):
    """Base of learners of all weights; ``learned`` is the float32 weight, and may have further columns.

    Args:
        steps: how many there will be.
        lr: of Adam; falls linearly to 0.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    def start(self, layer: MaskedLinear) -> Tensor:
        return layer.weight.detach().float().clone()

    def lr_at(self, step: int) -> float:
        return self.lr * (1.0 - step / self.steps)

    def dense(self, layer: MaskedLinear, learned: Tensor) -> Tensor:
        """The dense weight [out, K]."""
        return learned

    def codes(self, layer: MaskedLinear, learned: Tensor) -> Tensor:
        return top_n_mask(self.dense(layer, learned.detach()).abs(), layer.pattern)

    def mask(self, layer: MaskedLinear, learned: Tensor) -> Tensor:
        """Bool [out, K]: the N largest magnitudes of each group."""
        return expand_mask(self.codes(layer, learned), layer.pattern)

    def sparse_weights(self, layers: Mapping[str, MaskedLinear]) -> dict[str, Tensor]:
        """The learned weights [out, K] under their masks, in the weights' dtypes, by layer."""
        weights = {}
        for name, learned in self.learned.items():
            layer = layers[name]
            weight = self.dense(layer, learned.detach()) * self.mask(layer, learned)
            weights[name] = weight.to(layer.weight.dtype)
        return weights


class SRSTE(Magnitudes):
    """SR-STE.

    Args:
        steps, lr: as for ``Magnitudes``.
        decay: lambda_W of the paper.
    """

    name = "sr-ste"
    options = {"lr": 1e-4, "decay": 2e-4}

    def __init__(self, steps: int, lr: float = 1e-4, decay: float = 2e-4):
        super().__init__(steps, lr)
        check_float("decay", decay, 0.0)
        self.decay = float(decay)

    def weight(self, layer: MaskedLinear, learned: Tensor, step: int, noise: torch.Generator) -> Tensor:
        # the value of the masked weight, and its gradient for kept and dropped weights
        return learned.detach() * self.mask(layer, learned) + (learned - learned.detach())

    def descend(self, name: str, layer: MaskedLinear, grad: Tensor, step: int) -> None:
        learned = self.learned[name].detach()
        grad.add_(learned * ~self.mask(layer, learned), alpha=self.decay)
        super().descend(name, layer, grad, step)


class CAST(Magnitudes):
    """CAST with its AdamS.

    Args:
        steps, lr: as for ``Magnitudes``.
        decay: lambda_t at its highest, relative to the root mean square of a layer's gradients.
        rising: share of the steps over which lambda_t rises.
    """

    name = "cast"
    options = {"lr": 1e-3, "decay": 3.0, "rising": 0.5}
    # steps from a choice of the mask to the next
    every = 10

    def __init__(self, steps: int, lr: float = 1e-3, decay: float = 3.0, rising: float = 0.5):
        super().__init__(steps, lr)
        check_float("decay", decay, 0.0)
        check_float("rising", rising, 0.0, 1.0, strict=True)
        self.decay = float(decay)
        self.rising = float(rising)

    def begin(self, layers: Mapping[str, MaskedLinear]) -> None:
        super().begin(layers)
        self._kept = {name: self.mask(layer, self.learned[name]) for name, layer in layers.items()}

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {f"{name}/kept": mask for name, mask in self._kept.items()}

    def start(self, layer: MaskedLinear) -> Tensor:
        weight = super().start(layer)
        scales = weight.new_ones(len(weight), -(-layer.in_features // BLOCK))
        return torch.cat([weight, scales], 1)

    def dense(self, layer: MaskedLinear, learned: Tensor) -> Tensor:
        k = layer.in_features
        scales = learned[:, k:].repeat_interleave(BLOCK, 1)[:, :k]
        return learned[:, :k] * scales

    def weight(self, layer: MaskedLinear, learned: Tensor, step: int, noise: torch.Generator) -> Tensor:
        return self.dense(layer, learned)

    def decay_at(self, step: int) -> float:
        return self.decay * min((step + 1) / (self.rising * self.steps), 1.0)

    def descend(self, name: str, layer: MaskedLinear, grad: Tensor, step: int) -> None:
        learned = self.learned[name].detach()
        weight = learned[:, : layer.in_features]
        kept = self._kept[name]
        first, second = self.betas
        mean = self._means[name].lerp_(grad, 1.0 - first)
        strength = grad[:, : layer.in_features].square().mean().sqrt() * self.decay_at(step)
        update = mean.clone()
        update[:, : layer.in_features] += weight.sign() * ~kept * strength
        square = self._squares[name].lerp_(update.square(), 1.0 - second)
        count = step + 1
        root = (square / (1.0 - second**count)).sqrt_().add_(self.eps)
        learned.addcdiv_(update, root, value=-self.lr_at(step) / (1.0 - first**count))
        if count % self.every == 0:
            kept.copy_(self.mask(layer, learned))
