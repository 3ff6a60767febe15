"""The benchmarks' harness: no speed of what is wrong, rows that say what they are of, comparisons that can fail."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import harness
import pytest
import torch
from helpers.children import BENCHMARKS, ROOT, Child, environment

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


@pytest.mark.parametrize("wrong_from", [pytest.param(1, marks=pytest.mark.slow), VISITS])
def test_a_wrong_kernel_gets_no_speed(run, wrong_from, tmp_path):
    """Not even that of the visits before."""
    wrong, rows = plant(tmp_path / "wrong", wrong_from), tmp_path / "rows.jsonl"
    done = run(wrong, "--rows", str(rows))
    assert done.returncode == 1
    assert "AssertionError" in done.stdout and " ms " not in done.stdout
    assert ("its check, or a provider, failed at an earlier visit" in done.stdout) == (wrong_from < VISITS)
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


@pytest.mark.slow
def test_the_interpreter_is_not_timed(tmp_path):
    # which is asked for before triton is imported
    around = {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(map(str, (BENCHMARKS, ROOT)))}
    command = [sys.executable, "-m", "pytest", *OPTIONS]
    folder = plant(tmp_path / "any")
    done = subprocess.run(command, cwd=folder, env=environment() | around, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "TRITON_INTERPRET: expected" in done.stderr


@pytest.fixture
def ticking(monkeypatch):
    """ticking(sampled, seconds): a call is timed to ``sampled``, and between two looks at the clock it continues by
    ``seconds``.
    """

    def set_(sampled, seconds):
        samples = iter(sampled) if isinstance(sampled, list) else itertools.repeat(sampled)
        monkeypatch.setattr(harness, "sample", lambda function, calls=1: function() or next(samples))
        clock = itertools.count(0.0, seconds).__next__
        monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=clock))

    return set_


def test_the_first_provider_is_before_each_of_the_others(ticking):
    seen = []
    # in each round a, b, a, c
    ticking([1.0, 5.0, 3.0, 7.0] * harness.FEWEST_ROUNDS[harness.DEVICE], harness.VISIT_SECONDS[harness.DEVICE])
    seconds = harness.paired({name: lambda name=name: seen.append(name) for name in "abc"})
    rounds = harness.FEWEST_ROUNDS[harness.DEVICE]
    assert seconds == {"a": [2.0] * rounds, "b": [5.0] * rounds, "c": [7.0] * rounds}
    # one call of each before the first round, which counts
    assert "".join(seen) == "abc" + "abac" * rounds


def test_parts_are_side_by_side_and_count_together(ticking):
    seen = []
    providers = {name: [lambda part=part: seen.append(part) for part in name] for name in ("ab", "xy")}
    ticking(1.0, harness.VISIT_SECONDS[harness.DEVICE])
    seconds = harness.paired(providers)
    rounds = harness.FEWEST_ROUNDS[harness.DEVICE]
    assert seconds == {"ab": [2.0] * rounds, "xy": [2.0] * rounds}
    assert "".join(seen) == "abxy" + "axby" * rounds
    with pytest.raises(ValueError, match="zip"):
        harness.paired(providers | {"xy": providers["xy"][:1]})


@pytest.mark.parametrize(("sampled", "first_counts"), [(1e-6, False), (0.7, True)])
def test_a_visit_takes_rounds_while_it_has_time(sampled, first_counts, ticking):
    seen = []
    # a power of two, so that the clock adds up exactly
    looks = 64
    ticking(sampled, harness.VISIT_SECONDS[harness.DEVICE] / looks)
    seconds = harness.paired({name: lambda name=name: seen.append(name) for name in "ab"})
    # the clock is looked at once before the first round, and before each of the others that would exceed the fewest
    rounds = looks + harness.FEWEST_ROUNDS[harness.DEVICE] - 1
    assert [len(values) for values in seconds.values()] == [rounds] * 2
    assert len(seen) == 2 + 2 * rounds + 2 * (not first_counts)


def test_rows_are_of_all_visits_and_written_once(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "environment", lambda: {"device": "d", "threads": 1})
    monkeypatch.setitem(harness.VISITS, harness.DEVICE, 2)
    cases = [{"op": op, "pattern": "2:4", "shape": [1], "dtype": "x"} for op in ("draw", "update")]
    timings = harness.Timings(tmp_path / "rows.jsonl")
    timings.add({"a": [1.0], "b": [3.0]}, None, cases[0])
    timings.add({"a": [2.0]}, None, cases[1])
    assert not timings.path.exists()
    timings.add({"a": [1.0, 1.0], "b": [2.0, 2.0]}, None, cases[0])
    assert len(harness.read(timings.path)) == 2
    timings.write_unfinished()
    rows = harness.read(timings.path)
    assert [(row["op"], row["provider"], row["visits"], row["rounds"], row["ratio"]) for row in rows] == [
        ("draw", "a", 2, 3, 1.0),
        ("draw", "b", 2, 3, 2.0),
        ("update", "a", 1, 1, 1.0),
    ]
    assert rows == timings.rows()
    with pytest.raises(ValueError, match="case: expected another one for each benchmark"):
        timings.add({"a": [1.0], "b": [3.0]}, None, cases[0])


def test_ratios_match_case_provider_and_device():
    case = {"op": "draw", "pattern": "2:4", "shape": [2, 3], "dtype": "x"}
    row = case | {"provider": "ours", "device": "d", "threads": 2, "median": 2.0, "ratio": 6.0}
    others = [row | {key: "other"} for key in ("op", "pattern", "dtype", "provider", "device", "threads")]
    assert harness.ratios([row], [row | {"median": 3.0, "ratio": 5.0}, *others]) == [(row, 1.5, 1.2)]
    assert harness.ratios([row], others) == []


def test_the_roofline_is_the_slower_of_bytes_and_products(monkeypatch):
    monkeypatch.setattr(harness, "copied_bytes_per_second", lambda: 1e9)
    monkeypatch.setattr(harness, "flops_per_second", lambda dtype: {torch.bfloat16: 1e12, torch.float32: 1e11}[dtype])
    seconds = {"ours": [1.0, 2.0, 3.0]}

    def percent(**work):
        (row,) = harness.rows_of(seconds, harness.Work(**work), {"op": "x"}, {})
        return row["percent_of_roofline"]

    assert percent(bytes=10**9) == pytest.approx(50)
    assert percent(bytes=10**9, flops=10**12) == pytest.approx(50)
    assert percent(bytes=10**9, flops=10**11, dtype=torch.float32) == pytest.approx(50)
    assert percent(bytes=10**9, flops=2 * 10**12) == pytest.approx(100)
