"""Power cuts and disk errors at any operation of `maskpro learn`: the command ends with the bits of a whole run."""

from __future__ import annotations

import errno
import math
import os
import re
from itertools import count

import pytest
from helpers.command import learn, report
from helpers.disk_model import put
from helpers.power_cuts import NOTHING, Failing, Watched
from helpers.watched_runs import reported, thinned

from maskpro_kernels.cli import main
from maskpro_kernels.cli.learn.steps import Run
from maskpro_kernels.learn.trainer import MaskTrainer

pytestmark = pytest.mark.usefixtures("eager_reference")

WAYS = {"reinforce": [], "straight-through": ["--estimator", "straight-through", "--lr", "1", "--refit", "weights"]}


class Command:
    """`maskpro learn` of six steps, with a snapshot after each."""

    def __init__(self, inputs, how: str):
        self.inputs, self.options = inputs, [*WAYS[how], "--steps", "6", "--eval-every", "3"]

    def begin(self, run) -> int:
        return main.main(learn(self.inputs, run, *self.options))

    def learned(self, run) -> tuple:
        reported = report(run)
        tensors = [(run / name).read_bytes() for name in ("model.safetensors", "config.json")]
        return reported["logits"], reported["validation"], [row["loss"] for row in reported["steps"]], tensors

    def continues(self, run, acknowledged: int, capsys) -> tuple:
        """Resume, or begin again in the same folder where nothing was reported; gives what was learned."""
        capsys.readouterr()
        code = main.main(["learn", "--resume", str(run)])
        lines = capsys.readouterr().err
        if code:
            assert (code, acknowledged) == (2, NOTHING), lines
            assert lines.splitlines()[-1].startswith("maskpro: error: ")
            assert self.begin(run) == 0, capsys.readouterr().err
        else:
            # of a run that has not begun no step was taken before
            done = [int(steps) for steps in re.findall(r"(\d+) steps are done", lines)]
            assert max(done, default=NOTHING) >= acknowledged, lines
        return self.learned(run)


@pytest.fixture
def fast_and_often(monkeypatch):
    """Nothing reaches the disk but by the model of it, and straight-through keeps each step."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setitem(MaskTrainer.__init__.__kwdefaults__, "snapshot_minutes", 0.0)


@pytest.mark.parametrize(
    ("how", "number"), [("reinforce", 2), *(pytest.param(how, 150, marks=pytest.mark.slow) for how in WAYS)]
)
def test_a_power_cut_loses_nothing_that_the_command_has_reported(
    inputs, tmp_path, capsys, monkeypatch, fast_and_often, how, number
):
    root, command = tmp_path / "whole", Command(inputs, how)
    root.mkdir()
    with Watched(root, unseen=True) as watched, reported(watched, monkeypatch, of=Run):
        assert command.begin(root / "run") == 0
        watched.acknowledge(math.inf)
    whole = command.learned(root / "run")
    print(f"{how}: {watched.cuts} operations, {len(watched.states)} states")
    for index, state in enumerate(thinned(watched.states.values(), number)):
        run = tmp_path / str(index) / "run"
        put(state.tree, run.parent)
        if (run / "report.json").exists():
            assert command.learned(run) == whole, state.how
        else:
            assert state.acknowledged < math.inf, f"the run has ended, and has no report: {state.how}"
            assert command.continues(run, state.acknowledged, capsys) == whole, state.how


@pytest.mark.parametrize(
    ("how", "numbers"), [("reinforce", [1, 9]), *(pytest.param(how, count(), marks=pytest.mark.slow) for how in WAYS)]
)
def test_a_sync_that_fails_ends_the_command_in_one_line(inputs, tmp_path, capsys, fast_and_often, how, numbers):
    command = Command(inputs, how)
    assert command.begin(tmp_path / "whole") == 0
    whole = command.learned(tmp_path / "whole")
    for number in numbers:
        root = tmp_path / str(number)
        root.mkdir()
        capsys.readouterr()
        failing = Failing(errno.EIO, "fsync", number)
        with Watched(root, error=failing, unseen=True):
            code = command.begin(root / "run")
        lines = capsys.readouterr().err.splitlines()
        if not failing.came:
            assert code == 0
            print(f"{how}: {number} errors")
            break
        assert code == 2 and [line for line in lines if "error:" in line] == lines[-1:], lines
        assert lines[-1].startswith("maskpro: error: ") and "Input/output error" in lines[-1]
        if (root / "run" / "report.json").exists():
            # the last file of a run: all else is there
            assert command.learned(root / "run") == whole, number
        else:
            assert command.continues(root / "run", NOTHING, capsys) == whole, number
