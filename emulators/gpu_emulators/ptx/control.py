"""Branches, barriers and ends: the order in which a batch runs the blocks of a kernel.

Threads that go different ways wait at basic blocks. The lowest block runs first, with all threads that have come to it,
so that those of a branch meet again behind it. A barrier ends a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..findings import Fault, Refused, refusal
from .batch import WARP, Batch
from .parser import Immediate, Instruction, Kernel, Label, ends_block
from .registry import Read, guard, instruction, modifiers, operands, translate

# far more blocks than any test runs: what goes on for longer never ends
MOST_BLOCKS = 1 << 22
BARRIERS = 16


@dataclass
class Block:
    """``body`` are its instructions but the last where that is ``end``, which says where its threads go."""

    body: list[tuple[Instruction, Callable]]
    end: Instruction | None = None
    kind: str = "next"
    target: int = 0
    test: Read | None = None


def translate_blocks(kernel: Kernel) -> list[Block]:
    blocks = []
    for instructions in kernel.blocks:
        last = instructions[-1] if instructions else None
        end = last if last is not None and ends_block(last) else None
        body = instructions[:-1] if end else instructions
        block = Block([(ins, translate(ins, kernel)) for ins in body], end)
        if end:
            {"bra": _branch, "ret": _return, "exit": _return, "trap": _trap}.get(end.opcode[0], _barrier)(block, kernel)
        blocks.append(block)
    if blocks and (blocks[-1].kind in ("next", "barrier") or blocks[-1].test is not None):
        raise Refused(f"{kernel.name} does not end with ret")
    return blocks


def _branch(block: Block, kernel: Kernel) -> None:
    """PTX ISA 9.7.12.3, bra; .uni says that all threads go the same way, which is checked when it runs."""
    ins = block.end
    modifiers(ins, {"uni"})
    (target,) = operands(ins, 1)
    if not isinstance(target, Label):
        raise refusal(ins, "a label is expected")
    block.kind, block.target = "branch", target.block
    if ins.guard is not None:
        block.test = guard(ins, kernel)


def _return(block: Block, kernel: Kernel) -> None:
    """PTX ISA 9.7.12.6, ret, and 9.7.12.7, exit."""
    modifiers(block.end)
    operands(block.end, 0)
    block.kind = "return"
    if block.end.guard is not None:
        block.test = guard(block.end, kernel)


def _trap(block: Block, kernel: Kernel) -> None:
    """PTX ISA 9.7.19.4, trap."""
    modifiers(block.end)
    operands(block.end, 0)
    block.kind = "trap"
    if block.end.guard is not None:
        block.test = guard(block.end, kernel)


def _barrier(block: Block, kernel: Kernel) -> None:
    """PTX ISA 9.7.13.1, bar.sync and barrier.sync, of all threads of the CTA."""
    ins = block.end
    modifiers(ins, "sync", *(({"aligned"},) if ins.opcode[0] == "barrier" else ()))
    given = operands(ins, 1, 2)
    if any(not isinstance(operand, Immediate) for operand in given) or not 0 <= given[0].value < BARRIERS:
        raise refusal(ins, "the number of a barrier is expected")
    if len(given) == 2 and given[1].value != kernel.threads:
        raise refusal(ins, f"a barrier of {given[1].value} of {kernel.threads} threads")
    if ins.guard is not None:
        raise refusal(ins, "a barrier under a predicate")
    block.kind, block.target = "barrier", given[0].value


@instruction("bar.warp.sync")
def warp_barrier(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.13.2, bar.warp.sync, of all threads of the warp."""
    modifiers(ins, "warp", "sync")
    whole_membership(operands(ins, 1)[0], ins)

    def run(batch, mask):
        warps = batch.whole_warps(mask, ins)
        batch.shared.meet_in_warps(warps)
        batch.memory.meet_in_warps(warps)

    return run


def whole_membership(operand, ins: Instruction) -> None:
    """Refuse masks of members that name fewer than the 32 threads of a warp."""
    if not isinstance(operand, Immediate) or operand.value & 0xFFFFFFFF != 0xFFFFFFFF:
        raise refusal(ins, "all threads of the warp are expected as members")


