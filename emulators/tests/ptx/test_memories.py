"""Loads, stores, races, what is unwritten, out of bounds or misaligned, on the PTX emulator."""

from __future__ import annotations

import numpy as np
import pytest
from hand_written.ptx import Run, compute, kernel, kinds

from gpu_emulators.global_memory import marks
from gpu_emulators.ptx import Fault, GlobalMemory, Program, Refused

NOTHING: set[str] = set()


def buffer(words=64):
    return np.arange(words, dtype=np.uint32)


# -- what is loaded and stored


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize(
    ("vector", "bits"),
    [("", 8), ("", 16), ("", 32), ("", 64), ("v2", 8), ("v4", 16), ("v2", 32), ("v4", 32), ("v2", 64)],
)
def test_what_is_stored_is_loaded(space, vector, bits):
    count, size = int(vector[1:] or 1), bits // 8
    family = {8: "%rs", 16: "%rs", 32: "%r", 64: "%rd"}[bits]
    registers = [f"{family}{10 + k}" for k in range(count)]
    listed = f"{{{', '.join(registers)}}}" if vector else registers[0]
    step, dot = size * count, f".{vector}" if vector else ""
    through = f"""
        mul.lo.s32 %r1, %r70, {step};
        st.shared{dot}.b{bits} [%r1+16], {listed};
        {"".join(f"mov.b{max(bits, 16)} {register}, 0;" for register in registers)}
        ld.shared{dot}.b{bits} {listed}, [%r1+16];
    """
    body = f"""
        mul.wide.u32 %rd70, %r72, {step};
        add.s64 %rd2, %rd0, %rd70;
        add.s64 %rd3, %rd1, %rd70;
        ld.global{dot}.b{bits} {listed}, [%rd2];
        {through if space == "shared" else ""}
        st.global{dot}.b{bits} [%rd3], {listed};
        ret;
    """
    source = np.random.default_rng(1).integers(0, 256, 64 * step).astype(np.uint8)
    result = np.zeros_like(source)
    run = Run(body, source, result, ctas=2, shared=32 * step + 16)
    assert not run.findings, run.findings
    assert np.array_equal(source, result)


@pytest.mark.parametrize("opcode", ["ld.global.ca.v2.b32", "ld.global.ca.v2.f32"])
def test_a_load_names_the_cache_that_it_takes_anyway(opcode):
    values, result = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    body = f"""
        mad.wide.u32 %rd2, %r70, 8, %rd0;
        mad.wide.u32 %rd3, %r70, 8, %rd1;
        {opcode} {{%r1, %r2}}, [%rd2];
        st.global.v2.b32 [%rd3], {{%r1, %r2}};
        ret;
    """
    assert not Run(body, values, result).findings
    assert np.array_equal(values, result)


@pytest.mark.parametrize("kind", ["s8", "u8", "b8", "s16", "u16"])
def test_a_load_fills_a_wider_register_by_its_type(kind):
    values = np.random.default_rng(1).integers(0, 256, 64).astype(np.uint8).view(f"u{int(kind[1:]) // 8}")[:32]
    result = np.zeros(32, np.uint32)
    step = int(kind[1:]) // 8
    Run(
        f"""
        mad.wide.u32 %rd2, %r70, {step}, %rd0;
        ld.global.{kind} %r1, [%rd2];
        mad.wide.u32 %rd3, %r70, 4, %rd1;
        st.global.b32 [%rd3], %r1;
        ret;
        """,
        values.copy(),
        result,
    )
    signed = values.view(f"i{step}") if kind[0] == "s" else values
    assert np.array_equal(result, signed.astype(np.int64).astype(np.uint32))


def test_values_are_packed_and_unpacked():
    a, b = np.arange(64, dtype=np.uint32) * 77777, np.arange(64, dtype=np.uint32) * 33333333
    whole = compute("mov.b64 $d, {$a, $b};", a, b, out=np.uint64)
    assert np.array_equal(whole.view(np.uint32).reshape(-1, 2).T, [a, b])
    assert np.array_equal(compute("mov.b64 {_, $d}, $a;", whole, out=np.uint32), b)
    assert np.array_equal(compute("mov.b32 {$d, %rs1}, $a;", b, out=np.uint16), b.astype(np.uint16))
    assert np.array_equal(compute("mov.pred $d, $a;", b % 2 == 0, out=bool), b % 2 == 0)
    half = (a.astype(np.uint16), b.astype(np.uint16))
    assert np.array_equal(compute("mov.b32 $d, {$a, $b};", *half, out=np.uint32), half[0] | b << np.uint32(16))


