"""Fragments, sparse metadata and layouts in shared memory against the tables of the PTX ISA, a thread at a time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hand_written.matrix_layouts import TCGEN05_SWIZZLES, WGMMA_SWIZZLES, canonical, encoded, swizzled

from gpu_emulators.ptx.matrix import descriptors, fragments, sparsity

WARPS = 3
LANES = range(32)


def random_bits(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 1 << 16, shape, dtype=np.uint16)


def packed(low, high):
    return np.uint32(low) | np.uint32(high) << np.uint32(16)


def by_table(matrix, count, place):
    """Registers uint32 [count][T], where ``place(lane, i)`` is (row, column) of element i of a thread."""
    registers = np.zeros((count, WARPS * 32), np.uint32)
    for warp, lane, k in itertools.product(range(WARPS), LANES, range(count)):
        low, high = (matrix[warp][place(lane, i)] for i in (2 * k, 2 * k + 1))
        registers[k, 32 * warp + lane] = packed(low, high)
    return registers


def place_of_a(lane, i):
    """Matrix fragments for mma.m16n8k16: a0 to a7."""
    row = lane >> 2 if i < 2 or 4 <= i < 6 else (lane >> 2) + 8
    column = lane % 4 * 2 + (i & 1) + (8 if i >= 4 else 0)
    return row, column


def place_of_b(lane, i):
    """Matrix fragments for mma.m16n8k16, b0 to b3, and for sparse mma.m16n8k32, b0 to b7."""
    return lane % 4 * 2 + (i & 1) + i // 2 * 8, lane >> 2


def place_of_d(lane, i):
    """Register fragment D of wgmma.mma_async.m64nNk16; with four elements that of mma.m16n8k16."""
    return (lane >> 2) + (8 if i % 4 >= 2 else 0), i // 4 * 8 + lane % 4 * 2 + (i & 1)


def test_tf32():
    """Matrix fragments for mma.m16n8k8, .tf32: a0 to a3, b0 and b1."""
    a, b = (np.random.default_rng(seed).integers(0, 1 << 32, shape, dtype=np.uint32)
            for seed, shape in enumerate([(WARPS, 16, 8), (WARPS, 8, 8)]))  # fmt: skip
    of_a, of_b = np.zeros((4, WARPS * 32), np.uint32), np.zeros((2, WARPS * 32), np.uint32)
    for warp, lane in itertools.product(range(WARPS), LANES):
        for i in range(4):
            of_a[i, 32 * warp + lane] = a[warp, lane // 4 + (8 if i in (1, 3) else 0), lane % 4 + (4 if i >= 2 else 0)]
        for i in range(2):
            of_b[i, 32 * warp + lane] = b[warp, lane % 4 + (4 if i == 1 else 0), lane // 4]
    assert (fragments.a_matrix(of_a, np.uint32) == a).all()
    assert (fragments.b_matrix(of_b, np.uint32) == b).all()
    assert (np.stack(fragments.a_registers(a)) == of_a).all()
    assert (np.stack(fragments.b_registers(b)) == of_b).all()


def test_a():
    matrix = random_bits(WARPS, 16, 16)
    registers = by_table(matrix, 4, place_of_a)
    assert (fragments.a_matrix(registers) == matrix).all()
    assert (np.stack(fragments.a_registers(matrix)) == registers).all()


@pytest.mark.parametrize("registers", [2, 4])
def test_b(registers):
    matrix = random_bits(WARPS, 8 * registers, 8)
    held = by_table(matrix, registers, place_of_b)
    assert (fragments.b_matrix(held) == matrix).all()
    assert (np.stack(fragments.b_registers(matrix)) == held).all()


@pytest.mark.parametrize("columns", [8, 16, 64, 256])
def test_accumulators(columns):
    matrix = np.random.default_rng(1).standard_normal((WARPS, 16, columns)).astype(np.float32)
    held = np.zeros((columns // 2, WARPS * 32), np.float32)
    for warp, lane, i in itertools.product(range(WARPS), LANES, range(columns // 2)):
        held[i, 32 * warp + lane] = matrix[warp][place_of_d(lane, i)]
    assert (fragments.accumulators(held) == matrix).all()
    assert (fragments.accumulator_registers(matrix) == held).all()
    assert (fragments.accumulators([x.view(np.uint32) for x in held]) == matrix).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_rows_of_ldmatrix_and_stmatrix(count, transposed):
    """Thread t of a warp points to row t % 8 of matrix t // 8, and holds row t // 4, columns 2 (t % 4) and the next."""
    matrices = random_bits(WARPS, count, 8, 8)
    rows = np.zeros((WARPS, 32, 8), np.uint16)
    rows[:, : 8 * count] = matrices.reshape(WARPS, 8 * count, 8)
    held = np.zeros((count, WARPS * 32), np.uint32)
    for warp, lane, k in itertools.product(range(WARPS), LANES, range(count)):
        row, column = lane // 4, lane % 4 * 2
        matrix = matrices[warp, k].T if transposed else matrices[warp, k]
        held[k, 32 * warp + lane] = packed(matrix[row, column], matrix[row, column + 1])
    assert (np.stack(fragments.loaded(rows.reshape(-1, 8).view(np.uint8), count, transposed)) == held).all()
    assert (fragments.stored(held, transposed) == rows.reshape(-1, 8).view(np.uint8)).all()


