"""wgmma in hand-written PTX: what it computes, and what is found where a fence, a wait or a barrier is missing."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hand_written.matrix_layouts import WGMMA_SWIZZLES, encoded, image, strides
from hand_written.matrix_programs import names, run, text

from gpu_emulators.ptx import Fault, Program, Refused
from gpu_emulators.ptx.matrix import fragments

GROUP = 128
COLUMNS = 32
SUMS = COLUMNS // 2
# where B begins, behind A
B_START = 8192
SHARED = 16384
WORDS = SHARED // 4 // GROUP


def integers(*shape, seed):
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float32)


def bits_of(matrix, element):
    if element == "f16":
        return matrix.astype(np.float16).view(np.uint16)
    return (matrix.view(np.uint32) >> 16).astype(np.uint16)


def shared_image(a, b, widths=(128, 128), k_major=(True, True)):
    """uint32 [threads, words] that a group's threads store one behind the other."""
    data = np.zeros(SHARED, np.uint8)
    for start, matrix, width, major in zip((0, B_START), (a, b), widths, k_major, strict=True):
        if matrix is not None:
            bytes_ = image(matrix, width, major)
            data[start : start + len(bytes_)] = bytes_
    return data.view(np.uint32).reshape(GROUP, WORDS)


def descriptor(start, width=128, k_major=True):
    return encoded(start, *strides(width, k_major)) | WGMMA_SWIZZLES[width]


STORE = [
    f"mul.lo.s32 %r10, %r1, {4 * WORDS};",
    "add.s32 %r10, %r10, %r4;",
    *(f"st.shared.b32 [%r10+{4 * i}], %in{i};" for i in range(WORDS)),
]
CLEAR = [f"mov.b32 %out{i}, 0;" for i in range(SUMS)]


def product(element="bf16", a=None, b=None, adds="%p1", tail="1, 1, 0, 0"):
    """The instruction; the descriptors of A and B are in %rd10 and %rd11."""
    shape = f"m64n{COLUMNS}k16.f32.{element}.{element}"
    return f"wgmma.mma_async.sync.aligned.{shape} {names('out', SUMS)}, {a or '%rd10'}, {b or '%rd11'}, {adds}, {tail};"


def body(steps=(), **replaced):
    """Lines of a correct product, but for those that are replaced or taken away by their names."""
    lines = {
        "store": "\n".join(STORE),
        "clear": "\n".join(CLEAR),
        "descriptors": f"mov.b64 %rd10, {descriptor(0)}; mov.b64 %rd11, {descriptor(B_START)}; mov.pred %p1, -1;",
        "proxy": "fence.proxy.async.shared::cta;",
        "barrier": "bar.sync 0;",
        "fence": "wgmma.fence.sync.aligned;",
        "product": product(),
        "commit": "wgmma.commit_group.sync.aligned;",
        "before wait": "",
        "wait": "wgmma.wait_group.sync.aligned 0;",
    }
    assert replaced.keys() <= {name.replace(" ", "_") for name in lines}
    return "\n".join(replaced.get(name.replace(" ", "_"), line) for name, line in lines.items())


def sums(result):
    return fragments.accumulators(result.T).reshape(-1, 64, COLUMNS)


def found(text):
    given = shared_image(bits_of(integers(64, 16, seed=1), "bf16"), bits_of(integers(COLUMNS, 16, seed=2), "bf16"))
    return run(text, given, SUMS, shared_bytes=SHARED)[1].kinds


