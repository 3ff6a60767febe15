"""Kept weights that learn beside the logits: AdamW, one layer at a time, inside the backward pass."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .. import ops
from ..modules import MaskedLinear
from ..ops.reference import adamw_scalars


class WeightLearner:
    """AdamW on the weights of one layer that a step's mask keeps, see ``ops/reference/adamw.py``.

    A weight that the mask drops does not move, since the loss does not depend on it, and its moments stay as they are.
    It goes on from there once it is kept again. Bias correction counts the steps of the layer.

    Attributes:
        master: float32 [out, K]: the weight, itself where it is float32, else what its 16 bits are rounded from.
        first, second: the moments, float32 [out, K].
        count: how many steps have moved the layer, 0-dim float32.
    """

    def __init__(self, layer: MaskedLinear, decay: float):
        self.layer, self.decay = layer, decay
        # a tensor of its own: an embedding, or the layer that this one was made from, may share the one there is
        layer.weight.data = layer.weight.detach().clone()
        self.master = layer.weight.detach().to(torch.float32)
        self.first, self.second = torch.zeros_like(self.master), torch.zeros_like(self.master)
        self.count = torch.zeros((), device=self.master.device)

    def tensors(self) -> dict[str, Tensor]:
        """What steps change, 12 bytes a weight; 4 of them are the weight itself where it is float32."""
        return {"weight": self.master, "first": self.first, "second": self.second, "count": self.count}

    @torch.no_grad()
    def restore(self) -> None:
        """Set the weight to what ``tensors`` hold."""
        self.layer.weight.copy_(self.master)
        if self.count > 0:
            self.layer.weight_changed = True

    @torch.no_grad()
    def step(self, gradient: Tensor, codes: Tensor, rate: float, slope_square: Tensor) -> None:
        """Move what is kept, without a transfer from the device.

        Args:
            gradient: float32 [out, K], derivative of the loss in the masked weight.
            codes: of the mask of the step [out, K / M].
            rate: learning rate.
            slope_square: mean square of the slope of the step. Where it or the norm of the gradient is not finite, the
                layer stays as it is.
        """
        usable = torch.isfinite(slope_square + torch.linalg.vector_norm(gradient))
        scalars = adamw_scalars(usable, self.count + 1, rate, self.decay)
        held = self.layer.weight, self.master, self.first, self.second
        ops.adamw_(*held, gradient, codes, scalars, self.layer.pattern.m)
        self.count += usable
        self.layer.weight_changed = True


def check_weights(layers: Mapping[str, MaskedLinear]) -> None:
    """Raise ValueError unless each layer has a contiguous weight of its own."""
    by_address: dict[int, str] = {}
    for name, layer in layers.items():
        if not layer.weight.is_contiguous():
            raise ValueError(
                f"train_weights: expected layers with contiguous weights, got {layer.weight.stride()} in {name}"
            )
        other = by_address.setdefault(layer.weight.data_ptr(), name)
        if other != name and layer.weight.numel():
            raise ValueError(
                f"train_weights: expected a weight of its own in each layer, got one in {other} and {name}"
            )
