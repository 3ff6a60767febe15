"""Floating-point instructions of the PTX emulator against exact rationals."""

from __future__ import annotations

import math
import operator
from fractions import Fraction

import numpy as np
import pytest
from hand_written.ptx import compute

from gpu_emulators.ptx.formats import decode, encode

# bits of the significand, the exponents of the smallest normal and of the largest number
FORMATS = {"f32": (24, -126, 127), "bf16": (8, -126, 127), "f16": (11, -14, 15)}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
NANS = {"f32": 0x7FFFFFFF, "bf16": 0x7FFF, "f16": 0x7FFF}


def nearest(value: Fraction, kind: str) -> float:
    """Rounded to the nearest number of a format, ties to even; infinite beyond its range."""
    digits, smallest, largest = FORMATS[kind]
    if not value:
        return 0.0
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    quantum = Fraction(2) ** (max(exponent, smallest) - digits + 1)
    rounded = round(value / quantum) * quantum
    return math.copysign(math.inf, value) if abs(rounded) >= Fraction(2) ** (largest + 1) else float(rounded)


def to_float(bits, kind):
    return bits.view(np.float32) if kind == "f32" else decode(bits, kind)


def operands(kind: str, seed: int, count: int = 400) -> np.ndarray:
    """Bits: of numbers of all sizes, of such that are near each other, and special ones."""
    dtype = np.uint32 if kind == "f32" else np.uint16
    random = np.random.default_rng(seed)
    any_bits = random.integers(0, 1 << np.dtype(dtype).itemsize * 8, count, np.uint64).astype(dtype)
    near = random.normal(size=count).astype(np.float32)
    special = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 2.0**-126, 2.0**-14, 3.4e38, 6e4, -(2.0**-133)]
    special = np.array(special * 12, np.float32)
    narrow = [array.view(np.uint32) if kind == "f32" else encode(array, kind) for array in (near, special)]
    return np.concatenate([any_bits, narrow[0], random.permutation(narrow[1])])


def check(found: np.ndarray, exact, kind: str, *given: np.ndarray) -> None:
    """``exact`` gives the result of finite operands as a Fraction; others are as IEEE 754 says, in float64."""
    floats = [to_float(bits, kind).astype(np.float64) for bits in given]
    results = to_float(found, kind).astype(np.float64)
    with np.errstate(all="ignore"):
        special = exact(*floats)
    for each, result, otherwise, bits in zip(zip(*floats, strict=True), results, special, found, strict=True):
        if all(map(math.isfinite, each)):
            wanted = nearest(exact(*map(Fraction, each)), kind)
        else:
            wanted = otherwise
        if math.isnan(wanted):
            assert bits == NANS[kind], (each, hex(bits))
        else:
            assert result == wanted, (each, result, wanted)
            if wanted == 0 and exact(*map(Fraction, each)) == 0:
                assert math.copysign(1, result) == math.copysign(1, otherwise), each


def dtype_of(kind):
    return np.uint32 if kind == "f32" else np.uint16


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("name", "exact"), [("add", operator.add), ("sub", operator.sub), ("mul", operator.mul)])
def test_of_two(name, exact, kind):
    a, b = operands(kind, 1), operands(kind, 2)
    check(compute(f"{name}.rn.{kind} $d, $a, $b;", a, b, out=dtype_of(kind)), exact, kind, a, b)


def test_without_a_rounding_it_is_to_the_nearest():
    a, b = operands("f32", 1), operands("f32", 2)
    found, rounded = (compute(f"{name}.f32 $d, $a, $b;", a, b, out=np.uint32) for name in ("add", "add.rn"))
    assert np.array_equal(found, rounded)


