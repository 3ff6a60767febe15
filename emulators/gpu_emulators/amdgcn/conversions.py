"""Conversions between integers and floats (CDNA3 ISA, VOP1 instructions V_CVT; V_PACK_B32_F16)."""

from __future__ import annotations

import numpy as np

from . import formats
from .parser import Instruction, Kernel
from .registry import instruction, operands
from .vectors import Operation, translate_operation

QUIET16 = np.uint16(1 << 9)


def to_integer(a: np.ndarray, dtype: type) -> np.ndarray:
    """Towards zero; NaN gives 0, and what lies beyond the range its end."""
    limits = np.iinfo(dtype)
    return np.clip(np.trunc(np.nan_to_num(a.astype(np.float64), nan=0.0)), limits.min, limits.max).astype(dtype)


def to_half(a: np.ndarray) -> np.ndarray:
    """float32 rounded to float16; NaN keeps the upper bits of its payload, and is quiet."""
    result = a.astype(np.float16).view(np.uint16)
    bits = a.view(np.uint32)
    nan = bits >> np.uint32(16) & np.uint32(0x8000) | np.uint32(0x7C00) | bits >> np.uint32(13) & np.uint32(0x3FF)
    return np.where(np.isnan(a), nan.astype(np.uint16) | QUIET16, result).astype(np.uint16).view(np.float16)


def from_half(a: np.ndarray) -> np.ndarray:
    """Exactly; NaN keeps its payload, and is quiet."""
    bits = a.view(np.uint16).astype(np.uint32)
    nan = (bits & np.uint32(0x8000)) << np.uint32(16) | formats.INFINITE | (bits & np.uint32(0x3FF)) << np.uint32(13)
    result = a.astype(np.float32).view(np.uint32)
    return np.where(np.isnan(a), nan | formats.QUIET, result).astype(np.uint32).view(np.float32)


def _byte(k: int):
    shift = np.uint32(8 * k)
    return lambda a: (a >> shift & np.uint32(255)).astype(np.float32)


CONVERSIONS = {
    "v_cvt_f32_i32": Operation("f32", ("i32",), lambda a: a.astype(np.float32)),
    "v_cvt_f32_u32": Operation("f32", ("u32",), lambda a: a.astype(np.float32)),
    "v_cvt_i32_f32": Operation("i32", ("f32",), lambda a: to_integer(a, np.int32)),
    "v_cvt_u32_f32": Operation("u32", ("f32",), lambda a: to_integer(a, np.uint32)),
    "v_cvt_f16_f32": Operation("f16", ("f32",), to_half),
    "v_cvt_f32_f16": Operation("f32", ("f16",), from_half),
} | {f"v_cvt_f32_ubyte{k}": Operation("f32", ("u32",), _byte(k)) for k in range(4)}


@instruction(*CONVERSIONS)
def convert(ins: Instruction, kernel: Kernel):
    """VOP1: V_CVT_*."""
    to, what = operands(ins, 2)
    return translate_operation(ins, to, [what], CONVERSIONS[ins.opcode])


@instruction("v_pack_b32_f16")
def pack_halves(ins: Instruction, kernel: Kernel):
    """VOP3: V_PACK_B32_F16, two halves into one register; without op_sel, their low bits."""
    to, *given = operands(ins, 3)

    def pack(low, high):
        return low.view(np.uint16).astype(np.uint32) | high.view(np.uint16).astype(np.uint32) << np.uint32(16)

    return translate_operation(ins, to, given, Operation("u32", ("f16", "f16"), pack))
