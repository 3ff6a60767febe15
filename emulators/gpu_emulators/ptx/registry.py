"""Translators of instructions, by the first parts of their opcodes, and what they share.

A translator turns an instruction into a function of a batch and a mask. It accounts for each part of the opcode and for
each operand: what it does not know it refuses, before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..findings import refusal
from .parser import UNSIGNED, Address, Immediate, Instruction, Kernel, Negated, Register, Special

if TYPE_CHECKING:
    from .batch import Batch

Run = Callable[["Batch", np.ndarray | None], None]
Read = Callable[["Batch", np.ndarray | None], np.ndarray]
TRANSLATORS: dict[str, Callable[[Instruction, Kernel], Run]] = {}

SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {32: np.float32, 64: np.float64}


def instruction(*prefixes: str):
    """Register a translator for opcodes that begin with these parts; the longest prefix decides."""

    def register(translate):
        for prefix in prefixes:
            if prefix in TRANSLATORS:
                raise ValueError(f"instruction {prefix} has two translators")
            TRANSLATORS[prefix] = translate
        return translate

    return register


def translate(ins: Instruction, kernel: Kernel) -> Run:
    """What an instruction does to a batch, under its guard."""
    for count in range(len(ins.opcode), 0, -1):
        translator = TRANSLATORS.get(".".join(ins.opcode[:count]))
        if translator:
            run = translator(ins, kernel)
            return run if ins.guard is None else _guarded(run, ins, kernel)
    raise refusal(ins, "unknown instruction")


def _guarded(run: Run, ins: Instruction, kernel: Kernel) -> Run:
    """PTX ISA 9.3, predicated execution."""
    test = guard(ins, kernel)

    def guarded(batch, mask):
        chosen = batch.full(test(batch, mask))
        if mask is not None:
            chosen = chosen & mask
        if chosen.any():
            run(batch, None if mask is None and chosen.all() else chosen)

    return guarded


def guard(ins: Instruction, kernel: Kernel) -> Read:
    """Which threads the guard lets through."""
    register = Register(ins.guard)
    return reader(Negated(register) if ins.negated else register, np.bool_, ins, kernel)


def modifiers(ins: Instruction, *expected: str | tuple[str, ...] | set[str] | frozenset[str]) -> list[str]:
    """The parts of an opcode behind the first, one for each expectation; refuses what is left over.

    A string must stand there, a tuple lists what may, a set what may or may not: its part is "" where it does not.
    """
    parts, found = ins.opcode[1:], []
    for one in expected:
        part = parts[0] if parts else ""
        if isinstance(one, (set, frozenset)):
            found.append(part if part in one else "")
        elif part == one or (isinstance(one, tuple) and part in one):
            found.append(part)
        else:
            raise refusal(ins, f"{one if isinstance(one, str) else ' or '.join(one)} is expected, not {part!r}")
        if found[-1]:
            parts = parts[1:]
    if parts:
        raise refusal(ins, f"modifier .{'.'.join(parts)}")
    return found


def operands(ins: Instruction, *counts: int) -> list:
    """The operands, refused unless they are as many as one of ``counts``."""
    if len(ins.operands) not in counts:
        raise refusal(ins, f"{' or '.join(map(str, counts))} operands are expected, {len(ins.operands)} came")
    return ins.operands


def numpy_type(name: str) -> type:
    """That of PTX types (PTX ISA 5.2.1): bits and unsigned integers, signed ones, floats of 32 and 64 bits, pred."""
    if name == "pred":
        return np.bool_
    return {"b": UNSIGNED, "u": UNSIGNED, "s": SIGNED, "f": FLOAT}[name[0]][int(name[1:])]


def destination(operand, dtype: type, ins: Instruction, kernel: Kernel) -> int:
    """The index of a register that is as wide as ``dtype``."""
    if not isinstance(operand, Register):
        raise refusal(ins, f"a register is expected as the destination, not {operand}")
    own, want = np.dtype(kernel.dtypes[operand.index]), np.dtype(dtype)
    if own.itemsize != want.itemsize or (own == np.bool_) != (want == np.bool_):
        raise refusal(ins, f"a destination of {own} for {want}")
    return operand.index


def filled_register(operand, kind: str, ins: Instruction, kernel: Kernel) -> tuple[int, np.dtype, np.dtype]:
    """(register, its part that a value of a PTX type takes, all of it), both signed where the type is.

    A register may be wider than the value, and is filled by zeros or by the sign (PTX ISA 9.4.1).
    """
    part = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}")
    own = np.dtype(kernel.dtypes[operand.index]) if isinstance(operand, Register) else np.dtype(np.bool_)
    if own == np.bool_ or own.itemsize < part.itemsize:
        raise refusal(ins, f"a register as wide as .{kind} is expected")
    return operand.index, part, np.dtype(f"{part.kind}{own.itemsize}")


def reader(operand, dtype: type, ins: Instruction, kernel: Kernel, wider: bool = False) -> Read:
    """(batch, mask) -> values of an operand as ``dtype``, an array over threads or one value for all of them.

    ``wider`` for the instructions that take the low bits of registers that are wider (PTX ISA 9.4.1).
    """
    want = np.dtype(dtype)
    if isinstance(operand, Register):
        return _register_reader(operand.index, want, ins, kernel, wider)
    if isinstance(operand, Negated):
        positive = reader(operand.register, dtype, ins, kernel)
        if want != np.bool_:
            raise refusal(ins, "only predicates are negated")
        return lambda batch, mask: ~positive(batch, mask)
    if isinstance(operand, Immediate):
        value = constant(operand, want, ins)
        return lambda batch, mask: value
    if isinstance(operand, Special):
        return _special_reader(operand.name, want, ins)
    raise refusal(ins, f"operand {operand}")


def constant(operand: Immediate, dtype: np.dtype, ins: Instruction) -> np.generic:
    """An immediate as ``dtype``; an integer stands for its bits, also those of a float (PTX ISA 4.5)."""
    dtype = np.dtype(dtype)
    if dtype == np.bool_:
        return np.bool_(operand.value)
    width = dtype.itemsize * 8
    if operand.bits is None and dtype.kind == "f":
        raise refusal(ins, "an integer where a float is expected")
    if operand.bits not in (None, width):
        raise refusal(ins, f"a constant of {operand.bits} bits where {width} are expected")
    return UNSIGNED[width](operand.value & (1 << width) - 1).view(dtype)


def _register_reader(index: int, want: np.dtype, ins: Instruction, kernel: Kernel, wider: bool) -> Read:
    own = np.dtype(kernel.dtypes[index])
    fits = own.itemsize >= want.itemsize if wider else own.itemsize == want.itemsize
    if (own == np.bool_) != (want == np.bool_) or not fits:
        raise refusal(ins, f"{kernel.names[index]} is of {own}, {want} is expected")

    def read(batch, mask):
        if index in batch.unusual:
            batch.inspect(index, mask, ins)
        return batch.registers[index]

    if own == want:
        return read
    if own.itemsize == want.itemsize:

        def read_as(batch, mask):
            if index in batch.unusual:
                batch.inspect(index, mask, ins)
            return batch.registers[index].view(want)

        return read_as
    narrow = UNSIGNED[want.itemsize * 8]
    return lambda batch, mask: read(batch, mask).astype(narrow).view(want)


def passing_on(
    index: int,
    given: Sequence,
    dtype: type,
    ins: Instruction,
    kernel: Kernel,
    compute: Callable[..., np.ndarray],
    spread: Callable[..., np.ndarray],
) -> Run:
    """d = compute(operands), whose undefined bits are no findings yet: ``spread`` makes those of the result of them.

    LLVM writes no register for a value that nobody wants (LangRef, "Undefined Values" and "Poison Values"). Where its
    vectors hold such an element, the text still packs, computes and unpacks it beside the others.
    """
    reads = [_raw_reader(operand, dtype, ins, kernel) for operand in given]
    indices = [operand.index if isinstance(operand, Register) else None for operand in given]
    registers = frozenset(indices) - {None}

    def run(batch, mask):
        value = compute(*[read(batch, mask) for read in reads])
        if batch.unusual.isdisjoint(registers):
            batch.write(index, value, mask)
            return
        undefined = [dtype(0) if k is None else batch.undefined_bits(k, mask, ins) for k in indices]
        batch.write(index, value, mask)
        batch.leave_undefined(index, spread(*undefined), mask)

    return run


def _raw_reader(operand, dtype: type, ins: Instruction, kernel: Kernel) -> Read:
    """A reader of unsigned ``dtype`` that doesn't look whether a register is written."""
    read = reader(operand, dtype, ins, kernel)
    if not isinstance(operand, Register):
        return read
    index = operand.index
    return lambda batch, mask: batch.registers[index]


SPECIALS = {f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"} | {"%laneid", "%warpid"}


def _special_reader(name: str, want: np.dtype, ins: Instruction) -> Read:
    """PTX ISA 10, special registers; all that are known have 32 bits."""
    if name not in SPECIALS:
        raise refusal(ins, f"special register {name}")
    if want.itemsize != 4:
        return lambda batch, mask: batch.specials[name].astype(want)
    return lambda batch, mask: batch.specials[name].view(want)


def address(operand, dtype: type, ins: Instruction, kernel: Kernel) -> Read:
    """(batch, mask) -> addresses, unsigned, of 32 bits in shared memory and of 64 in global memory."""
    if not isinstance(operand, Address):
        raise refusal(ins, f"an address is expected, not {operand}")
    base = reader(operand.base, dtype, ins, kernel)
    if not operand.offset:
        return base
    offset = dtype(operand.offset & (1 << np.dtype(dtype).itemsize * 8) - 1)
    return lambda batch, mask: base(batch, mask) + offset
