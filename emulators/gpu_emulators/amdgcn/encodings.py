"""What the encodings SDWA and DPP do to operands and results (CDNA3 ISA, Sub-Dword Addressing; Data Parallel
Processing)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..findings import refusal
from .parser import WAVE, Instruction, Modified, Scalar, Vector
from .registry import Read, no_modifiers, source, word_of_lanes

# By selection: the first bit and how many
PARTS = {f"BYTE_{k}": (8 * k, 8) for k in range(4)} | {f"WORD_{k}": (16 * k, 16) for k in range(2)} | {"DWORD": (0, 32)}
UNUSED = ("UNUSED_PAD", "UNUSED_SEXT", "UNUSED_PRESERVE")
ROW = 16
DPP = (
    *("quad_perm", "row_shl", "row_shr", "row_ror", "row_mirror", "row_half_mirror", "row_newbcast", "row_bcast"),
    *("row_mask", "bank_mask", "bound_ctrl"),
)


def part_of(ins: Instruction, name: str) -> tuple[int, int]:
    part = PARTS.get(ins.modifiers.get(name, "DWORD"))
    if part is None:
        raise refusal(ins, f"{name}:{ins.modifiers[name]}")
    return part


def selection(part: tuple[int, int], extended: bool) -> Callable[[Read], Read]:
    """The bits of a part, filled up by zeros or by their sign."""
    first, count = part

    def change(read: Read) -> Read:
        if count == 32:
            return read
        if extended:
            left, right = np.uint32(32 - first - count), np.int32(32 - count)
            return lambda batch: ((read(batch) << left).view(np.int32) >> right).view(np.uint32)
        shift, mask = np.uint32(first), np.uint32((1 << count) - 1)
        return lambda batch: read(batch) >> shift & mask

    return change


def sdwa_sources(ins: Instruction, given: list, kinds: tuple[str, ...], of_result=("dst_sel", "dst_unused")) -> list:
    """Sources of an instruction in SDWA, each of which selects a part; modifiers ``of_result`` may stand there too."""
    selections = ("src0_sel", "src1_sel")[: len(given)]
    no_modifiers(ins, (*of_result, *selections))
    reads = []
    for operand, kind, name in zip(given, kinds, selections, strict=True):
        extended = isinstance(operand, Modified) and operand.extended
        reads.append(source(operand, kind, ins, selection(part_of(ins, name), extended)))
    return reads


def sdwa_result(ins: Instruction, write: Callable[..., None], old: Read) -> Callable[..., None]:
    """Writes the low bits of a result to a part of its register, and fills up the rest."""
    first, count = part_of(ins, "dst_sel")
    unused = ins.modifiers.get("dst_unused", UNUSED[0])
    if unused not in UNUSED:
        raise refusal(ins, f"dst_unused:{unused}")
    if count == 32:
        return write
    shift, mask = np.uint32(first), np.uint32((1 << count) - 1)

    def write_part(batch, values, mask_of_lanes=None):
        bits = values.view(f"u{values.dtype.itemsize}").astype(np.uint32) & mask
        if unused == "UNUSED_SEXT":
            negative = bits >> np.uint32(count - 1) & np.uint32(1)
            bits = np.where(negative, bits | ~mask, bits).astype(np.uint32) << shift
        else:
            bits = bits << shift
            if unused == "UNUSED_PRESERVE":
                bits = bits | old(batch) & ~(mask << shift)
        write(batch, bits, mask_of_lanes)

    return write_part


def dpp_lanes(ins: Instruction) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """([64] the lane that each one reads, bool [64] whether there is one, bool [64] those that may be written)."""
    lane = np.arange(WAVE)
    row, at = lane // ROW, lane % ROW
    controls = [name for name in DPP[:-3] if name in ins.modifiers]
    if len(controls) != 1:
        raise refusal(ins, "one control of lanes is expected")
    name, value = controls[0], ins.modifiers[controls[0]]
    valid = np.ones(WAVE, bool)
    if name == "quad_perm":
        from_lane = lane // 4 * 4 + np.array(value)[lane % 4]
    elif name in ("row_shl", "row_shr", "row_ror"):
        other = at + value if name == "row_shl" else at - value
        valid = (other >= 0) & (other < ROW) | (name == "row_ror")
        from_lane = row * ROW + other % ROW
    elif name in ("row_mirror", "row_half_mirror"):
        from_lane = lane ^ (ROW - 1 if name == "row_mirror" else ROW // 2 - 1)
    elif name == "row_newbcast":
        from_lane = row * ROW + value
    elif value == 15:
        from_lane, valid = row * ROW - 1, row > 0
    elif value == 31:
        from_lane, valid = np.full(WAVE, 31), lane > 31
    else:
        raise refusal(ins, f"row_bcast:{value}")
    banks, rows = (int(ins.modifiers.get(mask, 0xF)) for mask in ("bank_mask", "row_mask"))
    written = (rows >> row & 1 == 1) & (banks >> at // 4 & 1 == 1)
    return np.where(valid, from_lane, lane), valid, written


class AcrossLanes:
    """The first source of an instruction in DPP: what another lane of the row holds.

    One from beyond the row, or from a lane that is off, is 0 with bound_ctrl:1. Without it the lane is not written.
    """

    def __init__(self, ins: Instruction):
        no_modifiers(ins, DPP)
        self.from_lane, self.valid, self.written = dpp_lanes(ins)
        self.zero = ins.modifiers.get("bound_ctrl", 0) == 1

    def _valid(self, batch) -> np.ndarray:
        return self.valid & batch.exec[:, self.from_lane]

    def change(self, read: Read) -> Read:
        return lambda batch: np.where(
            self._valid(batch), np.broadcast_to(read(batch), batch.shape)[:, self.from_lane], np.uint32(0)
        )

    def mask(self, batch) -> np.ndarray:
        """The lanes that are written."""
        lanes = np.broadcast_to(self.written, batch.shape) if self.zero else self._valid(batch) & self.written
        return lanes if batch.mask is None else lanes & batch.mask


def dpp_sources(ins: Instruction, given: list, kinds: tuple[str, ...]) -> tuple[list[Read], AcrossLanes]:
    across = AcrossLanes(ins)
    first, *others = given
    plain = first.operand if isinstance(first, Modified) else first
    if not isinstance(plain, Vector):
        raise refusal(ins, "a vector register is expected as the first source")
    reads = [source(first, kinds[0], ins, across.change)]
    return reads + [source(one, kind, ins) for one, kind in zip(others, kinds[1:], strict=True)], across


def old_value(operand, ins: Instruction) -> Read:
    """What a register held before."""
    if isinstance(operand, Scalar):
        raise refusal(ins, "a vector register is expected as the destination")
    return word_of_lanes(operand, ins)
