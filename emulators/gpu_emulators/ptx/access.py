"""Loads and stores (PTX ISA 9.7.9): ld, st, in each state space and by generic addresses, which cvta makes."""

from __future__ import annotations

import numpy as np

from ..findings import refusal
from .local_memory import WINDOW
from .parser import UNSIGNED, Address, Instruction, Kernel, Sink, Symbol, Vector
from .registry import address, destination, filled_register, instruction, modifiers, operands, reader

# with the type of their addresses; "" are generic ones
SPACES = {"": np.uint64, "global": np.uint64, "shared": np.uint32, "shared::cta": np.uint32, "local": np.uint32}
VECTORS = {"": 1, "v2": 2, "v4": 4, "v8": 8}
TYPES = tuple(f"{letter}{bits}" for letter in "bus" for bits in (8, 16, 32, 64)) + ("f32", "f64")


def _pieces(operand, vector: str, ins: Instruction) -> tuple:
    pieces = operand.operands if isinstance(operand, Vector) else (operand,)
    if len(pieces) != VECTORS[vector]:
        raise refusal(ins, f"{VECTORS[vector]} values are expected")
    return pieces


@instruction("ld.param")
def load_parameter(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.9.8, ld, of a kernel's parameters. They lie in memory, where the low bytes come first."""
    _, kind = modifiers(ins, "param", TYPES)
    to, where = operands(ins, 2)
    if not isinstance(where, Address) or not isinstance(where.base, Symbol) or where.offset:
        raise refusal(ins, "the name of a parameter is expected")
    (parameter,) = (one for one in kernel.params if one.name == where.base.name)
    bits = int(kind[1:])
    if parameter.bits < bits:
        raise refusal(ins, f"the parameter is of {parameter.bits} bits")
    index, loaded, filled = filled_register(to, kind, ins, kernel)

    def run(batch, mask):
        low = UNSIGNED[bits](batch.arguments[parameter.name] & UNSIGNED[parameter.bits]((1 << bits) - 1))
        batch.write(index, low.view(loaded).astype(filled), mask)

    return run


@instruction("ld")
def load(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.9.8, ld; a register may be wider than what is loaded (9.4.1), which fills it by its type.

    Of the cache operators (9.7.9.1) there is .ca, which is what none says too.
    """
    space, _, vector, kind = modifiers(ins, SPACES.keys() - {""}, {"ca"}, VECTORS.keys() - {""}, TYPES)
    to, where = operands(ins, 2)
    pieces = _pieces(to, vector, ins)
    targets = [
        (k, *filled_register(piece, kind, ins, kernel)) for k, piece in enumerate(pieces) if not isinstance(piece, Sink)
    ]
    read = address(where, SPACES[space], ins, kernel)
    size = int(kind[1:]) // 8 * len(pieces)

    def run(batch, mask):
        data, lanes = batch.spaces[space].load(read(batch, mask), size, mask, ins)
        for k, index, loaded, filled in targets:
            values = data.view(loaded)[:, k].astype(filled)
            if mask is not None:
                whole = np.zeros(batch.threads, filled)
                whole[lanes] = values
                values = whole
            batch.write(index, values, mask)

    return run


@instruction("st")
def store(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.9.11, st; of a register that is wider the low bits are stored (9.4.1)."""
    space, vector, kind = modifiers(ins, SPACES.keys() - {""}, VECTORS.keys() - {""}, TYPES)
    where, what = operands(ins, 2)
    bits = int(kind[1:])
    values = [reader(piece, UNSIGNED[bits], ins, kernel, wider=True) for piece in _pieces(what, vector, ins)]
    read = address(where, SPACES[space], ins, kernel)

    def run(batch, mask):
        batch.spaces[space].store(read(batch, mask), [value(batch, mask) for value in values], bits, mask, ins)

    return run


@instruction("cvta.local")
def generic_address(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.9, cvta: the generic address of a place in local memory (6.4.1.1, generic addressing)."""
    modifiers(ins, "local", "u64")
    to, source = operands(ins, 2)
    index, read = destination(to, np.uint64, ins, kernel), reader(source, np.uint64, ins, kernel)
    return lambda batch, mask: batch.write(index, read(batch, mask) + WINDOW, mask)
