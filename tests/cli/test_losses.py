"""Runs that learn by the divergence from the dense model, also where that is gone once they begin."""

from __future__ import annotations

import argparse
import json
from types import SimpleNamespace

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.command import broken_off, contents, learn, refuses, report
from helpers.in_ranks import all_in_ranks
from helpers.routes import route_to_the_eager_reference
from helpers.straight_through import batches_of_tokens, masked_llama

from maskpro_kernels.checkpoints.logits import load_logits
from maskpro_kernels.cli import main
from maskpro_kernels.cli.losses import fill_teacher, loss_of
from maskpro_kernels.learn.batches import InitialLosses
from maskpro_kernels.modules import masked_layers
from maskpro_kernels.ranks import Ranks
from maskpro_kernels.text import losses as text_losses

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


@pytest.fixture(
    scope="module", params=[pytest.param(way, marks=[] if way == "trained" else pytest.mark.slow) for way in WAYS]
)
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
        monkeypatch.setattr(text_losses, "teacher_logits", None)
    assert main.main(["learn", "--resume", str(run)]) == 0
    found, expected = (load_logits(folder / "logits.safetensors") for folder in (run, whole))
    assert_same_bits(found.logits, expected.logits)
    losses = [
        [json.loads(line)["loss"] for line in (folder / "progress" / "metrics.jsonl").read_text().splitlines()]
        for folder in (run, whole)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    # of a random model with 32 tokens, whose cross-entropy is 3.5
    assert 0 < losses[0][0] < (0.1 if settings["loss"] == "kl" else 1.9)


def test_a_run_that_takes_few_of_the_batches_asks_for_no_other(inputs, tmp_path, monkeypatch):
    losses, computed = [], InitialLosses.compute
    monkeypatch.setattr(InitialLosses, "compute", lambda *args: (losses.append(computed(*args)), losses[0])[1])
    options = [*WAYS["reinforce"], "--steps", "1", "--calibration-batches", "3"]
    assert main.main(learn(inputs, tmp_path / "run", *options)) == 0
    ((loss,),) = losses
    assert 0 < loss < 3


def asked_for(monkeypatch, kill_at=None) -> list:
    """The batches about which the dense model is asked; at one of them the process ends."""
    asked, plain = [], text_losses.teacher_logits

    def asks(model, batch):
        if len(asked) == kill_at:
            raise Killed
        asked.append(batch)
        return plain(model, batch)

    monkeypatch.setattr(text_losses, "teacher_logits", asks)
    return asked


@pytest.mark.slow
def test_a_run_that_does_not_begin_keeps_what_the_dense_model_has_said(inputs, tmp_path, monkeypatch):
    command = learn(inputs, tmp_path / "runs" / "run", *WAYS["trained"])

    def fails(*_):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr("maskpro_kernels.cli.learning_run.LearningRun._evaluate", fails)
        assert main.main(command) != 0
    asked = asked_for(monkeypatch)
    assert main.main(command) == 0 and not asked


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_asks_goes_on_by_the_same_command(inputs, tmp_path, monkeypatch, capsys):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert main.main(learn(inputs, whole, *WAYS["trained"])) == 0
    with monkeypatch.context() as patched, pytest.raises(Killed):
        asked_for(patched, kill_at=1)
        main.main(learn(inputs, run, *WAYS["trained"]))
    assert len(list((run / "progress" / "teacher").glob("*.safetensors"))) == 1
    # as a process leaves it that is killed while it writes
    (run / "progress" / "teacher" / f"x.safetensors.{15:016x}.tmp").write_bytes(b"half")
    before = contents(run)
    assert main.main(learn(inputs, run, *WAYS["trained"], "--dtype", "bfloat16")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        "maskpro: error: cache: expected logits of this model alone, got some of a model with other"
    )
    assert error.endswith("give another --output, or remove that folder") and contents(run) == before
    asked = asked_for(monkeypatch)
    assert main.main(learn(inputs, run, *WAYS["trained"])) == 0
    assert len(asked) == 1 and report(run)["logits"] == report(whole)["logits"]


def filled_on_rank(rank: int, output) -> tuple[list[float], str]:
    """(initial losses once the dense model is gone, the error where each rank has a folder of its own)."""
    ranks, model, (first, *others) = Ranks(), masked_llama(gap=2.0), batches_of_tokens()
    ranks.connect()
    # initial losses are of different batches, and so not shared out as these
    inputs = SimpleNamespace(model=model, calibration=[first, first, *others])
    args = argparse.Namespace(loss="kl", loss_temperature=2.0, refit="scales", output=str(output), bars=False)
    loss_fn = loss_of(args)
    fill_teacher(args, inputs, loss_fn, ranks)
    args.output = str(output / str(rank))
    alone = loss_of(args)
    fill_teacher(args, inputs, alone, ranks)
    for layer in masked_layers(model).values():
        layer.weight_changed = True
    initial = InitialLosses(inputs.calibration, ranks)
    losses = initial.compute(lambda x: float(loss_fn(model, x).detach()), 0, False)
    with pytest.raises(ValueError) as error:
        # of the other rank's batches this one's folder has none
        for batch in inputs.calibration:
            alone(model, batch)
    ranks.close()
    return losses, str(error.value)


def test_ranks_find_what_others_have_asked_for(tmp_path):
    (losses, error), other = all_in_ranks(2, filled_on_rank, output=tmp_path)
    assert losses == other[0] and len(losses) == 4
    assert "a folder that all ranks have to see" in error


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
