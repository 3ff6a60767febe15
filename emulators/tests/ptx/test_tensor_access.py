"""Warps that allocate, load and store tensor memory, in hand-written PTX."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hand_written.matrix_programs import run

from gpu_emulators.ptx import Fault
from gpu_emulators.ptx.matrix import tensor_access

STORED = """
    mov.b32 %out0, 0; setp.lt.u32 %p2, %r1, 128;
    setp.lt.u32 %p1, %r1, 32;
    @%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r4], 32;
    bar.sync 0;
    ld.shared.b32 %r20, [%r4];
    shr.u32 %r21, %r1, 5; and.b32 %r21, %r21, 3; shl.b32 %r21, %r21, 21; add.s32 %r21, %r21, %r20;
    BODY
    bar.sync 0;
    @%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r20, 32;
"""
# of the first four warps, and of the other four, which reach the same lanes
ST, LD = (
    f"@%p2 tcgen05.{access}; @%p2 tcgen05.wait::{access[:2]}.sync.aligned; "
    for access in ("st.sync.aligned.32x32b.x1.b32 [%r21], {%r1}", "ld.sync.aligned.32x32b.x1.b32 {%r30}, [%r21]")
)
OTHER_ST, OTHER_LD = (lines.replace("@%p2", "@!%p2") for lines in (ST, LD))


def kinds_of_words(lines, threads=256):
    given = np.zeros((threads, 1), np.uint32)
    return run(STORED.replace("BODY", lines), given, 1, shared_bytes=16, target="sm_100a")[1].kinds


def test_readers_of_several_warps_are_met_before_a_write():
    race = {"tensor memory race: write after another warp's read"}
    assert kinds_of_words(f"{ST} bar.sync 0; {LD} {OTHER_LD} {OTHER_ST}") == race
    assert kinds_of_words(f"{ST} bar.sync 0; {OTHER_LD} {LD} {OTHER_ST}") == race
    assert kinds_of_words(f"{ST} bar.sync 0; {LD} {OTHER_LD} bar.sync 0; {OTHER_ST}") == set()
    both = LD.replace("@%p2 ", "")
    assert kinds_of_words(f"{ST} bar.sync 0; {both} {OTHER_ST}") == race


def test_threads_of_one_store_that_write_different_values():
    different = {"threads of one store write different values to tensor memory"}
    both = ST.replace("@%p2 ", "")
    assert kinds_of_words(both) == different
    assert kinds_of_words(both, 128) == set()
    assert kinds_of_words(both.replace("32x32b.x1.b32 [%r21]", "16x32bx2.x1.b32 [%r21], 0"), 128) == different
    assert kinds_of_words(both.replace("32x32b.x1.b32 [%r21]", "16x32bx2.x1.b32 [%r21], 1"), 128) == set()


def test_registers_that_are_loaded_are_used_behind_the_wait():
    load, wait, _ = LD.replace("@%p2 ", "").split(";")
    reads, writes = (f"{verb} of a register that a load of tensor memory still writes" for verb in ("read", "write"))
    uses = {"mov.b32 %out0, %r30;": reads, "mov.b64 %rd30, {%r1, %r30};": reads, "mov.b32 %r30, 1;": writes}
    for use, kind in uses.items():
        assert kinds_of_words(f"{ST} bar.sync 0; {load}; {use} {wait};", 128) == {kind}
        assert kinds_of_words(f"{ST} bar.sync 0; {load}; {wait}; {use}", 128) == set()
        # by a warp that has waited, while others have not
        some = f"setp.lt.u32 %p5, %r1, 32; @%p5 {wait}; @%p5 {use} {wait};"
        assert kinds_of_words(f"{ST} bar.sync 0; {load}; {some}", 128) == set()


def test_memory_is_given_up_and_given_again():
    """Two allocations of different columns; what is released is free for the next, and unwritten."""
    lines = """
    mov.pred %p1, -1;
    tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r4], 256;
    tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r4+4], 256;
    bar.sync 0;
    ld.shared.v2.b32 {%out0, %out1}, [%r4];
    tcgen05.st.sync.aligned.32x32b.x1.b32 [%out0], {%r1};
    tcgen05.wait::st.sync.aligned;
    tcgen05.dealloc.cta_group::1.sync.aligned.b32 %out0, 256;
    bar.sync 0;
    tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r4], 128;
    bar.sync 0;
    ld.shared.b32 %out2, [%r4];
    NEXT
    tcgen05.dealloc.cta_group::1.sync.aligned.b32 %out2, 128;
    tcgen05.dealloc.cta_group::1.sync.aligned.b32 %out1, 256;
    """
    given = np.zeros((32, 1), np.uint32)
    got, findings = run(lines.replace("NEXT", ""), given, 3, shared_bytes=16, target="sm_100a")
    assert got[0].tolist() == [0, 256, 0]
    assert not findings
    load = "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r20}, [%out2]; tcgen05.wait::ld.sync.aligned;"
    _, findings = run(lines.replace("NEXT", load), given, 3, shared_bytes=16, target="sm_100a")
    assert findings.kinds == {"read of unwritten tensor memory"}
    more = "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r4+8], 256;"
    with pytest.raises(Fault, match="waits for ever"):
        run(lines.replace("NEXT", more), given, 3, shared_bytes=16, target="sm_100a")


@pytest.mark.parametrize("shape", tensor_access.SHAPES)
def test_what_threads_hold_of_a_shape(shape):
    """Figures "Matrix fragment for shape" of the ISA."""
    lanes, columns = tensor_access.of_thread(shape, 8, 64)
    for thread, i in itertools.product(range(32), range(8)):
        lane, column = {
            "32x32b": (thread, i),
            "16x32bx2": (thread % 16, i + (64 if thread >= 16 else 0)),
            "16x256b": (thread // 4 + (8 if i % 4 >= 2 else 0), thread % 4 * 2 + i % 2 + i // 4 * 8),
        }[shape]
        assert (lanes[thread, i], columns[thread, i]) == (lane, column)
