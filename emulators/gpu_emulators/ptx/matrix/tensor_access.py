"""Instructions of warps on tensor memory: alloc, relinquish_alloc_permit, dealloc, ld, st, wait.

PTX ISA 9.7.16, "Tensor memory allocation and management instructions" and "Tensor memory and register load/store
instructions". An address has the lane in its upper half and the column in its lower half.
"""

from __future__ import annotations

import numpy as np

from ...findings import Fault, refusal
from ..batch import LANE, WARP
from ..parser import Immediate, Instruction, Kernel
from ..registry import address, instruction, modifiers, operands, reader
from .tensor_memory import COLUMNS, tensor_memory
from .vectors import destinations, read_all, readers

LEAST_COLUMNS = 32
REPEATS = {f"x{1 << k}": 1 << k for k in range(8)}
# registers of a thread for each repetition
SHAPES = {"32x32b": 1, "16x32bx2": 1, "16x256b": 4}


def of_thread(shape: str, registers: int, split: int) -> tuple[np.ndarray, np.ndarray]:
    """(lanes, columns), each int64 [WARP, registers], that the registers of a warp's threads hold.

    Figures "Matrix fragment for shape" of the ISA. ``split`` is how many columns the second half of a 16x32bx2 is off.
    """
    thread, register = LANE[:, None], np.arange(registers)[None, :]
    if shape == "32x32b":
        lanes, columns = thread, register
    elif shape == "16x32bx2":
        lanes, columns = thread % 16, register + thread // 16 * split
    else:
        lanes, columns = thread // 4 + register // 2 % 2 * 8, register // 4 * 8 + thread % 4 * 2 + register % 2
    return tuple(np.broadcast_to(x, (WARP, registers)) for x in (lanes, columns))


def _count_of_columns(operand, ins: Instruction) -> int:
    columns = operand.value if isinstance(operand, Immediate) else 0
    if not LEAST_COLUMNS <= columns <= COLUMNS or columns & columns - 1:
        raise refusal(ins, f"a constant power of two of {LEAST_COLUMNS} to {COLUMNS} columns is expected")
    return columns


def _leaders(batch, mask, ins: Instruction) -> np.ndarray:
    """The first thread of each warp that runs."""
    whole = batch.whole_warps(mask, ins)
    first = batch.thread[::WARP]
    return first if whole is None else first[whole]


