"""Timing in paired rounds, and the rows that they make.

In every round all providers are timed, so that what changes on the machine meanwhile meets each of them. But a busy
machine does not slow all work alike, and stays unchanged for seconds to minutes: on a CPU a run therefore visits every
benchmark several times, minutes apart.
"""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Nobody else works on a GPU meanwhile. All of a CPU's visits together take no longer than ten minutes.
VISITS = {"cuda": 1, "cpu": 4}
VISIT_SECONDS = {"cuda": 3.0, "cpu": 1.5}
# Of a visit, where that takes longer
FEWEST_ROUNDS = {"cuda": 5, "cpu": 2}
# A sample repeats short calls until the clock's share is small
SHORTEST_SAMPLE_SECONDS = 0.01
MOST_CALLS = {"cuda": 20, "cpu": 1 << 20}
# More than any cache of a GPU holds, several times over: 0.3 ms on an H100, while the call after it is being queued
FLUSHED_BYTES = 256 << 20
FLUSHES = 4
# Less may stay in a CPU's caches from call to call
UNCACHED_BYTES = {"cuda": 0, "cpu": 64 << 20}
COPIED_BYTES = {"cuda": 1 << 30, "cpu": 128 << 20}
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True)
class Work:
    """The least that an operation has to do, whoever does it: bytes read and written, floating-point operations of
    matrix products, the dtype of their operands, and whether the bytes come from memory though they are few.
    """

    bytes: int = 0
    flops: int = 0
    dtype: torch.dtype = torch.bfloat16
    from_memory: bool = False


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@functools.cache
def _flushed() -> torch.Tensor:
    return torch.ones(FLUSHED_BYTES // 4, device=DEVICE)


def flush() -> None:
    """Read more than a GPU's cache has; what is written would be left there, to be written back in the next call."""
    _flushed().sum()


def sample(function: Callable[[], object], calls: int = 1) -> float:
    """Seconds of one call, the mean of ``calls``; on a GPU by its own clock, each with a cold cache."""
    if DEVICE == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls
    spans = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for start, end in spans:
        for _ in range(FLUSHES):
            flush()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return sum(start.elapsed_time(end) for start, end in spans) / calls / 1e3


# What is timed: a function, or the parts of long work
Provider = Callable[[], object] | Sequence[Callable[[], object]]


def paired(providers: Mapping[str, Provider]) -> dict[str, list[float]]:
    """Seconds of every provider by round, of one visit.

    Of a provider in parts each part is timed beside the same one of the others, all having as many, and they count
    together: work of seconds meets the same moments of a busy machine. The first round says how often to repeat short
    calls, and counts where all take long.
    """
    parts = {name: [provider] if callable(provider) else provider for name, provider in providers.items()}
    for functions in parts.values():
        for function in functions:
            function()
    synchronize()
    start = time.perf_counter()
    rounds = [_round(parts, dict.fromkeys(parts, 1))]
    # on a GPU the clock of events is finer, and emptying the cache takes longer than a short call
    calls = {
        name: max(1, min(MOST_CALLS[DEVICE], round(SHORTEST_SAMPLE_SECONDS / seconds)))
        for name, seconds in rounds[0].items()
    }
    if set(calls.values()) != {1}:
        rounds = []
    while len(rounds) < FEWEST_ROUNDS[DEVICE] or time.perf_counter() - start < VISIT_SECONDS[DEVICE]:
        rounds.append(_round(parts, calls))
    return {name: [seconds[name] for seconds in rounds] for name in parts}


def _round(parts: Mapping[str, Sequence[Callable[[], object]]], calls: Mapping[str, int]) -> dict[str, float]:
    """Seconds of every provider.

    All are set against the first one, which is timed before each of the others, so that their ratios do not hang on one
    sample of it; the mean counts.
    """
    first, *names = parts
    order = [name for compared in names for name in (first, compared)] or [first]
    totals = dict.fromkeys(parts, 0.0)
    for part in zip(*parts.values(), strict=True):
        functions = dict(zip(parts, part, strict=True))
        for name in order:
            totals[name] += sample(functions[name], calls[name]) / order.count(name)
    return totals


@functools.cache
def copied_bytes_per_second() -> float:
    """This machine's rate of reading and writing, by a copy."""
    source = torch.empty(COPIED_BYTES[DEVICE], dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    (seconds,) = paired({"copy": lambda: target.copy_(source)}).values()
    return 2 * source.nbytes / min(seconds)


@functools.cache
def flops_per_second(dtype: torch.dtype) -> float:
    """This machine's rate of multiplying matrices, by torch."""
    size = MATMUL_SIZE[DEVICE]
    x, y = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    (seconds,) = paired({"matmul": lambda: x @ y}).values()
    return 2 * size**3 / min(seconds)


def rows_of(seconds: Mapping[str, list[float]], work: Work | None, case: Mapping, environment: Mapping) -> list[dict]:
    """One JSON row a provider: the case, quantiles of its seconds, rates, and the percentage of the roofline.

    ``ratio`` is how many times as long as the first provider it took, the median over the rounds. A round's seconds of
    the first provider are a mean, so that its quantiles lie closer together than those of the others. There is no
    percentage where all that bounds the work are bytes that may lie in a CPU's caches.
    """
    probabilities = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    rows = []
    base = next(iter(seconds.values()))
    for name, values in seconds.items():
        q20, median, q80 = torch.tensor(values, dtype=torch.float64).quantile(probabilities).tolist()
        row = {**case, "provider": name, "median": median, "q20": q20, "q80": q80, "rounds": len(values)}
        row["ratio"] = statistics.median(x / y for x, y in zip(values, base, strict=True))
        if work is not None:
            uncached = work.from_memory or work.bytes >= UNCACHED_BYTES[DEVICE]
            by_bytes = work.bytes / copied_bytes_per_second() if uncached else 0.0
            by_flops = work.flops / flops_per_second(work.dtype) if work.flops else 0.0
            row["gb_per_s"] = work.bytes / median / 1e9
            row["tflop_per_s"] = work.flops / median / 1e12
            if by_bytes or by_flops:
                row["percent_of_roofline"] = 100 * max(by_bytes, by_flops) / median
        rows.append({**row, **environment})
    return rows


class Timings:
    """Timings of a run, by case: the seconds of all its visits, and the rows of these.

    Attributes:
        path: file that gets the rows, or None.
        refused: cases of which a check, or a provider, failed: they have no speed, whatever other visits gave.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.refused: set[tuple] = set()
        self._visits: dict[tuple, list[Mapping[str, list[float]]]] = {}
        self._rows: dict[tuple, list[dict]] = {}

    def add(self, seconds: Mapping[str, list[float]], work: Work | None, case: Mapping) -> None:
        """Take in the rounds of a visit; with the last one the rows of the case go to the file.

        Raises:
            ValueError: if the case has had all its visits.
        """
        key = case_of(case)
        visits = self._visits.setdefault(key, [])
        if len(visits) == VISITS[DEVICE]:
            raise ValueError(f"case: expected another one for each benchmark, got {key} again")
        visits.append(seconds)
        together = {name: [value for visit in visits for value in visit[name]] for name in seconds}
        self._rows[key] = rows_of(together, work, {**case, "visits": len(visits)}, environment())
        if len(visits) == VISITS[DEVICE]:
            self._write(key)

    def rows(self) -> list[dict]:
        return [row for case, rows in self._rows.items() if case not in self.refused for row in rows]

    def write_unfinished(self) -> None:
        """Append the rows of cases without further visits."""
        for case, visits in self._visits.items():
            if len(visits) < VISITS[DEVICE]:
                self._write(case)

    def _write(self, case: tuple) -> None:
        if self.path is not None and case not in self.refused:
            append(self.path, self._rows[case])


def append(path: Path, rows: Iterable[Mapping]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read(path: Path) -> list[dict]:
    """The rows of a file.

    Raises:
        ValueError: if a line is no row.
    """
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            case_of(row), row["median"], row["ratio"], row["provider"], row["device"], row["threads"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}: expected a row of the benchmarks, got {line[:80]!r}") from None
        rows.append(row)
    return rows


def case_of(row: Mapping) -> tuple:
    """Key of the work that is timed, whoever does it."""
    return row["op"], row["pattern"], tuple(row["shape"]), row["dtype"]


def ratios(rows: Iterable[Mapping], earlier: Iterable[Mapping]) -> list[tuple[Mapping, float, float]]:
    """(row, seconds of the last of ``earlier`` over its own, its ratio over that one's) where one has its case,
    provider, device and threads.
    """

    def key(row):
        return case_of(row), row["provider"], row["device"], row["threads"]

    earlier_rows = {key(row): row for row in earlier}
    pairs = [(row, earlier_rows[key(row)]) for row in rows if key(row) in earlier_rows]
    return [(row, old["median"] / row["median"], row["ratio"] / old["ratio"]) for row, old in pairs]


def commit() -> str | None:
    """The commit of the code, marked where files differ from it; None outside a repository."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        completed = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return completed.stdout.strip()


def device_name() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "cpu"


@functools.cache
def environment() -> dict:
    """Device, threads, commit and versions, on which a timing depends besides its case."""
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
