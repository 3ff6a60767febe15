"""Keep the zeros of a finalized model while its other weights are fine-tuned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .functional.checks import check_in_memory
from .functional.masks import expand_mask, top_n_mask
from .ops.pattern import NMPattern
from .unfuse import Matrix, adapter_modules, matrices


class KeptZeros:
    """Group codes of a finalized model, with which it restores zeros after each step of an optimizer.

    It covers the matrices that follow the pattern: of nn.Linear layers, and of modules that ``convert`` would unfuse,
    such as experts. If fewer than N weights of a group are not zero, its first zeros count as kept.

    Args:
        model: with exact zeros.
        pattern: "N:M" or NMPattern.

    Attributes:
        held: the matrices whose zeros it keeps, by name of the parameter; ``get()`` of each returns the matrix.
        left_out: names of the other parameters with the reason, without adapters.

    Raises:
        TypeError, ValueError: no matrix follows the pattern, or a matrix is not in memory.
    """

    def __init__(self, model: nn.Module, pattern: str | NMPattern):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected nn.Module, got {type(model).__name__}")
        self.pattern = NMPattern(pattern)
        self.held: dict[str, Matrix] = {}
        self.left_out: dict[str, str] = {}
        self._codes: dict[str, Tensor] = {}
        # adapters start as zeros, which follow any pattern
        adapters = adapter_modules(model)
        for name, matrix in matrices(model).items():
            if name.rpartition(".")[0] in adapters:
                continue
            weight = matrix.get().detach()
            if weight.shape[-1] % self.pattern.m:
                self.left_out[name] = f"its {weight.shape[-1]} inputs are not divisible by {self.pattern.m}"
                continue
            check_in_memory("model", matrix.module, name, weight)
            nonzero = (weight != 0).to(torch.bfloat16).reshape(-1, weight.shape[-1]).contiguous()
            counts = nonzero.view(-1, self.pattern.m).sum(-1)
            # a layer of zeros is not pruned but not yet trained
            if not counts.any():
                self.left_out[name] = "all zeros"
            elif (counts > self.pattern.n).any():
                share = float((counts > self.pattern.n).double().mean())
                self.left_out[name] = f"{share:.0%} of its groups have more than {self.pattern.n} that are not zero"
            else:
                self.held[name] = matrix
                self._codes[name] = top_n_mask(nonzero, self.pattern)
        if not self.held:
            raise ValueError(
                f"pattern: expected one that some layer follows, got {self.pattern}, which none follows; finalize a "
                "masked model first; a packed model needs no KeptZeros"
            )

    @torch.no_grad()
    def restore(self) -> None:
        """Set all dropped weights to zero; call it after each step of an optimizer."""
        for name, matrix in self.held.items():
            weight = matrix.get()
            weight.masked_fill_(~expand_mask(self._codes[name], self.pattern).view(weight.shape), 0.0)
