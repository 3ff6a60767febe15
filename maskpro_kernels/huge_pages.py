"""Weights in huge pages: a CPU that reads each weight once a token has to look up fewer addresses.

Decoding is bound by how fast weights come from memory. The CPU asks for what comes next by itself, but only up to the
end of a page.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Iterable

from torch import Tensor

# Linux's advice that memory be moved into huge pages at once, from 6.1 on; earlier ones refuse it
MADV_COLLAPSE = 25
HUGE_PAGE = 2 << 20


@functools.cache
def _madvise() -> Callable | None:
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None


def ranges(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """The [start, end) of the memory of tensors, in whole pages.

    Those that a huge page may hold together are one range. One that is mostly other memory is left out.
    """
    spans = sorted((x.data_ptr(), x.nbytes) for x in tensors if x.numel())
    joined: list[tuple[int, int, int]] = []
    for start, nbytes in spans:
        end = start + nbytes
        if joined and start - joined[-1][1] < HUGE_PAGE:
            first, last, filled = joined[-1]
            joined[-1] = first, max(last, end), filled + nbytes
        else:
            joined.append((start, end, nbytes))
    size = mmap.PAGESIZE
    return [
        (start // size * size, -(-end // size) * size)
        for start, end, filled in joined
        if end - start >= HUGE_PAGE and 2 * filled >= end - start
    ]


def move_into_huge_pages(tensors: Iterable[Tensor]) -> None:
    """Ask the system to hold tensors of the CPU in huge pages. Where it does not, all stays as it is.

    The tensors keep their addresses. Small ones that lie beside each other share a page.
    """
    madvise = _madvise()
    if madvise is None:
        return
    for start, end in ranges(x for x in tensors if x.device.type == "cpu"):
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_COLLAPSE)