# -- places


def test_out_of_bounds_by_one_is_a_fault():
    body = "mad.wide.u32 %rd2, %r72, 4, %rd0;\n {}\n ret;"
    for access in ("ld.global.b32 %r1, [%rd2];", "st.global.b32 [%rd2], %r70;"):
        assert kinds(body.format(access), buffer(64), ctas=2) == NOTHING
        with pytest.raises(Fault, match="out of bounds of global memory, 4 bytes at .*, 4 bytes beyond array 0"):
            Run(body.format(access), buffer(63), ctas=2)
        before = access.replace("[%rd2]", "[%rd2-4]")
        with pytest.raises(Fault, match="4 bytes before array 0"):
            Run(body.format(before), buffer(64), ctas=2)
        # lanes that are masked off don't count
        guarded = f"setp.lt.u32 %p1, %r72, 63;\n @%p1 {access}"
        assert kinds(body.format(guarded), buffer(63), ctas=2) == NOTHING


def test_threads_of_one_load_may_read_different_arrays():
    a, b, result = buffer(32), buffer(32) + np.uint32(100), np.zeros(32, np.uint32)
    body = """
        setp.lt.u32 %p1, %r70, 16;
        selp.b64 %rd5, %rd0, %rd1, %p1;
        mad.wide.u32 %rd6, %r70, 4, %rd5;
        ld.global.b32 %r1, [%rd6];
        mad.wide.u32 %rd3, %r70, 4, %rd2;
        st.global.b32 [%rd3], %r1;
        ret;
    """
    assert not Run(body, a, b, result).findings
    assert np.array_equal(result, np.where(np.arange(32) < 16, a, b))


@pytest.mark.parametrize("by", [4, 8, 12])
def test_a_misaligned_vector_is_a_fault(by):
    body = f"mad.wide.u32 %rd2, %r70, 16, %rd0;\n ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd2+{by}];\n ret;"
    with pytest.raises(Fault, match="misaligned access of 16 bytes of global"):
        Run(body, buffer(200))
    shared = f"st.shared.v4.b32 [%r70+{by}], {{%r70, %r70, %r70, %r70}};\n ret;"
    with pytest.raises(Fault, match="misaligned access of 16 bytes of shared"):
        Run(shared, buffer(), shared=4096)


def test_out_of_bounds_of_shared_memory_is_a_fault():
    body = "shl.b32 %r1, %r70, 2;\n st.shared.b32 [%r1{}], %r70;\n ret;"
    assert kinds(body.format(""), buffer(), shared=128) == NOTHING
    for offset in ("+4", "-4"):
        with pytest.raises(Fault, match="out of bounds of 128 bytes of shared memory"):
            Run(body.format(offset), buffer(), shared=128)


def test_bytes_beyond_those_that_are_given_are_out_of_bounds():
    body = "setp.eq.s32 %p1, %r70, 0;\n @%p1 st.shared.b32 [global_smem+{}], 1;\n ret;"
    assert kinds(body.format(16), buffer(), shared=20) == NOTHING
    for offset in (20, 28):
        with pytest.raises(Fault, match="out of bounds of 20 bytes of shared memory"):
            Run(body.format(offset), buffer(), shared=20)


@pytest.mark.parametrize(
    "text",
    [
        "add.s32 %r1, %rd0, 1;",
        "add.s32 %r1, %r70, %rd0;",
        "and.b16 %rs1, %r70, 1;",
        "mov.b32 %r1, %rd0;",
        "setp.eq.s16 %p1, %r70, 1;",
        "cp.async.cg.shared.global [%rd0], [%rd0], 16;",
        "ld.shared.b32 %r1, [%rd0];",
    ],
)
def test_registers_that_are_wider_are_for_loads_stores_and_conversions(text):
    with pytest.raises(Refused, match="is expected"):
        Program(kernel(f"{text} ret;"))
    Program(kernel("st.shared.b8 [%r70], %r70; cvt.u16.u8 %rs1, %rs1; cvt.u32.u8 %r1, %r70; ret;"))


