"""The instructions of this CPU, code that takes them, and packed weights unpacked by it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ....pattern import bitmask_of
from ... import reference
from .. import cache
from .kind import RUN, Packed

if TYPE_CHECKING:
    from .instructions import Instructions

# Of (values, bitmask, first run, number of runs)
Unpacked = Callable[[Tensor, Tensor, int, int], Tensor]

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
def unpacker(kind: Packed) -> Unpacked | None:
    """``unpacked(values, bitmask, first, count)``: of all rows ``count`` runs from ``first`` on, if code can do it."""
    use = available()
    if use is None:
        return None
    try:
        from . import blocks

        unpacked = _unpacked_by(compiled("packed_unpack", 7, blocks.unpack, kind, use), kind)
        _check(unpacked, kind)
    except Exception as error:
        first_line = (str(error) or repr(error)).splitlines()[0]
        warnings.warn(f"compilation failed ({first_line}); maskpro_kernels unpacks more slowly", stacklevel=4)
        return None
    return unpacked


def _unpacked_by(loop: Callable[..., None], kind: Packed) -> Unpacked:
    def unpacked(values: Tensor, bitmask: Tensor, first: int, count: int) -> Tensor:
        rows, k = values.shape[0], values.shape[1] // kind.n * kind.m
        columns = min(RUN * count, k - RUN * first)
        out = torch.empty((rows, columns), dtype=values.dtype, device="cpu")
        places = values.data_ptr(), bitmask.data_ptr(), out.data_ptr()
        loop(rows, threads(rows * columns), k, first, count, columns, *places)
        return out

    return unpacked


def _check(unpacked: Unpacked, kind: Packed) -> None:
    """Raise unless it unpacks a sample to the reference's bits."""
    generator = torch.Generator("cpu").manual_seed(0)
    rows, groups = 5, 3 * RUN // kind.m + 1
    scores = torch.rand((rows, groups, kind.m), generator=generator, device="cpu")
    bitmask = bitmask_of(reference.group_top_n_mask(scores, n=kind.n), kind.m)
    size, integers = kind.values.itemsize, reference.INTEGERS[kind.values.itemsize]
    values = torch.randint(0, 256, (rows, groups * kind.n * size), generator=generator, dtype=torch.uint8, device="cpu")
    values = values.view(kind.values)
    expected = reference.unpack_nm(values, bitmask, n=kind.n, m=kind.m)
    for first, count in ((0, 4), (1, 2)):
        columns = slice(RUN * first, RUN * (first + count))
        found = unpacked(values, bitmask, first, min(count, -(-groups * kind.m // RUN) - first))
        if not torch.equal(found.view(integers), expected[:, columns].contiguous().view(integers)):
            raise RuntimeError("what is unpacked differs from the reference")
