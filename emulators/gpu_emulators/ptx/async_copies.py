"""cp.async: copies from global to shared memory that a thread begins and waits for later (PTX ISA 9.7.9.25)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import proxy

import numpy as np

from ..findings import Fault, refusal
from .parser import Immediate, Instruction, Kernel
from .registry import address, instruction, modifiers, operands, reader

if TYPE_CHECKING:
    from .batch import Batch


# behind all addresses
NOWHERE = (1 << 64) - 1


@dataclass
class Copies:
    """Copies of one instruction: threads that began them, the group of each, where they go, what they bring.

    They read bytes from ``sources`` to ``ends`` of global memory.
    """

    threads: np.ndarray
    groups: np.ndarray
    positions: np.ndarray
    data: np.ndarray
    sources: np.ndarray
    ends: np.ndarray
    ins: Instruction

    def part(self, chosen: np.ndarray) -> Copies:
        arrays = (self.threads, self.groups, self.positions, self.data, self.sources, self.ends)
        return Copies(*(array[chosen] for array in arrays), self.ins)

    def read(self, addresses: np.ndarray, size: int) -> bool:
        """Whether they read some of ``size`` bytes from each of these addresses on."""
        if not len(addresses) or addresses.max() + size <= self.sources.min() or addresses.min() >= self.ends.max():
            return False
        order = np.argsort(addresses)
        # the first access that ends behind a source begins
        first = np.searchsorted(addresses[order] + np.uint64(size), self.sources, "right")
        begin = np.append(addresses[order], np.uint64(NOWHERE))[first]
        return bool(((begin < self.ends) & (self.sources < self.ends)).any())


class AsyncCopies:
    """Copies under way of a batch, and how many groups each thread has committed."""

    def __init__(self, batch: Batch):
        # not the batch itself, which refers to these
        self.batch = proxy(batch)
        self.committed = np.zeros(batch.threads, np.int64)
        self.under_way: list[Copies] = []

    def begin(self, to, source, size: int, source_size, mask, ins: Instruction) -> None:
        """Copy ``size`` bytes, of which the first ``source_size`` are read and the others are zero."""
        batch, shared = self.batch, self.batch.shared
        lanes, threads = batch.lanes(mask)
        to, source, source_size = (batch.full(value)[lanes] for value in (to, source, source_size))
        if ((to | source.astype(np.uint32)) & np.uint32(size - 1)).any():
            raise Fault(f"misaligned copy of {size} bytes: {batch.place(ins)}")
        if (source_size > size).any():
            raise Fault(f"a copy of {size} bytes reads {int(source_size.max())}: {batch.place(ins)}")
        data = np.zeros((len(to), size), np.uint8)
        for count in np.unique(source_size):
            if count:
                chosen = np.flatnonzero(source_size == count)
                if size % batch.memory.granule or count % batch.memory.granule:
                    raise refusal(ins, f"a copy that reads {count} bytes")
                data[chosen, :count] = batch.memory.read(source[chosen], int(count), threads[chosen], ins)
        positions = shared.positions(to, batch.cta[lanes], size, ins)
        shared.depart(positions, data, threads, ins)
        ends = source + source_size.astype(np.uint64)
        self.under_way.append(Copies(threads, self.committed[threads], positions, data, source, ends, ins))

    def check_store(self, addresses: np.ndarray, size: int, ins: Instruction) -> None:
        """A finding where ``size`` bytes of global memory are written that copies under way read."""
        if any(copies.read(addresses, size) for copies in self.under_way):
            self.batch.find("write to global memory that a copy still reads", ins)

    def commit(self, mask: np.ndarray | None) -> None:
        self.committed += 1 if mask is None else mask

    def wait(self, pending: int, mask: np.ndarray | None) -> None:
        """Until at most the last ``pending`` groups of each thread are under way."""
        limits = self.committed - pending
        kept = []
        for copies in self.under_way:
            done = copies.groups < limits[copies.threads]
            if mask is not None:
                done &= mask[copies.threads]
            if done.any():
                arrived = copies.part(done)
                self.batch.shared.arrive(arrived.positions, arrived.data, arrived.threads)
                if done.all():
                    continue
                copies = copies.part(~done)
            kept.append(copies)
        self.under_way = kept

    def end(self) -> None:
        """Note what nobody waited for."""
        for copies in self.under_way:
            self.batch.find("copy that no thread waits for", copies.ins)


@instruction("cp.async")
def copy(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.9.25.3.1, cp.async; .ca and .cg choose caches alone."""
    cache, _, _ = modifiers(ins, "async", ("ca", "cg"), ("shared", "shared::cta"), "global")[1:]
    given = operands(ins, 3, 4)
    to, source = address(given[0], np.uint32, ins, kernel), address(given[1], np.uint64, ins, kernel)
    if not isinstance(given[2], Immediate) or given[2].value not in ((16,) if cache == "cg" else (4, 8, 16)):
        raise refusal(ins, f"a copy of {given[2]} bytes")
    size = given[2].value
    source_size = reader(given[3] if len(given) > 3 else given[2], np.uint32, ins, kernel)

    def run(batch, mask):
        batch.copies.begin(to(batch, mask), source(batch, mask), size, source_size(batch, mask), mask, ins)

    return run


@instruction("cp.async.commit_group")
def commit(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.9.25.3.2, cp.async.commit_group."""
    modifiers(ins, "async", "commit_group")
    operands(ins, 0)
    return lambda batch, mask: batch.copies.commit(mask)


@instruction("cp.async.wait_group")
def wait(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.9.25.3.3, cp.async.wait_group."""
    modifiers(ins, "async", "wait_group")
    (pending,) = operands(ins, 1)
    if not isinstance(pending, Immediate):
        raise refusal(ins, "a number of groups is expected")
    return lambda batch, mask: batch.copies.wait(pending.value, mask)


@instruction("cp.async.wait_all")
def wait_all(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.9.25.3.3, cp.async.wait_all: commits, and waits for all groups."""
    modifiers(ins, "async", "wait_all")
    operands(ins, 0)

    def run(batch, mask):
        batch.copies.commit(mask)
        batch.copies.wait(0, mask)

    return run
