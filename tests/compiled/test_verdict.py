"""The dry run of ``benchmarks/verdict.py``: each case on the emulator, and the page that a GPU would get."""

from __future__ import annotations

import pytest
import verdict
from helpers.planted import contracted, replaced

from maskpro_kernels.ops.triton import tiles

pytestmark = pytest.mark.compiled

CODES = "product by codes, 128 tokens"


def rows_of(page: str) -> dict[str, list[str]]:
    """Cells of the page's rows, by the first one."""
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    return {first: cells for first, *cells in lines}


@pytest.fixture(autouse=True)
def on_sm_80(compiled_for):
    compiled_for("sm_80")


def test_every_case_passes(emulator, launched):
    saved = []
    report = verdict.report_of(verdict.Run(emulator), save=lambda report: saved.append(verdict.page(report)))
    assert [page.splitlines()[0] for page in saved] == ["# Verdict: not finished"] * 15 + ["# Verdict: PASS"]
    rows = rows_of(saved[-1])
    assert verdict.CASES.keys() <= rows.keys() and all(rows[name][-1] == "PASS" for name in verdict.CASES)
    assert sum("emulated" in cells[1:] for cells in rows.values()) == 13
    assert rows["masked_linear"] == rows["Sparse24Linear"] == ["emulated"]
    assert report["environment"]["card"] == "emulator of PTX for sm_80" and report["environment"]["ptxas"][0] == "V"
    kernels = "sample_mask mask_score score_update packed_vector sparse_mma masked_linear"
    kernels = f"{kernels} masked_linear_input_grad masked_linear_weight_grad"
    assert all(launched[kernel] for kernel in kernels.split()) and tiles.ON_CPU == "sm_80"


def test_a_fault_is_the_verdict_of_its_case_alone(emulator):
    """Scores that are rounded once, metadata of other rows, and no barriers."""
    faults = {
        "score_update_kernel": contracted,
        "sparse_mma_kernel": replaced(r"(mma\.sp[^;]*), 0x0;", r"\1, 0x1;"),
        "masked_linear_kernel": replaced(r"^.*bar\.sync[^;]*;", "", count=0),
    }
    emulator.rewrite = lambda text: next((fault(text) for name, fault in faults.items() if name in text), text)
    report = verdict.report_of(verdict.Run(emulator), ["draw", "update", "2:4 product, 16 tokens", CODES])
    page = verdict.page(report)
    found = {name: cells[-1] for name, cells in rows_of(page).items()}
    assert page.startswith("# Verdict: FAIL\n") and found["draw"] == "PASS"
    assert "of 12288 have other bits than on the CPU" in found["update"]
    assert "expected at most" in found["2:4 product, 16 tokens"]
    # the result is right
    assert "race" in found[CODES], found
