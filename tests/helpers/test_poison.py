"""Writes beyond the end of an allocation are detected."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from helpers import poison


def test_what_is_allocated_is_let_go_but_checked_first(poisoned, monkeypatch):
    monkeypatch.setattr(poison, "MOST_KEPT", 10 * poison.MARGIN)
    for _ in range(3 * poison.NEWEST):
        poisoned.empty(5, dtype=torch.float32)
    assert len(poisoned.buffers) <= 2 * poison.NEWEST
    poisoned.buffers[0][-1] = 1.0
    with pytest.raises(AssertionError, match="wrote beyond the end"):
        for _ in range(2 * poison.NEWEST):
            poisoned.empty(5, dtype=torch.float32)
    poisoned.buffers.clear()


def test_memory_of_a_gpu_is_freed_with_its_tensor(poisoned):
    """A device without memory in place of one."""
    out = poisoned.empty(3, 5, dtype=torch.float32, device="meta")
    storage = StorageWeakRef(out.untyped_storage())
    assert out.shape == (3, 5) and not poisoned.buffers and not storage.expired()
    del out
    assert storage.expired()
