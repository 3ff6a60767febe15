"""Loops, branches, ends and barriers on the PTX emulator, by kernels written by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hand_written.ptx import Run, kernel, kinds

from gpu_emulators.ptx import Fault, Findings, GlobalMemory, Program, Refused, control, registry

STORE = "mad.wide.u32 %rd9, %r72, 4, %rd0;\n st.global.b32 [%rd9], %r1;\n ret;"


def stored(body, threads=64, ctas=3, **options):
    """%r1 of each thread."""
    result = np.zeros(threads * ctas, np.uint32)
    run = Run(body + STORE, result, threads=threads, ctas=ctas, **options)
    assert not run.findings, run.findings
    return result


THREAD = np.arange(64 * 3) % 64
BOTH = np.arange(64 * 3)


def test_each_thread_leaves_a_loop_when_it_is_done():
    body = """
        mov.b32 %r1, 0;
        mov.b32 %r2, 0;
    $L__loop:
        add.s32 %r1, %r1, %r2;
        add.s32 %r2, %r2, 1;
        setp.le.u32 %p1, %r2, %r70;
        @%p1 bra $L__loop;
    """
    assert np.array_equal(stored(body), THREAD * (THREAD + 1) // 2)


def test_branches_inside_of_branches_meet_again():
    body = """
        mov.b32 %r1, 1;
        and.b32 %r2, %r70, 1;
        and.b32 %r3, %r70, 2;
        setp.eq.s32 %p1, %r2, 0;
        setp.eq.s32 %p2, %r3, 0;
        @%p1 bra $L__even;
        @%p2 bra $L__one;
        mov.b32 %r1, 30;
        bra.uni $L__odd;
    $L__one:
        mov.b32 %r1, 10;
    $L__odd:
        add.s32 %r1, %r1, 1;
        bra $L__end;
    $L__even:
        @!%p2 bra $L__two;
        mov.b32 %r1, 0;
        bra $L__end;
    $L__two:
        mov.b32 %r1, 20;
    $L__end:
        shfl.sync.idx.b32 %r4, %r1, 3, 31, -1;
        add.s32 %r1, %r1, %r4;
    """
    # that the branch in the middle is said to be uniform, and is not, is found below
    body = body.replace("bra.uni", "bra")
    assert np.array_equal(stored(body), np.array([0, 11, 20, 31])[THREAD % 4] + 31)


def test_loops_inside_of_loops():
    body = """
        mov.b32 %r1, 0;
        mov.b32 %r2, 0;
    $L__outer:
        mov.b32 %r3, 0;
    $L__inner:
        add.s32 %r1, %r1, 1;
        add.s32 %r3, %r3, 1;
        setp.lt.u32 %p1, %r3, %r2;
        @%p1 bra $L__inner;
        add.s32 %r2, %r2, 1;
        setp.lt.u32 %p2, %r2, %r70;
        @%p2 bra $L__outer;
    """
    expected = [sum(max(k, 1) for k in range(max(t, 1))) for t in THREAD]
    assert np.array_equal(stored(body), expected)


def test_instructions_are_counted():
    """Blocks end at what is gone to as well, without an instruction for it."""
    body = """
        setp.eq.s32 %p1, %r70, 99;
        @%p1 bra over;
        mov.b32 %r1, 1;
    over:
        ret;
    """
    run = Run(body, np.zeros(1, np.uint32))
    assert run.executed == len(list(run.program.kernel.instructions()))


def test_a_thread_that_has_ended_does_nothing_more():
    body = """
        setp.ge.u32 %p1, %r70, 40;
        mov.b32 %r1, 7;
        @%p1 ret;
        mov.b32 %r1, 8;
    """
    assert np.array_equal(stored(body), np.where(THREAD >= 40, 0, 8))


def test_an_instruction_is_done_by_those_its_predicate_lets_through():
    body = """
        setp.lt.u32 %p1, %r70, 5;
        mov.b32 %r1, 1;
        @%p1 mov.b32 %r1, 2;
        @!%p1 add.s32 %r1, %r1, 2;
    """
    assert np.array_equal(stored(body), np.where(THREAD < 5, 2, 3))


def test_the_place_of_a_thread():
    for name, expected in (
        ("%tid.x", THREAD),
        ("%ctaid.x", BOTH // 64),
        ("%laneid", THREAD % 32),
        ("%warpid", THREAD // 32),
        ("%ntid.x", 64),
        ("%nctaid.x", 3),
        ("%ntid.y", 1),
        ("%ctaid.z", 0),
    ):
        assert np.array_equal(stored(f"mov.u32 %r1, {name};"), np.broadcast_to(expected, 192)), name


def test_grids_of_three_dimensions():
    result = np.zeros((3, 2, 4, 32), np.uint32)
    program = Program(
        kernel(
            """
        mov.u32 %r2, %ctaid.y;
        mov.u32 %r3, %ctaid.z;
        mov.u32 %r4, %nctaid.x;
        mov.u32 %r5, %nctaid.y;
        mad.lo.s32 %r6, %r3, %r5, %r2;
        mad.lo.s32 %r7, %r6, %r4, %r71;
        mad.lo.s32 %r72, %r7, 32, %r70;
        mov.b32 %r1, %r7;
        """
            + STORE
        )
    )
    memory, findings = GlobalMemory(), Findings()
    memory.register(4096, result, "result")
    program.launch((4, 2, 3), [4096], 0, memory, findings, threads=160)
    assert not findings
    assert np.array_equal(result.reshape(24, 32), np.repeat(np.arange(24), 32).reshape(24, 32))


def test_the_last_programs_alone():
    result = np.zeros(192, np.uint32)
    Run("mov.b32 %r1, 5;" + STORE, result, threads=64, ctas=3, last=1)
    assert np.array_equal(result, np.repeat([0, 0, 5], 64))


def test_few_programs_at_once_give_the_same():
    body = "mad.lo.s32 %r1, %r71, 100, %r70;" + STORE
    for at_once, batches in ((1 << 14, 1), (128, 2), (64, 3), (1, 3)):
        result, memory, findings = np.zeros(192, np.uint32), GlobalMemory(), Findings()
        memory.register(4096, result, "result")
        program = Program(kernel(body, threads=64))
        executed = program.launch((3, 1, 1), [4096], 0, memory, findings, threads=at_once)
        assert executed == batches * len(list(program.kernel.instructions()))
        assert np.array_equal(result, BOTH // 64 * 100 + THREAD)


# -- barriers

EXCHANGE = """
        shl.b32 %r2, %r70, 2;
        st.shared.b32 [%r2], %r70;
        bar.sync 0;
        xor.b32 %r3, %r2, 252;
        ld.shared.b32 %r1, [%r3];
