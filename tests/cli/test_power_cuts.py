"""A power cut behind any operation of `maskpro learn`: the command goes on to the bits of a whole run."""

from __future__ import annotations

import math
import os
import re

import pytest
from helpers.command import learn, report
from helpers.disk_model import put
from helpers.power_cuts import NOTHING, State, Watched
from helpers.watched_runs import thinned, told

from maskpro_kernels.cli import main
from maskpro_kernels.cli.learning_run import LearningRun
from maskpro_kernels.training.trainer import MaskTrainer

pytestmark = pytest.mark.usefixtures("eager_reference")

WAYS = {
    "reinforce": ["--draws", "2"],
    "straight-through": ["--estimator", "straight-through", "--lr", "1", "--refit", "weights"],
}


class Command:
    """`maskpro learn` of six steps, with a snapshot behind each."""

    def __init__(self, inputs, how: str):
        self.inputs, self.options = inputs, [*WAYS[how], "--steps", "6", "--eval-every", "3"]

    def begin(self, run) -> int:
        return main.main(learn(self.inputs, run, *self.options))

    def learned(self, run) -> tuple:
        told = report(run)
        tensors = [(run / name).read_bytes() for name in ("model.safetensors", "config.json")]
        return told["logits"], told["validation"], [row["loss"] for row in told["steps"]], tensors

    def goes_on(self, state: State, root, capsys) -> tuple:
        put(state.tree, root)
        run = root / "run"
        if not (run / "report.json").exists():
            assert state.acknowledged < math.inf, "the run has ended, and has no report"
            capsys.readouterr()
            code = main.main(["learn", "--resume", str(run)])
            lines = capsys.readouterr().err
            if code:
                assert (code, state.acknowledged) == (2, NOTHING), lines
                assert lines.splitlines()[-1].startswith("maskpro: error: ")
                assert self.begin(run) == 0, capsys.readouterr().err
            else:
                (done,) = re.findall(r"(\d+) steps were taken before", lines)
                assert int(done) >= state.acknowledged, lines
        return self.learned(run)


@pytest.mark.parametrize(
    ("how", "number"), [*((how, 4) for how in WAYS), *(pytest.param(how, 150, marks=pytest.mark.slow) for how in WAYS)]
)
def test_a_power_cut_loses_nothing_that_the_command_has_told(inputs, tmp_path, capsys, monkeypatch, how, number):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    # or no straight-through step would be told as done before the last one
    monkeypatch.setitem(MaskTrainer.__init__.__kwdefaults__, "snapshot_minutes", 0.0)
    root, command = tmp_path / "whole", Command(inputs, how)
    root.mkdir()
    with Watched(root, unseen=True) as watched, told(watched, monkeypatch, of=LearningRun):
        assert command.begin(root / "run") == 0
        watched.acknowledge(math.inf)
    whole = command.learned(root / "run")
    print(f"{how}: {watched.cuts} operations, {len(watched.states)} states")
    for index, state in enumerate(thinned(watched.states.values(), number)):
        assert command.goes_on(state, tmp_path / str(index), capsys) == whole, state.how