@pytest.mark.parametrize("element", ["bf16", "f16"])
def test_values_of_all_bits(element):
    bits = np.arange(1 << 16, dtype=np.uint32)
    exponent_bits, fraction_bits = (8, 7) if element == "bf16" else (5, 10)
    fraction = (bits & (1 << fraction_bits) - 1).astype(np.float64)
    exponent = (bits >> fraction_bits & (1 << exponent_bits) - 1).astype(int)
    bias, top = (1 << exponent_bits - 1) - 1, (1 << exponent_bits) - 1
    scaled = np.where(exponent > 0, 1 + fraction / (1 << fraction_bits), fraction / (1 << fraction_bits))
    magnitude = np.ldexp(scaled, np.maximum(exponent, 1) - bias)
    magnitude[exponent == top] = np.where(fraction[exponent == top] == 0, np.inf, np.nan)
    expected = np.where(bits >> 15, -magnitude, magnitude).astype(np.float32)
    np.testing.assert_array_equal(fragments.to_float32(bits.astype(np.uint16), element), expected)


def test_values_of_tf32_have_ten_bits_of_fraction():
    one = 0x3F800000
    bits = np.array([one | 1 << 13, one | (1 << 13) - 1, one | 0x7FFFFF, 1 << 31 | one, 0x7F800000], np.uint32)
    assert fragments.to_float32(bits, "tf32").tolist() == [1 + 2**-10, 1, 2 - 2**-10, -1, np.inf]


def test_products_round_once():
    one, small = np.uint16(0x3F80), np.uint16(0x3380)  # 1 and 2^-24 in bfloat16
    a, b = np.zeros((1, 16, 16), np.uint16), np.zeros((1, 16, 8), np.uint16)
    a[0, 0, :3], b[0, :3, 0] = (one, small, small), one
    # each 2^-24 alone would be rounded away
    assert fragments.multiply_add(a, b, 0.0, "bf16")[0, 0, 0] == np.float32(1 + 2**-23)


def random_positions(seed=2):
    pairs = np.array([*itertools.combinations(range(4), 2)])
    return pairs[np.random.default_rng(seed).integers(0, 6, (WARPS, 16, sparsity.CHUNKS))]


