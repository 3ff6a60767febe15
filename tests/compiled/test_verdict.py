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


def test_a_slow_case_fails(monkeypatch):
    """With the times of a GPU in place of an emulator's; torch's errors are no verdict."""
    run = verdict.Run.__new__(verdict.Run)
    run.emulator, run.card = None, verdict.CARDS["H100"]
    times = iter([1.4, 1.0, 1.6, 1.0])
    monkeypatch.setattr(verdict, "seconds_of", lambda call: call() or next(times))

    def refused():
        raise RuntimeError("only on | 8.x\nat a line")

    work = verdict.Work("2 x 3", lambda: None, lambda found: None, lambda card: 1.0)
    work.alternatives.update({"dense": lambda: lambda: None, "CUTLASS": refused})
    monkeypatch.setattr(verdict, "CASES", {"fast": lambda run: work, "slow": lambda run: work})
    rows = [verdict.case_row(run, name) for name in verdict.CASES]
    assert [row["verdict"] for row in rows] == ["PASS", "FAIL: more than 1.5 times the model"]
    assert rows[0]["others"] == {"dense": 1.0, "CUTLASS": "RuntimeError: only on / 8.x"}
    report = {"verdict": "FAIL", "emulated": False, "environment": {}, "tests": [], "cases": rows, "host": {"a": 2e-5}}
    assert rows_of(verdict.page(report))["a"] == ["20.0"]
    assert rows_of(verdict.page(report))["fast"][1:5] == ["1400000.0", "1000000.0", "1.40", "1000000.0 (0.71)"]


@pytest.mark.parametrize(("cut_off", "expected"), [(False, "PASS"), (True, "PASS, but tests were cut off")])
def test_tests_that_did_not_end_are_in_the_verdict(cut_off, expected, monkeypatch):
    run = verdict.Run.__new__(verdict.Run)
    run.emulator = None
    monkeypatch.setattr(verdict, "CASES", {})
    for name in ("environment", "host_times"):
        monkeypatch.setattr(verdict, name, lambda run: {})
    monkeypatch.setattr(verdict, "test_row", lambda *_: {"verdict": "PASS", "cut off": cut_off})
    assert verdict.report_of(run)["verdict"] == expected