def test_arrays_that_overlap_are_refused():
    memory = GlobalMemory()
    memory.register(4096, buffer(), "one")
    with pytest.raises(ValueError, match="two overlaps one"):
        memory.register(4096 + 255, buffer(), "two")


# -- what is unwritten


def test_registers_are_followed_by_thread():
    assert kinds("add.s32 %r1, %r2, 1;\n ret;", buffer()) == {"read of an unwritten register"}
    some = "setp.lt.u32 %p1, %r70, 5;\n @%p1 mov.b32 %r2, 1;\n {} add.s32 %r1, %r2, 1;\n ret;"
    assert kinds(some.format(""), buffer()) == {"read of a register that some threads have not written"}
    assert kinds(some.format("@%p1"), buffer()) == NOTHING
    rest = some.format("@!%p1 mov.b32 %r2, 2;\n")
    assert kinds(rest, buffer()) == NOTHING


def test_shared_memory_that_is_unwritten():
    assert kinds("ld.shared.b32 %r1, [global_smem];\n ret;", buffer(), shared=16) == {"read of unwritten shared memory"}
    # a part of what is read suffices
    body = """
        setp.eq.s32 %p1, %r70, 0;
        @%p1 st.shared.b32 [global_smem], %r70;
        @%p1 ld.shared.b64 %rd1, [global_smem];
        ret;
    """
    assert kinds(body, buffer(), shared=16) == {"read of unwritten shared memory"}


def test_global_memory_that_is_unwritten():
    body = "mad.wide.u32 %rd2, %r70, 4, %rd0;\n {}ld.global.b32 %r1, [%rd2];\n ret;"
    assert kinds(body.format(""), buffer(), unwritten={0}) == {"read of unwritten global memory"}
    assert kinds(body.format("st.global.b32 [%rd2], %r70;\n "), buffer(), unwritten={0}) == NOTHING


def test_bytes_that_nothing_wrote_are_counted():
    memory, run = GlobalMemory(), None
    region = memory.register(4096, buffer(33), "out", initialised=False)
    assert region.unwritten() == 33 * 4
    body = "mad.wide.u32 %rd2, %r70, 4, %rd0;\n st.global.b32 [%rd2], %r70;\n ret;"
    run = Run(body, buffer(33))
    run.program.launch((1, 1, 1), [4096], 0, memory, run.findings)
    assert region.unwritten() == 4


# -- races in shared memory

OWN = "shl.b32 %r2, %r70, 2;\n st.shared.b32 [%r2], %r70;\n"
OTHER = "xor.b32 %r3, %r2, {};\n"
AFTER_WRITE = "shared race: read after another thread's write"
AFTER_READ = "shared race: write after another thread's read"
TWICE = "shared race: write after another thread's write"


@pytest.mark.parametrize(("between", "partner", "found"), [
    ("", 4, {AFTER_WRITE}),
    ("bar.warp.sync -1;", 4, NOTHING),
    ("bar.warp.sync -1;", 128, {AFTER_WRITE}),
    ("bar.sync 0;", 128, NOTHING),
    ("", 0, NOTHING),
])  # fmt: skip
def test_reads_after_writes(between, partner, found):
    body = f"{OWN}{between}\n{OTHER.format(partner)} ld.shared.b32 %r1, [%r3];\n ret;"
    assert kinds(body, buffer(), threads=64, ctas=2, shared=256) == found


@pytest.mark.parametrize(("between", "partner", "found"), [
    ("", 4, {AFTER_READ}),
    ("bar.warp.sync -1;", 4, NOTHING),
    ("bar.warp.sync -1;", 128, {AFTER_READ}),
    ("bar.sync 0;", 128, NOTHING),
    ("", 0, NOTHING),
])  # fmt: skip
def test_writes_after_reads(between, partner, found):
    read = f"{OWN}bar.sync 0;\n ld.shared.b32 %r1, [%r2];\n"
    body = f"{read}{between}\n{OTHER.format(partner)} st.shared.b32 [%r3], 1;\n ret;"
    assert kinds(body, buffer(), threads=64, ctas=2, shared=256) == found


