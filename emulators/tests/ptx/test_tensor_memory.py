"""tcgen05 and mbarrier in hand-written PTX: what they compute, and what is found where a wait or a fence is missing."""

from __future__ import annotations

import numpy as np
import pytest
from hand_written.matrix_layouts import TCGEN05_SWIZZLES, encoded, image, strides
from hand_written.matrix_programs import names, run, text

from gpu_emulators.ptx import Fault, Program, Refused
from gpu_emulators.ptx.matrix import tensor_products

THREADS = 128
COLUMNS = 32
# operands in shared memory, then an mbarrier and the address of tensor memory
B_START, MBARRIER = 16384, 24576
HANDLE = MBARRIER + 8
SHARED = MBARRIER + 16
WORDS = MBARRIER // 4 // THREADS
# of tensor memory: the sums, then the words of A
ALLOCATED, A_COLUMN = 64, COLUMNS
F32, BF16 = 1 << 4, 1 << 7 | 1 << 10


def integers(*shape, seed):
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float32)


def bits_of(matrix, element="bf16"):
    if element == "f16":
        return matrix.astype(np.float16).view(np.uint16)
    return (matrix.view(np.uint32) >> 16).astype(np.uint16)


def shared_image(a, b, widths=(128, 128), k_major=(True, True)):
    """uint32 [threads, words] that threads store one behind the other."""
    data = np.zeros(MBARRIER, np.uint8)
    for start, matrix, width, major in zip((0, B_START), (a, b), widths, k_major, strict=True):
        bytes_ = image(matrix, width, major)
        data[start : start + len(bytes_)] = bytes_
    return data.view(np.uint32).reshape(THREADS, WORDS)


def descriptor(start, width=128, k_major=True):
    return encoded(start, *strides(width, k_major)) | TCGEN05_SWIZZLES[width]


def shape_of(rows, k_major=(True, True), elements=BF16):
    transposed = int(not k_major[0]) << 15 | int(not k_major[1]) << 16
    return F32 | elements | transposed | COLUMNS >> 3 << 17 | rows >> 4 << 24


def access(rows):
    """(shape, offset of the second half, words of a thread) by which four warps move 64 or 128 rows of 32 words."""
    return ("16x32bx2.x16", ", 16", 16) if rows == 64 else ("32x32b.x32", "", 32)


STORE = [
    f"mul.lo.s32 %r10, %r1, {4 * WORDS};",
    "add.s32 %r10, %r10, %r4;",
    *(f"st.shared.b32 [%r10+{4 * i}], %in{i};" for i in range(WORDS)),
]
WAIT = """{{ .reg .pred complete;
    again: mbarrier.try_wait.parity.shared::cta.b64 complete, [%r4+{place}], {parity};
    @!complete bra.uni again; }}"""
PRODUCT = "@%p2 tcgen05.mma.cta_group::1.kind::f16 [%r20+0], {a}, %rd11, {shape}, {adds};"
COMMIT = f"add.s32 %r30, %r4, {MBARRIER}; " + (
    "@%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r30];"
)


def product(rows=64, a="%rd10", adds="%p4", k_major=(True, True), elements=BF16):
    return PRODUCT.format(a=a, shape=shape_of(rows, k_major, elements), adds=adds)


def body(rows=64, **replaced):
    """Lines of a correct product, but for those that are replaced or taken away by their names."""
    shape, split, count = access(rows)
    lines = {
        "predicates": "setp.lt.u32 %p1, %r1, 32; setp.eq.s32 %p2, %r1, 0; mov.pred %p3, -1; mov.pred %p4, 0;",
        "alloc": f"@%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r4+{HANDLE}], {ALLOCATED};",
        "alloc_barrier": "bar.sync 0;",
        "handle": f"ld.shared.b32 %r20, [%r4+{HANDLE}]; shr.u32 %r21, %r1, 5; shl.b32 %r21, %r21, 21; "
        "add.s32 %r21, %r21, %r20;",
        "relinquish": "@%p1 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;",
        "init": f"@%p2 mbarrier.init.shared::cta.b64 [%r4+{MBARRIER}], 1;",
        "store": "\n".join(STORE),
        "descriptors": f"mov.b64 %rd10, {descriptor(0)}; mov.b64 %rd11, {descriptor(B_START)};",
        "proxy": "fence.proxy.async.shared::cta;",
        "barrier": "bar.sync 0;",
        "product": product(rows),
        "commit": COMMIT,
        "wait": WAIT.format(place=MBARRIER, parity=0),
        "load": f"tcgen05.ld.sync.aligned.{shape}.b32 {names('out', count)}, [%r21+0]{split};",
        "load_wait": "tcgen05.wait::ld.sync.aligned;",
        "last_barrier": "bar.sync 0;",
        "inval": f"@%p2 mbarrier.inval.shared::cta.b64 [%r4+{MBARRIER}];",
        "dealloc": f"@%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r20, {ALLOCATED};",
    }
    assert replaced.keys() <= lines.keys()
    return "\n".join(replaced.get(name, line) for name, line in lines.items())


