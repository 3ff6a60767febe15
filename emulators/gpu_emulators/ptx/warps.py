"""What the threads of a warp do together, all 32 of them: shfl.sync, vote.sync, redux.sync, elect.sync."""

from __future__ import annotations

import functools

import numpy as np

from ..findings import refusal
from . import formats
from .batch import LANE, WARP
from .bits import LOGIC
from .control import whole_membership
from .parser import Immediate, Instruction, Kernel, Pair, Sink
from .registry import destination, instruction, modifiers, numpy_type, operands, reader

REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum}


def by_warp(batch, values: np.ndarray) -> np.ndarray:
    return batch.full(values).reshape(-1, WARP)


def members(operand, ins: Instruction, kernel: Kernel):
    """A check that all threads of the warp are named as members, at once or when it runs."""
    if isinstance(operand, Immediate):
        whole_membership(operand, ins)
        return lambda batch, mask: None
    read = reader(operand, np.uint32, ins, kernel)

    def check(batch, mask):
        named = batch.full(read(batch, mask))
        if (named if mask is None else named[mask]).min() != 0xFFFFFFFF:
            raise refusal(ins, "all threads of the warp are expected as members")

    return check


@instruction("shfl")
def shuffle(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.9.6, shfl.sync; a second destination tells whether the source was in range."""
    _, way, _ = modifiers(ins, "sync", ("up", "down", "bfly", "idx"), "b32")
    to, source, by, clamp, members_operand = operands(ins, 5)
    index = destination(to.first if isinstance(to, Pair) else to, np.uint32, ins, kernel)
    in_range = destination(to.second, np.bool_, ins, kernel) if isinstance(to, Pair) else None
    read, lane, segment = (reader(operand, np.uint32, ins, kernel) for operand in (source, by, clamp))
    check = members(members_operand, ins, kernel)

    def run(batch, mask):
        batch.whole_warps(mask, ins)
        check(batch, mask)
        at, valid = source_lanes(way, by_warp(batch, lane(batch, mask)), by_warp(batch, segment(batch, mask)))
        values = np.take_along_axis(by_warp(batch, read(batch, mask)), at, 1)
        batch.write(index, values.reshape(-1), mask)
        if in_range is not None:
            batch.write(in_range, valid.reshape(-1), mask)

    return run


def source_lanes(way: str, by: np.ndarray, clamp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(lane that each lane reads, whether it was in range), [warps, 32]; out of range a lane reads itself."""
    by, limit, segment = (value.astype(np.int64) & 31 for value in (by, clamp, clamp >> np.uint32(8)))
    highest = LANE & segment | limit & ~segment
    if way == "up":
        at = LANE - by
        valid = at >= highest
    else:
        lowest = LANE & segment
        at = {"down": LANE + by, "bfly": LANE ^ by, "idx": lowest | by & ~segment}[way]
        valid = at <= highest
    return np.where(valid, at, LANE), valid


@instruction("redux")
def reduce(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.13.12, redux.sync; of float32 the smallest and the largest."""
    _, name, nan, kind = modifiers(ins, "sync", tuple(REDUCTIONS | LOGIC), {"NaN"}, ("u32", "s32", "b32", "f32"))
    if (kind == "b32") != (name in LOGIC) or (kind == "f32" and name == "add") or (nan and kind != "f32"):
        raise refusal(ins, f".{name}{nan and '.NaN'} of .{kind}")
    dtype = numpy_type(kind)
    to, source, members_operand = operands(ins, 3)
    index, read = destination(to, dtype, ins, kernel), reader(source, dtype, ins, kernel)
    check = members(members_operand, ins, kernel)
    if kind == "f32":
        pair = getattr(formats, f"{name}32{'_or_nan' if nan else ''}")

        def combined(values):
            return functools.reduce(pair, values.T)
    else:

        def combined(values):
            return (REDUCTIONS | LOGIC)[name].reduce(values, 1, dtype=dtype)

    def run(batch, mask):
        batch.whole_warps(mask, ins)
        check(batch, mask)
        batch.write(index, np.repeat(combined(by_warp(batch, read(batch, mask))), WARP), mask)

    return run


@instruction("vote")
def vote(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.13.9, vote.sync."""
    _, way, kind = modifiers(ins, "sync", ("all", "any", "uni", "ballot"), ("pred", "b32"))
    if (way == "ballot") != (kind == "b32"):
        raise refusal(ins, f".{way} of .{kind}")
    to, source, members_operand = operands(ins, 3)
    index, read = destination(to, numpy_type(kind), ins, kernel), reader(source, np.bool_, ins, kernel)
    check = members(members_operand, ins, kernel)

    def run(batch, mask):
        batch.whole_warps(mask, ins)
        check(batch, mask)
        votes = by_warp(batch, read(batch, mask))
        if way == "ballot":
            result = np.packbits(votes, 1, "little").view(np.uint32)[:, 0]
        else:
            every, some = votes.all(1), votes.any(1)
            result = {"all": every, "any": some, "uni": every | ~some}[way]
        batch.write(index, np.repeat(result, WARP), mask)

    return run


@instruction("elect")
def elect(ins: Instruction, kernel: Kernel):
    """PTX ISA 9.7.13.14, elect.sync: one thread of the warp, always the same; here the first."""
    modifiers(ins, "sync")
    to, members_operand = operands(ins, 2)
    if not isinstance(to, Pair):
        raise refusal(ins, "a lane and a predicate are expected")
    lane = None if isinstance(to.first, Sink) else destination(to.first, np.uint32, ins, kernel)
    elected = destination(to.second, np.bool_, ins, kernel)
    check = members(members_operand, ins, kernel)

    def run(batch, mask):
        batch.whole_warps(mask, ins)
        check(batch, mask)
        if lane is not None:
            batch.write(lane, np.uint32(0), mask)
        batch.write(elected, batch.specials["%laneid"] == 0, mask)

    return run
