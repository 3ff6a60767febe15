"""Loads and stores: scalar loads, vector memory by buffers and by addresses, LDS.

CDNA3 ISA, Scalar Memory Operations; Vector Memory Buffer Instructions; Flat Memory Instructions; Data Share
Operations. Values are there at once, but the registers that they go to may not be touched before s_waitcnt.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from ..findings import Fault, refusal
from .parser import WAVE, Instruction, Kernel, Literal, Scalar, Word
from .registry import (
    Read,
    instruction,
    join,
    no_modifiers,
    operands,
    scalar_register,
    source,
    vector_register,
    wave_source,
    word_of_lanes,
)
from .waits import Access

WORDS = {"": 1, "x2": 2, "x3": 3, "x4": 4, "x8": 8, "x16": 16}
# What a load of less than a word gives: bytes, and whether the sign fills the register
NARROW = {"ubyte": (1, False), "sbyte": (1, True), "ushort": (2, False), "sshort": (2, True)}
# Ends the names of stores that take the bits of a register from 16 on
UPPER_HALF = "_d16_hi"
# The fourth word of a buffer's descriptor on gfx942, of bytes without a structure, and what masks an access in it
RAW_BUFFER, MASKED = 0x27000, 1 << 31
CACHE = ("sc0", "sc1", "nt")


@dataclass(frozen=True)
class Width:
    """``size`` bytes that fill ``words`` registers, the one of less than a word by zeros or its sign."""

    size: int
    words: int = 1
    signed: bool = False

    def pieces(self, data: np.ndarray) -> list[np.ndarray]:
        """uint32 of each register of uint8 [lanes, size]."""
        if self.size >= 4:
            return list(np.ascontiguousarray(data).view(np.uint32).T)
        narrow = np.ascontiguousarray(data).view(f"{'i' if self.signed else 'u'}{self.size}")[:, 0]
        return [narrow.astype(np.int32).view(np.uint32)]


def width_of(ins: Instruction) -> Width:
    """By the end of an opcode: dword, dwordx2, ubyte, short and so on."""
    name = ins.opcode.removesuffix(UPPER_HALF).split("_")[-1]
    if name in NARROW:
        size, signed = NARROW[name]
        return Width(size, 1, signed)
    if name in ("byte", "short"):
        return Width(1 if name == "byte" else 2)
    words = WORDS[name.removeprefix("dword")]
    return Width(4 * words, words)


def words_to_store(ins: Instruction, first: int, words: int):
    """(batch) -> the words that a store takes, of registers from ``first`` on."""
    if ins.opcode.endswith(UPPER_HALF):
        return lambda batch: [batch.vector(first, ins) >> np.uint32(16)]
    return lambda batch: [batch.vector(first + k, ins) for k in range(words)]


def flat_mask(batch, also: np.ndarray | None = None) -> np.ndarray | None:
    """bool [threads] of the lanes that are on, None for all."""
    if also is None or also.all():
        return None if batch.mask is None else batch.mask.reshape(-1)
    return (also if batch.mask is None else also & batch.mask).reshape(-1)


def whole(values: np.ndarray, lanes, batch) -> np.ndarray:
    """[waves, 64] of values of some lanes; 0 elsewhere."""
    if isinstance(lanes, slice):
        return values.reshape(batch.shape)
    table = np.zeros(batch.waves * batch.shape[1], values.dtype)
    table[lanes] = values
    return table.reshape(batch.shape)


def running(batch) -> np.ndarray:
    """bool [waves], an array of its own."""
    return np.ones(batch.waves, bool) if batch.rows is None else batch.rows.copy()


def offset_of(ins: Instruction, signed: bool) -> int:
    """CDNA3 ISA: 12 bits of a buffer, 13 with a sign of an address."""
    offset = ins.modifiers.get("offset", 0)
    if not (-4096 <= offset < 4096 if signed else 0 <= offset < 4096):
        raise refusal(ins, f"offset {offset}")
    return offset


# -- scalar loads


@instruction(*(f"s_load_dword{words}" for words in WORDS if words != "x3"))
def scalar_load(ins: Instruction, kernel: Kernel):
    """CDNA3 ISA, SMEM Instructions: s_load_dword. Words at an address that all lanes of a wave share."""
    no_modifiers(ins, ())
    to, base, offset = operands(ins, 3)
    words = WORDS[ins.opcode.removeprefix("s_load_dword")]
    first, base = scalar_register(to, words, ins), wave_source(base, "u64", ins)
    if not isinstance(offset, Literal) or offset.value % 4 or not -(1 << 20) <= offset.value < 1 << 20:
        raise refusal(ins, f"offset {offset}")
    step = np.uint64(offset.value & (1 << 64) - 1)

    def run(batch):
        waves = np.flatnonzero(running(batch))
        addresses = np.broadcast_to(base(batch) + step, batch.waves)[waves]
        if (addresses & np.uint64(3)).any():
            raise Fault(f"misaligned scalar load: {batch.place(ins)}")
        access = Access("lgkmcnt", running(batch), scalar=True, scalars=tuple(range(first, first + words)))
        batch.outstanding.begin(access, ins)
        data = batch.memory.read(addresses, 4 * words, waves * batch.shape[1], ins).view(np.uint32)
        for k in range(words):
            values = np.zeros(batch.waves, np.uint32)
            values[waves] = data[:, k]
            batch.write_scalar(first + k, values)

    return run


# -- vector memory


def _load(ins: Instruction, first: int, width: Width):
    """(batch, addresses, in_range): loads of the lanes that are on; 0 out of a buffer's range."""

    def run(batch, addresses, in_range=None):
        registers = tuple(range(first, first + width.words))
        batch.outstanding.begin(Access("vmcnt", running(batch), vectors=registers), ins)
        data, lanes = batch.memory.load(addresses, width.size, flat_mask(batch, in_range), ins)
        for register, piece in zip(registers, width.pieces(data), strict=True):
            batch.write_vector(register, whole(piece, lanes, batch))

    return run


