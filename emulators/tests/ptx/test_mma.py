"""ldmatrix, stmatrix, mma.sync and mma.sp in hand-written PTX."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hand_written.matrix_programs import names, run, text

from gpu_emulators.ptx import Program, Refused
from gpu_emulators.ptx.matrix import fragments, sparsity

WARPS = 2
THREADS = 32 * WARPS


def bits(*shape, seed=0):
    """Numbers of either type that are below 2 and above 2^-64, or 0."""
    return np.random.default_rng(seed).integers(0, 1 << 16, shape, dtype=np.uint16) & 0xBFFF


def values(matrix, element):
    return fragments.to_float32(matrix, element).astype(np.float64)


def as_words(registers):
    return np.stack([np.ascontiguousarray(register).view(np.uint32) for register in registers], 1)


def mma(element="bf16", d=("out", 0), c=("in", 6)):
    shape = "m16n8k8" if element == "tf32" else "m16n8k16"
    operands = f"{names(d[0], 4, d[1])}, {names('in', 4)}, {names('in', 2, 4)}, {names(c[0], 4, c[1])}"
    return f"mma.sync.aligned.{shape}.row.col.f32.{element}.{element}.f32 {operands};"


@pytest.mark.parametrize("element", ["bf16", "f16"])
def test_product_and_sum(element):
    a, b = bits(WARPS, 16, 16), bits(WARPS, 16, 8, seed=1)
    c = np.random.default_rng(2).standard_normal((WARPS, 16, 8)).astype(np.float32)
    given = as_words([*fragments.a_registers(a), *fragments.b_registers(b), *fragments.accumulator_registers(c)])
    got, findings = run(mma(element), given, 4)
    exact = values(a, element) @ values(b, element) + c
    np.testing.assert_array_equal(fragments.accumulators(got.T), exact.astype(np.float32))
    assert not findings


def test_products_of_tf32_leave_the_lower_bits_out():
    rng = np.random.default_rng(4)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((WARPS, 16, 8), (WARPS, 8, 8)))
    c = rng.standard_normal((WARPS, 16, 8)).astype(np.float32)
    whole = [fragments.a_registers(a.view(np.uint32)), fragments.b_registers(b.view(np.uint32))]
    given = as_words([*whole[0], *whole[1], *fragments.accumulator_registers(c)])
    got, findings = run(mma("tf32"), given, 4)
    x, y = ((matrix.view(np.uint32) >> 13 << 13).view(np.float32).astype(np.float64) for matrix in (a, b))
    np.testing.assert_array_equal(fragments.accumulators(got.T), (x @ y + c).astype(np.float32))
    assert not findings


def test_unwritten_operands_are_found():
    _, findings = run(mma(c=("r", 20)), np.zeros((THREADS, 6), np.uint32), 4)
    assert findings.kinds == {"read of an unwritten register"}


def test_divergent_warps_are_found():
    body = f"""
    setp.ne.b32 %p1, %r1, 5;
    mov.b32 %out0, 0; mov.b32 %out1, 0; mov.b32 %out2, 0; mov.b32 %out3, 0;
    @%p1 {mma()}
    """
    _, findings = run(body, np.zeros((THREADS, 10), np.uint32), 4)
    assert findings.kinds == {"divergent warp at a warp-wide instruction"}


@pytest.mark.parametrize("selector", [0, 1])
@pytest.mark.parametrize("element", ["bf16", "f16"])
def test_sparse_product_is_that_of_the_dense_matrix(element, selector):
    pairs = np.array([*itertools.combinations(range(4), 2)])
    kept = pairs[np.random.default_rng(3).integers(0, 6, (WARPS, 16, sparsity.CHUNKS))]
    a, b = bits(WARPS, 16, 16), bits(WARPS, 32, 8, seed=1)
    dense = np.zeros((WARPS, 16, 8, 4))
    np.put_along_axis(dense, kept, values(a, element).reshape(WARPS, 16, 8, 2), 3)
    c = np.random.default_rng(2).standard_normal((WARPS, 16, 8)).astype(np.float32)
    words = sparsity.metadata_of(kept, selector)
    given = as_words([*fragments.a_registers(a), *fragments.b_registers(b), *fragments.accumulator_registers(c), words])
    got, findings = run(sparse(element, selector), given, 4)
    exact = dense.reshape(WARPS, 16, 32) @ values(b, element) + c
    np.testing.assert_allclose(fragments.accumulators(got.T), exact, rtol=1e-6, atol=1e-6)
    assert not findings


def sparse(element="bf16", selector="0", variant="sp::ordered_metadata", metadata="%in12"):
    operands = f"{names('out', 4)}, {names('in', 4)}, {names('in', 4, 4)}, {names('in', 4, 8)}, {metadata}, {selector}"
    return f"mma.{variant}.sync.aligned.m16n8k32.row.col.f32.{element}.{element}.f32 {operands};"


def test_only_the_threads_of_the_selector_give_metadata():
    """Unwritten registers of the others are no finding, those of the selector's threads are."""
    for selector, kinds in ((0, set()), (1, {"read of a register that some threads have not written"})):
        body = f"""
        and.b32 %r10, %r1, 3;
        setp.lt.u32 %p1, %r10, 2;
        @%p1 mov.b32 %r11, %in12;
        {sparse(selector=selector, metadata="%r11")}
        """
        given = np.zeros((THREADS, 13), np.uint32)
        given[:, 12] = 0xEEEEEEEE
        _, findings = run(body, given, 4)
        assert findings.kinds - {"metadata of a sparse matrix out of order"} == kinds


