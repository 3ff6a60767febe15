"""Tensor memory: 128 lanes of 512 words for each CTA, what is allocated of it, and who uses its words.

PTX ISA 9.7.16, "TensorCore 5th generation family instructions". Loads and stores of warps, and products, are
asynchronous: each is done when it is issued, and its words count as in use until its threads have waited for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from ...findings import Fault
from .mbarriers import progress

if TYPE_CHECKING:
    from ..batch import Batch
    from ..parser import Instruction

LANES, COLUMNS = 128, 512
MANY = -1


class Accesses:
    """The last warp that accessed each word, counted from 1 or MANY, and the phase of its CTA then."""

    def __init__(self, size: int):
        self.warps, self.phases = np.zeros(size, np.int32), np.zeros(size, np.int32)

    def note(self, words: np.ndarray, now: tuple[np.ndarray, np.ndarray]) -> None:
        warps = np.where(self._others(words, now), MANY, now[0]).astype(np.int32)
        self.warps[words], self.phases[words] = warps, now[1]
        # several warps of this instruction access the same
        lost = self.warps[words] != warps
        self.warps[words[lost]] = MANY

    def _others(self, words: np.ndarray, now: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        warps = self.warps[words]
        return (warps != 0) & (warps != now[0]) & (self.phases[words] == now[1])

    def unordered(self, words: np.ndarray, now: tuple[np.ndarray, np.ndarray]) -> bool:
        """Whether another warp has accessed some of them since the last barrier of the CTA."""
        return bool(self._others(words, now).any())


class Issuers:
    """The threads that access words; warps and phases of their CTAs are columns that fit words [threads, n]."""

    def __init__(self, batch: Batch, threads: np.ndarray):
        self.now = batch.warps[threads][:, None] + 1, batch.phase[batch.cta[threads]][:, None]
        self.complete = progress(batch).complete(batch, threads)[:, None]


class LoadedRegisters:
    """Registers that loads fill, by their numbers, and the threads that have not waited since."""

    def __init__(self):
        self.waiting: dict[int, np.ndarray] = {}

    def begin(self, batch: Batch, indices: list[int], mask: np.ndarray | None) -> None:
        threads = np.ones(batch.threads, bool) if mask is None else mask
        for index in indices:
            self.waiting[index] = self.waiting[index] | threads if index in self.waiting else threads
            batch.watch(index, self)

    def wait(self, batch: Batch, waiting: np.ndarray) -> None:
        for index in list(self.waiting):
            self._end(batch, index, waiting)

    def _end(self, batch: Batch, index: int, threads: np.ndarray) -> None:
        left = self.waiting.pop(index) & ~threads
        if left.any():
            self.waiting[index] = left
        else:
            batch.unwatch(index)

    def read(self, batch: Batch, index: int, mask: np.ndarray | None, ins: Instruction) -> None:
        if (self.waiting[index] if mask is None else self.waiting[index] & mask).any():
            batch.find("read of a register that a load of tensor memory still writes", ins, batch.kernel.names[index])

    def written(self, batch: Batch, index: int, mask: np.ndarray | None, ins: Instruction) -> None:
        if (self.waiting[index] if mask is None else self.waiting[index] & mask).any():
            batch.find("write of a register that a load of tensor memory still writes", ins, batch.kernel.names[index])


class TensorMemory:
    """Of all CTAs of a batch: arrays [ctas, COLUMNS, LANES], one behind the other.

    ``writing`` and ``reading`` are the last products, by their numbers, that write or read a word.
    """

    def __init__(self, batch: Batch):
        size = batch.ctas * COLUMNS * LANES
        self.words = np.zeros(size, np.uint32)
        self.filled, self.storing, self.loading = (np.zeros(size, bool) for _ in range(3))
        self.writing, self.reading = (np.zeros(size, np.int32) for _ in range(2))
        self.stored, self.loaded = Accesses(size), Accesses(size)
        self.allocated = np.zeros((batch.ctas, COLUMNS), bool)
        # by their first column, how many columns, and what allocated them
        self.allocations: list[dict[int, tuple[int, Instruction]]] = [{} for _ in range(batch.ctas)]
        self.permitted = np.ones(batch.ctas, bool)
        # (threads, their words) of those under way
        self.loads: list[tuple[np.ndarray, np.ndarray]] = []
        self.stores: list[tuple[np.ndarray, np.ndarray]] = []
        self.registers = LoadedRegisters()
        batch.endings.append(self.end)

    # -- allocation

    def allocate(self, batch: Batch, cta: int, columns: int, ins: Instruction) -> int:
        """The first column of so many."""
        if not self.permitted[cta]:
            batch.find("tensor memory allocated after the permit was given up", ins)
        for start in range(0, COLUMNS, columns):
            if not self.allocated[cta, start : start + columns].any():
                self.allocated[cta, start : start + columns] = True
                self.allocations[cta][start] = columns, ins
                return start
        raise Fault(f"waits for ever for {columns} columns of tensor memory: {batch.place(ins)}")

    def free(self, batch: Batch, thread: int, start: int, columns: int, ins: Instruction) -> None:
        cta = batch.cta[thread]
        if self.allocations[cta].pop(start, (0, None))[0] != columns:
            raise Fault(f"{columns} columns of tensor memory from {start} on are not allocated: {batch.place(ins)}")
        words = np.arange((cta * COLUMNS + start) * LANES, (cta * COLUMNS + start + columns) * LANES)
        self.check_unused(batch, words[None], Issuers(batch, np.array([thread])), "release", ins)
        self.allocated[cta, start : start + columns] = False
        self.filled[words] = False

    def end(self, batch: Batch) -> None:
        """Note what is still allocated: a kernel has to deallocate everything before it ends (tcgen05.dealloc)."""
        for allocations in self.allocations:
            for _, ins in allocations.values():
                batch.find("tensor memory that is not deallocated", ins)

    def places(self, batch: Batch, ctas: np.ndarray, columns: np.ndarray, lanes: np.ndarray, ins: Instruction):
        """Where words lie; a fault where they are not allocated."""
        outside = (columns >= COLUMNS).any() or (lanes >= LANES).any()
        if outside or not self.allocated[np.broadcast_to(ctas, columns.shape), columns].all():
            raise Fault(f"out of bounds of allocated tensor memory: {batch.place(ins)}")
        return (ctas * COLUMNS + columns) * LANES + lanes

    # -- words that are in use

    def check_content(self, batch: Batch, words, issuers: Issuers, what: str, ins: Instruction) -> None:
        """A finding where words that are read hold nothing, or not yet, or not for certain."""
        if self.storing[words].any():
            batch.find(f"{what} of tensor memory in flight", ins)
        if not self.filled[words].all():
            batch.find(f"{what} of unwritten tensor memory", ins)
        if self.stored.unordered(words, issuers.now):
            batch.find(f"tensor memory race: {what} after another warp's write", ins)

    def check_unused(self, batch: Batch, words, issuers: Issuers, what: str, ins: Instruction) -> None:
        """A finding where words that are written or given up are still used."""
        for serials, verb in ((self.writing, "writes"), (self.reading, "reads")):
            if (serials[words] > issuers.complete).any():
                batch.find(f"{what} of tensor memory that a product still {verb}", ins)
        self.check_accesses(batch, words, issuers, what, ins)

    def check_accesses(self, batch: Batch, words, issuers: Issuers, what: str, ins: Instruction) -> None:
        """The same of loads and stores alone."""
        if self.loading[words].any():
            batch.find(f"{what} of tensor memory that a load still reads", ins)
        if self.storing[words].any():
            batch.find(f"{what} of tensor memory in flight", ins)
        for accesses, kind in ((self.stored, "write"), (self.loaded, "read")):
            if accesses.unordered(words, issuers.now):
                batch.find(f"tensor memory race: {what} after another warp's {kind}", ins)

    # -- loads and stores

    def load(self, batch: Batch, words, threads: np.ndarray, ins: Instruction) -> np.ndarray:
        """uint32 of words [threads, n], which are in use until the threads have waited."""
        issuers = Issuers(batch, threads)
        self.check_content(batch, words, issuers, "read", ins)
        if (self.writing[words] > issuers.complete).any():
            batch.find("read of tensor memory that a product still writes", ins)
        self.loading[words] = True
        self.loaded.note(words, issuers.now)
        self.loads.append((threads, words))
        return self.words[words]

    def store(self, batch: Batch, words, values: np.ndarray, threads: np.ndarray, ins: Instruction) -> None:
        """Set words [threads, n]; they are in flight until the threads have waited."""
        issuers = Issuers(batch, threads)
        self.check_unused(batch, words, issuers, "write", ins)
        self.words[words], self.filled[words], self.storing[words] = values, True, True
        if (self.words[words] != values).any():
            batch.find("threads of one store write different values to tensor memory", ins)
        self.stored.note(words, issuers.now)
        self.stores.append((threads, words))

    def wait(self, batch: Batch, waiting: np.ndarray, loads: bool) -> None:
        """Threads, bool [threads], have waited for what they loaded, or for what they stored."""
        if loads:
            self.registers.wait(batch, waiting)
        busy, under_way, kept = (self.loading, self.loads, []) if loads else (self.storing, self.stores, [])
        for threads, words in under_way:
            done = waiting[threads]
            busy[words[done]] = False
            if not done.all():
                kept.append((threads[~done], words[~done]))
        under_way[:] = kept


_memories: WeakKeyDictionary[Batch, TensorMemory] = WeakKeyDictionary()


def tensor_memory(batch: Batch) -> TensorMemory:
    if batch not in _memories:
        _memories[batch] = TensorMemory(batch)
    return _memories[batch]
