"""The search for a faster entry of a launch table: its neighbours, their checks, and their times.

Neighbours differ in one size, in warps, stages or registers, and never in what the tables choose an entry by. The
search goes on from the fastest until none is faster.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from triton.errors import TritonError
from tune_calls import OVER_GROUPS, Case, Results
from tune_cases import other_cases, timed_cases

from maskpro_kernels.ops.triton import launch, tiles, tuned
from maskpro_kernels.ops.triton.tiles import RESULT_SIDE, Configuration, Rows, Tiles
from maskpro_kernels.ops.triton.tuned import Measured

# Times closer than this are not told apart
NOISE = 0.03
# Of the fastest candidates so many are tried at other patterns, and then timed so often in turn with the entry
FINALISTS, ROUNDS = 3, 5
# Of sums in another order, in units of the largest; beside it a result may be rounded to its dtype otherwise
SUMS_ERROR = 1e-4
# Bytes of shared memory a block that entries of a row have to fit into, as other architectures take it too
SHARED_MEMORY = {"sm_80": 99 << 10}
# Most registers that ptxas may be held to, and those of a processor
REGISTERS, ALL_REGISTERS = (96, 128, 168, 208, 255), 1 << 16
MOST_WARPS, MOST_STAGES, MOST_STEPS, MOST_ROWS, LARGEST_SIDE = 8, 5, 32, 16, 256
# Of the weights of a large group a thread has at least so many
LEAST_OF_A_GROUP = 8
LANES = 32
# Of 2:4 that a thread can hold: a draw takes registers besides
MOST_GROUPS, MOST_PACKED_GROUPS = 8, 32
# Of packed weights, weights of two chunks of the sparsest pattern
LEAST_PACKED_K = 64


class LeftOut(Exception):
    """Why a candidate is not timed."""


class WrongResult(Exception):
    """A candidate gives another result than the entry in the table."""


@dataclass(frozen=True)
class Place:
    """Where an entry stands in the tables."""

    kernel: str
    size: int | None
    target: str
    table: tuned.Table
    index: int

    @property
    def key(self) -> tuple:
        return tuned.key_of(self.kernel, self.target, self.size)

    @property
    def entries(self) -> tuple:
        entries = self.table[self.key]
        return entries if isinstance(entries, tuple) else (entries,)

    @property
    def entry(self):
        return self.entries[self.index]

    @property
    def fields(self) -> dict:
        return asdict(self.entry)

    @property
    def common(self) -> bool:
        """Whether it is of 2:4, or of operands of 16 bits."""
        return self.size in (None, 4 if self.kernel in OVER_GROUPS else 2)

    def __str__(self) -> str:
        unit = "M = {}" if self.kernel in OVER_GROUPS else "{} bytes"
        size = "" if self.size is None else f", {unit.format(self.size)}"
        return f"{self.kernel}{size}" + (f", entry {self.index + 1}" if len(self.entries) > 1 else "")

    def put(self, entry) -> None:
        self.table[self.key] = tuned.exchanged(self.table[self.key], self.entry, entry)
        tiles._from_table.cache_clear()

    @contextmanager
    def holding(self, entry) -> Iterator[None]:
        """The table with another entry there."""
        before = self.entry
        self.put(entry)
        try:
            yield
        finally:
            self.put(before)


def neighbours(place: Place, entry) -> list:
    """Entries that may take that place and differ from the given one by a step."""
    moves = {Configuration: _configuration_moves, Rows: _rows_moves, Tiles: _tiles_moves}[type(entry)](place, entry)
    found = [
        replace(entry, **{name: int(getattr(entry, name) * factor) for name in names})
        for names in moves
        for factor in (2, 0.5)
    ]
    if isinstance(entry, Tiles) and entry.tokens > 1:
        found += [replace(entry, num_stages=entry.num_stages + step) for step in (1, -1)]
    if place.target.startswith("sm_"):
        found += [replace(entry, registers=registers) for registers in _registers_beside(entry.registers)]
    return [candidate for candidate in found if _fits(place, candidate)]


def _configuration_moves(place: Place, entry: Configuration) -> list[tuple[str, ...]]:
    moves = [("block",), ("num_warps",), ("block", "num_warps")]
    # a kernel of a single step would leave groups out
    return moves + [("steps",)] * (entry.steps > 1)


def _rows_moves(place: Place, entry: Rows) -> list[tuple[str, ...]]:
    moves = [("rows",), ("num_warps",)]
    # by the others' blocks the table chooses
    return moves + [("block",), ("block", "num_warps")] * (place.index == len(place.entries) - 1)


def _tiles_moves(place: Place, entry: Tiles) -> list[tuple[str, ...]]:
    """By tokens the table chooses, and among those of as many by the side along which results lie."""
    side = RESULT_SIDE[place.kernel]
    moves = [("k" if side == "out" else "out",), ("num_warps",)]
    if sum(other.tokens == place.entry.tokens for other in place.entries) == 1:
        moves.append((side,))
    if len(place.entries) == 1 and entry.tokens > 1:
        moves.append(("tokens",))
    return moves


def _registers_beside(registers: int | None) -> list[int | None]:
    if registers is None:
        return [REGISTERS[1], REGISTERS[-1]]
    steps = sorted({*REGISTERS, registers})
    at = steps.index(registers)
    return [None, *steps[max(at - 1, 0) : at], *steps[at + 1 : at + 2]]


def _fits(place: Place, entry) -> bool:
    """Whether every thread has work, and none so much that it cannot hold it."""
    threads, holders = LANES * entry.num_warps, 1
    if not 1 <= entry.num_warps <= MOST_WARPS or (entry.registers or 0) * threads > ALL_REGISTERS:
        return False
    if isinstance(entry, Tiles):
        sides = [entry.out, entry.k] + [entry.tokens] * (entry.tokens > 1)
        groups, is_packed = entry.out * entry.k // 4, place.kernel == "packed_linear"
        return (
            16 <= min(sides)
            and max(sides) <= LARGEST_SIDE
            and 64 <= groups <= (MOST_PACKED_GROUPS if is_packed else MOST_GROUPS) * threads
            and 1 <= entry.num_stages <= MOST_STAGES
            and not (is_packed and entry.k < LEAST_PACKED_K)
        )
    if isinstance(entry, Rows):
        shorter = [other.block for other in place.entries[: place.index]]
        sizes = 1 <= entry.rows <= MOST_ROWS and entry.block > max(shorter, default=0)
    else:
        # a wave of AMD has 64 lanes
        least = 2 * LANES if place.target.startswith("gfx") else LANES
        sizes = 1 <= entry.steps <= MOST_STEPS and entry.block >= least
        # of large groups several threads share one
        holders = max((place.size or 0) // LEAST_OF_A_GROUP, 1)
    return sizes and threads <= holders * entry.block and entry.block <= 16 * threads


@contextmanager
def watched() -> Iterator[list[tuple[str, object]]]:
    """(name, compiled kernel, or None of the interpreter) of each launch within."""
    seen, own = [], launch._launch

    def watching(kernel, name, *args, **constants):
        seen.append((name, own(kernel, name, *args, **constants)))

    launch._launch = watching
    try:
        yield seen
    finally:
        launch._launch = own


class Search:
    """For one place of the tables.

    Args:
        seconds: of one call of a function.
        go_on: called before each candidate; raises where no time is left.

    Attributes:
        left_out: why candidates were not timed, and how many.
    """

    def __init__(
        self, place: Place, device: str, seconds: Callable[[Callable], float], go_on: Callable[[], None] = lambda: None
    ):
        self.place, self.device, self.seconds, self.go_on = place, device, seconds, go_on
        self.left_out: Counter[str] = Counter()
        self.cases = self._cases(timed_cases)
        self.expected: list[tuple[Results, int]] = []
        self.before: list[float] = []

    def measured(self) -> Measured | None:
        """What to write of this place; None where the tables take its entry in no case.

        Raises:
            WrongResult: if a candidate's result is not that of the entry.
        """
        if not self.cases:
            return None
        entry = self.place.entry
        self.go_on()
        self.expected = [self._called(case) for case in self.cases]
        self.before = self._microseconds(entry)
        others = None
        for candidate in self._climbed()[:FINALISTS]:
            self.go_on()
            others = others or [(case, self._called(case)) for case in self._cases(other_cases)]
            try:
                self._check(candidate, others)
            except LeftOut as reason:
                self.left_out[str(reason)] += 1
                continue
            before, after = self._in_turn(entry, candidate)
            if self._is_faster(after, before):
                return self._found(candidate, sum(before), sum(after))
        return self._found(entry, sum(self.before), sum(self.before))

    def _found(self, entry, before: float, microseconds: float) -> Measured:
        place = self.place
        # as fine as a GPU's clock
        times = round(before, 3), round(microseconds, 3)
        return Measured(place.kernel, place.size, place.fields, asdict(entry), *times)

    def _cases(self, of: Callable[..., Iterable[Case]]) -> list[Case]:
        place = self.place
        return list(of(place.kernel, place.size, place.entry, place.target, self.device))

    def _climbed(self) -> list:
        """Candidates faster than the entry, the fastest first."""
        best, fastest = self.place.entry, self.before
        seen, faster = {best}, {}
        while True:
            beside = [candidate for candidate in neighbours(self.place, best) if candidate not in seen]
            seen.update(beside)
            times = {candidate: self._tried(candidate) for candidate in beside}
            times = {candidate: found for candidate, found in times.items() if found is not None}
            faster |= {candidate: found for candidate, found in times.items() if self._is_faster(found, self.before)}
            ahead = [candidate for candidate in times if candidate in faster and _less(times[candidate], fastest)]
            if not ahead:
                return sorted(faster, key=lambda candidate: sum(faster[candidate]))
            best = min(ahead, key=lambda candidate: sum(times[candidate]))
            fastest = times[best]

    def _tried(self, candidate) -> list[float] | None:
        """Microseconds by case, or None where it is left out."""
        self.go_on()
        try:
            self._check(candidate, zip(self.cases, self.expected, strict=True))
        except LeftOut as reason:
            self.left_out[str(reason)] += 1
            return None
        return self._microseconds(candidate)

    def _microseconds(self, entry) -> list[float]:
        with self.place.holding(entry):
            return [1e6 * self.seconds(case.timed) for case in self.cases]

    def _in_turn(self, entry, candidate) -> tuple[list[float], list[float]]:
        """Medians of both, by case: what changes on the machine meets both."""
        rounds = [(self._microseconds(entry), self._microseconds(candidate)) for _ in range(ROUNDS)]
        before, after = zip(*rounds, strict=True)
        return _medians(before), _medians(after)

    @staticmethod
    def _is_faster(times: Sequence[float], before: Sequence[float]) -> bool:
        """Over all cases, and in none of them slower."""
        slower = any(time > (1 + NOISE) * other for time, other in zip(times, before, strict=True))
        return _less(times, before) and not slower

    def _check(self, candidate, cases: Iterable[tuple[Case, tuple[Results, int]]]) -> None:
        """Raise LeftOut or WrongResult unless a candidate does what the entry does."""
        with self.place.holding(candidate):
            for case, (expected, local) in cases:
                try:
                    found, own_local = self._called(case)
                except TritonError as error:
                    raise LeftOut(type(error).__name__) from None
                except RuntimeError as error:
                    # what the compiler says of a pass that fails has no type of its own
                    if "PassManager" not in str(error):
                        error.add_note(f"{self.place}: {candidate} at {case.name}")
                        raise
                    raise LeftOut("PassManager") from None
                if own_local > local:
                    raise LeftOut("local memory")
                if not _agree(found, expected):
                    raise WrongResult(
                        f"{self.place}: {candidate} gives another result than {self.place.entry} at {case.name}"
                    )

    def _called(self, case: Case) -> tuple[Results, int]:
        """(what a case gives, bytes of local memory a thread)."""
        with watched() as seen:
            results = case.check()
        own = [compiled for name, compiled in seen if name == self.place.kernel]
        if not own:
            launched = ", ".join(name for name, _ in seen)
            raise RuntimeError(f"{self.place}: expected a launch of it at {case.name}, got {launched}")
        compiled = [kernel for kernel in own if kernel is not None]
        shared = max((kernel.metadata.shared for kernel in compiled), default=0)
        if shared > SHARED_MEMORY.get(self.place.target, shared):
            raise LeftOut("shared memory")
        # which Triton counts in words, stack among it
        return results, max((4 * kernel.n_spills for kernel in compiled), default=0)


def _medians(rounds: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def _less(times: Sequence[float], before: Sequence[float]) -> bool:
    return sum(times) < (1 - NOISE) * sum(before)


def _agree(found: Results, expected: Results) -> bool:
    """Whether bits are equal, and sums as close as another order leaves them."""
    same = all(torch.equal(_bits(one), _bits(other)) for one, other in zip(found.exact, expected.exact, strict=True))
    return same and all(_close(one, other) for one, other in zip(found.near, expected.near, strict=True))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _close(found: Tensor, expected: Tensor) -> bool:
    rounding = torch.finfo(found.dtype).eps * expected.float().abs()
    allowed = rounding + SUMS_ERROR * expected.float().abs().max()
    return bool(((found.float() - expected.float()).abs() <= allowed).all())
