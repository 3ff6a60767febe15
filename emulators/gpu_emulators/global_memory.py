"""Global memory: the tensors that a launch was given and nothing else, and which threads touched what.

Threads of different CTAs, which AMD calls workgroups, are never ordered, those of a CTA by its barriers and those of a
warp by bar.warp.sync (PTX ISA 8, memory consistency model; LLVM, User Guide for AMDGPU Backend, Memory Model). Two
accesses to one place that are not ordered, and of which one is a write, are a race.

Accesses are followed in granules: the narrowest access of the kernel. A granule has two marks, of its last write and of
its reads. A mark is the time, the number of the CTA and its thread, from the top bits on. Time is how many barriers
there were, those of the CTA and of its warps. Numbers of threads begin at 1; behind them stand those of several threads
of each warp, then that of several of the CTA.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol
from weakref import proxy

import numpy as np

from .findings import Fault, Instruction

# Linux's flag by which memory takes no space before it is touched; Python names it from 3.13 on
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
THREAD_BITS, CTA_BITS = 11, 31
TIME_SHIFT = THREAD_BITS + CTA_BITS
WARP_SHIFT, MOST_THREADS = 5, 1024
SEVERAL = (1 << THREAD_BITS) - 1
CTA = ((1 << CTA_BITS) - 1) << THREAD_BITS
NOBODY, EVERYWHERE = 0, -1


@dataclass
class Region:
    """Bytes of a tensor that begin at ``start``; ``written`` tells which bytes hold something, None for all."""

    name: str
    start: int
    data: np.ndarray
    written: np.ndarray | None
    # marks of the last writer and of the readers of each granule since the launch
    writer: np.ndarray | None = field(default=None, repr=False)
    reader: np.ndarray | None = field(default=None, repr=False)

    @property
    def end(self) -> int:
        return self.start + self.data.size

    def unwritten(self) -> int:
        """How many bytes nothing has written yet."""
        return 0 if self.written is None else int(self.written.size - self.written.sum())

    def begin(self, granule: int) -> None:
        """A launch: what happened before it is ordered before it."""
        count = (self.end - 1) // granule - self.start // granule + 1 if self.data.size else 0
        self.writer, self.reader = marks(count), marks(count)


def marks(count: int) -> np.ndarray:
    """int64 zeros, that tensors of billions of elements can have too: they take memory where they are touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    return np.frombuffer(mmap.mmap(-1, max(count, 1) * 8, flags=flags), np.int64)


class Batch(Protocol):
    """The threads that run together, as far as memory has to know them.

    Attributes:
        thread: their numbers, from 0 on.
        cta: the CTA of each, counted from 0.
        first: the number of the first CTA in its grid.
        cta_threads: how many threads a CTA has.
        phase: how often each CTA has met at a barrier.
    """

    thread: np.ndarray
    cta: np.ndarray
    first: int
    cta_threads: int
    phase: np.ndarray

    def full(self, values: np.ndarray) -> np.ndarray: ...

    def lanes(self, mask: np.ndarray | None) -> tuple[np.ndarray | slice, np.ndarray]: ...

    def find(self, kind: str, ins: Instruction, detail: str = "") -> None: ...

    def place(self, ins: Instruction) -> str: ...


