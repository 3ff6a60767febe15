"""AMDGCN text into instructions, and what is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hand_written.amdgcn import kernel

from gpu_emulators.amdgcn import Program
from gpu_emulators.amdgcn.parser import Literal, Modified, Scalar, Vector, Word, parse
from gpu_emulators.findings import Findings, Refused


def parsed(text: str):
    return next(ins for ins in parse(kernel(text)).instructions() if ins.text == text)


def test_operands():
    ins = parsed("v_fma_f32 v[2:3], -s[4:5], |v6|, 0x10")
    assert ins.operands == [
        Vector(2, 2),
        Modified(Scalar(4, 2), negated=True),
        Modified(Vector(6), absolute=True),
        Literal(16),
    ]
    assert parsed("v_max_f32_e64 v1, -|v2|, -1.5").operands[1:] == [
        Modified(Vector(2), negated=True, absolute=True),
        Literal(-1.5),
    ]
    assert parsed("v_accvgpr_write_b32 a3, vcc_hi").operands == [Vector(259), Scalar(107)]
    assert parsed("v_and_b32_sdwa v1, sext(v2), v3 src0_sel:BYTE_0 src1_sel:DWORD").operands[1] == Modified(
        Vector(2), extended=True
    )


def test_opcodes_and_modifiers():
    ins = parsed("v_add_f32_dpp v1, v1, v1 quad_perm:[2,3,0,1] row_mask:0xa bank_mask:0xf bound_ctrl:1")
    assert (ins.opcode, ins.encoding) == ("v_add_f32", "dpp")
    assert ins.modifiers == {"quad_perm": (2, 3, 0, 1), "row_mask": 10, "bank_mask": 15, "bound_ctrl": 1}
    ins = parsed("buffer_load_dword v9, v0, s[20:23], 0 offen offset:16 nt")
    assert ins.modifiers == {"offen": 1, "offset": 16, "nt": 1} and ins.encoding == ""
    assert parsed("s_waitcnt vmcnt(3) lgkmcnt(0)").operands == [Word("vmcnt", 3), Word("lgkmcnt", 0)]
    assert parsed("global_load_dword v1, v[2:3], off").operands[2] == Word("off")


def test_where_instructions_stem_from():
    text = kernel("s_nop 0\n.loc\t1 7 3\ns_nop 1")
    where = {ins.text: ins.where for ins in parse(text).instructions()}
    assert where["s_nop 0"] == "by_hand.py:1" and where["s_nop 1"] == "by_hand.py:7"
    (line,) = (ins.line for ins in parse(text).instructions() if ins.text == "s_nop 1")
    assert text.splitlines()[line - 1].strip() == "s_nop 1"


def test_blocks_end_at_labels_branches_and_barriers():
    body = ".LBB0_9:\ns_nop 0\n.LBB0_1:\ns_nop 1\ns_cbranch_scc0 .LBB0_1\ns_nop 2\ns_barrier\ns_nop 3"
    blocks = [[ins.text for ins in block][-2:] for block in parse(kernel(body)).blocks]
    assert blocks[0][-1] == "s_nop 0"
    assert blocks[1:] == [["s_nop 1", "s_cbranch_scc0 .LBB0_1"], ["s_nop 2", "s_barrier"], ["s_nop 3", "s_endpgm"]]


PRELOADED = """s_load_dwordx2 s[2:3], s[0:1], 0x0
    s_branch .LBB0_0
    .p2align 8
    .LBB0_0:
    v_lshlrev_b32_e32 v2, 2, v0
    v_mov_b32_e32 v10, s4
    global_store_dword v2, v10, s[2:3]"""


def test_arguments_in_registers():
    """A wave begins behind the code that loads them, at a multiple of 256 bytes."""
    text = kernel(PRELOADED, user_sgpr_kernarg_preload_length=2, user_sgpr_count=4)
    # what the helper puts in front belongs behind
    head = re.search(r"\ts_load_dwordx2 s\[4:5\].*?v0\n", text, re.S)[0]
    program = Program(text.replace(head, ""))
    assert program.kernel.entry == 1
    memory, findings, result = program.memory(), Findings(), np.full(64, 9, np.uint32)
    memory.register(1 << 12, result, "result")
    program.launch((1, 1, 1), [1 << 12], 0, memory, findings)
    assert not findings and (result == 0).all()
    with pytest.raises(Refused, match="at an address of its own"):
        Program(text.replace(".p2align 8", ""))


def test_hidden_arguments_tell_how_a_kernel_was_launched():
    """Each is a word or less, behind the address of the result."""
    names = "block_count_x block_count_y group_size_x group_size_y remainder_x dynamic_lds_size grid_dims".split()
    hidden = "".join(
        f"      - .offset:         {8 + 4 * k}\n        .size:           4\n        .value_kind:     hidden_{name}\n"
        for k, name in enumerate(names)
    )
    body = """s_load_dwordx4 s[20:23], s[0:1], 0x8
        s_load_dwordx4 s[24:27], s[0:1], 0x18
        v_mov_b32_e32 v2, 0
        s_mov_b64 exec, 1
        s_waitcnt lgkmcnt(0)
    """ + "\n".join(
        f"v_mov_b32_e32 v10, s{20 + k}\nglobal_store_dword v2, v10, s[4:5] offset:{4 * k}" for k in range(len(names))
    )
    text = kernel(body, threads=128, kernarg_size=40)
    program = Program(text.replace("    .group_segment", f"{hidden}    .group_segment"))
    assert program.parameters == 1
    memory, findings, result = program.memory(), Findings(), np.zeros(len(names), np.uint32)
    memory.register(1 << 12, result, "result")
    program.launch((2, 3, 1), [1 << 12], 48, memory, findings, last=1)
    # one of them is not known, and poison
    assert result.tolist() == [2, 3, 128, 1, 0, 48, 0xA5A5A5A5]


def test_arguments_are_counted():
    program = Program(kernel(""))
    with pytest.raises(ValueError, match="takes 1 arguments, 2 came"):
        program.launch((1, 1, 1), [0, 0], 0, program.memory(), Findings())


@pytest.mark.parametrize(
    "text",
    [
        "v_unheard_of_b32 v1, v2",
        "v_add_u32_e32 v1, v2",
        "v_add_u32_e32 v1, v2, v3, v4",
        "v_add_u32_e32 v1, v2, v3 clamp:1",
        "v_add_u32_e32 s1, v2, v3",
        "v_add_u32_e32 v1, v[2:3], v3",
        "v_add_u32_e32 v1, -v2, v3",
        "v_add_u32_e32 v1, sext(v2), v3",
        "v_mov_b64_e32 v[2:3], 0x12345678",
        "v_cmp_eq_u32_e32 s[2:3], v1, v2",
        "v_fmac_f32 v1, v2, v3",
        "s_add_u32 s1, v2, s3",
        "s_add_u32 s1, s2, s3 op_sel:[0,1]",
        "s_waitcnt vmcnt(64)",
        "s_waitcnt vscnt(0)",
        "s_waitcnt",
        "s_cbranch_cdbgsys .LBB0_1\n.LBB0_1:",
        "s_branch .LBB0_9",
        "s_load_dword s20, s[4:5], 0x3",
        "buffer_load_dword v1, off, s[8:11], 0",
        "buffer_load_dword v1, v2, s[8:11], 0 idxen:1",
        "buffer_load_dword v1, v2, s[8:11], 0 offen lds:1",
        "buffer_load_dword v1, v2, s[8:11], 0 offen offset:4096",
        "global_load_dword v1, v2, s[4:5] offset:4096",
        "global_load_short_d16_hi v1, v2, s[4:5]",
        "ds_read_b32 v1, v2 gds:1",
        "ds_read2_b32 v[2:3], v2 offset1:256",
        "v_pk_add_f32 v[2:3], v[4:5], v[6:7] op_sel:[2,0]",
        "v_pk_mov_b32 v[2:3], v[4:5], v[6:7] neg_lo:[1,0]",
        "v_fma_mix_f32 v1, v2, v3, v4 op_sel:[1,0,0]",
        "v_fma_mix_f32 v1, v2, 1.0, v4 op_sel:[0,1,0] op_sel_hi:[0,1,0]",
        "v_fma_mix_f32 v1, v2, v3, v4 clamp",
        "v_readlane_b32 v1, v2, 3",
        "global_atomic_add_f32 v0, v1, s[4:5]",
        "v_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], a[0:3]",
        "scratch_load_dword v1, off, off",
        ".unknown 3",
        "v_add_u32_e32 v1, ?, v2",
    ],
)
def test_what_is_not_known_is_refused(text):
    with pytest.raises(Refused):
        Program(kernel(text))


@pytest.mark.parametrize(
    "entry",
    [
        {"private_segment_fixed_size": 16},
        {"float_denorm_mode_32": 0},
        {"float_round_mode_32": 1},
        {"ieee_mode": 0},
        {"user_sgpr_dispatch_ptr": 1},
        {"system_vgpr_workitem_id": 1},
        {"something_new": 0},
    ],
)
def test_descriptors_that_ask_for_more_are_refused(entry):
    with pytest.raises(Refused, match=next(iter(entry))):
        Program(kernel("", **entry))


def test_other_waves_and_texts_are_refused():
    text = kernel("")
    with pytest.raises(Refused, match="hidden_printf_buffer"):
        Program(text.replace("global_buffer", "hidden_printf_buffer"))
    with pytest.raises(Refused, match="waves of 64"):
        Program(text.replace(".wavefront_size: 64", ".wavefront_size: 32"))
    with pytest.raises(Refused, match="has no ieee_mode"):
        Program(text.replace("\t\t.amdhsa_ieee_mode 1\n", ""))
    with pytest.raises(Refused, match="this one has 2"):
        Program(text + text)
    with pytest.raises(Refused, match="does not end with s_endpgm"):
        Program(text.replace("s_endpgm", "s_nop 0"))
