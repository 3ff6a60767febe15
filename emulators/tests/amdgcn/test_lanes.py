"""Values of other lanes, of parts of registers and of single lanes, by cases written by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hand_written.amdgcn import Run, compute, kernel, kinds

from gpu_emulators.amdgcn import Program
from gpu_emulators.findings import Refused

LANE = np.arange(64, dtype=np.uint32)
OLD = 1000
# By control: the lane that each lane reads, None where there is none
CONTROLS = {
    "quad_perm:[2,3,0,1]": lambda lane: lane ^ 2,
    "quad_perm:[3,3,3,0]": lambda lane: lane // 4 * 4 + (0 if lane % 4 == 3 else 3),
    "row_shl:3": lambda lane: lane + 3 if lane % 16 < 13 else None,
    "row_shr:1": lambda lane: lane - 1 if lane % 16 else None,
    "row_shr:8": lambda lane: lane - 8 if lane % 16 >= 8 else None,
    "row_ror:4": lambda lane: lane // 16 * 16 + (lane - 4) % 16,
    "row_mirror": lambda lane: lane // 16 * 16 + 15 - lane % 16,
    "row_half_mirror": lambda lane: lane // 8 * 8 + 7 - lane % 8,
    "row_newbcast:5": lambda lane: lane // 16 * 16 + 5,
    "row_bcast:15": lambda lane: lane // 16 * 16 - 1 if lane >= 16 else None,
    "row_bcast:31": lambda lane: 31 if lane >= 32 else None,
}


def moved(control: str, masks: str = "row_mask:0xf bank_mask:0xf", bound: str = "") -> list[int]:
    body = f"v_mov_b32_e32 $d, {OLD:#x}\nv_mov_b32_dpp $d, $a {control} {masks} {bound}"
    return compute(body, LANE + 1).tolist()


@pytest.mark.parametrize("control", CONTROLS)
def test_lanes_of_a_row(control):
    sources = [CONTROLS[control](lane) for lane in range(64)]
    assert moved(control) == [OLD if source is None else source + 1 for source in sources]
    zeros = [0 if source is None else source + 1 for source in sources]
    assert moved(control, bound="bound_ctrl:1") == zeros


def test_rows_and_banks_that_are_not_written():
    assert moved("row_shr:1", "row_mask:0xa bank_mask:0xf", "bound_ctrl:1") == [
        OLD if lane // 16 in (0, 2) else lane if lane % 16 else 0 for lane in range(64)
    ]
    assert moved("quad_perm:[0,1,2,3]", "row_mask:0xf bank_mask:0x5") == [
        lane + 1 if lane % 16 // 4 in (0, 2) else OLD for lane in range(64)
    ]


@pytest.mark.parametrize(("bound", "missing"), [("", OLD), ("bound_ctrl:1", 0)])
def test_lanes_that_are_off_give_nothing(bound, missing):
    body = f"""v_mov_b32_e32 $d, {OLD:#x}
        s_mov_b64 s[70:71], exec
        s_mov_b32 exec_lo, 0xffff00ff
        v_mov_b32_dpp $d, $a row_ror:8 row_mask:0xf bank_mask:0xf {bound}
        s_mov_b64 exec, s[70:71]"""
    expected = [lane // 16 * 16 + (lane + 8) % 16 + 1 for lane in range(64)]
    # row 0 reads lanes 8 to 15, which are off, and those are not written
    expected[:16] = [missing] * 8 + [OLD] * 8
    assert compute(body, LANE + 1).tolist() == expected


def test_a_sum_over_a_row():
    body = "v_mov_b32_e32 $d, $a\n" + "\ns_nop 1\n".join(
        f"v_add_f32_dpp $d, $d, $d row_shr:{step} row_mask:0xf bank_mask:0xf bound_ctrl:1" for step in (8, 4, 2, 1)
    )
    values = np.random.default_rng(1).integers(0, 100, 64).astype(np.float32)
    found = compute(body, values, out=np.float32)
    assert found[15::16].tolist() == values.reshape(4, 16).sum(1).tolist()


A, B = np.uint32([0x80F17F02]), np.uint32([5])
SELECTED = {
    "src0_sel:BYTE_0 src1_sel:DWORD": 0x02 + 5,
    "src0_sel:BYTE_1 src1_sel:DWORD": 0x7F + 5,
    "src0_sel:BYTE_3 src1_sel:DWORD": 0x80 + 5,
    "src0_sel:WORD_0 src1_sel:DWORD": 0x7F02 + 5,
    "src0_sel:WORD_1 src1_sel:DWORD": 0x80F1 + 5,
    "src0_sel:DWORD src1_sel:BYTE_1": 0x80F17F02,
}


@pytest.mark.parametrize("selection", SELECTED)
def test_parts_of_registers(selection):
    found = compute(f"v_add_u32_sdwa $d, $a, $b dst_sel:DWORD dst_unused:UNUSED_PAD {selection}", A, B)
    assert found[0] == SELECTED[selection]


def test_parts_with_their_sign():
    text = "v_add_u32_sdwa $d, sext($a), $b dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:{} src1_sel:DWORD"
    assert compute(text.format("BYTE_3"), A, B).view(np.int32)[0] == -128 + 5
    assert compute(text.format("BYTE_2"), A, B).view(np.int32)[0] == -15 + 5
    assert compute(text.format("WORD_0"), A, B)[0] == 0x7F02 + 5


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("dst_sel:BYTE_1 dst_unused:UNUSED_PAD", 0x8500),
        ("dst_sel:BYTE_1 dst_unused:UNUSED_SEXT", 0xFFFF8500),
        ("dst_sel:BYTE_1 dst_unused:UNUSED_PRESERVE", 0x12348578),
        ("dst_sel:WORD_1 dst_unused:UNUSED_PRESERVE", 0x00855678),
    ],
)
def test_parts_that_are_written(where, expected):
    text = f"v_mov_b32_e32 $d, 0x12345678\nv_add_u32_sdwa $d, $a, $b {where} src0_sel:BYTE_3 src1_sel:DWORD"
    assert compute(text, A, B)[0] == expected


def test_a_part_of_a_sum_with_a_carry():
    parts = "dst_sel:BYTE_1 dst_unused:UNUSED_PRESERVE src0_sel:BYTE_3 src1_sel:DWORD"
    text = f"v_mov_b32_e32 $d, -1\nv_add_co_u32_sdwa $d, vcc, $a, $b {parts}"
    assert compute(text, A, B)[0] == 0xFFFF85FF


def test_a_half_in_the_upper_word():
    text = "v_cvt_f32_f16_sdwa $d, $a dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_1"
    assert compute(text, np.uint32([0x40003C00]), out=np.float32)[0] == 2


def test_a_comparison_of_parts():
    text = "v_cmp_lt_i16_sdwa $d, sext($a), $b src0_sel:BYTE_3 src1_sel:DWORD"
    assert compute(text, A, np.uint32([0]), out=bool)[0]
    assert not compute(text.replace("BYTE_3", "BYTE_1"), A, np.uint32([0]), out=bool)[0]


def test_single_lanes():
    body = """v_readlane_b32 s20, $a, 63
        s_mov_b64 s[70:71], exec
        s_mov_b64 exec, 48
        v_readfirstlane_b32 s21, $a
        s_mov_b64 exec, 0
        v_readfirstlane_b32 s22, $a
        s_mov_b64 exec, s[70:71]
        v_mov_b32_e32 $d, s20
        v_writelane_b32 $d, s21, 1
        s_movk_i32 s23, 0x42
        v_writelane_b32 $d, s22, s23"""
    # lanes 4 and 5 are on; 0x42 is lane 2
    expected = [64] * 64
    expected[1], expected[2] = 5, 1
    assert compute(body, LANE + 1).tolist() == expected


def test_lanes_in_a_register_that_is_not_wholly_written():
    written = "v_writelane_b32 v5, s2, 3\n"
    assert kinds(f"{written}v_readlane_b32 s10, v5, 3\ns_add_u32 s11, s10, 1") == set()
    assert kinds(f"{written}v_readlane_b32 s10, v5, 4\ns_add_u32 s11, s10, 1") == {"read of an unwritten register"}
    # what nobody has written is kept in a lane, and taken out again
    kept = "v_writelane_b32 v5, s20, 3\nv_readlane_b32 s10, v5, 3"
    assert kinds(kept) == set()
    assert kinds(f"{kept}\ns_add_u32 s11, s10, 1") == {"read of an unwritten register"}
    assert kinds(f"{kept}\nv_writelane_b32 v5, s2, 3\nv_readlane_b32 s10, v5, 3\ns_add_u32 s11, s10, 1") == set()
    assert kinds(f"{written}v_mov_b32_e32 v6, v5") == {"read of an unwritten register"}


PERMUTED = "ds_bpermute_b32 $d, $a, $b offset:8\n{}"


def test_any_lane_of_the_wave():
    """Given by bytes, of which the lowest two bits count for nothing; the number goes round."""
    of = np.random.default_rng(2).permutation(64).astype(np.uint32)
    found = compute(PERMUTED.format("s_waitcnt lgkmcnt(0)"), 4 * of + LANE % 4, LANE + 1)
    assert found.tolist() == ((of + 2) % 64 + 1).tolist()


def test_any_lane_of_the_wave_that_is_on():
    body = f"""v_mov_b32_e32 $d, {OLD:#x}
        s_mov_b64 s[70:71], exec
        s_mov_b32 exec_lo, 0xffff00ff
        {PERMUTED.format("s_waitcnt lgkmcnt(0)")}
        s_mov_b64 exec, s[70:71]"""
    off = range(8, 16)
    expected = [OLD if lane in off else 0 if (lane + 2) % 64 in off else (lane + 2) % 64 + 1 for lane in range(64)]
    assert compute(body, 4 * LANE, LANE + 1).tolist() == expected


def test_a_lane_is_waited_for():
    body = "v_mov_b32_e32 v3, 0\nds_bpermute_b32 v10, v3, v0\n{}v_mov_b32_e32 v12, v10"
    assert kinds(body.format("")) == {"read of a register before its load was waited for"}
    assert kinds(body.format("s_waitcnt lgkmcnt(0)\n")) == set()


def test_the_upper_word_of_a_constant_is_undefined():
    body = "v_pk_add_f32 v[10:11], v[12:13], 1.0"
    pair = np.ones(64, np.float32)
    write = "v_mov_b32_e32 v12, 0\nv_mov_b32_e32 v13, 0\n"
    store = "\nv_lshlrev_b32_e32 v2, 2, v1\nglobal_store_dword v2, v{}, s[4:5]"
    assert kinds(f"{write}{body}\nv_max_f32_e32 v14, v11, v13") == {"read of an unwritten register"}
    assert not Run(write + body.replace("1.0", "0") + store.format(11), pair).findings
    assert (pair == 0).all()
    assert not Run(write + body + store.format(10), pair).findings
    assert (pair == 1).all()


@pytest.mark.parametrize("body", ["v_pk_mul_f32 v[10:11], v[12:13], {}", "v_pk_mov_b32 v[10:11], {}, {} op_sel:[0,1]"])
@pytest.mark.parametrize("partner", ["v[14:15]", "s[20:21]"])
def test_half_of_a_pair_is_undefined(body, partner):
    """Nothing comes of it but where that half of the result is used."""
    write = "v_mov_b32_e32 v12, 2.0\nv_mov_b32_e32 v13, 2.0\nv_mov_b32_e32 v14, 2.0\ns_mov_b32 s20, 2.0\n"
    body = write + body.format(partner, partner) + "\nv_mov_b32_e32 v16, v{}"
    assert kinds(body.format(10)) == set()
    assert kinds(body.format(11)) == {"read of an unwritten register"}
    assert kinds(body.format(11).replace("v_mov_b32_e32 v16", "v_mov_b32_e32 v11, 0\nv_mov_b32_e32 v16")) == set()


@pytest.mark.parametrize("partner", ["v[14:15]", "s[20:21]"])
def test_lanes_that_are_off_keep_what_they_have(partner):
    write = "v_mov_b32_e32 v11, 2.0\nv_mov_b32_e32 v12, 2.0\nv_mov_b32_e32 v13, 2.0\n"
    write += "v_mov_b32_e32 v14, 2.0\ns_mov_b32 s20, 2.0\n"
    body = f"{write}s_mov_b64 exec, 1\nv_pk_mul_f32 v[10:11], v[12:13], {partner}\ns_mov_b64 exec, {{}}"
    body += "\nv_mov_b32_e32 v16, v11"
    assert kinds(body.format(6)) == set()
    assert kinds(body.format(3)) == {"read of an unwritten register"}


@pytest.mark.parametrize(
    "text",
    [
        "v_mov_b32_dpp v1, v0 wave_shr:1 row_mask:0xf bank_mask:0xf",
        "v_mov_b32_dpp v1, v0 row_bcast:7 row_mask:0xf bank_mask:0xf",
        "v_mov_b32_dpp v1, v0 row_mask:0xf bank_mask:0xf",
        "v_mov_b32_dpp v1, s0 row_shr:1 row_mask:0xf bank_mask:0xf",
        "v_add_u32_sdwa v1, v0, v0 dst_sel:BYTE_4 dst_unused:UNUSED_PAD src0_sel:DWORD src1_sel:DWORD",
        "v_add_u32_sdwa v1, v0, v0 dst_sel:BYTE_1 dst_unused:UNUSED src0_sel:DWORD src1_sel:DWORD",
        "v_cmp_eq_u32_dpp vcc, v0, v1 row_shr:1 row_mask:0xf bank_mask:0xf",
        "v_cmp_eq_u32_sdwa vcc, v0, v1 dst_sel:BYTE_0 src0_sel:DWORD src1_sel:DWORD",
    ],
)
def test_what_is_not_modelled_is_refused(text):
    with pytest.raises(Refused):
        Program(kernel(text))
