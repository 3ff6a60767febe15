"""Ablations of REINFORCE on a character model: one choice is changed at a time, and every value of each can run."""

from __future__ import annotations

import math
import statistics

import ablations
import characters
import pytest
import torch
from ablations import ABLATIONS, BASE, Ablations, Row
from characters import Problem, Text
from helpers.cases import cases
from helpers.routes import take_route


@pytest.fixture(autouse=True)
def compiled_route(monkeypatch):
    """Many small draws: not through the interpreter, whose bits are the same."""
    take_route(monkeypatch, "compiled")


@pytest.fixture(scope="module")
def text() -> Text:
    return Text.load("pydoc")


@pytest.fixture(scope="module")
def model(text):
    return characters.trained(text, width=16, steps=20)


CHANGES = [(option, value) for option, values in ABLATIONS.values() for value in values]
# Of the others the code is that of characters.py
QUICK = [("draws", 4)]


@pytest.mark.parametrize(("option", "value"), cases(CHANGES, slow=lambda *case: case not in QUICK))
def test_every_value_can_run(text, model, option, value):
    row = Ablations(text, model, forwards=516, lrs=[6.0], seeds=1).row({option: value})
    assert all(map(math.isfinite, (*row.initial, *row.learned, *row.dense)))


def test_held_out_text_is_the_same_for_all_rows(text, model):
    one, other = Problem(text, model, seed=1, batches=2), Problem(text, model, seed=2)
    assert all(
        torch.equal(a, b)
        for split in one.held_out
        for a, b in zip(*(each.held_out[split] for each in (one, other)), strict=True)
    )
    assert not torch.equal(one.batches[0][0], other.batches[0][0])


def test_settings_reach_the_run(text, model, monkeypatch):
    given = {}

    def learned(problem, lr, **settings):
        given.update(settings, lr=lr, batches=len(problem.batches))
        return {"validation": 3.0, "test": 3.0}, {"validation": 2.0, "test": 2.5}

    monkeypatch.setattr(Problem, "learned", learned)
    row = Ablations(text, model, forwards=600, lrs=[6.0], seeds=1).row({"batches": 8, "alpha": 0.5})
    assert given == BASE | {"batches": 8, "alpha": 0.5, "lr": 6.0, "counts": [600], "seed": 0}
    assert (row.initial, row.learned) == ([3.0], [2.5])


def test_validation_text_of_the_first_seed_chooses_the_learning_rate(text, model, monkeypatch):
    losses = {2.0: math.nan, 6.0: 1.0, 20.0: 2.0}
    runs = []

    def learned(problem, lr, seed, **settings):
        runs.append((lr, seed))
        test = 10.0 * lr + seed
        return {"validation": 3.0, "test": 100.0}, {"validation": losses[lr], "test": test}

    monkeypatch.setattr(Problem, "learned", learned)
    row = Ablations(text, model, forwards=600, lrs=list(losses), seeds=3).row({})
    assert row.lr == 6.0 and not row.is_extreme and row.learned == [60.0, 61.0, 62.0]
    assert sorted(runs) == [(2.0, 0), (6.0, 0), (6.0, 1), (6.0, 2), (20.0, 0)]


def test_a_line_has_means_and_spreads():
    row = Row(6.0, False, [3.0, 3.2], [2.5, 2.9], [2.0, 2.0])
    assert row.regained == pytest.approx([0.5, 0.25])
    initial, learned = statistics.stdev(row.initial), statistics.stdev(row.learned)
    reported = f"| alpha | 0.9 | 6 | 3.100 ± {initial:.3f} | 2.700 ± {learned:.3f} | 38% ± 18 |"
    assert ablations.markdown_row("alpha", 0.9, row) == reported
    one = Row(6.0, True, [3.0], [2.5], [2.0])
    assert ablations.markdown_row("alpha", 0.9, one) == "| alpha | 0.9 | 6* | 3.000 | 2.500 | 50% |"
    lost = Row(6.0, False, [3.0, 3.0], [math.nan, 2.5], [2.0, 2.0])
    assert ablations.markdown_row("alpha", 0.9, lost) == "| alpha | 0.9 | 6 | 3.000 ± 0.000 | nan | nan% |"


@pytest.mark.slow
def test_the_command_prints_a_row_for_each_value(capsys):
    ablations.main("--train-steps 20 --forwards 513 --seeds 1 --lrs 6 --only batches".split())
    dense, _, head, _, *rows = capsys.readouterr().out.splitlines()
    assert dense.startswith("test loss of the dense model: ")
    assert head.startswith("| choice | value") and [row.split(" | ")[1] for row in rows] == ["1", "8", "64", "512"]
