"""What the AMDGCN emulator finds in memory: bounds, alignment, unwritten places, waits that are missing, races."""

from __future__ import annotations

import numpy as np
import pytest
from hand_written.amdgcn import Run, kinds

from gpu_emulators.findings import Fault

ADDRESS = "v_lshlrev_b32_e32 v2, 2, v1\n"
# s[8:11]: a buffer over the first array, of as many bytes as s12 has
BUFFER = """s_mov_b32 s8, s4
    s_and_b32 s9, s5, 0xffff
    s_mov_b32 s10, {}
    s_mov_b32 s11, 0x27000
    """
UNWAITED = {"read of a register before its load was waited for"}
OVERWRITTEN = {"write of a register that a load still fills"}
RACE = "LDS race: "


def words(count: int = 64) -> np.ndarray:
    return np.arange(1, count + 1, dtype=np.uint32)


# -- global memory


def test_sizes_and_signs():
    data = np.array([0x80, 0x7F, 0xFF, 0x81] + [0] * 12, np.uint8)
    body = """v_mov_b32_e32 v2, 0
        s_mov_b64 exec, 1
        global_load_ubyte v10, v2, s[4:5]
        global_load_sbyte v11, v2, s[4:5]
        global_load_ushort v12, v2, s[4:5] offset:2
        global_load_sshort v13, v2, s[4:5] offset:2
        v_mov_b32_e32 v3, s6
        s_waitcnt vmcnt(0)
        global_store_dwordx4 v2, v[10:13], s[6:7]
        global_store_byte v2, v12, s[6:7] offset:16
        global_store_short v2, v12, s[6:7] offset:18"""
    result = np.zeros(5, np.uint32)
    assert not Run(body, data, result).findings
    assert result.tolist() == [0x80, 0xFFFFFF80, 0x81FF, 0xFFFF81FF, 0x81FF00FF]


def test_stores_of_the_upper_half():
    """Of a byte from bit 16 on: global memory, a buffer and LDS."""
    result = np.zeros(3, np.uint32)
    body = (
        BUFFER.format(12)
        + """s_mov_b64 exec, 1
        v_mov_b32_e32 v2, 0
        v_mov_b32_e32 v12, 0x12345678
        global_store_short_d16_hi v2, v12, s[4:5]
        global_store_byte_d16_hi v2, v12, s[4:5] offset:2
        global_store_byte v2, v12, s[4:5] offset:3
        buffer_store_byte_d16_hi v12, v2, s[8:11], 0 offen offset:4
        buffer_store_byte v12, v2, s[8:11], 0 offen offset:5
        buffer_store_short_d16_hi v12, v2, s[8:11], 0 offen offset:6
        ds_write_b16_d16_hi v2, v12
        ds_write_b8_d16_hi v2, v12 offset:2
        ds_write_b8 v2, v12 offset:3
        ds_read_b32 v13, v2
        s_waitcnt lgkmcnt(0)
        global_store_dword v2, v13, s[4:5] offset:8"""
    )
    assert not Run(body, result, lds=16).findings
    assert result.tolist() == [0x78341234, 0x12347834, 0x78341234]


def test_halves_that_race():
    """Of a kernel whose narrow accesses are of upper halves alone."""
    body = "v_and_b32_e32 v3, 62, v0\nv_lshlrev_b32_e32 v4, 16, v0\nds_write_b16_d16_hi v3, v4"
    assert kinds(body, threads=128, lds=512) == {
        RACE + "write after another wave's write",
        "lanes of one store write different values to LDS",
    }
    body = "v_lshlrev_b32_e32 v2, 1, v0\nv_lshlrev_b32_e32 v4, 16, v1\nglobal_store_short_d16_hi v2, v4, s[4:5]"
    assert kinds(body, words(), ctas=2) == {"threads of one store write different values to global memory"}


def test_an_address_of_each_lane():
    data, result = words(), np.zeros(64, np.uint32)
    body = """v_lshlrev_b32_e32 v2, 2, v1
        v_mov_b32_e32 v3, 0
        v_lshl_add_u64 v[4:5], v[2:3], 0, s[4:5]
        global_load_dword v10, v[4:5], off
        v_lshl_add_u64 v[6:7], v[2:3], 0, s[6:7]
        s_waitcnt vmcnt(0)
        global_store_dword v[6:7], v10, off"""
    assert not Run(body, data, result).findings
    assert (result == data).all()


