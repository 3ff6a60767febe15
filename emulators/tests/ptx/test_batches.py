"""CTAs that run together on the PTX emulator leave nothing behind."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from hand_written.ptx import kernel

from gpu_emulators.ptx import Findings, GlobalMemory, Program, program

THREADS, CTAS = 128, 3

BODIES = {
    "copies": """
        shl.b32 %r1, %r70, 2;
        cp.async.ca.shared.global [%r1], [%rd0], 4;
        cp.async.wait_all;
        ld.shared.b32 %r2, [%r1];
    """,
    "products": "wgmma.fence.sync.aligned; wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;",
    "tensor memory": """
        setp.lt.u32 %p1, %r70, 32;
        setp.eq.s32 %p2, %r70, 0;
        @%p2 mbarrier.init.shared::cta.b64 [global_smem+8], 1;
        @%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [global_smem], 32;
        bar.sync 0;
        ld.shared.b32 %r1, [global_smem];
        @%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r1, 32;
    """,
}


@pytest.fixture
def living(monkeypatch):
    """How many batches and memories of CTAs there are whenever one is made, without the garbage collector."""
    made, counts = [], []

    def count():
        counts.append(sum(one() is not None for one in made))
        return counts

    def remembered(part):
        def make(*arguments):
            count()
            one = part(*arguments)
            made.append(weakref.ref(one))
            return one

        return make

    for name in ("Batch", "SharedMemory"):
        monkeypatch.setattr(program, name, remembered(getattr(program, name)))
    gc.disable()
    yield count
    gc.enable()


@pytest.mark.parametrize("name", BODIES)
def test_batches_are_gone_when_the_next_one_begins(living, name):
    memory, findings = GlobalMemory(), Findings()
    memory.register(1 << 12, np.zeros(4, np.uint8), "array")
    program = Program(kernel(f"{BODIES[name]} ret;", threads=THREADS))
    program.launch((CTAS, 1, 1), [1 << 12], 1024, memory, findings, threads=THREADS)
    # shared memory is made first, then its batch; nothing is left
    assert living() == [0, 1] * CTAS + [0]
    assert not findings
