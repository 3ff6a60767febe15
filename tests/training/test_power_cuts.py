"""A power cut behind any operation on a run's files: the run goes on to the bits of a whole one."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.power_cuts import Kill, State, Watched, nth
from helpers.watched_runs import SmallRun, goes_on, thinned, told, watched_run

from maskpro_kernels.training import snapshots

pytestmark = pytest.mark.usefixtures("compiled_reference")


@pytest.fixture
def no_sync(monkeypatch):
    """What goes on here is not cut off any more."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.mark.parametrize(
    ("how", "number"),
    [
        ("reinforce", 20),
        ("straight-through", 10),
        *(
            pytest.param(how, None, marks=pytest.mark.slow)
            for how in ("reinforce", "straight-through", "refreshed", "three draws", "trained weights")
        ),
    ],
)
def test_a_power_cut_loses_no_step_that_was_told(tmp_path, monkeypatch, no_sync, how, number):
    watched, whole = watched_run(tmp_path / "whole", how, monkeypatch)
    print(f"{how}: {watched.cuts} operations, {len(watched.states)} states")
    for index, state in enumerate(thinned(watched.states.values(), number)):
        assert goes_on(state, tmp_path / str(index), how) == whole, state.how


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
    "folders are not synced": ("reinforce", {"ignored": lambda path: path.is_dir()}),
    "folders of snapshots are not synced": ("straight-through", {"ignored": lambda path: path.is_dir()}),
    "a snapshot is not synced": ("straight-through", {"ignored": lambda path: path.name.startswith("snapshot-")}),
    "a snapshot is renamed before it is synced": ("straight-through", {}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_that_does_not_sync_is_found(tmp_path, monkeypatch, no_sync, fault):
    how, watch = FAULTS[fault]
    if "renamed" in fault:
        monkeypatch.setattr(snapshots, "write_whole", renamed_before_it_is_synced)
    watched, whole = watched_run(tmp_path / "whole", how, monkeypatch, **watch)

    def lost(index: int, state: State) -> bool:
        try:
            return goes_on(state, tmp_path / str(index), how) != whole
        except (AssertionError, ValueError):
            return True

    assert any(lost(index, state) for index, state in enumerate(watched.states.values()))


# Operations of a run by each estimator that a process may be killed before, as (name, which ones)
KILLS = {
    "reinforce": {"fsync": (5, 6, 12, 13), "write": (4, 5, 12), "replace": (1, 2), "unlink": (3,)},
    "straight-through": {"fsync": (3, 4, 6), "write": (3, 7), "replace": (1, 2), "unlink": (3,)},
}


@pytest.mark.parametrize(
    ("how", "number"), [*((how, 1) for how in KILLS), *(pytest.param(how, 60, marks=pytest.mark.slow) for how in KILLS)]
)
def test_a_power_cut_behind_a_kill_loses_no_step_that_was_told(tmp_path, monkeypatch, no_sync, how, number):
    """What a killed process has written is there for the next one, though it may not be on disk."""
    whole = SmallRun(tmp_path / "whole", how, steps := 17).take()
    for operation, which in KILLS[how].items():
        for one in which:
            root = tmp_path / f"{operation} {one}"
            root.mkdir()
            with Watched(root, error=nth(operation, one, Kill)) as watched, told(watched, monkeypatch):
                killed = SmallRun(root, how, steps)
                with suppress(Kill):
                    killed.take()
                assert watched.dead
                killed.trainer.close()
                watched.revive()
                again = SmallRun(root, how, steps)
                watched.acknowledge(again.resume(watched.acknowledged))
                assert again.take() == whole
            for index, state in enumerate(thinned(watched.states.values(), number)):
                assert goes_on(state, root / f"state {index}", how, steps) == whole, f"{root.name}: {state.how}"
