"""Runs that an error, an interrupt or a full disk ends: what they keep, and what they tell."""

from __future__ import annotations

import math
import signal
import threading

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.cases import slow
from helpers.command import learn, nonzeros, refuses, report
from helpers.full_disk import files_of_at_most
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from maskpro_kernels.cli import learn as learn_command
from maskpro_kernels.cli import main, run_end
from maskpro_kernels.learn import masks
from maskpro_kernels.learn.offload import OffloadedLogits
from maskpro_kernels.learn.trainer import MaskTrainer
from maskpro_kernels.ops.layer_groups import LayerGroup
from maskpro_kernels.text.perplexity import causal_lm_loss

pytestmark = pytest.mark.usefixtures("eager_reference")


@pytest.mark.parametrize(
    "error",
    [
        FloatingPointError("loss of step 2: expected a finite number"),
        torch.OutOfMemoryError("CUDA out of memory"),
        KeyboardInterrupt(),
    ],
)
def test_a_run_that_stops_early_keeps_what_it_learned(inputs, tmp_path, capsys, monkeypatch, error):
    step = MaskTrainer.step

    def failing(trainer):
        if trainer.steps_done == 2:
            raise error
        return step(trainer)

    monkeypatch.setattr(MaskTrainer, "step", failing)
    code, line = (
        (130, "maskpro: interrupted") if isinstance(error, KeyboardInterrupt) else (2, f"maskpro: error: {error}")
    )
    assert main.main(learn(inputs, tmp_path / "run")) == code
    told = capsys.readouterr().err
    assert "stopped after 2 steps; the logits are in" in told and line in told
    assert main.main(["export", str(tmp_path / "run"), str(tmp_path / "checkpoint")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    assert (nonzeros(model, "model.layers.1.mlp.down_proj") <= 2).all()


def test_a_run_that_goes_on_and_is_killed_leaves_no_logits_of_where_it_was_stopped(
    inputs, tmp_path, capsys, monkeypatch
):
    class Killed(BaseException):
        pass

    step = MaskTrainer.step

    def failing(trainer):
        if trainer.steps_done == stops_at:
            raise error
        return step(trainer)

    monkeypatch.setattr(MaskTrainer, "step", failing)
    stops_at, error = 1, KeyboardInterrupt()
    assert main.main(learn(inputs, tmp_path / "run")) == 130
    assert (tmp_path / "run" / "logits.safetensors").exists()
    stops_at, error = 2, Killed()
    with pytest.raises(Killed):
        main.main(["learn", "--resume", str(tmp_path / "run")])
    refuses(capsys, tmp_path, ["export", str(tmp_path / "run"), str(tmp_path / "out")], "run has not ended, continue")
    other = learn(inputs, tmp_path / "other", "--init", str(tmp_path / "run"))
    refuses(capsys, tmp_path, other, "init: ", f"continue with: maskpro learn --resume {tmp_path / 'run'}")


def test_the_command_runs_in_a_thread_whose_process_is_interrupted(inputs, run, tmp_path, monkeypatch):
    """Python gives signals to the main thread alone, and no other one may ask for them."""
    step, codes, caught = MaskTrainer.step, [], []

    def interrupting(trainer):
        if trainer.steps_done == 1:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return step(trainer)

    monkeypatch.setattr(MaskTrainer, "step", interrupting)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    ended = threading.Event()

    def run_command() -> None:
        try:
            codes.append(main.main(learn(inputs, tmp_path / "run")))
        finally:
            ended.set()

    try:
        threading.Thread(target=run_command).start()
        while not ended.is_set():
            try:
                ended.wait()
            except KeyboardInterrupt as error:
                caught.append(error)
    finally:
        signal.signal(signal.SIGINT, before)
    assert codes == [0] and len(caught) == 1
    learned, expected = (load_file(folder / "logits.safetensors") for folder in (tmp_path / "run", run))
    assert_same_bits([learned[name] for name in expected], list(expected.values()))


def test_a_run_that_is_interrupted_in_an_update_saves_no_half_of_it(inputs, run, tmp_path, capsys, monkeypatch):
    """Logits of a part of the layers have moved: those of the step are rebuilt from the journal."""
    update, updates = masks.update_layers_, []

    def interrupted(group, *args):
        updates.append(group)
        if len(updates) < 3:
            update(group, *args)
            return
        update(LayerGroup(group.layers[:5], group.n, group.m), *args[:-1])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(masks, "update_layers_", interrupted)
        assert main.main(learn(inputs, tmp_path / "run")) == 130
    told = "stopped after 2 steps; the next one was broken off in its update, and the logits are rebuilt where the run"
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run" / "logits.safetensors").exists()
    assert main.main(["learn", "--resume", str(tmp_path / "run")]) == 0
    assert report(tmp_path / "run")["logits"] == report(run)["logits"]


STRAIGHT_THROUGH = ("--estimator", "straight-through", "--lr", "1")


def test_a_straight_through_run_that_is_interrupted_in_an_update_saves_no_half_of_it(
    inputs, tmp_path, capsys, monkeypatch
):
    step, update = MaskTrainer.step, OffloadedLogits.moving

    def interrupted(offloaded, layer):
        if layer.layer == 5:
            raise KeyboardInterrupt
        return update(offloaded, layer)

    def failing(trainer):
        if trainer.steps_done == 2:
            patched.setattr(OffloadedLogits, "moving", interrupted)
        return step(trainer)

    with monkeypatch.context() as patched:
        patched.setattr(MaskTrainer, "step", failing)
        assert main.main(learn(inputs, tmp_path / "run", *STRAIGHT_THROUGH)) == 130
    told = "stopped after 2 steps; the next one was broken off in its update, and the logits of the last snapshot are"
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run" / "logits.safetensors").exists()
    assert main.main(["learn", "--resume", str(tmp_path / "run")]) == 0


def test_a_straight_through_run_bears_a_loss_that_is_not_finite(inputs, tmp_path, monkeypatch):
    calls = []

    def loss_fn(model, batch):
        calls.append(torch.is_grad_enabled())
        return causal_lm_loss(model, batch) * (math.nan if sum(calls) == 2 else 1.0)

    monkeypatch.setattr(learn_command, "loss_of", lambda *_, **__: loss_fn)
    assert main.main(learn(inputs, tmp_path / "run", *STRAIGHT_THROUGH)) == 0
    losses = [row["loss"] for row in report(tmp_path / "run")["steps"]]
    assert [math.isfinite(loss) for loss in losses] == [step != 1 for step in range(len(losses))] and len(losses) > 2


def on_a_full_disk(function):
    def limited(*args):
        with files_of_at_most(4096):
            return function(*args)

    return limited


def test_a_full_disk_hides_neither_what_ended_a_run_nor_how_to_go_on(inputs, run, tmp_path, capsys, monkeypatch):
    step, output = MaskTrainer.step, tmp_path / "run"

    def failing(trainer):
        if trainer.steps_done == 2:
            raise FloatingPointError("loss of step 2: expected a finite number")
        return step(trainer)

    with monkeypatch.context() as patched:
        patched.setattr(MaskTrainer, "step", failing)
        patched.setattr(run_end, "save_logits", on_a_full_disk(run_end.save_logits))
        assert main.main(learn(inputs, output)) == 2
    *_, told, error = capsys.readouterr().err.splitlines()
    assert told.startswith("stopped after 2 steps; the logits could not be saved: ") and "File too large" in told
    assert told.endswith(f"; continue with: maskpro learn --resume {output}")
    assert error == "maskpro: error: loss of step 2: expected a finite number"
    assert main.main(["learn", "--resume", str(output)]) == 0
    assert report(output)["logits"] == report(run)["logits"]


@pytest.mark.pictures
@pytest.mark.parametrize("failing", ["save_logits", slow("save"), "draw_perplexity", slow("write_html")])
def test_a_disk_that_is_full_at_the_end_of_a_run(inputs, run, tmp_path, capsys, monkeypatch, failing):
    output = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(run_end, failing, on_a_full_disk(getattr(run_end, failing)))
        assert main.main(learn(inputs, output)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("maskpro: error: output: ") and "File too large" in error
    assert error.endswith(f"; continue with: maskpro learn --resume {output}")
    assert not (output / "report.json").exists()
    assert main.main(["learn", "--resume", str(output)]) == 0
    assert report(output)["logits"] == report(run)["logits"]
    learned, resumed = (load_file(folder / "model.safetensors") for folder in (run, output))
    assert_same_bits(resumed, learned)
