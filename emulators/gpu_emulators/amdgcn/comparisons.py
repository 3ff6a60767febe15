"""Instructions with a bit for each lane in scalar registers: comparisons, choices, carries (CDNA3 ISA, VOPC
instructions; VOP2 and VOP3 instructions with a carry; V_DIV_SCALE_F32 and V_DIV_FMAS_F32)."""

from __future__ import annotations

import numpy as np

from ..findings import refusal
from . import formats
from .encodings import old_value, sdwa_result, sdwa_sources
from .parser import VCC, Instruction, Kernel
from .registry import instruction, lane_mask_source, no_modifiers, operands, scalar_register, source, vector_result


def _unordered(a, b):
    return np.isnan(a) | np.isnan(b)


INTEGERS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
# False where a value is NaN, but those that begin with n, and u
FLOATS = {
    "eq": np.equal,
    "lg": lambda a, b: (a < b) | (a > b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "o": lambda a, b: ~_unordered(a, b),
    "u": _unordered,
    "neq": lambda a, b: ~(a == b),
    "nlg": lambda a, b: ~((a < b) | (a > b)),
    "nlt": lambda a, b: ~(a < b),
    "nle": lambda a, b: ~(a <= b),
    "ngt": lambda a, b: ~(a > b),
    "nge": lambda a, b: ~(a >= b),
}
COMPARISONS = {
    f"v_cmp_{name}_{kind}": (kind, test)
    for kinds, tests in ((("u16", "i16", "u32", "i32", "u64", "i64"), INTEGERS), (("f16", "f32"), FLOATS))
    for kind in kinds
    for name, test in tests.items()
}


def mask_result(operand, ins: Instruction):
    """(batch, bool [waves, 64]): writes a bit for each lane, 0 for those that are off."""
    index = scalar_register(operand, 2, ins)
    if ins.encoding == "e32" and index != VCC:
        raise refusal(ins, "vcc is expected")

    def write(batch, lanes):
        lanes = np.broadcast_to(lanes, batch.shape)
        batch.write_lane_mask(index, lanes if batch.mask is None else lanes & batch.mask, ins)

    return write


def lane_sources(ins: Instruction, given: list, kinds: tuple[str, ...], **of_sdwa) -> list:
    if ins.encoding == "sdwa":
        return sdwa_sources(ins, given, kinds, **of_sdwa)
    no_modifiers(ins, ())
    if ins.encoding == "dpp":
        raise refusal(ins, "encoding dpp")
    return [source(one, kind, ins) for one, kind in zip(given, kinds, strict=True)]


def lane_result(operand, ins: Instruction):
    """(batch, uint32): writes a vector register, or a part of it."""
    write = vector_result(operand, "u32", ins)
    return sdwa_result(ins, write, old_value(operand, ins)) if ins.encoding == "sdwa" else write


@instruction(*COMPARISONS)
def compare(ins: Instruction, kernel: Kernel):
    """VOPC: V_CMP_*."""
    kind, test = COMPARISONS[ins.opcode]
    to, *given = operands(ins, 3)
    write = mask_result(to, ins)
    first, second = lane_sources(ins, given, (kind, kind), of_result=())
    return lambda batch: write(batch, test(first(batch), second(batch)))


# Bits of V_CMP_CLASS_F32 for infinity, zero, subnormal and other numbers, of either sign; 0 and 1 are for NaN
CLASSES = (9, 6, 7, 8), (2, 5, 4, 3)


@instruction("v_cmp_class_f32")
def compare_class(ins: Instruction, kernel: Kernel):
    """VOPC: V_CMP_CLASS_F32, whether the first is of one of the classes that the second has bits for."""
    to, *given = operands(ins, 3)
    write = mask_result(to, ins)
    value, classes = lane_sources(ins, given, ("f32", "u32"), of_result=())

    def run(batch):
        a, wanted = value(batch), classes(batch)
        conditions = [np.isinf(a), a == 0, np.abs(a) < np.float32(2.0**-126)]
        of_positive, of_negative = (np.select(conditions, row[:3], row[3]) for row in CLASSES)
        number = np.where(np.isnan(a), ~formats.is_signalling(a), np.where(np.signbit(a), of_negative, of_positive))
        write(batch, wanted >> number.astype(np.uint32) & np.uint32(1) == 1)

    return run


@instruction("v_cndmask_b32")
def choose(ins: Instruction, kernel: Kernel):
    """VOP2: V_CNDMASK_B32, the second where the lane's bit is set, else the first."""
    to, first, second, which = operands(ins, 4)
    first, second = lane_sources(ins, [first, second], ("b32", "b32"))
    if ins.encoding in ("e32", "sdwa") and scalar_register(which, 2, ins) != VCC:
        raise refusal(ins, "vcc is expected")
    write, test = lane_result(to, ins), lane_mask_source(which, ins)
    return lambda batch: write(batch, np.where(test(batch), second(batch), first(batch)))


def _with_carry(a, b, carry):
    total = a.astype(np.uint64) + b + carry
    return total.astype(np.uint32), total > 0xFFFFFFFF


def _with_borrow(a, b, borrow):
    total = a.astype(np.int64) - b - borrow
    return total.astype(np.uint32), total < 0


def _reversed_borrow(a, b, borrow):
    return _with_borrow(b, a, borrow)


CARRIES = {"add": _with_carry, "sub": _with_borrow, "subrev": _reversed_borrow}
CARRIES_IN = {"addc": _with_carry, "subb": _with_borrow, "subbrev": _reversed_borrow}


@instruction(*(f"v_{name}_co_u32" for name in CARRIES | CARRIES_IN))
def carry(ins: Instruction, kernel: Kernel):
    """VOP2: sums and differences with a carry out of each lane, and in VOP3 into any pair of scalar registers."""
    name = ins.opcode.split("_")[1]
    to, carry_out, *given = operands(ins, 5 if name in CARRIES_IN else 4)
    first, second = lane_sources(ins, given[:2], ("u32", "u32"))
    write, write_carry = lane_result(to, ins), mask_result(carry_out, ins)
    compute, carry_in = (CARRIES | CARRIES_IN)[name], None
    if name in CARRIES_IN:
        if ins.encoding == "e32" and scalar_register(given[2], 2, ins) != VCC:
            raise refusal(ins, "vcc is expected")
        carry_in = lane_mask_source(given[2], ins)

    def run(batch):
        into = carry_in(batch).astype(np.uint32) if carry_in else np.uint32(0)
        result, out = compute(first(batch), second(batch), into)
        write(batch, result)
        write_carry(batch, out)

    return run


@instruction("v_mad_u64_u32")
def wide_product(ins: Instruction, kernel: Kernel):
    """VOP3: V_MAD_U64_U32, a * b + c of 64 bits, and whether it has more."""
    no_modifiers(ins, ())
    to, carry_out, *given = operands(ins, 5)
    a, b, c = (source(one, kind, ins) for one, kind in zip(given, ("u32", "u32", "u64"), strict=True))
    write, write_carry = vector_result(to, "u64", ins), mask_result(carry_out, ins)

    def run(batch):
        product, addend = a(batch).astype(np.uint64) * b(batch), c(batch)
        total = product + addend
        write(batch, total)
        write_carry(batch, total < addend)

    return run


@instruction("v_div_scale_f32")
def division_scale(ins: Instruction, kernel: Kernel):
    """VOP3: V_DIV_SCALE_F32."""
    no_modifiers(ins, ())
    to, flags, *given = operands(ins, 5)
    a, denominator, numerator = (source(one, "f32", ins) for one in given)
    write, write_flags = vector_result(to, "f32", ins), mask_result(flags, ins)

    def run(batch):
        scaled, scales = formats.division_scale(*np.broadcast_arrays(a(batch), denominator(batch), numerator(batch)))
        write(batch, scaled)
        write_flags(batch, scales)

    return run


@instruction("v_div_fmas_f32")
def division_fma(ins: Instruction, kernel: Kernel):
    """VOP3: V_DIV_FMAS_F32, which reads VCC."""
    no_modifiers(ins, ())
    to, *given = operands(ins, 4)
    a, b, c = (source(one, "f32", ins) for one in given)
    write = vector_result(to, "f32", ins)
    return lambda batch: write(batch, formats.division_fma(a(batch), b(batch), c(batch), batch.lane_mask(VCC, ins)))
