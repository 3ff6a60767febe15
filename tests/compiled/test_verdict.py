"""``benchmarks/verdict``: each case on the emulator, and rehearsals of its command on GPUs that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace

import host_time
import pytest
import torch
from helpers.children import BENCHMARKS, ROOT, environment
from helpers.planted import contracted, replaced
from helpers.stand_in_gpu import install
from torch.nn.functional import linear
from verdict import cases, children, command, needs, timing
from verdict.cases import CASES, Run, assert_product, product_check
from verdict.page import page, status

from maskpro_kernels.ops.triton import tiles

pytestmark = pytest.mark.compiled

CODES = "product by codes, 128 tokens"
NAMES = "major minor multi_processor_count clock_rate memory_clock_rate memory_bus_width".split()
H100 = dict(zip(NAMES, (9, 0, 132, 1_980_000, 2_619_000, 5120), strict=True))
CARDS = {
    "H100 SXM": H100,
    "H100 PCIe": H100 | {"multi_processor_count": 114, "clock_rate": 1_755_000, "memory_clock_rate": 1_593_000},
    "RTX 4090 of a laptop": dict(zip(NAMES, (8, 9, 76, 2_040_000, 9_001_000, 256), strict=True)),
    "B200": dict(zip(NAMES, (10, 0, 148, 1_965_000, 3_996_000, 8192), strict=True)),
    "A100, MIG 1g.10gb": dict(zip(NAMES, (8, 0, 14, 1_410_000, 1_593_000, 640), strict=True)),
}
# Operations a second of a large product
REACHED = {"H100 SXM": 7e14, "H100 PCIe": 5e14, "RTX 4090 of a laptop": 7e13, "B200": 1.5e15, "A100, MIG 1g.10gb": 3e13}
# Microseconds that the planted case should take, by its bytes
UNPACKED = {"H100 SXM": 17.6, "H100 PCIe": 29.0, "RTX 4090 of a laptop": 102.7, "B200": 7.2, "A100, MIG 1g.10gb": 232.0}


def rows_of(text: str) -> dict[str, list[str]]:
    """Cells of the page's rows, by the first one."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {first: cells for first, *cells in lines}


def lines_of(text: str) -> dict[str, str]:
    """What the page says first."""
    lines = [line.removeprefix("- ").partition(": ") for line in text.splitlines()[2:5]]
    return {first: rest for first, _, rest in lines}


@pytest.fixture(autouse=True)
def on_sm_80(compiled_for):
    compiled_for("sm_80")


def test_every_case_passes(emulator, launched):
    saved = []
    report = command.emulated_report(emulator, save=lambda report: saved.append(page(report)))
    assert len(saved) == len(CASES) + 1 and "not finished, 0 wrong of 1 case and 0 tests" in saved[0]
    assert lines_of(saved[-1]) == {
        "RIGHT": f"PASS, {len(CASES) - 2} cases and 0 tests",
        "FAST": "not judged, emulated",
        "not run": "layers on a second GPU: one GPU; packed model in vLLM: vLLM has no emulator",
    }
    rows = rows_of(saved[-1])
    assert CASES.keys() <= rows.keys() and status(report) == 0
    assert sum("emulated" in cells for cells in rows.values()) == sum(row["timed"] for row in report["cases"]) + 4
    assert rows["masked_linear"] == rows["Sparse24Linear"] == ["emulated"]
    assert report["environment"]["card"] == "emulator of PTX for sm_80" and report["environment"]["ptxas"][0] == "V"
    kernels = "sample_mask mask_score score_update packed_vector packed_linear sparse_mma masked_linear unpack"
    kernels = f"{kernels} masked_linear_input_grad masked_linear_weight_grad straight_through"
    assert all(launched[kernel] for kernel in kernels.split()) and tiles.ON_CPU == "sm_80"


