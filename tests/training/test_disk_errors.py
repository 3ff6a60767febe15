"""A disk that fails at any operation on a run's files: the run ends, and goes on to the bits of a whole one."""

from __future__ import annotations

import errno
import os
from functools import partial
from itertools import count

import pytest
from helpers.power_cuts import Watched, disk_error, nth
from helpers.watched_runs import GoingOn, SmallRun, told

pytestmark = pytest.mark.usefixtures("compiled_reference")

STEPS = 7
ERRORS = [
    ("fsync", errno.EIO),
    ("write", errno.EIO),
    ("write", errno.ENOSPC),
    ("close", errno.EIO),
    ("open", errno.EIO),
    ("replace", errno.EIO),
    ("unlink", errno.EIO),
    ("mkdir", errno.EIO),
]


@pytest.mark.parametrize(
    ("how", "every"),
    [
        *((how, 9) for how in ("reinforce", "straight-through")),
        *(pytest.param(how, 1, marks=pytest.mark.slow) for how in ("reinforce", "straight-through", "refreshed")),
    ],
)
def test_an_error_of_the_disk_ends_a_run_and_loses_nothing(tmp_path, monkeypatch, how, every):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    whole, failed = SmallRun(tmp_path / "whole", how, STEPS).take(), 0
    going_on = GoingOn(how, STEPS)
    for operation, code in ERRORS:
        for number in count(step=every):
            root = tmp_path / f"{operation} {number} {code}"
            root.mkdir()
            error = nth(operation, number, partial(disk_error, code))
            with Watched(root, error=error) as watched, told(watched, monkeypatch):
                run = SmallRun(root, how, STEPS)
                try:
                    assert run.take() == whole
                    break
                except OSError as caught:
                    assert caught.errno == code
                failed += 1
                run.trainer.close()
                again = SmallRun(root, how, STEPS)
                watched.acknowledge(again.resume(watched.acknowledged))
                assert again.take() == whole, root.name
            for index, state in enumerate(watched.states.values()):
                if index % (every * every) == 0:
                    assert going_on.learned(state, root / f"state {index}") == whole, f"{root.name}: {state.how}"
    print(f"{how}: {failed} errors")
