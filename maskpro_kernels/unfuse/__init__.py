"""Modules that multiply with matrices of their own, written as nn.Linear layers, and back again.

Masks are learned on nn.Linear layers. Some modules hold such matrices in another way: transposed (``Conv1DForm``), or
all experts of a mixture in one parameter (``experts.py``). Here they are taken apart, so that everything that knows
nn.Linear knows them, and put together again for a dense checkpoint, whose names and shapes are then those that the
model's authors gave it.

A new form is a class like those, and an entry in ``FORMS`` of ``rewriting.py``.
"""

from .experts import expert_groups
from .rewriting import (
    Matrix,
    as_built,
    as_linears,
    in_linear_form,
    lost_with,
    matrices,
    taken_apart,
)

__all__ = [
    "Matrix",
    "as_built",
    "as_linears",
    "expert_groups",
    "in_linear_form",
    "lost_with",
    "matrices",
    "taken_apart",
]