def test_a_fault_is_the_verdict_of_its_case_alone(emulator):
    """Scores that are rounded once, metadata of other rows, and no barriers."""
    faults = {
        "score_update_kernel": contracted,
        "sparse_mma_kernel": replaced(r"(mma\.sp[^;]*), 0x0;", r"\1, 0x1;"),
        "masked_linear_kernel": replaced(r"^.*bar\.sync[^;]*;", "", count=0),
    }
    emulator.rewrite = lambda text: next((fault(text) for name, fault in faults.items() if name in text), text)
    names = ["draw", "update", "2:4 product, 16 tokens", CODES]
    report = command.emulated_report(emulator, names)
    found = {name: rows_of(page(report))[name][-2] for name in names}
    assert lines_of(page(report))["RIGHT"] == "FAIL, 3 wrong of 4 cases and 0 tests" and status(report) == 1
    assert found["draw"] == "PASS"
    assert "of 12288 have other bits than on the CPU" in found["update"]
    assert "expected at most" in found["2:4 product, 16 tokens"]
    # the result is right
    assert "race" in found[CODES], found


@pytest.mark.parametrize("tokens", [16, 128])
def test_a_small_weight_is_not_lost(tokens):
    """The largest error does not show it, products with unit vectors do."""
    run = Run()
    run.device = "cpu"
    x = run.random(tokens, 128, seed=1)
    weight = run.random(96, 128, seed=2)
    weight[:, ::4] *= 1e-4
    wrong = weight.clone()
    wrong[:, ::4] = 0
    assert_product(linear(x, wrong), x, weight)
    product_check(partial(linear, weight=weight), x, weight)(linear(x, weight))
    with pytest.raises(AssertionError, match="have other bits"):
        product_check(partial(linear, weight=wrong), x, weight)(linear(x, wrong))


class AtOnce:
    """A child process, in this one."""

    def __init__(self, words: list, **_):
        assert words[:2] == children.COMMAND
        self.code = children.work(Path(words[-1]))

    def poll(self) -> int:
        return self.code


@pytest.fixture
def rehearsed(tmp_path, monkeypatch):
    """rehearsed(scenario) runs the command on a stand-in, with its children in this process: (exit status, report)."""

    def run(scenario: dict, *words: str) -> tuple[int, dict, str]:
        with monkeypatch.context() as patch:
            install(scenario, patch.setattr)
            patch.setattr(children, "subprocess", SimpleNamespace(Popen=AtOnce))
            patch.setattr(host_time, "measured", partial(host_time.measured, rounds=2, count=2))
            code = command.main(["--output", str(tmp_path / "page"), *words])
        return code, json.loads((tmp_path / "page.json").read_text()), (tmp_path / "page.md").read_text()

    return run


@pytest.mark.parametrize("card", CARDS)
def test_each_card_has_its_own_rates(card, rehearsed):
    seconds = 1e-6 * UNPACKED[card]
    cases = {"fast": [1.2 * seconds, None], "slow": [2.0 * seconds + 3e-6, None]}
    scenario = {"properties": CARDS[card], "cases": cases, "reached": REACHED[card]}
    code, report, text = rehearsed(scenario, "--cases", "fast", "slow")
    assert code == 3, text
    assert lines_of(text)["RIGHT"] == "PASS, 2 cases and 0 tests"
    assert lines_of(text)["FAST"] == "FAIL, 1 of 2 cases not within 1.5 times the model"
    rows = {row["case"]: row for row in report["cases"]}
    assert rows["fast"]["modelled"] == pytest.approx(seconds, rel=0.01)
    assert [rows_of(text)[name][-2:] for name in cases] == [["PASS", "PASS"], ["PASS", "FAIL"]]
    # torch's product takes twice as long as ours
    assert rows_of(text)["fast"][4].endswith(" (2.00)")
    assert rehearsed(scenario, "--cases", "fast")[0] == 0


def test_a_time_that_is_slow_on_one_card_is_fast_on_another(rehearsed):
    cases = {"unpack": [4e-5, None]}
    scenarios = [{"properties": CARDS[card], "cases": cases, "reached": REACHED[card]} for card in CARDS]
    codes = [rehearsed(scenario, "--cases", "unpack")[0] for scenario in scenarios]
    assert codes == [3, 0, 0, 3, 0]