def line_of(name):
    return next(line for line in body().split("\n") if f".{name}" in line)


def execute(lines, given, rows=64, ctas=1):
    return run(lines, given, access(rows)[2], shared_bytes=SHARED, ctas=ctas, target="sm_100a")


def operands(rows=64):
    return integers(rows, 16, seed=1), integers(COLUMNS, 16, seed=2)


def found(lines):
    given = shared_image(*(bits_of(matrix) for matrix in operands()))
    return execute(lines, given)[1].kinds


def sums(result, rows):
    """float32 [ctas, rows, COLUMNS] of what the threads have loaded."""
    held = result.view(np.float32)
    if rows == 128:
        return held.reshape(-1, 128, 32)
    # CTA, warp, half of the columns, row of the warp, column of the half
    return held.reshape(-1, 4, 2, 16, 16).transpose(0, 1, 3, 2, 4).reshape(-1, 64, 32)


@pytest.mark.parametrize("k_major", [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize(("widths", "rows"), [((128, 128), 64), ((128, 128), 128), ((64, 32), 64), ((16, 16), 64)])
def test_products_of_all_layouts(widths, rows, k_major):
    a, b = operands(rows)
    at = [descriptor(start, *layout) for start, *layout in zip((0, B_START), widths, k_major, strict=True)]
    lines = body(
        rows, descriptors=f"mov.b64 %rd10, {at[0]}; mov.b64 %rd11, {at[1]};", product=product(rows, k_major=k_major)
    )
    got, findings = execute(lines, shared_image(bits_of(a), bits_of(b), widths, k_major), rows)
    assert (sums(got, rows)[0] == a @ b.T).all()
    assert not findings


@pytest.mark.parametrize("element", ["bf16", "f16"])
def test_products_add_to_sums_in_all_ctas(element):
    a, b = operands()
    given = shared_image(bits_of(a, element), bits_of(b, element))
    elements = BF16 if element == "bf16" else 0
    twice = f"{product(elements=elements)}\n{product(adds='%p3', elements=elements)}"
    got, findings = execute(body(product=twice), np.tile(given, (3, 1)), ctas=3)
    assert (sums(got, 64) == 2 * (a @ b.T)).all()
    assert not findings


def stored(rows, wait="tcgen05.wait::st.sync.aligned;"):
    """The words of A, a row's eight one behind the other, from registers to tensor memory."""
    shape, split, count = ("16x32bx2.x4", ", 4", 4) if rows == 64 else ("32x32b.x8", "", 8)
    registers = names("in", count, WORDS)
    return f"tcgen05.st.sync.aligned.{shape}.b32 [%r21+{A_COLUMN}]{split}, {registers}; {wait}"


def words_of(a, rows):
    """uint32 [threads, words] of A as ``stored`` takes them."""
    words = bits_of(a).view(np.uint32)
    if rows == 128:
        return words
    return words.reshape(4, 16, 2, 4).transpose(0, 2, 1, 3).reshape(THREADS, 4)


@pytest.mark.parametrize("rows", [64, 128])
def test_the_left_operand_in_tensor_memory(rows):
    a, b = operands(rows)
    given = np.concatenate([shared_image(bits_of(a), bits_of(b)), words_of(a, rows)], 1)
    lines = body(
        rows, proxy=stored(rows) + "fence.proxy.async.shared::cta;", product=product(rows, f"[%r20+{A_COLUMN}]")
    )
    got, findings = execute(lines, given, rows)
    assert (sums(got, rows)[0] == a @ b.T).all()
    assert not findings


def found_of_stored(before=None, after=""):
    """Kinds of a product with A in tensor memory, with steps before its barrier and after its commit."""
    a, b = operands()
    given = np.concatenate([shared_image(bits_of(a), bits_of(b)), words_of(a, 64)], 1)
    before = stored(64) if before is None else before
    lines = body(
        proxy=f"{before} fence.proxy.async.shared::cta;", product=product(a=f"[%r20+{A_COLUMN}]"), commit=COMMIT + after
    )
    return execute(lines, given)[1].kinds


def test_stores_to_tensor_memory_are_waited_for():
    assert found_of_stored() == set()
    assert found_of_stored(before="") == {"product of unwritten tensor memory"}
    assert "product of tensor memory in flight" in found_of_stored(before=stored(64, wait=""))
    assert found_of_stored(after=stored(64)) >= {"write of tensor memory that a product still reads"}
    assert found_of_stored(after=WAIT.format(place=MBARRIER, parity=0) + stored(64)) == set()


def test_stores_of_other_warps_are_met_by_a_barrier():
    a, b = operands()
    given = np.concatenate([shared_image(bits_of(a), bits_of(b)), words_of(a, 64)], 1)
    lines = body(barrier=f"bar.sync 0; {stored(64)}", product=product(a=f"[%r20+{A_COLUMN}]"))
    assert execute(lines, given)[1].kinds == {"tensor memory race: product after another warp's write"}


MISSING = {
    "alloc_barrier": {"shared race: read after another thread's write"},
    "proxy": {"product of memory written without a proxy fence"},
    "barrier": {"shared race: product after a thread's write", "shared race: read after another thread's write"},
    "product": {"read of unwritten tensor memory"},
    "wait": {"read of tensor memory that a product still writes"},
    "load_wait": {"release of tensor memory that a load still reads"},
    "last_barrier": {"tensor memory race: release after another warp's read"},
    "dealloc": {"tensor memory that is not deallocated"},
    "store": {"product of unwritten shared memory"},
}


def test_nothing_is_found_in_a_correct_product():
    assert found(body()) == set()


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_found(name):
    assert found(body(**{name: ""})) >= MISSING[name]


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("commit", "", "wait for ever"),
        ("init", "", "not initialised"),
        ("wait", WAIT.format(place=MBARRIER, parity=1), "wait for ever"),
        ("alloc", "mov.b32 %r40, 0; st.shared.b32 [%r4+24584], %r40;", "out of bounds of allocated"),
        ("dealloc", "@%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r20, 32;", "are not allocated"),
        ("product", product().replace("%r20+0", "%r20+40"), "out of bounds of allocated"),
        ("product", product().replace("@%p2", ""), "several threads"),
        ("load", f"tcgen05.ld.sync.aligned.32x32b.x16.b32 {names('out', 16)}, [%r20+0];", "does not reach"),
    ],
)
def test_what_cannot_go_on_is_a_fault(name, line, said):
    with pytest.raises(Fault, match=said):
        found(body(**{name: line}))


