"""A disk that fails at any operation on a run's files: the run ends, and ends with the bits of a whole one."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from itertools import count

import pytest
from helpers.power_cuts import Failing, Watched
from helpers.watched_runs import Continued, SmallRun, reported

pytestmark = pytest.mark.usefixtures("compiled_reference")

STEPS = 7
# Operations of which one fails, None: all from one on; and how
FAILURES = [
    ("fsync", errno.EIO),
    (None, errno.EIO),
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
        ("reinforce", 31),
        pytest.param("straight-through", 23, marks=pytest.mark.slow),
        *(pytest.param(how, 1, marks=pytest.mark.slow) for how in ("reinforce", "straight-through", "refreshed")),
    ],
)
def test_an_error_of_the_disk_ends_a_run_and_loses_nothing(tmp_path, monkeypatch, how, every):
    """A power cut loses data of a failed sync, even after later syncs."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    whole, failed, cuts = SmallRun(tmp_path / "whole", how, STEPS).take(), 0, 0
    continued = Continued(how, STEPS)
    for operation, code in FAILURES:
        for number in count(step=every):
            root = tmp_path / f"{operation} {number} {code}"
            root.mkdir()
            failing = Failing(code, operation, number, lasting=operation is None)
            with Watched(root, error=failing) as watched, reported(watched, monkeypatch):
                run = SmallRun(root, how, STEPS)
                try:
                    assert run.take() == whole
                    # of a folder that is there already, and of a probe of the lock
                    assert not failing.came or operation in ("mkdir", "open"), f"{root.name}: nobody was reported"
                except OSError as caught:
                    assert caught.errno == code
                if not failing.came:
                    break
                with suppress(OSError):
                    run.trainer.close()
                # another process, once the disk is mended
                watched.error = lambda *_: None
                again = SmallRun(root, how, STEPS)
                watched.acknowledge(again.resume(watched.acknowledged))
                assert again.take() == whole, root.name
            failed += 1
            for index, state in enumerate(list(watched.states.values())[:: every * 2 - 1]):
                assert continued.learned(state, root / f"state {index}") == whole, f"{root.name}: {state.how}"
                cuts += 1
    print(f"{how}: {failed} errors, {cuts} power cuts after them")
