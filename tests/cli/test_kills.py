"""`maskpro learn` killed at random moments: each run ends with the bits of one that nobody has killed."""

from __future__ import annotations

import pytest
from helpers.children import Child
from helpers.command import report

SIZES = "--batch-size 4 --seq-len 16 --init-batches 2 --calibration-batches 4 --eval-windows 2 --eval-length 24"
COMMON = f"{SIZES} --init magnitude --steps 40 --eval-every 20 --dtype float32 --device cpu --accumulate 2".split()
WAYS = {
    "several draws": "--estimator reinforce --draws 2".split(),
    "straight-through": "--estimator straight-through --lr 1".split(),
}

KILLING = """
from helpers.killed import Killed
folder, begin, world, kills, span, seed = arguments
killed = Killed(folder, begin, world, seed)
killed.kill(kills, span)
for run in killed.runs:
    tell(run)
tell(killed.moments)
"""


@pytest.fixture(scope="module")
def child():
    with Child() as child:
        yield child


def killed(child, inputs, folder, how: str, world: int, kills: int, span: float = 1.0):
    """(reports of the runs, what was killed)."""
    folder.mkdir()
    sources = ["--model", str(inputs / "model"), "--data", str(inputs / "text.txt"), "--other-data", "pydoc"]
    *runs, moments = child(KILLING, str(folder), ["learn", *sources, *COMMON, *WAYS[how]], world, kills, span, kills)
    return [report(folder / run) for run in runs], moments


@pytest.mark.parametrize(
    ("how", "world", "kills"),
    [
        *((how, 1, 10) for how in WAYS),
        *(pytest.param(how, world, 50, marks=pytest.mark.slow) for how in WAYS for world in (1, 2)),
    ],
)
def test_killed_runs_have_the_bits_of_a_whole_one(child, inputs, tmp_path, how, world, kills):
    (whole,), none = killed(child, inputs, tmp_path / "whole", how, world, kills=0)
    ended, moments = killed(child, inputs, tmp_path / "killed", how, world, kills)
    assert none == [] and len(moments) == kills
    for one in ended:
        for name in ("logits", "validation", "flipped_groups"):
            assert one[name] == whole[name], name
    # some of them between the first step and the last
    assert any(0 < steps < 40 for _, steps in moments)