@pytest.mark.parametrize("offset", [-4, 4])
def test_one_element_out_of_bounds(offset):
    with pytest.raises(Fault, match="out of bounds of global memory"):
        kinds(f"{ADDRESS}global_load_dword v10, v2, s[4:5] offset:{offset}", words())


def test_lanes_that_are_off_touch_nothing():
    body = "s_mov_b64 exec, 1\n" + ADDRESS + "global_load_dword v10, v2, s[4:5] offset:252"
    assert kinds(body, words()) == set()


def test_words_lie_at_multiples_of_a_word():
    """Also several at once: that is what the instructions need."""
    body = "v_mov_b32_e32 v2, 0\nglobal_load_dword{} v[10:{}], v2, s[4:5] offset:{}"
    assert kinds(body.format("x4", 13, 4), words()) == set()
    with pytest.raises(Fault, match="misaligned"):
        kinds(body.format("x2", 11, 2), words())


def test_what_nothing_has_written():
    load = f"{ADDRESS}global_load_dword v10, v2, s[4:5]"
    store = f"{ADDRESS}v_mov_b32_e32 v10, 1\nglobal_store_dword v2, v10, s[4:5]\n"
    assert kinds(load, words(), unwritten=[0]) == {"read of unwritten global memory"}
    assert kinds(store + load, words(), unwritten=[0]) == set()
    assert kinds("v_mov_b32_e32 v5, v6") == {"read of an unwritten register"}
    assert kinds("s_mov_b32 s20, s21") == {"read of an unwritten register"}


def test_workgroups_that_write_one_place():
    """Run together, and one after the other."""
    body = "v_lshlrev_b32_e32 v2, 2, v0\nglobal_store_dword v2, v1, s[4:5]"
    assert kinds(body, words(), ctas=2) == {"threads of one store write different values to global memory"}
    apart = Run(body, words(), ctas=2, most=64).findings.kinds
    assert apart == {"global race: write after write"}


# -- scalar loads


def test_scalar_loads_and_their_bounds():
    body = "s_load_dwordx4 s[20:23], s[4:5], {}\ns_waitcnt lgkmcnt(0)\n"
    store = "v_mov_b32_e32 v10, s23\nv_mov_b32_e32 v2, 0\ns_mov_b64 exec, 1\nglobal_store_dword v2, v10, s[6:7]"
    result = np.zeros(1, np.uint32)
    assert not Run(body.format("0x10") + store, words(), result).findings
    assert result[0] == 8
    with pytest.raises(Fault, match="out of bounds"):
        kinds(body.format("0xf4"), words())


# -- buffers


def test_a_buffer_ends_where_it_says():
    """What lies beyond is 0, and is not written; Triton masks lanes so."""
    body = (
        BUFFER.format(256)
        + ADDRESS
        + """v_cmp_gt_u32_e32 vcc, 60, v0
        v_bfrev_b32_e32 v3, 1
        v_cndmask_b32_e32 v2, v3, v2, vcc
        buffer_load_dword v10, v2, s[8:11], 0 offen
        s_mov_b32 s8, s6
        s_and_b32 s9, s7, 0xffff
        v_cmp_gt_u32_e32 vcc, 62, v0
        v_lshlrev_b32_e32 v2, 2, v1
        v_cndmask_b32_e32 v2, v3, v2, vcc
        s_waitcnt vmcnt(0)
        buffer_store_dword v10, v2, s[8:11], 0 offen"""
    )
    result = np.full(64, 99, np.uint32)
    assert not Run(body, words(), result).findings
    assert result.tolist() == [*range(1, 61), 0, 0, 99, 99]


def test_a_buffer_out_of_its_range_without_a_mask():
    body = BUFFER.format(128) + ADDRESS + "buffer_load_dword v10, v2, s[8:11], 0 offen"
    assert kinds(body, words()) == {"out of bounds of a buffer"}


def test_a_buffer_that_is_longer_than_its_memory():
    body = BUFFER.format("0x7ffffffe") + ADDRESS + "buffer_load_dword v10, v2, s[8:11], 0 offen offset:4"
    with pytest.raises(Fault, match="out of bounds of global memory"):
        kinds(body, words())