UNKNOWN = {"compute capability 13.0": H100 | {"major": 13}, "memory_clock_rate": H100 | {"memory_clock_rate": 0}}


@pytest.mark.parametrize("reason", UNKNOWN)
def test_times_on_an_unknown_card_are_not_judged(reason, rehearsed):
    scenario = {"properties": UNKNOWN[reason], "cases": {"slow": [1.0, None]}}
    code, _, text = rehearsed(scenario, "--cases", "slow")
    assert code == needs.INCOMPLETE
    assert lines_of(text)["RIGHT"] == "PASS, 1 case and 0 tests"
    assert lines_of(text)["FAST"].startswith(f"times not judged: {reason}: expected ")
    assert rows_of(text)["slow"][1] == "1000000.0"


def test_times_are_not_judged_where_tensor_cores_are_slower(rehearsed):
    """An H20 says the capability and the clocks of an H100, and has a fraction of its rate."""
    cases = {"slow": [1.0, None]}
    scenario = {"properties": H100 | {"multi_processor_count": 78}, "cases": cases, "reached": 1.4e14}
    code, _, text = rehearsed(scenario, "--cases", "slow")
    assert code == needs.INCOMPLETE and lines_of(text)["RIGHT"] == "PASS, 1 case and 0 tests"
    assert lines_of(text)["FAST"] == "times not judged: a product of torch reaches 140 of 468 Tflop/s"
    assert rehearsed(scenario | {"reached": 2.4e14}, "--cases", "slow")[0] == 3


