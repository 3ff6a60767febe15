"""A power cut loses no step that a run has reported."""

from __future__ import annotations

import pytest
from helpers.disks import SyncedDisk
from helpers.small_trainer import a_trainer_in

from maskpro_kernels.learn.run import JOURNAL, METRICS, snapshots_in

pytestmark = pytest.mark.usefixtures("compiled_reference")


@pytest.mark.parametrize("how", ["reinforce", "refreshed", "straight-through", "trained weights"])
def test_a_reported_step_is_on_disk(tmp_path, monkeypatch, how):
    disk, folder = SyncedDisk(monkeypatch), tmp_path / "new" / "run"
    trainer = a_trainer_in(folder, how)
    for step in range(6):
        # a snapshot after every second step
        trainer.snapshot_minutes = 0.0 if step % 2 else 1e9
        trainer.step()
        for path in (folder.parent, folder, *snapshots_in(folder)):
            disk.check(path)
        if trainer.estimator.journaled:
            disk.check(folder / JOURNAL)
        elif step % 2:
            # nothing else has the losses of these steps
            disk.check(folder / METRICS)
    trainer.close()
    assert len(snapshots_in(folder)) == 3
    # replaces its journal and metrics
    a_trainer_in(folder, how).resume()