def _store(ins: Instruction, first: int, width: Width):
    """(batch, addresses, in_range): stores of the lanes that are on; none out of a buffer's range."""
    values, bits = words_to_store(ins, first, width.words), 8 * min(width.size, 4)

    def run(batch, addresses, in_range=None):
        words = values(batch)
        batch.outstanding.begin(Access("vmcnt", running(batch)), ins)
        batch.memory.store(addresses, words, bits, flat_mask(batch, in_range), ins)

    return run


def _address(vector, base, ins: Instruction) -> Read:
    """CDNA3 ISA, Flat Memory Instructions: an address of each lane, or an offset of each to one of the wave."""
    offset = np.uint64(offset_of(ins, signed=True) & (1 << 64) - 1)
    if base == Word("off"):
        read = source(vector, "u64", ins)
        return lambda batch: read(batch) + offset
    vector_register(vector, 1, ins)
    lane, wave = source(vector, "u32", ins), wave_source(base, "u64", ins)
    return lambda batch: lane(batch).astype(np.uint64) + (wave(batch) + offset)[:, None]


DWORDS = ("dword", "dwordx2", "dwordx3", "dwordx4")
LOADS, STORES = (*NARROW, *DWORDS), ("byte", "short", f"byte{UPPER_HALF}", f"short{UPPER_HALF}", *DWORDS)


@instruction(*(f"global_load_{name}" for name in LOADS))
def global_load(ins: Instruction, kernel: Kernel):
    """CDNA3 ISA, FLAT, Scratch and Global Instructions: global_load."""
    no_modifiers(ins, ("offset", *CACHE))
    to, vector, base = operands(ins, 3)
    width = width_of(ins)
    load, address = _load(ins, vector_register(to, width.words, ins), width), _address(vector, base, ins)
    return lambda batch: load(batch, address(batch))


@instruction(*(f"global_store_{name}" for name in STORES))
def global_store(ins: Instruction, kernel: Kernel):
    """CDNA3 ISA, FLAT, Scratch and Global Instructions: global_store."""
    no_modifiers(ins, ("offset", *CACHE))
    vector, what, base = operands(ins, 3)
    width = width_of(ins)
    store, address = _store(ins, vector_register(what, width.words, ins), width), _address(vector, base, ins)
    return lambda batch: store(batch, address(batch))