def test_times_on_a_gpu_of_rocm_are_not_judged(rehearsed, monkeypatch):
    """gfx90a has the numbers of an H100."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    code, _, text = rehearsed({"properties": H100, "cases": {"slow": [1.0, None]}}, "--cases", "slow")
    assert code == needs.INCOMPLETE
    assert lines_of(text)["FAST"] == "times not judged: a GPU of ROCm, expected one of NVIDIA (benchmarks/cards.py)"


def test_an_old_gpu_is_refused_once(rehearsed):
    scenario = {"properties": H100 | {"major": 7, "minor": 5}, "cases": {"wrong": [1.0, "wrong"]}}
    code, report, text = rehearsed(scenario)
    assert code == needs.INCOMPLETE and report["finished"]
    assert lines_of(text)["RIGHT"] == "INCOMPLETE, nothing wrong in 0 cases and 0 tests"
    assert lines_of(text)["not run"] == "compute capability 7.5, expected 8.0 or newer"
    assert "wrong" not in rows_of(text)


def test_right_and_fast_are_judged_apart(rehearsed):
    """Wrong is not slow, and an error of the model is neither."""
    outcomes = {"right": [2e-5, None], "wrong": [2e-5, "wrong"], "slow": [1e-4, None], "model": [1.0, "model"]}
    scenario = {"properties": H100, "cases": outcomes}
    code, _, text = rehearsed(scenario, "--cases", *outcomes)
    rows = {name: rows_of(text)[name][-2:] for name in outcomes}
    assert code == 1
    assert lines_of(text)["RIGHT"] == "FAIL, 1 wrong of 4 cases and 0 tests"
    assert lines_of(text)["FAST"] == "FAIL, 1 of 3 cases not within 1.5 times the model, 1 not judged"
    assert rows == {
        "right": ["PASS", "PASS"],
        "wrong": ["FAIL: 3 of 8 have other bits", "PASS"],
        "slow": ["PASS", "FAIL"],
        "model": ["PASS", "not judged: model: ValueError: instruction: expected one that PIPES names, got NEW"],
    }
    assert rehearsed(scenario, "--cases", "wrong")[0] == 1
    assert rehearsed(scenario, "--cases", "right", "model")[0] == needs.INCOMPLETE
    assert rehearsed(scenario, "--cases", "slow", "model")[0] == 3


def test_a_missing_package_is_said_first_and_is_no_failure(rehearsed):
    scenario = {"properties": H100, "cases": {"right": [2e-5, None]}, "lacks": ["hypothesis", "xdist"]}
    code, report, text = rehearsed(scenario)
    assert code == needs.INCOMPLETE
    first = lines_of(text)
    assert first["RIGHT"] == "INCOMPLETE, nothing wrong in 1 case and 0 tests"
    assert first["FAST"] == "PASS, 1 case within 1.5 times the model"
    assert "tests (all): hypothesis missing: python3 -m pip install hypothesis" in first["not run"]
    assert "tests in parallel (xdist missing: python3 -m pip install pytest-xdist)" in first["not run"]
    assert "cuSPARSELt" in first["not run"] and report["tests"][0]["failed"] == []


def test_what_has_no_result_does_not_pass():
    """Its tests are skipped, and it needs a second GPU."""
    tests = {"tests": "2:4", "seconds": 1.0} | children.outcomes("== 3 skipped in 1.00s ==", 0)
    report = command.empty_report(emulated=False) | {"finished": True, "tests": [tests]}
    assert status(report) == needs.INCOMPLETE
    assert lines_of(page(report))["RIGHT"] == "INCOMPLETE, nothing wrong in 0 cases and 0 tests"
    assert lines_of(page(report))["not run"] == "tests (2:4): no test has passed: 3 skipped in 1.00s"
    second = {"case": "layers on a second GPU", "shape": "", "timed": False, "right": "not run: one GPU"}
    assert status(report | {"tests": [], "cases": [second]}) == needs.INCOMPLETE


def row_of_vllm(monkeypatch, run: Callable | None = None) -> dict:
    """Row of the case in which vLLM serves, with a stand-in for its process; None: without vLLM."""
    found = needs.find_spec
    monkeypatch.setattr(needs, "find_spec", lambda name: object() if name == "vllm" and run else found(name))
    monkeypatch.setattr(cases, "subprocess", SimpleNamespace(run=run))
    return timing.checked(Run(), "packed model in vLLM", None)


def test_without_vllm_its_case_is_not_run_and_the_verdict_complete(monkeypatch):
    row = row_of_vllm(monkeypatch)
    assert row["right"] == "not run: vllm missing: python3 -m pip install vllm" and not row["timed"]
    right = {"case": "draw", "shape": "", "timed": False, "right": "PASS"}
    report = command.empty_report(emulated=False) | {"finished": True, "cases": [right, row]}
    assert status(report) == 0
    assert lines_of(page(report))["not run"] == f"packed model in vLLM: {row['right'].removeprefix('not run: ')}"
    monkeypatch.setattr(needs, "entry_points", lambda group: SimpleNamespace(names=[]))
    row = row_of_vllm(monkeypatch, lambda *_, **__: None)
    assert row["right"] == "not run: vLLM does not find maskpro_kernels: python3 -m pip install -e ."
    assert status(report | {"cases": [right, row]}) == needs.INCOMPLETE


SERVED = {"graphs": "FULL_AND_PIECEWISE", "different tokens": 26, "error": 0.05, "torch error": 0.07}


@pytest.mark.parametrize(
    ("code", "figures", "right"),
    [
        (0, {}, "PASS"),
        (0, {"error": 0.15}, "FAIL: log-probabilities: error 0.15, expected at most 0.14"),
        (0, {"different tokens": 1}, "FAIL: 1 different tokens, expected more"),
        (0, {"graphs": "NONE"}, "FAIL: no CUDA graphs"),
        (1, {}, "FAIL: vLLM has ended with 1: ValueError: no memory"),
    ],
)
def test_what_vllm_serves_is_judged(code, figures, right, monkeypatch):
    def process(words: list, **_) -> SimpleNamespace:
        assert Path(words[1]).name == "served.py" and words[2:] == ["bfloat16"]
        printed = f"loading\n{json.dumps(SERVED | figures)}\n"
        return SimpleNamespace(returncode=code, stdout=printed, stderr="Traceback\nValueError: no memory\n")

    monkeypatch.setattr(needs, "entry_points", lambda group: SimpleNamespace(names=["maskpro_kernels"]))
    row = row_of_vllm(monkeypatch, process)
    assert row["right"] == right and row["shape"] == "2 layers of 256"


PLANTED_TESTS = """
    import time
    import pytest

    pytestmark = pytest.mark.gpu


    @pytest.mark.parametrize("pattern", ["2:4", "4:8"])
    def test_right(pattern):
        pass


    def test_never_ends():
        time.sleep(1000)
