"""Memory that is moved into huge pages: where it lies, and that it stays what and where it is."""

from __future__ import annotations

import mmap

import torch

from maskpro_kernels import huge_pages
from maskpro_kernels.huge_pages import HUGE_PAGE, move_into_huge_pages, ranges

PAGE = mmap.PAGESIZE


def test_ranges_are_whole_pages_and_neighbours_are_one():
    memory = torch.empty(8 * HUGE_PAGE, dtype=torch.uint8)

    class Piece:
        """A tensor with memory of its own at a place in ``memory``."""

        def __init__(self, start: int, size: int):
            self.start, self.size = memory.data_ptr() + start, size

        def numel(self):
            return self.size

        def data_ptr(self):
            return self.start

        @property
        def nbytes(self):
            return self.size

    near, far = (Piece(3 * PAGE + 100, 10), Piece(100 * PAGE, 5 * PAGE)), Piece(6 * HUGE_PAGE, PAGE)
    found = ranges([far, *near, Piece(0, 0)])
    assert all(start % PAGE == end % PAGE == 0 for start, end in found)
    assert found == [
        ((near[0].start) // PAGE * PAGE, -(-(near[1].start + 5 * PAGE) // PAGE) * PAGE),
        (far.start // PAGE * PAGE, -(-(far.start + PAGE) // PAGE) * PAGE),
    ]


def test_tensors_stay_what_and_where_they_are():
    tensors = [torch.randn(1 << 20), torch.randint(0, 256, (5 << 20,), dtype=torch.uint8), torch.randn(3)]
    before = [(x.data_ptr(), x.clone()) for x in tensors]
    move_into_huge_pages(tensors)
    for x, (place, content) in zip(tensors, before, strict=True):
        assert x.data_ptr() == place and torch.equal(x, content)


def test_a_system_that_refuses_or_has_no_such_call_changes_nothing(monkeypatch):
    asked = []
    monkeypatch.setattr(huge_pages, "_madvise", lambda: lambda *args: asked.append(args) or -1)
    move_into_huge_pages([torch.ones(8), torch.ones(8, device="meta")])
    assert len(asked) == 1 and asked[0][2] == huge_pages.MADV_COLLAPSE
    monkeypatch.setattr(huge_pages, "_madvise", lambda: None)
    move_into_huge_pages([torch.ones(8)])