def _buffer(vector, descriptor, scalar_offset, size: int, ins: Instruction):
    """(batch) -> (addresses, which lanes are in range): CDNA3 ISA, Buffer Addressing and Range Checking.

    Raw buffers alone, whose offset is in bytes. Triton masks a lane by an offset beyond the range; one that lies there
    without being that very offset is out of bounds.
    """
    if "offen" not in ins.modifiers:
        raise refusal(ins, "an offset of each lane is expected")
    vector_register(vector, 1, ins)
    index = scalar_register(descriptor, 4, ins)
    words = [wave_source(Scalar(index + k), "u32", ins) for k in range(4)]
    lane, wave = source(vector, "u32", ins), wave_source(scalar_offset, "u32", ins)
    immediate = np.uint64(offset_of(ins, signed=False))

    def run(batch):
        low, high, records, kind = (np.broadcast_to(word(batch), batch.waves) for word in words)
        rows = running(batch)
        if (high[rows] >> np.uint32(16)).any() or (kind[rows] != RAW_BUFFER).any():
            raise Fault(f"the descriptor of no raw buffer: {batch.place(ins)}")
        own, by_wave = lane(batch), np.broadcast_to(wave(batch), batch.waves).astype(np.uint64)
        offset = own.astype(np.uint64) + immediate
        in_range = offset + np.uint64(size) + by_wave[:, None] <= records.astype(np.uint64)[:, None]
        outside = ~in_range & (own != MASKED)
        if (outside if batch.mask is None else outside & batch.mask).any():
            batch.find("out of bounds of a buffer", ins)
        return join(low, high)[:, None] + by_wave[:, None] + offset, in_range

    return run


@instruction(*(f"buffer_load_{name}" for name in LOADS))
def buffer_load(ins: Instruction, kernel: Kernel):
    """CDNA3 ISA, MUBUF Instructions: buffer_load."""
    no_modifiers(ins, ("offen", "offset", *CACHE))
    to, vector, descriptor, scalar_offset = operands(ins, 4)
    width = width_of(ins)
    load = _load(ins, vector_register(to, width.words, ins), width)
    place = _buffer(vector, descriptor, scalar_offset, width.size, ins)
    return lambda batch: load(batch, *place(batch))


@instruction(*(f"buffer_store_{name}" for name in STORES))
def buffer_store(ins: Instruction, kernel: Kernel):
    """CDNA3 ISA, MUBUF Instructions: buffer_store."""
    no_modifiers(ins, ("offen", "offset", *CACHE))
    what, vector, descriptor, scalar_offset = operands(ins, 4)
    width = width_of(ins)
    store = _store(ins, vector_register(what, width.words, ins), width)
    place = _buffer(vector, descriptor, scalar_offset, width.size, ins)
    return lambda batch: store(batch, *place(batch))


# -- LDS

LDS_READS = {"b32": (4, 1), "b64": (8, 2), "b96": (12, 3), "b128": (16, 4)}
LDS_NARROW = {"u8": Width(1), "i8": Width(1, signed=True), "u16": Width(2), "i16": Width(2, signed=True)}
LDS_STORES = LDS_READS | {"b8": (1, 1), "b16": (2, 1), f"b8{UPPER_HALF}": (1, 1), f"b16{UPPER_HALF}": (2, 1)}
LDS_PAIR = re.compile(r"ds_(?:read|write)2(st64)?_b(32|64)")


def _lds_read(batch, places: list[np.ndarray], width: Width, first: int, ins: Instruction) -> None:
    """One access that reads from some places, one behind the other into registers."""
    found = [batch.lds.load(addresses, width.size, ins) for addresses in places]
    registers = tuple(range(first, first + width.words * len(places)))
    granules, waves = (np.concatenate([one[k] for one in found]) for k in (2, 3))
    batch.outstanding.begin(Access("lgkmcnt", running(batch), vectors=registers, granules=granules, waves=waves), ins)
    pieces = [whole(piece, lanes, batch) for data, lanes, _, _ in found for piece in width.pieces(data)]
    for register, piece in zip(registers, pieces, strict=True):
        batch.write_vector(register, piece)


def _lds_write(batch, places: list[tuple[np.ndarray, list[np.ndarray]]], size: int, ins: Instruction) -> None:
    """One access that writes values of ``size`` bytes to some places."""
    found = []
    for addresses, values in places:
        words = np.stack([batch.full(value) for value in values], 1)
        found.append(batch.lds.store(addresses, words.view(np.uint8)[:, :size], ins))
    granules, waves = (np.concatenate(one) for one in zip(*found, strict=True))
    batch.outstanding.begin(Access("lgkmcnt", running(batch), granules=granules, waves=waves, writes=True), ins)


def _lds_offset(name: str, limit: int, ins: Instruction) -> int:
    offset = ins.modifiers.get(name, 0)
    if not 0 <= offset < limit:
        raise refusal(ins, f"{name} {offset}")
    return offset