def test_each_cta_deallocates_at_run_time():
    """The second of two CTAs goes past the instruction."""
    of_first = "mad.lo.s32 %r41, %r2, 32, %r1; setp.lt.u32 %p6, %r41, 32;"
    lines = body(dealloc=f"{of_first} @%p6 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r20, {ALLOCATED};")
    given = shared_image(*(bits_of(matrix) for matrix in operands()))
    _, findings = execute(lines, np.tile(given, (2, 1)), ctas=2)
    assert [(one.kind, one.text.split()[1].split(".")[1]) for one in findings] == [
        ("tensor memory that is not deallocated", "alloc")
    ]
    assert findings.count("tensor memory that is not deallocated") == 1


def test_the_phase_before_the_first_counts_as_complete():
    assert found(body(barrier=f"bar.sync 0; {WAIT.format(place=MBARRIER, parity=1)}")) == set()


def test_a_second_phase_is_waited_for_by_the_other_parity():
    first, second = (WAIT.format(place=MBARRIER, parity=parity) for parity in (0, 1))
    again = f"{first}\n{product(adds='%p3')}\n{COMMIT}\n"
    a, b = operands()
    got, findings = execute(body(wait=again + second), shared_image(bits_of(a), bits_of(b)))
    assert (sums(got, 64)[0] == 2 * (a @ b.T)).all()
    assert not findings
    assert found(body(wait=again)) >= {"read of tensor memory that a product still writes"}


