"""Integer, bit and comparison instructions of the PTX emulator against Python's integers."""

from __future__ import annotations

import operator

import numpy as np
import pytest
from hand_written.ptx import compute, kinds

BITS = (16, 32, 64)
TYPES = [f"{letter}{bits}" for bits in BITS for letter in "us"]


def dtype_of(kind):
    return np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}")


def values(kind, seed, count=96):
    """Random ones of all sizes, and the ends of the range."""
    dtype = dtype_of(kind)
    random = np.random.default_rng(seed)
    bits = dtype.itemsize * 8
    found = random.integers(0, 1 << 64, count, np.uint64) >> random.integers(64 - bits, 64, count, np.uint64)
    ends = np.array([0, 1, (1 << bits) - 1, 1 << bits - 1, (1 << bits - 1) - 1], np.uint64)
    return np.concatenate([found, ends, random.permutation(ends)]).astype(f"u{dtype.itemsize}").view(dtype)


def wrapped(numbers, kind):
    bits = int(kind[1:])
    return np.array([number & (1 << bits) - 1 for number in numbers], f"u{bits // 8}").view(dtype_of(kind))


def expected(function, kind, *operands, out=None):
    return wrapped([function(*map(int, each)) for each in zip(*operands, strict=True)], out or kind)


def truncated(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("add", operator.add),
        ("sub", operator.sub),
        ("mul.lo", operator.mul),
        ("min", min),
        ("max", max),
        ("div", truncated),
        ("rem", lambda a, b: a - truncated(a, b) * b),
    ],
)
def test_of_two(name, function, kind):
    a, b = values(kind, 1), values(kind, 2)
    if name in ("div", "rem"):
        b = np.where(b == 0, dtype_of(kind).type(3), b)
    assert np.array_equal(compute(f"{name}.{kind} $d, $a, $b;", a, b, out=a.dtype), expected(function, kind, a, b))


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind[1:] != "64"])
def test_products_that_are_wide(kind):
    a, b, bits = values(kind, 1), values(kind, 2), int(kind[1:])
    wide = f"{kind[0]}{2 * bits}"
    c, narrow = values(wide, 3), values(kind, 4)
    for text, operands, out, function in (
        ("mul.hi", (a, b), kind, lambda a, b: a * b >> bits),
        ("mul.wide", (a, b), wide, operator.mul),
        ("mad.wide", (a, b, c), wide, lambda a, b, c: a * b + c),
        ("mad.hi", (a, b, narrow), kind, lambda a, b, c: (a * b >> bits) + c),
        ("mad.lo", (a, b, narrow), kind, lambda a, b, c: a * b + c),
    ):
        names = ", ".join("$a $b $c".split()[: len(operands)])
        found = compute(f"{text}.{kind} $d, {names};", *operands, out=dtype_of(out))
        assert np.array_equal(found, expected(function, kind, *operands, out=out)), text


@pytest.mark.parametrize("bits", BITS)
def test_signs(bits):
    a = values(f"s{bits}", 1)
    assert np.array_equal(compute(f"neg.s{bits} $d, $a;", a, out=a.dtype), expected(operator.neg, f"s{bits}", a))
    assert np.array_equal(compute(f"abs.s{bits} $d, $a;", a, out=a.dtype), expected(abs, f"s{bits}", a))


def test_two_of_16_bits_in_a_register():
    a, b = values("u32", 1), values("u32", 2)
    found = compute("add.s16x2 $d, $a, $b;", a, b, out=np.uint32)
    assert np.array_equal(found.view(np.uint16), a.view(np.uint16) + b.view(np.uint16))


