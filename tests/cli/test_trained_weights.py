"""Runs whose weights learn beside the logits, with a refit before or without: what they keep, and how they go on."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.cases import slow
from helpers.command import broken_off, learn, nonzeros, report
from helpers.routes import route_to_the_eager_reference
from helpers.tiny_llama import tiny_model
from transformers import AutoModelForCausalLM

import maskpro_kernels as mk
from maskpro_kernels.checkpoints.logits import load_logits
from maskpro_kernels.cli import main

pytestmark = pytest.mark.usefixtures("eager_reference")

TRAINED = "--estimator straight-through --lr 1 --init wanda --train-weights 1e-3".split()
WAYS = {
    "weights trained": TRAINED,
    "weights refitted, weights trained": [*TRAINED, "--refit", "weights"],
}


class Killed(BaseException):
    pass


def kill():
    raise Killed


@pytest.fixture(scope="module", params=[slow(way) if way == "weights trained" else way for way in WAYS])
def trained(request, inputs, tmp_path_factory):
    """(what the run tells of its weights, options, folder) of a run that has ended."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    options = [*WAYS[request.param], "--steps", "4", "--eval-every", "2"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        route_to_the_eager_reference(monkeypatch)
        assert main.main(learn(inputs, folder, *options)) == 0
    return request.param, options, folder


def test_table_report_and_evaluation_tell_it(trained, inputs, capsys):
    told, _, run = trained
    written = report(run)
    assert written["weights"] == told
    assert written["table"][-1]["method"] == f"straight-through, {told}"
    options = "--eval-windows 5 --eval-length 24 --device cpu".split()
    assert main.main(["eval", str(run), "--data", str(inputs / "text.txt"), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"test perplexity {written['table'][-1]['perplexity']:.2f} over 5 windows of 24 tokens"
    assert lines[4:] == [f"not the dense model's weights under a mask: {told}"]


def test_the_checkpoint_and_its_export_hold_the_trained_weights(trained, tmp_path):
    _, _, run = trained
    learned, dense = load_logits(run / "logits.safetensors"), tiny_model()
    assert main.main(["export", str(run), str(tmp_path / "again")]) == 0
    checkpoint, again = map(AutoModelForCausalLM.from_pretrained, (run, tmp_path / "again"))
    assert_same_bits(dict(again.state_dict()), dict(checkpoint.state_dict()))
    for name, weight in learned.weights.items():
        kept = mk.expand_mask(mk.top_n_mask(learned.logits[name], "2:4"), "2:4")
        assert (weight != dense.get_submodule(name).weight)[kept].any()
        assert_same_bits(checkpoint.get_submodule(name).weight, torch.where(kept, weight, 0.0))
        assert (nonzeros(checkpoint, name) == 2).all()


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_run_that_was_killed_goes_on(trained, inputs, tmp_path, monkeypatch, step):
    _, options, whole = trained
    run = tmp_path / "run"
    with pytest.raises(Killed):
        broken_off(inputs, run, monkeypatch, step, options, kill)
    assert main.main(["learn", "--resume", str(run)]) == 0
    expected, found = (load_logits(folder / "logits.safetensors") for folder in (whole, run))
    assert_same_bits(found.logits, expected.logits)
    assert_same_bits(found.weights, expected.weights)
    assert found.metadata == expected.metadata | {"run": found.metadata["run"]}
    assert report(run)["weights"] == report(whole)["weights"]
    assert [row["perplexity"] for row in report(run)["table"]] == [row["perplexity"] for row in report(whole)["table"]]
