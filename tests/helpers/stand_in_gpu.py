"""A GPU that is not there: ``torch.cuda`` with a card's properties, and a clock that planted work moves.

    python tests/helpers/stand_in_gpu.py SCENARIO.json --output page

is ``python benchmarks/verdict --output page`` on it, with planted cases. A scenario has

- properties, reached: of the card, see ``cards``; without ``reached`` a product takes as long as on an H100;
- cases: by name the seconds of one, and its fault: "wrong", "model", "dies" or "hangs";
- lacks: packages that are not found;
- tests: a folder in place of the repository, or None;
- limits: constants of ``verdict.command`` and ``verdict.children``.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

ROWS = K = 4096


class Clock:
    """Seconds of the GPU."""

    now = 0.0


class Graph:
    """A CUDA graph: the seconds of the calls that it has captured."""

    seconds = 0.0

    def replay(self) -> None:
        Clock.now += self.seconds


@contextlib.contextmanager
def capturing(graph: Graph):
    start = Clock.now
    yield
    graph.seconds = Clock.now - start
    Clock.now = start


class Event:
    def __init__(self, enable_timing: bool):
        self.at = 0.0

    def record(self) -> None:
        self.at = Clock.now

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


def advance(seconds: float) -> None:
    Clock.now += seconds


def planted(seconds: float, fault: str | None, run: object):
    """A case that takes so long, and has that fault. It costs what unpacking a weight does."""
    import cost_model
    from verdict.cases import Work

    def ours() -> None:
        advance(seconds)
        if fault == "dies":
            os._exit(9)
        if fault == "hangs":
            time.sleep(1000)

    def check(result: None) -> None:
        assert fault != "wrong", "3 of 8 have other bits"

    def model(card) -> float:
        if fault == "model":
            raise ValueError("instruction: expected one that PIPES names, got NEW")
        return cost_model.unpacked(card, ROWS, K)

    return Work(f"{ROWS} x {K}", ours, check, model, {"dense": lambda: partial(advance, 2 * seconds)})


def install(scenario: dict, replace: Callable[[object, str, object], None]) -> None:
    """Put the stand-in and what is planted in their places, by ``replace(owner, name, value)``."""
    import harness
    import torch
    from verdict import children, command, needs, timing

    properties = SimpleNamespace(**scenario["properties"])
    properties.total_memory = 80 << 30
    capability = properties.major, properties.minor
    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "synchronize": lambda: None,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: "a stand-in",
        "CUDAGraph": Graph,
        "graph": capturing,
        "Event": Event,
    }
    for name, value in cuda.items():
        replace(torch.cuda, name, value)
    replace(harness, "flush", partial(advance, 3e-4))
    replace(timing, "product_rate", lambda: scenario.get("reached", 7e14))
    cases = {name: partial(planted, *outcome) for name, outcome in scenario["cases"].items()}
    for module in (timing, command):
        replace(module, "CASES", cases)
    found = needs.find_spec
    lacks = scenario.get("lacks", [])
    replace(needs, "find_spec", lambda name: None if name in lacks else found(name))
    if scenario.get("tests"):
        replace(children, "TESTED", Path(scenario["tests"]))
    for name, value in scenario.get("limits", {}).items():
        replace(command if hasattr(command, name) else children, name, value)


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(root), str(root / "benchmarks"), str(root / "emulators")]
    install(json.loads(Path(sys.argv[1]).read_text()), setattr)
    from verdict import children, command

    children.COMMAND = [sys.executable, __file__, sys.argv[1]]
    sys.exit(command.main(sys.argv[2:]))
