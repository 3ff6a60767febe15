"""Where steps are reported: TensorBoard and Weights & Biases, by accelerate's trackers, and a picture at the end."""

from __future__ import annotations

import sys

import pytest
from helpers.command import interrupted, learn, refuses, report

from maskpro_kernels.cli import main

pytestmark = pytest.mark.usefixtures("eager_reference")

NAMES = ("train/loss", "train/residual", "train/advantage", "train/tracker", "train/flip_rate")


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each scalar in event files by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, list] = {}
    for file in sorted(folder.glob("events.*")):
        events = EventAccumulator(str(file)).Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, []).extend((event.step, event.value) for event in events.Scalars(name))
    return found


@pytest.mark.pictures
def test_tensorboard_gets_each_step_once_also_after_an_interrupt(inputs, tmp_path, monkeypatch):
    def stop():
        raise KeyboardInterrupt

    run, options = tmp_path / "run", ["--steps", "4", "--eval-every", "2", "--report-to", "tensorboard"]
    assert interrupted(inputs, run, monkeypatch, 3, options, stop) == 130
    assert main.main(["learn", "--resume", str(run)]) == 0
    found, written = scalars(run / "tensorboard"), report(run)
    for name in NAMES:
        field = name.removeprefix("train/")
        steps = [(row["step"], row[field]) for row in written["steps"]]
        assert [step for step, _ in found[name]] == [0, 1, 2, 3]
        # of a step before the interrupt the journal knows no rate of flips
        if field != "flip_rate":
            assert [value for _, value in found[name]] == pytest.approx([value for _, value in steps], rel=1e-5)
    expected = [(row["step"] - 1, pytest.approx(row["perplexity"], rel=1e-5)) for row in written["validation"][1:]]
    assert found["eval/perplexity"] == expected
    assert (run / "perplexity.png").read_bytes().startswith(b"\x89PNG")


def test_wandb_gets_each_step_with_the_options_of_the_run(inputs, tmp_path, monkeypatch):
    runs = []

    class Run:
        def __init__(self, **settings):
            self.settings, self.rows, self.ended = settings, [], False
            runs.append(self)

        def log(self, values, step=None, **_):
            self.rows.append((step, values))

        def finish(self):
            self.ended = True

    monkeypatch.setenv("WANDB_PROJECT", "masks")
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "init", lambda **settings: Run(**settings))
    assert main.main(learn(inputs, tmp_path / "run", "--report-to", "wandb", "--seed", "3")) == 0
    (run,) = runs
    assert run.settings["project"] == "masks" and run.settings["config"]["seed"] == 3
    assert [step for step, _ in run.rows] == [0, 1, 2] and run.ended
    assert all(values["train/loss"] > 0 for _, values in run.rows)


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_written(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    arguments = learn(inputs, tmp_path / "run", "--report-to", "all")
    refuses(capsys, tmp_path, arguments, "--report-to: expected the package wandb", "the extra 'wandb' brings it")