@pytest.mark.parametrize(("nibble", "variant", "found"), [
    (0b0100, "sp::ordered_metadata", False),
    (0b1110, "sp::ordered_metadata", False),
    (0b0001, "sp::ordered_metadata", True),
    (0b0001, "sp", False),
    (0b1010, "sp::ordered_metadata", True),
    (0b1010, "sp", True),
])  # fmt: skip
def test_metadata_out_of_order_is_found(nibble, variant, found):
    given = np.zeros((THREADS, 13), np.uint32)
    given[:, 12] = 0xEEEEEEE0 | nibble
    _, findings = run(sparse(variant=variant), given, 4)
    assert (findings.kinds == {"metadata of a sparse matrix out of order"}) == found


def moved(count, trans=("", "")):
    """Registers to shared memory and back; threads point to rows in an order of their own."""
    return f"""
    xor.b32 %r10, %r1, 5;
    shl.b32 %r10, %r10, 4;
    add.s32 %r10, %r10, %r4;
    stmatrix.sync.aligned.m8n8.x{count}{trans[0]}.shared.b16 [%r10+16], {names("in", count)};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x{count}{trans[1]}.shared.b16 {names("out", count)}, [%r10+16];
    """


@pytest.mark.parametrize("count", [1, 2, 4])
def test_rows_written_and_read(count):
    given = as_words([fragments.tile_register(bits(WARPS, 8, 8, seed=k)) for k in range(count)])
    for trans in (("", ""), (".trans", ".trans"), (".trans", ""), ("", ".trans")):
        got, findings = run(moved(count, trans), given, count, shared_bytes=16 * THREADS + 16)
        for k in range(count):
            there, back = fragments.tile(given[:, k]), fragments.tile(got[:, k])
            assert (back == (there if trans[0] == trans[1] else there.transpose(0, 2, 1))).all()
        assert not findings


