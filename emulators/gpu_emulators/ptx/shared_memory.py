"""Shared memory of the CTAs of a batch, and who touched what since the last barrier.

Accesses of different threads are ordered by a barrier of the CTA, or by bar.warp.sync within a warp (PTX ISA 8, memory
consistency model; 9.7.13, parallel synchronization). What is not ordered, and of which one is a write, is a race.

Accesses are followed in granules: the narrowest access of the kernel. A granule has two codes, of its last write and of
its reads since. With T threads and W warps: ``t`` is thread t; ``T + w`` warp w, ordered for all of its threads;
``T + W + w`` several threads of warp w.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import proxy

import numpy as np

from ..findings import Fault

if TYPE_CHECKING:
    from .batch import Batch
    from .parser import Instruction

NOBODY, UNWRITTEN, IN_FLIGHT, MANY = -1, -2, -3, -4
FILLING = 0xA5
# the largest access
ALIGNMENT = 16
WARP_SHIFT = 5


class SharedMemory:
    """``given`` bytes for each CTA, ``size`` apart. ``proxies`` where products read past the generic proxy."""

    def __init__(self, given: int, ctas: int, granule: int, proxies: bool = False):
        self.given, self.ctas, self.granule, self.proxies = given, ctas, granule, proxies
        size = self.size = -(-given // ALIGNMENT) * ALIGNMENT
        self._shift = granule.bit_length() - 1
        self.bytes = np.full(ctas * size, FILLING, np.uint8)
        count = ctas * size // granule
        self.writer = np.full(count, UNWRITTEN, np.int32)
        self.reader = np.full(count, NOBODY, np.int32)
        # written, and not handed to the asynchronous proxy; read by so many products that are under way
        self.unfenced = np.zeros(count if proxies else 0, bool)
        self.held = np.zeros(count if proxies else 0, np.int16)
        # the last product that reads it, of those that are numbered, and what threads know to be complete of these
        self.serial = np.zeros(count if proxies else 0, np.int32)
        self.complete: Callable[[np.ndarray], np.ndarray] | None = None
        # where mbarriers lie, None before the first
        self.occupied: np.ndarray | None = None

    def attach(self, batch: Batch) -> None:
        # not the batch itself, which refers to its memories: without a cycle it goes as soon as it has run
        self.batch = proxy(batch)
        self.several = np.int32(batch.threads + batch.threads // 32)
        # for each thread the code that stands for its warp
        self.own_warp = (batch.threads + batch.warps).astype(np.int32)
        self.own_thread = batch.thread.astype(np.int32)
        # which threads have come to a proxy fence since the last barrier
        self.fenced = np.zeros(batch.threads, bool)

    # -- places

    def positions(self, addresses: np.ndarray, ctas: np.ndarray, size: int, ins: Instruction) -> np.ndarray:
        """Where accesses of ``size`` bytes begin in ``bytes``; a fault beyond the CTA's memory."""
        addresses = addresses.astype(np.int64)
        if addresses.size and (addresses.min() < 0 or addresses.max() + size > self.given):
            worst = int(addresses.max()) if addresses.max() + size > self.given else int(addresses.min())
            raise Fault(f"out of bounds of {self.given} bytes of shared memory at {worst}: {self.batch.place(ins)}")
        return addresses + ctas * self.size

    def _chosen(self, addresses, size, mask, ins):
        lanes, threads = self.batch.lanes(mask)
        addresses = self.batch.full(addresses)[lanes]
        if (addresses & addresses.dtype.type(size - 1)).any():
            raise Fault(f"misaligned access of {size} bytes of shared memory: {self.batch.place(ins)}")
        return self.positions(addresses, self.batch.cta[lanes], size, ins), lanes, threads

    def _granules(self, positions: np.ndarray, size: int) -> np.ndarray:
        """[lanes, granules] of accesses."""
        return (positions >> self._shift)[:, None] + np.arange(size >> self._shift)

    def _table(self, width: int) -> np.ndarray:
        return self.bytes.view(f"u{width}")

    def _touched(self, index: np.ndarray) -> np.ndarray:
        """The granules of places of ``bytes``, each once."""
        touched = np.zeros(self.writer.size, bool)
        touched[index >> self._shift] = True
        return np.flatnonzero(touched)

    # -- accesses of threads

    def load(self, addresses, size: int, mask, ins: Instruction, by_warps: bool = False):
        """(uint8 [lanes, size], lanes): what the threads of ``mask`` read, ``size`` bytes each.

        ``by_warps`` where any thread of its warp may read what a thread points to.
        """
        positions, lanes, threads = self._chosen(addresses, size, mask, ins)
        granules = self._granules(positions, size)
        self._check_read(granules, threads, ins, by_warps)
        self._note_read(granules, threads, by_warps)
        return self._read(positions, size), lanes

    def _read(self, positions: np.ndarray, size: int) -> np.ndarray:
        width = min(size, 8)
        table = self._table(width)
        first = positions // width
        if size == width:
            return table[first][:, None].view(np.uint8)
        return table[first[:, None] + np.arange(size // width)].view(np.uint8)

    def store(self, addresses, values: list, width: int, mask, ins: Instruction, by_warps: bool = False) -> None:
        """Write ``values``, each of ``width`` bits, one behind the other at each thread's address.

        ``by_warps`` where any thread of its warp may write what a thread points to.
        """
        size = width // 8 * len(values)
        positions, lanes, threads = self._chosen(addresses, size, mask, ins)
        unsigned = np.dtype(f"u{width // 8}")
        data = np.empty((len(positions), len(values)), unsigned)
        for k, value in enumerate(values):
            data[:, k] = self.batch.full(value)[lanes].astype(unsigned, copy=False)
        self.write(positions, data.view(np.uint8), threads, ins, by_warps)

    def write(
        self, positions: np.ndarray, data: np.ndarray, threads: np.ndarray, ins: Instruction, by_warps: bool = False
    ) -> None:
        """Write uint8 [lanes, size] where positions begin, on behalf of threads."""
        granules = self._granules(positions, data.shape[1])
        self._check_write(granules, threads, ins, positions, data, by_warps)
        own = self.own_thread[threads][:, None]
        self.writer[granules] = self._several_of_warp(threads) if by_warps else own
        self.reader[granules] = NOBODY
        self._put(positions, data)
        if (by_warps or (self.writer[granules] != own).any()) and (self._read(positions, data.shape[1]) != data).any():
            self.batch.find("threads of one store write different values to shared memory", ins)

    def _put(self, positions: np.ndarray, data: np.ndarray) -> None:
        size = data.shape[1]
        width = min(size, 8)
        self._table(width)[positions[:, None] // width + np.arange(size // width)] = data.view(f"u{width}")

    # -- order

    def _ordered(self, codes: np.ndarray, threads: np.ndarray, by_warps: bool = False) -> np.ndarray:
        ordered = (codes == NOBODY) | (codes == self.own_warp[threads][:, None])
        return ordered if by_warps else ordered | (codes == self.own_thread[threads][:, None])

    def _several_of_warp(self, threads: np.ndarray) -> np.ndarray:
        """[lanes, 1] codes of several threads of each thread's warp."""
        return self.own_warp[threads][:, None] + np.int32(self.batch.threads >> WARP_SHIFT)

    def _check_read(self, granules: np.ndarray, threads: np.ndarray, ins: Instruction, by_warps: bool) -> None:
        codes = self.writer[granules]
        if (codes == NOBODY).all():
            return
        bad = codes[~self._ordered(codes, threads, by_warps)]
        if (bad == UNWRITTEN).any():
            self.batch.find("read of unwritten shared memory", ins)
        if (bad == IN_FLIGHT).any():
            self.batch.find("read of shared memory in flight", ins)
        if (bad >= 0).any():
            self.batch.find("shared race: read after another thread's write", ins)

    def _note_read(self, granules: np.ndarray, threads: np.ndarray, by_warps: bool) -> None:
        thread, warp = self.own_thread[threads][:, None], self.own_warp[threads][:, None]
        several = self._several_of_warp(threads)
        old, own = self.reader[granules], several if by_warps else thread
        if (old == NOBODY).all():
            new = np.broadcast_to(own, granules.shape)
        else:
            of_warp = (old >> WARP_SHIFT) == (thread >> WARP_SHIFT)
            free = (old == NOBODY) | (old == thread) | (old == warp)
            new = np.where(free, own, np.where(of_warp | (old == several), several, MANY)).astype(np.int32)
        self.reader[granules] = new
        won = self.reader[granules]
        lost = won != new
        if lost.any():
            # several threads of this instruction read the same
            same_warp = (self._warp_of(won) == self._warp_of(new)) & lost
            self.reader[granules[same_warp]] = np.broadcast_to(several, granules.shape)[same_warp]
            self.reader[granules[lost & ~same_warp]] = MANY

    def _warp_of(self, codes: np.ndarray) -> np.ndarray:
        """Warps of codes of threads and of several threads of a warp; below zero for others."""
        return np.where(codes >= self.several, codes - self.several, codes >> WARP_SHIFT)

    def _check_write(self, granules, threads, ins, positions, data, by_warps: bool = False) -> None:
        codes = self.writer[granules]
        # the first write, and one behind a barrier
        idle = codes <= NOBODY
        if (codes == IN_FLIGHT).any():
            self.batch.find("write to shared memory in flight", ins)
        if not idle.all():
            clash = ~(idle | self._ordered(codes, threads, by_warps))
            if clash.any():
                self._find_double_write(clash, positions, data, ins)
        readers = self.reader[granules]
        if not (readers == NOBODY).all() and not self._ordered(readers, threads, by_warps).all():
            self.batch.find("shared race: write after another thread's read", ins)
        if self.occupied is not None and self.occupied[granules].any():
            self.batch.find("write to shared memory that holds an mbarrier", ins)
        if self.proxies:
            if self.held[granules].any() or self._still_read(granules, threads):
                self.batch.find("write to shared memory that a product still reads", ins)
            self.unfenced[granules] = True

    def _still_read(self, granules: np.ndarray, threads: np.ndarray) -> bool:
        """Whether numbered products read there of which the threads don't know that they are complete."""
        return self.complete is not None and bool((self.serial[granules] > self.complete(threads)[:, None]).any())

    def _find_double_write(self, clash, positions, data, ins: Instruction) -> None:
        present = self._read(positions, data.shape[1]).reshape(*clash.shape, -1)
        same = (present == data.reshape(*clash.shape, -1)).all(-1)
        if same[clash].all():
            self.batch.find("two threads write the same value to shared memory", ins)
        else:
            self.batch.find("shared race: write after another thread's write", ins)

    def meet(self, ctas: np.ndarray) -> None:
        """A barrier of these CTAs, bool [ctas]: what was before it is ordered before what follows."""
        rows = slice(None) if ctas.all() else ctas
        if self.proxies:
            self._hand_over(ctas)
        # no access is open any longer; what is unwritten or in flight stays so
        writer = self.writer.reshape(self.ctas, -1)
        writer[rows] = np.minimum(writer[rows], NOBODY)
        self.reader.reshape(self.ctas, -1)[rows] = NOBODY

    def _hand_over(self, ctas: np.ndarray) -> None:
        """A barrier of these CTAs tells all of their threads of the fences before it."""
        by_cta = self.fenced.reshape(self.ctas, -1)
        # what was written before the barrier before this one, the fence is ordered behind
        seen = (by_cta.any(1) & ctas)[:, None] & (self.writer == NOBODY).reshape(self.ctas, -1)
        self.unfenced[seen.reshape(-1)] = False
        by_cta[ctas] = False

    def meet_in_warps(self, warps: np.ndarray | None) -> None:
        """bar.warp.sync of these warps, bool [warps], None for all."""
        threads = self.batch.threads
        for codes in (self.writer, self.reader):
            of_threads = (codes >= 0) & (codes < threads)
            of_several = codes >= self.several
            if warps is not None:
                of_threads &= warps[np.where(of_threads, codes >> WARP_SHIFT, 0)]
                of_several &= warps[np.where(of_several, codes - self.several, 0)]
            codes[of_threads] = threads + (codes[of_threads] >> WARP_SHIFT)
            codes[of_several] -= threads >> WARP_SHIFT
        of_warp = self.fenced.reshape(-1, 1 << WARP_SHIFT)
        of_warp |= of_warp.any(1, keepdims=True) & (True if warps is None else warps[:, None])

    # -- mbarriers

    def occupy(self, positions: np.ndarray, size: int) -> None:
        """Mbarriers begin at these places of ``bytes``: until they are vacated nothing may be written there."""
        if self.occupied is None:
            self.occupied = np.zeros(self.writer.size, bool)
        self.occupied[self._granules(positions, size)] = True

    def tells(self, positions: np.ndarray, size: int, threads: np.ndarray) -> bool:
        """Whether threads are ordered behind what was written last at the places that begin here."""
        return bool(self._ordered(self.writer[self._granules(positions, size)], threads).all())

    def vacate(self, positions: np.ndarray, size: int) -> None:
        if self.occupied is not None:
            self.occupied[self._granules(positions, size)] = False

    # -- copies that are under way

    def depart(self, positions: np.ndarray, data: np.ndarray, threads: np.ndarray, ins: Instruction) -> None:
        """A copy of uint8 [lanes, size] to here begins: until it arrives nobody may touch the bytes."""
        granules = self._granules(positions, data.shape[1])
        filling = np.full_like(data, FILLING)
        self._check_write(granules, threads, ins, positions, filling)
        self.writer[granules] = IN_FLIGHT
        self.reader[granules] = NOBODY
        self._put(positions, data)
        if (self._read(positions, data.shape[1]) != data).any():
            self.batch.find("threads of one copy bring different values to shared memory", ins)
        self._put(positions, filling)

    def arrive(self, positions: np.ndarray, data: np.ndarray, threads: np.ndarray) -> None:
        """The thread that began the copy has waited for it: now it counts as its write."""
        self._put(positions, data)
        granules = self._granules(positions, data.shape[1])
        self.writer[granules] = self.own_thread[threads][:, None]
        if self.proxies:
            # cp.async writes by the generic proxy (PTX ISA 9.7.9.25.1)
            self.unfenced[granules] = True

    # -- products that read past the generic proxy

    def gather(self, index: np.ndarray, threads: np.ndarray, ins: Instruction) -> np.ndarray:
        """uint8 at these places [n, ...] of ``bytes``, read by n products, each issued by threads [n, k]."""
        granules = self._touched(index)
        codes = self.writer[granules]
        if (codes == UNWRITTEN).any():
            self.batch.find("product of unwritten shared memory", ins)
        if (codes == IN_FLIGHT).any():
            self.batch.find("product of shared memory in flight", ins)
        if (codes >= 0).any():
            self.batch.find("shared race: product after a thread's write", ins)
        # who has come to a fence since the barrier may issue products of what that barrier ordered
        fenced = self.fenced[threads].all(1)
        if not fenced.all() and self.unfenced[self._touched(index[~fenced])].any():
            self.batch.find("product of memory written without a proxy fence", ins)
        elif (self.unfenced[granules] & (codes != NOBODY)).any():
            self.batch.find("product of memory written without a proxy fence", ins)
        return self.bytes[index]

    def hold(self, index: np.ndarray) -> None:
        """A product that is under way reads these places of ``bytes``."""
        self.held[self._touched(index)] += 1

    def release(self, index: np.ndarray) -> None:
        """The product is complete. A barrier alone tells it to threads that have not waited themselves."""
        granules = self._touched(index)
        self.held[granules] -= 1
        self.reader[granules] = MANY

    def number(self, index: np.ndarray, serials: np.ndarray) -> None:
        """Products with these numbers [n] of their CTAs read places [n, ...]; ``complete`` tells who has waited."""
        self.serial[index.reshape(len(index), -1) >> self._shift] = serials[:, None]

    def fence(self, mask: np.ndarray | None) -> None:
        """Hand to the asynchronous proxy what the threads of ``mask`` have written, or see behind a barrier.

        A fence is part of the order (PTX ISA 8.9.5, causality order): it is for the thread itself, and behind the next
        barrier for those that it meets there.
        """
        if mask is None:
            self.fenced[:] = True
            self.unfenced[self.writer >= 0] = False
            return
        self.fenced |= mask
        open_ = np.flatnonzero(self.writer >= 0)
        codes = self.writer[open_]
        by_warp = mask.reshape(-1, 1 << WARP_SHIFT)
        # of threads, of warps that have met, of several threads of a warp
        whose = np.concatenate([mask, by_warp.any(1), by_warp.all(1)])
        self.unfenced[open_[whose[codes]]] = False
