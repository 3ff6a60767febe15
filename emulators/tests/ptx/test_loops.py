"""A block is taken for a loop without a step only where it is one."""

from __future__ import annotations

import pytest
from hand_written.ptx import kernel

from gpu_emulators.ptx.loops import only_goes_to, replaces_a_loop
from gpu_emulators.ptx.parser import parse

SUMS = "mov.b32 %r1, 0; mov.b32 %r2, %r1;"
STEP = "add.s32 %r1, %r1, %r70; add.s32 %r2, %r2, 3;"
LOOP = """
    setp.eq.s32 %p1, %r71, 0;
    @!%p1 bra $L__BB0_2;
    {instead}
    bra.uni $L__BB0_4;
$L__BB0_2:
    mov.b32 %r1, 0; mov.b32 %r2, 0; mov.b32 %r3, 0;
$L__BB0_3:
    {step} add.s32 %r3, %r3, 1;
    setp.lt.s32 %p2, %r3, %r71;
    @%p2 bra $L__BB0_3;
    {left}
$L__BB0_4:
    st.global.b32 [%rd0], %r1; st.global.b32 [%rd0+4], %r2; ret;
"""
COPIES = "mov.b32 %r1, %r4; mov.b32 %r2, %r5;"
ELSEWHERE = "add.s32 %r4, %r70, 1; add.s32 %r5, %r70, 3;"


def replaces(instead: str, step: str = STEP, left: str = "", text: str = LOOP) -> bool:
    return replaces_a_loop(parse(kernel(text.format(instead=instead, step=step, left=left))), 1)


def test_sums_of_zero_in_place_of_a_loop():
    assert replaces(SUMS)
    assert replaces(f"and.b32 %r9, %r70, 3; {SUMS}")
    # the loop has them in other registers
    assert replaces(SUMS, ELSEWHERE, COPIES)


def test_zeros_that_stand_behind_the_loop():
    """As older compilers have it, with a block that only goes there."""
    text = LOOP.replace("{instead}\n    bra.uni $L__BB0_4;", "bra.uni $L__BB0_1;").replace(
        "$L__BB0_4:\n", "bra.uni $L__BB0_4;\n$L__BB0_1:\n    {instead}\n$L__BB0_4:\n"
    )
    of = parse(kernel(text.format(instead=SUMS, step=STEP, left="")))
    zeros = only_goes_to(of, 1)
    assert replaces_a_loop(of, zeros) and not replaces_a_loop(of, 1)
    # the way out of the loop is another one, unless it does more
    assert [only_goes_to(of, number) is not None for number in range(len(of.blocks))].count(True) == 2
    more = parse(kernel(text.format(instead=SUMS, step=STEP, left="mov.b32 %r9, 0;")))
    assert [only_goes_to(more, number) is not None for number in range(len(more.blocks))].count(True) == 1


@pytest.mark.parametrize(
    "instead",
    [
        "mov.b32 %r1, 0; mov.b32 %r2, 1;",
        "mov.b32 %r1, 0; add.s32 %r2, %r70, 1;",
        "mov.b32 %r1, %r70; mov.b32 %r2, 0;",
        f"{SUMS} add.s32 %r2, %r2, 1;",
        f"{SUMS} st.global.b32 [%rd0+8], %r1;",
        "add.s32 %r9, %r70, 1; mov.b32 %r8, 0;",
    ],
)
def test_other_blocks_in_place_of_a_loop(instead):
    assert not replaces(instead)


def test_the_other_way_of_a_branch_is_none():
    assert not replaces(SUMS, text=LOOP.replace("@%p2 bra $L__BB0_3;", ""))
    inside = (
        "$L__BB0_1: setp.eq.s32 %p1, %r70, 0; @!%p1 bra $L__BB0_2; {instead} $L__BB0_2: {step} @%p2 bra $L__BB0_1; ret;"
    )
    assert not replaces(SUMS, text=inside)
