"""Translators of instructions by their opcodes, and what they share: operands, modifiers, results.

A translator turns an instruction into a function of a batch. It accounts for each operand and each modifier: what it
does not know it refuses, before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..findings import refusal
from .batch import lanes_of
from .parser import EXEC, Instruction, Kernel, Literal, Modified, Scalar, Vector

if TYPE_CHECKING:
    from .batch import Batch

Run = Callable[["Batch"], None]
Read = Callable[["Batch"], np.ndarray]
TRANSLATORS: dict[str, Callable[[Instruction, Kernel], Run]] = {}

KINDS = {
    "u16": np.uint16,
    "i16": np.int16,
    "f16": np.float16,
    "u32": np.uint32,
    "i32": np.int32,
    "f32": np.float32,
    # bits that may be negated as a float
    "b32": np.uint32,
    "u64": np.uint64,
    "i64": np.int64,
}
# Of kinds whose operands may be negated, or taken without their sign
SIGNS = {"f16": np.uint16(1 << 15), "f32": np.uint32(1 << 31), "b32": np.uint32(1 << 31)}
# Integers that an operand of 64 bits can name: CDNA3 ISA, Scalar ALU Operands
INLINE = range(-16, 65)


def instruction(*opcodes: str):
    """Register a translator for opcodes."""

    def register(translate):
        for opcode in opcodes:
            if opcode in TRANSLATORS:
                raise ValueError(f"instruction {opcode} has two translators")
            TRANSLATORS[opcode] = translate
        return translate

    return register


def translate(ins: Instruction, kernel: Kernel) -> Run:
    """What an instruction does to a batch."""
    translator = TRANSLATORS.get(ins.opcode)
    if translator is None:
        raise refusal(ins, "unknown instruction")
    return translator(ins, kernel)


def plain(ins: Instruction, *encodings: str) -> None:
    """Refuse other encodings than these and none, and all modifiers."""
    if ins.encoding not in ("", *encodings):
        raise refusal(ins, f"encoding {ins.encoding}")
    no_modifiers(ins, ())


def no_modifiers(ins: Instruction, but: tuple[str, ...]) -> None:
    if rest := sorted(ins.modifiers.keys() - set(but)):
        raise refusal(ins, f"modifier {', '.join(rest)}")


def operands(ins: Instruction, *counts: int) -> list:
    """The operands, refused unless they are as many as one of ``counts``."""
    if len(ins.operands) not in counts:
        raise refusal(ins, f"{' or '.join(map(str, counts))} operands are expected, {len(ins.operands)} came")
    return ins.operands


def words_of(kind: str) -> int:
    return 2 if kind.endswith("64") else 1


def constant(operand: Literal, kind: str, ins: Instruction) -> np.generic:
    """The bits of a literal of a kind, unsigned: CDNA3 ISA, Scalar ALU Operands and Literal Constants.

    An integer stands for its bits, also where a float is expected.
    """
    value = operand.value
    if kind.endswith("64"):
        if isinstance(value, float) or value not in INLINE:
            raise refusal(ins, f"{value} as a constant of 64 bits")
        return np.uint64(value & (1 << 64) - 1)
    if kind.endswith("16"):
        return np.float16(value).view(np.uint16) if isinstance(value, float) else np.uint16(value & 0xFFFF)
    return np.float32(value).view(np.uint32) if isinstance(value, float) else np.uint32(value & 0xFFFFFFFF)


def vector_register(operand, count: int, ins: Instruction) -> int:
    """The index of the first of ``count`` vector registers."""
    if not isinstance(operand, Vector) or operand.count != count:
        raise refusal(ins, f"{count} vector register{'s' * (count > 1)} are expected, not {operand}")
    return operand.index


def scalar_register(operand, count: int, ins: Instruction) -> int:
    """The index of the first of ``count`` scalar registers."""
    if not isinstance(operand, Scalar) or operand.count != count:
        raise refusal(ins, f"{count} scalar register{'s' * (count > 1)} are expected, not {operand}")
    return operand.index


# -- sources


def join(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """uint64 of two words."""
    return low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)


def word_of_lanes(operand, ins: Instruction) -> Read:
    """(batch) -> uint32 of a register, one value for each lane or for each wave."""
    index = operand.index
    if isinstance(operand, Vector):
        return lambda batch: batch.vector(index, ins)
    return lambda batch: batch.scalar(index, ins)[:, None]


def source(operand, kind: str, ins: Instruction, change: Callable[[Read], Read] | None = None) -> Read:
    """(batch) -> values of an operand of a vector instruction, that broadcast to [waves, 64].

    Args:
        change: what an encoding does to the 32 bits that are read, before they are taken for the kind.
    """
    dtype, modified = KINDS[kind], Modified(operand)
    if isinstance(operand, Modified):
        modified, operand = operand, operand.operand
    if modified.extended and change is None:
        raise refusal(ins, "sext without a selection")
    if isinstance(operand, Literal) and change is None:
        value = constant(operand, kind, ins)
        read = lambda batch: value  # noqa: E731
    elif isinstance(operand, (Vector, Scalar)) and operand.count == words_of(kind):
        read = _register_source(operand, kind, ins, change)
    else:
        raise refusal(ins, f"operand {operand} as {kind}")
    if modified.negated or modified.absolute:
        if kind not in SIGNS:
            raise refusal(ins, f"{kind} with a sign's modifier")
        read = _signed(read, SIGNS[kind], modified)
    return lambda batch: read(batch).view(dtype)


def _register_source(operand: Vector | Scalar, kind: str, ins: Instruction, change) -> Read:
    low = word_of_lanes(operand, ins)
    if words_of(kind) == 2:
        if change is not None:
            raise refusal(ins, "a selection of 64 bits")
        high = word_of_lanes(type(operand)(operand.index + 1), ins)
        return lambda batch: join(low(batch), high(batch))
    if change is not None:
        low = change(low)
    return (lambda batch: low(batch).astype(np.uint16)) if kind.endswith("16") else low


def _signed(read: Read, sign: np.generic, modified: Modified) -> Read:
    def signed(batch):
        bits = read(batch)
        if modified.absolute:
            bits = bits & ~sign
        return bits ^ sign if modified.negated else bits

    return signed


def wave_source(operand, kind: str, ins: Instruction) -> Read:
    """(batch) -> values of an operand of a scalar instruction, [waves] or one for all."""
    dtype = KINDS[kind]
    if isinstance(operand, Literal):
        # of 32 bits, which fill 64 by zeros or by a sign: below 2^31 either gives the same
        fills = kind.endswith("64") and isinstance(operand.value, int) and 0 <= operand.value < 1 << 31
        value = dtype(operand.value) if fills else constant(operand, kind, ins).view(dtype)
        return lambda batch: value
    if not isinstance(operand, Scalar) or operand.count != words_of(kind):
        raise refusal(ins, f"operand {operand} as {kind}")
    index = operand.index
    if operand.count == 1:
        return lambda batch: batch.scalar(index, ins).view(dtype)
    return lambda batch: join(batch.scalar(index, ins), batch.scalar(index + 1, ins)).view(dtype)


def lane_mask_source(operand, ins: Instruction) -> Read:
    """(batch) -> bool [waves, 64] of a pair of scalar registers."""
    index = scalar_register(operand, 2, ins)
    return lambda batch: batch.lane_mask(index, ins)


# -- results


def split(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two words of 64 bits."""
    values = values.view(np.uint64)
    return values.astype(np.uint32), (values >> np.uint64(32)).astype(np.uint32)