@pytest.mark.parametrize("k_major", [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize("widths", [(128, 128), (64, 32), (16, 16)])
def test_products_of_all_layouts(widths, k_major):
    a, b = integers(64, 16, seed=1), integers(COLUMNS, 16, seed=2)
    given = shared_image(bits_of(a, "bf16"), bits_of(b, "bf16"), widths, k_major)
    at = [descriptor(start, *layout) for start, *layout in zip((0, B_START), widths, k_major, strict=True)]
    tail = f"1, 1, {int(not k_major[0])}, {int(not k_major[1])}"
    of_layout = f"mov.b64 %rd10, {at[0]}; mov.b64 %rd11, {at[1]}; mov.pred %p1, -1;"
    got, findings = run(body(descriptors=of_layout, product=product(tail=tail)), given, SUMS, shared_bytes=SHARED)
    assert (sums(got)[0] == a @ b.T).all()
    assert not findings


@pytest.mark.parametrize("element", ["bf16", "f16"])
def test_registers_as_the_left_operand_and_sums_that_are_added_to(element):
    """Two groups of a CTA with rows of their own, in two CTAs."""
    groups, ctas = 4, 2
    a, b = integers(groups, 64, 16, seed=1), integers(COLUMNS, 16, seed=2)
    image_ = shared_image(None, bits_of(b, element))
    left = np.stack(fragments.a_registers(bits_of(a, element).reshape(-1, 16, 16)), 1)
    given = np.concatenate([np.tile(image_, (groups, 1)), left], 1)
    store = [line.replace("%r1,", "%r11,") for line in STORE]
    lines = body(
        store="\n".join([f"and.b32 %r11, %r1, {GROUP - 1};", "setp.lt.u32 %p2, %r1, 128;", *_guarded(store)]),
        clear="\n".join(f"mov.b32 %out{i}, 0x40400000;" for i in range(SUMS)),
        product=product(element, names("in", 4, WORDS), tail="1, 1, 0"),
    )
    got, findings = run(lines, given, SUMS, shared_bytes=SHARED, ctas=ctas)
    assert (sums(got) == a @ b.T + 3).all()
    assert not findings


def _guarded(lines):
    return [f"@%p2 {line}" if line.startswith("st.") else line for line in lines]


def test_sums_that_are_not_added_to_need_not_be_written():
    lines = body(clear="").replace("mov.pred %p1, -1;", "mov.pred %p1, 0;")
    a, b = integers(64, 16, seed=1), integers(COLUMNS, 16, seed=2)
    got, findings = run(lines, shared_image(bits_of(a, "bf16"), bits_of(b, "bf16")), SUMS, shared_bytes=SHARED)
    assert (sums(got)[0] == a @ b.T).all()
    assert not findings


def test_products_in_a_row_need_no_fence_between_them():
    a, b = integers(64, 16, seed=1), integers(COLUMNS, 16, seed=2)
    given = shared_image(bits_of(a, "bf16"), bits_of(b, "bf16"))
    got, findings = run(body(product=3 * f"{product()}\n"), given, SUMS, shared_bytes=SHARED)
    assert (sums(got)[0] == 3 * (a @ b.T)).all()
    assert not findings


MISSING = {
    "proxy": {"product of memory written without a proxy fence"},
    "barrier": {"shared race: product after a thread's write"},
    "fence": {"product without a wgmma.fence before it"},
    "wait": {"read of a register that a product still writes"},
    "commit": {"read of a register that a product still writes"},
    "store": {"product of unwritten shared memory"},
    "clear": {"read of an unwritten register"},
}


def test_nothing_is_found_in_a_correct_product():
    assert found(body()) == set()


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_found(name):
    assert found(body(**{name: ""})) >= MISSING[name]


def test_the_last_products_may_be_left_under_way():
    """The first is complete, the second, of other sums, is not."""
    second = re.sub(r"%out(\d+)", lambda m: f"%r{50 + int(m[1])}", product(adds="%p2"))
    lines = f"mov.pred %p2, 0; wgmma.commit_group.sync.aligned;\n{second}\nwgmma.commit_group.sync.aligned;"
    wait = "wgmma.wait_group.sync.aligned 1;"
    never = {"product that no thread waits for"}
    early = {"read of a register that a product still writes"}
    assert found(body(commit=lines, wait=wait)) == never
    assert found(body(commit=lines, wait=f"{wait} mov.b32 %out0, %r50;")) == never | early
    assert found(body(commit=lines, wait="wgmma.wait_group.sync.aligned 2;")) == never | early


def test_operands_in_registers_may_not_be_written_under_way():
    of_registers = product(a=names("in", 4), tail="1, 1, 0")
    write = {"write of a register that a product still reads"}
    assert found(body(product=of_registers, before_wait="mov.b32 %in2, 0;")) == write
    assert found(body(product=of_registers, before_wait="mov.b32 %in4, 0;")) == set()
    assert found(body(product=of_registers, before_wait="mov.b32 %r20, %in2;")) == set()
    assert found(body(product=of_registers, wait="wgmma.wait_group.sync.aligned 0; mov.b32 %in2, 0;")) == set()


def test_sums_may_not_be_written_under_way():
    assert found(body(before_wait="mov.b32 %out2, 0;")) == {"write of a register that a product still writes"}


def test_registers_written_behind_a_fence_are_found():
    """Sums, and operands in registers; a fence for one product is none for what is written after it."""
    written = {"register of a product written without a wgmma.fence"}
    assert found(body(fence="wgmma.fence.sync.aligned; mov.b32 %out2, 0;")) == written
    of_registers = product(a=names("in", 4), tail="1, 1, 0")
    assert found(body(product=of_registers, fence="wgmma.fence.sync.aligned; mov.b32 %in2, 0;")) == written
    between = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; mov.b32 %out2, 0;"
    assert found(body(product=f"{product()} {between} {product()}")) == written
    assert found(body(product=f"{product()} {between} wgmma.fence.sync.aligned; {product()}")) == set()


def test_sums_that_were_read_need_a_fence_before_the_next_product():
    """Operands in registers too; what the products themselves access needs none."""
    wait = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
    read = {"register of a product read without a wgmma.fence"}
    assert found(body(product=f"{product()} {wait} mov.b32 %r20, %out2; {product()}")) == read
    assert (
        found(body(product=f"{product()} {wait} mov.b32 %r20, %out2; wgmma.fence.sync.aligned; {product()}")) == set()
    )
    of_registers = product(a=names("in", 4), tail="1, 1, 0")
    assert found(body(product=f"{of_registers} {wait} {of_registers}")) == set()
    assert found(body(product=f"{of_registers} {wait} mov.b32 %r20, %in2; {of_registers}")) == read


def test_a_product_that_nobody_waits_for_is_found():
    """The sums are not used."""
    never = {"product that no thread waits for"}
    assert found(body(wait="", before_wait="ret;")) == never
    assert found(body(commit="", wait="", before_wait="ret;")) == never


def test_a_factor_that_differs_within_a_group_is_refused():
    with pytest.raises(Refused, match="scale-d that differs within a warp group"):
        found(body().replace("mov.pred %p1, -1;", "setp.lt.u32 %p1, %r1, 5;"))


def test_shared_memory_may_not_be_written_under_way():
    kinds = found(body(before_wait="bar.sync 0; st.shared.b32 [%r10], %r4;"))
    assert "write to shared memory that a product still reads" in kinds
    behind = "wgmma.wait_group.sync.aligned 0; {} st.shared.b32 [%r10], %r4;"
    assert found(body(wait=behind.format("bar.sync 0;"))) == set()
    race = {"shared race: write after another thread's read"}
    assert found(body(wait=behind.format(""))) == race
    # a barrier between the product and its wait orders nothing behind the wait
    assert found(body(before_wait="bar.sync 0;", wait=behind.format(""))) == race


def test_copies_in_flight_are_found():
    copy = "cp.async.cg.shared.global [%r10], [%rd1], 16; cp.async.commit_group; {} fence.proxy.async.shared::cta;"
    aligned = "and.b32 %r10, %r10, 0xffffff0; and.b64 %rd1, %rd1, 0xffffffffffffff0; "
    assert "product of shared memory in flight" in found(body(proxy=aligned + copy.format("")))
    assert found(body(proxy=aligned + copy.format("cp.async.wait_group 0;"))) == set()


UNFENCED = {"product of memory written without a proxy fence"}
FENCE = "fence.proxy.async.shared::cta;"


@pytest.mark.parametrize(
    ("proxy", "barrier", "kinds"),
    [
        # by all that issue it, behind the barrier; by the writers before it
        ("", f"bar.sync 0; {FENCE}", set()),
        ("", f"bar.sync 0; @%p2 {FENCE}", UNFENCED),
        (f"@%p2 {FENCE}", "bar.sync 0;", UNFENCED),
        # a fence of one thread behind one barrier is known to the others behind the next
        ("", f"bar.sync 0; @%p2 {FENCE} bar.sync 0;", set()),
        # or within its warp, which is not all of the group
        ("", f"bar.sync 0; @%p2 {FENCE} bar.warp.sync -1;", UNFENCED),
        ("", f"bar.sync 0; and.b32 %r12, %r1, 31; setp.eq.s32 %p3, %r12, 0; @%p3 {FENCE} bar.warp.sync -1;", set()),
        # what is written behind a fence needs another
        (f"{FENCE} st.shared.b32 [%r10], %r4;", "bar.sync 0;", UNFENCED),
        (f"bar.sync 0; {FENCE} st.shared.b32 [%r10], %r4;", "bar.sync 0;", UNFENCED),
    ],
)
def test_a_proxy_fence_stands_on_the_way_to_the_threads_that_issue(proxy, barrier, kinds):
    assert found(body(proxy=f"setp.eq.s32 %p2, %r1, 0; {proxy}", barrier=barrier)) == kinds


@pytest.mark.parametrize(("fenced", "kinds"), [(128, UNFENCED), (256, set())])
def test_each_group_that_issues_has_come_to_a_fence(fenced, kinds):
    """Two groups multiply what the first has written."""
    a, b = integers(64, 16, seed=1), integers(COLUMNS, 16, seed=2)
    store = [line.replace("%r1,", "%r11,") for line in STORE]
    lines = body(
        store="\n".join([f"and.b32 %r11, %r1, {GROUP - 1};", "setp.lt.u32 %p2, %r1, 128;", *_guarded(store)]),
        proxy="",
        barrier=f"bar.sync 0; setp.lt.u32 %p3, %r1, {fenced}; @%p3 {FENCE}",
    )
    given = np.tile(shared_image(bits_of(a, "bf16"), bits_of(b, "bf16")), (2, 1))
    assert run(lines, given, SUMS, shared_bytes=SHARED)[1].kinds == kinds


@pytest.mark.parametrize("guard", ["", "@%p3 "])
def test_a_fence_before_a_copy_has_come_is_none_for_what_it_brings(guard):
    copy = "and.b32 %r10, %r10, 0xffffff0; and.b64 %rd1, %rd1, 0xffffffffffffff0; setp.lt.u32 %p3, %r1, 127; "
    copy += "cp.async.cg.shared.global [%r10], [%rd1], 16; cp.async.commit_group; {} cp.async.wait_group 0; {}"
    assert found(body(proxy=f"{FENCE} {copy.format(guard + FENCE, '')}")) == UNFENCED
    assert found(body(proxy=copy.format("", FENCE))) == set()


def test_divergent_groups_are_found():
    lines = body(product=f"setp.lt.u32 %p3, %r1, 96; @%p3 {product()}")
    assert "divergent warp group at an instruction of all of it" in found(lines)


def test_descriptors_that_differ_are_found():
    lines = body(fence="cvt.u64.u32 %rd12, %r1; shl.b64 %rd12, %rd12, 32; add.s64 %rd10, %rd10, %rd12; "
                 "wgmma.fence.sync.aligned;")  # fmt: skip
    assert found(lines) == {"descriptor differs within a warp group"}


def test_matrices_beyond_shared_memory_are_faults():
    with pytest.raises(Fault, match="out of bounds"):
        found(body(descriptors=f"mov.b64 %rd10, {descriptor(SHARED - 1024)}; mov.b64 %rd11, {descriptor(0)};"))


def test_reserved_bits_of_descriptors_are_refused():
    with pytest.raises(Refused, match="reserves"):
        found(body(descriptors=f"mov.b64 %rd10, {descriptor(0) | 1 << 46}; mov.b64 %rd11, {descriptor(0)};"))


@pytest.mark.parametrize(
    ("wanted", "other"),
    [
        ("m64n32k16", "m64n20k16"),
        ("f32.bf16", "f16.bf16"),
        ("bf16.bf16", "bf16.f16"),
        ("1, 1, 0, 0", "-1, 1, 0, 0"),
        ("1, 1, 0, 0", "1, 1, 0"),
        ("1, 1, 0, 0", "1, 1, 2, 0"),
        ("%out15}", "%out15, %out16}"),
        ("sync.aligned", "aligned"),
        ("bf16 ", "bf16.satfinite "),
        ("wait_group.sync.aligned 0", "wait_group.sync.aligned %r1"),
        ("fence.sync.aligned", "fence.aligned"),
        ("async.shared::cta", "async.shared::cluster"),
    ],
)
def test_other_instructions_are_refused(wanted, other):
    assert wanted in body()
    with pytest.raises(Refused, match=r"wgmma|fence"):
        Program(text(body().replace(wanted, other), WORDS, SUMS, GROUP))


def test_blocks_of_part_of_a_group_are_refused():
    with pytest.raises(Refused, match="96 threads"):
        Program(text(body(), WORDS, SUMS, 96))
