"""Look for faster entries of the launch tables on this GPU, and write what was measured.

Each entry of maskpro_kernels/ops/triton/tiles.py is timed beside its neighbours, and the search goes on from the
fastest. What does not compile or launch, or needs more local memory, is left out. A result that is not the entry's ends
the tuner. A candidate takes the entry's place where it is faster over all cases and in none slower, and right at other
patterns as well.

The file is written after each entry, the most important ones first. A later call goes on where this one ended: entries
that the file has from such a GPU with these versions are not measured again, unless --kernels names them.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import harness
import torch
import triton
from tqdm import tqdm
from tune_cases import ORDER
from tune_search import Place, Search, WrongResult

from maskpro_kernels.files import write_whole
from maskpro_kernels.ops.triton import tiles, tuned
from maskpro_kernels.ops.triton.tuned import Measured, Run

SAMPLES = 15


class OutOfTime(Exception):
    pass


def places(target: str, kernels: Sequence[str] = ORDER) -> list[Place]:
    """Where the entries of a target stand: 2:4 and operands of 16 bits first, there by ORDER."""
    found = [
        Place(key[0], key[2] if len(key) > 2 else None, target, table, i)
        for table in tiles.TABLES
        for key, entries in table.items()
        if key[0] in kernels and key[1] == target
        for i in range(len(entries) if isinstance(entries, tuple) else 1)
    ]
    return sorted(found, key=lambda place: (not place.common, ORDER.index(place.kernel), place.size or 0, place.index))


class Record:
    """A file of runs, of which the last one is this one.

    Attributes:
        run: what has been measured now.
    """

    def __init__(self, path: Path, run: Run):
        self.path, self.run, self._earlier = path, run, tuned.read(path) if path.exists() else []

    def has(self, place: Place) -> bool:
        """Whether the entry that stands there was measured on such a GPU, with these versions."""
        return any(
            (measured.kernel, measured.size, measured.entry) == (place.kernel, place.size, place.fields)
            for run in self._earlier
            if (run.device, run.torch, run.triton) == (self.run.device, self.run.torch, self.run.triton)
            for measured in run.entries
        )

    def add(self, measured: Measured) -> None:
        self.run = replace(self.run, entries=(*self.run.entries, measured))
        write_whole(self.path, tuned.text_of([*self._earlier, self.run]).encode())


def this_run(device: str) -> Run:
    return Run(device, datetime.date.today().isoformat(), harness.commit(), torch.__version__, triton.__version__)


def seconds(function: Callable[[], object]) -> float:
    """Of one call."""
    function()
    return statistics.median(harness.sample(function) for _ in range(SAMPLES))


def tune(
    places: Iterable[Place],
    record: Record,
    device: str,
    seconds: Callable[[Callable], float] = seconds,
    ends: float = float("inf"),
    say: Callable[[str], object] = tqdm.write,
) -> None:
    """Search each place in turn, put what is faster into the tables, and record it.

    Args:
        seconds: of one call of a function.
        ends: by ``time.monotonic``; the place that is searched then is not recorded.

    Raises:
        WrongResult: if a candidate's result is not that of the entry in the table.
    """

    def go_on() -> None:
        if time.monotonic() >= ends:
            raise OutOfTime

    for place in places:
        search = Search(place, device, seconds, go_on)
        try:
            measured = search.measured()
        except OutOfTime:
            say(f"{place}: the time is over; the next call goes on here")
            return
        if measured is None:
            say(f"{place}: taken in none of the cases, not measured")
            continue
        say(f"{place}: {told(measured)}{left_out(search)}")
        if measured.changed:
            place.put(type(place.entry)(**measured.entry))
        record.add(measured)


def told(measured: Measured) -> str:
    if not measured.changed:
        return f"{measured.before:.1f} us, nothing is faster"
    fields = ", ".join(
        f"{name} {old} -> {measured.entry[name]}"
        for name, old in measured.replaces.items()
        if measured.entry[name] != old
    )
    gain = 1 - measured.microseconds / measured.before
    return f"{measured.before:.1f} -> {measured.microseconds:.1f} us ({gain:.0%} less): {fields}"


def left_out(search: Search) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in search.left_out.items())
    return f"; left out: {reasons}" if reasons else ""


def time_limit(text: str) -> float:
    limit = float(text)
    if not limit > 0:
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text}")
    return limit


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, str]:
    """(arguments, the target), or the end of the program in one line."""
    parser.add_argument("--kernels", nargs="+", metavar="NAME", choices=ORDER, help=f"of {', '.join(ORDER)}")
    parser.add_argument("--output", metavar="FILE", type=Path, help="default: the package's own file for this GPU")
    parser.add_argument("--within", metavar="SECONDS", type=time_limit, help="end after that time")
    arguments = parser.parse_args(argv)
    if tiles.INTERPRETED:
        parser.error("TRITON_INTERPRET: expected to be unset, for the interpreter's time tells nothing")
    if not torch.cuda.is_available():
        parser.error("this machine has no GPU to time on")
    device = torch.device("cuda", torch.cuda.current_device())
    name, target = tiles.own_architecture(device), tiles.architecture(device)
    if arguments.output is None:
        if name != target:
            parser.error(
                f"this GPU, {name}, takes the entries of {target}, which others depend on: expected its own in "
                f"{tiles.__file__}, or --output FILE"
            )
        arguments.output = tuned.path_of(target)
        with contextlib.suppress(OSError):
            arguments.output.parent.mkdir(exist_ok=True)
    elif arguments.output.is_dir() or not arguments.output.parent.is_dir():
        parser.error(f"--output: expected a file in a folder that exists, got {arguments.output}")
    elif arguments.output.exists() and arguments.output.resolve() != tuned.path_of(target).resolve():
        try:
            tuned.lay_over(tiles.TABLES, target, arguments.output)
        except ValueError as error:
            parser.error(f"--output: {error}")
    if not os.access(arguments.output.parent, os.W_OK):
        parser.error(f"--output: expected a file that can be written, got {arguments.output}")
    return arguments, target


def main(argv: Sequence[str] | None = None) -> None:
    ends = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments, target = parsed(parser, argv)
    ends += float("inf") if arguments.within is None else arguments.within
    record = Record(arguments.output, this_run(harness.device_name()))
    todo = places(target, arguments.kernels or ORDER)
    if arguments.kernels is None:
        todo = [place for place in todo if not record.has(place)]
    print(f"{record.run.device}, target {target}: {len(todo)} entries to measure, into {record.path}", flush=True)
    try:
        with tqdm(todo, unit="entry", disable=None) as progress:
            tune(progress, record, "cuda", ends=ends, say=say)
    except WrongResult as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    finally:
        summarize(record.run)


def say(line: str) -> None:
    """Print a line above the progress, at once: the machine may be taken away."""
    tqdm.write(line)
    sys.stdout.flush()


def summarize(run: Run) -> None:
    changed = [measured for measured in run.entries if measured.changed]
    print(f"{len(run.entries)} entries measured, {len(changed)} changed")
    for measured in changed:
        print(f"  {measured.kernel}{'' if measured.size is None else f' {measured.size}'}: {told(measured)}")


if __name__ == "__main__":
    main()