def test_other_buffers_are_refused():
    body = BUFFER.format(256).replace("0x27000", "0x27001") + ADDRESS + "buffer_load_dword v10, v2, s[8:11], 0 offen"
    with pytest.raises(Fault, match="no raw buffer"):
        kinds(body, words())


# -- waits

LOADS = ADDRESS + "global_load_dword v10, v2, s[4:5]\nglobal_load_dword v11, v2, s[4:5]\n"


def test_a_load_that_is_not_waited_for():
    assert kinds(LOADS + "v_mov_b32_e32 v12, v10", words()) == UNWAITED
    assert kinds(LOADS + "s_waitcnt lgkmcnt(0)\nv_mov_b32_e32 v12, v10", words()) == UNWAITED
    assert kinds(LOADS + "s_waitcnt vmcnt(2)\nv_mov_b32_e32 v12, v10", words()) == UNWAITED
    # they come back in order: with one under way the first one is there
    assert kinds(LOADS + "s_waitcnt vmcnt(1)\nv_mov_b32_e32 v12, v10", words()) == set()
    assert kinds(LOADS + "s_waitcnt vmcnt(1)\nv_mov_b32_e32 v12, v11", words()) == UNWAITED
    assert kinds(LOADS + "s_waitcnt vmcnt(0) lgkmcnt(0)\nv_mov_b32_e32 v12, v11", words()) == set()


def test_a_load_as_an_address_or_as_what_is_stored():
    assert kinds(LOADS + "global_store_dword v2, v10, s[4:5]", words()) == UNWAITED
    assert kinds(LOADS + "global_load_dword v12, v10, s[4:5]", np.zeros(64, np.uint32)) == UNWAITED


def test_stores_count_as_well():
    body = LOADS + "global_store_dword v2, v0, s[6:7]\ns_waitcnt vmcnt({})\nv_mov_b32_e32 v12, v11"
    assert kinds(body.format(1), words(), words()) == set()
    assert kinds(body.format(2), words(), words()) == UNWAITED


def test_a_register_that_a_load_still_fills():
    assert kinds(LOADS + "v_mov_b32_e32 v11, 0", words()) == OVERWRITTEN
    # the second load comes back behind the first
    assert kinds(LOADS + "global_load_dword v10, v2, s[4:5]", words()) == set()
    assert kinds("s_load_dword s20, s[4:5], 0x0\ns_mov_b32 s20, 1", words()) == OVERWRITTEN


def test_scalar_loads_come_back_in_any_order():
    loads = "s_load_dword s20, s[4:5], 0x0\ns_load_dword s21, s[4:5], 0x4\n"
    assert kinds(loads + "s_waitcnt lgkmcnt(1)\ns_mov_b32 s22, s20", words()) == UNWAITED
    assert kinds(loads + "s_waitcnt lgkmcnt(0)\ns_mov_b32 s22, s20", words()) == set()


def test_a_scalar_load_hides_how_far_lds_is():
    body = "v_lshlrev_b32_e32 v3, 2, v0\nds_write_b32 v3, v0\nds_read_b32 v10, v3\n{}s_waitcnt lgkmcnt(1)\n"
    use, load = "v_mov_b32_e32 v11, v10", "s_load_dword s20, s[4:5], 0x0\n"
    another = "ds_read_b32 v12, v3\n"
    assert kinds(body.format(another) + use, words(), lds=256) == set()
    assert kinds(body.format(load) + use, words(), lds=256) == UNWAITED


def test_each_wave_waits_for_its_own():
    body = (
        LOADS
        + """v_readfirstlane_b32 s20, v0
        s_cmp_lg_u32 s20, 0
        s_cbranch_scc1 .LBB0_1
        s_waitcnt vmcnt(0)
        .LBB0_1:
        v_mov_b32_e32 v12, v10"""
    )
    assert kinds(body, words(128), threads=128) == UNWAITED
    assert kinds(body, words(64), threads=64) == set()


# -- LDS

OWN = "v_lshlrev_b32_e32 v3, 2, v0\nv_xor_b32_e32 v4, 0x100, v3\n"
WRITE, WAIT, MEET, READ = "ds_write_b32 v3, v0\n", "s_waitcnt lgkmcnt(0)\n", "s_barrier\n", "ds_read_b32 v5, v4\n"


