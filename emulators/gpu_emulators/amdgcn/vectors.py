"""Instructions of the vector unit that compute lane by lane (CDNA3 ISA; VOP1, VOP2 and VOP3 instructions)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..findings import refusal
from . import formats
from .encodings import dpp_sources, old_value, sdwa_result, sdwa_sources
from .parser import Instruction, Kernel
from .registry import instruction, join, no_modifiers, operands, source, vector_result
from .scalars import field, reversed_bits, shift_left, shift_right, signed_field


@dataclass(frozen=True)
class Operation:
    """``sources`` are the kinds of the operands that ``compute`` takes, ``out`` that of what it gives."""

    out: str
    sources: tuple[str, ...]
    compute: Callable


OPERATIONS: dict[str, Operation] = {}


def _add(out: str, sources: str, **computes: Callable) -> None:
    for name, compute in computes.items():
        OPERATIONS[f"v_{name}"] = Operation(out, tuple(sources.split()), compute)


def _high_product(a, b):
    return (a.astype(np.int64 if a.dtype.kind == "i" else np.uint64) * b >> a.dtype.type(32)).astype(a.dtype)


def _low(bits: int):
    mask = np.uint32((1 << bits) - 1)
    return lambda a: a & mask


def _signed_24(a):
    return (a << np.uint32(8)).view(np.int32) >> np.int32(8)


def _permuted(a, b, select):
    """V_PERM_B32: each byte of the result is one of eight, those of b before those of a, or a constant."""
    bytes_of = [word >> np.uint32(8 * k) & np.uint32(255) for word in (b, a) for k in range(4)]
    signs = [np.where(bytes_of[k] >> np.uint32(7), np.uint32(255), np.uint32(0)) for k in (1, 3, 5, 7)]
    zero = np.zeros_like(bytes_of[0])
    table = [*bytes_of, *signs, zero, zero | np.uint32(255)]
    result = np.uint32(0)
    for k in range(4):
        chosen = np.minimum(select >> np.uint32(8 * k) & np.uint32(255), np.uint32(13))
        chosen, *choices = np.broadcast_arrays(chosen, *table)
        result = result | np.choose(chosen, choices).astype(np.uint32) << np.uint32(8 * k)
    return result


def _bit_count(a, b):
    a = np.ascontiguousarray(a)
    counts = np.unpackbits(a[..., None].view(np.uint8), axis=-1).sum(-1, dtype=np.uint32)
    return counts + b


def _of_operands(compute):
    """A field whose first bit and width are operands of their own."""
    return lambda a, offset, width: compute(a, offset & np.uint32(31) | (width & np.uint32(31)) << np.uint32(16))


def _aligned(high, low, shift):
    return (join(low, high) >> (shift & np.uint32(31)).astype(np.uint64)).astype(np.uint32)


def _first_bit(a):
    """V_FFBH_U32: how many zeros stand before the first 1, -1 where there is none."""
    return np.where(a == 0, 0xFFFFFFFF, 31 - np.log2(np.maximum(a, 1).astype(np.float64)).astype(np.int64)).astype(
        np.uint32
    )


def _last_bit(a):
    """V_FFBL_B32: how many zeros stand behind the last 1, -1 where there is none."""
    lowest = a & (~a + np.uint32(1))
    return np.where(a == 0, 0xFFFFFFFF, np.log2(np.maximum(lowest, 1).astype(np.float64)).astype(np.int64)).astype(
        np.uint32
    )


_add("u32", "u32", mov_b32=np.copy, not_b32=np.invert, bfrev_b32=reversed_bits, ffbh_u32=_first_bit, ffbl_b32=_last_bit)
_add("u32", "u32", accvgpr_read_b32=np.copy, accvgpr_write_b32=np.copy)
_add("u64", "u64", mov_b64=np.copy)
_add("u32", "u32 u32", add_u32=np.add, sub_u32=np.subtract, subrev_u32=lambda a, b: b - a)
_add("u32", "u32 u32", and_b32=np.bitwise_and, or_b32=np.bitwise_or, xor_b32=np.bitwise_xor)
_add("u32", "u32 u32", xnor_b32=lambda a, b: ~(a ^ b), min_u32=np.minimum, max_u32=np.maximum)
_add("i32", "i32 i32", min_i32=np.minimum, max_i32=np.maximum)
_add("u32", "u32 u32", lshlrev_b32=lambda a, b: shift_left(b, a), lshrrev_b32=lambda a, b: shift_right(b, a))
_add("i32", "u32 i32", ashrrev_i32=lambda a, b: shift_right(b, a))
_add("u64", "u32 u64", lshlrev_b64=lambda a, b: shift_left(b, a), lshrrev_b64=lambda a, b: shift_right(b, a))
_add("i64", "u32 i64", ashrrev_i64=lambda a, b: shift_right(b, a))
_add("u32", "u32 u32", mul_lo_u32=np.multiply, mul_hi_u32=_high_product)
_add("i32", "i32 i32", mul_hi_i32=_high_product)
_add("u32", "u32 u32", mul_u32_u24=lambda a, b: _low(24)(a) * _low(24)(b))
_add("i32", "u32 u32", mul_i32_i24=lambda a, b: _signed_24(a) * _signed_24(b))
_add("u32", "u32 u32", bcnt_u32_b32=_bit_count)
_add("u16", "u16 u16", add_u16=np.add, sub_u16=np.subtract, mul_lo_u16=np.multiply)
_add("u16", "u16 u16", min_u16=np.minimum, max_u16=np.maximum)
_add("i16", "i16 i16", min_i16=np.minimum, max_i16=np.maximum)
_add("u16", "u16 u16", lshlrev_b16=lambda a, b: shift_left(b, a), lshrrev_b16=lambda a, b: shift_right(b, a))
_add("i16", "u16 i16", ashrrev_i16=lambda a, b: shift_right(b, a))

_add("u32", "u32 u32 u32", add3_u32=lambda a, b, c: a + b + c, or3_b32=lambda a, b, c: a | b | c)
_add("u32", "u32 u32 u32", and_or_b32=lambda a, b, c: a & b | c, xad_u32=lambda a, b, c: (a ^ b) + c)
_add("u32", "u32 u32 u32", lshl_add_u32=lambda a, b, c: shift_left(a, b) + c)
_add("u32", "u32 u32 u32", add_lshl_u32=lambda a, b, c: shift_left(a + b, c))
_add("u32", "u32 u32 u32", lshl_or_b32=lambda a, b, c: shift_left(a, b) | c)
_add("u64", "u64 u32 u64", lshl_add_u64=lambda a, b, c: shift_left(a, b & np.uint32(7)) + c)
_add("u32", "u32 u32 u32", bfe_u32=_of_operands(field), bfi_b32=lambda a, b, c: a & b | ~a & c, perm_b32=_permuted)
_add("i32", "u32 u32 u32", bfe_i32=_of_operands(signed_field))
_add("u32", "u32 u32 u32", alignbit_b32=_aligned)
_add("u32", "u32 u32 u32", alignbyte_b32=lambda a, b, c: _aligned(a, b, c << np.uint32(3)))
_add("u32", "u32 u32 u32", min3_u32=lambda a, b, c: np.minimum(np.minimum(a, b), c))
_add("u32", "u32 u32 u32", max3_u32=lambda a, b, c: np.maximum(np.maximum(a, b), c))
_add("i32", "i32 i32 i32", min3_i32=lambda a, b, c: np.minimum(np.minimum(a, b), c))
_add("i32", "i32 i32 i32", max3_i32=lambda a, b, c: np.maximum(np.maximum(a, b), c))
_add("u32", "u32 u32 u32", mad_u32_u24=lambda a, b, c: _low(24)(a) * _low(24)(b) + c)
_add("i32", "u32 u32 i32", mad_i32_i24=lambda a, b, c: _signed_24(a) * _signed_24(b) + c)

_add("f32", "f32 f32", add_f32=formats.add, sub_f32=formats.subtract, mul_f32=formats.multiply)
_add("f32", "f32 f32", subrev_f32=lambda a, b: formats.subtract(b, a))
_add("f32", "f32 f32", min_f32=formats.minimum, max_f32=formats.maximum)
_add("f32", "f32 f32 f32", fma_f32=formats.fma, med3_f32=formats.median)
_add("f32", "f32 f32 f32", fmamk_f32=formats.fma, fmaak_f32=formats.fma)
_add("f32", "f32 f32 f32", min3_f32=lambda a, b, c: formats.minimum(formats.minimum(a, b), c))
_add("f32", "f32 f32 f32", max3_f32=lambda a, b, c: formats.maximum(formats.maximum(a, b), c))
_add("f32", "f32 f32 f32", div_fixup_f32=formats.division_fixup)
_add("f32", "f32", rcp_f32=formats.reciprocal, rcp_iflag_f32=formats.reciprocal)
_add("f32", "f32", sqrt_f32=formats.root, rsq_f32=formats.reciprocal_root)
for _name, _whole in {"trunc": np.trunc, "floor": np.floor, "ceil": np.ceil, "rndne": np.rint}.items():
    _add("f32", "f32", **{f"{_name}_f32": lambda a, whole=_whole: formats.with_nan(whole(a), a)})


@instruction(*OPERATIONS)
def compute(ins: Instruction, kernel: Kernel):
    """Lane by lane, in each of the encodings."""
    operation = OPERATIONS[ins.opcode]
    to, *given = operands(ins, len(operation.sources) + 1)
    return translate_operation(ins, to, given, operation)


def translate_operation(ins: Instruction, to, given: list, operation: Operation):
    write = vector_result(to, operation.out, ins)
    if ins.encoding == "dpp":
        reads, across = dpp_sources(ins, given, operation.sources)
        return lambda batch: write(batch, operation.compute(*[read(batch) for read in reads]), across.mask(batch))
    if ins.encoding == "sdwa":
        reads = sdwa_sources(ins, given, operation.sources)
        write = sdwa_result(ins, write, old_value(to, ins))
    else:
        no_modifiers(ins, ())
        reads = [source(one, kind, ins) for one, kind in zip(given, operation.sources, strict=True)]
    run = operation.compute
    if len(reads) == 1:
        (only,) = reads
        return lambda batch: write(batch, run(only(batch)))
    if len(reads) == 2:
        first, second = reads
        return lambda batch: write(batch, run(first(batch), second(batch)))
    return lambda batch: write(batch, run(*[read(batch) for read in reads]))


@instruction("v_fmac_f32")
def accumulate(ins: Instruction, kernel: Kernel):
    """VOP2: V_FMAC_F32. The destination is the third operand."""
    to, a, b = operands(ins, 3)
    if ins.encoding not in ("e32", "e64"):
        raise refusal(ins, f"encoding {ins.encoding or 'without a name'}")
    return translate_operation(ins, to, [a, b, to], Operation("f32", ("f32",) * 3, formats.fma))


@instruction("v_nop")
def nothing(ins: Instruction, kernel: Kernel):
    """VOP1: V_NOP."""
    no_modifiers(ins, ())
    operands(ins, 0)
    return lambda batch: None
