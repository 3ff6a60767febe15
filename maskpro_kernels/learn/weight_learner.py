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

from ..files import digest
from ..functional.masks import expand_mask
from ..modules import MaskedLinear
from ..ops.dispatch import without_autocast
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
        basis: float32 [parts, K / parts, K / parts]; its columns are the eigenvectors of the Gram matrix of inputs.
            Zeros before the first step. Layers with the same inputs share the tensor.
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
        self.basis = torch.zeros(parts, width // parts, width // parts, device=device)
        self.has_basis = False
        self.gram: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by prefix; ``make_basis`` replaces the basis."""
        return {
            WEIGHT: self.master,
            "first/": self.first,
            "second/": self.second,
            "count/": self.count,
            "basis/": self.basis,
        }

    @torch.no_grad()
    def restore(self, bases: dict[tuple, Tensor]) -> None:
        """Set what follows from the tensors, after they were read; share an equal one of ``bases``, else add its own.

        ``bases`` has the bases of other layers by device and digest.
        """
        self.layer.weight.copy_(self.master)
        self.has_basis = bool(self.basis.any())
        if self.has_basis:
            self.basis = bases.setdefault((self.basis.device, digest([self.basis])), self.basis)
        if self.count > 0:
            self.layer.weight_changed = True

    @torch.no_grad()
    def collect(self, x: Tensor) -> None:
        """Add inputs [tokens, K] to the Gram matrix, until there is a basis."""
        if self.has_basis:
            return
        parts = x.float().unflatten(1, self.basis.shape[:2]).transpose(0, 1)
        with without_autocast(x.device.type):
            gram = parts.mT @ parts
        self.gram = gram if self.gram is None else self.gram.add_(gram)

    @torch.no_grad()
    def make_basis(self, ranks: Ranks, bases: dict[tuple, Tensor]) -> None:
        """Compute the basis from the collected inputs of all ranks; some may have collected none.

        ``bases`` has the bases of this step by device and digest of the Gram matrix; share one, or add the new one.
        There is none yet if no rank has inputs other than 0, or if they are not finite.
        """
        gram = torch.zeros_like(self.basis) if self.gram is None else self.gram
        self.gram = None
        ranks.all_reduce(gram)
        if not (gram.isfinite().all() and gram.any()):
            return
        key = (gram.device, digest([gram]))
        if key not in bases:
            basis = _eigenvectors(gram)
            # another processor may round otherwise, and turn directions of about the same size
            ranks.broadcast(basis)
            bases[key] = basis
        self.basis = bases[key]
        self.has_basis = True

    @torch.no_grad()
    def step(self, gradient: Tensor, codes: Tensor, rate: float, norm: Tensor) -> None:
        """Move the kept weights by their gradient [out, K], without a transfer from the device.

        If ``norm``, 0-dim float32, is not finite, or there is no basis, nothing changes.
        """
        if not self.has_basis:
            return
        weight = self.layer.weight
        bad = ~torch.isfinite(norm)
        moved = torch.zeros_like(self.master)
        # in float32: rounded to 16 bits, strong directions would cover weak ones
        gradients = [self._turned(gradient.float(), self.basis)]
        adamw([moved], gradients, [self.first], [self.second], [], [self.count], fused=True, found_inf=bad.float(),
              amsgrad=False, beta1=BETA, beta2=BETA_OF_SQUARES, lr=rate, weight_decay=0.0, eps=EPSILON,
              maximize=False)  # fmt: skip
        # all directions move about as far, so bfloat16 is enough; float16 is not, for a small rate
        dtype = torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32
        moved = self._turned(moved.to(dtype), self.basis.mT.to(dtype)).float()
        # -0.0 keeps the sign of a dropped zero
        self.master.add_(moved.masked_fill_(~expand_mask(codes, self.layer.pattern), -0.0))
        if weight.dtype != torch.float32:
            weight.copy_(self.master)
        self.layer.weight_changed = True

    def _turned(self, rows: Tensor, basis: Tensor) -> Tensor:
        """Product of each part of rows [out, K] with its basis."""
        parts = rows.unflatten(1, basis.shape[:2]).transpose(0, 1)
        with without_autocast(rows.device.type):
            return (parts @ basis).transpose(0, 1).flatten(1)


def _eigenvectors(gram: Tensor) -> Tensor:
    """Eigenvectors of each finite matrix of a batch, in columns."""
    # the scale does not change them, and squares of large numbers are not finite in float32
    scaled = gram / gram.abs().amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(gram.dtype).tiny)
    try:
        vectors = torch.linalg.eigh(scaled)[1]
        if vectors.isfinite().all():
            return vectors.contiguous()
    except torch.linalg.LinAlgError:
        pass
    # slower, and converges where float32 does not
    return torch.linalg.eigh(scaled.double().cpu())[1].to(gram).contiguous()
