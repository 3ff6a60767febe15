"""Registers that are packed, computed with and unpacked where a part of them was never written, on the PTX emulator."""

from __future__ import annotations

import numpy as np
import pytest
from hand_written.ptx import Run, kinds

NOTHING: set[str] = set()
UNWRITTEN, OF_SOME = "read of an unwritten register", "read of a register that some threads have not written"
# %rd2 is a thread's place, %r2 a float, %r1 is never written
HALF = """
    mad.wide.u32 %rd2, %r70, 8, %rd0;
    cvt.rn.f32.u32 %r2, %r70;
    mov.b64 %rd4, {%r2, %r2};
    mov.b64 %rd5, {%r2, %r1};
"""
# the same with some threads' own half: those below 5 have written it
OF_FIVE = HALF.replace("mov.b64 %rd5", "setp.lt.u32 %p1, %r70, 5;\n @%p1 mov.b32 %r1, 0;\n mov.b64 %rd5")
WAYS = ["", *(f"{ins} %rd5;" for ins in ("add.rn.f32x2 %rd5, %rd4,", "fma.rn.f32x2 %rd5, %rd5, %rd4,"))]
WRITES_ALL = "st.global.b64 [%rd2], %rd5;"


def found(body):
    return kinds(f"{body}\n ret;", np.zeros(64, np.uint32))


@pytest.mark.parametrize(
    ("between", "factor"),
    [
        ("mov.b64 {%r3, _}, %rd5;", 1),
        ("mov.b64 {%r3, %r4}, %rd5;", 1),
        ("mov.b64 {%rs1, %rs2, _, _}, %rd5;\n mov.b32 %r3, {%rs1, %rs2};", 1),
        ("mov.b64 {%r3, %r4}, %rd5;\n mov.b64 %rd6, {%r4, %r3};\n mov.b64 {_, %r3}, %rd6;", 1),
        ("add.rn.f32x2 %rd6, %rd5, %rd4;\n mov.b64 {%r3, _}, %rd6;", 2),
        ("add.rn.f32x2 %rd5, %rd4, %rd5;\n add.rn.f32x2 %rd5, %rd5, %rd4;\n mov.b64 {%r3, %r4}, %rd5;", 3),
        ("sub.rn.f32x2 %rd6, %rd4, %rd5;\n add.rn.f32x2 %rd6, %rd5, %rd6;\n mov.b64 {%r3, _}, %rd6;", 1),
        ("fma.rn.f32x2 %rd6, %rd4, 0, %rd5;\n mov.b64 {%r3, _}, %rd6;", 1),
        ("mul.rn.f32x2 %rd6, %rd5, 0x4000000040000000;\n mov.b64 {%r3, _}, %rd6;", 2),
        ("cvt.u32.u64 %r3, %rd5;", 1),
        # written again as a whole, and as a half
        ("mov.b64 %rd5, %rd4;\n add.s64 %rd6, %rd5, 0;\n mov.b64 {_, %r3}, %rd6;", 1),
        ("mov.b64 {%r3, %r4}, %rd5;\n mov.b32 %r4, %r2;\n add.rn.f32 %r3, %r3, %r4;", 2),
    ],
)
def test_a_half_that_is_thrown_away(between, factor):
    values = np.zeros(64, np.float32)
    run = Run(f"{HALF} {between}\n st.global.b32 [%rd2], %r3;\n ret;", values)
    assert not run.findings, run.findings
    assert np.array_equal(values[::2], np.arange(32) * factor)


USES = [
    "st.global.b32 [%rd2], %r4;",
    "st.global.v2.b32 [%rd2], {%r3, %r4};",
    "add.rn.f32 %r5, %r4, %r3;",
    "mov.b32 %r5, %r4;",
    "setp.lt.f32 %p2, %r3, %r4;",
    "shfl.sync.idx.b32 %r5, %r4, 0, 31, -1;",
    "mov.b64 %rd7, {%r3, %r4};\n st.global.b64 [%rd2], %rd7;",
    "mov.b64 %rd7, {%r4, %r3};\n cvt.u32.u64 %r5, %rd7;\n add.s32 %r6, %r5, 1;",
]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("way", WAYS)
def test_a_half_that_is_used(way, use):
    assert found(f"{HALF} {way} mov.b64 {{%r3, %r4}}, %rd5; {use}") == {UNWRITTEN}
    assert found(f"{HALF} {way} mov.b64 {{%r3, %r4}}, %rd4; {use}") == NOTHING
    assert found(f"{HALF} {way} mov.b64 {{%r3, %r4}}, %rd9; {use}") == {UNWRITTEN}


@pytest.mark.parametrize(
    "use",
    [
        WRITES_ALL,
        "st.global.b32 [%rd2], %rd5;",
        "mov.b64 %rd6, %rd5;",
        "add.s64 %rd6, %rd5, 1;",
        "setp.eq.s64 %p2, %rd5, 1;",
        "cvt.rn.f32.u64 %r3, %rd5;",
    ],
)
def test_a_register_that_is_used_whole(use):
    run = Run(f"{HALF} {use}\n ret;", np.zeros(64, np.uint32))
    assert {(one.kind, one.detail) for one in run.findings} == {(UNWRITTEN, "bits 0xffffffff00000000 of %rd5")}


