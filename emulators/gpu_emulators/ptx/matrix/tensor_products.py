"""Products of one CTA with their sums in tensor memory: tcgen05.mma and tcgen05.commit.

PTX ISA 9.7.16, "TensorCore 5th generation matrix multiply and accumulate operations". One thread issues a product; A
lies in shared memory or in tensor memory, B in shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...findings import Fault, refusal
from ..parser import Address, Instruction, Kernel
from ..registry import address, instruction, modifiers, operands, reader
from . import descriptors, fragments
from .mbarriers import by_place, progress
from .shared_operands import shared_matrix
from .tensor_memory import Issuers, tensor_memory

ELEMENTS = {0: "f16", 1: "bf16"}
# words of tensor memory that hold 16 elements along K
DEPTH_WORDS = descriptors.DEPTH // 2
HALF_ROWS = 64


@dataclass(frozen=True)
class Shape:
    """What an instruction descriptor says of kind f16: A is rows x 16, B is 16 x columns."""

    element: str
    rows: int
    columns: int
    a_k_major: bool
    b_k_major: bool


def instruction_descriptor(value: int) -> Shape:
    """Table "Instruction descriptor format for .kind::f16". Raises ValueError for what is not modelled.

    Modelled are dense products of 16-bit elements of one type, with sums in float32 and no negation, of shapes that one
    CTA takes (table "Supported matrix shapes").
    """
    a, b, rows, columns = value >> 7 & 7, value >> 10 & 7, (value >> 24 & 31) << 4, (value >> 17 & 63) << 3
    known = 3 << 4 | 7 << 7 | 7 << 10 | 3 << 15 | 63 << 17 | 31 << 24
    if value & ~known:
        raise ValueError(f"instruction descriptor {value:#010x} has bits {value & ~known:#x} set")
    if value >> 4 & 3 != 1 or a != b or a not in ELEMENTS:
        raise ValueError(f"instruction descriptor {value:#010x} is not of one element type with float32 sums")
    step = {64: 8, 128: 16}.get(rows)
    if step is None or columns % step or not step <= columns <= 256:
        raise ValueError(f"instruction descriptor {value:#010x} is of {rows} x {columns} sums")
    return Shape(ELEMENTS[a], rows, columns, not value >> 15 & 1, not value >> 16 & 1)


def lanes_of(rows: int, first: int, ins: Instruction) -> np.ndarray:
    """The lanes of the rows of a matrix whose address has lane ``first``: "Data path layout organization".

    128 rows take all lanes (layout D). 64 rows take 16 of every 32, the upper ones or the lower ones (layout F).
    """
    row = np.arange(rows)
    if first not in ((0, 16) if rows == HALF_ROWS else (0,)):
        raise refusal(ins, f"{rows} rows from lane {first} on")
    return row // 16 * 32 + row % 16 + first if rows == HALF_ROWS else row


class _Issue:
    """The threads that issue a product, one of each CTA, and the addresses of its matrices in tensor memory."""

    def __init__(self, batch, mask, ins: Instruction):
        _, self.threads = batch.lanes(mask)
        self.batch, self.ins, self.ctas = batch, ins, batch.cta[self.threads]
        if len(np.unique(self.ctas)) < len(self.ctas):
            raise Fault(f"several threads of a CTA issue a product: {batch.place(ins)}")

    def of(self, values: np.ndarray) -> np.ndarray:
        return self.batch.full(values)[self.threads]

    def words(self, addresses: np.ndarray, rows: int, columns: int) -> np.ndarray:
        """Places [ctas, rows, columns] of a matrix of words; all CTAs have it in the same lanes."""
        addresses = self.of(addresses).astype(np.int64)
        firsts = np.unique(addresses >> 16)
        if len(firsts) > 1:
            raise refusal(self.ins, "matrices in other lanes in other CTAs")
        lanes = lanes_of(rows, int(firsts[0]), self.ins)[None, :, None]
        column = (addresses & 0xFFFF)[:, None, None] + np.arange(columns)
        column = np.broadcast_to(column, (len(addresses), rows, columns))
        return tensor_memory(self.batch).places(self.batch, self.ctas[:, None, None], column, lanes, self.ins)


@instruction("tcgen05.mma")
def translate_product(ins: Instruction, kernel: Kernel):
    """PTX ISA "tcgen05.mma": d, a, b, instruction descriptor, enable-input-d."""
    modifiers(ins, "mma", "cta_group::1", "kind::f16")
    d, a, b, descriptor, adds = operands(ins, 5)
    target, right = address(d, np.uint32, ins, kernel), reader(b, np.uint64, ins, kernel)
    shapes, enabled = reader(descriptor, np.uint32, ins, kernel), reader(adds, np.bool_, ins, kernel)
    in_tensor_memory = isinstance(a, Address)
    left = address(a, np.uint32, ins, kernel) if in_tensor_memory else reader(a, np.uint64, ins, kernel)

    def product(batch, mask):
        issue = _Issue(batch, mask, ins)
        shape = _shape(issue.of(shapes(batch, mask)), ins)
        y, held = _from_shared(issue, right(batch, mask), (shape.columns, shape.b_k_major))
        sums = issue.words(target(batch, mask), shape.rows, shape.columns)
        issuers = Issuers(batch, issue.threads)
        sources = None
        if in_tensor_memory:
            if not shape.a_k_major:
                raise refusal(ins, "a transposed matrix in tensor memory")
            sources = issue.words(left(batch, mask), shape.rows, DEPTH_WORDS)
            flat = sources.reshape(len(sources), -1)
            tensor_memory(batch).check_content(batch, flat, issuers, "product", ins)
            x = tensor_memory(batch).words[sources].view(np.uint16)
        else:
            x, others = _from_shared(issue, left(batch, mask), (shape.rows, shape.a_k_major))
            held = np.concatenate([held, others], 1)
        old = _old_sums(issue, sums, issue.of(enabled(batch, mask)), issuers)
        total = fragments.multiply_add(x, y.transpose(0, 2, 1), old, shape.element)
        _write(issue, sums, total, sources, progress(batch).issue(batch, issue.threads, held, ins), issuers)

    return product


def _shape(values: np.ndarray, ins: Instruction) -> Shape:
    if (values != values[0]).any():
        raise refusal(ins, "other instruction descriptors in other CTAs")
    try:
        return instruction_descriptor(int(values[0]))
    except ValueError as error:
        raise refusal(ins, str(error)) from None


def _from_shared(issue: _Issue, values: np.ndarray, shape: tuple[int, bool]):
    threads = issue.threads[:, None]
    return shared_matrix(issue.batch, issue.of(values), threads, descriptors.tcgen05_descriptor, shape, issue.ins)


def _old_sums(issue: _Issue, sums: np.ndarray, adds: np.ndarray, issuers: Issuers) -> np.ndarray:
    """float32 [ctas, rows, columns]; zeros for CTAs whose enable-input-d is false."""
    memory = tensor_memory(issue.batch)
    old = np.zeros(sums.shape, np.float32)
    if adds.any():
        chosen = Issuers(issue.batch, issue.threads[adds])
        flat = sums[adds].reshape(int(adds.sum()), -1)
        memory.check_content(issue.batch, flat, chosen, "product", issue.ins)
        old[adds] = memory.words[sums[adds]].view(np.float32)
    return old


def _write(issue: _Issue, sums, total, sources, serials: np.ndarray, issuers: Issuers) -> None:
    """Products of a CTA run in order, so that one may write what an earlier one reads or writes."""
    memory = tensor_memory(issue.batch)
    memory.check_accesses(issue.batch, sums.reshape(len(sums), -1), issuers, "product into", issue.ins)
    memory.words[sums], memory.filled[sums] = total.view(np.uint32), True
    memory.writing[sums] = serials[:, None, None]
    if sources is not None:
        memory.reading[sources] = serials[:, None, None]


@instruction("tcgen05.commit")
def translate_commit(ins: Instruction, kernel: Kernel):
    """PTX ISA "tcgen05.commit": an mbarrier is arrived at when all that the thread has issued is complete.

    Without a state space its address has 64 bits. Triton 3.6 gives the shared one then, which is taken for it.
    """
    *_, space, _ = modifiers(ins, "commit", "cta_group::1", "mbarrier::arrive::one", {"shared::cluster"}, "b64")
    place = address(*operands(ins, 1), np.uint32 if space else np.uint64, ins, kernel)

    def commit(batch, mask):
        for at, threads in by_place(batch, place(batch, mask), mask):
            progress(batch).arrive(batch, at, threads, ins)

    return commit
