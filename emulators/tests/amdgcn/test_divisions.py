"""A block is taken for one behind long divisions only where nothing else leads there."""

from __future__ import annotations

import pytest
from hand_written.amdgcn import kernel

from gpu_emulators.amdgcn.divisions import divides_in_64_bits, only_after_long_divisions
from gpu_emulators.amdgcn.parser import parse

LONG = "v_mul_f32_e32 v4, 0x5f7ffffc, v4"
TEXT = """v_cmp_eq_u32_e32 vcc, 0, v0
    s_and_saveexec_b64 s[10:11], vcc
    s_cbranch_execnz .LBB0_2
    s_andn2_saveexec_b64 s[10:11], s[10:11]
    s_cbranch_execnz .LBB0_3
    .LBB0_1:
    v_mov_b32_e32 v5, 0
    s_endpgm
    .LBB0_2:
    {long}
    s_andn2_saveexec_b64 s[10:11], s[10:11]
    s_cbranch_execz .LBB0_1
    .LBB0_3:
    v_mov_b32_e32 v4, 0
    {behind_short}"""


def taken(long: str = LONG, behind_short: str = "v_mov_b32_e32 v5, 0") -> list[int]:
    of = parse(kernel(TEXT.format(long=long, behind_short=behind_short)))
    return [number for number in range(len(of.blocks)) if only_after_long_divisions(of, number)]


def test_behind_long_divisions():
    of = parse(kernel(TEXT.format(long=LONG, behind_short="v_mov_b32_e32 v5, 0")))
    (number,) = taken()
    assert of.blocks[number][0].text == "v_mov_b32_e32 v5, 0"
    assert [divides_in_64_bits(block) for block in of.blocks].count(True) == 1


@pytest.mark.parametrize(
    "changed",
    [{"long": "v_mul_f32_e32 v4, 2.0, v4"}, {"behind_short": "s_branch .LBB0_1"}],
    ids=["no long division", "short ones lead there too"],
)
def test_where_others_lead_there_too(changed):
    assert taken(**changed) == []
