"""Writes beyond the end of an allocation are detected."""

from __future__ import annotations

import pytest
import torch

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