def halfway(count: int):
    """a * b halfway between two float32, and what decides it far below."""
    random = np.random.default_rng(5)
    a = (1 + random.integers(1, 1 << 11, count) * 2.0**-11 + 2.0**-12).astype(np.float32)
    b = np.full(count, 1 + 2.0**-12, np.float32)
    tiny = (random.choice([-1, 1], count) * 2.0 ** random.integers(-140, -30, count)).astype(np.float32)
    scale = (2.0 ** random.integers(-140, 120, count)).astype(np.float64)
    return [array.astype(np.float32).view(np.uint32) for array in (a, b * scale, tiny * scale)]


@pytest.mark.parametrize("kind", FORMATS)
def test_fma_rounds_once(kind):
    a, b, c = (operands(kind, seed) for seed in (1, 2, 3))
    if kind == "f32":
        # products that nearly cancel, and those that rounding twice gets wrong
        product = -(a.view(np.float32) * b.view(np.float32))
        parts = [(a, b, c), (a, b, product.view(np.uint32)), halfway(300)]
        a, b, c = (np.concatenate(part) for part in zip(*parts, strict=True))
    check(
        compute(f"fma.rn.{kind} $d, $a, $b, $c;", a, b, c, out=dtype_of(kind)), lambda a, b, c: a * b + c, kind, a, b, c
    )


def test_fma_rounds_up():
    a, b, c = (operands("f32", seed).view(np.float32) for seed in (1, 2, 3))
    # sums that are exact, and such that lie barely above or below one of float32
    parts = [(a, b, c), (a, b, -(a * b)), [one.view(np.float32) for one in halfway(300)]]
    a, b, c = (np.concatenate(part) for part in zip(*parts, strict=True))
    found = compute("fma.rp.f32 $d, $a, $b, $c;", a, b, c, out=np.float32)
    seen = set()
    for *each, result in zip(a, b, c, found, strict=True):
        if not all(map(math.isfinite, each)):
            continue
        x, y, z = (Fraction(float(one)) for one in each)
        below = np.nextafter(result, np.float32(-np.inf))
        # the smallest number that is not below; beyond the largest ones as IEEE 754 says
        assert result == math.inf or Fraction(float(result)) >= x * y + z, each
        assert below == -math.inf or Fraction(float(below)) < x * y + z, each
        seen.add(result == nearest(x * y + z, "f32"))
    assert seen == {True, False}


def test_two_float32_in_a_register():
    for name, letters in (("add", "ab"), ("sub", "ab"), ("mul", "ab"), ("fma", "abc")):
        given = [operands("f32", seed) for seed in range(len(letters))]
        names = ", ".join(f"${letter}" for letter in letters)
        found = compute(f"{name}.rn.f32x2 $d, {names};", *(one.view(np.uint64) for one in given), out=np.uint64)
        assert np.array_equal(found.view(np.uint32), compute(f"{name}.rn.f32 $d, {names};", *given, out=np.uint32))


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_two_of_16_bits_in_a_register(kind):
    for name, letters in (("add", "ab"), ("mul", "ab"), ("fma", "abc")):
        given = [operands(kind, seed) for seed in range(len(letters))]
        names = ", ".join(f"${letter}" for letter in letters)
        found = compute(f"{name}.rn.{kind}x2 $d, {names};", *(one.view(np.uint32) for one in given), out=np.uint32)
        assert np.array_equal(found.view(np.uint16), compute(f"{name}.rn.{kind} $d, {names};", *given, out=np.uint16))


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_operands_of_16_bits_convert_in_mixed_precision(kind):
    a, b, c = operands(kind, 1), operands(kind, 2), np.resize(operands("f32", 3), operands(kind, 1).size)
    wide, other = (to_float(one, kind).view(np.uint32) for one in (a, b))
    for name in ("add", "sub"):
        found = compute(f"{name}.rn.f32.{kind} $d, $a, $b;", a, c, out=np.uint32)
        assert np.array_equal(found, compute(f"{name}.rn.f32 $d, $a, $b;", wide, c, out=np.uint32))
    found = compute(f"fma.rn.f32.{kind} $d, $a, $b, $c;", a, b, c, out=np.uint32)
    assert np.array_equal(found, compute("fma.rn.f32 $d, $a, $b, $c;", wide, other, c, out=np.uint32))


