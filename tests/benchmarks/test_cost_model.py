"""The model of what kernels cost: which pipe takes an instruction, which instructions run, and what bounds the time."""

from __future__ import annotations

import json
from dataclasses import replace

import aot_report
import cost_model
import pytest
import sass
from chips import CHIPS, seconds_by_pipe

from maskpro_kernels.ops.triton.tiles import CONFIGURATIONS, PROCESSORS

# A loop over blocks with a branch around the noise, and a shorter branch in front of it
LOOP = """
S2R R0, SR_CTAID.X
.L_x_0:
@!P0 LDG.E.128 R4, desc[UR4][R2.64]
FMNMX.NAN R8, R4, R5, !PT
IMAD.WIDE.U32 R10, R8, -0x326172a9, RZ
@P1 BRA `(.L_x_1)
FADD R8, R8, 1
.L_x_1:
@P2 BRA `(.L_x_2)
FMUL R8, R8, R8
FADD2 R8, R8, R8
I2FP.F32.U32 R8, R8
.L_x_2:
UIADD3 UR4, UR4, 0x1, URZ
STG.E.64 desc[UR4][R2.64], R8
@P3 BRA `(.L_x_0)
EXIT
"""
LINES = tuple(LOOP.split("\n")[1:-1])


@pytest.mark.parametrize(
    ("instruction", "pipe", "lanes"),
    [
        ("FMUL R1, R2, R3", "fp32", 1),
        ("@!P1 FADD2 R1, R2, R3", "fp32", 2),
        ("IMAD.WIDE.U32 R1, R2, R3, RZ", "multiply", 1),
        ("@P0 LOP3.LUT R1, R2, R3, R4, 0x96, !PT", "half", 1),
        ("FSETP.GT.AND P0, PT, R1, R2, PT", "half", 1),
        ("I2FP.F32.U32 R1, R2", "half", 1),
        ("I2F.U32 R1, R2", "xu", 1),
        ("MUFU.RCP R1, R2", "xu", 1),
        ("DADD R2, R4, R6", "fp64", 1),
        ("@!PT LDG.E.128 R4, desc[UR4][R2.64]", "lsu", 4),
        ("LDG.E R4, desc[UR4][R2.64]", "lsu", 1),
        ("LDSM.16.M88.4 R4, [R2]", "lsu", 4),
        ("HGMMA.64x16x16.F32.BF16 R4, R8, gdesc[UR4], R4", "tensor", 1),
        ("@UP0 UIADD3 UR4, UR4, 0x1, URZ", "other", 1),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", "other", 1),
    ],
)
def test_each_instruction_goes_to_a_pipe(instruction, pipe, lanes):
    assert sass.cost(instruction) == {pipe: lanes, "issue": 1}


def test_an_unknown_instruction_is_refused():
    with pytest.raises(ValueError, match=r"instruction: expected one that sass.PIPES names, got @P0 FROB R1, R2"):
        sass.cost("@P0 FROB R1, R2")


def test_the_largest_branch_of_the_largest_loop_is_what_determined_draws_skip():
    fewest, most = sass.instructions(LINES, looping=True)
    # the pointer behind a load is not its width
    assert most == {"lsu": 6, "half": 2, "multiply": 1, "other": 4, "fp32": 4, "issue": 12}
    assert most - fewest == {"fp32": 3, "half": 1, "issue": 3}
    whole = sass.instructions(LINES, looping=False)[1]
    assert whole - most == {"other": 2, "issue": 2}


def test_of_a_branch_with_two_sides_one_runs():
    text = """
.L_x_0:
@P1 BRA `(.L_x_1)
FADD R8, R8, 1
FADD R8, R8, 1
FADD R8, R8, 1
BRA `(.L_x_2)
.L_x_1:
MUFU.RCP R8, R8
@!P4 BRA `(.L_x_2)
MOV R9, R8
CALL.REL.NOINC `($slow)
.L_x_2:
@P3 BRA `(.L_x_0)
EXIT
"""
    fewest, most = sass.instructions(tuple(text.split("\n")[1:-1]), looping=True)
    # the slow way of a division is not taken
    assert fewest == {"xu": 1, "other": 3, "issue": 4}
    assert most == {"fp32": 3, "other": 3, "issue": 6}


def test_a_branch_by_a_uniform_predicate_is_one_of_two_ways():
    text = """
BRA.U UP0, `(.L_x_0)
FADD R8, R8, 1
FADD R8, R8, 1
.L_x_0:
BRA `(.L_x_1)
MUFU.RCP R8, R8
.L_x_1:
EXIT
"""
    fewest, most = sass.instructions(tuple(text.split("\n")[1:-1]), looping=False)
    assert fewest == {"other": 3, "issue": 3}
    assert most == {"fp32": 2, "other": 3, "issue": 5}