"""


def test_a_barrier_orders_what_is_before_and_behind_it():
    assert np.array_equal(stored(EXCHANGE, shared=256), 63 - THREAD)
    assert np.array_equal(stored(EXCHANGE.replace("bar.sync", "barrier.sync"), shared=256), 63 - THREAD)
    assert np.array_equal(stored(EXCHANGE.replace("sync 0", "sync 3, 64"), shared=256), 63 - THREAD)


def test_a_barrier_in_a_loop():
    body = """
        mov.b32 %r1, %r70;
        mov.b32 %r5, 0;
        shl.b32 %r2, %r70, 2;
        add.s32 %r3, %r2, 4;
        and.b32 %r3, %r3, 255;
    $L__loop:
        st.shared.b32 [%r2], %r1;
        bar.sync 0;
        ld.shared.b32 %r1, [%r3];
        bar.sync 0;
        add.s32 %r5, %r5, 1;
        setp.lt.u32 %p1, %r5, 5;
        @%p1 bra $L__loop;
    """
    assert np.array_equal(stored(body, shared=256), (THREAD + 5) % 64)
    # without the second one thread's next write overtakes another's read
    found = kinds(
        body.replace("bar.sync 0;\n        add", "add") + STORE, np.zeros(64, np.uint32), threads=64, shared=256
    )
    assert found == {"shared race: write after another thread's read"}


def test_a_barrier_in_one_branch_of_a_warp_is_found():
    body = """
        and.b32 %r2, %r70, 1;
        setp.eq.s32 %p1, %r2, 0;
        @%p1 bra $L__end;
        bar.sync 0;
    $L__end:
        ret;
    """
    result = np.zeros(1, np.uint32)
    with pytest.raises(Fault, match="others never reach"):
        Run(body.replace("ret;", "bar.sync 1;\nret;"), result)
    found = kinds(body, result)
    assert "divergent warp at a warp-wide instruction" in found
    assert "barrier after some threads have ended" in found


def test_a_barrier_that_other_warps_never_reach_is_found_and_does_not_hang():
    body = """
        setp.lt.u32 %p1, %r70, 32;
        @%p1 bra $L__one;
        bar.sync 1;
        ret;
    $L__one:
        bar.sync 2;
        ret;
    """
    with pytest.raises(Fault, match=r"others never reach.*bar.sync 1.*bar.sync 2"):
        Run(body, np.zeros(1, np.uint32), threads=64)
    assert kinds(body.replace("sync 2", "sync 1"), np.zeros(1, np.uint32), threads=64) == {
        "threads of a CTA meet at different barriers"
    }
    ended = body.replace("bar.sync 2;", "")
    assert kinds(ended, np.zeros(1, np.uint32), threads=64) == {"barrier after some threads have ended"}


def test_a_barrier_holds_back_the_threads_of_its_own_cta_alone():
    """Each CTA runs its loop as often as its number says."""
    body = """
        mov.b32 %r1, 0;
    $L__loop:
        bar.sync 0;
        add.s32 %r1, %r1, 1;
        setp.le.u32 %p1, %r1, %r71;
        @%p1 bra $L__loop;
    """
    assert np.array_equal(stored(body), BOTH // 64 + 1)


def test_threads_that_part_at_a_uniform_branch_are_found():
    body = """
        setp.lt.u32 %p1, %r70, {limit};
        @%p1 bra.uni $L__end;
        mov.b32 %r1, 1;
    $L__end:
        ret;
    """
    found = "threads of a warp part at a uniform branch"
    assert kinds(body.format(limit=20), np.zeros(1, np.uint32), threads=64) == {found}
    # warps may
    assert kinds(body.format(limit=32), np.zeros(1, np.uint32), threads=64) == set()


def test_a_loop_without_an_end_is_a_fault(monkeypatch):
    monkeypatch.setattr(control, "MOST_BLOCKS", 1000)
    with pytest.raises(Fault, match="for ever"):
        Run("$L__loop:\n bra.uni $L__loop;\n", np.zeros(1, np.uint32))


def test_a_trap_is_a_fault():
    body = "setp.eq.s32 %p1, %r70, {};\n @%p1 trap;\n ret;"
    with pytest.raises(Fault, match="trap"):
        Run(body.format(5), np.zeros(1, np.uint32))
    assert kinds(body.format(500), np.zeros(1, np.uint32)) == set()


def test_blocks_that_ran_are_told_by_lines_of_source():
    run = Run(
        """
        .loc 1 10 0
        setp.eq.s32 %p1, %r70, 99;
        @%p1 bra $L__rare;
        .loc 1 11 0
        mov.b32 %r1, 1;
        bra.uni $L__end;
    $L__rare:
        .loc 1 12 0
        mov.b32 %r1, 2;
    $L__end:
        .loc 1 13 0
        ret;
        """,
        np.zeros(1, np.uint32),
    )
    program = run.program
    sources = program.blocks_by_source()
    left_out = {where for where, blocks in sources.items() if not blocks & program.covered}
    assert left_out == {"by_hand.py:12"}
    assert set(range(len(program.kernel.blocks))) - program.covered == sources["by_hand.py:12"]


def test_arguments_are_of_the_kinds_that_the_kernel_declares():
    text = kernel("ret;", arrays=2).replace(
        ".param .u64 .ptr .global .align 1 kernel_param_1", ".param .f32 kernel_param_1"
    )
    program = Program(text.replace("ld.param.b64 %rd1", "ld.param.b32 %r1"))
    for arguments, error, told in (
        ([4096], ValueError, "2 arguments, 1 came"),
        ([4096, 1], TypeError, r"kernel_param_1: expected .f32, got 1"),
        ([1.0, 1.0], TypeError, r"kernel_param_0: expected .u64, got 1.0"),
    ):
        with pytest.raises(error, match=told):
            program.launch((1, 1, 1), arguments, 0, GlobalMemory(), Findings())


@pytest.mark.parametrize(("kind", "load", "value", "wanted"), [
    ("f32", "ld.param.b32 %r1, [scalar];", 1.5, 0x3FC00000),
    ("u32", "ld.param.u32 %r1, [scalar];", -2, 0xFFFFFFFE),
    ("u64", "ld.param.b32 %r1, [scalar];", 0x123456789ABCDEF0, 0x9ABCDEF0),
    ("u64", "ld.param.s8 %rs1, [scalar]; cvt.s32.s16 %r1, %rs1;", 0x1234567800000080, 0xFFFFFF80),
    ("u8", "ld.param.b8 %rs1, [scalar]; cvt.u32.u16 %r1, %rs1;", True, 1),
    ("u8", "ld.param.s8 %rs1, [scalar]; cvt.s32.s16 %r1, %rs1;", 0xFE, 0xFFFFFFFE),
])  # fmt: skip
def test_scalars_are_loaded_by_their_types(kind, load, value, wanted):
    text = kernel(load + STORE).replace("kernel_param_0\n)", f"kernel_param_0,\n .param .{kind} scalar\n)")
    memory, findings, result = GlobalMemory(), Findings(), np.zeros(32, np.uint32)
    memory.register(4096, result, "result")
    Program(text).launch((1, 1, 1), [4096, value], 0, memory, findings)
    assert not findings
    assert (result == wanted).all()


def test_a_load_of_more_bytes_than_a_parameter_has_is_refused():
    text = kernel("ld.param.b64 %rd1, [scalar];" + STORE)
    text = text.replace("kernel_param_0\n)", "kernel_param_0,\n .param .u32 scalar\n)")
    with pytest.raises(Refused, match="the parameter is of 32 bits"):
        Program(text)


@pytest.fixture
def flags(monkeypatch):
    """An instruction that waits, as those on barriers in shared memory do: until the byte that it names is not zero."""

    def look(ins, of):
        done, address = ins.operands[0].index, ins.operands[1].value

        def run(batch, mask):
            ready = batch.shared.bytes[address + batch.cta * batch.shared.size] != 0
            batch.write(done, ready, mask)
            batch.stall(~ready if mask is None else ~ready & mask)

        return run

    monkeypatch.setitem(registry.TRANSLATORS, "look", look)


WAITING = """
    setp.eq.s32 %p1, %r70, 40;
    setp.eq.s32 %p3, %r71, 1;
    @%p1 bra $L__signal;
$L__wait:
    look %p2, 3;
    @!%p2 bra $L__wait;
    ret;
$L__signal:
    mov.b16 %rs1, {signal};
    @%p3 mov.b16 %rs1, 1;
    st.shared.b8 [global_smem+3], %rs1;
    ret;
"""


def test_threads_that_wait_for_others_let_them_run(flags):
    """The loop of those that wait stands above what they wait for."""
    zeroed = "st.shared.b8 [%r70], 0;\n bar.sync 0;\n"
    options = {"threads": 64, "ctas": 2, "shared": 64}
    assert kinds(zeroed + WAITING.format(signal=1), np.zeros(1), **options) == set()
    with pytest.raises(Fault, match=r"wait for ever for what none does.*look %p2, 3"):
        Run(zeroed + WAITING.format(signal=0), np.zeros(1), **options)
