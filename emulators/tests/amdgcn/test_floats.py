"""Floating-point instructions of the AMDGCN emulator against exact values."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hand_written.amdgcn import compute

from gpu_emulators.amdgcn import formats

COUNT = 1 << 10
EDGES = np.array(
    [0, 0x80000000, 1, 0x80000001, 0x7FFFFF, 0x800000, 0x3F800000, 0xBF800000, 0x3FFFFFFF, 0x7F7FFFFF, 0xFF7FFFFF]
    + [0x7F800000, 0xFF800000],
    np.uint32,
).view(np.float32)
INFINITY, NAN = np.float32(np.inf), np.float32(np.nan)
SIGNALLING = np.uint32(0x7FA00001).view(np.float32)


def numbers(seed: int, near: bool = False) -> np.ndarray:
    """float32 of any exponent, or of few, and edges."""
    random = np.random.default_rng(seed)
    bits = random.integers(0, 1 << 32, COUNT, dtype=np.uint64).astype(np.uint32)
    if near:
        bits = bits & np.uint32(0x83FFFFFF) | np.uint32(0x3C000000)
    drawn = bits.view(np.float32)
    edges = random.permutation(np.resize(EDGES, 4 * EDGES.size))
    return np.concatenate([edges, np.where(np.isnan(drawn), np.float32(1), drawn)])


def rounded(exact: Fraction, sign_of_zero: float) -> np.float32:
    """The nearest float32, ties to even, by integers alone."""
    if exact == 0:
        return np.copysign(np.float32(0), np.float32(sign_of_zero))
    magnitude = abs(exact)
    exponent = max(magnitude.numerator.bit_length() - magnitude.denominator.bit_length() - 25, -149)
    while exponent < 128 and round(magnitude / Fraction(2) ** exponent) >= 1 << 24:
        exponent += 1
    while exponent > -149 and round(magnitude / Fraction(2) ** exponent) < 1 << 23:
        exponent -= 1
    digits = round(magnitude / Fraction(2) ** exponent)
    value = np.float32(INFINITY) if digits * Fraction(2) ** exponent >= Fraction(2) ** 128 else None
    value = np.float32(math.ldexp(digits, exponent)) if value is None else value
    return -value if exact < 0 else value


def assert_same(found: np.ndarray, expected: list) -> None:
    expected = np.array(expected, np.float32)
    same = (found.view(np.uint32) == expected.view(np.uint32)) | np.isnan(found) & np.isnan(expected)
    assert same.all(), [(found[k], expected[k]) for k in np.flatnonzero(~same)[:3]]


ARITHMETIC = {
    "v_add_f32_e32 $d, $a, $b": lambda a, b: a + b,
    "v_sub_f32_e32 $d, $a, $b": lambda a, b: a - b,
    "v_subrev_f32_e32 $d, $a, $b": lambda a, b: b - a,
    "v_mul_f32_e32 $d, $a, $b": lambda a, b: a * b,
    "v_add_f32_e64 $d, |$a|, -$b": lambda a, b: abs(a) - b,
}


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("text", ARITHMETIC)
def test_arithmetic_rounds_once(text, near):
    a, b = numbers(1, near), numbers(2, near)
    found, exact = compute(text, a, b, out=np.float32), ARITHMETIC[text]
    # float64 holds each of these, or rounds it to what float32 rounds alike
    with np.errstate(all="ignore"):
        infinite = exact(a, b)
    expected = [
        rounded(exact(Fraction(float(x)), Fraction(float(y))), z) if np.isfinite([x, y]).all() else z
        for x, y, z in zip(a, b, infinite, strict=True)
    ]
    assert_same(found, expected)


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        "v_fma_f32 $d, $a, $b, $c",
        "v_mov_b32_e32 $d, $c\nv_fmac_f32_e32 $d, $a, $b",
        "v_pk_fma_f32 v[40:41], v[10:11], v[12:13], v[14:15] op_sel_hi:[0,0,0]",
    ],
)
def test_fma_rounds_once(text, near):
    a, b, c = numbers(3, near), numbers(4, near), numbers(5, near)
    # so that much of the sum cancels, as in a division
    with np.errstate(all="ignore"):
        c[::2] = -(a[::2] * b[::2])
        c = np.where(np.isnan(c), np.float32(1), c)
        sums = a.astype(np.float64) * b + c
    found = compute(text, a, b, c, out=np.float32)
    expected = [
        rounded(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)), s) if np.isfinite([x, y, z]).all() else s
        for x, y, z, s in zip(a, b, c, sums, strict=True)
    ]
    assert_same(found, expected)


def test_fma_of_halves_and_floats():
    """op_sel_hi says which operands are halves, op_sel which half of the register."""
    a, c = numbers(6, near=True), numbers(7, near=True)
    with np.errstate(all="ignore"):
        halves = np.stack([numbers(8, near=True), numbers(9, near=True)], 1).astype(np.float16)
    words, (low, high) = halves.view(np.uint32)[:, 0], halves.astype(np.float32).T
    for modifiers, b in ((" op_sel_hi:[0,1,0]", low), (" op_sel:[0,1,0] op_sel_hi:[0,1,0]", high)):
        found = compute(f"v_fma_mix_f32 $d, -$a, $b, $c{modifiers}", a, words, c, out=np.float32)
        assert_same(found, compute("v_fma_f32 $d, -$a, $b, $c", a, b, c, out=np.float32))
    for modifiers, b in ((" op_sel_hi:[0,1,1]", low), (" op_sel:[0,0,1] op_sel_hi:[0,1,1]", high)):
        found = compute(f"v_fma_mix_f32 $d, -$a, 1.0, -|$b|{modifiers}", a, words, out=np.float32)
        with np.errstate(all="ignore"):
            assert_same(found, -abs(b) - a)
    floats = compute("v_fma_mix_f32 $d, $a, $b, $c", a, low, c, out=np.float32)
    assert_same(floats, compute("v_fma_f32 $d, $a, $b, $c", a, low, c, out=np.float32))


def test_a_constant_within_fma():
    a, b = numbers(6, near=True), numbers(7, near=True)
    by_literal = compute("v_fmamk_f32 $d, $a, 0x3dcccccd, $b", a, b, out=np.float32)
    tenth = np.uint32(0x3DCCCCCD).view(np.float32)
    assert_same(by_literal, compute("v_fma_f32 $d, $a, $c, $b", a, b, np.full_like(a, tenth), out=np.float32))
    assert_same(
        compute("v_fmaak_f32 $d, $a, $b, 0x3dcccccd", a, b, out=np.float32),
        compute("v_fma_f32 $d, $a, $b, $c", a, b, np.full_like(a, tenth), out=np.float32),
    )


def test_constants_are_floats_or_bits():
    zero = np.zeros(64, np.float32)
    assert compute("v_add_f32_e32 $d, 0.5, $a", zero, out=np.float32)[0] == 0.5
    assert compute("v_add_f32_e32 $d, 1, $a", zero, out=np.uint32)[0] == 1
    assert compute("v_mov_b32_e32 $d, -4.0", zero, out=np.float32)[0] == -4
    assert compute("v_add_u32_e32 $d, 1.0, $a", zero, out=np.uint32)[0] == 0x3F800000


# LLVM's division of float32, AMDGPUTargetLowering and SITargetLowering::LowerFDIV32
DIVISION = """v_div_scale_f32 v30, s[50:51], $b, $b, $a
    v_rcp_f32_e32 v31, v30
    v_fma_f32 v32, -v30, v31, 1.0
    v_fmac_f32_e32 v31, v32, v31
    v_div_scale_f32 v33, vcc, $a, $b, $a
    v_mul_f32_e32 v34, v33, v31
    v_fma_f32 v35, -v30, v34, v33
    v_fmac_f32_e32 v34, v35, v31
    v_fma_f32 v35, -v30, v34, v33
    v_div_fmas_f32 v36, v35, v31, v34
    v_div_fixup_f32 $d, v36, $b, $a"""


@pytest.mark.parametrize("near", [False, True])
def test_a_division_is_correctly_rounded(near):
    """With a reciprocal that is one of the two neighbours of the exact one, as a card may give it."""
    a = np.concatenate([numbers(seed, near) for seed in range(8, 16)])
    b = np.concatenate([numbers(seed, near) for seed in range(16, 24)])
    # significands of ones, and of a one alone
    b[::7] = (b[::7].view(np.uint32) | np.uint32(0x7FFFFF)).view(np.float32)
    a[::14] = (a[::14].view(np.uint32) & np.uint32(0xFF800000)).view(np.float32)
    b[np.isnan(b)] = 3
    with np.errstate(all="ignore"):
        expected = a / b
    assert_same(compute(DIVISION, a, b, out=np.float32), expected)


@pytest.mark.parametrize("name", ["reciprocal", "root", "reciprocal_root"])
def test_approximations_are_next_to_the_exact_value(name):
    a = np.abs(numbers(24))
    a = a[(a > 2.0**-126) & (a < 2.0**126)]
    wide = a.astype(np.float64)
    exact = {"reciprocal": 1 / wide, "root": np.sqrt(wide), "reciprocal_root": 1 / np.sqrt(wide)}[name]
    found = getattr(formats, name)(a)
    below, above = np.nextafter(found, np.float32(0)), np.nextafter(found, INFINITY)
    assert ((below < exact) & (exact < above)).all()
    nearest = exact.astype(np.float32)
    assert 0.2 < (found != nearest).mean() < 0.8


def test_extrema_by_the_rules_of_ieee():
    zero, nan, one = np.float32(0), NAN, np.float32(1)
    a = np.array([zero, -zero, nan, one, nan, SIGNALLING, one, -INFINITY], np.float32)
    b = np.array([-zero, zero, one, nan, nan, one, SIGNALLING, one], np.float32)
    smallest = compute("v_min_f32_e32 $d, $a, $b", a, b, out=np.uint32)
    largest = compute("v_max_f32_e32 $d, $a, $b", a, b, out=np.uint32)
    one, quiet = 0x3F800000, 0x7FE00001
    assert smallest.tolist() == [1 << 31, 1 << 31, one, one, 0x7FC00000, quiet, quiet, 0xFF800000]
    assert largest.tolist() == [0, 0, one, one, 0x7FC00000, quiet, quiet, one]


def test_three_operands():
    a, b, c = numbers(25), numbers(26), numbers(27)
    rows = np.stack([a, b, c])
    for name, choose in {"min3": np.min, "max3": np.max, "med3": np.median}.items():
        found = compute(f"v_{name}_f32 $d, $a, $b, $c", a, b, c, out=np.float32)
        # zeros of either sign are told apart above
        assert (found == choose(rows, axis=0)).all()
    middle = compute("v_med3_f32 $d, $a, $b, $c", np.float32([NAN, 3]), np.float32([2, NAN]), np.float32([1, 2]))
    assert middle.view(np.float32).tolist() == [1, 2]


def test_results_that_are_no_number():
    a = np.array([INFINITY, SIGNALLING, 1, NAN], np.float32)
    b = np.array([-INFINITY, 1, SIGNALLING, SIGNALLING], np.float32)
    found = compute("v_add_f32_e32 $d, $a, $b", a, b)
    assert found.tolist() == [0x7FC00000, 0x7FE00001, 0x7FE00001, 0x7FC00000]


@pytest.mark.parametrize("name", ["eq", "lg", "lt", "le", "gt", "ge", "o", "u"])
def test_comparisons(name):
    a, b = numbers(28), numbers(29)
    a[::3], a[::5], b[::7] = b[::3], NAN, NAN
    unordered = np.isnan(a) | np.isnan(b)
    expected = {
        "eq": a == b,
        "lg": (a != b) & ~unordered,
        "lt": a < b,
        "le": a <= b,
        "gt": a > b,
        "ge": a >= b,
        "o": ~unordered,
        "u": unordered,
    }[name]
    assert (compute(f"v_cmp_{name}_f32_e64 $d, $a, $b", a, b, out=bool) == expected).all()
    if name not in "ou":
        assert (compute(f"v_cmp_n{name}_f32_e64 $d, $a, $b", a, b, out=bool) == ~expected).all()


def test_classes():
    """By bits, from 0 on: the CDNA3 ISA's table of V_CMP_CLASS_F32."""
    of_class = [0x7FA00000, 0x7FC00000, 0xFF800000, 0xBF800000, 0x80000001, 0x80000000, 0, 1, 0x3F800000, 0x7F800000]
    values = np.repeat(np.array(of_class, np.uint32), 10)
    bits = np.tile(np.uint32(1) << np.arange(10, dtype=np.uint32), 10)
    found = compute("v_cmp_class_f32_e64 $d, $a, $b", values, bits, out=bool)
    assert (found.reshape(10, 10) == np.eye(10, dtype=bool)).all()


