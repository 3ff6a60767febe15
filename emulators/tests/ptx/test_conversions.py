"""cvt of the PTX emulator: all 2^16 inputs of the formats of 16 bits, and rationals for the others."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hand_written.ptx import compute

EVERY = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
TORCH = {"bf16": torch.bfloat16, "f16": torch.float16}


def by_torch(bits: np.ndarray, kind: str) -> np.ndarray:
    return torch.from_numpy(bits.view(np.int16).copy()).view(TORCH[kind]).float().numpy()


def same_but_for_nan(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(np.isnan(a), np.isnan(b)) and np.array_equal(
        np.where(np.isnan(a), 0, a.view(np.uint32)), np.where(np.isnan(b), 0, b.view(np.uint32))
    )


@pytest.mark.parametrize("kind", TORCH)
def test_all_numbers_of_16_bits_widen_exactly(kind):
    assert same_but_for_nan(compute(f"cvt.f32.{kind} $d, $a;", EVERY, out=np.float32), by_torch(EVERY, kind))


@pytest.mark.parametrize("kind", TORCH)
def test_float32_around_all_numbers_of_16_bits_round_to_the_nearest(kind):
    """Each number, what lies halfway to the next, and the neighbours of that."""
    wide = by_torch(EVERY, kind)
    wide = wide[np.isfinite(wide)]
    above = wide.view(np.uint32) + np.uint32(1 << (15 if kind == "bf16" else 12))
    around = np.concatenate([wide.view(np.uint32), above - 1, above, above + 1]).view(np.float32)
    found = compute(f"cvt.rn.{kind}.f32 $d, $a;", around, out=np.uint16)
    expected = torch.from_numpy(around).to(TORCH[kind]).view(torch.int16).numpy().view(np.uint16)
    nan = np.isnan(around)
    assert np.array_equal(found[~nan], expected[~nan])
    pairs = compute(f"cvt.rn.{kind}x2.f32 $d, $a, $b;", around, around[::-1], out=np.uint32)
    assert np.array_equal(pairs >> 16, found) and np.array_equal(pairs & 0xFFFF, found[::-1])


@pytest.mark.parametrize("kind", TORCH)
def test_nan_has_one_pattern(kind):
    nans = np.array([0x7F800001, 0xFFC00000, 0x7FFFFFFF, 0xFF800001], np.uint32)
    assert set(compute(f"cvt.rn.{kind}.f32 $d, $a;", nans, out=np.uint16)) == {0x7FFF}


FLOATS = np.array(
    [0.0, -0.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.7, 2.7, 2**31, -(2**31), 2**32, 2**63, 2**64, -(2**63), 1e30, -1e30]
    + [127.4, 32768.5, 65535.9, -65536.5, math.inf, -math.inf],
    np.float32,
)
ROUNDING = {"rzi": math.trunc, "rni": round, "rmi": math.floor, "rpi": math.ceil}


@pytest.mark.parametrize("rounding", ROUNDING)
@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_floats_to_integers_stay_in_range(rounding, kind):
    bits = int(kind[1:])
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)

    def whole(x):
        if math.isinf(x):
            return low if x < 0 else high
        return min(max(ROUNDING[rounding](Fraction(float(x))), low), high)

    dtype = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{bits // 8}")
    found = compute(f"cvt.{rounding}.{kind}.f32 $d, $a;", FLOATS, out=dtype)
    assert found.tolist() == [whole(x) for x in FLOATS]
    of_nan = compute(f"cvt.{rounding}.{kind}.f32 $d, $a;", np.full(1, np.nan, np.float32), out=f"u{bits // 8}")
    assert of_nan[0] == (1 << 63 if bits == 64 else 0)


@pytest.mark.parametrize("rounding", ROUNDING)
@pytest.mark.parametrize("source", ["f16", "bf16"])
@pytest.mark.parametrize("kind", ["s16", "u32", "s64"])
def test_all_numbers_of_16_bits_become_integers(kind, source, rounding):
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = by_torch(bits, source)
    dtype = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}")
    found = compute(f"cvt.{rounding}.{kind}.{source} $d, $a;", bits, out=dtype)
    # as the test above has it of float32, to which these widen exactly
    wanted = compute(f"cvt.{rounding}.{kind}.f32 $d, $a;", values.astype(np.float32), out=dtype)
    assert np.array_equal(found, wanted)
    with np.errstate(invalid="ignore"):
        whole = (values == np.rint(values)) & (values >= 0) & (values < 1 << 15)
    assert np.array_equal(found[whole], values[whole].astype(dtype))


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_nan_of_64_bits_is_the_middle_of_the_range(kind):
    bits = int(kind[1:])
    assert compute(f"cvt.rzi.{kind}.f64 $d, $a;", np.full(1, np.nan), out=f"u{bits // 8}")[0] == 1 << bits - 1
    assert compute(f"cvt.rzi.{kind}.f64 $d, $a;", np.full(1, 7.9), out=f"u{bits // 8}")[0] == 7


@pytest.mark.parametrize("target", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_integers_round_once_to_floats(kind, target):
    bits = int(kind[1:])
    digits = {"f32": 24, "bf16": 8, "f16": 11}[target]
    random = np.random.default_rng(1)
    halfway = (2 * random.integers(1 << digits - 1, 1 << digits, 300, np.uint64) + 1) << np.uint64(bits - digits - 2)
    near = [halfway, halfway - np.uint64(1), halfway + np.uint64(1), np.arange(300, dtype=np.uint64)]
    values = np.concatenate([*near, *(~one for one in near)]).astype(f"u{bits // 8}")
    values = values.view(f"{'i' if kind[0] == 's' else 'u'}{bits // 8}")
    found = compute(f"cvt.rn.{target}.{kind} $d, $a;", values, out=np.float32 if target == "f32" else np.uint16)
    found = found if target == "f32" else by_torch(found, target)
    for value, result in zip(values.tolist(), found.tolist(), strict=True):
        size = abs(value)
        quantum = 1 << max(size.bit_length() - digits, 0)
        wanted = int(round(Fraction(size, quantum)) * quantum)
        wanted = math.inf if target == "f16" and wanted > 65504 else float(wanted)
        assert result == (-wanted if value < 0 else wanted), value


@pytest.mark.parametrize("source", ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("target", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_integers_are_cut_or_extended_as_the_source_says(source, target):
    width = {"8": 2}.get(source[1:], int(source[1:]) // 8)
    values = np.random.default_rng(1).integers(0, 1 << 64, 64, np.uint64).astype(f"u{width}")
    dtypes = [np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}") for kind in (source, target)]
    found = compute(f"cvt.{target}.{source} $d, $a;", values, out=dtypes[1])
    assert np.array_equal(found, values.astype(f"u{dtypes[0].itemsize}").view(dtypes[0]).astype(dtypes[1]))


def test_what_is_narrower_than_its_register_fills_it():
    values = np.arange(-128, 128).astype(np.int16).view(np.uint16)
    assert np.array_equal(compute("cvt.s8.s16 $d, $a;", values, out=np.int16), values.view(np.int16))
    assert np.array_equal(compute("cvt.u8.s16 $d, $a;", values, out=np.uint16), values & 255)


def test_float64():
    values = np.random.default_rng(1).normal(size=64)
    assert np.array_equal(compute("cvt.rn.f32.f64 $d, $a;", values, out=np.float32), values.astype(np.float32))
    narrow = values.astype(np.float32)
    assert np.array_equal(compute("cvt.f64.f32 $d, $a;", narrow, out=np.float64), narrow.astype(np.float64))
