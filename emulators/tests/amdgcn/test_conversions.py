"""Conversions of the AMDGCN emulator, over all halves, and at the ends of the ranges of integers."""

from __future__ import annotations

import numpy as np
from hand_written.amdgcn import compute

HALVES = np.arange(1 << 16, dtype=np.uint16)
AS_HALF = HALVES.view(np.float16)


def test_every_half_to_float():
    found = compute("v_cvt_f32_f16_e32 $d, $a", HALVES)
    sign, fraction = (HALVES >> 15).astype(np.int64), (HALVES & 0x3FF).astype(np.float64)
    exponent = (HALVES >> 10 & 31).astype(np.int64)
    subnormal = np.ldexp(fraction, -24)
    value = np.where(exponent == 0, subnormal, np.ldexp(1 + fraction / 1024, exponent - 15)) * (1 - 2 * sign)
    value = np.where(exponent == 31, np.inf * (1 - 2 * sign), value)
    number = ~np.isnan(AS_HALF)
    assert (found.view(np.float32)[number] == value[number]).all()
    assert (found[number] >> 31 == sign[number]).all()
    # the payload stays, and is quiet
    assert (found[~number] & 0x7FFFFFFF == 0x7FC00000 | (HALVES[~number].astype(np.uint32) & 0x3FF) << 13).all()


def test_every_half_there_and_back():
    found = compute("v_cvt_f32_f16_e32 v30, $a\nv_cvt_f16_f32_e32 $d, v30", HALVES, out=np.uint16)
    assert (found == np.where(np.isnan(AS_HALF), HALVES | 0x200, HALVES)).all()


def test_floats_between_halves_round_to_the_nearest():
    """Halfway between two halves, and one float to either side of it."""
    low, high = (half.view(np.float16).astype(np.float64) for half in (HALVES[:0x7BFF], HALVES[1:0x7C00]))
    middle = ((low + high) / 2).astype(np.float32)
    even = np.where(HALVES[:0x7BFF] & 1, HALVES[1:0x7C00], HALVES[:0x7BFF])
    below, above = np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf))
    for values, expected in ((below, HALVES[:0x7BFF]), (middle, even), (above, HALVES[1:0x7C00])):
        assert (compute("v_cvt_f16_f32_e32 $d, $a", values, out=np.uint16) == expected).all()


def test_a_half_clears_what_is_above_it():
    assert compute("v_mov_b32_e32 $d, -1\nv_cvt_f16_f32_e32 $d, $a", np.float32([1]))[0] == 0x3C00


def test_halves_are_packed():
    low, high = np.uint32([0x12343C00]), np.uint32([0xFFFFC000])
    assert compute("v_pack_b32_f16 $d, $a, $b", low, high)[0] == 0xC0003C00


def test_floats_to_integers_end_where_the_range_does():
    values = np.float32([1.9, -1.9, 2.0**31, -(2.0**31), 2.0**32, -np.inf, np.inf, np.nan, 4294967040.0, 0.5])
    signed = compute("v_cvt_i32_f32_e32 $d, $a", values).view(np.int32)
    assert signed.tolist() == [1, -1, 2**31 - 1, -(2**31), 2**31 - 1, -(2**31), 2**31 - 1, 0, 2**31 - 1, 0]
    unsigned = compute("v_cvt_u32_f32_e32 $d, $a", values)
    assert unsigned.tolist() == [1, 0, 2**31, 0, 2**32 - 1, 0, 2**32 - 1, 0, 4294967040, 0]


def test_integers_to_floats_round_to_the_nearest():
    values = np.array([0, 1, 0x1000001, 0x1000003, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF], np.uint32)
    assert compute("v_cvt_f32_u32_e32 $d, $a", values, out=np.float32).tolist() == [
        *(0, 1, 2.0**24, 2.0**24 + 4),
        *(2.0**31, 2.0**31, 2.0**32),
    ]
    assert compute("v_cvt_f32_i32_e32 $d, $a", values, out=np.float32).tolist()[-3:] == [2.0**31, -(2.0**31), -1]
    assert compute("v_cvt_f32_ubyte2_e32 $d, $a", np.uint32([0x00C30000]), out=np.float32).tolist() == [0xC3]
