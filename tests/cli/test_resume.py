"""`maskpro learn --resume`: a run ends with the bits of one that was never interrupted, or is refused in a line."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.cases import slow
from helpers.command import interrupted, learn, refuses, report
from helpers.tiny_llama import tiny_model, write_inputs
from safetensors.torch import load_file

from maskpro_kernels.checkpoints.logits import load_logits
from maskpro_kernels.cli import main
from maskpro_kernels.cli.learn import command, steps
from maskpro_kernels.learn.trainer import MaskTrainer
from maskpro_kernels.modules import masked_layers

pytestmark = pytest.mark.usefixtures("eager_reference")

COMMON = "--steps 6 --eval-every 2".split()
WAYS = {
    "reinforce": ["--gap", "2", "--density", "0.6"],
    "straight-through": "--estimator straight-through --lr 1 --gap 2 --data self,TEXT".split(),
    "weights that change": "--refit weights --estimator straight-through --loss kl --train-weights 1e-3".split(),
    "scales": "--refit scales --gap 2 --density 0.6".split(),
}


def options(inputs, way: str) -> list[str]:
    return [*COMMON, *(word.replace("TEXT", str(inputs / "text.txt")) for word in WAYS[way])]


class Killed(BaseException):
    pass


def kill():
    raise Killed


def interrupt():
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def wholes(inputs, tmp_path_factory):
    """Folders of whole runs by their way, each learned once."""
    folder, known = tmp_path_factory.mktemp("whole"), {}

    def whole(way: str):
        if way not in known:
            assert main.main(learn(inputs, folder / way, *options(inputs, way))) == 0
            known[way] = folder / way
        return known[way]

    return whole


def assert_ends_as(run, whole):
    for name in ("validation", "weights", "flipped_groups", "logits", "converted", "skipped"):
        assert report(run)[name] == report(whole)[name], name
    assert [row["perplexity"] for row in report(run)["table"]] == [row["perplexity"] for row in report(whole)["table"]]
    found, expected = (load_logits(folder / "learned/logits.safetensors") for folder in (run, whole))
    assert_same_bits(found.logits, expected.logits)
    assert_same_bits(found.weights, expected.weights)
    assert_same_bits(load_file(run / "model.safetensors"), load_file(whole / "model.safetensors"))


@pytest.mark.parametrize(("way", "step", "how"), [
    ("reinforce", 3, kill),
    ("straight-through", 3, interrupt),
    slow("weights that change", 4, interrupt),
    slow("scales", 1, kill),
])  # fmt: skip
def test_a_run_that_was_interrupted_ends_as_a_whole_one(inputs, wholes, tmp_path, monkeypatch, capsys, way, step, how):
    run, whole = tmp_path / "run", wholes(way)
    if how is kill:
        with pytest.raises(Killed):
            interrupted(inputs, run, monkeypatch, step, options(inputs, way), how)
        assert not (run / "learned/logits.safetensors").exists()
    else:
        assert interrupted(inputs, run, monkeypatch, step, options(inputs, way), how) == 130
        reported = capsys.readouterr().err.splitlines()
        assert reported[-2] == f"stopped after {step} steps; continue with: maskpro learn --resume {run}"
        assert (run / "learned/logits.safetensors").exists()
    # from another folder, and with what does not change the result
    monkeypatch.chdir(tmp_path)
    assert main.main(["learn", "--resume", "run", "--device", "cpu"]) == 0
    assert f"{step} steps are done" in capsys.readouterr().err
    assert_ends_as(run, whole)


def test_a_resumed_run_makes_one_forward_a_step(inputs, tmp_path, monkeypatch):
    """Batches that repeat have their losses under the initial mask from before the interruption."""
    forwards = []
    loss_of = command._loss_of

    def counted(options):
        loss_fn = loss_of(options)

        def loss(model, batch):
            drawing = any(layer.training for layer in masked_layers(model).values())
            forwards.append("drawn" if drawing else "initial")
            return loss_fn(model, batch)

        return loss

    monkeypatch.setattr(command, "_loss_of", counted)
    run = tmp_path / "run"
    with pytest.raises(Killed):
        interrupted(inputs, run, monkeypatch, 3, COMMON, kill)
    assert forwards == ["initial"] * 2 + ["drawn"] * 3
    assert main.main(["learn", "--resume", str(run)]) == 0
    assert forwards == ["initial"] * 2 + ["drawn"] * 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_its_step(inputs, wholes, tmp_path, monkeypatch, capfd, number):
    run = tmp_path / "run"
    assert (
        interrupted(inputs, run, monkeypatch, 2, options(inputs, "reinforce"), lambda: os.kill(os.getpid(), number))
        == 0
    )
    reported = capfd.readouterr().err.splitlines()
    assert f"{number.name}: the run stops after this step" in reported
    assert reported[-1] == f"stopped after 3 steps; continue with: maskpro learn --resume {run}"
    # what has been learned by then can be exported
    assert main.main(["export", str(run), str(tmp_path / "out")]) == 0
    assert main.main(["learn", "--resume", str(run)]) == 0
    assert_ends_as(run, wholes("reinforce"))


@pytest.mark.parametrize(("module", "function"), [(command, "choose_masks"), slow(steps, "write_record")])
def test_a_run_that_was_killed_before_its_first_step_begins_again(
    inputs, wholes, tmp_path, monkeypatch, capsys, module, function
):
    """With the samples that it has drawn; by ``--resume`` and by the same command."""
    arguments = options(inputs, "straight-through")

    def killed(*_):
        raise Killed

    for name in ("resumed", "again"):
        with monkeypatch.context() as patched:
            patched.setattr(module, function, killed)
            with pytest.raises(Killed):
                main.main(learn(inputs, tmp_path / name, *arguments))
    capsys.readouterr()
    assert main.main(["learn", "--resume", str(tmp_path / "resumed")]) == 0
    assert main.main(learn(inputs, tmp_path / "again", *arguments)) == 0
    assert "drawing" not in capsys.readouterr().err
    for name in ("resumed", "again"):
        assert_ends_as(tmp_path / name, wholes("straight-through"))


def test_a_run_continues_without_the_mask_that_it_began_with(inputs, run, tmp_path, monkeypatch):
    assert main.main(["export", str(run), str(tmp_path / "mask"), "--to", "mask"]) == 0
    options = [*COMMON, "--init", str(tmp_path / "mask")]
    with pytest.raises(Killed):
        interrupted(inputs, tmp_path / "run", monkeypatch, 3, options, kill)
    (tmp_path / "mask").unlink()
    # ``complete`` looks for it
    (tmp_path / "mask").touch()
    assert main.main(["learn", "--resume", str(tmp_path / "run")]) == 0
    assert report(tmp_path / "run")["table"][3]["method"] == "mask of mask"


@pytest.fixture
def broken(inputs, tmp_path, monkeypatch):
    """A run that was killed after three steps."""
    with pytest.raises(Killed):
        interrupted(inputs, tmp_path / "run", monkeypatch, 3, options(inputs, "scales"), kill)
    return tmp_path / "run"


def test_what_does_not_continue_is_refused_in_a_line(inputs, run, broken, tmp_path, capsys):
    resume = ["learn", "--resume", str(broken)]
    refuses(capsys, tmp_path, [*resume, "--steps", "9"], "resume: expected no other option but --device", "got steps")
    refuses(capsys, tmp_path, ["learn", "--resume", str(run)], "resume: expected a run that has not ended, got")
    refuses(capsys, tmp_path, ["learn", "--resume", str(inputs)], "without settings.json")
    refuses(capsys, tmp_path, learn(inputs, broken), "its run has not ended, continue with")
    for subcommand in ("eval", "speed"):
        refuses(
            capsys, tmp_path, [subcommand, str(broken)], "model: expected a model or a run with report.json", "continue"
        )
    refuses(capsys, tmp_path, ["export", str(broken), str(tmp_path / "out")], "its run has not ended, continue with")
    settings = (broken / "settings.json").read_text()
    for content in ("{", "[]", "{}", settings.replace("maskpro-run 3", "maskpro-run 2")):
        (broken / "settings.json").write_text(content)
        refuses(capsys, tmp_path, resume, "run: expected ", "settings.json")
    (broken / "settings.json").write_text(settings)
    assert main.main(resume) == 0


def test_a_folder_of_an_earlier_version_is_refused_in_a_line(run, broken, tmp_path, capsys):
    """Their settings and reports named no format."""
    reported = "run: expected a run of this version (maskpro-run 3) in"
    earlier = {"settings": {"model": "m", "data": "pydoc"}, "table": [], "digests": {}}
    (broken / "settings.json").write_text(json.dumps(earlier))
    refuses(capsys, tmp_path, ["learn", "--resume", str(broken)], reported, "got one of another; use that version")
    old = tmp_path / "old"
    shutil.copytree(run, old)
    (old / "report.json").write_text(json.dumps(earlier))
    refuses(capsys, tmp_path, ["eval", str(old)], reported)
    refuses(capsys, tmp_path, ["export", str(old), str(tmp_path / "out")], reported)


def test_another_model_or_text_or_lost_weights_are_refused(inputs, broken, tmp_path, capsys):
    resume = ["learn", "--resume", str(broken)]
    other = write_inputs(tmp_path / "other")
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1
    model.save_pretrained(other / "model")
    (other / "text.txt").write_text((inputs / "text.txt").read_text().replace("w3", "w4"), encoding="utf-8")
    content = (broken / "settings.json").read_text()
    for name, reported in (
        ("model", "got other weights"),
        ("text.txt", "expected the texts that the run is evaluated on"),
    ):
        (broken / "settings.json").write_text(content.replace(str(inputs / name), str(other / name)))
        assert main.main(resume) == 2
        assert reported in capsys.readouterr().err.splitlines()[-1]
    (broken / "settings.json").write_text(content)
    start = broken / "progress" / "start-weights.safetensors"
    sound = start.read_bytes()
    for damaged in (sound[:-1] + bytes([sound[-1] ^ 1]), sound[: len(sound) // 2], None):
        start.unlink() if damaged is None else start.write_bytes(damaged)
        assert main.main(resume) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("maskpro: error: resume: ")
    start.write_bytes(sound)
    assert main.main(resume) == 0


def test_a_full_disk_and_a_loss_that_is_not_finite_end_a_run_that_can_continue(inputs, tmp_path, monkeypatch, capsys):
    take = MaskTrainer.step

    def failing(trainer):
        if trainer.steps_done == 2:
            raise error
        return take(trainer)

    errors = {
        "full": OSError("No space left"),
        "loss": FloatingPointError("loss"),
        "memory": torch.OutOfMemoryError("x"),
    }
    for name, error in errors.items():
        run = tmp_path / name
        with monkeypatch.context() as patched:
            patched.setattr(MaskTrainer, "step", failing)
            assert main.main(learn(inputs, run, *COMMON)) == 2
        reported = capsys.readouterr().err.splitlines()
        assert reported[-2] == f"stopped after 2 steps; continue with: maskpro learn --resume {run}"
        assert reported[-1].startswith("maskpro: error: ") and str(error) in reported[-1]
    assert main.main(["learn", "--resume", str(tmp_path / "full")]) == 0
