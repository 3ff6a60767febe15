"""Masks of SmolLM2-135M, weights frozen: what each way to learn reaches on text that it has not seen."""

from __future__ import annotations

import json

import pytest

from maskpro_kernels.cli import main
from maskpro_kernels.ops import dispatch

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def compiled_reference(monkeypatch):
    """The route that users get: a language model is too much for the interpreter."""
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)


def learn(folder, *options) -> tuple[dict, dict]:
    """(rows of the table by method, the whole report) of a run."""
    output = folder / "run"
    sources = ["--model", "smollm2-135m", "--data", "pydoc", "--device", "cpu", "--batch-size", "8"]
    assert main.main(["learn", *sources, "--output", str(output), *options]) == 0
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    return {row["method"]: row for row in report["table"]}, report


@pytest.mark.parametrize("pattern", ["1:4", "4:8", "8:16"])
def test_other_patterns_learn(pattern, tmp_path):
    options = (
        f"--pattern {pattern} --init wanda --estimator straight-through --steps 12 --eval-windows 8 --eval-every 12"
    )
    table, _ = learn(tmp_path, *options.split(), "--estimator", "straight-through")
    assert table["straight-through"]["perplexity"] <= 0.9 * table["wanda"]["perplexity"], table


def test_reconstruction_and_then_straight_through(tmp_path):
    options = "--init reconstruction --estimator straight-through --steps 60 --eval-every 60".split()
    table, _ = learn(tmp_path, *options)
    assert 12 < table["dense"]["perplexity"] < 17
    assert 60 < table["wanda"]["perplexity"] < 90
    assert table["reconstruction"]["perplexity"] <= 38
    assert table["straight-through"]["perplexity"] <= 26
