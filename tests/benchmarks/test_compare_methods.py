"""The comparison of methods: rows of all of them, kept as they come; a second call takes no step again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import compare
import pytest
import rows
import torch
from helpers.bits import assert_same_bits
from methods import LEARNERS, METHODS
from torch import nn

from maskpro_kernels.learn.trainer import MaskTrainer

pytestmark = pytest.mark.usefixtures("eager_reference")


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / rows.ROWS).read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_every_method_has_its_rows_once(arguments, tmp_path, monkeypatch, capsys):
    output, runs = tmp_path / "output", []
    run = MaskTrainer.run
    monkeypatch.setattr(MaskTrainer, "run", lambda trainer, steps: runs.append(steps) or run(trainer, steps, False))
    arguments += ["--output", str(output)]
    compare.main([*arguments, "--steps", "1", "--methods", "wanda", "maskllm"])
    assert runs == [1] * 5
    samples = (output / "samples.safetensors").read_bytes()
    compare.main([*arguments, "--steps", "2", "1"])
    assert (output / "samples.safetensors").read_bytes() == samples
    # of each learner the default and others; with two steps the default, and the best where it is another one
    more = [row for row in lines(output)[1:] if row["steps"] == 2 and row["method"] in LEARNERS]
    assert runs.count(1) == sum(len(learner.candidates()) for learner in LEARNERS.values())
    assert runs.count(2) == len(more) and 5 <= len(more) <= 10
    first, *found = lines(output)
    assert first["shared"]["batch_size"] == 4
    names = {row["method"] for row in found}
    assert names == {"dense", *METHODS, "sparsegpt, its weights", "proxsparse, its weights"}
    dense = next(row for row in found if row["method"] == "dense")
    for row in found:
        assert list(row["perplexity"]) == ["text.txt", "other.txt"] and {"commit", "device", "torch"} <= row.keys()
        ratios = [row["perplexity"][text] / dense["perplexity"][text] for text in dense["perplexity"]]
        assert row["score"] == pytest.approx(math.sqrt(math.prod(ratios)))
        assert row["tokens"] == row["steps"] * 64
        assert row["weights"] == ("own" if "its weights" in row["method"] else "dense")
    state = {row["method"]: row["state_bytes_per_weight"] for row in found}
    # of six masks a group, of one logit, of one weight, each with two moments; of logits alone
    assert (state["maskllm"], state["relaxed-top-k"], state["proxsparse"]) == (18.0, 12.0, 12.0)
    assert (state["reinforce"], state["wanda"]) == (4.0, 0.0)
    # and of a float a row for the curvature, which is little where rows are long
    assert 4.0 < state["straight-through"] < 4.25
    before, reported = (output / rows.TABLE).read_text(encoding="utf-8"), len(runs)
    capsys.readouterr()
    compare.main([*arguments, "--steps", "1", "2"])
    assert len(runs) == reported and capsys.readouterr().out == before
    assert before.count("\n") == len(found) + 2 and "**lr" in before
    with pytest.raises(
        SystemExit, match="^error: output: expected the rows of a comparison with the same seed, got others"
    ):
        compare.main([*arguments, "--seed", "1"])
    text = Path(arguments[arguments.index("--data") + 1].partition(":")[0])
    text.write_text(text.read_text(encoding="utf-8") + "\n\nOne more.", encoding="utf-8")
    with pytest.raises(SystemExit, match="^error: output: expected the rows of a comparison with the same texts, got"):
        compare.main([*arguments, "--steps", "1", "2"])


def test_the_best_settings_by_validation_text_take_more_steps(arguments, tmp_path, monkeypatch):
    """Not those that are best on the test texts."""

    def row(self, method, settings, steps, seconds, state=0, weights="dense", **of_learner):
        lr = settings.get("lr", 0.0)
        validation = abs(lr - 0.1)
        return (
            {"method": method, "settings": dict(settings), "steps": steps, "validation": validation}
            | {"perplexity": {"a": 1.0 + lr}, "score": 1.0 + lr, "weights": weights, "seconds": 0.0}
            | {"state_bytes_per_weight": 0.0, "changed_groups": 0}
        )

    monkeypatch.setattr(compare.Comparison, "row", row)
    output = tmp_path / "output"
    compare.main([*arguments, "--output", str(output), "--steps", "1", "2", "3", "--methods", "straight-through"])
    taken = [(row["settings"]["lr"], row["steps"]) for row in lines(output)[2:]]
    assert taken == [(0.3, 1), (0.1, 1), (0.5, 1), (0.8, 1), (0.3, 2), (0.1, 2), (0.1, 3)]
    assert (output / rows.TABLE).read_text(encoding="utf-8").count("**lr 0.1") == 3


def a_row(**others) -> dict:
    return {
        "method": "m",
        "settings": {},
        "steps": 0,
        "validation": 1.0,
        "perplexity": {"a": 2.0},
        "score": 1.0,
        "weights": "dense",
        "state_bytes_per_weight": 0.0,
        "changed_groups": 0,
        "seconds": 0.0,
        **others,
    }


def test_settings_that_fail_are_not_the_best():
    found = [a_row(settings={"lr": lr}, validation=value) for lr, value in ((1.0, math.nan), (2.0, 10.0))]
    assert rows.best(found, "m", 0)["settings"] == {"lr": 2.0}


def test_settings_are_chosen_among_rows_of_as_many_steps():
    at = {(1.0, 60): (3.0, 5.0), (2.0, 60): (2.0, 6.0), (1.0, 200): (1.0, 9.0), (2.0, 200): (4.0, 8.0)}
    found = [
        a_row(settings={"lr": lr}, steps=steps, validation=validation, score=score)
        for (lr, steps), (validation, score) in at.items()
    ]
    chosen = {steps: rows.best(found, "m", steps)["settings"]["lr"] for steps in (60, 200)}
    assert chosen == {60: 2.0, 200: 1.0}
    weights = [row | {"method": "m" + rows.WITH_WEIGHTS, "validation": -row["validation"]} for row in found]
    lines = rows.table([a_row(method="dense"), *found, *weights]).splitlines()
    bold = sorted(line.split(" | ")[0].strip("| ") for line in lines if "**" in line)
    assert bold == ["m", "m", "m, its weights", "m, its weights"]
    assert all("**lr 2**" in line for line in lines if "| 60 |" in line and "**" in line)


def test_rows_of_another_initial_mask_are_others(arguments, tmp_path):
    given = [*arguments, "--output", str(tmp_path / "output"), "--steps", "1"]
    comparison = compare.Comparison(compare.parsed(given))
    comparison.rows.add([comparison.row("dense", {}, 0, 0.0, initial_mask="of another machine")])
    (default, *_) = comparison.learners["straight-through"].candidates()
    with pytest.raises(
        ValueError, match="^output: expected rows that began with the initial_mask .* of another machine"
    ):
        comparison.learn("straight-through", default, 1)
    assert len(comparison.rows.rows) == 1


def test_an_initial_mask_of_something_else_is_computed_again(arguments, tmp_path, monkeypatch):
    found, of = [], compare.initial_codes
    monkeypatch.setattr(compare, "initial_codes", lambda *args: found.append(args[2]) or of(*args))
    for seed, count in ((0, 1), (0, 1), (1, 2)):
        given = [*arguments, "--output", str(tmp_path / "output"), "--steps", "1", "--seed", str(seed)]
        compare.Comparison(compare.parsed(given)).initial("magnitude")
        assert len(found) == count


def test_weights_are_put_back():
    layer = nn.Linear(4, 2)
    before, given = layer.weight.detach().clone(), torch.ones(2, 4)
    with pytest.raises(KeyError), compare.weights_in_place({"0": layer}, {"0": given}):
        assert_same_bits(layer.weight.detach(), given)
        raise KeyError
    assert_same_bits(layer.weight.detach(), before)
