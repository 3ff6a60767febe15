"""Single lanes as scalars, and two floats at once (CDNA3 ISA, V_READLANE_B32 and its like; VOP3P instructions)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..findings import refusal
from . import formats
from .batch import POISON
from .conversions import from_half
from .parser import WAVE, Instruction, Kernel, Literal, Scalar, Vector
from .registry import (
    Read,
    constant,
    instruction,
    no_modifiers,
    operands,
    plain,
    scalar_register,
    source,
    vector_register,
    wave_source,
)

if TYPE_CHECKING:
    from .batch import Batch


def _lane(operand, ins: Instruction):
    """(batch) -> [waves] numbers of lanes."""
    read = wave_source(operand, "u32", ins)
    return lambda batch: np.broadcast_to(read(batch), batch.waves).astype(np.int64) % WAVE


@instruction("v_readfirstlane_b32")
def read_first_lane(ins: Instruction, kernel: Kernel):
    """VOP1: V_READFIRSTLANE_B32, of the first lane that is on, of lane 0 where none is."""
    plain(ins, "e32")
    to, what = operands(ins, 2)
    index, of = scalar_register(to, 1, ins), vector_register(what, 1, ins)
    return lambda batch: _take_lane(batch, index, of, batch.exec.argmax(1), ins)


@instruction("v_readlane_b32")
def read_lane(ins: Instruction, kernel: Kernel):
    """VOP3: V_READLANE_B32, of any lane, be it on or off."""
    plain(ins, "e64")
    to, what, which = operands(ins, 3)
    index, of, lane = scalar_register(to, 1, ins), vector_register(what, 1, ins), _lane(which, ins)
    return lambda batch: _take_lane(batch, index, of, lane(batch), ins)


def _take_lane(batch, index: int, of: int, lane: np.ndarray, ins: Instruction) -> None:
    """Write a scalar register by one lane of a vector register, be it on or off; undefined where the lane is."""
    mask, chosen = batch.mask, np.zeros(batch.shape, bool)
    waves = np.arange(batch.waves)
    chosen[waves, lane] = True if batch.rows is None else batch.rows
    # that lane alone is read
    batch.mask = chosen
    values, undefined = batch.unchecked_vector(of, ins)[waves, lane], batch.undefined_lanes(of)
    batch.mask = mask
    batch.write_scalar(index, values, ins)
    if undefined is not None:
        batch.leave_undefined_scalar(index, undefined.any(1))


@instruction("v_writelane_b32")
def write_lane(ins: Instruction, kernel: Kernel):
    """VOP3: V_WRITELANE_B32, to any lane, be it on or off."""
    plain(ins, "e64")
    to, what, which = operands(ins, 3)
    index, lane = vector_register(to, 1, ins), _lane(which, ins)
    of = scalar_register(what, 1, ins) if isinstance(what, Scalar) else None
    read = wave_source(what, "u32", ins) if of is None else lambda batch: batch.unchecked_scalar(of, ins)

    def run(batch):
        chosen = np.zeros(batch.shape, bool)
        chosen[np.arange(batch.waves), lane(batch)] = True if batch.rows is None else batch.rows
        # LLVM also keeps what it never writes there, a half of a pair
        undefined = None if of is None else batch.undefined_waves(of)
        batch.write_vector(index, np.broadcast_to(read(batch), batch.waves)[:, None], ins, chosen)
        if undefined is not None:
            batch.leave_undefined(index, np.broadcast_to(undefined[:, None], batch.shape), chosen)

    return run


PACKED = {"v_pk_add_f32": (2, formats.add), "v_pk_mul_f32": (2, formats.multiply), "v_pk_fma_f32": (3, formats.fma)}


def _halves(ins: Instruction, name: str, count: int, default: int) -> tuple[int, ...]:
    given = ins.modifiers.get(name, (default,) * count)
    if not isinstance(given, tuple) or len(given) != count or not set(given) <= {0, 1}:
        raise refusal(ins, f"{name}:{given}")
    return given


# (batch) -> (uint32 values, the lanes in which they are undefined, or None where they are defined in all)
ReadHalf = Callable[["Batch"], tuple[np.ndarray, np.ndarray | None]]


def _half(operand, which: int, ins: Instruction) -> ReadHalf:
    """One of the two words of a pair of registers.

    What stands in the upper word of a constant other than 0 is not documented: it is undefined.
    """
    if isinstance(operand, Literal):
        if which and operand.value != 0:
            return lambda batch: (POISON, np.ones(batch.shape, bool))
        value = constant(operand, "f32", ins)
        return lambda batch: (value, None)
    if not isinstance(operand, (Vector, Scalar)) or operand.count != 2:
        raise refusal(ins, f"operand {operand} as a pair")
    index = operand.index + which
    if isinstance(operand, Vector):
        return lambda batch: (batch.unchecked_vector(index, ins), batch.undefined_lanes(index))

    def read(batch):
        waves = batch.undefined_waves(index)
        lanes = None if waves is None else np.broadcast_to(waves[:, None], batch.shape)
        return batch.unchecked_scalar(index, ins)[:, None], lanes

    return read


def _write_halves(batch, index: int, halves: Sequence[tuple[np.ndarray, Sequence]], ins: Instruction) -> None:
    """Write two words, each given with the lanes that have its operands undefined: there it is undefined too.

    LLVM packs a register that it never writes beside one that it does, and throws that half of the result away.
    """
    for k, (value, undefined) in enumerate(halves):
        batch.write_vector(index + k, value, ins)
        for lanes in undefined:
            if lanes is not None:
                batch.leave_undefined(index + k, lanes)


@instruction(*PACKED)
def packed(ins: Instruction, kernel: Kernel):
    """VOP3P: V_PK_ADD_F32, V_PK_MUL_F32, V_PK_FMA_F32.

    op_sel and op_sel_hi choose the words that the lower and the upper result are of, neg_lo and neg_hi negate them.
    """
    no_modifiers(ins, ("op_sel", "op_sel_hi", "neg_lo", "neg_hi"))
    count, compute = PACKED[ins.opcode]
    to, *given = operands(ins, count + 1)
    index = vector_register(to, 2, ins)
    sides = []
    for select, default, negate in (("op_sel", 0, "neg_lo"), ("op_sel_hi", 1, "neg_hi")):
        words = _halves(ins, select, count, default)
        signs = _halves(ins, negate, count, 0)
        reads = [_half(one, which, ins) for one, which in zip(given, words, strict=True)]
        sides.append([(read, formats.SIGN * np.uint32(sign)) for read, sign in zip(reads, signs, strict=True)])

    def half(batch, side):
        words, undefined = zip(*(read(batch) for read, _ in side), strict=True)
        signed = [word ^ sign if sign else word for word, (_, sign) in zip(words, side, strict=True)]
        return compute(*(word.view(np.float32) for word in signed)).view(np.uint32), undefined

    # both are computed before either is written: they may read what is written
    return lambda batch: _write_halves(batch, index, [half(batch, side) for side in sides], ins)


@instruction("v_fma_mix_f32")
def mixed_fma(ins: Instruction, kernel: Kernel):
    """VOP3P: V_FMA_MIX_F32, of float32 or, where op_sel_hi says so, of a half of a register, which op_sel chooses."""
    no_modifiers(ins, ("op_sel", "op_sel_hi"))
    to, *given = operands(ins, 4)
    index = vector_register(to, 1, ins)
    chosen = zip(given, _halves(ins, "op_sel_hi", 3, 0), _halves(ins, "op_sel", 3, 0), strict=True)
    reads = [_mixed(operand, half, upper, ins) for operand, half, upper in chosen]
    return lambda batch: batch.write_vector(index, formats.fma(*(read(batch) for read in reads)).view(np.uint32), ins)


def _mixed(operand, half: int, upper: int, ins: Instruction) -> Read:
    """(batch) -> float32 of an operand."""
    if not half:
        if upper:
            raise refusal(ins, "the upper half of a float32")
        return source(operand, "f32", ins)
    read = source(operand, "f16", ins, _upper_half if upper else None)
    return lambda batch: from_half(read(batch))


def _upper_half(read: Read) -> Read:
    return lambda batch: read(batch) >> np.uint32(16)


@instruction("v_pk_mov_b32")
def packed_move(ins: Instruction, kernel: Kernel):
    """VOP3P: V_PK_MOV_B32, one word of the first pair and one of the second, by op_sel."""
    no_modifiers(ins, ("op_sel",))
    to, *given = operands(ins, 3)
    index, words = vector_register(to, 2, ins), _halves(ins, "op_sel", 2, 0)
    reads = [_half(one, which, ins) for one, which in zip(given, words, strict=True)]

    def run(batch):
        halves = [read(batch) for read in reads]
        _write_halves(batch, index, [(value, [undefined]) for value, undefined in halves], ins)

    return run
