"""Operands that are several registers in braces."""

from __future__ import annotations

import numpy as np

from ...findings import refusal
from ..parser import Instruction, Kernel, Vector
from ..registry import destination, reader


def _registers(operand, count: int, ins: Instruction) -> tuple:
    """The operands of a vector of ``count``."""
    if not isinstance(operand, Vector) or len(operand.operands) != count:
        raise refusal(ins, f"{count} registers in braces are expected, not {operand}")
    return operand.operands


def destinations(operand, count: int, dtype: type, ins: Instruction, kernel: Kernel) -> list[int]:
    return [destination(one, dtype, ins, kernel) for one in _registers(operand, count, ins)]


def readers(operand, count: int, dtype: type, ins: Instruction, kernel: Kernel) -> list:
    return [reader(one, dtype, ins, kernel) for one in _registers(operand, count, ins)]


def read_all(reads: list, batch, mask) -> list[np.ndarray]:
    """[T] of each register."""
    return [batch.full(read(batch, mask)) for read in reads]