def test_the_loop_of_a_product_multiplies_and_does_not_wait_behind_the_end():
    text = """
.L_x_0:
FADD R8, R8, 1
FADD R8, R8, 1
@P0 BRA `(.L_x_0)
.L_x_1:
UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR10]
@P1 BRA `(.L_x_2)
.L_x_3:
@P2 BRA `(.L_x_1)
FADD R8, R8, 1
EXIT
.L_x_2:
BRA `(.L_x_3)
"""
    assert sass.largest_loop(tuple(text.split("\n")[1:-1])) == (4, 8)


def test_each_architecture_has_its_own_rates():
    counts = {"fp32": 96.0, "multiply": 32.0, "half": 32.0, "xu": 4.0, "issue": 164.0}
    clock = {target: chip.clock * PROCESSORS[target] for target, chip in CHIPS.items()}
    a100, h100 = (
        {pipe: time * clock[target] for pipe, time in seconds_by_pipe(target, counts).items()}
        for target in ("sm_80", "sm_90")
    )
    # integer multiplications share the pipe of FP32, which an A100 has once
    assert a100["fp32"] == pytest.approx(2.0) and h100["fp32"] == pytest.approx(1.0)
    assert h100["multiply"] == h100["half"] == pytest.approx(0.5)
    assert h100["xu"] == pytest.approx(0.25) and h100["issue"] == pytest.approx(164 / 128)
    assert cost_model.busiest(a100) == (pytest.approx(2.0), "fp32")


def test_registers_shared_memory_and_warps_limit_the_programs_of_a_processor():
    chip = CHIPS["sm_90"]
    assert chip.resident(registers=32, shared=0, num_warps=1) == 32
    assert chip.resident(registers=32, shared=0, num_warps=4) == 16
    assert chip.resident(registers=65, shared=0, num_warps=4) == 7
    assert chip.resident(registers=32, shared=100 << 10, num_warps=4) == 2


def test_a_launch_takes_as_long_as_its_busiest_resource():
    processors = PROCESSORS["sm_90"]
    launch = cost_model.Launch("sm_90", {"half": 3.0, "issue": 2.0}, {"memory": 3.5}, 8 * processors, 4)
    assert launch.waves == 2 and launch.uneven == 1 and launch.bound == (3.5, "memory")
    # half of the processors: pipes are those of one, the memory is that of all
    launch = replace(launch, programs=processors // 2)
    assert launch.waves == 1 / 8 and launch.uneven == 2 and launch.bound == (6.0, "half")
    launch = replace(launch, programs=5 * processors + 1)
    assert launch.bound == (pytest.approx(3.0 * 6 / 5, rel=2e-3), "half")


def test_small_layers_are_spread_over_the_processors():
    processors, config = PROCESSORS["sm_90"], CONFIGURATIONS["masked_weight", "sm_90", 4]
    assert config.programs(64 * 1_000 - 5, processors) == 1_000
    assert config.programs(64 * 20_000, processors) == 64 * processors
    assert config.programs(64 << 20, processors) == (1 << 20) / config.steps


def test_open_blocks_compute_the_noise():
    fewest, most = {"half": 20.0, "issue": 30.0}, {"half": 40.0, "fp32": 45.0, "issue": 95.0}
    sharp, flat = (cost_model.expected(fewest, most, 64, gap, 2, 4) for gap in (26.0, 0.0))
    assert sharp == pytest.approx(fewest | {"fp32": 0.0}, abs=1e-4)
    assert flat == pytest.approx(most)
    between = cost_model.expected(fewest, most, 64, 8.0, 2, 4)
    assert 0.05 * 45 < between["fp32"] < 0.12 * 45


def test_the_table_holds_what_the_issue_of_a_draw_is():
    """Of the kernels over groups at 2:4, on each architecture and by each release of Triton that it lists."""
    for release, rows in json.loads(aot_report.TABLE.read_text()).items():
        for target in CHIPS:
            row = rows[f"masked_weight, 2:4, {target}"]
            # weights and logits in, weights out
            by_bytes = 1e12 * 8 / CHIPS[target].bytes_per_second
            assert row["stack"] == 0 and row["resident"] == 32, (release, target)
            # on a B200 memory is so fast that the draw bounds
            assert row["determined_ps"] < (1 if target != "sm_100" else 2) * by_bytes, (release, target)
