"""A long run of REINFORCE: its rows on the way, and processes that end before it."""

from __future__ import annotations

import json
import os
import signal

import long_run
import pytest
import rows

from maskpro_kernels.learn.trainer import MaskTrainer

pytestmark = pytest.mark.usefixtures("eager_reference")


class Killed(BaseException):
    pass


def kill():
    raise Killed


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


def figures(folder) -> list[dict]:
    """The rows of the run, without seconds."""
    lines = (folder / rows.ROWS).read_text(encoding="utf-8").splitlines()
    found = [row for row in map(json.loads, lines[1:]) if row["method"] == "reinforce"]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found]


@pytest.fixture
def run(arguments, monkeypatch):
    """Run the command in a folder; ``interrupt`` is called before a step, or before its row."""
    forwards = []
    loss = long_run.causal_lm_loss

    def counted(model, batch):
        forwards.append("initial" if not model.model.layers[0].mlp.up_proj.training else "drawn")
        return loss(model, batch)

    monkeypatch.setattr(long_run, "causal_lm_loss", counted)

    def run(folder, *more, step=None, row=None, interrupt=None) -> list[str]:
        """The forwards of the process."""
        forwards.clear()
        take_step = MaskTrainer.step
        make_row = long_run.LongRun.row

        def interrupted_step(trainer):
            if trainer.steps_done == step:
                interrupt()
            return take_step(trainer)

        def interrupted_row(comparison, method, settings, steps, *others, **figures):
            if steps == row:
                interrupt()
            return make_row(comparison, method, settings, steps, *others, **figures)

        with monkeypatch.context() as patched:
            patched.setattr(MaskTrainer, "step", interrupted_step)
            patched.setattr(long_run.LongRun, "row", interrupted_row)
            sizes = "--batches 3 --every 4 --steps 10".split()
            long_run.main([*arguments, "--output", str(folder), *sizes, *more])
        return list(forwards)

    return run


def test_a_run_that_was_stopped_and_killed_has_the_rows_of_a_whole_one(run, tmp_path, capsys):
    whole = tmp_path / "whole"
    assert run(whole) == ["initial"] * 3 + ["drawn"] * 10
    assert [row["steps"] for row in figures(whole)] == [4, 8, 10]
    assert all(row["settings"] == {"lr": 50.0, "alpha": 0.99, "draws": 1} for row in figures(whole))
    table = capsys.readouterr().out
    assert "| dense |" in table and "| wanda |" in table and "| reconstruction |" not in table
    # a run that has ended takes no step again
    picture = tmp_path / "curve.svg"
    assert run(whole, "--picture", str(picture)) == []
    assert all(label in picture.read_text() for label in ("groups that moved", "score"))
    again = tmp_path / "again"
    with pytest.raises(SystemExit, match="^stopped by a signal; the same command continues$"):
        run(again, step=2, interrupt=stop)
    assert figures(again) == []
    for place in ({"step": 6}, {"row": 8}):
        with pytest.raises(Killed):
            run(again, **place, interrupt=kill)
    assert run(again) == ["drawn"] * 2
    assert figures(again) == figures(whole)
    lines = (again / rows.ROWS).read_text(encoding="utf-8").splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines[1:] if '"reinforce"' in line]
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_more_steps_go_on_from_the_last_one(run, tmp_path):
    run(tmp_path, "--steps", "8")
    assert run(tmp_path, "--steps", "10") == ["drawn"] * 2
    assert [row["steps"] for row in figures(tmp_path)] == [4, 8, 10]


@pytest.mark.parametrize("wrong", [["--every", "0"], ["--batches", "0"], ["--steps", "2"], ["--steps", "10", "20"]])
def test_wrong_numbers_are_refused(run, tmp_path, wrong):
    with pytest.raises(SystemExit, match="^2$"):
        run(tmp_path, *wrong)
    assert not list(tmp_path.glob(rows.ROWS))