def vector_result(operand, kind: str, ins: Instruction) -> Callable[..., None]:
    """(batch, values, mask=None): writes values of a kind; those of 16 bits clear the upper half."""
    index = vector_register(operand, words_of(kind), ins)
    if kind.endswith("64"):

        def write_pair(batch, values, mask=None):
            low, high = split(values)
            batch.write_vector(index, low, ins, mask)
            batch.write_vector(index + 1, high, ins, mask)

        return write_pair
    if kind.endswith("16"):
        return lambda batch, values, mask=None: batch.write_vector(
            index, values.view(np.uint16).astype(np.uint32), ins, mask
        )
    return lambda batch, values, mask=None: batch.write_vector(index, values.view(np.uint32), ins, mask)


def wave_result(operand, kind: str, ins: Instruction) -> Callable[..., None]:
    """(batch, values): writes values of a kind to scalar registers."""
    index = scalar_register(operand, words_of(kind), ins)
    if kind.endswith("64"):

        def write_pair(batch, values):
            if index == EXEC:
                low, high = split(np.broadcast_to(values, batch.waves))
                from_bits = np.stack([low, high], 1)
                batch.write_lane_mask(EXEC, lanes_of(from_bits), ins)
                return
            low, high = split(values)
            batch.write_scalar(index, low, ins)
            batch.write_scalar(index + 1, high, ins)

        return write_pair
    return lambda batch, values: batch.write_scalar(index, values.view(np.uint32), ins)
