"""Packed weights on a CPU: compiled code that places their values in columns, and multiplies with them.

Other modules call ``products``. By the CPU's ``instructions`` it uses ``rows`` or ``gathered`` for a few tokens,
``tiles`` for many tokens with AMX, and otherwise blocks of rows that code of ``weight`` unpacks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...reference.groups import SCALED

# Weights of a row to place together; each run of a pattern has equally many kept ones
RUN = 32


class Packed(NamedTuple):
    """Kind of packed weight and operand.

    Attributes:
        n, m: the pattern.
        values: dtype of the values: of int4 uint8.
        x: dtype of the operand and of the product, or of the unpacked weight.
        group: number of integers of a row that share a scale.
    """

    n: int
    m: int
    values: torch.dtype
    x: torch.dtype
    group: int = SCALED

    @property
    def scaled(self) -> bool:
        """Return whether values are integers."""
        return self.values in (torch.int8, torch.uint8)

    @property
    def in_byte(self) -> int:
        """Number of values in an element of their dtype: 2 of int4, else 1."""
        return 2 if self.values == torch.uint8 else 1

    @property
    def kept(self) -> int:
        """Number of values of a run."""
        return RUN * self.n // self.m

    @property
    def scaled_runs(self) -> int | None:
        """Number of runs that share a scale; None if it is not a whole number."""
        return self.group // self.kept if self.group % self.kept == 0 else None
