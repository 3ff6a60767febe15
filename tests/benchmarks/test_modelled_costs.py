"""The model of what kernels cost: the costs of the package and a table of the documents are its."""

from __future__ import annotations

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
    # nine tenths of 2.039 TB/s move 11008 x 4096 values of 9 bits, 64 tokens of 16, sums of 2 parts of 4 bytes twice
    card = cost_model.CARDS["A100"]
    route, seconds = cost_model.sparse(card, 64, 11008, 4096)
    moved = 11008 * 4096 * 9 / 8 + 64 * 2 * (11008 + 4096) + 2 * 2 * 64 * 11008 * 4
    assert route == "sparse_mma" and seconds == pytest.approx(moved / (2.039e12 * 3.0 / 3.35))
    # and 312 Tflop/s a dense product of many tokens
    assert cost_model.dense(card, 4096, 11008, 4096) == pytest.approx(2 * 4096 * 11008 * 4096 / 312e12)
