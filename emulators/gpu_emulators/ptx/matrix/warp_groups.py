"""Matrix products of warp groups, wgmma, and the fences that they need.

PTX ISA 9.7.15, "Asynchronous warpgroup level matrix multiply-accumulate instructions". A product is computed when it is
issued. Until its threads have waited for the group it was committed to, its registers and its places in shared memory
are in use, and whoever touches them is a finding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from ...findings import refusal
from ..parser import Immediate, Instruction, Kernel, Register, Vector
from ..registry import instruction, modifiers, operands, reader
from . import descriptors, fragments
from .mma import ELEMENTS
from .shared_operands import shared_matrix
from .vectors import destinations, read_all, readers

if TYPE_CHECKING:
    from ..batch import Batch

GROUP = fragments.WARP_GROUP
ROWS = 64
# columns of the shapes
SHAPES = {f"m64n{columns}k16": columns for columns in range(8, 257, 8)}


@dataclass
class Product:
    """A product under way, of the groups that are ``pending``, bool [groups].

    ``number`` [groups] is which of a group's commits it belongs to. ``held`` has the places that it reads in shared
    memory, for each place of a group within its CTA: (numbers of the groups, places [groups, ...]).
    """

    targets: frozenset[int]
    sources: frozenset[int]
    pending: np.ndarray
    number: np.ndarray
    held: list[tuple[np.ndarray, np.ndarray]]
    ins: Instruction

    def threads(self, mask: np.ndarray | None) -> bool:
        """Whether it is under way for a thread of the mask."""
        pending = np.repeat(self.pending, GROUP)
        return bool((pending if mask is None else pending & mask).any())


class WarpGroups:
    """What the warp groups of a batch have under way. Watches the registers that products read and write."""

    def __init__(self, batch: Batch):
        groups = batch.threads // GROUP
        self.commits = np.zeros(groups, np.int64)
        self.products: list[Product] = []
        # which groups have come to a wgmma.fence, and which threads have written and read a register since
        self.fenced = np.zeros(groups, bool)
        self.dirty: dict[str, dict[int, np.ndarray]] = {"written": {}, "read": {}}
        # registers of the product that is being issued: sums, which it reads and writes itself, and operands
        self.issuing: frozenset[int] = frozenset()
        self.sources: frozenset[int] = frozenset()
        for index in product_registers(batch.kernel):
            batch.watch(index, self)
        batch.endings.append(self.end)

    def read(self, batch: Batch, index: int, mask: np.ndarray | None, ins: Instruction) -> None:
        if index not in self.issuing and any(index in p.targets and p.threads(mask) for p in self.products):
            batch.find("read of a register that a product still writes", ins, batch.kernel.names[index])
        if index not in self.issuing and index not in self.sources:
            self._touch("read", batch, index, mask)

    def written(self, batch: Batch, index: int, mask: np.ndarray | None, ins: Instruction) -> None:
        if index in self.issuing:
            return
        self._touch("written", batch, index, mask)
        for verb, what in (("writes", "targets"), ("reads", "sources")):
            if any(index in getattr(p, what) and p.threads(mask) for p in self.products):
                batch.find(f"write of a register that a product still {verb}", ins, batch.kernel.names[index])

    def _touch(self, how: str, batch: Batch, index: int, mask: np.ndarray | None) -> None:
        threads, dirty = np.ones(batch.threads, bool) if mask is None else mask, self.dirty[how]
        dirty[index] = dirty[index] | threads if index in dirty else threads

    def fence(self, mask: np.ndarray | None) -> None:
        self.fenced |= True if mask is None else mask.reshape(-1, GROUP).all(1)
        for how, dirty in self.dirty.items():
            left = {} if mask is None else {index: threads & ~mask for index, threads in dirty.items()}
            self.dirty[how] = {index: threads for index, threads in left.items() if threads.any()}

    def check_fence(self, batch: Batch, registers: frozenset[int], groups: np.ndarray, ins: Instruction) -> None:
        """A finding where registers of a product were written or read without a wgmma.fence behind that.

        The ISA asks for it after any access but by products (PTX ISA "wgmma.fence").
        """
        if not self.fenced[groups].all():
            batch.find("product without a wgmma.fence before it", ins)
        threads = np.repeat(groups, GROUP)
        for how, dirty in self.dirty.items():
            for index in registers & dirty.keys():
                if (dirty[index] & threads).any():
                    batch.find(f"register of a product {how} without a wgmma.fence", ins, batch.kernel.names[index])

    def end(self, batch: Batch) -> None:
        """Note what nobody waited for."""
        for product in self.products:
            batch.find("product that no thread waits for", product.ins)

    def wait(self, batch: Batch, allowed: int, groups: np.ndarray) -> None:
        """End the products of these groups, but for those of the last ``allowed`` commits and those not committed."""
        for product in self.products:
            done = product.pending & groups & (product.number < self.commits - allowed)
            for numbers, places in product.held:
                if done[numbers].any():
                    # a warp's wait tells it nothing of the other warps
                    batch.shared.release(places[done[numbers]])
            product.pending &= ~done
        self.products = [product for product in self.products if product.pending.any()]


_states: WeakKeyDictionary[Batch, WarpGroups] = WeakKeyDictionary()


def state(batch: Batch) -> WarpGroups:
    if batch not in _states:
        _states[batch] = WarpGroups(batch)
    return _states[batch]


def product_registers(kernel: Kernel) -> set[int]:
    """Accumulators and operands of all products of a kernel."""
    products = (ins for ins in kernel.instructions() if ins.opcode[:2] == ["wgmma", "mma_async"])
    vectors = (operand for ins in products for operand in ins.operands if isinstance(operand, Vector))
    return {one.index for vector in vectors for one in vector.operands if isinstance(one, Register)}


def whole_groups(batch: Batch, mask: np.ndarray | None, ins: Instruction) -> np.ndarray:
    """Which groups run, bool [groups]; a finding where some threads of a group do not."""
    if mask is None:
        return np.ones(batch.threads // GROUP, bool)
    by_group = mask.reshape(-1, GROUP)
    whole = by_group.all(1)
    if (by_group.any(1) != whole).any():
        batch.find("divergent warp group at an instruction of all of it", ins)
    return whole


def check_threads(ins: Instruction, kernel: Kernel) -> None:
    if kernel.threads % GROUP:
        raise refusal(ins, f"warp groups of {kernel.threads} threads")


@instruction("fence.proxy")
def translate_proxy_fence(ins: Instruction, kernel: Kernel):
    """PTX ISA "membar / fence": what the generic proxy wrote to shared memory is seen by the asynchronous one."""
    modifiers(ins, "proxy", "async", {"shared::cta"})
    operands(ins, 0)
    return lambda batch, mask: batch.shared.fence(mask)


@instruction("wgmma.fence")
def translate_fence(ins: Instruction, kernel: Kernel):
    """PTX ISA "wgmma.fence": registers written before it may be those of a product behind it."""
    modifiers(ins, "fence", "sync", "aligned")
    operands(ins, 0)
    check_threads(ins, kernel)

    def fence(batch, mask):
        whole_groups(batch, mask, ins)
        state(batch).fence(mask)

    return fence


@instruction("wgmma.commit_group")
def translate_commit(ins: Instruction, kernel: Kernel):
    """PTX ISA "wgmma.commit_group"."""
    modifiers(ins, "commit_group", "sync", "aligned")
    operands(ins, 0)
    check_threads(ins, kernel)

    def commit(batch, mask):
        state(batch).commits += whole_groups(batch, mask, ins)

    return commit


@instruction("wgmma.wait_group")
def translate_wait(ins: Instruction, kernel: Kernel):
    """PTX ISA "wgmma.wait_group": all but the last N groups of products are complete."""
    modifiers(ins, "wait_group", "sync", "aligned")
    (allowed,) = operands(ins, 1)
    check_threads(ins, kernel)
    if not isinstance(allowed, Immediate):
        raise refusal(ins, f"a constant is expected, not {allowed}")
    return lambda batch, mask: state(batch).wait(batch, allowed.value, whole_groups(batch, mask, ins))


@instruction("wgmma.mma_async")
def translate_product(ins: Instruction, kernel: Kernel):
    """PTX ISA "wgmma.mma_async": d, a, b, scale-d, and constants that scale and transpose a and b."""
    *_, shape, _, element, other = modifiers(
        ins, "mma_async", "sync", "aligned", tuple(SHAPES), "f32", ELEMENTS, ELEMENTS
    )
    if element != other:
        raise refusal(ins, "elements of one type are expected")
    check_threads(ins, kernel)
    columns = SHAPES[shape]
    in_registers = len(ins.operands) > 1 and isinstance(ins.operands[1], Vector)
    d, a, b, scale, *constants = operands(ins, 7 if in_registers else 8)
    scales, transposed = _constants(constants, ins)
    if scales != [1, 1]:
        raise refusal(ins, "factors of 1 are expected")
    targets = destinations(d, columns // 2, np.float32, ins, kernel)
    sums = readers(d, columns // 2, np.float32, ins, kernel)
    adds = reader(scale, np.bool_, ins, kernel)
    right = _shared_operand(b, columns, not transposed[-1], ins, kernel)
    if in_registers:
        left, sources = readers(a, 4, np.uint32, ins, kernel), frozenset(one.index for one in a.operands)
    else:
        left, sources = _shared_operand(a, ROWS, not transposed[0], ins, kernel), frozenset()
    involved = frozenset(targets)

    def product(batch, mask):
        groups = whole_groups(batch, mask, ins)
        numbers = np.flatnonzero(groups)
        if not numbers.size:
            return
        of = state(batch)
        of.check_fence(batch, involved | sources, groups, ins)
        y, places = right(batch, mask, numbers)
        of.sources = sources
        if in_registers:
            x = fragments.a_matrix(read_all(left, batch, mask)).reshape(-1, ROWS, descriptors.DEPTH)[numbers]
        else:
            x, others = left(batch, mask, numbers)
            places = np.concatenate([places, others], 1)
        if any(p.targets & involved and p.targets != involved for p in of.products):
            batch.find("products under way share some of their accumulators", ins)
        of.issuing = involved
        old = _accumulators(batch, sums, _scale(batch, adds, mask, numbers, ins), columns)[numbers]
        total = fragments.multiply_add(x, y.transpose(0, 2, 1), old, element)
        _write(batch, targets, total, numbers, mask)
        of.issuing = of.sources = frozenset()
        of.products.append(Product(involved, sources, groups, of.commits.copy(), _hold(batch, numbers, places), ins))

    return product


def _constants(given: list, ins: Instruction) -> tuple[list[int], list[int]]:
    """(the two factors, which operands are MN-major)."""
    if not all(isinstance(one, Immediate) for one in given):
        raise refusal(ins, "constants are expected behind scale-d")
    values = [one.value for one in given]
    if not set(values[2:]) <= {0, 1}:
        raise refusal(ins, "transpositions of 0 or 1 are expected")
    return values[:2], values[2:]


def _shared_operand(operand, rows: int, k_major: bool, ins: Instruction, kernel: Kernel) -> Callable:
    """(batch, mask, groups) -> (uint16 [groups, rows, DEPTH], places [groups, bytes]) of a descriptor's matrix."""
    value = reader(operand, np.uint64, ins, kernel)

    def read(batch, mask, groups):
        values = batch.full(value(batch, mask)).reshape(-1, GROUP)[groups]
        if (values != values[:, :1]).any():
            batch.find("descriptor differs within a warp group", ins)
        threads = batch.thread.reshape(-1, GROUP)[groups]
        return shared_matrix(batch, values[:, 0], threads, descriptors.wgmma_descriptor, (rows, k_major), ins)

    return read


