"""`maskpro sweep` killed at any moment: the same command goes on, and its report is that of an unbroken one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.children import Child
from helpers.command import report
from helpers.sweeps import base, without_wall_clock, write_sweep

# Imports what a command needs, for all that are forked
WARMING = """
import contextlib, sys
from maskpro_kernels.cli import main
with contextlib.redirect_stdout(sys.stderr):
    assert main.main(arguments) == 0
"""

KILLING = """
from pathlib import Path
from helpers.killed_sweeps import kill_sweeps
whole, killed, *others = arguments
tell(kill_sweeps(Path(whole), Path(killed), *others))
"""


@pytest.fixture(scope="module")
def child(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("warm")
    (folder / "config.json").write_text(json.dumps(base(inputs)))
    with Child() as child:
        child(WARMING, "learn", "--config", str(folder / "config.json"), "--output", str(folder / "run"))
        yield child


@pytest.mark.parametrize(
    ("kills", "seed"), [(3, 0), *(pytest.param(40, seed, marks=pytest.mark.slow) for seed in (1, 2))]
)
def test_a_killed_sweep_has_the_report_of_an_unbroken_one(child, inputs, tmp_path, kills, seed):
    """One run fails in both: its text is too short."""
    short = tmp_path / "short.txt"
    short.write_text("w1 w2")
    # these share their samples as well as the mask
    mixed = f"{inputs / 'text.txt'}:3,self:1"
    learned = [{"data": mixed, **how} for how in ({"alpha": 0.5}, {"draws": 2})]
    straight = {
        "data": str(inputs / "text.txt"),
        "estimator": "straight-through",
        "lr": 1.0,
        "steps": 2,
        "init": "wanda",
    }
    sets = [learned[0], {"data": str(short)}, learned[1], straight]
    file = write_sweep(tmp_path, inputs, list=sets, grid={"calibration_batches": [2]})
    whole = tmp_path / "whole"
    ((folders, moments),) = child(KILLING, str(whole), str(tmp_path / "killed"), str(file), kills, seed)
    assert len(moments) == kills
    print(len(folders), moments)
    page, found = left(whole)
    assert "failed" in page and page.count("<svg ") == 2
    names = [run["name"] for run in found["runs"] if run["state"] == "finished"]
    assert len(names) == 3
    for folder in map(Path, folders):
        assert left(folder) == (page, found)
        assert names_in(folder) == names_in(whole)
        for name in names:
            assert report(folder / "sweep" / name)["logits"] == report(whole / "sweep" / name)["logits"]


def left(folder: Path) -> tuple[str, dict]:
    """What a sweep has written of all runs, but for the wall clock."""
    page, found = (folder / "sweep" / name for name in ("report.html", "results.json"))
    return without_wall_clock(page.read_text()), json.loads(found.read_text(), object_hook=no_wall_clock)


def names_in(folder: Path) -> list[str]:
    sweep = folder / "sweep"
    return sorted(str(path.relative_to(sweep)) for path in (*sweep.iterdir(), *(sweep / "shared").iterdir()))


def no_wall_clock(entries: dict) -> dict:
    return {name: value for name, value in entries.items() if name != "wall_clock"}