def test_rows_of_ldmatrix_come_from_the_addresses_of_its_threads():
    """Element j of the row that thread t points to is 100 t + j."""
    rows = (100 * np.arange(32)[:, None] + np.arange(8)).astype(np.uint16).view(np.uint32)
    body = f"""
    shl.b32 %r10, %r1, 4;
    add.s32 %r10, %r10, %r4;
    st.shared.v4.b32 [%r10], {names("in", 4)};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {names("out", 4)}, [%r10];
    """
    got, findings = run(body, rows, 4, shared_bytes=512)
    for lane, k in itertools.product(range(32), range(4)):
        element = 100 * (8 * k + lane // 4) + 2 * (lane % 4)
        assert got[lane, k] == element | element + 1 << 16
    assert not findings


@pytest.mark.parametrize(("barrier", "found"), [("bar.sync 0;", False), ("bar.warp.sync -1;", True), ("", True)])
def test_unordered_rows_are_races(barrier, found):
    """Threads read the rows that threads of the other warp wrote."""
    body = moved(4).replace("bar.sync 0;", f"{barrier} xor.b32 %r10, %r10, 512;").replace("+16", "")
    _, findings = run(body, np.zeros((THREADS, 4), np.uint32), 4, shared_bytes=16 * THREADS)
    assert findings.kinds == ({"shared race: read after another thread's write"} if found else set())


@pytest.mark.parametrize(("barrier", "found"), [("bar.sync 0;", False), ("", True)])
def test_rows_written_where_others_read_are_races(barrier, found):
    load, store = (f"{names(kind, 4)}" for kind in ("out", "in"))
    body = f"""
    shl.b32 %r10, %r1, 4;
    add.s32 %r10, %r10, %r4;
    st.shared.v4.b32 [%r10], {store};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {load}, [%r10];
    {barrier}
    xor.b32 %r10, %r10, 512;
    stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r10], {store};
    """
    _, findings = run(body, np.zeros((THREADS, 4), np.uint32), 4, shared_bytes=16 * THREADS)
    assert findings.kinds == ({"shared race: write after another thread's read"} if found else set())


@pytest.mark.parametrize(("barrier", "found"), [("bar.warp.sync -1;", False), ("bar.sync 0;", False), ("", True)])
def test_rows_are_moved_by_all_threads_of_a_warp(barrier, found):
    """Each thread points to the row that it writes and reads itself."""
    row, held = f"shl.b32 %r10, %r1, 4; add.s32 %r10, %r10, %r4; {barrier}", names("in", 4)
    store, load = f"st.shared.v4.b32 [%r10], {held}; {barrier}", f"ld.shared.v4.b32 {names('out', 4)}, [%r10];"
    load_rows = f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {names('out', 4)}, [%r10]; {barrier}"
    store_rows = f"stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r10], {held}; {barrier}"
    after_write, after_read, twice = (
        {f"shared race: {kind}"}
        for kind in (
            "read after another thread's write",
            "write after another thread's read",
            "write after another thread's write",
        )
    )
    for body, kinds in (
        (f"{store} {load_rows}", after_write),
        (f"{store_rows} {load}", after_write),
        (f"{store} bar.sync 0; {load_rows} {store}", after_read),
        (f"{store} bar.sync 0; {load} {barrier} {store_rows}", after_read),
        (f"{store} {store_rows} bar.sync 0; {load}", twice),
    ):
        given = as_words([np.arange(THREADS, dtype=np.uint32) + 7 * k for k in range(4)])
        _, findings = run(f"{row} {body}", given, 4, shared_bytes=16 * THREADS)
        assert findings.kinds == (kinds if found else set()), body


def test_unwritten_rows_are_found():
    body = re.sub(r"stmatrix.*\n", "", moved(4))
    _, findings = run(body, np.zeros((THREADS, 4), np.uint32), 4, shared_bytes=16 * THREADS + 16)
    assert findings.kinds == {"read of unwritten shared memory"}


@pytest.mark.parametrize(
    ("wanted", "other"),
    [
        ("m16n8k16", "m16n8k8"),
        ("m16n8k16", "m16n8k4"),
        ("bf16.bf16", "tf32.tf32"),
        ("row.col", "row.row"),
        ("bf16.bf16", "bf16.f16"),
        ("bf16.f32 ", "bf16.f16 "),
        ("f32.bf16", "f32.satfinite.bf16"),
        ("aligned.", ""),
        ("%in3}", "%in3, %in4}"),
        (";", ", %r1;"),
    ],
)
def test_other_products_are_refused(wanted, other):
    assert wanted in mma()
    with pytest.raises(Refused, match=r"mma\.sync"):
        Program(text(mma().replace(wanted, other), 10, 4))


@pytest.mark.parametrize(
    ("wanted", "other"),
    [(" 0;", " 2;"), (" 0;", " %r1;"), (", 0;", ";"), ("m16n8k32", "m16n8k16"), ("::ordered_metadata", "::unordered")],
)
def test_other_sparse_products_are_refused(wanted, other):
    assert wanted in sparse()
    with pytest.raises(Refused, match=r"mma\.sp"):
        Program(text(sparse().replace(wanted, other), 13, 4))


@pytest.mark.parametrize(
    ("wanted", "other"), [("m8n8", "m8n16"), ("x4", "x3"), ("b16", "b8"), ("shared", "global"), ("%out3}", "%rd3}")]
)
def test_other_loads_are_refused(wanted, other):
    load = f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {names('out', 4)}, [%r4];"
    assert wanted in load
    with pytest.raises(Refused, match="ldmatrix"):
        Program(text(load.replace(wanted, other), 4, 4))
