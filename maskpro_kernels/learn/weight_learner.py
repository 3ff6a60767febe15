"""Kept weights that learn beside their mask."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..modules import MaskedLinear
from ..ops.reference import adamw_scalars

# Prefix of the name of a weight among the tensors of an estimator
WEIGHT = "weight/"


class WeightLearner:
    """AdamW on the kept weights of one layer, see ``ops/reference/slopes.py``.

    The loss does not depend on dropped weights, so they and their moments do not change until they are kept again. Bias
    correction counts the steps of the layer. ``master`` is the weight in float32, from which 16 bits are rounded.
    """

    def __init__(self, layer: MaskedLinear, decay: float):
        self.layer = layer
        self.decay = decay
        # copy: an embedding, or the layer that this one was made from, may share the tensor
        layer.weight.data = layer.weight.detach().clone()
        self.master = layer.weight.detach().to(torch.float32)
        self.first = torch.zeros_like(self.master)
        self.second = torch.zeros_like(self.master)
        self.count = torch.zeros((), device=self.master.device)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by prefix."""
        return {WEIGHT: self.master, "first/": self.first, "second/": self.second, "count/": self.count}

    @torch.no_grad()
    def restore(self) -> None:
        self.layer.weight.copy_(self.master)
        if self.count > 0:
            self.layer.weight_changed = True

    @torch.no_grad()
    def step(self, gradient: Tensor, codes: Tensor, rate: float, norm: Tensor) -> None:
        """Move the kept weights by their gradient [out, K], without a transfer from the device.

        If ``norm``, 0-dim float32, is not finite, nothing changes.
        """
        usable = torch.isfinite(norm)
        scalars = adamw_scalars(usable, self.count + 1, rate, self.decay)
        m = self.layer.pattern.m
        ops.adamw_(self.layer.weight, self.master, self.first, self.second, gradient, codes, scalars, m)
        self.count += usable
        self.layer.weight_changed = True
