"""What a process does with a case: check and model it, or time it beside torch; and what it says of its GPU."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from math import inf
from statistics import median

import harness
import torch
from cards import Card, Properties, card_of

from .cases import CASES, NotRun, Run

PASS = "PASS"
FAIL = "FAIL"
NOT_RUN = "not run"
CALLS = 10
REPLAYS = 20
# Of a large product, by which the rate of a card is found
SIZE = 4096


def seconds_of(call: Callable[[], object]) -> float:
    """Seconds of a call with a cold cache: of a graph that flushes before each of its calls, less one that flushes."""
    graphs = []
    seconds_of_graphs = ([], [])
    for functions in ((harness.flush, call), (harness.flush,)):
        for function in 2 * functions:
            function()
        torch.cuda.synchronize()
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            for function in CALLS * functions:
                function()
    for _ in range(REPLAYS):
        for graph, seconds in zip(graphs, seconds_of_graphs, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
    return (median(seconds_of_graphs[0]) - median(seconds_of_graphs[1])) / CALLS


def message(error: Exception) -> str:
    """One line that fits a cell."""
    text = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
    return (text or "AssertionError").splitlines()[0][:200].replace("|", "/")


def seen() -> dict:
    """The GPU, and its ``Card`` or why its times are not judged."""
    properties = torch.cuda.get_device_properties(0)
    found = {
        "name": torch.cuda.get_device_name(0),
        "properties": {name: getattr(properties, name, 0) for name in Properties._fields},
        "memory": properties.total_memory,
        "cuSPARSELt": torch.backends.cusparselt.is_available(),
    }
    try:
        if torch.version.hip is not None:
            # gfx90a has the numbers 9 and 0 of an H100
            raise ValueError("a GPU of ROCm, expected one of NVIDIA (benchmarks/cards.py)")
        card = card_of(Properties(**found["properties"]), product_rate())
    except ValueError as error:
        return found | {"unjudged": f"times not judged: {error}"}
    except Exception as error:
        return found | {"unjudged": f"times not judged: {message(error)}"}
    # without what is infinite, which JSON has not
    return found | {"card": {name: value for name, value in dataclasses.asdict(card).items() if value != inf}}


def product_rate() -> float:
    """Operations a second of a large product of torch."""
    x, y = (torch.randn(SIZE, SIZE, device="cuda").bfloat16() for _ in range(2))
    return 2 * SIZE**3 / seconds_of(lambda: x @ y)


def checked(run: Run, name: str, card: Card | None) -> dict:
    """Row of a case: whether it is right, and what it should cost; an error of the model is none of the case."""
    row = {"case": name, "shape": "", "timed": False, "right": PASS}
    try:
        work = CASES[name](run)
        row |= {"shape": work.shape, "timed": work.model is not None, "alternatives": list(work.alternatives)}
        with run.emulator.apart() if run.emulator else contextlib.nullcontext() as findings:
            work.check(work.ours())
        if run.emulator:
            faults = run.emulator.faults(findings)
            assert not faults, faults[0]
    except NotRun as error:
        return row | {"right": f"{NOT_RUN}: {error}"}
    except torch.OutOfMemoryError:
        row["right"] = f"{NOT_RUN}: the GPU's memory is too small, or others use it"
    except Exception as error:
        row["right"] = f"{FAIL}: {message(error)}"
    if not row["timed"] or card is None:
        return row
    try:
        return row | {"modelled": work.model(card)}
    except Exception as error:
        return row | {"unjudged": f"model: {message(error)}"}


def timed(run: Run, name: str) -> dict:
    """Row of a case: seconds of ours, and of torch's or the error of that."""
    row = {"case": name, "others": {}}
    try:
        work = CASES[name](run)
        row["ours"] = seconds_of(work.ours)
    except Exception as error:
        return row | {"unjudged": message(error)}
    for alternative, make in work.alternatives.items():
        if alternative == "cuSPARSELt" and not torch.backends.cusparselt.is_available():
            continue
        try:
            row["others"][alternative] = seconds_of(make())
        except Exception as error:
            row["others"][alternative] = message(error)
    return row
