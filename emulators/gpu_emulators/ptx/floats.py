"""Floating-point instructions (PTX ISA 9.7.3 float32 and float64, 9.7.4 16 bits, 9.7.5 mixed precision).

Rounding is to the nearest, that of fma.f32 also towards plus infinity. Approximations give one of the two neighbours of
the exact value. .ftz elsewhere, and .sat, are refused.
"""

from __future__ import annotations

import numpy as np

from ..findings import refusal
from ..rounding import faithful, without_subnormal
from . import formats
from .arithmetic import elementwise, packed
from .formats import HALVES, canonical
from .parser import Instruction, Kernel
from .registry import destination, instruction, modifiers, operands, reader

SINGLES = {
    "add": lambda a, b: canonical(a + b),
    "sub": lambda a, b: canonical(a - b),
    "mul": lambda a, b: canonical(a * b),
    "fma": formats.fma32,
}
DOUBLES = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
HALF = {"add": formats.add16, "sub": formats.sub16, "mul": formats.mul16, "fma": formats.fma16}
PAIRS = tuple(f"{kind}x2" for kind in HALVES)
SIGN = {"f32": np.uint32(1 << 31), "f64": np.uint64(1 << 63), "f16": np.uint16(1 << 15), "bf16": np.uint16(1 << 15)}


@instruction(*(f"{name}.{part}" for name in ("add", "sub", "mul") for part in ("rn", "f32", "f64", *HALVES, *PAIRS)))
def arithmetic(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.3.3 to 9.7.3.5, 9.7.4.1 to 9.7.4.3: add, sub, mul. Without a rounding they round to the nearest."""
    if ins.opcode[-1] in HALVES and ins.opcode[-2] == "f32":
        return _mixed(ins, kernel)
    _, kind = modifiers(ins, {"rn"}, ("f32", "f64", "f32x2", *HALVES, *PAIRS))
    return _compute(ins, kernel, kind, 2)


@instruction("fma")
def fused(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.3.6 and 9.7.4.4, fma."""
    if ins.opcode[-1] in HALVES and ins.opcode[-2] == "f32":
        return _mixed(ins, kernel)
    rounding, kind = modifiers(ins, ("rn", "rp"), ("f32", "f32x2", *HALVES, *PAIRS))
    if rounding == "rp":
        if kind != "f32":
            raise refusal(ins, "no such instruction")
        return elementwise(ins, kernel, np.float32, 3, formats.fma32_up)
    return _compute(ins, kernel, kind, 3)


def _compute(ins: Instruction, kernel: Kernel, kind: str, count: int):
    name = ins.opcode[0]
    if kind == "f32":
        return elementwise(ins, kernel, np.float32, count, SINGLES[name])
    if kind == "f32x2":
        return packed(ins, kernel, np.uint64, np.float32, count, SINGLES[name])
    if kind == "f64":
        return elementwise(ins, kernel, np.float64, count, DOUBLES[name])
    half, compute = kind.removesuffix("x2"), HALF[name]
    if kind in PAIRS:
        return packed(ins, kernel, np.uint32, np.uint16, count, lambda *values: compute(*values, half))
    return elementwise(ins, kernel, np.uint16, count, lambda *values: compute(*values, half))


def _mixed(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.5, mixed precision: all operands but the last are of 16 bits, which convert exactly."""
    if ins.opcode[0] not in ("add", "sub", "fma"):
        raise refusal(ins, "no such instruction")
    _, _, kind = modifiers(ins, "rn" if ins.opcode[0] == "fma" else {"rn"}, "f32", HALVES)
    to, *narrow, last = operands(ins, 4 if ins.opcode[0] == "fma" else 3)
    index, compute = destination(to, np.float32, ins, kernel), SINGLES[ins.opcode[0]]
    reads = [reader(operand, np.uint16, ins, kernel) for operand in narrow]
    addend = reader(last, np.float32, ins, kernel)

    def run(batch, mask):
        wide = [formats.decode(read(batch, mask), kind) for read in reads]
        batch.write(index, compute(*wide, addend(batch, mask)), mask)

    return run


@instruction("div.rn")
def divide(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.3.8, div.rn."""
    modifiers(ins, "rn", "f32")
    return elementwise(ins, kernel, np.float32, 2, lambda a, b: canonical(a / b))


@instruction("rcp.approx")
def approximate_reciprocal(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.3.13, rcp.approx.ftz."""
    modifiers(ins, "approx", "ftz", "f32")
    return elementwise(ins, kernel, np.float32, 1, formats.near_reciprocal)


APPROXIMATIONS = {"ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt, "rsqrt": lambda a: 1 / np.sqrt(a)}


@instruction(*(f"{name}.approx" for name in APPROXIMATIONS))
def approximate(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.3.16, 9.7.3.18, 9.7.3.21 and 9.7.3.22: sqrt, rsqrt, lg2 and ex2 with .approx."""
    _, flush, _ = modifiers(ins, "approx", {"ftz"}, "f32")
    compute = APPROXIMATIONS[ins.opcode[0]]

    def run(a: np.ndarray) -> np.ndarray:
        operand = without_subnormal(a) if flush else a
        return canonical(faithful(compute(operand.astype(np.float64)), a, bool(flush)))

    return elementwise(ins, kernel, np.float32, 1, run)


@instruction("div.full")
def approximate_quotient(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.3.8, div.full."""
    _, flush, _ = modifiers(ins, "full", {"ftz"}, "f32")

    def run(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if flush:
            a, b = without_subnormal(a), without_subnormal(b)
        return canonical(faithful(a.astype(np.float64) / b.astype(np.float64), a, bool(flush)))

    return elementwise(ins, kernel, np.float32, 2, run)


@instruction("sqrt.rn")
def square_root(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.3.15, sqrt.rn."""
    modifiers(ins, "rn", "f32")
    return elementwise(ins, kernel, np.float32, 1, lambda a: canonical(np.sqrt(a)))


@instruction(*(f"{name}.{part}" for name in ("min", "max") for part in ("f32", "NaN")))
def extremum(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.3.11 and 9.7.3.12, min and max, of two values or of three."""
    nan, _ = modifiers(ins, {"NaN"}, "f32")
    compute = getattr(formats, f"{ins.opcode[0]}32{'_or_nan' if nan else ''}")
    if len(ins.operands) == 4:
        return elementwise(ins, kernel, np.float32, 3, lambda a, b, c: compute(compute(a, b), c))
    return elementwise(ins, kernel, np.float32, 2, compute)


@instruction(*(f"{name}.{kind}" for name in ("neg", "abs") for kind in SIGN))
def sign(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.3.9 and 9.7.3.10, abs and neg: of the sign's bit alone."""
    (kind,) = modifiers(ins, tuple(SIGN))
    bit = SIGN[kind]
    change = (lambda a: a ^ bit) if ins.opcode[0] == "neg" else (lambda a: a & ~bit)
    return elementwise(ins, kernel, type(bit), 1, change)
