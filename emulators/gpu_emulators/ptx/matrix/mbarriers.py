"""Barriers in shared memory, by which threads learn that asynchronous products are complete.

PTX ISA 9.7.13, "Parallel synchronization and communication instructions: mbarrier": those that Triton waits for by
parity, and that nothing but tcgen05.commit arrives at.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, proxy

import numpy as np

from ...findings import Fault, refusal
from ..parser import Immediate, Instruction, Kernel
from ..registry import address, destination, instruction, modifiers, operands, reader

if TYPE_CHECKING:
    from ..batch import Batch

# its 64 bits are opaque
WORDS = [np.uint32(0), np.uint32(0)]
BYTES = 8


@dataclass
class MBarrier:
    """One address in all CTAs: arrays [ctas]. ``expected`` is 0 where it is not initialised.

    ``serial`` is the last asynchronous operation that has arrived at the phase under way, ``completed`` that of the
    phase before it. ``asked`` [threads] is one more than the last phase that a thread has asked for.
    """

    expected: np.ndarray
    pending: np.ndarray
    phase: np.ndarray
    serial: np.ndarray
    completed: np.ndarray
    asked: np.ndarray


@dataclass
class Progress:
    """Which asynchronous operations of its CTA each thread knows to be complete. They are numbered from 1 on.

    ``issued`` [ctas] is the last number, ``issuer`` [ctas] the thread that issues them or -1, ``known`` [threads] what
    a thread has waited for, and ``shared`` [ctas] what some thread of a CTA had waited for when the CTA had met at
    ``phase`` barriers.
    """

    issued: np.ndarray
    issuer: np.ndarray
    known: np.ndarray
    shared: np.ndarray
    phase: np.ndarray
    mbarriers: dict[int, MBarrier] = field(default_factory=dict)

    def issue(self, batch: Batch, threads: np.ndarray, places: np.ndarray, ins: Instruction) -> np.ndarray:
        """Numbers of an operation of threads of other CTAs each, that reads places [threads, ...] of shared memory."""
        ctas = batch.cta[threads]
        before = self.issuer[ctas]
        if ((before >= 0) & (before != threads)).any():
            raise refusal(ins, "asynchronous operations of several threads of a CTA")
        self.issuer[ctas] = threads
        self.issued[ctas] += 1
        batch.shared.number(places, self.issued[ctas])
        return self.issued[ctas]

    def _pass_barriers(self, batch: Batch) -> None:
        met = batch.phase > self.phase
        if met.any():
            self.shared[met] = self.known.reshape(batch.ctas, -1).max(1)[met]
            self.phase = batch.phase.copy()

    def saw(self, batch: Batch, threads: np.ndarray, serials: np.ndarray) -> None:
        """Threads have waited for operations up to these, of their CTAs."""
        self._pass_barriers(batch)
        self.known[threads] = np.maximum(self.known[threads], serials)

    def complete(self, batch: Batch, threads: np.ndarray) -> np.ndarray:
        """The last operation that each of the threads knows to be complete."""
        self._pass_barriers(batch)
        return np.maximum(self.known[threads], self.shared[batch.cta[threads]])

    def at(self, batch: Batch, place: int) -> MBarrier:
        if place not in self.mbarriers:
            of_ctas = (np.zeros(batch.ctas, np.int64) for _ in range(5))
            self.mbarriers[place] = MBarrier(*of_ctas, np.full(batch.threads, -1))
        return self.mbarriers[place]

    def arrive(self, batch: Batch, place: int, threads: np.ndarray, ins: Instruction) -> None:
        """All operations that these threads have issued so far arrive, when they are complete, as one."""
        one, ctas = self.at(batch, place), batch.cta[threads]
        if not one.expected[ctas].all():
            raise Fault(f"mbarrier at {place} is not initialised: {batch.place(ins)}")
        positions = batch.shared.positions(np.full(len(threads), place), ctas, BYTES, ins)
        if not batch.shared.tells(positions, BYTES, threads):
            batch.find("arrival at an mbarrier whose initialisation is not ordered before it", ins)
        if ((self.issuer[ctas] >= 0) & (self.issuer[ctas] != threads)).any():
            batch.find("commit by a thread that has not issued the products", ins)
        one.serial[ctas] = self.issued[ctas]
        one.pending[ctas] -= 1
        over = ctas[one.pending[ctas] == 0]
        one.completed[over] = one.serial[over]
        one.pending[over] = one.expected[over]
        one.phase[over] += 1


_progress: WeakKeyDictionary[Batch, Progress] = WeakKeyDictionary()


def progress(batch: Batch) -> Progress:
    if batch not in _progress:
        issued, known, shared = (np.zeros(count, np.int64) for count in (batch.ctas, batch.threads, batch.ctas))
        state = Progress(issued, np.full(batch.ctas, -1), known, shared, batch.phase.copy())
        _progress[batch] = state
        # not the batch itself, which refers to its memories: without a cycle it goes as soon as it has run
        batch.shared.complete = partial(state.complete, proxy(batch))
    return _progress[batch]


def by_place(batch: Batch, addresses: np.ndarray, mask: np.ndarray | None):
    """(address, numbers of the threads) of the threads of the mask, by the address of each."""
    addresses = batch.full(addresses)
    _, threads = batch.lanes(mask)
    for place in np.unique(addresses[threads]):
        yield int(place), threads[addresses[threads] == place]


def write(batch: Batch, addresses: np.ndarray, mask: np.ndarray | None, ins: Instruction) -> np.ndarray:
    """Write to places of mbarriers, which are then free; returns where they begin in the bytes of shared memory."""
    _, threads = batch.lanes(mask)
    places = batch.shared.positions(batch.full(addresses)[threads], batch.cta[threads], BYTES, ins)
    batch.shared.vacate(places, BYTES)
    batch.shared.store(addresses, WORDS, 32, mask, ins)
    return places


@instruction("mbarrier.init")
def translate_init(ins: Instruction, kernel: Kernel):
    """PTX ISA "mbarrier.init": until mbarrier.inval the memory is for no other use ("mbarrier.inval")."""
    modifiers(ins, "init", ("shared", "shared::cta"), "b64")
    where, count = operands(ins, 2)
    place = address(where, np.uint32, ins, kernel)
    if not isinstance(count, Immediate) or count.value < 1:
        raise refusal(ins, f"a constant count of arrivals is expected, not {count}")

    def init(batch, mask):
        addresses = place(batch, mask)
        batch.shared.occupy(write(batch, addresses, mask, ins), BYTES)
        for at, threads in by_place(batch, addresses, mask):
            one, ctas = progress(batch).at(batch, at), batch.cta[threads]
            if one.expected[ctas].any():
                batch.find("mbarrier initialised again before it was invalidated", ins)
            one.expected[ctas] = one.pending[ctas] = count.value
            one.phase[ctas] = one.completed[ctas] = 0
            one.asked[np.isin(batch.cta, ctas)] = -1

    return init


@instruction("mbarrier.inval")
def translate_inval(ins: Instruction, kernel: Kernel):
    """PTX ISA "mbarrier.inval"."""
    modifiers(ins, "inval", ("shared", "shared::cta"), "b64")
    place = address(*operands(ins, 1), np.uint32, ins, kernel)

    def inval(batch, mask):
        addresses = place(batch, mask)
        write(batch, addresses, mask, ins)
        for at, threads in by_place(batch, addresses, mask):
            one, ctas = progress(batch).at(batch, at), batch.cta[threads]
            if not one.expected[ctas].all():
                batch.find("mbarrier invalidated that is not initialised", ins)
            one.expected[ctas] = 0

    return inval


@instruction("mbarrier.try_wait")
def translate_try_wait(ins: Instruction, kernel: Kernel):
    """PTX ISA "mbarrier.test_wait / mbarrier.try_wait": whether the phase of this parity is complete.

    That is the phase before the one under way. A thread whose phase is not complete looks again when others have gone
    on. "try_wait" may answer false at any time, and a program has to ask again: so the first answer to a thread that
    asks for a phase is false, though the phase be complete.
    """
    modifiers(ins, "try_wait", "parity", ("shared", "shared::cta"), "b64")
    target, where, parity = operands(ins, 3)
    index = destination(target, np.bool_, ins, kernel)
    place, wanted = address(where, np.uint32, ins, kernel), reader(parity, np.uint32, ins, kernel)

    def try_wait(batch, mask):
        addresses, parities = place(batch, mask), batch.full(wanted(batch, mask))
        batch.shared.load(addresses, BYTES, mask, ins)
        complete, answer = (np.zeros(batch.threads, bool) for _ in range(2))
        for at, threads in by_place(batch, addresses, mask):
            one, ctas = progress(batch).at(batch, at), batch.cta[threads]
            if not one.expected[ctas].all():
                raise Fault(f"mbarrier at {at} is not initialised: {batch.place(ins)}")
            over = one.phase[ctas] & 1 != parities[threads] & 1
            # one more than the number of the phase
            asked = one.phase[ctas] + ~over
            complete[threads], answer[threads] = over, over & (one.asked[threads] >= asked)
            one.asked[threads] = asked
            done = threads[answer[threads]]
            progress(batch).saw(batch, done, one.completed[batch.cta[done]])
        batch.write(index, answer, mask)
        batch.stall(~complete if mask is None else mask & ~complete)

    return try_wait
