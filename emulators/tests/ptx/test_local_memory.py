"""Memory of each thread's own, and generic addresses, on the PTX emulator."""

from __future__ import annotations

import numpy as np
import pytest
from hand_written.ptx import Run, kinds

from gpu_emulators.ptx import Fault

# %r60 is the stack's address, %rd60 its generic one
STACK = """
    .local .align 8 .b8 before[3];
    .local .align 8 .b8 stack[16];
    mov.b32 %r60, stack;
    cvt.u64.u32 %rd60, %r60;
    cvta.local.u64 %rd60, %rd60;
"""
# %rd61 is the place of the thread's word in the first array
OWN_WORD = "mad.wide.u32 %rd61, %r72, 4, %rd0;"


@pytest.mark.parametrize("stored", ["st.local.b32 [%r60+4], %r72;", "st.b32 [%rd60+4], %r72;"])
@pytest.mark.parametrize("loaded", ["ld.local.b32 %r1, [%r60+4];", "ld.b32 %r1, [%rd60+4];"])
def test_each_thread_reads_what_it_has_stored(stored, loaded):
    result = np.zeros(192, np.uint32)
    run = Run(f"{STACK} {stored} {loaded} {OWN_WORD} st.global.b32 [%rd61], %r1; ret;", result, threads=64, ctas=3)
    assert not run.findings, run.findings
    assert np.array_equal(result, np.arange(192))


def test_bytes_are_put_together_in_their_order():
    result = np.zeros(32, np.uint32)
    pieces = "".join(
        f"add.u32 %r{k}, %r70, {k};\n cvt.u16.u32 %rs{k}, %r{k};\n st.b8 [%rd60+{k}], %rs{k};\n" for k in range(4)
    )
    run = Run(
        f"{STACK} {pieces} ld.v2.b16 {{%rs5, %rs6}}, [%rd60]; mov.b32 %r9, {{%rs5, %rs6}};"
        f"{OWN_WORD} st.b32 [%rd61], %r9; ret;",
        result,
    )
    assert not run.findings, run.findings
    expected = (np.arange(32)[:, None] + np.arange(4)).astype(np.uint8).view(np.uint32)[:, 0]
    assert np.array_equal(result, expected)


def test_threads_of_one_access_may_take_different_memories():
    source, result = np.arange(100, 132, dtype=np.uint32), np.zeros(32, np.uint32)
    body = f"""
        {STACK} {OWN_WORD}
        setp.lt.u32 %p1, %r70, 10;
        st.local.b32 [%r60], %r70;
        selp.b64 %rd62, %rd60, %rd61, %p1;
        ld.b32 %r1, [%rd62];
        mad.wide.u32 %rd63, %r70, 4, %rd1;
        setp.lt.u32 %p2, %r70, 20;
        @%p2 st.b32 [%rd63], %r1;
        @%p1 st.b32 [%rd62], %r1;
        ret;
    """
    assert not Run(body, source, result).findings
    expected = np.where(np.arange(32) < 10, np.arange(32), source)
    expected[20:] = 0
    assert np.array_equal(result, expected)
    assert np.array_equal(source, np.arange(100, 132))


def test_what_is_read_before_it_is_written_is_found():
    for access in ("ld.local.b64 %rd1, [%r60];", "ld.b64 %rd1, [%rd60];"):
        body = f"{STACK} st.local.b32 [%r60], %r70; {access} ret;"
        assert kinds(body, np.zeros(1, np.uint32)) == {"read of unwritten local memory"}


def test_programs_of_generic_addresses_race_in_global_memory():
    found = kinds("st.b32 [%rd0], %r71; ret;", np.zeros(1, np.uint32), ctas=2)
    assert found
    assert found == kinds("st.global.b32 [%rd0], %r71; ret;", np.zeros(1, np.uint32), ctas=2)


@pytest.mark.parametrize(
    ("access", "told"),
    [
        ("st.local.b32 [%r60+16], %r70;", "out of bounds of 24 bytes of local memory at 24"),
        ("ld.b32 %r1, [%rd60+16];", "out of bounds of 24 bytes of local memory at 24"),
        # addresses of shared memory are none of local memory
        ("st.local.b32 [global_smem], %r70;", "out of bounds of 24 bytes of local memory"),
        ("st.shared.b32 [%r60], %r70;", "out of bounds of 64 bytes of shared memory"),
        ("st.b64 [%rd60+4], %rd0;", "misaligned access of 8 bytes of local memory"),
        ("ld.local.b32 %r1, [%r60+-12];", "out of bounds of 24 bytes of local memory"),
        ("ld.b32 %r1, [%rd60+-12];", "out of bounds of global memory"),
    ],
)
def test_places_that_are_not_the_threads_own(access, told):
    with pytest.raises(Fault, match=told):
        Run(f"{STACK} {access} ret;", np.zeros(1, np.uint32), shared=64)