"""


def test_files_of_tests_for_a_gpu_have_its_mark():
    """Not its name in a text, as in this file."""
    assert children.gpu_tests() == ["tests/ops/triton/test_gpu.py"]


@pytest.mark.parametrize(
    "text",
    [
        "pytestmark = pytest.mark.gpu",
        "pytestmark = [pytest.mark.slow, pytest.mark.gpu]",
        "pytestmark = [\n    pytest.mark.gpu,\n]",
        "@pytest.mark.gpu\ndef test_a(): ...",
        "class TestA:\n    @pytest.mark.gpu\n    def test_a(self): ...",
    ],
)
def test_forms_of_the_mark(text, tmp_path, monkeypatch):
    monkeypatch.setattr(children, "TESTED", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_marked.py").write_text(f"import pytest\n\n{text}\n")
    (tmp_path / "tests" / "test_other.py").write_text("# not pytest.mark.gpu\npytestmark = [pytest.mark.slow]\n")
    assert children.gpu_tests() == ["tests/test_marked.py"]


def commanded(scenario: dict, folder: Path, *words: str) -> tuple[int, str]:
    """(exit status, page) of the command in a process, which starts others for the cases."""
    (folder / "scenario.json").write_text(json.dumps({"properties": H100} | scenario))
    script = ROOT / "tests" / "helpers" / "stand_in_gpu.py"
    command = [sys.executable, script, folder / "scenario.json", "--output", folder / "page", *words]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True)
    text = (folder / "page.md").read_text()
    assert text in run.stdout, run.stderr
    return run.returncode, text


def test_a_case_that_crashes_is_the_only_one_without_a_time(tmp_path):
    cases = {"first": [2e-5, None], "dies": [2e-5, "dies"], "last": [2e-5, None]}
    code, text = commanded({"cases": cases}, tmp_path, "--cases", *cases)
    assert code == 1
    assert lines_of(text)["RIGHT"] == "FAIL, 1 wrong of 3 cases and 0 tests"
    rows = rows_of(text)
    assert rows["dies"][-1].startswith("FAIL: its process has ended with 9")
    assert rows["first"][-2:] == rows["last"][-2:] == ["PASS", "PASS"]


@pytest.mark.slow
def test_what_never_ends_is_cut_off(tmp_path):
    """A case, and the tests that are not of 2:4."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_planted.py").write_text(dedent(PLANTED_TESTS))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    scenario = {
        "cases": {"first": [2e-5, None], "hangs": [2e-5, "hangs"], "last": [2e-5, None]},
        "tests": str(tmp_path),
        "limits": {"CASE_SECONDS": 20, "DEADLINE": 90},
    }
    code, text = commanded(scenario, tmp_path)
    assert code == needs.INCOMPLETE
    first = lines_of(text)
    assert first["RIGHT"] == "INCOMPLETE, nothing wrong in 2 cases and 2 tests"
    assert first["FAST"] == "PASS, 2 cases within 1.5 times the model"
    assert "tests (not 2:4): cut off after " in first["not run"] and "hangs: cut off after 20 s" in first["not run"]
    rows = rows_of(text)
    assert rows["hangs"][-1] == "not run: cut off after 20 s"
    assert rows["first"][-2:] == rows["last"][-2:] == ["PASS", "PASS"]
    assert rows["2:4"][:2] == ["1", "0"] and rows["2:4"][-1] == "no" and rows["not 2:4"][-1] == "yes"