@pytest.mark.parametrize("bits", BITS)
def test_logic(bits):
    a, b = values(f"u{bits}", 1), values(f"u{bits}", 2)
    for name, function in (("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)):
        found = compute(f"{name}.b{bits} $d, $a, $b;", a, b, out=a.dtype)
        assert np.array_equal(found, expected(function, f"u{bits}", a, b))
    assert np.array_equal(compute(f"not.b{bits} $d, $a;", a, out=a.dtype), ~a)


@pytest.mark.parametrize("table", [0x00, 0x80, 0x96, 0xE8, 0xCA, 0xF8, 0xFF])
def test_logic_of_three(table):
    a, b, c = (values("u32", seed) for seed in (1, 2, 3))

    def looked_up(a, b, c):
        rows = [(a >> k & 1) << 2 | (b >> k & 1) << 1 | c >> k & 1 for k in range(32)]
        return sum((table >> row & 1) << k for k, row in enumerate(rows))

    found = compute(f"lop3.b32 $d, $a, $b, $c, {table:#x};", a, b, c, out=np.uint32)
    assert np.array_equal(found, expected(looked_up, "u32", a, b, c))


@pytest.mark.parametrize("kind", [*(f"b{bits}" for bits in BITS), *TYPES])
def test_shifts(kind):
    bits, plain = int(kind[1:]), kind.replace("b", "u")
    a = values(plain, 1)
    by = np.resize(np.array([0, 1, bits - 1, bits, bits + 1, 200, 2**32 - 1, 7], np.uint32), a.shape)
    if kind[0] == "b":
        found = compute(f"shl.{kind} $d, $a, $b;", a, by, out=a.dtype)
        assert np.array_equal(found, expected(lambda a, n: a << min(n, 64), plain, a, by))
        assert np.array_equal(compute(f"shl.{kind} $d, $a, 5;", a, out=a.dtype), a << a.dtype.type(5))
    found = compute(f"shr.{kind} $d, $a, $b;", a, by, out=a.dtype)
    assert np.array_equal(found, expected(lambda a, n: a >> min(n, 64), plain, a, by))


@pytest.mark.parametrize("way", ["l", "r"])
@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shifts(way, mode):
    low, high = values("u32", 1), values("u32", 2)
    by = np.resize(np.array([0, 1, 31, 32, 33, 64, 2**32 - 1], np.uint32), low.shape)

    def shifted(low, high, n):
        n = n & 31 if mode == "wrap" else min(n, 32)
        both = high << 32 | low
        return (both << n) >> 32 if way == "l" else both >> n

    found = compute(f"shf.{way}.{mode}.b32 $d, $a, $b, $c;", low, high, by, out=np.uint32)
    assert np.array_equal(found, expected(shifted, "u32", low, high, by))


def test_bytes_are_permuted():
    a, b = values("u32", 1), values("u32", 2)
    selectors = np.random.default_rng(3).integers(0, 1 << 16, a.size).astype(np.uint32)

    def permuted(a, b, selector):
        result = 0
        for k in range(4):
            nibble = selector >> 4 * k & 15
            byte = (b << 32 | a) >> 8 * (nibble & 7) & 255
            byte = (255 if byte >> 7 else 0) if nibble & 8 else byte
            result |= byte << 8 * k
        return result

    found = compute("prmt.b32 $d, $a, $b, $c;", a, b, selectors, out=np.uint32)
    assert np.array_equal(found, expected(permuted, "u32", a, b, selectors))


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_fields_are_extracted(kind):
    bits = int(kind[1:])
    a = values(kind, 1, 600)
    random = np.random.default_rng(2)
    start, length = (random.integers(0, high, a.size).astype(np.uint32) for high in (bits + 20, bits + 20))

    def extracted(a, start, length):
        # PTX ISA, bfe: bits beyond the top are the sign's bit, which for what is unsigned is zero
        pattern, top = a & (1 << bits) - 1, bits - 1
        if kind[0] == "u" or length == 0:
            sign = 0
        else:
            sign = pattern >> min(start + length - 1, top) & 1
        result = 0
        for k in range(bits):
            inside = k < length and start + k <= top
            result |= (pattern >> (start + k) & 1 if inside else sign) << k
        return result

    found = compute(f"bfe.{kind} $d, $a, $b, $c;", a, start, length, out=a.dtype)
    assert np.array_equal(found, expected(extracted, kind, a, start, length))


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize(("start", "length"), [(0, 0), (0, 8), (5, 9), (30, 20), (31, 1), (40, 8), (0, 64), (200, 3)])
def test_fields_are_inserted(bits, start, length):
    a, b = values(f"u{bits}", 1), values(f"u{bits}", 2)
    held = (1 << length) - 1 << start & (1 << bits) - 1
    found = compute(f"bfi.b{bits} $d, $a, $b, {start}, {length};", a, b, out=a.dtype)
    assert np.array_equal(found, expected(lambda a, b: b & ~held | a << start & held, f"u{bits}", a, b))


@pytest.mark.parametrize("bits", [32, 64])
def test_bits_are_counted_and_reversed(bits):
    a = values(f"u{bits}", 1)
    for name, function in (("popc", lambda a: a.bit_count()), ("clz", lambda a: bits - a.bit_length())):
        found = compute(f"{name}.b{bits} $d, $a;", a, out=np.uint32)
        assert np.array_equal(found, expected(function, "u32", a))
    found = compute(f"brev.b{bits} $d, $a;", a, out=a.dtype)
    assert np.array_equal(found, expected(lambda a: int(f"{a:0{bits}b}"[::-1], 2), f"u{bits}", a))


COMPARISONS = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "lo": operator.lt,
    "ls": operator.le,
    "hi": operator.gt,
    "hs": operator.ge,
}


@pytest.mark.parametrize("kind", TYPES)
def test_comparisons(kind):
    a, b = values(kind, 1), values(kind, 2)
    b[::3] = a[::3]
    for name, function in COMPARISONS.items():
        if name in ("lo", "ls", "hi", "hs") and kind[0] == "s":
            continue
        assert np.array_equal(compute(f"setp.{name}.{kind} $d, $a, $b;", a, b, out=bool), function(a, b)), name


def test_comparisons_are_combined_with_a_predicate():
    a, b = values("s32", 1), values("s32", 2)
    c = np.arange(a.size) % 2 == 0
    for name, function in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        assert np.array_equal(compute(f"setp.lt.{name}.s32 $d, $a, $b, $c;", a, b, c, out=bool), function(a < b, c))
        assert np.array_equal(compute(f"setp.lt.{name}.s32 $d, $a, $b, !$c;", a, b, c, out=bool), function(a < b, ~c))
        # the second predicate has the comparison inverted
        second = compute(f"setp.lt.{name}.s32 _|$d, $a, $b, $c;", a, b, c, out=bool)
        assert np.array_equal(second, function(a >= b, c))


@pytest.mark.parametrize("kind", ["b16", "b32", "b64", "f32"])
def test_one_of_two_is_selected(kind):
    a, b = (values(f"u{kind[1:]}", seed) for seed in (1, 2))
    c = np.arange(a.size) % 3 == 0
    assert np.array_equal(compute(f"selp.{kind} $d, $a, $b, $c;", a, b, c, out=a.dtype), np.where(c, a, b))


def test_division_by_zero_is_found_where_a_thread_does_it():
    a = np.zeros(32, np.int32)
    body = "div.s32 %r1, %r70, %r70;\n ret;"
    assert kinds(body, a) == {"division by zero"}
    guarded = "setp.ne.s32 %p1, %r70, 0;\n @%p1 div.s32 %r1, %r70, %r70;\n ret;"
    assert kinds(guarded, a) == set()
