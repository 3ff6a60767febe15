"""Memory that is moved into huge pages: where it lies, and that it stays what and where it is."""

from __future__ import annotations

import mmap

import torch

from maskpro_kernels import huge_pages
from maskpro_kernels.huge_pages import HUGE_PAGE, move_into_huge_pages, ranges

PAGE = mmap.PAGESIZE


def test_ranges_are_whole_pages_of_neighbours_and_hold_little_else():
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

    whole = Piece(3 * PAGE + 100, HUGE_PAGE), Piece(HUGE_PAGE + 100 * PAGE, HUGE_PAGE)
    small, scattered = Piece(6 * HUGE_PAGE, PAGE), (Piece(5 * HUGE_PAGE, PAGE), Piece(6 * HUGE_PAGE - PAGE, PAGE))
    found = ranges([small, *whole, Piece(0, 0)])
    assert all(start % PAGE == end % PAGE == 0 for start, end in found)
    end = whole[1].start + HUGE_PAGE
    assert found == [(whole[0].start // PAGE * PAGE, -(-end // PAGE) * PAGE)]
    assert not ranges([*scattered, small])


def test_tensors_stay_what_and_where_they_are():
    tensors = [torch.randn(1 << 20), torch.randint(0, 256, (5 << 20,), dtype=torch.uint8), torch.randn(3)]
    before = [(x.data_ptr(), x.clone()) for x in tensors]
    move_into_huge_pages(tensors)
    for x, (place, content) in zip(tensors, before, strict=True):
        assert x.data_ptr() == place and torch.equal(x, content)


def test_a_system_that_refuses_or_has_no_such_call_changes_nothing(monkeypatch):
    asked = []
    monkeypatch.setattr(huge_pages, "_madvise", lambda: lambda *args: asked.append(args) or -1)
    move_into_huge_pages([torch.ones(HUGE_PAGE), torch.ones(HUGE_PAGE, device="meta")])
    assert len(asked) == 1 and asked[0][2] == huge_pages.MADV_COLLAPSE
    monkeypatch.setattr(huge_pages, "_madvise", lambda: None)
    move_into_huge_pages([torch.ones(HUGE_PAGE)])
