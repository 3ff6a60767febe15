"""Sweeps of the command on a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path

from helpers.tiny_llama import tiny_text
from maskpro_kernels.cli import main
from maskpro_kernels.cli.estimator_options import load_estimators
from maskpro_kernels.cli.sweep_file import SweepRun, read_sweep


def base(inputs: Path) -> dict:
    """Options that all runs have."""
    other = inputs / "other.txt"
    if not other.exists():
        other.write_text(tiny_text(seed=1), encoding="utf-8")
    return {
        "model": str(inputs / "model"),
        "data": str(inputs / "text.txt"),
        "other_data": str(other),
        "device": "cpu",
        "dtype": "float32",
        "estimator": "reinforce",
        "init": "wanda",
        "steps": 3,
        "batch_size": 4,
        "seq_len": 16,
        "calibration_batches": 2,
        "eval_windows": 2,
        "eval_length": 24,
    }


def write_sweep(folder: Path, inputs: Path, **parts) -> Path:
    """Write a FILE of a list, a grid or both; what it has of a base replaces options of the usual one."""
    file = folder / "sweep.json"
    file.write_text(json.dumps(parts | {"base": base(inputs) | parts.get("base", {})}))
    return file


def sweep(file: Path, output: Path | str, *more: str) -> int:
    """The exit code of `maskpro sweep`."""
    return main.main(["sweep", str(file), "--output", str(output), *more])


def results(folder: Path) -> dict:
    """What a sweep has found."""
    return json.loads((folder / "results.json").read_text())


def seeds_of(found: dict) -> list[list[list[int]]]:
    """Of each row of each table of results."""
    return [[row["seeds"] for row in table["rows"]] for table in found["tables"]]


def runs_of(file: Path) -> list[SweepRun]:
    load_estimators()
    return read_sweep(file, {})[0]


def write_small_sweep(path: Path, code: str, small: list[str]) -> None:
    """Write a FILE with options for small runs of `model` on `text.txt`, and one value of each list in its grid."""
    pairs = zip(small[::2], small[1::2], strict=True)
    sizes = {name.removeprefix("--").replace("-", "_"): int(v) if v.isdigit() else v for name, v in pairs}
    found = json.loads(code)
    base_ = found["base"] | sizes | {"model": "model", "data": "text.txt"}
    grid = {name: values[:1] for name, values in found["grid"].items()}
    path.write_text(json.dumps(found | {"base": base_, "grid": grid}), encoding="utf-8")


def without_wall_clock(page: str) -> str:
    """The page of a sweep without the section of what depends on the machine and its moment."""
    found, count = re.subn(r"<section>\n<h2>Wall clock</h2>.*?</section>", "", page, flags=re.DOTALL)
    assert count == 1
    return found
