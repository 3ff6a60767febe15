"""setp and selp (PTX ISA 9.7.6), and comparisons of integers and floats (9.3.1)."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import numpy as np

from ..findings import refusal
from .bits import LOGIC
from .formats import HALVES, decode
from .parser import UNSIGNED, Instruction, Kernel, Pair, Sink
from .registry import Run, destination, instruction, modifiers, numpy_type, operands, passing_on, reader

# PTX ISA 9.3.1.1, integers; lo, ls, hi, hs are of unsigned ones
INTEGERS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
UNSIGNED_ONLY = {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
# PTX ISA 9.3.1.2, floats: false where one is NaN, those with u true
FLOATS = INTEGERS | {
    "ne": lambda a, b: (a < b) | (a > b),
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}
KINDS = ("f32", "f64", *HALVES, *(f"{letter}{bits}" for letter in "bus" for bits in (16, 32, 64)))


def _comparisons(kind: str) -> dict:
    if kind[0] == "f" or kind in HALVES:
        return FLOATS
    if kind[0] == "b":
        return {name: INTEGERS[name] for name in ("eq", "ne")}
    return INTEGERS | (UNSIGNED_ONLY if kind[0] == "u" else {})


@instruction("setp")
def compare(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.6.2, setp: p = compare(a, b), or that combined with a third; a second predicate has it inverted."""
    names = tuple(FLOATS | UNSIGNED_ONLY)
    if ins.opcode[-1] in [f"{kind}x2" for kind in HALVES]:
        return _compare_pairs(ins, kernel)
    name, combine, kind = modifiers(ins, names, set(LOGIC), KINDS)
    test = _comparisons(kind).get(name)
    if test is None:
        raise refusal(ins, f".{name} of .{kind}")
    to, first, second, *third = operands(ins, 4 if combine else 3)
    dtype = np.uint16 if kind in HALVES else numpy_type(kind)
    a, b = (reader(operand, dtype, ins, kernel) for operand in (first, second))
    other = reader(third[0], np.bool_, ins, kernel) if combine else None
    targets = [to.first, to.second] if isinstance(to, Pair) else [to]
    # the result in the first, its inverse in the second
    indices = [None if isinstance(one, Sink) else destination(one, np.bool_, ins, kernel) for one in targets]

    def run(batch, mask):
        values = a(batch, mask), b(batch, mask)
        if kind in HALVES:
            values = [decode(value, kind) for value in values]
        result = test(*values)
        also = other(batch, mask) if combine else None
        for k, index in enumerate(indices):
            if index is not None:
                one = ~result if k else result
                batch.write(index, LOGIC[combine](one, also) if combine else one, mask)

    return run


def _compare_pairs(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.7.2, setp of two values of 16 bits: p|q, one for each, undefined where its values are."""
    name, kind = modifiers(ins, tuple(FLOATS), tuple(f"{half}x2" for half in HALVES))
    to = operands(ins, 3)[0]
    if not isinstance(to, Pair):
        raise refusal(ins, "two predicates are expected")
    low = _compare_half(to.first, np.uint32(0), FLOATS[name], kind[:-2], ins, kernel)
    high = _compare_half(to.second, np.uint32(16), FLOATS[name], kind[:-2], ins, kernel)

    def run(batch, mask):
        low(batch, mask)
        high(batch, mask)

    return run


def _compare_half(to, shift: np.uint32, test: Callable, kind: str, ins: Instruction, kernel: Kernel) -> Run:
    """The predicate of the values from bit ``shift`` on."""

    def result(*words):
        return test(*(decode((word >> shift).astype(np.uint16), kind) for word in words))

    def is_undefined(*undefined):
        return (reduce(np.bitwise_or, undefined) >> shift).astype(np.uint16) != 0

    index = destination(to, np.bool_, ins, kernel)
    return passing_on(index, ins.operands[1:], np.uint32, ins, kernel, result, is_undefined)


@instruction("selp")
def select(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.6.3, selp."""
    (kind,) = modifiers(ins, tuple(kind for kind in KINDS if kind not in HALVES))
    dtype = UNSIGNED[int(kind[1:])]
    to, first, second, chooser = operands(ins, 4)
    index = destination(to, dtype, ins, kernel)
    a, b = (reader(operand, dtype, ins, kernel) for operand in (first, second))
    test = reader(chooser, np.bool_, ins, kernel)
    return lambda batch, mask: batch.write(index, np.where(test(batch, mask), a(batch, mask), b(batch, mask)), mask)