@pytest.mark.parametrize(("between", "partner", "found"), [
    ("", 4, {TWICE}),
    ("bar.warp.sync -1;", 4, NOTHING),
    ("bar.warp.sync -1;", 128, {TWICE}),
    ("bar.sync 0;", 128, NOTHING),
])  # fmt: skip
def test_writes_after_writes(between, partner, found):
    body = f"{OWN}{between}\n{OTHER.format(partner)} st.shared.b32 [%r3], 1000;\n ret;"
    assert kinds(body, buffer(), threads=64, ctas=2, shared=256) == found


def test_many_readers_of_one_place():
    """All threads read it; then one writes, ordered before those of its own warp alone."""
    body = """
        mov.b32 %r2, 0;
        setp.eq.s32 %p1, %r70, 0;
        @%p1 st.shared.b32 [%r2], 7;
        bar.sync 0;
        setp.lt.u32 %p2, %r70, {readers};
        @%p2 ld.shared.b32 %r1, [%r2];
        {between}
        @%p1 st.shared.b32 [%r2], 8;
        ret;
    """
    for readers, between, found in (
        (64, "bar.sync 0;", NOTHING),
        (64, "bar.warp.sync -1;", {AFTER_READ}),
        (32, "bar.warp.sync -1;", NOTHING),
        (32, "", {AFTER_READ}),
        (1, "", NOTHING),
    ):
        body_of = body.format(readers=readers, between=between)
        assert kinds(body_of, buffer(), threads=64, shared=16) == found, (readers, between)


def test_readers_before_and_after_a_warp_barrier():
    """A read by another thread of the warp since its barrier is not hidden by those before."""
    body = f"{OWN}bar.sync 0;\n ld.shared.b32 %r1, [%r2];\n bar.warp.sync -1;\n ld.shared.b32 %r1, [%r2];\n"
    write = f"{OTHER.format(4)} st.shared.b32 [%r3], 1;\n ret;"
    assert kinds(body + write, buffer(), threads=64, shared=256) == {AFTER_READ}
    assert kinds(f"{body}bar.warp.sync -1;\n{write}", buffer(), threads=64, shared=256) == NOTHING


def test_neighbours_within_a_word_do_not_race():
    body = "st.shared.b8 [%r70], %rs1;\n ld.shared.b8 %rs2, [%r70];\n ret;"
    assert kinds("mov.b16 %rs1, 3;\n" + body, buffer(), shared=32) == NOTHING


def test_threads_of_one_store_that_write_one_place():
    body = "st.shared.b32 [global_smem], {};\n ret;"
    assert kinds(body.format("%r70"), buffer(), shared=16) == {
        "threads of one store write different values to shared memory"
    }
    assert kinds(body.format("5"), buffer(), shared=16) == NOTHING


# -- races in global memory


def test_programs_that_write_one_place():
    body = "mad.wide.u32 %rd2, %r70, 4, %rd0;\n st.global.b32 [%rd2], {};\n ret;"
    for at_once in (32, 64):
        different = _kinds_in_batches(body.format("%r72"), at_once)
        assert different & {
            "global race: write after write",
            "threads of one store write different values to global memory",
        }
        same = _kinds_in_batches(body.format("%r70"), at_once)
        assert same == {"two threads write the same value to global memory"}


def test_a_second_write_of_the_same_value_is_named_as_such_beside_writes_of_others():
    """Lane 0 writes again what a lane has written, others write new values where nothing was."""
    body = """
        setp.eq.s32 %p1, %r70, 5;
        @%p1 st.global.b32 [%rd0], {};
        mad.wide.u32 %rd2, %r70, 4, %rd0;
        st.global.b32 [%rd2], 77;
        ret;
    """
    assert kinds(body.format(77), buffer()) == {"two threads write the same value to global memory"}
    assert kinds(body.format(78), buffer()) == {"global race: write after write"}


def _kinds_in_batches(body, at_once):
    run = Run(body, buffer(65))
    run.findings.clear()
    memory = GlobalMemory()
    memory.register(4096, buffer(65), "array")
    run.program.launch((2, 1, 1), [4096], 0, memory, run.findings, threads=at_once)
    return run.findings.kinds


