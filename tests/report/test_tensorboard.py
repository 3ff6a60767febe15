"""Scalars of a run, as TensorBoard reads them."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time

import pytest
from helpers.tiny_llama import write_inputs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import RecordWriter

from maskpro_kernels.cli import main
from maskpro_kernels.learn.trainer import MaskTrainer, StepRecord
from maskpro_kernels.report.tensorboard import TensorBoard


def read(folder):
    """{name: [(step, value)]}"""
    events = EventAccumulator(str(folder)).Reload()
    return {name: [(one.step, one.value) for one in events.Scalars(name)] for name in events.Tags()["scalars"]}


def record_of(step, **changed):
    values = {"loss": 3.0 + step, "residual": 0.5, "advantage": 0.25, "tracker": -1.0, "flip_rate": 0.125}
    return StepRecord(step=step, tokens=1024, seconds=2.0, **values | changed)


def held_out(*steps):
    return [{"step": step, "tokens": 7 * step, "perplexity": 40.0 - step} for step in steps]


def wait_for_the_next_second():
    """Event files are read in the order of their names, which begin with the second."""
    time.sleep(1 - time.time() % 1)


def test_every_step_is_readable_at_once(tmp_path, monkeypatch):
    """However slow the thread is that writes."""
    write = RecordWriter.write

    def slow(writer, data):
        time.sleep(0.02)
        write(writer, data)

    monkeypatch.setattr(RecordWriter, "write", slow)
    scalars = TensorBoard(tmp_path / "events", 0)
    scalars.add_validation(held_out(0))
    assert read(tmp_path / "events") == {"eval/perplexity": [(0, 40)]}
    scalars.add(record_of(0), held_out(0))
    first = {"loss": 3, "residual": 0.5, "advantage": 0.25, "tracker": -1, "flip_rate": 0.125, "tokens_per_second": 512}
    expected = {f"train/{name}": [(0, value)] for name, value in first.items()} | {"eval/perplexity": [(0, 40)]}
    assert read(tmp_path / "events") == expected
    scalars.add(record_of(1, loss=9.0), held_out(0, 2))
    scalars.close()
    written = read(tmp_path / "events")
    assert written["train/loss"] == [(0, 3), (1, 9)] and written["eval/perplexity"] == [(0, 40), (2, 38)]


def test_what_is_not_known_is_left_out(tmp_path):
    scalars = TensorBoard(tmp_path, 0)
    scalars.add(record_of(0, residual=None, advantage=None, tracker=None, loss=math.nan), [])
    scalars.close()
    written = read(tmp_path)
    assert written.keys() == {"train/loss", "train/flip_rate", "train/tokens_per_second"}
    ((step, loss),) = written["train/loss"]
    assert step == 0 and math.isnan(loss)


@pytest.mark.parametrize("done", [2, 4])
def test_another_process_goes_on(tmp_path, done):
    """Of steps that are taken again the newer values count; a perplexity found at the very step stays, once."""
    before = TensorBoard(tmp_path, 0)
    before.add_validation(held_out(0))
    for step in range(4):
        before.add(record_of(step), held_out(0, 2) if step else held_out(0))
    # and killed
    wait_for_the_next_second()
    rows = held_out(0, 2)
    after = TensorBoard(tmp_path, done)
    after.add_validation(rows)
    for step in range(done, 6):
        rows = held_out(0, 2, 4, 6)[: 2 + (step >= 3) + (step >= 5)]
        after.add(record_of(step, loss=50.0 + step), rows)
    after.close()
    written = read(tmp_path)
    assert written["train/loss"] == [(step, (50.0 if step >= done else 3.0) + step) for step in range(6)]
    assert written["eval/perplexity"] == [(0, 40), (2, 38), (4, 36), (6, 34)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Options of a run of 6 steps that name a tiny model and a text."""
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    options = "--steps 6 --batch-size 4 --seq-len 16 --eval-every 2 --eval-windows 5 --eval-length 24 --device cpu"
    sources = ["--model", str(folder / "model"), "--data", str(folder / "text.txt"), "--other-data", "pydoc"]
    return [*sources, *options.split()]


def broken_off(inputs, output, monkeypatch, error, *options):
    """A run in which something happens in its fourth step, once."""
    take = MaskTrainer.step

    def step(trainer):
        if trainer.steps_done == 3:
            error()
        return take(trainer)

    with monkeypatch.context() as patched:
        patched.setattr(MaskTrainer, "step", step)
        return main.main(["learn", *inputs, "--output", str(output), *options])


@pytest.mark.parametrize("estimator", ["reinforce", pytest.param("straight-through", marks=pytest.mark.slow)])
def test_a_run_that_was_killed_goes_on_in_its_scalars(eager_reference, inputs, tmp_path, monkeypatch, estimator):
    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    with pytest.raises(Killed):
        broken_off(inputs, tmp_path / "run", monkeypatch, kill, "--report-to", "tensorboard", "--estimator", estimator)
    assert [step for step, _ in read(tmp_path / "run" / "tensorboard")["train/loss"]] == [0, 1, 2]
    wait_for_the_next_second()
    assert main.main(["learn", "--resume", str(tmp_path / "run")]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    written = read(tmp_path / "run" / "tensorboard")
    assert report["settings"]["report_to"] == ["tensorboard"]
    names = {"loss", "flip_rate", *(("residual", "advantage", "tracker") if estimator == "reinforce" else ())}
    assert written.keys() == {f"train/{name}" for name in (*names, "tokens_per_second")} | {"eval/perplexity"}
    for name in names:
        expected = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in report["steps"]]
        assert written[f"train/{name}"] == expected and len(expected) == 6
    rates = [(row["step"], pytest.approx(row["tokens"] / row["seconds"], rel=1e-6)) for row in report["steps"]]
    assert written["train/tokens_per_second"] == rates
    expected = [(row["step"], pytest.approx(row["perplexity"], rel=1e-6)) for row in report["validation"]]
    assert written["eval/perplexity"] == expected and len(expected) == 4


@pytest.mark.slow
def test_without_tensorboard_nothing_is_done(eager_reference, inputs, tmp_path, capsys, monkeypatch):
    """Neither by a new run that asks for it nor by one that goes on; one that does not ask needs none."""
    message = "maskpro: error: report_to: expected the package tensorboard, which is not installed"

    def stop():
        os.kill(os.getpid(), signal.SIGINT)

    # a job in the background is started with SIGINT ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert broken_off(inputs, tmp_path / "run", monkeypatch, stop, "--report-to", "tensorboard") == 0
    finally:
        signal.signal(signal.SIGINT, before)
    files = sorted(tmp_path.rglob("*"))
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    capsys.readouterr()
    new = ["learn", *inputs, "--output", str(tmp_path / "new")]
    for arguments in [*new, "--report-to", "tensorboard"], ["learn", "--resume", str(tmp_path / "run")]:
        assert main.main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(message) and line.endswith("(pip install 'maskpro-kernels[tensorboard]')")
        assert sorted(tmp_path.rglob("*")) == files
    assert main.main(new) == 0
    assert not (tmp_path / "new" / "tensorboard").exists()