def _same_in_warps(batch, values: np.ndarray, leaders: np.ndarray, ins: Instruction) -> np.ndarray:
    """One value for each warp of ``leaders``; a finding where its threads have several."""
    by_warp = batch.full(values).reshape(-1, WARP)[leaders // WARP]
    if (by_warp != by_warp[:, :1]).any():
        batch.find("address of tensor memory differs within a warp", ins)
    return by_warp[:, 0].astype(np.int64)


@instruction("tcgen05.alloc")
def translate_alloc(ins: Instruction, kernel: Kernel):
    """PTX ISA "tcgen05.alloc": the address is written to shared memory."""
    modifiers(ins, "alloc", "cta_group::1", "sync", "aligned", ("shared::cta",), "b32")
    where, count = operands(ins, 2)
    columns, place = _count_of_columns(count, ins), address(where, np.uint32, ins, kernel)

    def alloc(batch, mask):
        found, storing = np.zeros(batch.threads, np.uint32), np.zeros(batch.threads, bool)
        for thread in _leaders(batch, mask, ins):
            found[thread] = tensor_memory(batch).allocate(batch, batch.cta[thread], columns, ins)
            storing[thread] = True
        batch.shared.store(place(batch, mask), [found], 32, storing, ins)

    return alloc


@instruction("tcgen05.relinquish_alloc_permit")
def translate_relinquish(ins: Instruction, kernel: Kernel):
    """PTX ISA "tcgen05.relinquish_alloc_permit": the CTA allocates no more."""
    modifiers(ins, "relinquish_alloc_permit", "cta_group::1", "sync", "aligned")
    operands(ins, 0)

    def relinquish(batch, mask):
        tensor_memory(batch).permitted[batch.cta[_leaders(batch, mask, ins)]] = False

    return relinquish


@instruction("tcgen05.dealloc")
def translate_dealloc(ins: Instruction, kernel: Kernel):
    """PTX ISA "tcgen05.dealloc"."""
    modifiers(ins, "dealloc", "cta_group::1", "sync", "aligned", "b32")
    where, count = operands(ins, 2)
    columns, start = _count_of_columns(count, ins), reader(where, np.uint32, ins, kernel)

    def dealloc(batch, mask):
        leaders = _leaders(batch, mask, ins)
        for thread, at in zip(leaders, _same_in_warps(batch, start(batch, mask), leaders, ins), strict=True):
            tensor_memory(batch).free(batch, thread, int(at), columns, ins)

    return dealloc


class _Shape:
    """Shape and repetition of a load or store, and where its words lie."""

    def __init__(self, ins: Instruction, where, split: list, kernel: Kernel):
        _, _, _, shape, repeat, _ = modifiers(
            ins, ins.opcode[1], "sync", "aligned", tuple(SHAPES), tuple(REPEATS), "b32"
        )
        self.ins, self.registers = ins, SHAPES[shape] * REPEATS[repeat]
        if len(split) != (shape == "16x32bx2") or not all(isinstance(one, Immediate) for one in split):
            raise refusal(ins, "one constant is expected as the offset of the second half, of shape 16x32bx2 alone")
        self.address = address(where, np.uint32, ins, kernel)
        self.lanes, self.columns = of_thread(shape, self.registers, split[0].value if split else 0)
        # where a warp's lanes may begin, from its own 32 on
        self.starts = (0,) if shape == "32x32b" else (0, 16)

    def words(self, batch, mask) -> tuple[np.ndarray, np.ndarray]:
        """(threads, words [threads, registers])."""
        leaders = _leaders(batch, mask, self.ins)
        start = _same_in_warps(batch, self.address(batch, mask), leaders, self.ins)
        own = leaders % batch.cta_threads // WARP % 4 * WARP
        if not np.isin((start >> 16) - own, self.starts).all():
            raise Fault(f"lanes of tensor memory that the warp does not reach: {batch.place(self.ins)}")
        lanes, columns = (start >> 16)[:, None, None] + self.lanes, (start & 0xFFFF)[:, None, None] + self.columns
        ctas = batch.cta[leaders][:, None, None]
        words = tensor_memory(batch).places(batch, ctas, columns, lanes, self.ins)
        threads = (leaders[:, None] + LANE).reshape(-1)
        return threads, words.reshape(len(threads), self.registers)


@instruction("tcgen05.ld")
def translate_load(ins: Instruction, kernel: Kernel):
    """PTX ISA "tcgen05.ld": registers, address, for 16x32bx2 the offset of the second half.

    Both the words and the registers are in use until the threads have waited ("tcgen05.wait::ld").
    """
    target, where, *split = operands(ins, 2, 3)
    shape = _Shape(ins, where, split, kernel)
    targets = destinations(target, shape.registers, np.uint32, ins, kernel)

    def load(batch, mask):
        threads, words = shape.words(batch, mask)
        values = np.zeros((shape.registers, batch.threads), np.uint32)
        values[:, threads] = tensor_memory(batch).load(batch, words, threads, ins).T
        for index, value in zip(targets, values, strict=True):
            batch.write(index, value, mask)
        tensor_memory(batch).registers.begin(batch, targets, mask)

    return load


@instruction("tcgen05.st")
def translate_store(ins: Instruction, kernel: Kernel):
    """PTX ISA "tcgen05.st": address, for 16x32bx2 the offset of the second half, registers."""
    where, *split, source = operands(ins, 2, 3)
    shape = _Shape(ins, where, split, kernel)
    values = readers(source, shape.registers, np.uint32, ins, kernel)

    def store(batch, mask):
        threads, words = shape.words(batch, mask)
        held = np.stack(read_all(values, batch, mask), 1)[threads]
        tensor_memory(batch).store(batch, words, held, threads, ins)

    return store


@instruction("tcgen05.wait::ld", "tcgen05.wait::st")
def translate_wait(ins: Instruction, kernel: Kernel):
    """PTX ISA "tcgen05.wait": the threads' loads, or their stores, are complete."""
    modifiers(ins, ins.opcode[1], "sync", "aligned")
    operands(ins, 0)
    loads = ins.opcode[1] == "wait::ld"

    def wait(batch, mask):
        batch.whole_warps(mask, ins)
        waiting = np.ones(batch.threads, bool) if mask is None else mask
        tensor_memory(batch).wait(batch, waiting, loads)

    return wait
