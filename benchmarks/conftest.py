"""The fixture that checks and then times, the rows of the run, and its report at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import harness
import pytest
from harness import DEVICE, VISITS, Work

from maskpro_kernels.ops.triton.tiles import INTERPRETED

# What starts last takes less than a minute on two cores, so that ten are enough
WITHIN_SECONDS = 540.0
TIMINGS = pytest.StashKey[harness.Timings]()
EARLIER = pytest.StashKey[list]()
STARTED = pytest.StashKey[float]()


def pytest_addoption(parser):
    parser.addoption("--rows", metavar="FILE", help="append one JSON row for each provider timed to FILE")
    parser.addoption("--compare", metavar="FILE", help="print how much faster than the rows of FILE each row is")
    parser.addoption(
        "--within",
        metavar="SECONDS",
        type=float,
        default=WITHIN_SECONDS,
        help="skip the benchmarks, and later visits of them, that would start later than that (default: %(default)s)",
    )


def pytest_configure(config):
    path = config.getoption("rows")
    if path is not None and (Path(path).is_dir() or not Path(path).parent.is_dir()):
        raise pytest.UsageError(f"--rows: expected a file in a folder that exists, got {path}")
    config.stash[TIMINGS] = harness.Timings(None if path is None else Path(path))
    config.stash[STARTED] = time.monotonic()
    if INTERPRETED:
        raise pytest.UsageError("TRITON_INTERPRET: expected to be unset, for the interpreter's time says nothing")
    earlier = config.getoption("compare")
    try:
        config.stash[EARLIER] = [] if earlier is None else harness.read(earlier)
    except (OSError, ValueError) as error:
        raise pytest.UsageError(f"--compare: {error}") from None


def pytest_runtest_setup(item):
    limit = item.config.getoption("within")
    if time.monotonic() - item.config.stash[STARTED] > limit:
        pytest.skip(f"--within: the {limit:g} seconds are over")


@pytest.fixture(scope="session", params=range(1, VISITS[DEVICE] + 1), ids="visit{}".format)
def visit(request) -> int:
    """The number of a visit. Being of the session, it makes pytest run all benchmarks under one before the next."""
    return request.param


@pytest.fixture
def compare(visit, request) -> Callable[..., None]:
    """compare(gate, providers, work=, op=, pattern=, shape=, dtype=): check, then time.

    ``gate`` raises where a provider is wrong; nothing is timed then, and what earlier visits timed does not count.
    ``providers`` are functions by name, or the parts of each, and the first one is what the others are set against.
    ``work`` is the least that all of them have to do.
    """

    def run(
        gate: Callable[[], None], providers: Mapping[str, harness.Provider], work: Work | None = None, **case
    ) -> None:
        timings = request.config.stash[TIMINGS]
        key = harness.case_of(case)
        if key in timings.refused:
            pytest.fail("its check, or a provider, failed at an earlier visit")
        try:
            gate()
            seconds = harness.paired(providers)
        except (Exception, pytest.fail.Exception):
            timings.refused.add(key)
            raise
        timings.add(seconds, work, case)

    return run


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[TIMINGS].rows()
    if not rows:
        return
    terminalreporter.section("timings")
    width = max(len(row["provider"]) for row in rows)
    first = {}
    for row in rows:
        base = first.setdefault(harness.case_of(row), row)
        shape = "x".join(map(str, row["shape"]))
        roofline = f"{row['percent_of_roofline']:4.0f}%" if "percent_of_roofline" in row else ""
        terminalreporter.write_line(
            f"{row['op']:<24} {row['pattern']:>5} {shape:>14} {row['provider']:<{width}} "
            f"{row['median'] * 1e3:10.3f} ms ({row['q20'] * 1e3:.3f} to {row['q80'] * 1e3:.3f}) {roofline:>5} "
            f"{row['ratio']:7.2f} x {base['provider']}"
        )
    if config.getoption("compare") is not None:
        terminalreporter.section(
            f"times as fast as in {config.getoption('compare')}, change of the ratio to the first provider"
        )
        ratios = harness.ratios(rows, config.stash[EARLIER])
        for row, ratio, change in ratios:
            shape = "x".join(map(str, row["shape"]))
            terminalreporter.write_line(
                f"{row['op']:<24} {row['pattern']:>5} {shape:>14} {row['provider']:<{width}} {ratio:7.2f} "
                f"{change - 1:+8.1%}"
            )
        terminalreporter.write_line(f"{len(rows) - len(ratios)} rows have none like them there")


def pytest_sessionfinish(session):
    session.config.stash[TIMINGS].write_unfinished()
