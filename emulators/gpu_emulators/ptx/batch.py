"""Some CTAs of a launch that run together: registers over all their threads, special registers, memories, findings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from ..findings import Findings
from ..global_memory import GlobalMemory
from .async_copies import AsyncCopies
from .local_memory import GenericMemory, LocalMemory
from .parser import Instruction, Kernel
from .shared_memory import SharedMemory

# what registers hold before they are written: no number that a program would go on with unnoticed
POISON = {np.bool_: True, np.uint8: 0xA5, np.uint16: 0x7FA5, np.uint32: 0x7FA5A5A5, np.uint64: 0x7FA5A5A57FA5A5A5}
WARP = 32
LANE = np.arange(WARP)


class Watcher(Protocol):
    """Told of what happens to a register, as while an asynchronous product reads or writes it."""

    def read(self, batch: Batch, index: int, mask: np.ndarray | None, ins: Instruction) -> None: ...

    def written(self, batch: Batch, index: int, mask: np.ndarray | None, ins: Instruction) -> None: ...


class Batch:
    """CTAs ``first`` to ``first + ctas`` of a grid. A register is an array over threads, or one value for all."""

    def __init__(
        self,
        kernel: Kernel,
        arguments: dict[str, np.generic],
        grid: tuple[int, int, int],
        first: int,
        ctas: int,
        shared: SharedMemory,
        memory: GlobalMemory,
        findings: Findings,
    ):
        self.kernel, self.arguments, self.findings = kernel, arguments, findings
        self.first, self.ctas, self.cta_threads = first, ctas, kernel.threads
        self.threads = ctas * kernel.threads
        self.thread = np.arange(self.threads, dtype=np.int64)
        self.cta = self.thread // kernel.threads
        self.warps = self.thread // WARP
        self.specials = _specials(kernel.threads, grid, first, ctas)
        self.registers: list[np.ndarray] = [dtype(POISON[dtype]) for dtype in kernel.dtypes]
        # registers that reads and writes have to look at: not written yet by all threads, undefined in part, or watched
        self.unusual = set(range(len(kernel.dtypes)))
        self.unwritten: dict[int, np.ndarray | None] = dict.fromkeys(self.unusual)
        # bits of written registers that come from unwritten ones, of each thread or one value for all
        self.undefined: dict[int, np.ndarray] = {}
        self.watchers: dict[int, Watcher] = {}
        self.current: Instruction | None = None
        # how often the threads of a CTA have met at a barrier
        self.phase = np.zeros(ctas, np.int64)
        # threads that look again only when another one has done something
        self.stalled = np.zeros(self.threads, bool)
        self.memory, self.shared = memory, shared
        self.copies = AsyncCopies(self)
        memory.before_store = self.copies.check_store
        # told when all threads have ended
        self.endings: list[Callable[[Batch], None]] = []
        shared.attach(self)
        memory.attach(self)
        local = LocalMemory(kernel.local, self)
        # by the state space of an instruction, "" by generic addresses
        self.spaces = {"global": memory, "shared": shared, "shared::cta": shared, "local": local}
        self.spaces[""] = GenericMemory(local, memory)

    def find(self, kind: str, ins: Instruction, detail: str = "") -> None:
        self.findings.add(kind, self.kernel.name, ins, detail)

    def end(self) -> None:
        """All threads have ended: note what is left open."""
        self.copies.end()
        for note in self.endings:
            note(self)

    def place(self, ins: Instruction) -> str:
        return f"{self.kernel.name}, line {ins.line}, {ins.text} [{ins.where}]"

    # -- registers

    def full(self, values: np.ndarray) -> np.ndarray:
        """[threads] of what may be one value for all."""
        return values if np.ndim(values) else np.broadcast_to(values, (self.threads,))

    def write(self, index: int, values: np.ndarray, mask: np.ndarray | None) -> None:
        """Set a register of the threads of ``mask`` to values of its width."""
        dtype = self.kernel.dtypes[index]
        if values.dtype != dtype:
            values = values.view(dtype)
        if index in self.unusual:
            self._note_write(index, mask)
        self.registers[index] = values if mask is None else np.where(mask, values, self.registers[index])

    def _note_write(self, index: int, mask: np.ndarray | None) -> None:
        if index in self.watchers:
            self.watchers[index].written(self, index, mask, self.current)
        if index in self.unwritten:
            missing = self.unwritten.pop(index)
            if mask is not None:
                missing = ~mask if missing is None else missing & ~mask
                if missing.any():
                    self.unwritten[index] = missing
        if index in self.undefined:
            bits = self.undefined.pop(index)
            if mask is not None:
                self._keep_undefined(index, np.where(mask, bits.dtype.type(0), bits))
        self._forget(index)

    def _keep_undefined(self, index: int, bits: np.ndarray) -> None:
        if bits.any():
            self.undefined[index] = bits
            self.unusual.add(index)

    def _forget(self, index: int) -> None:
        if not any(index in known for known in (self.unwritten, self.undefined, self.watchers)):
            self.unusual.discard(index)

    def inspect(self, index: int, mask: np.ndarray | None, ins: Instruction) -> None:
        """Note the read of an unusual register."""
        if index in self.watchers:
            self.watchers[index].read(self, index, mask, ins)
        if index in self.unwritten:
            missing = self.unwritten[index]
            if missing is None:
                self.find("read of an unwritten register", ins, self.kernel.names[index])
            elif (missing if mask is None else missing & mask).any():
                self.find("read of a register that some threads have not written", ins, self.kernel.names[index])
        if index in self.undefined:
            bits = self.full(self.undefined[index])[self.lanes(mask)[0]]
            if bits.any():
                whose = "an unwritten register" if bits.all() else "a register that some threads have not written"
                detail = f"bits {int(np.bitwise_or.reduce(bits)):#x} of {self.kernel.names[index]}"
                self.find(f"read of {whose}", ins, detail)

    def undefined_bits(self, index: int, mask: np.ndarray | None, ins: Instruction) -> np.ndarray:
        """Which bits of a register are undefined, of each thread or one value for all, where ``ins`` passes them on."""
        if index in self.watchers:
            self.watchers[index].read(self, index, mask, ins)
        none = self.kernel.dtypes[index](0)
        bits = self.undefined.get(index, none)
        if index not in self.unwritten:
            return bits
        missing = self.unwritten[index]
        return ~none if missing is None else np.where(missing, ~none, bits)

    def leave_undefined(self, index: int, bits: np.ndarray, mask: np.ndarray | None) -> None:
        """Bits of a register that the threads of ``mask`` have just written are undefined nonetheless."""
        own = bits if mask is None else np.where(mask, bits, bits.dtype.type(0))
        self._keep_undefined(index, own | self.undefined.get(index, bits.dtype.type(0)))

    def watch(self, index: int, watcher: Watcher) -> None:
        self.watchers[index] = watcher
        self.unusual.add(index)

    def unwatch(self, index: int) -> None:
        self.watchers.pop(index, None)
        self._forget(index)

    # -- threads

    def lanes(self, mask: np.ndarray | None) -> tuple[np.ndarray | slice, np.ndarray]:
        """(index into arrays over threads, numbers of the threads) of those of ``mask``."""
        if mask is None:
            return slice(None), self.thread
        chosen = np.flatnonzero(mask)
        return chosen, chosen

    def whole_warps(self, mask: np.ndarray | None, ins: Instruction) -> np.ndarray | None:
        """Which warps run, bool [warps], None for all; a finding where some threads of a warp do not."""
        if mask is None:
            return None
        by_warp = mask.reshape(-1, WARP)
        whole = by_warp.all(1)
        if (by_warp.any(1) != whole).any():
            self.find("divergent warp at a warp-wide instruction", ins)
        return whole

    def stall(self, threads: np.ndarray) -> None:
        """Let threads, bool [threads], wait where they go next until another thread has done something."""
        self.stalled |= threads


def _specials(threads: int, grid: tuple[int, int, int], first: int, ctas: int) -> dict[str, np.ndarray]:
    """PTX ISA 10.1 to 10.6; one value for all where there is one."""
    number = first + np.arange(ctas * threads) // threads if ctas > 1 else np.int64(first)
    thread = np.tile(np.arange(threads, dtype=np.uint32), ctas)
    across, along, deep = grid
    specials = {
        "%tid.x": thread,
        "%ctaid.x": number % across,
        "%ctaid.y": number // across % along,
        "%ctaid.z": number // across // along,
        "%laneid": thread % WARP,
        "%warpid": thread // WARP,
        "%ntid.x": threads,
        "%nctaid.x": across,
        "%nctaid.y": along,
        "%nctaid.z": deep,
    } | dict.fromkeys(("%tid.y", "%tid.z"), 0)
    specials |= dict.fromkeys(("%ntid.y", "%ntid.z"), 1)
    return {name: np.asarray(value).astype(np.uint32)[()] for name, value in specials.items()}