def test_parts_of_16_bits():
    pair = "mov.b16 %rs1, 0;\n mov.b32 %r3, {%rs2, %rs1};\n add.rn.bf16x2 %r4, %r3, %r3;\n mov.b32 {%rs3, %rs4}, %r4;"
    assert found(f"{pair} mov.b16 %rs5, %rs4;") == NOTHING
    assert found(f"{pair} mov.b16 %rs5, %rs3;") == {UNWRITTEN}
    assert found(f"{pair} add.s32 %r4, %r4, 1;") == {UNWRITTEN}
    # of each float of two, a bit is enough
    both = f"{pair} mov.b64 %rd5, {{%r4, %r70}};\n add.rn.f32x2 %rd6, %rd5, %rd5;\n"
    assert found(f"{both} mov.b64 {{_, _, %rs5, _}}, %rd6;\n mov.b16 %rs6, %rs5;") == NOTHING
    assert found(f"{both} mov.b64 {{_, %rs5, _, _}}, %rd6;\n mov.b16 %rs6, %rs5;") == {UNWRITTEN}


@pytest.mark.parametrize("logic", ["and", "or", "xor"])
def test_logic_of_parts(logic):
    pair = f"mov.b16 %rs1, 3;\n mov.b32 %r3, {{%rs2, %rs1}};\n {logic}.b32 %r4, %r3, %r70;\n"
    assert found(f"{pair} mov.b32 {{_, %rs3}}, %r4;\n mov.b16 %rs5, %rs3;") == NOTHING
    assert found(f"{pair} mov.b32 {{%rs3, _}}, %r4;\n mov.b16 %rs5, %rs3;") == {UNWRITTEN}
    assert found(f"{pair} add.s32 %r5, %r4, 1;") == {UNWRITTEN}


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_comparisons_of_parts(kind):
    """The predicate of what is undefined is so itself."""
    pair = f"mov.b16 %rs1, 3;\n mov.b32 %r3, {{%rs2, %rs1}};\n setp.le.{kind} %p1|%p2, %r3, %r3;\n"
    assert found(f"{pair} selp.b32 %r4, 1, 0, %p2;\n @%p2 mov.b32 %r5, 0;") == NOTHING
    for use in ("selp.b32 %r4, 1, 0, %p1;", "@%p1 mov.b32 %r5, 0;", "and.pred %p3, %p1, %p2;"):
        assert found(f"{pair} {use}") == {UNWRITTEN}
    assert found(f"{pair} setp.eq.s32 %p1, %r70, 0;\n @%p1 mov.b32 %r5, 0;") == NOTHING


@pytest.mark.parametrize("way", WAYS)
def test_halves_are_followed_by_thread(way):
    unpacked = f"{OF_FIVE} {way} mov.b64 {{_, %r3}}, %rd5;"
    assert found(f"{unpacked} add.rn.f32 %r4, %r3, %r3;") == {OF_SOME}
    assert found(f"{unpacked} @%p1 add.rn.f32 %r4, %r3, %r3;") == NOTHING
    assert found(f"{unpacked} @!%p1 add.rn.f32 %r4, %r3, %r3;") == {UNWRITTEN}
    assert found(f"{OF_FIVE} {way} {WRITES_ALL}") == {OF_SOME}
    assert found(f"{OF_FIVE} {way} @%p1 {WRITES_ALL}") == NOTHING


def test_threads_that_write_a_register_define_it_for_themselves():
    five = f"{HALF} setp.lt.u32 %p1, %r70, 5;\n"
    assert found(f"{five} @%p1 mov.b64 %rd5, %rd4;\n {WRITES_ALL}") == {OF_SOME}
    assert found(f"{five} @%p1 mov.b64 %rd5, %rd4;\n @%p1 {WRITES_ALL}") == NOTHING
    assert found(f"{five} @%p1 mov.b64 %rd5, %rd4;\n @!%p1 mov.b64 %rd5, %rd4;\n {WRITES_ALL}") == NOTHING
    # and those that pack it leave that of the others as it was
    some = f"{five} mov.b64 %rd6, %rd4;\n @%p1 mov.b64 %rd6, {{%r2, %r1}};"
    assert found(f"{some} st.global.b64 [%rd2], %rd6;") == {OF_SOME}
    assert found(f"{some} @!%p1 st.global.b64 [%rd2], %rd6;") == NOTHING
    assert found(f"{five} @%p1 mov.b64 %rd6, {{%r2, %r1}};\n @%p1 mov.b64 {{%r3, _}}, %rd6;") == NOTHING
    both = "@!%p1 mov.b64 %rd6, {%r1, %r2};\n @%p1 mov.b64 %rd6, {%r2, %r1};\n mov.b64 {%r3, %r4}, %rd6;"
    assert found(f"{five} {both} @%p1 mov.b32 %r5, %r3;\n @!%p1 mov.b32 %r5, %r4;") == NOTHING
    assert found(f"{five} {both} mov.b32 %r5, %r3;") == {OF_SOME}
