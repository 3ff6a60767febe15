"""Timing in paired rounds, after a check that what is timed is right."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MOST_ROUNDS = 15
FEWEST_ROUNDS = 5
# Slow providers get fewer rounds
CASE_SECONDS = 3.0
# A sample repeats short calls until the clock's and the synchronisation's share is small
SHORTEST_SAMPLE_SECONDS = 0.01
ROWS = pytest.StashKey[list]()


def pytest_addoption(parser):
    parser.addoption("--rows", metavar="FILE", help="append one JSON row for each provider timed to FILE")


def pytest_configure(config):
    config.stash[ROWS] = []
    # Threads that wait for each other on a busy machine would charge a provider for each of its operations
    torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if not rows:
        return
    terminalreporter.section("timings")
    width = max(len(row["provider"]) for row in rows)
    for row in rows:
        first = next(other for other in rows if case_of(other) == case_of(row))
        shape = "x".join(map(str, row["shape"]))
        terminalreporter.write_line(
            f"{row['op']:<12} {row['pattern']:>5} {shape:>12} {row['provider']:<{width}} "
            f"{row['median'] * 1e3:9.3f} ms ({row['q20'] * 1e3:.3f} to {row['q80'] * 1e3:.3f}) "
            f"{row['median'] / first['median']:7.2f} x {first['provider']}"
        )


def case_of(row: Mapping) -> tuple:
    return row["op"], row["pattern"], row["shape"], row["dtype"]


def commit() -> str | None:
    """The commit of the code, marked where files differ from it; None outside a repository."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def device_name() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "cpu"


@pytest.fixture(scope="session")
def environment() -> dict:
    """What a timing depends on besides its case."""
    return {"commit": commit(), "torch": torch.__version__, "triton": triton.__version__, "device": device_name()}


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def sample(function: Callable[[], object], calls: int) -> float:
    """Seconds of one call, from ``calls`` in a row."""
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize()
    return (time.perf_counter() - start) / calls


@pytest.fixture
def compare(environment, request) -> Callable[..., None]:
    """compare(gate, providers, op=, pattern=, shape=, dtype=): check, then time.

    ``gate`` raises where a provider is wrong; nothing is timed then. ``providers`` are functions by
    name, the first one what the others are set against. In every round each provider is timed once,
    so that what changes on the machine meanwhile meets all of them.
    """

    def run(gate: Callable[[], None], providers: Mapping[str, Callable[[], object]], **case) -> None:
        gate()
        calls, round_seconds = {}, 0.0
        for name, function in providers.items():
            function()
            once = sample(function, 1)
            calls[name] = max(1, round(SHORTEST_SAMPLE_SECONDS / once))
            round_seconds += calls[name] * once
        rounds = min(MOST_ROUNDS, max(FEWEST_ROUNDS, int(CASE_SECONDS / round_seconds)))
        seconds = {name: [] for name in providers}
        for _ in range(rounds):
            for name, function in providers.items():
                seconds[name].append(sample(function, calls[name]))
        probabilities = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        rows = []
        for name, values in seconds.items():
            q20, median, q80 = torch.tensor(values, dtype=torch.float64).quantile(probabilities).tolist()
            rows.append(
                {**case, "provider": name, "median": median, "q20": q20, "q80": q80, "rounds": rounds, **environment}
            )
        request.config.stash[ROWS] += rows
        path = request.config.getoption("rows")
        if path is not None:
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    return run