class Control:
    """Runs the blocks of a kernel over a batch."""

    def __init__(self, batch: Batch, blocks: list[Block], covered: set[int]):
        self.batch, self.blocks, self.covered = batch, blocks, covered
        self.ready: dict[int, np.ndarray] = {0: np.ones(batch.threads, bool)}
        self.waiting: dict[int, np.ndarray] = {}
        self.alive = np.ones(batch.threads, bool)

    def run(self) -> int:
        """Run to the end; returns how many instructions that were."""
        batch, executed, number = self.batch, 0, 0
        ends = {"next": self._go_on, "branch": self._go, "return": self._end, "trap": self._trap, "barrier": self._meet}
        for _ in range(MOST_BLOCKS):
            if not self.ready:
                break
            number, threads = self._pick()
            block = self.blocks[number]
            self.covered.add(number)
            mask = None if threads.all() else threads
            for ins, run in block.body:
                batch.current = ins
                run(batch, mask)
            batch.current = block.end
            executed += len(block.body) + (block.end is not None)
            ends[block.kind](number, block, threads, mask)
            self._wake(threads)
        else:
            raise Fault(f"{batch.kernel.name}: runs for ever, at the end in block {number}")
        if self.waiting:
            self._stuck()
        batch.end()
        return executed

    def _pick(self) -> tuple[int, np.ndarray]:
        """The lowest block that threads are ready for, and they."""
        stalled = self.batch.stalled
        if not stalled.any():
            number = min(self.ready)
            return number, self.ready.pop(number)
        for number in sorted(self.ready):
            awake = self.ready[number] & ~stalled
            if awake.any():
                self._arrive(number, self.ready.pop(number) & stalled)
                return number, awake
        texts = [self.blocks[number].body[0][0].text for number in sorted(self.ready) if self.blocks[number].body]
        raise Fault(f"{self.batch.kernel.name}: threads wait for ever for what none does, before {texts}")

    def _wake(self, threads: np.ndarray) -> None:
        """Threads that did more than look whether they may go on let the others look again."""
        stalled = self.batch.stalled
        if (threads & ~stalled).any():
            stalled &= threads

    def _arrive(self, number: int, threads: np.ndarray) -> None:
        if threads.any():
            self.ready[number] = self.ready[number] | threads if number in self.ready else threads

    def _go_on(self, number, block, threads, mask) -> None:
        self._arrive(number + 1, threads)

    def _chosen(self, block: Block, threads, mask) -> np.ndarray:
        return threads if block.test is None else self.batch.full(block.test(self.batch, mask)) & threads

    def _go(self, number, block, threads, mask) -> None:
        taken = self._chosen(block, threads, mask)
        self._arrive(block.target, taken)
        if block.test is not None:
            self._arrive(number + 1, threads & ~taken)
            if "uni" in block.end.opcode:
                self._check_uniform(block.end, threads, taken)

    def _check_uniform(self, ins: Instruction, threads, taken) -> None:
        if (_by_warp(taken).any(1) & _by_warp(threads & ~taken).any(1)).any():
            self.batch.find("threads of a warp part at a uniform branch", ins)

    def _end(self, number, block, threads, mask) -> None:
        ended = self._chosen(block, threads, mask)
        self.alive &= ~ended
        self._arrive(number + 1, threads & ~ended)
        # those that wait at a barrier may have waited for these alone
        self._release()

    def _trap(self, number, block, threads, mask) -> None:
        if self._chosen(block, threads, mask).any():
            raise Fault(f"trap: {self.batch.place(block.end)}")
        self._arrive(number + 1, threads)

    def _meet(self, number, block, threads, mask) -> None:
        ins = block.end
        if ins.opcode[0] == "bar" or "aligned" in ins.opcode:
            self.batch.whole_warps(mask, ins)
        self.waiting[number] = self.waiting[number] | threads if number in self.waiting else threads
        self._release()

    def _release(self) -> None:
        """Let the CTAs go on of which all threads that live wait at one barrier."""
        batch = self.batch
        living = self.alive.reshape(batch.ctas, -1)
        for barrier in sorted({self.blocks[number].target for number in self.waiting}):
            at = [number for number in self.waiting if self.blocks[number].target == barrier]
            here = np.logical_or.reduce([self.waiting[number] for number in at]).reshape(batch.ctas, -1)
            ready = (here == living).all(1) & here.any(1)
            if not ready.any():
                continue
            going = np.repeat(ready, batch.cta_threads)
            self._note_meeting(ready & ~living.all(1), going, at)
            batch.shared.meet(ready)
            batch.phase[ready] += 1
            for number in at:
                self._arrive(number + 1, self.waiting[number] & going)
                rest = self.waiting.pop(number) & ~going
                if rest.any():
                    self.waiting[number] = rest

    def _note_meeting(self, shrunk: np.ndarray, going: np.ndarray, at: list[int]) -> None:
        ins = self.blocks[at[0]].end
        if shrunk.any():
            self.batch.find("barrier after some threads have ended", ins)
        if len(at) > 1:
            places = [(self.waiting[number] & going).reshape(self.batch.ctas, -1).any(1) for number in at]
            if (np.sum(places, 0) > 1).any():
                self.batch.find("threads of a CTA meet at different barriers", ins)

    def _stuck(self) -> None:
        places = "; ".join(self.batch.place(self.blocks[number].end) for number in sorted(self.waiting))
        raise Fault(f"threads wait for ever at a barrier that others never reach: {places}")


def _by_warp(threads: np.ndarray) -> np.ndarray:
    return threads.reshape(-1, WARP)
