"""Branches of waves, lanes that are switched off, loops, barriers and ends, in kernels written by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hand_written.amdgcn import Run, kinds

from gpu_emulators.findings import Fault

STORE = """v_lshlrev_b32_e32 v2, 2, v1
    global_store_dword v2, v10, s[4:5]"""


def stored(body: str, threads: int = 256, ctas: int = 2) -> list[int]:
    result = np.zeros(threads * ctas, np.uint32)
    run = Run(f"{body}\n{STORE}", result, threads=threads, ctas=ctas)
    assert not run.findings, run.findings
    return result.tolist()


def test_lanes_that_go_different_ways():
    body = """v_mov_b32_e32 v10, 7
        v_and_b32_e32 v11, 3, v0
        v_cmp_gt_u32_e32 vcc, 2, v11
        s_and_saveexec_b64 s[10:11], vcc
        s_xor_b64 s[10:11], exec, s[10:11]
        s_cbranch_execz .LBB0_2
        v_cmp_eq_u32_e32 vcc, 0, v11
        s_and_saveexec_b64 s[12:13], vcc
        v_mov_b32_e32 v10, 1
        s_or_b64 exec, exec, s[12:13]
        v_add_u32_e32 v10, 10, v10
        .LBB0_2:
        s_andn2_saveexec_b64 s[10:11], s[10:11]
        v_mov_b32_e32 v10, 5
        s_or_b64 exec, exec, s[10:11]"""
    assert stored(body) == [[11, 17, 5, 5][thread % 4] for thread in range(512)]


def test_waves_that_go_different_ways():
    """By a scalar branch, of which each wave of each workgroup has its own."""
    body = """v_readfirstlane_b32 s10, v0
        s_lshr_b32 s10, s10, 6
        s_add_u32 s10, s10, s2
        s_cmp_lg_u32 s10, 2
        s_cbranch_scc1 .LBB0_1
        v_mov_b32_e32 v10, 100
        s_branch .LBB0_2
        .LBB0_1:
        v_mov_b32_e32 v10, s10
        .LBB0_2:"""
    waves = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)]
    assert stored(body)[::64] == [100 if sum(wave) == 2 else sum(wave) for wave in waves]


def test_a_loop_of_as_many_turns_as_the_wave_has():
    body = """v_mov_b32_e32 v10, 0
        v_readfirstlane_b32 s10, v0
        s_lshr_b32 s10, s10, 6
        .LBB0_1:
        v_add_u32_e32 v10, 3, v10
        s_cmp_eq_u32 s10, 0
        s_cselect_b64 s[12:13], -1, 0
        s_sub_u32 s10, s10, 1
        s_mov_b64 vcc, s[12:13]
        s_cbranch_vccz .LBB0_1"""
    assert stored(body, threads=256, ctas=1)[::64] == [3, 6, 9, 12]


def test_lanes_leave_a_loop_one_by_one():
    body = """v_mov_b32_e32 v10, 0
        s_mov_b64 s[10:11], 0
        .LBB0_1:
        v_cmp_eq_u32_e32 vcc, v10, v0
        s_or_b64 s[10:11], vcc, s[10:11]
        s_andn2_b64 exec, exec, s[10:11]
        v_add_u32_e32 v10, 1, v10
        s_cbranch_execnz .LBB0_1
        s_or_b64 exec, exec, s[10:11]"""
    assert stored(body, threads=128, ctas=1) == list(range(128))


def test_a_comparison_leaves_no_bit_of_a_lane_that_is_off():
    body = """s_mov_b64 s[14:15], exec
        s_mov_b64 exec, 15
        v_cmp_ge_u32_e64 s[12:13], 64, v0
        s_mov_b64 exec, s[14:15]
        v_cndmask_b32_e64 v10, 0, 1, s[12:13]"""
    assert stored(body, threads=64, ctas=1) == [1] * 4 + [0] * 60


def test_workgroups_have_their_numbers():
    assert stored("v_mov_b32_e32 v10, s2", ctas=5)[::256] == [0, 1, 2, 3, 4]


def test_blocks_that_have_run_are_covered():
    body = """s_cmp_eq_u32 s2, 9
        s_cbranch_scc1 .LBB0_1
        s_endpgm
        .LBB0_1:
        s_nop 0"""
    run = Run(body, np.zeros(1))
    assert len(run.program.kernel.blocks) == 3 and run.program.covered == {0, 1}


def test_a_loop_without_an_end(monkeypatch):
    monkeypatch.setattr("gpu_emulators.amdgcn.control.MOST_BLOCKS", 100)
    with pytest.raises(Fault, match="runs for ever"):
        kinds(".LBB0_1:\ns_branch .LBB0_1")


WAVE_0_ALONE = """v_readfirstlane_b32 s10, v0
    s_cmp_lg_u32 s10, 0
    s_cbranch_scc1 .LBB0_1
    {}
    .LBB0_1:"""


def test_a_barrier_that_a_wave_never_reaches():
    """It waits for those alone that live: a wave that has ended is told."""
    body = WAVE_0_ALONE.format("s_barrier")
    assert kinds(body, threads=128) == {"barrier after some waves have ended"}


def test_a_barrier_twice_for_one_wave_alone():
    body = WAVE_0_ALONE.format("s_barrier\ns_barrier") + "\ns_barrier"
    assert "waves of a workgroup meet at different barriers" in kinds(body, threads=128)


@pytest.mark.parametrize("ctas", [1, 3])
def test_waves_exchange_values_at_a_barrier(ctas):
    body = """v_lshlrev_b32_e32 v3, 2, v0
        v_xor_b32_e32 v4, 0x100, v3
        ds_write_b32 v3, v1
        s_waitcnt lgkmcnt(0)
        s_barrier
        ds_read_b32 v10, v4
        s_waitcnt lgkmcnt(0)"""
    result = np.zeros(128 * ctas, np.uint32)
    run = Run(f"{body}\n{STORE}", result, threads=128, ctas=ctas, lds=512)
    assert not run.findings
    assert result.tolist() == [thread ^ 64 for thread in range(128 * ctas)]