def test_without_torch_the_command_says_what_to_install(tmp_path):
    """Not by a traceback."""
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-S", BENCHMARKS / "verdict"], cwd=tmp_path, env=bare, capture_output=True, text=True
    )
    assert run.returncode == needs.INCOMPLETE and run.stderr == ""
    assert run.stdout.startswith("not run: torch, triton, numpy, ") and "python3 -m pip install torch" in run.stdout


def test_without_a_gpu_the_command_says_why(monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        command.main([])
    assert end.value.code == 2
    reason = f"no CUDA device: torch {torch.__version__} is built without CUDA; --dry-run runs the cases on an emulator"
    assert reason in capsys.readouterr().err


def test_the_page_names_the_ptxas_of_the_gpu(rehearsed, monkeypatch):
    """Triton has two."""
    monkeypatch.setattr(command, "get_ptxas", lambda capability: SimpleNamespace(path=capability))
    monkeypatch.setattr(command, "printed", lambda tool, *words: f"V12.{tool}" if words == ("--version",) else "")
    _, report, text = rehearsed({"properties": H100, "cases": {"fast": [2e-5, None]}}, "--cases", "fast")
    assert report["environment"]["ptxas"] == "V12.90" and "- ptxas: V12.90" in text


BLOCKED = """
ImportError while loading conftest '/maskpro/tests/conftest.py'.
tests/conftest.py:9: in <module>
    import mpmath
E   ModuleNotFoundError: No module named 'mpmath'
"""
GPU_TESTS = "tests/ops/triton/test_gpu.py"
# As pytest prints while it runs
RUNNING = f"""
{GPU_TESTS}::test_a[2:4] PASSED                    [ 25%]
{GPU_TESTS}::test_b[2:4] FAILED                    [ 50%]
{GPU_TESTS}::test_c[2:4] ERROR                     [ 75%]
"""
# With pytest-xdist
DISTRIBUTED = f"""
[gw1] [ 25%] PASSED {GPU_TESTS}::test_a[2:4]
[gw0] [ 50%] FAILED {GPU_TESTS}::test_b[2:4]
[gw1] [ 75%] ERROR {GPU_TESTS}::test_c[2:4]
"""
SUMMARY = f"""
FAILED {GPU_TESTS}::test_b[2:4] - AssertionError: 3 of 8
ERROR {GPU_TESTS}::test_c[2:4] - RuntimeError: no memory
"""
FAILED = [f"{GPU_TESTS}::test_b[2:4]", f"{GPU_TESTS}::test_c[2:4]"]
FAILED_WITH_REASONS = [f"{FAILED[0]} - AssertionError: 3 of 8", f"{FAILED[1]} - RuntimeError: no memory"]


@pytest.mark.parametrize(
    ("text", "code", "expected"),
    [
        (BLOCKED, 4, {"passed": 0, "failed": [], "not run": "ModuleNotFoundError: No module named 'mpmath'"}),
        ("== no tests ran in 1.00s ==", 5, {"passed": 0, "failed": [], "not run": "no tests ran in 1.00s"}),
        (
            "== 3 skipped in 1.00s ==",
            0,
            {"passed": 0, "failed": [], "not run": "no test has passed: 3 skipped in 1.00s"},
        ),
        ("", -9, {"passed": 0, "failed": [], "not run": "pytest has said nothing"}),
        (RUNNING, None, {"passed": 1, "failed": FAILED, "cut off": True}),
        (DISTRIBUTED, None, {"passed": 1, "failed": FAILED, "cut off": True}),
        (RUNNING, -11, {"passed": 1, "failed": FAILED}),
        (RUNNING + SUMMARY, 1, {"passed": 1, "failed": FAILED_WITH_REASONS}),
        (DISTRIBUTED + SUMMARY, 1, {"passed": 1, "failed": FAILED_WITH_REASONS}),
        (RUNNING.splitlines()[1], None, {"passed": 1, "failed": [], "cut off": True}),
    ],
)
def test_outcomes_of_a_run_of_tests(text, code, expected):
    assert children.outcomes(text, code) == {"cut off": False} | expected