@pytest.mark.parametrize("at_once", [32, 64])
def test_programs_that_read_what_others_write(at_once):
    """Each reads behind its own elements, where the next program writes, and the other way round."""
    place = "mad.wide.u32 %rd2, %r72, 4, %rd0;\n"
    ahead = f"{place} ld.global.b32 %r1, [%rd2+4];\n st.global.b32 [%rd2], %r1;\n ret;"
    assert any("race" in kind for kind in _kinds_in_batches(ahead, at_once))
    own = ahead.replace("+4", "")
    assert _kinds_in_batches(own, at_once) == NOTHING


def test_a_barrier_orders_global_memory_within_a_program():
    body = """
        mad.wide.u32 %rd2, %r72, 4, %rd0;
        st.global.b32 [%rd2], %r70;
        {between}
        xor.b32 %r2, %r72, {partner};
        mad.wide.u32 %rd3, %r2, 4, %rd0;
        ld.global.b32 %r1, [%rd3];
        ret;
    """
    race = {"global race: read after another thread's write"}
    for between, partner, found in (
        ("", 1, race),
        ("bar.sync 0;", 1, NOTHING),
        ("bar.sync 0;", 64, race),
        ("bar.warp.sync -1;", 1, NOTHING),
        ("bar.warp.sync -1;", 32, race),
        ("bar.warp.sync -1; bar.sync 0;", 32, NOTHING),
        # of one warp of two
        ("setp.lt.u32 %p1, %r70, 32; @%p1 bar.warp.sync -1;", 1, race),
        # before the write alone
        ("bar.warp.sync -1; st.global.b32 [%rd2], 5;", 1, race),
    ):
        text = body.format(between=between, partner=partner)
        assert kinds(text, buffer(128), threads=64, ctas=2) == found, (between, partner)


def test_readers_of_global_memory_are_ordered_by_barriers_of_their_cta():
    """Threads read one place, then one of them writes it."""
    body = """
        mad.wide.u32 %rd2, {place}, 4, %rd0;
        setp.lt.u32 %p2, %r70, {readers};
        @%p2 ld.global.b32 %r1, [%rd2];
        {between}
        setp.eq.s32 %p1, %r70, 0;
        @%p1 st.global.b32 [%rd2], 5;
        ret;
    """
    race = "global race: write after another thread's read"
    for place, readers, between, found in (
        ("%r71", 64, "bar.sync 0;", NOTHING),
        ("%r71", 64, "", {race}),
        ("%r71", 1, "", NOTHING),
        ("%r71", 32, "bar.warp.sync -1;", NOTHING),
        ("%r71", 64, "bar.warp.sync -1;", {race}),
        ("%r71", 32, "bar.warp.sync -1; @%p2 ld.global.b32 %r2, [%rd2];", {race}),
        ("%r71", 32, "bar.warp.sync -1; ld.global.b32 %r2, [%rd2]; bar.warp.sync -1;", {race}),
        # threads of several warps, one after the other
        ("%r71", 64, "@%p2 ld.global.b32 %r2, [%rd2]; bar.sync 0; @%p2 ld.global.b32 %r3, [%rd2];", {race}),
        ("0", 64, "bar.sync 0;", {race, "two threads write the same value to global memory"}),
    ):
        text = body.format(place=place, readers=readers, between=between)
        assert kinds(text, buffer(4), threads=64, ctas=2) == found, (place, readers, between)


def test_following_a_tensor_takes_memory_where_it_is_touched_alone():
    """Marks of 2^37 granules are a TiB of addresses."""
    found = marks(1 << 37)
    found[1 << 36] = 7
    assert found[1 << 36] == 7 and found[0] == 0


def test_a_launch_is_ordered_behind_the_one_before():
    run = Run("mad.wide.u32 %rd2, %r72, 4, %rd0;\n st.global.b32 [%rd2], %r70;\n ret;", buffer())
    memory = GlobalMemory()
    memory.register(4096, buffer(), "array")
    for _ in range(2):
        run.program.launch((2, 1, 1), [4096], 0, memory, run.findings)
    assert not run.findings