def test_operands_in_shared_memory_may_not_be_written_under_way():
    store = "st.shared.b32 [%r10], %r4;"
    assert "write to shared memory that a product still reads" in found(body(commit=f"{COMMIT} bar.sync 0; {store}"))
    assert found(body(wait=f"{WAIT.format(place=MBARRIER, parity=0)} bar.sync 0; {store}")) == set()


REUSES = {
    "store": "st.shared.b32 [%r4+{}], %r4;",
    "copy": "cp.async.ca.shared.global [%r4+{}], [%rd1], 4; cp.async.wait_all;",
}


@pytest.mark.parametrize("name", REUSES)
@pytest.mark.parametrize("half", [MBARRIER, MBARRIER + 4])
def test_memory_of_an_mbarrier_is_used_for_nothing_else_before_it_is_invalidated(name, half):
    reuse = f"@%p2 {REUSES[name].format(half)}"
    kind = {"write to shared memory that holds an mbarrier"}
    assert found(body(last_barrier=f"bar.sync 0; {reuse}")) == kind
    assert found(body(dealloc=f"{reuse} {line_of('dealloc')}")) == set()


def test_an_mbarrier_is_invalidated_before_it_is_initialised_again():
    again = f"{line_of('init')} {line_of('init')}"
    assert found(body(init=again)) == {"mbarrier initialised again before it was invalidated"}
    between = line_of("init").replace("init", "inval").replace(", 1;", ";")
    assert found(body(init=again.replace("; @", f"; {between} @"))) == set()


def test_what_one_thread_has_waited_for_others_know_behind_a_barrier():
    one = f"@!%p2 bra over; {WAIT.format(place=MBARRIER, parity=0)} over: "
    assert found(body(wait=f"{one} bar.sync 0;")) == set()
    assert found(body(wait=f"{one} bar.warp.sync -1;")) == {"read of tensor memory that a product still writes"}


FENCE = "fence.proxy.async.shared::cta;"


@pytest.mark.parametrize(
    ("barrier", "kinds"),
    [
        (f"bar.sync 0; @%p2 {FENCE}", set()),
        (f"bar.sync 0; @%p5 {FENCE}", {"product of memory written without a proxy fence"}),
        (f"bar.sync 0; @%p5 {FENCE} bar.sync 0;", set()),
    ],
)
def test_the_thread_that_issues_a_product_has_come_to_a_fence(barrier, kinds):
    assert found(body(proxy="setp.eq.s32 %p5, %r1, 77;", barrier=barrier)) == kinds


def test_only_those_that_have_waited_may_write_where_a_product_has_read():
    one = f"bar.sync 0; @!%p2 bra over; {WAIT.format(place=MBARRIER, parity=0)} over: "
    still = {"write to shared memory that a product still reads"}
    assert found(body(wait=f"{one} @!%p2 st.shared.b32 [%r10], %r4; bar.sync 0;")) == still
    assert found(body(wait=f"{one} @%p2 st.shared.b32 [%r10], %r4; bar.sync 0;")) == set()
    assert found(body(wait=f"{one} bar.sync 0; @!%p2 st.shared.b32 [%r10], %r4; bar.sync 0;")) == set()
    # each has waited itself
    assert found(body(wait=f"{WAIT.format(place=MBARRIER, parity=0)} st.shared.b32 [%r10], %r4;")) == set()


def test_a_wait_that_does_not_ask_again_is_none():
    once = WAIT.format(place=MBARRIER, parity=0).replace("@!complete bra.uni again;", "")
    assert found(body(wait=once)) >= {"read of tensor memory that a product still writes"}
    # the same after the product is complete for certain
    assert found(body(wait=f"{WAIT.format(place=MBARRIER, parity=0)} {once}")) == set()


