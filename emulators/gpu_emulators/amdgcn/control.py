"""Branches, barriers and ends: the order in which a batch runs the blocks of a kernel.

Waves that go different ways wait at basic blocks. The lowest block runs first, with all waves that have come to it, so
that those of a branch meet again behind it. Lanes of a wave go one way, and are switched by EXEC (CDNA3 ISA, Program
Control).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..findings import Fault, Refused, refusal
from .batch import Batch
from .parser import VCC, Instruction, Kernel, Label, ends_block
from .registry import no_modifiers, operands, translate
from .scalars import read_scc

# far more blocks than any test runs: what goes on for longer never ends
MOST_BLOCKS = 1 << 22


@dataclass
class Block:
    """``body`` are its instructions but the last where that is ``end``, which says where its waves go."""

    body: list[tuple[Instruction, Callable]]
    end: Instruction | None = None
    kind: str = "next"
    target: int = 0


# CDNA3 ISA, SOPP instructions: which of the waves branch
CONDITIONS: dict[str, Callable[[Batch, Instruction], np.ndarray]] = {
    "scc0": lambda batch, ins: ~read_scc(batch, ins),
    "scc1": read_scc,
    "vccz": lambda batch, ins: ~batch.lane_mask(VCC, ins).any(1),
    "vccnz": lambda batch, ins: batch.lane_mask(VCC, ins).any(1),
    "execz": lambda batch, ins: ~batch.exec.any(1),
    "execnz": lambda batch, ins: batch.exec.any(1),
}


def translate_blocks(kernel: Kernel) -> list[Block]:
    blocks = []
    for instructions in kernel.blocks:
        last = instructions[-1] if instructions else None
        end = last if last is not None and ends_block(last) else None
        body = instructions[:-1] if end else instructions
        block = Block([(ins, translate(ins, kernel)) for ins in body], end)
        if end:
            _translate_end(block)
        blocks.append(block)
    if blocks and blocks[-1].kind not in ("end", "branch"):
        raise Refused(f"{kernel.name} does not end with s_endpgm")
    return blocks


def _translate_end(block: Block) -> None:
    ins = block.end
    no_modifiers(ins, ())
    if ins.opcode in ("s_endpgm", "s_barrier"):
        operands(ins, 0)
        block.kind = "end" if ins.opcode == "s_endpgm" else "barrier"
        return
    (target,) = operands(ins, 1)
    if not isinstance(target, Label):
        raise refusal(ins, "a label is expected")
    block.kind, block.target = "branch", target.block
    if ins.opcode != "s_branch":
        if ins.opcode.removeprefix("s_cbranch_") not in CONDITIONS:
            raise refusal(ins, "unknown instruction")
        block.kind = "conditional"


class Control:
    """Runs the blocks of a kernel over a batch."""

    def __init__(self, batch: Batch, blocks: list[Block], covered: set[int]):
        self.batch, self.blocks, self.covered = batch, blocks, covered
        self.ready: dict[int, np.ndarray] = {batch.kernel.entry: np.ones(batch.waves, bool)}
        self.waiting: dict[int, np.ndarray] = {}
        self.alive = np.ones(batch.waves, bool)

    def run(self) -> int:
        """Run to the end; returns how many instructions that were."""
        batch, executed = self.batch, 0
        ends = {
            "next": lambda number, block, waves: self._arrive(number + 1, waves),
            "branch": lambda number, block, waves: self._arrive(block.target, waves),
            "conditional": self._choose,
            "barrier": self._wait,
            "end": self._end,
        }
        for _ in range(MOST_BLOCKS):
            if not self.ready:
                break
            number = min(self.ready)
            waves, block = self.ready.pop(number), self.blocks[number]
            self.covered.add(number)
            batch.run_waves(None if waves.all() else waves)
            for _, run in block.body:
                run(batch)
            executed += len(block.body) + 1
            ends[block.kind](number, block, waves)
        else:
            raise Fault(f"{batch.kernel.name}: runs for ever, at the end in block {number}")
        if self.waiting:
            places = "; ".join(batch.place(self.blocks[number].end) for number in sorted(self.waiting))
            raise Fault(f"waves wait for ever at a barrier that others never reach: {places}")
        return executed

    def _arrive(self, number: int, waves: np.ndarray) -> None:
        if waves.any():
            self.ready[number] = self.ready[number] | waves if number in self.ready else waves

    def _choose(self, number: int, block: Block, waves: np.ndarray) -> None:
        condition = CONDITIONS[block.end.opcode.removeprefix("s_cbranch_")]
        taken = condition(self.batch, block.end) & waves
        self._arrive(block.target, taken)
        self._arrive(number + 1, waves & ~taken)

    def _end(self, number: int, block: Block, waves: np.ndarray) -> None:
        self.alive &= ~waves
        # those that wait at a barrier may have waited for these alone
        self._release()

    def _wait(self, number: int, block: Block, waves: np.ndarray) -> None:
        self.waiting[number] = self.waiting[number] | waves if number in self.waiting else waves
        self._release()

    def _release(self) -> None:
        """Let the workgroups go on of which all waves that live wait at a barrier."""
        if not self.waiting:
            return
        batch = self.batch
        living = self.alive.reshape(batch.ctas, -1)
        here = np.logical_or.reduce(list(self.waiting.values())).reshape(batch.ctas, -1)
        ready = (here == living).all(1) & here.any(1)
        if not ready.any():
            return
        going = np.repeat(ready, batch.cta_waves)
        self._note_meeting(ready, going)
        batch.lds.meet(ready, batch.outstanding.of_lds())
        complete = batch.outstanding.none_of(going).reshape(batch.ctas, -1).all(1)
        batch.phase[complete] += 1
        for number in list(self.waiting):
            self._arrive(number + 1, self.waiting[number] & going)
            rest = self.waiting.pop(number) & ~going
            if rest.any():
                self.waiting[number] = rest

    def _note_meeting(self, ready: np.ndarray, going: np.ndarray) -> None:
        numbers = sorted(self.waiting)
        if (ready & ~self.alive.reshape(self.batch.ctas, -1).all(1)).any():
            self.batch.find("barrier after some waves have ended", self.blocks[numbers[0]].end)
        places = [(self.waiting[number] & going).reshape(self.batch.ctas, -1).any(1) for number in numbers]
        if (np.sum(places, 0) > 1).any():
            self.batch.find("waves of a workgroup meet at different barriers", self.blocks[numbers[0]].end)
