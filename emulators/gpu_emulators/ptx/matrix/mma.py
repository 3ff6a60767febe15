"""Matrix instructions of a warp: ldmatrix, stmatrix, mma.sync and mma.sp.

PTX ISA 9.7.14, "Warp level matrix multiply-accumulate instructions". Of mma.sync the shapes that Triton chooses for
operands of 16 bits and of tf32 and sums in float32, of mma.sp that with operands of 16 bits and twice as many columns.
"""

from __future__ import annotations

import numpy as np

from ...findings import refusal
from ..batch import LANE, WARP
from ..parser import Immediate, Instruction, Kernel
from ..registry import address, instruction, modifiers, operands, reader
from . import fragments, sparsity
from .vectors import destinations, read_all, readers

ELEMENTS = ("bf16", "f16")
SHAPES = {"m16n8k16": ELEMENTS, "m16n8k8": ("tf32",)}
COUNTS = ("x1", "x2", "x4")


def _pointing(batch, mask, matrices: int) -> np.ndarray:
    """Which threads point to a row: eight of a warp for each matrix."""
    pointing = np.tile(8 * matrices > LANE, batch.threads // WARP)
    return pointing if mask is None else pointing & mask


def _shape(ins: Instruction) -> tuple[int, bool]:
    """(matrices, whether they are transposed) of .sync.aligned.m8n8.num{.trans}{.shared}.b16."""
    *_, count, trans, _, _ = modifiers(
        ins, "sync", "aligned", "m8n8", COUNTS, {"trans"}, ("shared", "shared::cta"), "b16"
    )
    return int(count[1:]), trans == "trans"


@instruction("ldmatrix")
def translate_ldmatrix(ins: Instruction, kernel: Kernel):
    """PTX ISA "Warp-level matrix load instruction: ldmatrix".

    .sync has the threads of a warp wait for each other, and orders no memory: the ISA says nothing of that. Any of them
    may read the row that a thread points to, so that what it wrote there itself needs a barrier too.
    """
    count, transposed = _shape(ins)
    target, place = operands(ins, 2)
    targets = destinations(target, count, np.uint32, ins, kernel)
    where = address(place, np.uint32, ins, kernel)

    def ldmatrix(batch, mask):
        batch.whole_warps(mask, ins)
        pointing = _pointing(batch, mask, count)
        data, lanes = batch.shared.load(where(batch, mask), fragments.ROW_BYTES, pointing, ins, by_warps=True)
        rows = np.zeros((batch.threads, fragments.ROW_BYTES), np.uint8)
        rows[lanes] = data
        for index, register in zip(targets, fragments.loaded(rows, count, transposed), strict=True):
            batch.write(index, register, mask)

    return ldmatrix


@instruction("stmatrix")
def translate_stmatrix(ins: Instruction, kernel: Kernel):
    """PTX ISA "Warp-level matrix store instruction: stmatrix". Any thread of a warp may write, as of ldmatrix."""
    count, transposed = _shape(ins)
    place, source = operands(ins, 2)
    values = readers(source, count, np.uint32, ins, kernel)
    where = address(place, np.uint32, ins, kernel)

    def stmatrix(batch, mask):
        batch.whole_warps(mask, ins)
        words = fragments.stored(read_all(values, batch, mask), transposed).view(np.uint32)
        pointing = _pointing(batch, mask, count)
        batch.shared.store(where(batch, mask), list(np.ascontiguousarray(words.T)), 32, pointing, ins, by_warps=True)

    return stmatrix


@instruction("mma.sync")
def translate_mma(ins: Instruction, kernel: Kernel):
    """PTX ISA "Multiply-and-accumulate instruction: mma": d, a, b, c of m16n8k16, or of tf32 of m16n8k8."""
    element = _types(ins, SHAPES, "sync", "aligned")
    container = fragments.CONTAINERS[element]
    d, a, b, c = operands(ins, 4)
    targets = destinations(d, 4, np.float32, ins, kernel)
    left, right = readers(a, 4, np.uint32, ins, kernel), readers(b, 2, np.uint32, ins, kernel)
    sums = readers(c, 4, np.float32, ins, kernel)

    def mma(batch, mask):
        batch.whole_warps(mask, ins)
        x = fragments.a_matrix(read_all(left, batch, mask), container)
        y = fragments.b_matrix(read_all(right, batch, mask), container)
        total = fragments.multiply_add(x, y, fragments.accumulators(read_all(sums, batch, mask)), element)
        for index, register in zip(targets, fragments.accumulator_registers(total), strict=True):
            batch.write(index, register, mask)

    return mma


@instruction("mma.sp", "mma.sp::ordered_metadata")
def translate_sparse_mma(ins: Instruction, kernel: Kernel):
    """PTX ISA "Multiply-and-accumulate instruction: mma.sp": d, a, b, c, metadata, selector of m16n8k32.

    The metadata of two elements that are the same of four is undefined by the ISA, and with ordered_metadata that of
    elements not in their order; either is a finding.
    """
    ordered = ins.opcode[1] == "sp::ordered_metadata"
    element = _types(ins, {"m16n8k32": ELEMENTS}, ins.opcode[1], "sync", "aligned")
    d, a, b, c, metadata, selector = operands(ins, 6)
    if not isinstance(selector, Immediate) or selector.value not in (0, 1):
        raise refusal(ins, f"a sparsity selector of 0 or 1 is expected, not {selector}")
    targets = destinations(d, 4, np.float32, ins, kernel)
    left, right = readers(a, 4, np.uint32, ins, kernel), readers(b, 4, np.uint32, ins, kernel)
    sums, words = readers(c, 4, np.float32, ins, kernel), reader(metadata, np.uint32, ins, kernel)
    contributes = LANE % 4 // 2 == selector.value

    def sparse_mma(batch, mask):
        whole = batch.whole_warps(mask, ins)
        giving = np.tile(contributes, batch.threads // WARP)
        giving = giving if mask is None else giving & mask
        kept = sparsity.positions(batch.full(words(batch, giving)), selector.value)
        running = kept if whole is None else kept[whole]
        first, second = running[..., 0], running[..., 1]
        if (first == second).any() or ordered and (first > second).any():
            batch.find("metadata of a sparse matrix out of order", ins)
        x, y = fragments.a_matrix(read_all(left, batch, mask)), fragments.b_matrix(read_all(right, batch, mask))
        c = fragments.accumulators(read_all(sums, batch, mask))
        total = sparsity.sparse_multiply_add(x, kept, y, c, element)
        for index, register in zip(targets, fragments.accumulator_registers(total), strict=True):
            batch.write(index, register, mask)

    return sparse_mma


def _types(ins: Instruction, shapes: dict[str, tuple[str, ...]], *before: str) -> str:
    """The element of .shape.row.col.f32.element.element.f32, of those that a shape is known for."""
    known = tuple(element for elements in shapes.values() for element in elements)
    *_, shape, _, _, _, element, other, _ = modifiers(
        ins, *before, tuple(shapes), "row", "col", "f32", known, known, "f32"
    )
    if element != other or element not in shapes[shape]:
        raise refusal(ins, f"elements of one type are expected, {' or '.join(shapes[shape])}")
    return element
