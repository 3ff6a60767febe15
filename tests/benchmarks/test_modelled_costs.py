"""The model of what kernels cost: the costs of the package and a table of the documents are its."""

from __future__ import annotations

import cards
import cost_model
import modelled_costs as model
import modelled_sparse
import pytest
from helpers.children import ROOT, Child

from maskpro_kernels.ops.layer_groups import COSTS
from maskpro_kernels.ops.triton import tiles


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
    # 89% of 2.039 TB/s move 11008 x 4096 values of 9 bits, 64 tokens of 16, sums of 2 parts of 4 bytes twice
    card = cards.CARDS["A100"]
    route, seconds = cost_model.sparse(card, 64, 11008, 4096)
    moved = 11008 * 4096 * 9 / 8 + 64 * 2 * (11008 + 4096) + 2 * 2 * 64 * 11008 * 4
    assert route == "sparse_mma" and seconds == pytest.approx(moved / (2.039e12 * 2.97 / 3.35), rel=1e-4)
    # 87% of 312 Tflop/s a dense product of many tokens, and 1.7 times as much a sparse one
    operations = 2 * 11008 * 4096
    assert cost_model.dense(card, 4096, 11008, 4096) == pytest.approx(4096 * operations / 271.2e12, rel=1e-3)
    assert cost_model.sparse(card, 1024, 11008, 4096)[1] == pytest.approx(1024 * operations / 461e12, rel=1e-2)


# Processors, clocks in MHz and bits of the memory's bus; TB/s and dense Tflop/s of the data sheets, to a tenth for
# those at other clocks; Tflop/s of a large product
SHEETS = {
    "H100 SXM": ("9.0", 132, 1980, 2619, 5120, 3.35, 1070, 700),
    "H100 PCIe": ("9.0", 114, 1755, 1593, 5120, 2.04, 819, 500),
    "A10": ("8.6", 72, 1695, 6251, 384, 0.600, 125, 90),
    "RTX 4090": ("8.9", 128, 2520, 10501, 384, 1.008, 165.2, 170),
    "L4": ("8.9", 58, 2040, 6251, 192, 0.300, 121, 90),
    "L40S": ("8.9", 142, 2520, 9001, 384, 0.864, 366, 300),
    "RTX 5090": ("12.0", 170, 2407, 14001, 512, 1.792, 209.5, 200),
    "RTX PRO 6000": ("12.0", 188, 2617, 14001, 512, 1.792, 504, 400),
}


@pytest.mark.parametrize("card", SHEETS)
def test_a_card_is_found_by_its_properties(card):
    """Also where cards of one compute capability differ in their matrix units."""
    capability, processors, clock, memory_clock, width, bandwidth, peak, reached = SHEETS[card]
    major, minor = map(int, capability.split("."))
    properties = cards.Properties(major, minor, processors, 1000 * clock, 1000 * memory_clock, width)
    found = cards.card_of(properties, 1e12 * reached)
    assert found.bandwidth == pytest.approx(1e12 * bandwidth, rel=0.01)
    share = cards.ARCHITECTURES[capability].reached
    assert found.operations == pytest.approx(share * 1e12 * peak, rel=0.01) and 0.7 < share < 0.95
    assert found.torch_sparse == (major == 8)


@pytest.mark.parametrize(("field", "value"), [("minor", 7), ("clock_rate", 0), ("memory_bus_width", 0)])
def test_what_a_card_does_not_say_is_not_guessed(field, value):
    reason = "compute capability 8.7: expected one of 8.0, 8.6" if field == "minor" else f"{field}: expected a number"
    with pytest.raises(ValueError, match=reason):
        cards.card_of(cards.KNOWN["A100"]._replace(**{field: value}))


@pytest.mark.slow
def test_all_that_the_verdict_times_has_a_model():
    """On each target, of kernels that are compiled for it."""
    child_code = """
import cost_model
from cards import CARDS
size = 11008, 4096
for name in ("A100", "H100", "B200"):
    card = CARDS[name]
    times = [cost_model.over_groups(card, kernel, *size, 10.0) for kernel in cost_model.OVER_GROUPS]
    times += [cost_model.by_default(card, 128, *size, 10.0), cost_model.masked(card, 128, *size, 10.0, "codes")]
    times += [cost_model.training_step(card, 2048, *size, 10.0), cost_model.unpacked(card, *size)]
    times += [cost_model.packed(card, tokens, *size, bits) for tokens in (1, 16, 64) for bits in (8, 4)]
    times += [cost_model.sparse(card, tokens, *size)[1] for tokens in (1, 16, 64, 1024, 4096)]
    emit(times)
"""
    with Child() as child:
        for times in child(child_code):
            assert all(2e-6 < seconds < 1e-2 for seconds in times), times
