"""Local data share, LDS, of the workgroups of a batch, and which wave touched what since the last barrier.

A wave's accesses happen in the order of its code (CDNA3 ISA, Data Share Operations). Those of different waves are
ordered by s_barrier, as far as a wave has waited for its own before it: the barrier itself waits for none (LLVM, User
Guide for AMDGPU Backend, Memory Model for GFX942). What is not ordered, and of which one is a write, is a race.

Accesses are followed in granules: the narrowest access of the kernel. A granule has two codes, of its last write and
of its reads since: the number of a wave, or one below zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import proxy

import numpy as np

from ..findings import Fault, Instruction
from .parser import WAVE
from .waits import Access

if TYPE_CHECKING:
    from .batch import Batch

NOBODY, UNWRITTEN, MANY = -1, -2, -3
FILLING, WORD = 0xA5, 4


class LDS:
    """``size`` bytes for each workgroup, a multiple of 16."""

    def __init__(self, size: int, ctas: int, granule: int):
        self.size, self.ctas, self.granule = size, ctas, granule
        self.bytes = np.full(ctas * size, FILLING, np.uint8)
        self.writer = np.full(ctas * size // granule, UNWRITTEN, np.int32)
        self.reader = np.full(ctas * size // granule, NOBODY, np.int32)

    def attach(self, batch: Batch) -> None:
        # not the batch itself, which refers to its memories: without a cycle it goes as soon as it has run
        self.batch = proxy(batch)

    def _positions(self, addresses: np.ndarray, size: int, ins: Instruction):
        """([lanes] places in ``bytes``, lanes, their waves) of the lanes that are on."""
        mask = None if self.batch.mask is None else self.batch.mask.reshape(-1)
        lanes, threads = self.batch.lanes(mask)
        addresses = self.batch.full(addresses)[lanes].astype(np.int64)
        if (addresses & size - 1).any():
            raise Fault(f"misaligned access of {size} bytes of LDS: {self.batch.place(ins)}")
        if addresses.size and int(addresses.max()) + size > self.size:
            worst = int(addresses.max())
            raise Fault(f"out of bounds of {self.size} bytes of LDS at {worst}: {self.batch.place(ins)}")
        return addresses + self.batch.cta[threads] * self.size, lanes, threads // WAVE

    def _granules(self, positions: np.ndarray, size: int) -> np.ndarray:
        return (positions // self.granule)[:, None] + np.arange(size // self.granule)

    def load(self, addresses: np.ndarray, size: int, ins: Instruction):
        """(uint8 [lanes, size], lanes, [lanes, granules], waves): what the lanes that are on read."""
        positions, lanes, waves = self._positions(addresses, size, ins)
        granules = self._granules(positions, size)
        writer = self.writer[granules]
        if (writer == UNWRITTEN).any():
            self.batch.find("read of unwritten LDS", ins)
        if ((writer >= 0) & (writer != waves[:, None])).any():
            self.batch.find("LDS race: read after another wave's write", ins)
        self._note_read(granules, waves)
        return self._read(positions, size), lanes, granules, waves

    def _places(self, positions: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """(``bytes`` in words, or in the size of an access that is less; which of them accesses touch)."""
        width = min(size, WORD)
        return self.bytes.view(f"u{width}"), (positions // width)[:, None] + np.arange(size // width)

    def _read(self, positions: np.ndarray, size: int) -> np.ndarray:
        """uint8 [lanes, size]."""
        table, index = self._places(positions, size)
        return table[index].view(np.uint8)

    def _note_read(self, granules: np.ndarray, waves: np.ndarray) -> None:
        own = np.broadcast_to(waves[:, None], granules.shape).astype(np.int32)
        old = self.reader[granules]
        new = np.where((old == NOBODY) | (old == own), own, MANY)
        self.reader[granules] = new
        # several waves of this instruction read the same
        lost = self.reader[granules] != new
        self.reader[granules[lost]] = MANY

    def store(self, addresses: np.ndarray, data: np.ndarray, ins: Instruction):
        """Write uint8 [threads, size] of the lanes that are on; returns ([lanes, granules], waves)."""
        size = data.shape[1]
        positions, lanes, waves = self._positions(addresses, size, ins)
        granules, data, own = self._granules(positions, size), data[lanes], waves[:, None].astype(np.int32)
        writer, reader = self.writer[granules], self.reader[granules]
        clash = (writer >= 0) & (writer != own)
        if clash.any():
            self._find_double_write(clash, self._read(positions, size) == data, ins)
        if ((reader == MANY) | (reader >= 0) & (reader != own)).any():
            self.batch.find("LDS race: write after another wave's read", ins)
        self.writer[granules], self.reader[granules] = own, NOBODY
        table, index = self._places(positions, size)
        table[index] = np.ascontiguousarray(data).view(table.dtype)
        same = self._read(positions, size) == data
        clash = self.writer[granules] != own
        if clash.any():
            self._find_double_write(clash, same, ins)
        if not same.all():
            self.batch.find("lanes of one store write different values to LDS", ins)
        return granules, waves

    def _find_double_write(self, clash: np.ndarray, same: np.ndarray, ins: Instruction) -> None:
        """Waves write one place, ``clash`` bool [lanes, granules]; ``same`` bool [lanes, size] where one value."""
        if same.reshape(*clash.shape, -1).all(-1)[clash].all():
            self.batch.find("two waves write the same value to LDS", ins)
        else:
            self.batch.find("LDS race: write after another wave's write", ins)

    def meet(self, ctas: np.ndarray, under_way: list[Access]) -> None:
        """A barrier of these workgroups, bool [ctas]: what was waited for before it is ordered before what follows."""
        writer, reader = self.writer.reshape(self.ctas, -1), self.reader.reshape(self.ctas, -1)
        # what is unwritten stays so
        writer[ctas] = np.minimum(writer[ctas], NOBODY)
        reader[ctas] = NOBODY
        for access in under_way:
            still = access.open[access.waves] & ctas[self.batch.cta_of_wave[access.waves]]
            granules, waves = access.granules[still], access.waves[still]
            if access.writes:
                self.writer[granules] = waves[:, None]
            else:
                self._note_read(granules, waves)
