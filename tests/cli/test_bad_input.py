"""What users get wrong: the command ends with 2 and one line that tells what was expected and what to do."""

from __future__ import annotations

import logging
import shutil
import sys

import pytest
from filelock import FileLock
from helpers.bad_input import CASES
from helpers.cases import cases
from helpers.command import contents, refuses
from helpers.damage import EVAL, KILLED, LEARN, LOGITS, RESUME, changed, cut, edit, rebuilt, removed
from helpers.routes import route_to_the_eager_reference
from helpers.tiny_llama import tiny_model, tiny_text, tiny_tokenizer
from transformers import AutoTokenizer

from maskpro_kernels.cli import main
from maskpro_kernels.learn.trainer import MaskTrainer

pytestmark = pytest.mark.usefixtures("eager_reference")


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Folder with a model, a text, and runs that have ended and that were killed, by both estimators."""
    folder = tmp_path_factory.mktemp("template")
    models = {name: tiny_model() for name in ("model", "overflowing")}
    models["overflowing"].model.norm.weight.data.fill_(6e4)
    models["narrow"] = tiny_model(hidden_size=20, intermediate_size=20)
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    (folder / "text.txt").write_text(tiny_text(), encoding="utf-8")
    (folder / "empty").mkdir()
    step = MaskTrainer.step

    def killed(trainer):
        if trainer.steps_done == 2:
            raise Killed
        return step(trainer)

    with pytest.MonkeyPatch.context() as patched:
        route_to_the_eager_reference(patched)
        patched.chdir(folder)
        for estimator in ("reinforce", "straight-through"):
            arguments = f"{LEARN} --estimator {estimator} --output".split()
            assert main.main([*arguments, estimator]) == 0
            with patched.context() as broken, pytest.raises(Killed):
                broken.setattr(MaskTrainer, "step", killed)
                main.main([*arguments, f"killed-{estimator}"])
    return folder


@pytest.fixture
def place(template, tmp_path, monkeypatch, capsys):
    """A copy of the template to damage, the current folder."""
    folder = shutil.copytree(template, tmp_path / "place")
    for run in folder.glob("killed-*"):
        edit(run / "settings.json", settings={"model": str(folder / "model"), "data": str(folder / "text.txt")})
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    # their logs go where stderr was when they were imported
    for library in ("transformers", "huggingface_hub"):
        monkeypatch.setattr(logging.getLogger(library), "handlers", [logging.StreamHandler(sys.stderr)])
    return folder


# A whole export and a whole replay, of which other cases tell as well
SLOW = ("another pattern in the metadata of the logits", "a journal that is another run's")


@pytest.mark.parametrize("name", cases(((name,) for name in CASES), slow=lambda name: name in SLOW))
def test_bad_input_is_told_in_one_line_and_changes_nothing(name, place, capsys):
    command, damage, expected, cure = CASES[name]
    if damage is not None:
        damage(place)
    refuses(capsys, place, command.split(), expected, cure)


@pytest.mark.parametrize("estimator", ["reinforce", pytest.param("straight-through", marks=pytest.mark.slow)])
def test_what_was_damaged_is_sound_otherwise(estimator, place, capsys):
    """The cases fail by what was done to them alone."""
    assert main.main(["learn", "--resume", f"killed-{estimator}", "--device", "cpu"]) == 0
    assert main.main(["eval", estimator, *EVAL.split()[2:]]) == 0
    assert main.main(["compare", "reinforce", "straight-through", "--picture", "picture.png"]) == 0
    assert main.main(["export", estimator, "out"]) == 0
    assert main.main(["validate", "out"]) == 0
    assert main.main(["import", "out", "--output", "packed"]) == 0
    assert main.main(["replay", "reinforce", "--output", "file", "--device", "cpu"]) == 0


CURES = {
    "move the report away": (EVAL, cut("reinforce/report.json"), removed("reinforce/report.json")),
    "have the report written again": (
        "learn --device cpu --resume reinforce",
        cut("reinforce/report.json"),
        removed("reinforce/report.json"),
    ),
    "move the perplexities away": (RESUME, cut(f"{KILLED}/validation.jsonl"), removed(f"{KILLED}/validation.jsonl")),
    "rebuild the logits": ("export reinforce out", cut(LOGITS), rebuilt),
}


@pytest.mark.parametrize("cure", CURES)
def test_cures_work(cure, place, capsys):
    command, damage, mend = CURES[cure]
    damage(place)
    assert main.main(command.split()) == 2
    mend(place)
    assert main.main(command.split()) == 0


def test_a_run_that_another_process_holds(place, capsys):
    with FileLock(place / KILLED / ".lock"):
        refuses(capsys, place, RESUME.split(), "expected a run that no process is at", "wait for the other, or end it")


def test_a_start_that_fails_leaves_its_folder_free(place, capsys, monkeypatch):
    """Losses of the initial masks that are not finite are found behind the first snapshot."""

    def without_losses(trainer, progress):
        raise FloatingPointError("loss under the initial masks: expected finite numbers, batches [0] give none")

    monkeypatch.setattr(MaskTrainer, "_losses_of_initial_masks", without_losses)
    for output in ("out", "empty"):
        before = contents(place)
        assert main.main(f"{LEARN} --output {output}".split()) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("maskpro: error: loss under the initial masks")
        assert contents(place) == before


def test_the_retries_of_the_hub_are_not_told(place, capsys, monkeypatch):
    hub, heard = logging.getLogger("huggingface_hub.utils._http"), []

    def unreachable(name, **options):
        heard.append(hub.isEnabledFor(logging.WARNING))
        raise OSError("We couldn't connect to 'https://huggingface.co'. Check your internet connection.")

    monkeypatch.setattr("maskpro_kernels.hf.loading.why_not_on_hub", lambda name: None)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", unreachable)
    told = "connect to 'https://huggingface.co'; of a model on the hub check the name and the connection"
    refuses(capsys, place, [*LEARN.split(), "--model", "none"], told)
    assert heard == [False] and hub.isEnabledFor(logging.WARNING)


def test_a_warning_is_told_in_one_line(place, capsys):
    changed(f"{KILLED}/journal", lambda content: content[:-1])(place)
    capsys.readouterr()
    assert main.main(RESUME.split()) == 0
    first, *others = [line for line in capsys.readouterr().err.splitlines() if "warn" in line.lower()]
    assert first == f"maskpro: warning: the last record of {KILLED}/journal was cut short: its step is taken again"
    # three steps are few
    assert all(line.startswith("maskpro: warning: no group has left the initial mask") for line in others)
