"""Bytes of torch's allocator on the CPU."""

from __future__ import annotations

import gc
from typing import NamedTuple

from torch.profiler import ProfilerActivity, profile


class Allocated(NamedTuple):
    """Largest number of bytes at once during an action, and bytes after it."""

    peak: int
    left: int


def allocated(action) -> Allocated:
    """Counted by torch's allocator; earlier memory that the action frees is subtracted."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        action()
        gc.collect()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return Allocated(peak, live)
