"""The instructions of this CPU, code that takes them, and packed weights unpacked by it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import cache
from .kind import RUN, Packed

if TYPE_CHECKING:
    from .instructions import Instructions

# Fewest weights that threads share: handing over takes as long as a thread takes for so many
SHARED_WEIGHTS = 1 << 16


@functools.cache
def available() -> Instructions | None:
    """The best instructions of this CPU for packed weights, if it has any."""
    # here and below, for it brings all of LLVM
    from .. import machine
    from . import instructions

    return instructions.chosen(machine.features())


def compiled(name: str, arguments: int, build: Callable[..., str], *made_of) -> Callable[..., None]:
    """``loop(count, threads, *arguments)`` of the code that ``build(*made_of)`` gives."""
    from .. import machine

    features = sorted(feature for feature, has in machine.features().items() if has)
    code, _ = cache.compiled(name, (made_of, features), lambda: (machine.object_code(build(*made_of)), ()))
    return machine.loaded_loop(code, arguments)


def threads(weights: int) -> int:
    return torch.get_num_threads() if weights >= SHARED_WEIGHTS else 1


@functools.cache
def unpacker(kind: Packed) -> Callable[[Tensor, Tensor, int, int], Tensor] | None:
    """``unpacked(values, bitmask, first, count)``: of all rows ``count`` runs from ``first`` on, if code can do it."""
    use = available()
    if use is None:
        return None
    try:
        from . import unpack

        loop = compiled("packed_unpack", 7, unpack.unpack, kind, use)
    except Exception as error:
        first_line = (str(error) or repr(error)).splitlines()[0]
        warnings.warn(f"compilation failed ({first_line}); maskpro_kernels unpacks more slowly", stacklevel=4)
        return None

    def unpacked(values: Tensor, bitmask: Tensor, first: int, count: int) -> Tensor:
        rows, k = values.shape[0], values.shape[1] // kind.n * kind.m
        columns = min(RUN * count, k - RUN * first)
        out = torch.empty(rows, columns, dtype=values.dtype, device="cpu")
        places = values.data_ptr(), bitmask.data_ptr(), out.data_ptr()
        loop(rows, threads(rows * columns), k, first, count, columns, *places)
        return out

    return unpacked
