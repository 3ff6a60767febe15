"""Operands of asynchronous products in shared memory, by their descriptors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ...findings import refusal
from . import descriptors

if TYPE_CHECKING:
    from ..batch import Batch
    from ..parser import Instruction

# of an element
BYTES = np.arange(2)


def shared_matrix(
    batch: Batch, values: np.ndarray, threads: np.ndarray, decode: Callable, shape: tuple[int, bool], ins: Instruction
) -> tuple[np.ndarray, np.ndarray]:
    """(uint16 [n, rows, DEPTH], places [n, bytes]) of the matrices that n descriptors point to.

    ``threads`` [n, k] are those of a CTA each that issue the products. ``decode`` makes a ``Descriptor`` of each;
    ``shape`` is (rows, whether they are K-major).
    """
    distinct, which = np.unique(values, return_inverse=True)
    try:
        tables = np.stack([descriptors.offsets(decode(int(value)), *shape) for value in distinct])
    except ValueError as error:
        raise refusal(ins, str(error)) from None
    ctas = batch.cta[threads[:, 0]]
    places = batch.shared.positions(tables[which], ctas[:, None, None], BYTES.size, ins)[..., None] + BYTES
    data = batch.shared.gather(places, threads, ins)
    return data.view(np.uint16)[..., 0], places.reshape(len(values), -1)
