"""Packed weights on a CPU: compiled code that expands their values into columns, and multiplies with them.

Other modules call ``products``. By the CPU's ``instructions`` it uses ``rows`` or ``gathered`` for a few tokens,
``amx`` for many tokens with AMX, ``strips`` with bfloat16's instructions of AVX-512, and otherwise slices of rows that
code of ``weight`` unpacks.

Names are those of LLVM (``i8`` to ``i64``, vector, lane) and of the manuals of AVX2, AVX-512 and AMX (expand, tile),
and besides

- run: 32 weights of a row, whose bits of the bitmask are one ``i32``;
- span: 64 weights of a row, two runs: bytes of a 512-bit register;
- step: 128 weights of a row, to which quantized activations are padded;
- block: values of a row that share a scale, and their columns;
- strip: 32 rows of a weight, those of two AMX tiles or two 512-bit registers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...reference.groups import SCALED

# Weights of a run; each run of a pattern has equally many kept ones
RUN = 32


class Packed(NamedTuple):
    """Kind of packed weight and operand.

    Attributes:
        n, m: the pattern; 1 and 1 without a bitmask, if all weights are kept.
        values: dtype of the values: of int4 uint8.
        x: dtype of the operand and of the product, or of the unpacked weight.
        group: number of values of a block.
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
    def whole(self) -> bool:
        """Return whether all weights are kept."""
        return self.m == 1

    @property
    def values_per_element(self) -> int:
        """Number of values in an element of their dtype: 2 of int4, else 1."""
        return 2 if self.values == torch.uint8 else 1

    @property
    def values_per_run(self) -> int:
        """Number of kept values of a run."""
        return RUN * self.n // self.m

    @property
    def elements_per_run(self) -> int:
        """Number of elements of a run, of the values' dtype."""
        return self.values_per_run // self.values_per_element

    @property
    def runs_per_scale(self) -> int | None:
        """Number of runs of a block; None if it is not a whole number."""
        return self.group // self.values_per_run if self.group % self.values_per_run == 0 else None
