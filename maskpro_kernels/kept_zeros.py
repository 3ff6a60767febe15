"""The zeros of a finalized model, while its other weights are fine-tuned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .adapters import adapter_modules
from .functional.masks import expand_mask, top_n_mask
from .modules import check_in_memory
from .pattern import NMPattern


class KeptZeros:
    """Which weights of a model are kept, N of every M, so that an optimizer's step can be held to it.

    Holds the group codes of the nn.Linear layers whose weight follows the pattern, as after ``finalize``. Where fewer
    than N of a group are not zero, its first zeros count as kept.

    Args:
        model: with exact zeros.
        pattern: "N:M" or NMPattern.

    Attributes:
        layers: the layers that it holds, by name.
        left_out: names of the other nn.Linear layers with the reason, adapters apart.

    Raises:
        TypeError, ValueError: the weight of no layer follows the pattern, or one is not in memory.
    """

    def __init__(self, model: nn.Module, pattern: str | NMPattern):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected nn.Module, got {type(model).__name__}")
        self.pattern = NMPattern(pattern)
        self.layers: dict[str, nn.Linear] = {}
        self.left_out: dict[str, str] = {}
        self._codes: dict[str, Tensor] = {}
        # adapters begin as zeros, and follow any pattern
        adapters = adapter_modules(model)
        for name, layer in model.named_modules():
            if name in adapters or not isinstance(layer, nn.Linear):
                continue
            if layer.in_features % self.pattern.m:
                self.left_out[name] = f"in_features {layer.in_features} not divisible by {self.pattern.m}"
                continue
            check_in_memory("model", layer, name)
            kept = (layer.weight.detach() != 0).to(torch.bfloat16)
            counts = kept.view(layer.out_features, layer.in_features // self.pattern.m, self.pattern.m).sum(-1)
            # a layer of zeros alone was not pruned, only not trained yet
            if not counts.any():
                self.left_out[name] = "all zeros"
            elif (counts > self.pattern.n).any():
                share = float((counts > self.pattern.n).double().mean())
                self.left_out[name] = f"{share:.0%} of its groups have more than {self.pattern.n} that are not zero"
            else:
                self.layers[name], self._codes[name] = layer, top_n_mask(kept, self.pattern)
        if not self.layers:
            raise ValueError(f"pattern: expected one that some layer follows, {self.pattern} is followed by none")

    @torch.no_grad()
    def restore(self) -> None:
        """Set to zero what is not kept; to be called after each step of an optimizer."""
        for name, layer in self.layers.items():
            layer.weight.masked_fill_(~expand_mask(self._codes[name], self.pattern), 0.0)
