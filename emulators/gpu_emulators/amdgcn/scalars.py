"""Instructions of the scalar unit (CDNA3 ISA, Scalar ALU Operations; SOP2, SOP1, SOPC, SOPK instructions).

Each holds one value for each wave. Those that compare, carry or overflow set SCC, and so do those of bits, by whether
the result is other than 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..findings import refusal
from .parser import EXEC, Instruction, Kernel, Literal, Word
from .registry import instruction, lane_mask_source, operands, plain, scalar_register, wave_result, wave_source
from .waits import MOST

NONZERO = object()


@dataclass(frozen=True)
class Operation:
    """``compute`` gives the result, and SCC beside it where ``scc`` is True; NONZERO: SCC is whether it is not 0."""

    out: str
    sources: tuple[str, ...]
    compute: Callable
    scc: object = None
    carries: bool = False


def _sum(a, b, carry=0):
    total = a.astype(np.uint64) + b + carry
    return total.astype(np.uint32), total > 0xFFFFFFFF


def _difference(a, b, borrow=0):
    total = a.astype(np.int64) - b - borrow
    return total.astype(np.uint32), total < 0


def _overflowing(compute):
    """Of signed numbers; SCC is whether the result has more than 32 bits."""

    def run(a, b):
        exact = compute(a.astype(np.int64), b.astype(np.int64))
        return exact.astype(np.int32), exact != exact.astype(np.int32)

    return run


def _shifted_sum(shift: int):
    def run(a, b):
        total = (a.astype(np.uint64) << np.uint64(shift)) + b
        return total.astype(np.uint32), total > 0xFFFFFFFF

    return run


def shift_left(a, b):
    return a << (b.astype(a.dtype) & a.dtype.type(a.dtype.itemsize * 8 - 1))


def shift_right(a, b):
    """Of signed numbers by the sign."""
    return a >> (b.astype(a.dtype) & a.dtype.type(a.dtype.itemsize * 8 - 1))


def reversed_bits(a):
    result = np.zeros_like(a)
    for bit in range(32):
        result = result | (a >> np.uint32(bit) & np.uint32(1)) << np.uint32(31 - bit)
    return result


def field(a, b):
    """Bits of a: b holds the first in its bits 4:0, and how many in 22:16."""
    offset, width = b & np.uint32(31), b >> np.uint32(16) & np.uint32(127)
    mask = np.where(width >= 32, 0xFFFFFFFF, (np.uint64(1) << np.minimum(width, 32).astype(np.uint64)) - np.uint64(1))
    return a >> offset & mask.astype(np.uint32)


def signed_field(a, b):
    width = np.minimum(b >> np.uint32(16) & np.uint32(127), 32).astype(np.int64)
    bits = field(a, b).astype(np.int64)
    negative = (width > 0) & (bits >> np.maximum(width - 1, 0) & 1 == 1)
    return np.where(negative, bits - (1 << width), bits).astype(np.int32)


WORDS, SIGNED = ("u32", "u32"), ("i32", "i32")
OPERATIONS = {
    "s_add_u32": Operation("u32", WORDS, _sum, True),
    "s_sub_u32": Operation("u32", WORDS, _difference, True),
    "s_addc_u32": Operation("u32", WORDS, _sum, True, carries=True),
    "s_subb_u32": Operation("u32", WORDS, _difference, True, carries=True),
    "s_add_i32": Operation("i32", SIGNED, _overflowing(np.add), True),
    "s_sub_i32": Operation("i32", SIGNED, _overflowing(np.subtract), True),
    "s_mul_i32": Operation("u32", WORDS, lambda a, b: a * b),
    "s_mul_hi_u32": Operation("u32", WORDS, lambda a, b: (a.astype(np.uint64) * b >> np.uint64(32)).astype(np.uint32)),
    "s_mul_hi_i32": Operation("i32", SIGNED, lambda a, b: (a.astype(np.int64) * b >> np.int64(32)).astype(np.int32)),
    "s_ashr_i32": Operation("i32", ("i32", "u32"), shift_right, NONZERO),
    "s_ashr_i64": Operation("i64", ("i64", "u32"), shift_right, NONZERO),
    "s_mov_b32": Operation("u32", ("u32",), np.copy),
    "s_mov_b64": Operation("u64", ("u64",), np.copy),
    "s_not_b32": Operation("u32", ("u32",), np.invert, NONZERO),
    "s_not_b64": Operation("u64", ("u64",), np.invert, NONZERO),
    "s_brev_b32": Operation("u32", ("u32",), reversed_bits),
    "s_abs_i32": Operation("i32", ("i32",), np.abs, NONZERO),
    "s_bfe_u32": Operation("u32", WORDS, field, NONZERO),
    "s_bfe_i32": Operation("i32", WORDS, signed_field, NONZERO),
    "s_sext_i32_i8": Operation("i32", ("u32",), lambda a: a.astype(np.uint8).view(np.int8).astype(np.int32)),
    "s_sext_i32_i16": Operation("i32", ("u32",), lambda a: a.astype(np.uint16).view(np.int16).astype(np.int32)),
}
OPERATIONS |= {
    f"s_{name}_b{bits}": Operation(f"u{bits}", (f"u{bits}",) * 2, compute, NONZERO)
    for bits in (32, 64)
    for name, compute in {
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "andn2": lambda a, b: a & ~b,
        "orn2": lambda a, b: a | ~b,
        "nand": lambda a, b: ~(a & b),
        "nor": lambda a, b: ~(a | b),
        "xnor": lambda a, b: ~(a ^ b),
    }.items()
}
OPERATIONS |= {
    f"s_{name}_b{bits}": Operation(f"u{bits}", (f"u{bits}", "u32"), compute, NONZERO)
    for bits in (32, 64)
    for name, compute in (("lshl", shift_left), ("lshr", shift_right))
}
OPERATIONS |= {
    f"s_{name}_{kind}": Operation(kind, (kind, kind), compute, True)
    for kind in ("u32", "i32")
    for name, compute in {
        "min": lambda a, b: (np.minimum(a, b), a <= b),
        "max": lambda a, b: (np.maximum(a, b), a >= b),
    }.items()
}
OPERATIONS |= {f"s_lshl{shift}_add_u32": Operation("u32", WORDS, _shifted_sum(shift), True) for shift in (1, 2, 3, 4)}

COMPARISONS = {
    "eq": np.equal,
    "lg": np.not_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lt": np.less,
    "le": np.less_equal,
}
SHORT = ("u32", "i32")


@instruction(*OPERATIONS)
def compute(ins: Instruction, kernel: Kernel):
    """SOP2 and SOP1 instructions of integers and bits."""
    plain(ins)
    operation = OPERATIONS[ins.opcode]
    to, *given = operands(ins, len(operation.sources) + 1)
    reads = [wave_source(one, kind, ins) for one, kind in zip(given, operation.sources, strict=True)]
    write = wave_result(to, operation.out, ins)

    def run(batch):
        values = [read(batch) for read in reads]
        if operation.carries:
            values.append(read_scc(batch, ins).astype(np.uint32))
        result, scc = operation.compute(*values), None
        if operation.scc is True:
            result, scc = result
        elif operation.scc is NONZERO:
            scc = result != 0
        write(batch, np.asarray(result))
        if scc is not None:
            batch.set_scc(np.broadcast_to(scc, batch.waves))

    return run


def read_scc(batch, ins: Instruction) -> np.ndarray:
    """bool [waves]."""
    if batch.scc_unwritten:
        batch.find("read of an unwritten register", ins, "scc")
    return batch.scc


@instruction("s_movk_i32")
def move_short(ins: Instruction, kernel: Kernel):
    """SOPK: a constant of 16 bits, extended by its sign."""
    plain(ins)
    to, what = operands(ins, 2)
    write, value = wave_result(to, "i32", ins), np.int32(_short(what, ins))
    return lambda batch: write(batch, np.asarray(value))


@instruction("s_addk_i32", "s_mulk_i32")
def compute_with_short(ins: Instruction, kernel: Kernel):
    """SOPK: adds to the destination, with SCC for an overflow, or multiplies it; the constant has a sign."""
    plain(ins)
    to, what = operands(ins, 2)
    write, old, value = wave_result(to, "i32", ins), wave_source(to, "i32", ins), np.int32(_short(what, ins))
    if ins.opcode == "s_mulk_i32":
        return lambda batch: write(batch, old(batch) * value)
    add = _overflowing(np.add)

    def run(batch):
        result, scc = add(old(batch), value)
        write(batch, result)
        batch.set_scc(scc)

    return run


def _short(operand, ins: Instruction, signed: bool = True) -> int:
    if not isinstance(operand, Literal) or isinstance(operand.value, float):
        raise refusal(ins, "a constant of 16 bits is expected")
    value = operand.value & 0xFFFF
    return value - (1 << 16) if signed and value >> 15 else value


@instruction("s_cmp_eq_u64", "s_cmp_lg_u64", *(f"s_cmp_{name}_{kind}" for name in COMPARISONS for kind in SHORT))
def compare(ins: Instruction, kernel: Kernel):
    """SOPC: SCC is the result."""
    plain(ins)
    _, _, name, kind = ins.opcode.split("_")
    first, second = (wave_source(one, kind, ins) for one in operands(ins, 2))
    test = COMPARISONS[name]
    return lambda batch: batch.set_scc(np.broadcast_to(test(first(batch), second(batch)), batch.waves))


@instruction(*(f"s_cmpk_{name}_{kind}" for name in COMPARISONS for kind in SHORT))
def compare_short(ins: Instruction, kernel: Kernel):
    """SOPK: with a constant of 16 bits, extended by its sign where the comparison is signed."""
    plain(ins)
    _, _, name, kind = ins.opcode.split("_")
    given, constant = operands(ins, 2)
    read, test, value = wave_source(given, kind, ins), COMPARISONS[name], _short(constant, ins, kind == "i32")
    return lambda batch: batch.set_scc(np.broadcast_to(test(read(batch), value), batch.waves))


@instruction("s_bitcmp0_b32", "s_bitcmp1_b32")
def compare_bit(ins: Instruction, kernel: Kernel):
    """SOPC: SCC is whether a bit is 0, or 1."""
    plain(ins)
    given, which = (wave_source(one, "u32", ins) for one in operands(ins, 2))
    value = int(ins.opcode[len("s_bitcmp")])
    return lambda batch: batch.set_scc(
        np.broadcast_to(shift_right(given(batch), which(batch)) & np.uint32(1) == value, batch.waves)
    )


@instruction("s_bitset0_b32", "s_bitset1_b32")
def set_bit(ins: Instruction, kernel: Kernel):
    """SOP1: sets a bit of the destination; SCC stays."""
    plain(ins)
    to, which = operands(ins, 2)
    write, old, number = wave_result(to, "u32", ins), wave_source(to, "u32", ins), wave_source(which, "u32", ins)
    one = ins.opcode == "s_bitset1_b32"

    def run(batch):
        bit = shift_left(np.uint32(1), number(batch))
        write(batch, old(batch) | bit if one else old(batch) & ~bit)

    return run


@instruction("s_cselect_b32", "s_cselect_b64")
def select(ins: Instruction, kernel: Kernel):
    """SOP2: the first where SCC is 1, else the second."""
    plain(ins)
    kind = f"u{ins.opcode[-2:]}"
    to, first, second = operands(ins, 3)
    write, first, second = wave_result(to, kind, ins), wave_source(first, kind, ins), wave_source(second, kind, ins)
    return lambda batch: write(batch, np.where(read_scc(batch, ins), first(batch), second(batch)))


@instruction("s_bcnt1_i32_b64", "s_ff1_i32_b64", "s_bcnt1_i32_b32", "s_ff1_i32_b32")
def count_bits(ins: Instruction, kernel: Kernel):
    """SOP1: how many bits are 1, with SCC whether any is; the lowest of them, -1 for none, which leaves SCC."""
    plain(ins)
    kind = f"u{ins.opcode[-2:]}"
    to, of = operands(ins, 2)
    write, read = wave_result(to, "i32", ins), wave_source(of, kind, ins)
    counts = ins.opcode.startswith("s_bcnt1")

    def run(batch):
        values = np.broadcast_to(read(batch), batch.waves)
        table = np.unpackbits(np.ascontiguousarray(values)[:, None].view(np.uint8), axis=1, bitorder="little")
        if counts:
            result = table.sum(1, dtype=np.int32)
            batch.set_scc(result != 0)
        else:
            result = np.where(table.any(1), table.argmax(1), -1).astype(np.int32)
        write(batch, result)

    return run


# What s_NAME_saveexec_b64 makes of the source and of EXEC
SAVING = {
    "and": lambda source, lanes: source & lanes,
    "or": lambda source, lanes: source | lanes,
    "xor": lambda source, lanes: source ^ lanes,
    "andn2": lambda source, lanes: source & ~lanes,
    "orn2": lambda source, lanes: source | ~lanes,
    "andn1": lambda source, lanes: ~source & lanes,
}


@instruction(*(f"s_{name}_saveexec_b64" for name in SAVING))
def save_exec(ins: Instruction, kernel: Kernel):
    """SOP1: the destination is EXEC, then EXEC changes by the source; SCC is whether any lane is on."""
    plain(ins)
    to, what = operands(ins, 2)
    index, change = scalar_register(to, 2, ins), SAVING[ins.opcode.split("_")[1]]
    if index == EXEC:
        raise refusal(ins, "EXEC as the destination")
    read = lane_mask_source(what, ins)

    def run(batch):
        before, from_source = batch.exec, read(batch)
        batch.write_lane_mask(index, before, ins)
        batch.set_exec(change(from_source, before))
        batch.set_scc(batch.exec.any(1))

    return run


@instruction("s_nop", "s_sleep", "s_setprio")
def nothing(ins: Instruction, kernel: Kernel):
    """SOPP: waits or ranks that change no result. Hazards that s_nop is there for are not modelled."""
    plain(ins)
    operands(ins, 1)
    return lambda batch: None


@instruction("s_waitcnt")
def wait(ins: Instruction, kernel: Kernel):
    """SOPP: waits until so many accesses of a counter are under way; expcnt counts exports, which there are none of."""
    plain(ins)
    for operand in ins.operands:
        if not isinstance(operand, Word) or operand.value is None or operand.name not in MOST:
            raise refusal(ins, f"operand {operand}")
        if operand.value > MOST[operand.name]:
            raise refusal(ins, f"{operand.name} counts to {MOST[operand.name]}")
    if not ins.operands:
        raise refusal(ins, "a counter is expected")
    waits = [(operand.name, operand.value) for operand in ins.operands if operand.name != "expcnt"]

    def run(batch):
        for counter, most in waits:
            batch.outstanding.wait(counter, most)

    return run
