"""The model of what kernels cost: which pipe takes an instruction, which instructions run, and what bounds the time."""

from __future__ import annotations

import cost_model
import modelled_costs as model
import modelled_sparse
import pytest
from helpers.children import ROOT, Child

from maskpro_kernels.ops.layer_groups import COSTS
from maskpro_kernels.ops.triton import tiles
from maskpro_kernels.ops.triton.tiles import TARGETS

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


def lines_of(text: str) -> tuple[str, ...]:
    return tuple(text.split("\n")[1:-1])


@pytest.mark.parametrize(
    ("instruction", "pipe", "lanes"),
    [
        ("@!P1 FADD2 R1, R2, R3", "fp32", 2),
        ("IMAD.WIDE.U32 R1, R2, R3, RZ", "multiply", 1),
        ("@P0 LOP3.LUT R1, R2, R3, R4, 0x96, !PT", "half", 1),
        ("I2F.U32 R1, R2", "xu", 1),
        ("@!PT LDG.E.128 R4, desc[UR4][R2.64]", "lsu", 4),
        ("LDSM.16.M88.4 R4, [R2]", "lsu", 4),
        ("@UP0 UIADD3 UR4, UR4, 0x1, URZ", "other", 1),
    ],
)
def test_each_instruction_goes_to_a_pipe(instruction, pipe, lanes):
    assert model.cost(instruction) == {pipe: lanes, "issue": 1}


def test_an_unknown_instruction_is_refused():
    with pytest.raises(ValueError, match=r"instruction: expected one that PIPES names, got @P0 FROB R1, R2"):
        model.cost("@P0 FROB R1, R2")


def test_the_largest_branch_of_the_largest_loop_is_what_determined_draws_skip():
    fewest, most = model.instructions(lines_of(LOOP), looping=True)
    # the pointer after a load is not its width
    assert most == {"lsu": 6, "half": 2, "multiply": 1, "other": 4, "fp32": 4, "issue": 12}
    assert most - fewest == {"fp32": 3, "half": 1, "issue": 3}
    assert model.instructions(lines_of(LOOP), looping=False)[1] - most == {"other": 2, "issue": 2}


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
    fewest, most = model.instructions(lines_of(text), looping=True)
    # the slow way of a division is not taken
    assert fewest == {"xu": 1, "other": 3, "issue": 4}
    assert most == {"fp32": 3, "other": 3, "issue": 6}


def test_the_loop_of_a_product_multiplies_and_does_not_wait_after_the_end():
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
    assert model.largest_loop(lines_of(text)) == (4, 8)


def test_multiplications_of_integers_share_the_pipe_of_fp32():
    counts = {"fp32": 96.0, "multiply": 32.0, "half": 32.0, "xu": 4.0, "issue": 164.0}
    for target, clocks, pipe in (("sm_80", 2.0, "fp32"), ("sm_90", 164 / 128, "issue")):
        taken, of = model.busiest(target, counts)
        per_clock = 1e12 / (TARGETS[target].processors * model.CHIPS[target].clock)
        assert (taken, of) == (pytest.approx(clocks * per_clock), pipe)


@pytest.mark.slow
def test_the_costs_by_which_a_step_draws_once_are_those_of_the_model():
    child_code = (
        "from modelled_costs import CHIPS, mask_costs\nfor target in CHIPS: emit([target, list(mask_costs(target))])"
    )
    with Child() as child:
        rows = child(child_code)
    assert {target for target, _ in rows} == model.CHIPS.keys()
    for target, found in rows:
        for ours, held in zip(found, COSTS[target], strict=True):
            assert ours == pytest.approx(held, abs=0.1), (target, found)


def test_modelled_times_of_sparse_products(monkeypatch, capsys):
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    monkeypatch.setattr("sys.argv", ["modelled_sparse.py"])
    modelled_sparse.main()
    printed = capsys.readouterr().out
    assert printed in (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    _, _, *rows = printed.splitlines()
    assert [row.split(" | ")[0] for row in rows] == ["| 1", "| 8", "| 16", "| 64", "| 256", "| 1,024", "| 4,096"]
    # nine tenths of 2.039 TB/s move 11008 x 4096 values of 9 bits, 64 tokens of 16, sums of 2 parts of 4 bytes twice
    card = cost_model.CARDS["A100"]
    route, seconds = cost_model.sparse(card, 64, 11008, 4096)
    moved = 11008 * 4096 * 9 / 8 + 64 * 2 * (11008 + 4096) + 2 * 2 * 64 * 11008 * 4
    assert route == "sparse_mma" and seconds == pytest.approx(moved / (2.039e12 * 3.0 / 3.35))
    # and 312 Tflop/s a dense product of many tokens
    assert cost_model.dense(card, 4096, 11008, 4096) == pytest.approx(2 * 4096 * 11008 * 4096 / 312e12)


@pytest.mark.parametrize(
    ("programs", "resident", "microseconds"),
    # pipes, of which the first is slower, and products: beside each other, or one program on each processor
    [(264, 2, 50), (132, 1, 50 + 20 + 30), (132, 2, 50 + 20 + 30), (264, 1, 50 + 20 + 30)],
)
def test_what_one_program_a_processor_does_in_turn_adds_up(programs, resident, microseconds):
    card = cost_model.CARDS["H100"]
    clocks = 1e-6 * card.clock
    counts = {"half": 50 * 64 * clocks, "lsu": 20 * 32 * clocks}
    found = cost_model.launch(card, counts, 132, 0.0, programs=programs, resident=resident, multiplied=30e-6)
    assert found == pytest.approx(1e-6 * microseconds)
    # the last program runs alone
    more = cost_model.launch(card, counts, 132, 0.0, programs=133, resident=1, multiplied=30e-6)
    assert more == pytest.approx(2 * 132 / 133 * 1e-4)
    moved = cost_model.launch(card, counts, 132, 3.0e8, programs=programs, resident=resident)
    assert moved == pytest.approx(1e-4, rel=1e-9)


@pytest.mark.slow
def test_masked_products_of_lower_gaps_cost_more():
    with Child() as child:
        (rows,) = child("""
from cost_model import CARDS, masked, packed, over_groups, two_passes
size = 11008, 4096
emit([[masked(card, 128, *size, gap) for gap in (10.0, 8.0, 5.7)]
      + [masked(card, 128, *size, 10.0, "codes"), two_passes(card, 128, *size, 10.0), packed(card, *size, 8)]
      + [over_groups(card, kernel, *size, 10.0) for kernel in ("sample_mask", "mask_score", "score_update")]
      for card in (CARDS["A100"], CARDS["H100"])])
""")
    for gap_10, gap_8, gap_6, codes, two, packed, draw, score, update in rows:
        assert gap_10 < gap_8 < gap_6 and codes < two < gap_8
        assert packed < draw < min(update, score)