def _scale(batch: Batch, adds: Callable, mask, groups: np.ndarray, ins: Instruction) -> np.ndarray:
    """Which threads of these groups have a scale-d that is true, bool [threads]."""
    chosen = batch.full(adds(batch, mask))
    chosen = chosen if mask is None else chosen & mask
    by_group = chosen.reshape(-1, GROUP)[groups]
    if (by_group != by_group[:, :1]).any():
        raise refusal(ins, "a scale-d that differs within a warp group")
    return chosen


def _accumulators(batch: Batch, sums: list, chosen: np.ndarray, columns: int) -> np.ndarray:
    """float32 [groups, ROWS, columns]: what the product is added to; zeros for groups whose scale-d is false."""
    if not chosen.any():
        return np.zeros((batch.threads // GROUP, ROWS, columns), np.float32)
    every = bool(chosen.all())
    registers = read_all(sums, batch, None if every else chosen)
    if not every:
        registers = [np.where(chosen, register, np.float32(0)) for register in registers]
    return fragments.accumulators(registers).reshape(-1, ROWS, columns)


def _write(batch: Batch, targets: list[int], total: np.ndarray, groups: np.ndarray, mask) -> None:
    registers = fragments.accumulator_registers(total.reshape(-1, 16, total.shape[2]))
    if mask is not None:
        everywhere = np.zeros((len(targets), batch.threads // GROUP, GROUP), np.float32)
        everywhere[:, groups] = registers.reshape(len(targets), -1, GROUP)
        registers = everywhere.reshape(len(targets), -1)
    for index, register in zip(targets, registers, strict=True):
        batch.write(index, register, mask)


def _hold(batch: Batch, numbers: np.ndarray, places: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Groups at one place of their CTAs share no memory: they can be let go one by one."""
    per_cta = batch.cta_threads // GROUP
    held = []
    for position in range(per_cta):
        chosen = numbers % per_cta == position
        if chosen.any():
            batch.shared.hold(places[chosen])
            held.append((numbers[chosen], places[chosen]))
    return held
