"""What torch's allocator on the CPU has given out."""

from __future__ import annotations

import gc
from typing import NamedTuple

from torch.profiler import ProfilerActivity, profile


class Allocated(NamedTuple):
    """Bytes that an action has held at once, and those that it has left."""

    peak: int
    left: int


def allocated(action) -> Allocated:
    """As torch's allocator counts them; what the action frees of before counts against them."""
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
