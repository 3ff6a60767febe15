"""``pytest --ptx sm_80``: kernels are compiled for a GPU and executed by the machine, which may fail a test.

A test fails where the machine finds what hardware would not forgive. Tests marked ``ptx`` run with this option alone.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest


def pytest_addoption(parser):
    parser.getgroup("ptx").addoption(
        "--ptx", metavar="TARGET", help="execute kernels compiled for this GPU, such as sm_80, on the PTX machine"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "ptx: runs on the PTX machine; run by `pytest --ptx TARGET`")
    config.machine = None
    if target := config.getoption("ptx"):
        # as triton reads it when kernels are defined
        os.environ.pop("TRITON_INTERPRET", None)
        from .triton_driver import TARGETS, install

        if target not in TARGETS:
            raise pytest.UsageError(f"--ptx: expected one of {', '.join(TARGETS)}, got {target}")
        config.machine = install(target)


def pytest_collection_modifyitems(config, items):
    if config.machine is None:
        marked = [item for item in items if item.get_closest_marker("ptx")]
        if marked:
            config.hook.pytest_deselected(items=marked)
            items[:] = [item for item in items if item not in set(marked)]


@pytest.fixture
def machine(request):
    """The driver, which compiles for the target of the command line again after the test."""
    machine = request.config.machine
    yield machine
    machine.aim(request.config.getoption("ptx"))
    machine.last, machine.rewrite = None, str


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    machine = item.config.machine
    if machine is None:
        return (yield)
    with machine.apart() as findings:
        try:
            result = yield
        finally:
            if findings:
                item.add_report_section("call", "ptx", str(findings))
        if findings:
            pytest.fail(f"the machine has found:\n{findings}", pytrace=False)
    return result


def pytest_terminal_summary(terminalreporter, config):
    if config.machine is None:
        return
    seconds, counts = Counter(), Counter()
    for launch in config.machine.launches:
        seconds[launch.kernel] += launch.seconds
        counts[launch.kernel] += 1
    for kernel in sorted(counts):
        terminalreporter.write_line(f"{kernel}: {counts[kernel]} launches, {seconds[kernel]:.1f} s in the machine")