@instruction(*(f"ds_read_{name}" for name in (*LDS_READS, *LDS_NARROW)))
def lds_read(ins: Instruction, kernel: Kernel):
    """CDNA3 ISA, DS Instructions: ds_read."""
    no_modifiers(ins, ("offset",))
    to, where = operands(ins, 2)
    name = ins.opcode.split("_")[-1]
    width = LDS_NARROW.get(name) or Width(*LDS_READS[name])
    first, address = vector_register(to, width.words, ins), word_of_lanes(where, ins)
    vector_register(where, 1, ins)
    offset = np.int64(_lds_offset("offset", 1 << 16, ins))
    return lambda batch: _lds_read(batch, [address(batch).astype(np.int64) + offset], width, first, ins)


@instruction(*(f"ds_write_{name}" for name in LDS_STORES))
def lds_write(ins: Instruction, kernel: Kernel):
    """CDNA3 ISA, DS Instructions: ds_write."""
    no_modifiers(ins, ("offset",))
    where, what = operands(ins, 2)
    size, words = LDS_STORES[ins.opcode.removeprefix("ds_write_")]
    first, address = vector_register(what, words, ins), word_of_lanes(where, ins)
    vector_register(where, 1, ins)
    offset, values = np.int64(_lds_offset("offset", 1 << 16, ins)), words_to_store(ins, first, words)
    return lambda batch: _lds_write(batch, [(address(batch).astype(np.int64) + offset, values(batch))], size, ins)


def _pair_offsets(ins: Instruction) -> tuple[int, list[np.int64]]:
    """(bytes of each of the two, their offsets): they are in elements, or in 64 of them."""
    stride, bits = LDS_PAIR.fullmatch(ins.opcode).groups()
    size = int(bits) // 8
    step = size * (64 if stride else 1)
    return size, [np.int64(step * _lds_offset(name, 256, ins)) for name in ("offset0", "offset1")]


@instruction(*(f"ds_read2{stride}_b{bits}" for stride in ("", "st64") for bits in (32, 64)))
def lds_read_pair(ins: Instruction, kernel: Kernel):
    """CDNA3 ISA, DS Instructions: ds_read2, ds_read2st64."""
    no_modifiers(ins, ("offset0", "offset1"))
    to, where = operands(ins, 2)
    size, offsets = _pair_offsets(ins)
    words = size // 4
    first, address = vector_register(to, 2 * words, ins), word_of_lanes(where, ins)
    vector_register(where, 1, ins)

    def run(batch):
        base = address(batch).astype(np.int64)
        _lds_read(batch, [base + offset for offset in offsets], Width(size, words), first, ins)

    return run


@instruction(*(f"ds_write2{stride}_b{bits}" for stride in ("", "st64") for bits in (32, 64)))
def lds_write_pair(ins: Instruction, kernel: Kernel):
    """CDNA3 ISA, DS Instructions: ds_write2, ds_write2st64."""
    no_modifiers(ins, ("offset0", "offset1"))
    where, *what = operands(ins, 3)
    size, offsets = _pair_offsets(ins)
    words = size // 4
    firsts, address = [vector_register(one, words, ins) for one in what], word_of_lanes(where, ins)
    vector_register(where, 1, ins)

    def run(batch):
        base = address(batch).astype(np.int64)
        values = [[batch.vector(first + k, ins) for k in range(words)] for first in firsts]
        _lds_write(batch, [(base + offset, one) for offset, one in zip(offsets, values, strict=True)], size, ins)

    return run


@instruction("ds_bpermute_b32")
def backward_permute(ins: Instruction, kernel: Kernel):
    """CDNA3 ISA, DS Instructions: DS_BPERMUTE_B32, what another lane of the wave holds; 0 of a lane that is off.

    Lanes are given by bytes. No memory is touched, but the wave waits for the result as for one of LDS.
    """
    no_modifiers(ins, ("offset",))
    to, where, what = operands(ins, 3)
    index, lane, value = (vector_register(one, 1, ins) for one in (to, where, what))
    offset = np.uint32(_lds_offset("offset", 1 << 16, ins))

    def run(batch):
        given, addresses = batch.vector(value, ins), batch.vector(lane, ins)
        from_lane = (addresses + offset) // np.uint32(4) % np.uint32(WAVE)
        found = np.where(batch.exec, given, np.uint32(0))
        batch.outstanding.begin(Access("lgkmcnt", running(batch), vectors=(index,)), ins)
        batch.write_vector(index, np.take_along_axis(found, from_lane.astype(np.int64), 1))

    return run
