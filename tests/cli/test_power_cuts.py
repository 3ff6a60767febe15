"""Power cuts and disk errors in `maskpro learn`."""

from __future__ import annotations

import os
from itertools import count

import pytest
from helpers.command import learn, report
from helpers.disks import FailingDisk, SyncedDisk

from maskpro_kernels.cli import main
from maskpro_kernels.learn.trainer import MaskTrainer

pytestmark = pytest.mark.usefixtures("eager_reference")

WAYS = {"reinforce": [], "straight-through": ["--estimator", "straight-through", "--lr", "1", "--refit", "weights"]}


def arguments(inputs, folder, how: str) -> list[str]:
    return learn(inputs, folder, *WAYS[how], "--steps", "6", "--eval-every", "3")


@pytest.mark.parametrize("how", WAYS)
def test_what_a_run_has_learned_is_on_disk_before_its_report(inputs, tmp_path, monkeypatch, how):
    """A run with a report is one that has ended."""
    disk, run = SyncedDisk(monkeypatch), tmp_path / "run"
    replace, checked = os.replace, []

    def replaced(source, target) -> None:
        if target == run / "report.json":
            for path in [run, *run.iterdir(), *(run / "learned").iterdir()]:
                if path != source:
                    disk.check(path)
                    checked.append(path.name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", replaced)
    assert main.main(arguments(inputs, run, how)) == 0
    assert {"run", "settings.json", "model.safetensors", "config.json", "logits.safetensors"} <= set(checked)
    disk.check(run / "report.json")


@pytest.mark.parametrize(
    ("how", "numbers"), [("reinforce", [9]), *(pytest.param(how, count(), marks=pytest.mark.slow) for how in WAYS)]
)
def test_a_sync_that_fails_ends_the_command_in_one_line(inputs, tmp_path, capsys, monkeypatch, how, numbers):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setitem(MaskTrainer.__init__.__kwdefaults__, "snapshot_minutes", 0.0)
    assert main.main(arguments(inputs, tmp_path / "whole", how)) == 0
    whole = report(tmp_path / "whole")
    for number in numbers:
        run = tmp_path / str(number)
        capsys.readouterr()
        with monkeypatch.context() as patched:
            disk = FailingDisk(patched, "fsync", number)
            code = main.main(arguments(inputs, run, how))
        lines = capsys.readouterr().err.splitlines()
        if not disk.has_failed:
            assert code == 0
            break
        assert code == 2 and [line for line in lines if "error:" in line] == lines[-1:], lines
        assert lines[-1].startswith("maskpro: error: ") and "Input/output error" in lines[-1]
        # the report is the last file of a run
        if not (run / "report.json").exists() and main.main(["learn", "--resume", str(run)]):
            # of a run that had not begun
            assert main.main(arguments(inputs, run, how)) == 0, capsys.readouterr().err
        for name in ("logits", "weights", "validation"):
            assert report(run)[name] == whole[name], (number, name)
