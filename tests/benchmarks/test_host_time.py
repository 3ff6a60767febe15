"""The benchmark of the host's time runs; its bounds are far above what a busy machine takes."""

from __future__ import annotations

import host_time

from maskpro_kernels.ops.triton import tiles


def test_calls_take_microseconds():
    target = tiles.ON_CPU
    found = host_time.measured(rounds=5, count=4)
    assert list(found) == list(host_time.calls()) and tiles.ON_CPU == target
    assert all(1 < time < 5000 for time in found.values()), found