@pytest.mark.parametrize("selector", [0, 1])
def test_metadata(selector):
    """Figure "Sparse MMA .m16n8k32 metadata layout for .f16/.bf16 type"."""
    kept = random_positions()
    words = np.zeros(WARPS * 32, np.uint32)
    for warp, row, chunk, i in itertools.product(range(WARPS), range(16), range(8), range(2)):
        lane = row % 8 * 4 + 2 * selector + chunk // 4
        bit = row // 8 * 16 + chunk % 4 * 4 + 2 * i
        words[32 * warp + lane] |= np.uint32(kept[warp, row, chunk, i] << bit)
    assert (sparsity.metadata_of(kept, selector) == words).all()
    # what other threads hold takes no part
    others = words | np.where(np.arange(WARPS * 32) % 4 // 2 == selector, 0, 0xFFFFFFFF).astype(np.uint32)
    assert (sparsity.positions(others, selector) == kept).all()


@pytest.mark.parametrize("element", ["bf16", "f16"])
def test_sparse_products_are_the_dense_ones(element):
    kept = random_positions()
    a, b = random_bits(WARPS, 16, 16) & 0xBFFF, random_bits(WARPS, 32, 8, seed=1) & 0xBFFF  # none of them infinite
    c = np.random.default_rng(5).standard_normal((WARPS, 16, 8)).astype(np.float32)
    dense = np.zeros((WARPS, 16, 32), np.uint16)
    for warp, row, chunk, i in itertools.product(range(WARPS), range(16), range(8), range(2)):
        dense[warp, row, 4 * chunk + kept[warp, row, chunk, i]] = a[warp, row, 2 * chunk + i]
    got = sparsity.sparse_multiply_add(a, kept, b, c, element)
    np.testing.assert_allclose(got, fragments.multiply_add(dense, b, c, element), rtol=1e-6)


def test_rows_that_no_element_is_kept_for_take_no_part():
    kept = np.broadcast_to(np.array([0, 2]), (1, 16, 8, 2))
    a, b = np.full((1, 16, 16), 0x3F80, np.uint16), np.full((1, 32, 8), 0x3F80, np.uint16)
    b[0, 1::2] = 0x7F80
    assert (sparsity.sparse_multiply_add(a, kept, b, np.zeros((1, 16, 8), np.float32), "bf16") == 16).all()


@pytest.mark.parametrize("k_major", [True, False])
@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_places_in_shared_memory(width, k_major):
    leading, stride, start = 4096, 8 * width, 2048 + 32 * (k_major and width > 32)
    hopper = encoded(start, leading, stride) | WGMMA_SWIZZLES[width]
    blackwell = encoded(start, leading, stride) | TCGEN05_SWIZZLES[width]
    expected = {
        at: swizzled(start + byte, width) for at, byte in canonical(128, width, k_major, leading, stride).items()
    }
    for descriptor in (descriptors.wgmma_descriptor(hopper), descriptors.tcgen05_descriptor(blackwell)):
        got = descriptors.offsets(descriptor, 128, k_major)
        assert {(r, k): got[r, k] for r, k in expected} == expected
        assert len(set(expected.values())) == 128 * 16


def test_patterns_that_begin_elsewhere_are_swizzled_from_there():
    """A matrix moved by 384 bytes, with a base offset of 3, lies as it did, 384 bytes further."""
    aligned = descriptors.wgmma_descriptor(encoded(1024, stride=1024) | 1 << 62)
    moved = descriptors.wgmma_descriptor(encoded(1024 + 384, stride=1024, base=3) | 1 << 62)
    here = descriptors.offsets(aligned, 64, True)
    # the chunk is swizzled within its 128 bytes alone
    assert (descriptors.offsets(moved, 64, True) == here + 384).all()


@pytest.mark.parametrize("bit", [14, 30, 46, 52, 61])
def test_reserved_bits_of_wgmma_are_refused(bit):
    with pytest.raises(ValueError, match="reserves"):
        descriptors.wgmma_descriptor(1 << 62 | 1 << bit)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (1 << 62, "bits 46 to 48"),
        (1 << 46 | 1 << 61, "has swizzle 1"),
        (1 << 46 | 3 << 61, "has swizzle 3"),
        (1 << 46 | 1 << 52, "reserves"),
        (1 << 46 | 1 << 15, "reserves"),
    ],
)
def test_fields_of_tcgen05_are_refused(value, said):
    with pytest.raises(ValueError, match=said):
        descriptors.tcgen05_descriptor(value)