@pytest.mark.parametrize(
    ("modifiers", "sums"),
    [
        ("", lambda ax, ay, bx, by: (ax + bx, ay + by)),
        (" op_sel_hi:[1,0]", lambda ax, ay, bx, by: (ax + bx, ay + bx)),
        (" op_sel:[1,0]", lambda ax, ay, bx, by: (ay + bx, ay + by)),
        (" op_sel:[1,0] op_sel_hi:[0,1]", lambda ax, ay, bx, by: (ay + bx, ax + by)),
        (" neg_lo:[0,1] neg_hi:[1,0]", lambda ax, ay, bx, by: (ax - bx, by - ay)),
    ],
    ids=lambda value: value.strip() if isinstance(value, str) else "",
)
def test_two_floats_at_once(modifiers, sums):
    words = [numbers(30 + k, near=True) for k in range(4)]
    pairs = [np.stack(words[k : k + 2], 1).reshape(-1).view(np.uint64) for k in (0, 2)]
    found = compute(f"v_pk_add_f32 $d, $a, $b{modifiers}", *pairs, out=np.uint64).view(np.float32).reshape(-1, 2)
    with np.errstate(all="ignore"):
        expected = sums(*words)
    for side in (0, 1):
        assert_same(found[:, side].copy(), expected[side])


def test_a_pair_of_words():
    pair = np.array([0x1111111122222222, 0x3333333344444444], np.uint64)
    other = np.array([0x5555555566666666, 0x7777777788888888], np.uint64)
    found = compute("v_pk_mov_b32 $d, $a, $b op_sel:[1,0]", pair, other, out=np.uint64)
    assert found.tolist() == [0x6666666611111111, 0x8888888833333333]


def test_rounding_to_integers():
    a = np.random.default_rng(35).uniform(-8, 8, COUNT).astype(np.float32)
    a = np.concatenate([a, np.arange(-8, 8, dtype=np.float32) / 2, EDGES])
    for name, whole in {"trunc": np.trunc, "floor": np.floor, "ceil": np.ceil, "rndne": np.rint}.items():
        assert_same(compute(f"v_{name}_f32_e32 $d, $a", a, out=np.float32), whole(a))
