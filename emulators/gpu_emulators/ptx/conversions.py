"""cvt (PTX ISA 9.7.9.21): between integers, floats, and both."""

from __future__ import annotations

import numpy as np

from ..findings import refusal
from ..rounding import odd_float32, odd_sum
from .formats import HALVES, canonical, decode, encode
from .parser import UNSIGNED, Instruction, Kernel, Register
from .registry import destination, filled_register, instruction, modifiers, numpy_type, operands, passing_on, reader

INTEGERS = tuple(f"{letter}{bits}" for letter in "us" for bits in (8, 16, 32, 64))
WHOLE = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
PAIRS = tuple(f"{kind}x2" for kind in HALVES)
FLOATS = ("f32", "f64", *HALVES)


@instruction("cvt")
def convert(ins: Instruction, kernel: Kernel):
    kinds = (*INTEGERS, *FLOATS)
    rounding, target, source = modifiers(ins, {"rn", *WHOLE}, (*kinds, *PAIRS), kinds)
    if target in PAIRS:
        return _pair(ins, kernel, rounding, target, source)
    to, of = operands(ins, 2)
    # registers may be wider than the type: it is the low bits that are read
    read = reader(of, np.uint16 if source in HALVES else numpy_type(source), ins, kernel, wider=True)
    compute = _conversion(rounding, target, source)
    if compute is None:
        raise refusal(ins, f"rounding .{rounding or 'none'}")
    if target in INTEGERS:
        index, part, filled = filled_register(to, target, ins, kernel)
        wide = int(source[1:]) // 8 if source in INTEGERS else 0
        if part.itemsize == filled.itemsize < wide == _width(of, kernel):
            return _low_bits(index, of, filled.itemsize, ins, kernel)
        return lambda batch, mask: batch.write(index, compute(read(batch, mask)).astype(filled), mask)
    index = destination(to, np.uint16 if target in HALVES else numpy_type(target), ins, kernel)
    return lambda batch, mask: batch.write(index, compute(read(batch, mask)), mask)


def _width(operand, kernel: Kernel) -> int | None:
    """Bytes of a register."""
    return np.dtype(kernel.dtypes[operand.index]).itemsize if isinstance(operand, Register) else None


def _low_bits(index: int, of: Register, size: int, ins: Instruction, kernel: Kernel):
    """So many bytes of a wider register, whatever is undefined above them."""
    narrow, wide = UNSIGNED[8 * size], UNSIGNED[8 * _width(of, kernel)]

    def low(bits):
        return bits.astype(narrow)

    return passing_on(index, [of], wide, ins, kernel, low, low)


def _conversion(rounding: str, target: str, source: str):
    """The function of values, None for a rounding that is missing, needless or unknown."""
    if target in INTEGERS and source in INTEGERS:
        dtype = numpy_type(target)
        return None if rounding else lambda values: values.astype(dtype)
    if target in INTEGERS:
        return (lambda values: whole(values, rounding, target, source)) if rounding in WHOLE else None
    if source in INTEGERS:
        return _from_integer(target) if rounding == "rn" else None
    if FLOATS.index(target) > 1:
        return (lambda values: encode(values, target)) if (rounding, source) == ("rn", "f32") else None
    if source in HALVES:
        return (lambda values: decode(values, source)) if (rounding, target) == ("", "f32") else None
    if (target, source) == ("f32", "f64"):
        return (lambda values: canonical(values.astype(np.float32))) if rounding == "rn" else None
    return (lambda values: values.astype(np.float64)) if not rounding and (target, source) == ("f64", "f32") else None


def _from_integer(target: str):
    if target not in HALVES:
        dtype = numpy_type(target)
        return lambda values: values.astype(dtype)

    def rounded(values):
        wide = values.astype(np.int64 if values.dtype.kind == "i" else np.uint64)
        # each half is exact in float64, where 64 bits are not
        high = (wide >> wide.dtype.type(32)).astype(np.float64) * 2.0**32
        low = (wide & wide.dtype.type(0xFFFFFFFF)).astype(np.float64)
        return encode(odd_float32(odd_sum(high, low)), target)

    return rounded


def whole(values: np.ndarray, rounding: str, kind: str, source: str) -> np.ndarray:
    """Integers of floats, which travel as bits where ``source`` has 16; at the end of their range if beyond it.

    Of NaN zero, or 1 << (bits - 1) where either type has 64 bits.
    """
    dtype, bits = numpy_type(kind), int(kind[1:])
    low, high = (-(1 << bits - 1), 1 << bits - 1) if kind[0] == "s" else (0, 1 << bits)
    values = decode(values, source) if source in HALVES else values
    values = WHOLE[rounding](values.astype(np.float64))
    inside = (values >= low) & (values < high)
    result = np.where(inside, values, 0.0).astype(dtype)
    result = np.where(values >= high, dtype(high - 1), np.where(values < low, dtype(low), result))
    nan = 1 << bits - 1 if bits == 64 or source == "f64" else 0
    return np.where(np.isnan(values), UNSIGNED[bits](nan).view(dtype), result)


def _pair(ins: Instruction, kernel: Kernel, rounding: str, target: str, source: str):
    """Two float32 into a register, the first of them above."""
    if rounding != "rn" or source != "f32":
        raise refusal(ins, "rounding to the nearest, of .f32, is expected")
    to, *given = operands(ins, 3)
    index = destination(to, np.uint32, ins, kernel)
    high, low = (reader(operand, np.float32, ins, kernel) for operand in given)

    def run(batch, mask):
        above, below = (encode(read(batch, mask), target[:-2]).astype(np.uint32) for read in (high, low))
        batch.write(index, above << np.uint32(16) | below, mask)

    return run
