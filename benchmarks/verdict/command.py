"""Print whether the kernels are right on this machine's GPU, and whether they are as fast as ``cost_model`` says.

    python benchmarks/verdict --output verdict     # or: make verdict
    python benchmarks/verdict --dry-run            # the same cases on an emulator, without times

writes a page, OUTPUT.md, and all figures, OUTPUT.json, after each part, within ten minutes. It begins with two
verdicts. RIGHT: each test marked gpu passes, and each case has the right result. FAST: each case takes at most 1.5
times as long as modelled, and three microseconds. An error of the model leaves a time without a verdict.

Exit status: 0: right and fast. 1: something is wrong. 2: bad options, or no GPU. 3: right, but something is slow.
4: nothing is wrong or slow, but some of it has not run, or its time has no verdict; the page says why.

Minutes on 16 cores, estimated and not measured: 2 for the cases, which are compiled, checked and modelled by several
processes; 2 for the tests of 2:4, likewise; 2 for times, alone on the GPU and with kernels from Triton's cache; what is
left until DEADLINE for other tests.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import harness
import host_time
import torch
import triton
from triton.backends.nvidia.compiler import get_ptxas

from maskpro_kernels.functional.checks import missing_gpu
from maskpro_kernels.ops.triton import tiles

from . import children, needs, timing
from .cases import CASES, Run, reference
from .page import page, status

# Seconds since the start after which nothing runs; of parts
DEADLINE = 570
LOOK = 60
CHECKS = 200
FIRST_TESTS = 180
TIMES = 150
# Processes at a time, and memory of the GPU for each
MOST_WORKERS = 12
WORKER_BYTES = 4 << 30


def printed(*command: str | Path) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def ptxas_version(capability: int) -> str:
    """Of the ptxas by which Triton assembles for a compute capability; "" where it has none."""
    try:
        return "".join(re.findall(r"V[\d.]+", printed(get_ptxas(capability).path, "--version")))
    except RuntimeError:
        return ""


def environment(card: str, capability: int) -> dict:
    return {
        "card": card,
        "driver": printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "not said",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "ptxas": ptxas_version(capability),
        "commit": harness.commit(),
    }


def host_times() -> dict[str, float | str | None]:
    """Seconds of Python by call, apart from the GPU's."""
    try:
        return {name: 1e-6 * microseconds for name, microseconds in host_time.measured().items()}
    except Exception as error:
        return {"none": timing.message(error)}


def empty_report(emulated: bool) -> dict:
    return {
        "finished": False,
        "emulated": emulated,
        "seen": {},
        "not run": [],
        "environment": {},
        "tests": [],
        "cases": [],
        "host": {},
    }


def emulated_report(emulator, names: Sequence[str] = (), save: Callable[[dict], None] = lambda report: None) -> dict:
    """Report of cases on an emulator; ``save`` gets it after each."""
    report = empty_report(emulated=True)
    capability = int(emulator.target.removeprefix("sm_"))
    report["environment"] = environment(f"emulator of PTX for {emulator.target}", capability)
    run = Run(emulator)
    with torch.no_grad():
        for name in names or CASES:
            report["cases"].append(timing.checked(run, name, None))
            save(report)
    with reference():
        report["host"] = dict.fromkeys(host_time.calls())
    report["finished"] = True
    save(report)
    return report


def gpu_report(names: Sequence[str], tested: bool, save: Callable[[dict], None]) -> dict:
    """Report of cases, and of tests, on the GPU of this machine."""
    start = time.monotonic()

    def limited(seconds: float) -> float:
        return max(0.0, min(seconds, DEADLINE - (time.monotonic() - start)))

    report = empty_report(emulated=False)
    report["not run"] = needs.of_details()
    (seen,) = children.rows_of("look", ["GPU"], LOOK)
    report["seen"] = seen if "name" in seen else seen | {"unjudged": f"times not judged: {seen['unjudged']}"}
    properties = seen.get("properties", {"major": 0, "minor": 0})
    report["environment"] = environment(seen.get("name", "not seen"), 10 * properties["major"] + properties["minor"])
    if not seen.get("cuSPARSELt"):
        report["not run"].append("torch's products by cuSPARSELt (this torch has none)")
    if reason := refused(seen):
        # instead of each case
        report |= {"not run": [reason], "finished": True}
        save(report)
        return report
    save(report)
    workers = max(1, min(MOST_WORKERS, os.cpu_count() or 1, seen.get("memory", 0) // WORKER_BYTES))

    def save_cases(rows: list[dict]) -> None:
        save(report | {"cases": [merged(row) for row in rows]})

    # these compile, so that what follows has its kernels in Triton's cache
    checks = children.rows_of("check", names, limited(CHECKS), seen.get("card"), workers, save_cases)
    report["cases"] = [merged(row) for row in checks]
    save(report)
    files = []
    if tested and (reason := needs.of_tests()):
        report["tests"].append(
            {"tests": "all", "passed": 0, "failed": [], "cut off": False, "seconds": 0, "not run": reason}
        )
    elif tested:
        files = children.gpu_tests()
        report["tests"].append(children.tests_row(files, "2:4", limited(FIRST_TESTS), workers))
    save(report)
    to_time = [row["case"] for row in report["cases"] if row["timed"]]
    of_checks = {row["case"]: row for row in checks}

    def with_times(rows: Sequence[dict]) -> list[dict]:
        of_times = {row["case"]: row for row in rows}
        return [merged(row, of_times.get(name)) for name, row in of_checks.items()]

    rows = children.rows_of(
        "time", to_time, limited(TIMES), save=lambda rows: save(report | {"cases": with_times(rows)})
    )
    report["cases"] = with_times(rows)
    report["host"] = host_times()
    save(report)
    if files:
        report["tests"].append(children.tests_row(files, "not 2:4", limited(DEADLINE), workers))
    report["finished"] = True
    save(report)
    return report


def refused(seen: dict) -> str | None:
    """Why no kernel runs on a GPU of NVIDIA that has been seen."""
    if "properties" not in seen or torch.version.hip is not None:
        return None
    capability = seen["properties"]["major"], seen["properties"]["minor"]
    if capability >= tiles.LEAST_CAPABILITY:
        return None
    found, least = (".".join(map(str, version)) for version in (capability, tiles.LEAST_CAPABILITY))
    return f"compute capability {found}, expected {least} or newer"


def merged(of_check: dict, of_time: dict | None = None) -> dict:
    """Row of a case, of the rows of its check and of its time; a reason of the check stays the reason."""
    return {"shape": "", "timed": False, "others": {}} | (of_time or {}) | of_check


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("verdict"), help="of OUTPUT.md and OUTPUT.json")
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", help="these alone, without tests")
    parser.add_argument("--dry-run", action="store_true", help="on an emulator, without times and tests")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.job:
        return children.work(options.job)

    def save(report: dict) -> None:
        options.output.with_suffix(".json").write_text(json.dumps(report, indent=1))
        options.output.with_suffix(".md").write_text(page(report))

    if options.dry_run:
        from gpu_emulators import driver

        emulator = driver.install("sm_80")
        tiles.ON_CPU = "sm_80"
        report = emulated_report(emulator, options.cases or (), save)
    elif reason := missing_gpu():
        parser.error(f"no CUDA device: {reason}; --dry-run runs the cases on an emulator")
    else:
        report = gpu_report(options.cases or list(CASES), not options.cases, save)
    print(page(report))
    return status(report)


if __name__ == "__main__":
    sys.exit(main())
