"""The zeros of a finalized model, while its other weights are fine-tuned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .fsdp import check_in_memory
from .functional.masks import expand_mask, top_n_mask
from .ops.pattern import NMPattern
from .unfuse import Matrix, adapter_modules, matrices


class KeptZeros:
    """Which weights of a model are kept, N of every M, so that an optimizer's step can be held to it.

    Holds the group codes of the matrices that follow the pattern, as after ``finalize``: of nn.Linear layers, and of
    modules that ``convert`` would take apart, such as experts. Where fewer than N of a group are not zero, its first
    zeros count as kept.

    Args:
        model: with exact zeros.
        pattern: "N:M" or NMPattern.

    Attributes:
        held: the matrices that it holds to the pattern, by the names of their parameters; ``get()`` of each gives it.
        left_out: names of the other parameters with the reason, adapters apart.

    Raises:
        TypeError, ValueError: no matrix follows the pattern, or one is not in memory.
    """

    def __init__(self, model: nn.Module, pattern: str | NMPattern):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected nn.Module, got {type(model).__name__}")
        self.pattern = NMPattern(pattern)
        self.held: dict[str, Matrix] = {}
        self.left_out: dict[str, str] = {}
        self._codes: dict[str, Tensor] = {}
        # adapters begin as zeros, and follow any pattern
        adapters = adapter_modules(model)
        for name, matrix in matrices(model).items():
            if name.rpartition(".")[0] in adapters:
                continue
            weight = matrix.get().detach()
            if weight.shape[-1] % self.pattern.m:
                self.left_out[name] = f"its {weight.shape[-1]} inputs are not divisible by {self.pattern.m}"
                continue
            check_in_memory("model", matrix.module, name, weight)
            kept = (weight != 0).to(torch.bfloat16).reshape(-1, weight.shape[-1]).contiguous()
            counts = kept.view(-1, self.pattern.m).sum(-1)
            # a layer of zeros alone was not pruned, only not trained yet
            if not counts.any():
                self.left_out[name] = "all zeros"
            elif (counts > self.pattern.n).any():
                share = float((counts > self.pattern.n).double().mean())
                self.left_out[name] = f"{share:.0%} of its groups have more than {self.pattern.n} that are not zero"
            else:
                self.held[name], self._codes[name] = matrix, top_n_mask(kept, self.pattern)
        if not self.held:
            raise ValueError(
                f"pattern: expected one that some layer follows, {self.pattern} is followed by none; a masked model is "
                "finalized first, and the values of a packed one keep the pattern by themselves"
            )

    @torch.no_grad()
    def restore(self) -> None:
        """Set to zero what is not kept; to be called after each step of an optimizer."""
        for name, matrix in self.held.items():
            weight = matrix.get()
            weight.masked_fill_(~expand_mask(self._codes[name], self.pattern).view(weight.shape), 0.0)
