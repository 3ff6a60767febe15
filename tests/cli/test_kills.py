"""`maskpro learn` killed at random moments: each run ends with the bits of one that nobody has killed."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.children import Child
from helpers.command import report

STEPS = 20
SIZES = "--batch-size 4 --seq-len 16 --calibration-batches 4 --eval-windows 2"
COMMON = f"{SIZES} --init magnitude --eval-every 10 --dtype float32 --device cpu --accumulate 2".split()
WAYS = {"reinforce": "--estimator reinforce".split(), "straight-through": "--estimator straight-through --lr 1".split()}

# Imports what a command needs, for all that are forked. Without a backward: torch refuses one in a fork after it.
WARMING = """
import contextlib, sys
from maskpro_kernels.cli import main
with contextlib.redirect_stdout(sys.stderr):
    assert main.main(arguments) == 0
"""

KILLING = """
from helpers.killed import KilledRuns
*given, kills = arguments
killed = KilledRuns(*given)
killed.kill(kills)
emit(killed.runs)
emit(killed.moments)
"""


def learn(inputs, how: str, *more: str) -> list[str]:
    sources = ["--model", str(inputs / "model"), "--data", str(inputs / "text.txt")]
    return ["learn", *sources, *COMMON, *WAYS[how], *more]


@pytest.fixture(scope="module")
def child(inputs, tmp_path_factory):
    warm = learn(inputs, "reinforce", "--steps", "1", "--output", str(tmp_path_factory.mktemp("warm")))
    with Child() as child:
        child(WARMING, *warm)
        yield child


@pytest.mark.slow
@pytest.mark.parametrize(("how", "world", "kills"), [(how, world, 50) for how in WAYS for world in (1, 2)])
def test_killed_runs_have_the_bits_of_a_whole_one(child, inputs, tmp_path, how, world, kills):
    begin = learn(inputs, how, "--steps", str(STEPS))
    runs, moments = child(KILLING, str(tmp_path), begin, STEPS, world, kills, kills)
    whole, *killed = (report(Path(run)) for run in runs)
    assert killed and len(moments) == kills
    for one in killed:
        for name in ("logits", "validation", "flipped_groups"):
            assert one[name] == whole[name], name
    # some of them between the first step and the last
    print(how, world, moments)
    assert any(0 < steps < STEPS for _, steps in moments)
