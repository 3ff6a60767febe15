"""A power cut after any operation on a run's files: the run ends with the bits of a whole one."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.cases import cases
from helpers.power_cuts import Failing, Kill, Watched
from helpers.watched_runs import Continued, SmallRun, reported, resumed, thinned, watched_run

from maskpro_kernels.learn import journal

pytestmark = pytest.mark.usefixtures("compiled_reference")

# Of a run that is killed on its way
STEPS = 12


@pytest.fixture
def no_sync(monkeypatch):
    """No further power cuts happen in continued runs."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.mark.parametrize(
    ("how", "number"),
    [
        ("reinforce", 10),
        ("straight-through", 6),
        *(
            pytest.param(how, None, marks=pytest.mark.slow)
            for how in ("reinforce", "straight-through", "refreshed", "three draws", "trained weights")
        ),
    ],
)
def test_a_power_cut_loses_no_step_that_was_reported(tmp_path, monkeypatch, no_sync, how, number):
    watched, whole = watched_run(tmp_path / "whole", how, monkeypatch)
    print(f"{how}: {watched.cuts} operations, {len(watched.states)} states")
    continued = Continued(how)
    for index, state in enumerate(thinned(watched.states.values(), number)):
        assert continued.learned(state, tmp_path / str(index)) == whole, state.how


def renamed_before_it_is_synced(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
    for synced in (path, path.parent):
        descriptor = os.open(synced, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


FAULTS = {
    "the journal is not synced": ("reinforce", {"ignored": lambda path: path.name == "journal"}),
    "the journal is renamed before it is synced": ("reinforce", {}),
    "folders are not synced": ("reinforce", {"ignored": lambda path: path.is_dir()}),
    "folders of snapshots are not synced": ("straight-through", {"ignored": lambda path: path.is_dir()}),
    "snapshots are renamed and not synced": (
        "straight-through",
        {"ignored": lambda path: path.name.startswith("snapshot-")},
    ),
}
# One for each estimator
ORDINARY = ("the journal is not synced", "snapshots are renamed and not synced")
FOUND = "steps are left of|were reported as done|expected a folder without a run"


@pytest.mark.parametrize("fault", cases(((name,) for name in FAULTS), slow=lambda name: name not in ORDINARY))
def test_a_run_that_does_not_sync_is_found(tmp_path, monkeypatch, no_sync, fault):
    how, watch = FAULTS[fault]
    with monkeypatch.context() as patched:
        if "before" in fault:
            patched.setattr(journal, "write_whole", renamed_before_it_is_synced)
        watched, _ = watched_run(tmp_path / "whole", how, monkeypatch, **watch)
    with pytest.raises((AssertionError, ValueError), match=FOUND):
        for index, state in enumerate(watched.states.values()):
            # which has nothing to do where the run continues
            resumed(state, tmp_path / str(index), how).trainer.begin()


# Operations that a process is killed before, counted from 0
KILLS = {
    "reinforce": {
        "fsync": (0, 1, 2, 3, 4, 5, 6, 9, 10, 11),
        "write": (2, 3, 4, 5),
        "replace": (0, 1, 2),
        "unlink": (3,),
    },
    "straight-through": {"fsync": (0, 1, 2, 3, 4, 5, 6), "write": (1, 2, 7), "replace": (0, 1, 2), "unlink": (2,)},
}


@pytest.mark.parametrize(
    ("how", "operation", "one", "number"),
    [
        ("reinforce", "fsync", 6, 4),
        pytest.param("straight-through", "fsync", 0, 2, marks=pytest.mark.slow),
        *(
            pytest.param(how, operation, one, 60, marks=pytest.mark.slow)
            for how, operations in KILLS.items()
            for operation, which in operations.items()
            for one in which
        ),
    ],
)
def test_a_power_cut_after_a_kill_loses_no_step_that_was_reported(
    tmp_path, monkeypatch, no_sync, how, operation, one, number
):
    """Data of a killed process is there for the next one, perhaps not on disk."""
    whole = SmallRun(tmp_path / "whole", how, STEPS).take()
    root = tmp_path / "killed"
    root.mkdir()
    with Watched(root, error=Failing(None, operation, one)) as watched, reported(watched, monkeypatch):
        killed = SmallRun(root, how, STEPS)
        with suppress(Kill):
            killed.take()
        assert watched.dead
        killed.trainer.close()
        watched.revive()
        again = SmallRun(root, how, STEPS)
        watched.acknowledge(again.resume(watched.acknowledged))
        assert again.take() == whole
    continued = Continued(how, STEPS)
    for index, state in enumerate(thinned(watched.states.values(), number)):
        assert continued.learned(state, tmp_path / f"state {index}") == whole, state.how