def test_quotients():
    a, b = operands("f32", 1), operands("f32", 2)
    finite = np.isfinite(b.view(np.float32)) & (b.view(np.float32) != 0)
    check(compute("div.rn.f32 $d, $a, $b;", a, b, out=np.uint32)[finite], operator.truediv, "f32", a[finite], b[finite])
    special = np.array([0, 1, -1, 0, math.inf, 1, -1], np.float32), np.array([0, 0, 0, 1, math.inf, math.inf, -0.0])
    found = compute("div.rn.f32 $d, $a, $b;", special[0], special[1].astype(np.float32), out=np.float32)
    assert np.array_equal(found, [math.nan, math.inf, -math.inf, 0, math.nan, 0, math.inf], equal_nan=True)


def test_approximate_reciprocals_lie_beside_the_exact_ones_on_either_side():
    a = operands("f32", 1)
    values = a.view(np.float32)
    values = values[np.isfinite(values) & (abs(values) >= 2.0**-126) & (abs(values) <= 2.0**126)]
    found = compute("rcp.approx.ftz.f32 $d, $a;", values, out=np.float32)
    off = [Fraction(float(each)) - 1 / Fraction(float(value)) for each, value in zip(found, values, strict=True)]
    assert all(abs(by) < Fraction(float(np.spacing(abs(each)))) for by, each in zip(off, found, strict=True))
    assert sum(by > 0 for by in off) > len(off) // 4 and sum(by < 0 for by in off) > len(off) // 4


def test_approximate_reciprocals_of_what_has_none():
    special = np.array([0, -0.0, math.inf, -math.inf, math.nan, 2.0**-127, -(2.0**-149), 2.0**127], np.float32)
    found = compute("rcp.approx.ftz.f32 $d, $a;", special, out=np.float32)
    assert np.array_equal(found, [math.inf, -math.inf, 0, 0, math.nan, math.inf, -math.inf, 0], equal_nan=True)
    assert np.signbit(found[3]) and not np.signbit(found[2])


@pytest.mark.parametrize(
    ("name", "exact"), [("ex2", np.exp2), ("lg2", np.log2), ("sqrt", np.sqrt), ("rsqrt", lambda a: 1 / np.sqrt(a))]
)
@pytest.mark.parametrize("flush", ["", ".ftz"])
def test_approximations_lie_beside_the_exact_values(name, exact, flush):
    a = np.concatenate([operands("f32", 1).view(np.float32), np.linspace(-20, 20, 999, dtype=np.float32)])
    found = compute(f"{name}.approx{flush}.f32 $d, $a;", a, out=np.float32)
    with np.errstate(all="ignore"):
        flushed = np.where(np.abs(a) < 2.0**-126, np.copysign(np.float32(0), a), a) if flush else a
        expected = exact(flushed.astype(np.float64))
        nearest = expected.astype(np.float32)
        # in units of the last place
        off = np.abs(found.astype(np.float64) - expected) / np.spacing(np.abs(nearest))
    ordinary = np.isfinite(nearest) & (np.abs(nearest) >= 2.0**-126)
    assert ordinary.sum() > 500 and (off[ordinary] < 1).all() and (off[ordinary] > 0.5).any()
    assert np.array_equal(found[~np.isfinite(nearest)], nearest[~np.isfinite(nearest)], equal_nan=True)


def test_full_range_quotients_lie_beside_the_exact_ones():
    a, b = (operands("f32", seed).view(np.float32) for seed in (1, 2))
    found = compute("div.full.f32 $d, $a, $b;", a, b, out=np.float32)
    with np.errstate(all="ignore"):
        exact = a.astype(np.float64) / b.astype(np.float64)
        nearest = exact.astype(np.float32)
        off = np.abs(found.astype(np.float64) - exact) / np.spacing(np.abs(nearest))
    ordinary = np.isfinite(nearest) & (np.abs(nearest) >= 2.0**-126)
    assert ordinary.sum() > 500 and (off[ordinary] < 1).all() and (off[ordinary] > 0.5).any()