def test_an_mbarrier_is_initialised_before_it_is_used():
    init = line_of("init").replace("%p2", "%p5")
    late = f"bar.sync 0; setp.eq.s32 %p5, %r1, 64; {init}"
    kinds = {"arrival at an mbarrier whose initialisation is not ordered before it"}
    assert found(body(init="", barrier=late, commit=f"{COMMIT} bar.sync 0;")) == kinds
    assert found(body(init="", barrier=f"{late} bar.sync 0;")) == set()


def test_a_commit_without_a_state_space_has_an_address_of_64_bits():
    wide = COMMIT.replace(".shared::cluster", "").replace("[%r30]", "[%rd30]")
    assert found(body(commit=wide.replace("; @", "; cvt.u64.u32 %rd30, %r30; @"))) == set()
    for wrong in (COMMIT.replace(".shared::cluster", ""), COMMIT.replace("[%r30]", "[%rd30]")):
        with pytest.raises(Refused, match="is expected"):
            found(body(commit=wrong))


def test_the_thread_that_issues_products_commits_them():
    commit = "setp.eq.s32 %p5, %r1, 1;" + COMMIT.replace("%p2", "%p5")
    assert found(body(commit=commit)) == {"commit by a thread that has not issued the products"}
    other = f"setp.eq.s32 %p5, %r1, 1; {product()} {product().replace('%p2', '%p5')}"
    with pytest.raises(Refused, match="several threads"):
        found(body(product=other))


def test_nothing_is_allocated_after_the_permit_is_given_up():
    again = "@%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r4+24576], 32;"
    free = "mov.b32 %r40, 64; @%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r40, 32;"
    barrier = "bar.sync 0;"
    kinds = found(body(relinquish=line_of("relinquish") + again + free + barrier))
    assert kinds == {"tensor memory allocated after the permit was given up"}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (shape_of(64) | 1 << 2, "set"),
        (shape_of(64) | 1 << 13, "set"),
        (shape_of(64) | 1 << 30, "set"),
        (shape_of(64) & ~F32, "float32 sums"),
        (shape_of(64) ^ 1 << 7, "one element type"),
        (shape_of(32), "sums"),
        (shape_of(256), "sums"),
        (shape_of(128) ^ 1 << 17, "sums"),
    ],
)
def test_other_instruction_descriptors_are_refused(value, said):
    with pytest.raises(ValueError, match=said):
        tensor_products.instruction_descriptor(value)
    with pytest.raises(Refused, match=said):
        found(body(product=product().replace(str(shape_of(64)), str(value))))


def test_an_instruction_descriptor():
    given = tensor_products.instruction_descriptor(shape_of(128, (False, True)))
    assert given == tensor_products.Shape("bf16", 128, COLUMNS, False, True)


@pytest.mark.parametrize(
    ("wanted", "other"),
    [
        ("mma.cta_group::1", "mma.cta_group::2"),
        ("kind::f16", "kind::tf32"),
        ("kind::f16", "kind::f16.collector::a::fill"),
        (", %p4;", ", %p4, 1;"),
        ("mbarrier::arrive::one.shared", "mbarrier::arrive::one.multicast::cluster.shared"),
        ("16x32bx2.x16", "16x64b.x16"),
        ("16x32bx2.x16", "16x32bx2.x16.pack::16b"),
        ("], 16;", "];"),
        ("], 64;", "], 48;"),
        ("], 64;", "], %r1;"),
        ("wait::ld.sync", "wait::ld"),
        ("try_wait.parity", "try_wait"),
        ("try_wait.parity", "test_wait.parity"),
        (", 0;\n    @!complete", ", 0, 99;\n    @!complete"),
        ("], 1;", "], 0;"),
        ("alloc.cta_group::1", "alloc.cta_group::2"),
        ("init.shared::cta", "init.shared::cluster"),
    ],
)
def test_other_instructions_are_refused(wanted, other):
    assert wanted in body()
    with pytest.raises(Refused, match=r"tcgen05|mbarrier"):
        Program(text(body().replace(wanted, other), WORDS, 16, THREADS, "sm_100a"))
