"""``pytest --compiled sm_80``: Triton kernels are compiled for that GPU and executed by the emulator.

A finding fails the test that caused it. Tests marked ``compiled`` run with this option alone.
"""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Generator

import pytest

EMULATOR = pytest.StashKey()
# Environment variable with the target of --compiled: a conftest.py can read it before the options are parsed
TARGET = "GPU_EMULATORS_TARGET"


def pytest_addoption(parser, pluginmanager):
    parser.getgroup("compiled").addoption(
        "--compiled", metavar="TARGET", help="execute kernels compiled for this GPU, such as sm_80, on a CPU"
    )
    # Triton reads TRITON_INTERPRET at its import, which a conftest.py may do before options are parsed. Workers inherit
    # both variables.
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    given = pluginmanager.get_plugin("pytestconfig").invocation_params.args
    options = parser.parse_known_args([*shlex.split(os.environ.get("PYTEST_ADDOPTS", "")), *given])
    if options.compiled is not None:
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ[TARGET] = options.compiled


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.addinivalue_line("markers", "compiled: runs compiled kernels on a CPU; run by `pytest --compiled TARGET`")
    config.stash[EMULATOR] = None
    if target := config.getoption("compiled"):
        from .driver import TARGETS, install

        if target not in TARGETS:
            raise pytest.UsageError(f"--compiled: expected one of {', '.join(TARGETS)}, got {target}")
        config.stash[EMULATOR] = install(target)


def pytest_collection_modifyitems(config, items):
    if config.stash[EMULATOR] is None:
        marked = [item for item in items if item.get_closest_marker("compiled")]
        config.hook.pytest_deselected(items=marked)
        items[:] = [item for item in items if item not in marked]


@pytest.fixture
def emulator(request):
    """The driver, None without ``--compiled``. After the test it compiles for the target of the command line again."""
    emulator = request.config.stash[EMULATOR]
    yield emulator
    if emulator is not None:
        emulator.aim(request.config.getoption("compiled"))
        emulator.last, emulator.rewrite = None, str


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    return (yield from _watched(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    return (yield from _watched(item))


def _watched(item) -> Generator:
    """Run a phase of a test, and fail it by the findings of its launches; an error of its own is shown with them."""
    emulator = item.config.stash[EMULATOR]
    if emulator is None:
        return (yield)
    with emulator.apart() as findings:
        try:
            result = yield
        except BaseException:
            if findings:
                item.add_report_section("call", "emulator", str(findings))
            raise
    if faults := emulator.faults(findings):
        lines = "\n".join(map(str, faults))
        pytest.fail(f"the emulator has found:\n{lines}", pytrace=False)
    return result


def pytest_terminal_summary(terminalreporter, config):
    emulator = config.stash[EMULATOR]
    if emulator is None:
        return
    seconds, counts = Counter(), Counter()
    for launch in emulator.launches:
        seconds[launch.kernel] += launch.seconds
        counts[launch.kernel] += 1
    for kernel in sorted(counts):
        terminalreporter.write_line(f"{kernel}: {counts[kernel]} launches, {seconds[kernel]:.1f} s in the emulator")