def test_square_roots():
    a = operands("f32", 1)
    found = compute("sqrt.rn.f32 $d, $a;", a, out=np.float32)
    for x, root in zip(a.view(np.float32), found, strict=True):
        if not x >= 0 or x == 0 or math.isinf(x):
            assert (math.isnan(root) and (x < 0 or math.isnan(x))) or root == x
            continue
        # x lies between the squares of the numbers halfway to the neighbours
        below, above = (np.nextafter(root, np.float32(end)) for end in (0, math.inf))
        half = Fraction(1, 2)
        assert (half * (Fraction(float(below)) + Fraction(float(root)))) ** 2 <= Fraction(float(x))
        assert (half * (Fraction(float(above)) + Fraction(float(root)))) ** 2 >= Fraction(float(x))


EXTREMES = [-math.inf, -1.0, -(2.0**-140), -0.0, 0.0, 2.0**-140, 1.0, math.inf, math.nan]


@pytest.mark.parametrize("nan", ["", ".NaN"])
@pytest.mark.parametrize("name", ["min", "max"])
def test_extremes(name, nan):
    """Of numbers the order above, -0 below 0; NaN loses, and with .NaN it wins."""
    pairs = [(i, j) for i in range(9) for j in range(9)]
    a, b = (np.array([EXTREMES[pair[k]] for pair in pairs], np.float32) for k in (0, 1))
    choose = min if name == "min" else max
    chosen = [
        8 if 8 in pair and (nan or pair == (8, 8)) else choose(pair if 8 not in pair else {*pair} - {8})
        for pair in pairs
    ]
    wanted = np.array([EXTREMES[k] for k in chosen], np.float32).view(np.uint32)
    wanted = np.where(np.array(chosen) == 8, np.uint32(NANS["f32"]), wanted)
    assert np.array_equal(compute(f"{name}{nan}.f32 $d, $a, $b;", a, b, out=np.uint32), wanted)
    thrice = compute(f"{name}{nan}.f32 $d, $a, $b, $a;", a, b, out=np.uint32)
    assert np.array_equal(thrice, wanted)


def test_signs():
    a = operands("f32", 1)
    assert np.array_equal(compute("neg.f32 $d, $a;", a, out=np.uint32), a ^ np.uint32(1 << 31))
    assert np.array_equal(compute("abs.f32 $d, $a;", a, out=np.uint32), a & np.uint32((1 << 31) - 1))


ORDERED = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


@pytest.mark.parametrize("kind", FORMATS)
def test_comparisons(kind):
    """With NaN those by the plain names are false, those that end in u true."""
    pairs = [(x, y) for x in EXTREMES for y in EXTREMES]
    a, b = (np.array([pair[k] for pair in pairs], np.float32) for k in (0, 1))
    narrow = [one.view(np.uint32) if kind == "f32" else encode(one, kind) for one in (a, b)]
    a, b = (to_float(one, kind) for one in narrow)
    nan = np.isnan(a) | np.isnan(b)
    for name, function in ORDERED.items():
        found = compute(f"setp.{name}.{kind} $d, $a, $b;", *narrow, out=bool)
        assert np.array_equal(found, function(a, b) & ~nan), name
        found = compute(f"setp.{name}u.{kind} $d, $a, $b;", *narrow, out=bool)
        assert np.array_equal(found, function(a, b) | nan), name
    assert np.array_equal(compute(f"setp.num.{kind} $d, $a, $b;", *narrow, out=bool), ~nan)
    assert np.array_equal(compute(f"setp.nan.{kind} $d, $a, $b;", *narrow, out=bool), nan)
