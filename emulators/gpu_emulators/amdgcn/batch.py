"""Some workgroups of a launch that run together: registers of their waves, which lanes are on, memories, findings."""

from __future__ import annotations

import numpy as np

from ..findings import Findings, Instruction
from ..global_memory import GlobalMemory
from .lds import LDS
from .parser import EXEC, SCALARS, VECTORS, WAVE, Kernel, scalar_name, vector_name
from .waits import Outstanding

# what registers hold before they are written: no number that a program would go on with unnoticed
POISON = np.uint32(0x7FA5A5A5)


class Batch:
    """Workgroups ``first`` to ``first + ctas`` of a grid.

    A vector register is an array [waves, 64], a scalar register one [waves], both uint32. Instructions compute for all
    waves, and write what belongs to lanes that are on in waves that run.

    Attributes:
        exec: bool [waves, 64], the lanes that are on.
        rows: bool [waves], the waves that run the present block; None: all.
        mask: bool [waves, 64], the lanes that are on in those; None: all.
        scc: bool [waves].
    """

    def __init__(
        self,
        kernel: Kernel,
        arguments: int,
        grid: tuple[int, int, int],
        first: int,
        ctas: int,
        lds: LDS,
        memory: GlobalMemory,
        findings: Findings,
    ):
        self.kernel, self.findings, self.first, self.ctas = kernel, findings, first, ctas
        self.cta_threads, self.cta_waves = kernel.threads, kernel.threads // WAVE
        self.waves = ctas * self.cta_waves
        self.shape = self.waves, WAVE
        self.thread = np.arange(self.waves * WAVE, dtype=np.int64)
        self.cta = self.thread // kernel.threads
        self.cta_of_wave = np.arange(self.waves) // self.cta_waves
        self.vectors: list[np.ndarray] = [np.broadcast_to(POISON, self.shape)] * VECTORS
        self.scalars: list[np.ndarray] = [np.broadcast_to(POISON, self.waves)] * SCALARS
        # where registers are not written yet; one that is in neither is, everywhere
        self.unwritten: dict[int, np.ndarray] = dict.fromkeys(range(VECTORS), np.ones(self.shape, bool))
        self.unwritten_scalars: dict[int, np.ndarray] = dict.fromkeys(range(SCALARS), np.ones(self.waves, bool))
        self.outstanding = Outstanding(self)
        # how often the waves of a workgroup have met at a barrier with all their accesses behind them
        self.phase = np.zeros(ctas, np.int64)
        self.scc, self.scc_unwritten = np.zeros(self.waves, bool), True
        self.exec = np.ones(self.shape, bool)
        self.run_all()
        self._fill_registers(arguments, grid)
        self.lds, self.memory = lds, memory
        lds.attach(self)
        memory.attach(self)

    def _fill_registers(self, arguments: int, grid: tuple[int, int, int]) -> None:
        """User Guide for AMDGPU Backend, Initial Kernel Execution State, SGPR and VGPR Register Set Up Order."""
        described = self.kernel.descriptor
        self.write_scalar(0, np.full(self.waves, arguments & 0xFFFFFFFF, np.uint32))
        self.write_scalar(1, np.full(self.waves, arguments >> 32, np.uint32))
        number = self.first + self.cta_of_wave
        across, along, _ = grid
        at = described["user_sgpr_count"]
        for axis, index in zip(
            "xyz", (number % across, number // across % along, number // across // along), strict=True
        ):
            if described[f"system_sgpr_workgroup_id_{axis}"]:
                self.write_scalar(at, index.astype(np.uint32))
                at += 1
        self.write_vector(0, (self.thread % self.cta_threads).astype(np.uint32).reshape(self.shape))
        self.unwritten_scalars.pop(EXEC)
        self.unwritten_scalars.pop(EXEC + 1)

    def preload(self, words: np.ndarray) -> None:
        """Put the first words of the arguments into registers, as User Guide, Preloaded Kernel Arguments, has it."""
        for k, word in enumerate(words):
            self.write_scalar(2 + k, np.full(self.waves, word, np.uint32))

    # -- which lanes

    def run_all(self) -> None:
        self.run_waves(None)

    def run_waves(self, rows: np.ndarray | None) -> None:
        """From here on those waves run, None: all."""
        self.rows = rows
        self._update_mask()

    def set_exec(self, lanes: np.ndarray) -> None:
        """Switch lanes of the waves that run."""
        self.exec = lanes if self.rows is None else np.where(self.rows[:, None], lanes, self.exec)
        self._update_mask()

    def _update_mask(self) -> None:
        on = self.exec if self.rows is None else self.exec & self.rows[:, None]
        self.mask = None if on.all() else on

    # -- findings

    def find(self, kind: str, ins: Instruction, detail: str = "") -> None:
        self.findings.add(kind, self.kernel.name, ins, detail)

    def place(self, ins: Instruction) -> str:
        return f"{self.kernel.name}, line {ins.line}, {ins.text} [{ins.where}]"

    # -- registers

    def vector(self, index: int, ins: Instruction) -> np.ndarray:
        """uint32 [waves, 64], read by the lanes that are on."""
        if self.undefined_lanes(index) is not None:
            self.find("read of an unwritten register", ins, vector_name(index))
        return self.unchecked_vector(index, ins)

    def unchecked_vector(self, index: int, ins: Instruction) -> np.ndarray:
        """``vector`` whose lanes may be undefined; a load that has not been waited for is found."""
        if index in self.outstanding.vectors:
            self.outstanding.read(self.outstanding.vectors, index, vector_name(index), ins)
        return self.vectors[index]

    def scalar(self, index: int, ins: Instruction) -> np.ndarray:
        """uint32 [waves], read by the waves that run."""
        if self.undefined_waves(index) is not None:
            self.find("read of an unwritten register", ins, scalar_name(index))
        return self.unchecked_scalar(index, ins)

    def unchecked_scalar(self, index: int, ins: Instruction) -> np.ndarray:
        """``scalar`` that waves may have undefined; a load that has not been waited for is found."""
        if index >= EXEC:
            return lane_bits(self.exec)[:, index - EXEC]
        if index in self.outstanding.scalars:
            self.outstanding.read(self.outstanding.scalars, index, scalar_name(index), ins)
        return self.scalars[index]

    def undefined_lanes(self, index: int) -> np.ndarray | None:
        """bool [waves, 64]: lanes that are on in which a vector register holds nothing defined; None: no such lane."""
        missing = self.unwritten.get(index)
        if missing is not None and self.mask is not None:
            missing = missing & self.mask
        return None if missing is None or not missing.any() else missing

    def undefined_waves(self, index: int) -> np.ndarray | None:
        """bool [waves]: waves that run in which a scalar register holds nothing defined; None: no such wave."""
        missing = self.unwritten_scalars.get(index)
        if missing is not None and self.rows is not None:
            missing = missing & self.rows
        return None if missing is None or not missing.any() else missing

    def leave_undefined_scalar(self, index: int, waves: np.ndarray) -> None:
        """Of waves that have just written a scalar register, those of bool [waves] hold nothing defined there."""
        waves = waves if self.rows is None else waves & self.rows
        if waves.any():
            self.unwritten_scalars[index] = self.unwritten_scalars.get(index, False) | waves

    def leave_undefined(self, index: int, lanes: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Of lanes that have just written a vector register, those of bool [waves, 64] hold nothing defined there.

        Which have written it is told as for ``write_vector``.
        """
        mask = self.mask if mask is None else mask
        lanes = lanes if mask is None else lanes & mask
        if lanes.any():
            self.unwritten[index] = self.unwritten.get(index, False) | lanes

    def write_vector(
        self, index: int, values: np.ndarray, ins: Instruction | None = None, mask: np.ndarray | None = None
    ) -> None:
        """Write uint32 to the lanes of ``mask``, those that are on where it is None. A load gives no ``ins``."""
        mask = self.mask if mask is None else mask
        if ins is not None and index in self.outstanding.vectors:
            self.outstanding.overwrite(self.outstanding.vectors, index, vector_name(index), ins)
        if index in self.unwritten:
            missing = self.unwritten.pop(index)
            if mask is not None and (missing := missing & ~mask).any():
                self.unwritten[index] = missing
        if mask is not None:
            values = np.where(mask, values, self.vectors[index])
        elif values.shape != self.shape:
            values = np.broadcast_to(values, self.shape)
        self.vectors[index] = values

    def write_scalar(self, index: int, values: np.ndarray, ins: Instruction | None = None) -> None:
        """Write uint32 [waves] to the waves that run. A load gives no ``ins``."""
        if index >= EXEC:
            half = slice(32 * (index - EXEC), 32 * (index - EXEC) + 32)
            lanes, word = self.exec.copy(), np.broadcast_to(values, self.waves)
            lanes[:, half] = lanes_of(np.stack([word, word], 1))[:, half]
            self.set_exec(lanes)
            return
        if ins is not None and index in self.outstanding.scalars:
            self.outstanding.overwrite(self.outstanding.scalars, index, scalar_name(index), ins)
        if index in self.unwritten_scalars:
            missing = self.unwritten_scalars.pop(index)
            if self.rows is not None and (missing := missing & ~self.rows).any():
                self.unwritten_scalars[index] = missing
        if self.rows is not None:
            values = np.where(self.rows, values, self.scalars[index])
        elif values.shape != (self.waves,):
            values = np.broadcast_to(values, self.waves)
        self.scalars[index] = values

    def set_scc(self, values: np.ndarray) -> None:
        self.scc_unwritten = self.scc_unwritten and self.rows is not None
        self.scc = values if self.rows is None else np.where(self.rows, values, self.scc)

    def lane_mask(self, index: int, ins: Instruction) -> np.ndarray:
        """bool [waves, 64] of a pair of scalar registers."""
        if index == EXEC:
            return self.exec
        return lanes_of(np.stack([self.scalar(index, ins), self.scalar(index + 1, ins)], 1))

    def write_lane_mask(self, index: int, lanes: np.ndarray, ins: Instruction) -> None:
        if index == EXEC:
            self.set_exec(lanes)
            return
        bits = lane_bits(lanes)
        self.write_scalar(index, bits[:, 0], ins)
        self.write_scalar(index + 1, bits[:, 1], ins)

    # -- what memories ask

    def full(self, values: np.ndarray) -> np.ndarray:
        """[threads] of one value for each lane, for each wave or for all."""
        return np.broadcast_to(values, self.shape).reshape(-1)

    def lanes(self, mask: np.ndarray | None) -> tuple[np.ndarray | slice, np.ndarray]:
        """(index into arrays over threads, numbers of the threads) of those of ``mask``, bool [threads]."""
        if mask is None:
            return slice(None), self.thread
        chosen = np.flatnonzero(mask)
        return chosen, chosen


def lane_bits(lanes: np.ndarray) -> np.ndarray:
    """uint32 [waves, 2] of bool [waves, 64]; lane 0 is the lowest bit."""
    return np.packbits(lanes, axis=1, bitorder="little").view(np.uint32)


def lanes_of(bits: np.ndarray) -> np.ndarray:
    """bool [waves, 64] of uint32 [waves, 2]."""
    return np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little").view(bool)