class GlobalMemory:
    """Tensors by address. Accesses lie at multiples of their size, or of ``alignment`` where that is less."""

    def __init__(self, alignment: int = 16):
        self.alignment = alignment
        self.regions: list[Region] = []
        self._starts = np.zeros(0, np.uint64)
        self.granule = 1
        # told of the addresses, the size and the instruction of each store
        self.before_store: Callable[[np.ndarray, int, Instruction], None] | None = None

    def register(self, start: int, array: np.ndarray, name: str, initialised: bool = True) -> Region:
        """Make an array's bytes accessible from the address ``start`` on.

        Of one that is not ``initialised`` reads are found that no write came before. Raises ValueError where it
        overlaps another.
        """
        data = array.reshape(-1).view(np.uint8)
        region = Region(name, int(start), data, None if initialised else np.zeros(data.size, bool))
        for other in self.regions:
            if region.start < other.end and other.start < region.end:
                raise ValueError(f"{name} overlaps {other.name}")
        self.regions = sorted([*self.regions, region], key=lambda one: one.start)
        self._starts = np.array([one.start for one in self.regions], np.uint64)
        return region

    def begin(self, granule: int) -> None:
        """A launch whose narrowest access has ``granule`` bytes."""
        self.granule = granule
        for region in self.regions:
            region.begin(granule)

    def attach(self, batch: Batch) -> None:
        # not the batch itself, which refers to its memories: without a cycle it goes as soon as it has run
        self.batch = proxy(batch)
        thread = batch.thread % batch.cta_threads
        self._threads = (batch.first + batch.cta) << THREAD_BITS | thread + 1
        self._several_of_warp = MOST_THREADS + 1 + (thread >> WARP_SHIFT)
        # barriers of warps of each CTA, and when it last met as a whole, and each thread's warp
        self._warp_barriers, self._phase = np.zeros_like(batch.phase), batch.phase.copy()
        self._met, self._met_in_warp = batch.phase.copy(), np.zeros_like(batch.thread)

    # -- places

    def _alignment(self, size: int) -> int:
        # of three words: that of one
        return min(size & -size, self.alignment)

    def _chosen(self, addresses, size, mask, ins):
        lanes, threads = self.batch.lanes(mask)
        addresses = self.batch.full(addresses)[lanes]
        if (addresses & np.uint64(self._alignment(size) - 1)).any():
            raise Fault(f"misaligned access of {size} bytes of global memory: {self.batch.place(ins)}")
        return addresses, lanes, threads

    def locate(self, addresses: np.ndarray, size: int, ins: Instruction):
        """[(region, which of the accesses, their offsets)]; a fault where one is not inside of a tensor."""
        if not len(addresses):
            return []
        low, high = int(addresses.min()), int(addresses.max()) + size
        at = int(np.searchsorted(self._starts, np.uint64(low), "right")) - 1
        if at >= 0 and high <= self.regions[at].end:
            region = self.regions[at]
            return [(region, slice(None), (addresses - np.uint64(region.start)).astype(np.int64))]
        found = []
        indices = np.searchsorted(self._starts, addresses, "right").astype(np.int64) - 1
        for index in np.unique(indices):
            chosen = np.flatnonzero(indices == index)
            inside = addresses[chosen]
            region = self.regions[index] if index >= 0 else None
            if region is None or int(inside.max()) + size > region.end:
                self._out_of_bounds(index, int(inside.max()), size, ins)
            found.append((region, chosen, (inside - np.uint64(region.start)).astype(np.int64)))
        return found

    def _out_of_bounds(self, index: int, worst: int, size: int, ins: Instruction) -> None:
        """Tell of which region, the one with that index or the next one, an access is the nearest."""
        near = [
            (worst + size - region.end, f"beyond {region.name}") for region in self.regions[max(index, 0) : index + 1]
        ]
        near += [(region.start - worst, f"before {region.name}") for region in self.regions[index + 1 : index + 2]]
        apart, where = min(near)
        place = self.batch.place(ins)
        raise Fault(f"out of bounds of global memory, {size} bytes at {worst:#x}, {apart} bytes {where}: {place}")

    # -- accesses

    def load(self, addresses, size: int, mask, ins: Instruction):
        """(uint8 [lanes, size], lanes): what the threads of ``mask`` read, ``size`` bytes each."""
        addresses, lanes, threads = self._chosen(addresses, size, mask, ins)
        return self.read(addresses, size, threads, ins), lanes

    def read(self, addresses: np.ndarray, size: int, threads: np.ndarray, ins: Instruction) -> np.ndarray:
        """uint8 [lanes, size] at addresses, on behalf of threads."""
        data = np.empty((len(addresses), size), np.uint8)
        for region, which, offsets in self.locate(addresses, size, ins):
            data[which] = _gather(region, offsets, size, min(8, self._alignment(size)))
            if region.written is not None and not region.written[offsets[:, None] + np.arange(size)].all():
                self.batch.find("read of unwritten global memory", ins, region.name)
            self._follow_read(region, offsets, size, threads[which], ins)
        return data

    def store(self, addresses, values: list, width: int, mask, ins: Instruction) -> None:
        """Write ``values``, each of ``width`` bits, one behind the other at each thread's address."""
        size = width // 8 * len(values)
        addresses, lanes, threads = self._chosen(addresses, size, mask, ins)
        if self.before_store is not None:
            self.before_store(addresses, size, ins)
        unsigned = np.dtype(f"u{width // 8}")
        table = np.empty((len(addresses), len(values)), unsigned)
        for k, value in enumerate(values):
            table[:, k] = self.batch.full(value)[lanes].astype(unsigned, copy=False)
        data = table.view(np.uint8)
        for region, which, offsets in self.locate(addresses, size, ins):
            index = offsets[:, None] + np.arange(size)
            self._follow_write(region, offsets, data[which], threads[which], ins)
            region.data[index] = data[which]
            self._check_store(region, offsets, data[which], self._own_marks(threads[which]), ins)
            if region.written is not None:
                region.written[index] = True

    def _check_store(self, region: Region, offsets, data, own, ins: Instruction) -> None:
        """Find threads of one store that write one place."""
        last = region.writer[self._granules(region, offsets, data.shape[1])]
        if (last == own).all():
            return
        if (region.data[offsets[:, None] + np.arange(data.shape[1])] != data).any():
            self.batch.find("threads of one store write different values to global memory", ins, region.name)
        elif ((last ^ own) & CTA).any():
            self.batch.find("two threads write the same value to global memory", ins, region.name)

    # -- order

    def _granules(self, region: Region, offsets: np.ndarray, size: int) -> np.ndarray:
        shift = self.granule.bit_length() - 1
        return (offsets + region.start % self.granule >> shift)[:, None] + np.arange(size >> shift)

    def _own_marks(self, threads: np.ndarray) -> np.ndarray:
        """[lanes, 1] marks of accesses now."""
        now = self.batch.phase + self._warp_barriers
        return (self._threads[threads] | now[self.batch.cta[threads]] << TIME_SHIFT)[:, None]

    def meet_in_warps(self, warps: np.ndarray | None) -> None:
        """bar.warp.sync of these warps, bool [warps], None for all."""
        self._note_phases()
        batch = self.batch
        threads = np.ones(batch.thread.size, bool) if warps is None else np.repeat(warps, 1 << WARP_SHIFT)
        self._warp_barriers += threads.reshape(batch.phase.size, -1).any(1)
        now = batch.phase + self._warp_barriers
        self._met_in_warp = np.where(threads, now[batch.cta], self._met_in_warp)

    def _note_phases(self) -> None:
        """Before the first barrier of a warp in a phase: when that phase began."""
        phase = self.batch.phase
        new = phase > self._phase
        self._met = np.where(new, phase + self._warp_barriers, self._met)
        self._phase = phase.copy()

    def _is_open(self, earlier: np.ndarray, own: np.ndarray, threads: np.ndarray) -> np.ndarray:
        """Where an earlier access is not ordered before one of ``own``, of threads, now."""
        differing = earlier ^ own
        elsewhere = differing & CTA != 0
        if not self._warp_barriers.any():
            return (earlier != NOBODY) & (elsewhere | (differing >> THREAD_BITS == 0) & (differing != 0))
        self._note_phases()
        time = earlier >> TIME_SHIFT
        ordered = time < self._met[self.batch.cta[threads]][:, None]
        ordered |= self._of_warp(earlier, threads) & (time < self._met_in_warp[threads][:, None])
        return (earlier != NOBODY) & (elsewhere | ~ordered & (differing & SEVERAL != 0))

    def _of_warp(self, earlier: np.ndarray, threads: np.ndarray) -> np.ndarray:
        """Where marks of a thread's own CTA are of threads of its warp alone."""
        several, number = self._several_of_warp[threads][:, None], earlier & SEVERAL
        warps = (number - 1 >> WARP_SHIFT) + MOST_THREADS + 1
        return (number == several) | (number <= MOST_THREADS) & (warps == several)

    def _joined(self, earlier: np.ndarray, own: np.ndarray, threads: np.ndarray) -> np.ndarray:
        """Marks of two readers that are not ordered: several threads of a warp, of a CTA, or of more than one."""
        of_warp = self._of_warp(earlier, threads) & self._of_warp(own, threads)
        together = own & ~SEVERAL | np.where(of_warp, self._several_of_warp[threads][:, None], SEVERAL)
        return np.where((earlier ^ own) & CTA == 0, together, EVERYWHERE)

    def _follow_read(self, region: Region, offsets, size: int, threads, ins: Instruction) -> None:
        index = self._granules(region, offsets, size)
        own = self._own_marks(threads)
        writers = region.writer[index]
        if writers.any() and self._is_open(writers, own, threads).any():
            self.batch.find("global race: read after another thread's write", ins, region.name)
        readers = region.reader[index]
        new = np.broadcast_to(own, index.shape)
        if readers.any():
            new = np.where(self._is_open(readers, own, threads), self._joined(readers, own, threads), own)
        region.reader[index] = new
        won = region.reader[index]
        lost = won != new
        if lost.any():
            # several threads of this instruction read the same
            both = self._joined(won, new, threads)
            region.reader[index[lost]] = both[lost]
            # those of the CTA rather than of a warp, and of all of them rather than of a CTA
            for wider in (np.bitwise_and(both, SEVERAL) == SEVERAL, both == EVERYWHERE):
                region.reader[index[lost & wider]] = both[lost & wider]

    def _follow_write(self, region: Region, offsets, data, threads, ins: Instruction) -> None:
        size = data.shape[1]
        index, own = self._granules(region, offsets, size), self._own_marks(threads)
        writers = region.writer[index]
        if writers.any() and (clash := self._is_open(writers, own, threads)).any():
            differing = region.data[offsets[:, None] + np.arange(size)] != data
            same = not differing.reshape(*clash.shape, -1)[clash].any()
            kind = "two threads write the same value to global memory" if same else "global race: write after write"
            self.batch.find(kind, ins, region.name)
        readers = region.reader[index]
        if readers.any() and self._is_open(readers, own, threads).any():
            self.batch.find("global race: write after another thread's read", ins, region.name)
        region.writer[index] = own


def _gather(region: Region, offsets: np.ndarray, size: int, width: int) -> np.ndarray:
    # offsets of aligned accesses are no multiples where the tensor starts in between
    if region.start % width or region.data.ctypes.data % width:
        return region.data[offsets[:, None] + np.arange(size)]
    whole = region.data[: region.data.size // width * width].view(f"u{width}")
    return whole[offsets[:, None] // width + np.arange(size // width)].view(np.uint8)
