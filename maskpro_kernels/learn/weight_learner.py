"""Kept weights that learn: AdamW in the basis in which the inputs of a layer are not correlated.

The formula is in docs/mathematics.md, under Weights: SOAP (Vyas et al. 2024, arXiv 2409.11321) on the side of the
inputs, with a basis that stays. Two inputs of a language model's layer are correlated as a rule. AdamW scales the step
of each element by its own second moment, so a direction that many inputs share would set the pace of all of them.

The gradient is that in the masked weight, also of dropped weights. The basis belongs to all inputs; with zeros where
the mask drops, each row would need one of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..functional.masks import expand_mask
from ..modules import MaskedLinear
from ..ranks import Ranks

# Prefix of the name of a weight among the tensors of an estimator
WEIGHT = "weight/"
# Most inputs of a basis: those of a wider layer are cut into parts of equal size, each with its own
WIDEST = 1024
# Common for language models
BETA = 0.9
BETA_OF_SQUARES = 0.95
EPSILON = 1e-8


class WeightLearner:
    """AdamW on the kept weights of one layer, in the basis of its inputs, see the module.

    Bias correction counts the steps of the layer.

    Attributes:
        master: the weight in float32, from which 16 bits are rounded.
        first, second: moments of the gradient in the basis, float32 [out, K].
        basis: [parts, K / parts, K / parts], in float32, or bfloat16 for such a weight; its columns are the
            eigenvectors. Zeros before the first step. Layers with the same inputs share the tensor.
    """

    def __init__(self, layer: MaskedLinear):
        self.layer = layer
        # copy: an embedding, or the layer that this one was made from, may share the tensor
        layer.weight.data = layer.weight.detach().clone()
        self.master = layer.weight.detach().to(torch.float32)
        self.first = torch.zeros_like(self.master)
        self.second = torch.zeros_like(self.master)
        device = self.master.device
        self.count = torch.zeros((), device=device)
        width = self.master.shape[1]
        parts = next(parts for parts in range(1, width + 1) if width % parts == 0 and width // parts <= WIDEST)
        # a product of float16 would lose small gradients
        dtype = torch.bfloat16 if layer.weight.dtype == torch.bfloat16 else torch.float32
        self.basis = torch.zeros(parts, width // parts, width // parts, dtype=dtype, device=device)
        self.has_basis = False
        self.gram: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by prefix."""
        return {
            WEIGHT: self.master,
            "first/": self.first,
            "second/": self.second,
            "count/": self.count,
            "basis/": self.basis,
        }

    @torch.no_grad()
    def restore(self, latest: WeightLearner | None) -> None:
        """Set what follows from the tensors, after they were read; share an equal basis of ``latest``."""
        self.layer.weight.copy_(self.master)
        self.has_basis = bool(self.basis.any())
        if latest is not None and _are_equal(self.basis, latest.basis):
            self.basis = latest.basis
        if self.count > 0:
            self.layer.weight_changed = True

    @torch.no_grad()
    def collect(self, x: Tensor) -> None:
        """Add inputs [tokens, K] of the first step to the Gram matrix that the basis is computed from."""
        if self.has_basis:
            return
        parts = x.float().unflatten(1, self.basis.shape[:2]).transpose(0, 1)
        gram = parts.mT @ parts
        self.gram = gram if self.gram is None else self.gram.add_(gram)

    def sum_gram(self, ranks: Ranks) -> None:
        """Sum the Gram matrix over ranks, of which some may have collected no inputs."""
        if self.has_basis:
            return
        if self.gram is None:
            self.gram = torch.zeros_like(self.basis, dtype=torch.float32)
        ranks.all_reduce(self.gram)

    @torch.no_grad()
    def make_basis(self, latest: WeightLearner | None) -> None:
        """Compute the basis from the Gram matrix, or share that of ``latest``, whose Gram matrix may be equal."""
        gram = self.gram
        if latest is not None and latest.gram is not None and _are_equal(latest.gram, gram):
            self.basis = latest.basis
        elif gram.isfinite().all():
            self.basis = torch.linalg.eigh(gram)[1].to(self.basis.dtype).contiguous()
        else:
            # the gradient is not finite either, and the next step may be
            self.gram = None
            return
        self.has_basis = True
        if latest is not None:
            latest.gram = None

    @torch.no_grad()
    def step(self, gradient: Tensor, codes: Tensor, rate: float, norm: Tensor) -> None:
        """Move the kept weights by their gradient [out, K], without a transfer from the device.

        If ``norm``, 0-dim float32, is not finite, or there is no basis, nothing changes.
        """
        if not self.has_basis:
            return
        bad = ~torch.isfinite(norm)
        moved = torch.zeros_like(self.master)
        gradients = [self._turned(gradient, self.basis).float()]
        adamw([moved], gradients, [self.first], [self.second], [], [self.count], fused=True, found_inf=bad.float(),
              amsgrad=False, beta1=BETA, beta2=BETA_OF_SQUARES, lr=rate, weight_decay=0.0, eps=EPSILON,
              maximize=False)  # fmt: skip
        moved = self._turned(moved, self.basis.mT).float()
        self.master.add_(moved.masked_fill_(~expand_mask(codes, self.layer.pattern), 0.0))
        self.layer.weight.copy_(self.master)
        self.layer.weight_changed = True

    def _turned(self, rows: Tensor, basis: Tensor) -> Tensor:
        """Product of each part of rows [out, K] with its basis."""
        parts = rows.to(basis.dtype).unflatten(1, basis.shape[:2]).transpose(0, 1)
        return (parts @ basis).transpose(0, 1).flatten(1)


def _are_equal(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and one.dtype == other.dtype and torch.equal(one, other)
