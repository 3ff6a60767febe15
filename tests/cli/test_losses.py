"""Runs that learn by the divergence from the dense model, also where that is gone once they begin."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.command import broken_off, learn, refuses, report
from helpers.routes import route_to_the_eager_reference

from maskpro_kernels.checkpoints.logits import load_learned
from maskpro_kernels.cli import main
from maskpro_kernels.text import teacher
from maskpro_kernels.training.initial_losses import InitialLosses

pytestmark = pytest.mark.usefixtures("eager_reference")

STRAIGHT = "--estimator straight-through --lr 1 --init wanda --steps 4 --eval-every 2".split()
KL = "--loss kl --loss-temperature 2".split()
WAYS = {
    "frozen": [*STRAIGHT, *KL],
    "trained": [*STRAIGHT, *KL, "--train-weights", "1e-3"],
    "refitted": [*STRAIGHT, *KL, "--refit", "weights"],
    "reinforce": ["--steps", "4", "--eval-every", "2", "--loss", "ce+kl", "--refit", "scales"],
}


class Killed(BaseException):
    pass


def kill():
    raise Killed


@pytest.fixture(scope="module", params=WAYS)
def ended(request, inputs, tmp_path_factory):
    """(options, folder) of a run that has ended."""
    folder = tmp_path_factory.mktemp("losses") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        route_to_the_eager_reference(monkeypatch)
        assert main.main(learn(inputs, folder, *WAYS[request.param])) == 0
    return WAYS[request.param], folder


def test_a_run_reports_its_loss_and_goes_on_to_the_same_bits(ended, inputs, tmp_path, monkeypatch):
    options, whole = ended
    settings = report(whole)["settings"]
    assert settings["loss"] == options[options.index("--loss") + 1]
    assert settings["loss_temperature"] == (2.0 if settings["loss"] == "kl" else 1.0)
    changes = "--refit" in options or "--train-weights" in options
    assert not (whole / "progress" / "teacher").exists()
    run = tmp_path / "run"
    with pytest.raises(Killed):
        broken_off(inputs, run, monkeypatch, 3, options, kill)
    assert (run / "progress" / "teacher").exists() == changes
    if changes:
        # the dense model is gone: it is asked no more
        monkeypatch.setattr(teacher, "teacher_logits", None)
    assert main.main(["learn", "--resume", str(run)]) == 0
    found, expected = (load_learned(folder / "logits.safetensors") for folder in (run, whole))
    assert_same_bits(found.logits, expected.logits)
    losses = [
        [json.loads(line)["loss"] for line in (folder / "progress" / "metrics.jsonl").read_text().splitlines()]
        for folder in (run, whole)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    # of a random model with 32 tokens, whose cross-entropy is 3.5
    assert 0 < losses[0][0] < (0.1 if settings["loss"] == "kl" else 1.9)


def test_a_run_that_takes_few_of_the_batches_asks_for_no_other(inputs, tmp_path, monkeypatch):
    losses, computed = [], InitialLosses.computed
    monkeypatch.setattr(InitialLosses, "computed", lambda *args: (losses.append(computed(*args)), losses[0])[1])
    options = [*WAYS["reinforce"], "--steps", "1", "--calibration-batches", "3"]
    assert main.main(learn(inputs, tmp_path / "run", *options)) == 0
    ((loss,),) = losses
    assert 0 < loss < 3


def test_a_teacher_is_taken_back_with_a_run_that_does_not_begin(inputs, tmp_path, monkeypatch):
    run = tmp_path / "runs" / "run"

    def fails(*_):
        assert (run / "progress" / "teacher").exists()
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("maskpro_kernels.cli.learning_run.LearningRun._evaluate", fails)
    assert main.main(learn(inputs, run, *WAYS["trained"])) != 0
    assert not run.parent.exists()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--loss-temperature", "2"], "loss_temperature: expected none, for it is of kl and ce+kl alone, got 2.0"),
        (["--loss", "kl", "--loss-temperature", "0"], "loss_temperature: expected a positive number, got 0.0"),
        (["--loss", "ce+kl", "--loss-temperature", "nan"], "loss_temperature: expected a positive number, got nan"),
        (["--loss", "mse"], "invalid choice: 'mse'"),
    ],
)
def test_bad_losses_are_refused(inputs, tmp_path, capsys, options, error):
    refuses(capsys, tmp_path, learn(inputs, tmp_path / "run", *options), "", error)
