"""Memory of each thread that no other one sees (PTX ISA 5.1.5), and generic addresses (PTX ISA 6.4.1.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import proxy

import numpy as np

from ..findings import Fault
from .parser import LOCAL_START

if TYPE_CHECKING:
    from ..global_memory import GlobalMemory
    from .batch import Batch
    from .parser import Instruction

# What the generic address of a place in local memory is greater by; tensors lie below
WINDOW = np.uint64(1 << 62)


class LocalMemory:
    """``size`` bytes for each thread of a batch."""

    def __init__(self, size: int, batch: Batch):
        # not the batch itself, which refers to its memories: without a cycle it goes as soon as it has run
        self.batch, self.size = proxy(batch), size
        self.bytes = np.zeros((batch.threads, size), np.uint8)
        self.written = np.zeros((batch.threads, size), bool)

    def _places(self, addresses, size: int, mask, ins: Instruction):
        """(index of ``bytes``, lanes) of accesses of ``size`` bytes; a fault where one is not inside or misaligned."""
        lanes, threads = self.batch.lanes(mask)
        addresses = self.batch.full(addresses)[lanes].astype(np.int64) - LOCAL_START
        if (addresses % size).any():
            raise Fault(f"misaligned access of {size} bytes of local memory: {self.batch.place(ins)}")
        if addresses.size and (addresses.min() < 0 or addresses.max() + size > self.size):
            worst = int(addresses.max()) if addresses.max() + size > self.size else int(addresses.min())
            raise Fault(f"out of bounds of {self.size} bytes of local memory at {worst}: {self.batch.place(ins)}")
        return (threads[:, None], addresses[:, None] + np.arange(size)), lanes

    def load(self, addresses, size: int, mask, ins: Instruction):
        """(uint8 [lanes, size], lanes): what the threads of ``mask`` read, ``size`` bytes each."""
        places, lanes = self._places(addresses, size, mask, ins)
        if not self.written[places].all():
            self.batch.find("read of unwritten local memory", ins)
        return self.bytes[places], lanes

    def store(self, addresses, values: list, width: int, mask, ins: Instruction) -> None:
        """Write ``values``, each of ``width`` bits, one behind the other at each thread's address."""
        places, lanes = self._places(addresses, width // 8 * len(values), mask, ins)
        unsigned = np.dtype(f"u{width // 8}")
        data = [self.batch.full(value)[lanes].astype(unsigned) for value in values]
        self.bytes[places] = np.stack(data, axis=1).view(np.uint8)
        self.written[places] = True


class GenericMemory:
    """Local and global memory by one address, as each thread's tells. Shared memory has no generic addresses here."""

    def __init__(self, local: LocalMemory, memory: GlobalMemory):
        self.local, self.memory = local, memory

    def _parts(self, addresses, mask):
        """(memory, addresses in it, mask) for each memory that threads of ``mask`` address."""
        addresses = self.local.batch.full(addresses)
        inside = addresses >= WINDOW + np.uint64(LOCAL_START)
        for memory, own, start in ((self.local, inside, WINDOW), (self.memory, ~inside, np.uint64(0))):
            chosen = own if mask is None else own & mask
            if chosen.any():
                yield memory, addresses - start, chosen

    def load(self, addresses, size: int, mask, ins: Instruction):
        """(uint8 [lanes, size], lanes), as the memories themselves return it."""
        whole = np.zeros((self.local.batch.threads, size), np.uint8)
        for memory, own, chosen in self._parts(addresses, mask):
            data, lanes = memory.load(own, size, chosen, ins)
            whole[lanes] = data
        lanes, _ = self.local.batch.lanes(mask)
        return whole[lanes], lanes

    def store(self, addresses, values: list, width: int, mask, ins: Instruction) -> None:
        for memory, own, chosen in self._parts(addresses, mask):
            memory.store(own, values, width, chosen, ins)
