"""The benchmarks' harness: no speed of what is wrong, rows that say what they are of, comparisons that can fail."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import harness
import pytest
from helpers.children import BENCHMARKS, Child

# ours is planted: from a visit on it draws the mask of the next step
PLANTED = """
import harness
import pytest
import torch
from harness import Work
from maskpro_kernels.functional.checks import counter_of
from maskpro_kernels.ops import reference
from maskpro_kernels.ops.pattern import NMPattern

harness.VISIT_SECONDS[harness.DEVICE] = 0.0

def draw(logits, step):
    counter = counter_of(logits, NMPattern("2:4"), 3, step)
    return reference.sample_mask(logits, 2, 4, 1.0, counter)

@pytest.mark.parametrize("op", ["draw", "again"])
def test_draw(op, compare, visit):
    logits = torch.randn(64, 64)
    ours = lambda: draw(logits, 5 + (visit >= {wrong_from}))
    expected = draw(logits, 5)

    def gate():
        assert torch.equal(ours(), expected)

    providers = dict(ours=ours, reference=lambda: draw(logits, 5))
    compare(gate, providers, work=Work(bytes=20480), op=op, pattern="2:4", shape=(64, 64), dtype="float32 logits")
"""


OPTIONS = ["-q", "-p", "conftest", "-p", "no:cacheprovider"]

# pytest in a fork that finds all of this imported
FORKING = """
import os, sys
import harness, pytest, torch, maskpro_kernels.functional
benchmarks, folder, options = arguments
fork = os.fork()
if fork == 0:
    code = 70
    try:
        os.chdir(folder)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        # its conftest is that of the benchmarks
        sys.path.insert(0, benchmarks)
        code = int(pytest.main(options))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
emit(os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]))
"""


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def run():
    """run(folder, *options): pytest in that folder, in a process on the routes that users get."""
    with Child() as child:

        def run_in(folder: Path, *options: str) -> Done:
            (code,) = child(FORKING, str(BENCHMARKS), str(folder), [*OPTIONS, *options])
            return Done(code, *((folder / name).read_text() for name in ("stdout", "stderr")))

        yield run_in


VISITS = harness.VISITS[harness.DEVICE]


def plant(folder: Path, wrong_from: int = VISITS + 1) -> Path:
    folder.mkdir(parents=True)
    (folder / "test_bench_planted.py").write_text(PLANTED.format(wrong_from=wrong_from))
    return folder


def test_a_wrong_kernel_gets_no_speed(run, tmp_path):
    """Not even that of the visits before."""
    wrong, rows = plant(tmp_path / "wrong", VISITS), tmp_path / "rows.jsonl"
    done = run(wrong, "--rows", str(rows))
    assert done.returncode == 1
    assert "AssertionError" in done.stdout and " ms " not in done.stdout
    assert not rows.exists()


def test_rows_and_their_comparison(run, tmp_path):
    right, path = plant(tmp_path / "right"), tmp_path / "rows.jsonl"
    done = run(right, "--rows", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = harness.read(path)
    assert [(row["op"], row["provider"]) for row in rows] == [
        (op, provider) for op in ("draw", "again") for provider in ("ours", "reference")
    ]
    for row in rows:
        assert 0 < row["q20"] <= row["median"] <= row["q80"]
        assert row["gb_per_s"] == pytest.approx(20480 / row["median"] / 1e9)
        # 20 kB stay in a CPU's caches
        assert ("percent_of_roofline" in row) == (harness.DEVICE == "cuda")
        assert {"commit", "torch", "triton", "device", "threads"} <= row.keys()
        assert row["visits"] == VISITS
        # draws this small are repeated, so that the round that finds how often does not count
        assert row["rounds"] == VISITS * harness.FEWEST_ROUNDS[harness.DEVICE]

    done = run(right, "--compare", str(path))
    assert done.returncode == 0 and "times as fast" in done.stdout
