"""Memory accesses that are under way, and what has to wait for them.

CDNA3 ISA, Manually Inserted Wait States and Data Dependency Resolution: a wave counts its vector memory accesses
(vmcnt), and its accesses of LDS and scalar loads together (lgkmcnt). Accesses of vector memory come back in the order
of their issue, and so do those of LDS. Scalar loads come back in any order, so that only a wait for none of them
tells anything while there are some. A result may be read, and its register written anew, after such a wait alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import proxy

import numpy as np

from ..findings import Instruction
from .parser import scalar_name, vector_name

if TYPE_CHECKING:
    from .batch import Batch

# How far the counters count: CDNA3 ISA, S_WAITCNT
MOST = {"vmcnt": 63, "lgkmcnt": 15, "expcnt": 7}


@dataclass(eq=False)
class Access:
    """An access that some waves have begun. ``open``, bool [waves]: for which of them it is still under way."""

    counter: str
    open: np.ndarray
    scalar: bool = False
    vectors: tuple[int, ...] = ()
    scalars: tuple[int, ...] = ()
    # of LDS: [lanes, granules] that it touches, the wave of each lane, and whether it writes
    granules: np.ndarray | None = None
    waves: np.ndarray | None = field(default=None, repr=False)
    writes: bool = False


class Outstanding:
    """The accesses of a batch's waves that are under way, oldest first, and the registers that they fill."""

    def __init__(self, batch: Batch):
        # not the batch itself: without a cycle it goes as soon as it has run
        self.batch = proxy(batch)
        self.accesses: dict[str, list[Access]] = {"vmcnt": [], "lgkmcnt": []}
        self.vectors: dict[int, list[Access]] = {}
        self.scalars: dict[int, list[Access]] = {}

    def begin(self, access: Access, ins: Instruction) -> None:
        """An access of the waves that run; the registers it fills are not to be touched."""
        for registers, indices, name in (
            (self.vectors, access.vectors, vector_name),
            (self.scalars, access.scalars, scalar_name),
        ):
            for index in indices:
                for other in registers.get(index, ()):
                    # of one kind they come back in order, so that the last one stays
                    in_order = other.counter == access.counter and not other.scalar and not access.scalar
                    if not in_order and (other.open & access.open).any():
                        self.batch.find("write of a register that a load still fills", ins, name(index))
                registers.setdefault(index, []).append(access)
        self.accesses[access.counter].append(access)

    def wait(self, counter: str, most: int) -> None:
        """s_waitcnt of the waves that run: until at most so many of their accesses are under way."""
        rows, accesses = self.batch.rows, self.accesses[counter]
        if not accesses:
            return
        running = np.ones(self.batch.waves, bool) if rows is None else rows
        if most == 0:
            for access in accesses:
                access.open &= ~running
        else:
            scalar = np.logical_or.reduce([access.open for access in accesses if access.scalar] or [~running & False])
            younger = np.zeros(self.batch.waves, np.int64)
            for access in reversed(accesses):
                was = access.open.copy()
                access.open &= ~(running & ~scalar & (younger >= most))
                younger += was
        done = [access for access in accesses if not access.open.any()]
        for access in done:
            self._forget(self.vectors, access.vectors, access)
            self._forget(self.scalars, access.scalars, access)
        if done:
            self.accesses[counter] = [access for access in accesses if access.open.any()]

    def _forget(self, registers: dict[int, list[Access]], indices: tuple[int, ...], access: Access) -> None:
        for index in indices:
            registers[index].remove(access)
            if not registers[index]:
                del registers[index]

    def _open(self, registers: dict[int, list[Access]], index: int) -> bool:
        rows = self.batch.rows
        return any((one.open if rows is None else one.open & rows).any() for one in registers[index])

    def read(self, registers: dict[int, list[Access]], index: int, name: str, ins: Instruction) -> None:
        if self._open(registers, index):
            self.batch.find("read of a register before its load was waited for", ins, name)

    def overwrite(self, registers: dict[int, list[Access]], index: int, name: str, ins: Instruction) -> None:
        if self._open(registers, index):
            self.batch.find("write of a register that a load still fills", ins, name)

    def of_lds(self) -> list[Access]:
        """Those of LDS, oldest first."""
        return [access for access in self.accesses["lgkmcnt"] if access.granules is not None]

    def none_of(self, waves: np.ndarray) -> np.ndarray:
        """bool [waves]: which of these have no access of vector memory under way."""
        under_way = [access.open for access in self.accesses["vmcnt"]]
        return waves & ~np.logical_or.reduce(under_way) if under_way else waves