def of_lds(body: str, lds: int = 512) -> set[str]:
    return kinds(OWN + body, threads=128, lds=lds)


def test_a_race_between_waves():
    assert of_lds(WRITE + WAIT + MEET + READ) == set()
    assert of_lds(WRITE + WAIT + READ) == {RACE + "read after another wave's write"}
    assert of_lds(WRITE + WAIT + MEET + READ + WAIT + MEET + WRITE) == set()
    assert of_lds(WRITE + WAIT + MEET + READ + WAIT + WRITE) == {RACE + "write after another wave's read"}


def test_a_barrier_does_not_wait_for_lds():
    assert of_lds(WRITE + MEET + WAIT + READ) == {RACE + "read after another wave's write"}
    assert of_lds(WRITE + WAIT + MEET + READ + MEET + WRITE) == {RACE + "write after another wave's read"}


def test_a_wave_is_in_order_with_itself():
    within = "v_xor_b32_e32 v4, 4, v3\n"
    assert of_lds(within + WRITE + READ) == set()


def test_a_value_that_two_waves_write():
    same = "v_and_b32_e32 v6, 63, v0\nv_lshlrev_b32_e32 v3, 2, v6\nds_write_b32 v3, {}"
    assert of_lds(same.format("v6")) == {"two waves write the same value to LDS"}
    assert of_lds(same.format("v0")) == {
        RACE + "write after another wave's write",
        "lanes of one store write different values to LDS",
    }


def test_lds_that_nothing_has_written():
    assert of_lds(READ) == {"read of unwritten LDS"}


def test_bounds_and_alignment_of_lds():
    assert of_lds(WRITE, lds=512) == set()
    with pytest.raises(Fault, match="out of bounds of 496 bytes of LDS"):
        of_lds(WRITE, lds=496)
    with pytest.raises(Fault, match="misaligned"):
        of_lds("v_or_b32_e32 v3, 4, v3\nds_write_b64 v3, v[0:1]")


def test_pairs_of_places():
    """At offsets in elements, and in 64 of them."""
    body = """v_lshlrev_b32_e32 v3, 2, v0
        ds_write2st64_b32 v3, v0, v1 offset1:2
        v_add_u32_e32 v5, 64, v0
        ds_write_b32 v3, v5 offset:256
        ds_read2_b32 v[10:11], v3 offset1:64
        ds_read2st64_b32 v[12:13], v3 offset0:1 offset1:2
        v_lshlrev_b32_e32 v2, 4, v0
        s_waitcnt lgkmcnt(0)
        global_store_dwordx4 v2, v[10:13], s[4:5]"""
    result = np.zeros((64, 4), np.uint32)
    assert not Run(body, result, lds=1024).findings
    assert result.tolist() == [[lane, lane + 64, lane + 64, lane] for lane in range(64)]


def test_a_pair_is_one_access():
    body = "v_lshlrev_b32_e32 v3, 2, v0\nds_write_b32 v3, v0\nds_write_b32 v3, v0 offset:256\nds_read_b32 v9, v3\n"
    pair = "ds_read2_b32 v[10:11], v3 offset1:64\ns_waitcnt lgkmcnt({})\nv_mov_b32_e32 v12, v9"
    assert kinds(body + pair.format(1), lds=512) == set()
    assert kinds(body + pair.format(2), lds=512) == UNWAITED


def test_widths_of_lds():
    body = """v_lshlrev_b32_e32 v3, 4, v0
        v_mov_b32_e32 v10, -2
        v_mov_b32_e32 v11, 5
        v_mov_b32_e32 v12, 6
        v_mov_b32_e32 v13, 7
        ds_write_b128 v3, v[10:13]
        ds_write_b8 v3, v11 offset:4
        ds_write_b16 v3, v10 offset:6
        ds_read_b64 v[20:21], v3
        ds_read_u8 v22, v3
        ds_read_i16 v23, v3
        s_waitcnt lgkmcnt(0)
        global_store_dwordx4 v3, v[20:23], s[4:5]"""
    result = np.zeros((64, 4), np.uint32)
    assert not Run(body, result, lds=1024).findings
    assert result.tolist() == [[0xFFFFFFFE, 0xFFFE0005, 0xFE, 0xFFFFFFFE]] * 64
