"""Copies that a thread begins and waits for later, cp.async, on the PTX emulator."""

from __future__ import annotations

import numpy as np
import pytest
from hand_written.ptx import Run, kinds

from gpu_emulators.ptx import Fault

NOTHING: set[str] = set()
AFTER_WRITE = "shared race: read after another thread's write"
AFTER_READ = "shared race: write after another thread's read"

COPY = """
        shl.b32 %r2, %r70, 4;
        cvt.u64.u32 %rd9, %r2;
        add.s64 %rd2, %rd0, %rd9;
        cp.async.cg.shared.global [%r2], [%rd2], 16{size};
        cp.async.commit_group;
        {wait}
        ld.shared.b32 %r1, [%r2+12];
        mad.wide.u32 %rd3, %r70, 4, %rd1;
        st.global.b32 [%rd3], %r1;
        ret;
"""


def copied(wait, size="", **options):
    source, result = np.arange(128, dtype=np.uint32), np.zeros(32, np.uint32)
    run = Run(COPY.format(wait=wait, size=size), source, result, shared=512, **options)
    return run.findings.kinds, result


def test_a_copy_is_there_when_it_was_waited_for():
    found, result = copied("cp.async.wait_group 0;")
    assert found == NOTHING and np.array_equal(result, np.arange(32) * 4 + 3)
    found, result = copied("cp.async.wait_all;")
    assert found == NOTHING and np.array_equal(result, np.arange(32) * 4 + 3)


def test_a_copy_that_is_not_waited_for():
    in_flight = {"read of shared memory in flight", "copy that no thread waits for"}
    for wait in ("", "cp.async.wait_group 1;", "bar.sync 0;"):
        found, result = copied(wait)
        assert found == in_flight, wait
        # neither what was there before, nor what is to come
        assert not np.isin(result, np.arange(128)).any()


def test_the_last_groups_may_stay_under_way():
    body = COPY.replace(
        "{wait}", COPY.split("\n")[4].replace("[%r2]", "[%r2+512]") + "\n cp.async.commit_group;\n {wait}"
    )
    source = np.arange(128, dtype=np.uint32)
    for pending, found in ((1, {"copy that no thread waits for"}), (0, NOTHING)):
        wait = f"cp.async.wait_group {pending};"
        assert kinds(body.format(wait=wait, size=""), source, np.zeros(32, np.uint32), shared=1024) == found


def test_a_copy_of_nothing_gives_zeros_and_reads_nothing():
    found, result = copied("cp.async.wait_group 0;", size=", 0")
    assert found == NOTHING and not result.any()
    body = COPY.format(wait="cp.async.wait_group 0;", size=", %r5")
    half = f"setp.lt.u32 %p1, %r70, 16;\n selp.b32 %r5, 16, 0, %p1;\n{body}"
    result = np.ones(32, np.uint32)
    assert kinds(half, np.arange(64, dtype=np.uint32), result, shared=512) == NOTHING
    assert np.array_equal(result, np.where(np.arange(32) < 16, np.arange(32) * 4 + 3, 0))
    with pytest.raises(Fault, match="out of bounds of global"):
        Run(COPY.format(wait="", size=""), np.arange(64, dtype=np.uint32), result, shared=512)


def test_what_is_waited_for_is_ordered_for_the_own_thread_alone():
    body = COPY.replace("[%r2+12]", "[%r4]").replace("{wait}", "{wait}\n xor.b32 %r4, %r2, 16;")
    arrays = (np.arange(128, dtype=np.uint32), np.zeros(32, np.uint32))
    wait = "cp.async.wait_group 0;"
    assert kinds(body.format(wait=wait, size=""), *arrays, shared=512) == {AFTER_WRITE}
    assert kinds(body.format(wait=f"{wait} bar.sync 0;", size=""), *arrays, shared=512) == NOTHING
    assert AFTER_WRITE not in kinds(
        body.format(wait=f"bar.sync 0; {wait} bar.warp.sync -1;", size=""), *arrays, shared=512
    )


def test_writes_to_where_a_copy_goes():
    body = COPY.format(wait="st.shared.b32 [%r2], %r70; cp.async.wait_group 0;", size="")
    arrays = (np.arange(128, dtype=np.uint32), np.zeros(32, np.uint32))
    assert kinds(body, *arrays, shared=512) == {"write to shared memory in flight"}
    twice = COPY.split("\n")[4].format(size="")
    body = COPY.format(wait=f"{twice} cp.async.commit_group; cp.async.wait_group 0;", size="")
    assert kinds(body, *arrays, shared=512) == {"write to shared memory in flight"}
    # over what others still read
    written = "shl.b32 %r2, %r70, 4;\n st.shared.b32 [%r2], 0;\n bar.sync 0;\n"
    read = f"{written} xor.b32 %r6, %r2, 16;\n ld.shared.b32 %r7, [%r6];\n"
    assert kinds(read + COPY.format(wait="cp.async.wait_group 0;", size=""), *arrays, shared=512) == {AFTER_READ}


@pytest.mark.parametrize(("source", "found"), [("%rd2", True), ("%rd0", False)])
def test_threads_of_one_copy_that_bring_different_values(source, found):
    body = f"""
        mad.wide.u32 %rd2, %r70, 16, %rd0;
        mov.b32 %r3, 0;
        cp.async.cg.shared.global [%r3], [{source}], 16;
        cp.async.wait_all;
        ret;
    """
    different = {"threads of one copy bring different values to shared memory"}
    assert kinds(body, np.arange(128, dtype=np.uint32), shared=16) == (different if found else NOTHING)


@pytest.mark.parametrize(
    ("store", "found"),
    [
        ("st.global.b32 [%rd2], %r70; cp.async.wait_all;", True),
        ("st.global.b32 [%rd2+8], %r70; cp.async.wait_all;", False),
        ("bar.sync 0; st.global.b32 [%rd5], %r70; cp.async.wait_all;", True),
        ("cp.async.wait_all; st.global.b32 [%rd2], %r70;", False),
        ("st.global.b32 [%rd1], 3; cp.async.wait_all;", False),
    ],
)
def test_the_source_of_a_copy_may_not_be_written_before_its_wait(store, found):
    """Threads copy 8 bytes each; %rd5 is where the next thread copies from."""
    body = f"""
        shl.b32 %r2, %r70, 4;
        cvt.u64.u32 %rd9, %r2;
        add.s64 %rd2, %rd0, %rd9;
        xor.b64 %rd9, %rd9, 16;
        add.s64 %rd5, %rd0, %rd9;
        cp.async.cg.shared.global [%r2], [%rd2], 16, 8;
        {store}
        ret;
    """
    kind = {"write to global memory that a copy still reads"}
    assert kinds(body, np.arange(128, dtype=np.uint32), np.arange(64, dtype=np.uint32), shared=512) == (
        kind if found else NOTHING
    )


def test_a_misaligned_copy_is_a_fault():
    for old in ("[%r2]", "[%rd2]"):
        body = COPY.format(wait="", size="").replace(f"{old}, " if old == "[%r2]" else f"{old},", f"{old[:-1]}+8],", 1)
        with pytest.raises(Fault, match="misaligned copy of 16 bytes"):
            Run(body, np.arange(132, dtype=np.uint32), np.zeros(32, np.uint32), shared=1024)
