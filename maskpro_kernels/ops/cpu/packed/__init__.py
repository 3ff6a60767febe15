"""Packed weights on a CPU: code that puts their values at their places, and multiplies with them.

``products`` is what others call. It chooses one of several ways by the ``instructions`` that the CPU has: ``rows`` for
a few tokens, ``tiles`` for many where there is AMX, else blocks of rows that are unpacked by code of ``weight``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...reference.groups import SCALED

# Weights of a row that are placed together: all patterns keep as many of each run
RUN = 32


class Packed(NamedTuple):
    """A kind of packed weight, and what is done with it.

    Attributes:
        n, m: the pattern.
        values: dtype of the values.
        x: dtype of what they are multiplied with and of the product, or of the unpacked weight.
    """

    n: int
    m: int
    values: torch.dtype
    x: torch.dtype

    @property
    def kept(self) -> int:
        """Values of a run."""
        return RUN * self.n // self.m

    @property
    def scaled_runs(self) -> int | None:
        """Runs that share a scale; None where no whole number of runs does."""
        return SCALED // self.kept if SCALED % self.kept == 0 else None
