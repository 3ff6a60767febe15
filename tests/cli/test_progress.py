"""How far a command is: bars on a terminal alone, and plain lines everywhere else."""

from __future__ import annotations

import json
import os
import re
import sys
import termios
import threading

import pytest
from helpers.command import learn

from maskpro_kernels.cli import main, progress
from maskpro_kernels.cli.progress import StepLines, followed
from maskpro_kernels.learn.trainer import StepRecord

pytestmark = pytest.mark.usefixtures("eager_reference")

LINE = re.compile(
    r"step (\d+) of (\d+): loss \d+\.\d{4}, (?:validation perplexity (\d+\.\d\d), )?\d+ tokens a second, [\d:]+ left"
)


def on_a_terminal(monkeypatch, arguments):
    """What a command writes to a stderr that is a terminal."""
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, 200))
    written = []

    def read():
        try:
            while content := os.read(master, 1 << 16):
                written.append(content)
        except OSError:
            # how a terminal ends whose other side is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with open(slave, "w", buffering=1) as terminal, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        code = main.main(arguments)
    reader.join()
    os.close(master)
    assert code == 0
    return b"".join(written).decode()


def test_bars_are_for_a_terminal(inputs, tmp_path, monkeypatch):
    options = ["--steps", "4", "--eval-every", "2", "--init", "reconstruction"]
    bars = on_a_terminal(monkeypatch, learn(inputs, tmp_path / "bars", *options))
    for what in ("Loading weights", "perplexity", "reconstruction", "initial losses", "learning"):
        assert re.search(rf"{what}: +\d+%\|", bars), what
    assert "step 2 of 4" not in bars
    quiet = on_a_terminal(monkeypatch, learn(inputs, tmp_path / "quiet", *options, "--quiet"))
    assert "%|" not in quiet and "step 2 of 4: loss" in quiet
    for folder, bar in (("bars", True), ("quiet", False)):
        told = on_a_terminal(monkeypatch, ["replay", str(tmp_path / folder), *([] if bar else ["--quiet"])])
        assert ("replaying: 100%|" in told) == bar and ("replaying: step 4 of 4" in told) != bar


@pytest.mark.slow
def test_a_log_has_a_line_for_each_mask_and_each_part_of_the_steps(inputs, tmp_path, capsys):
    options = "--steps 100 --eval-every 33 --batch-size 1 --seq-len 4 --eval-windows 1 --eval-length 8".split()
    assert main.main(learn(inputs, tmp_path / "run", *options)) == 0
    lines = capsys.readouterr().err.splitlines()
    told = [line.split(":")[0] for line in lines[:5]]
    assert told == ["dense", "memory that a step needs, estimated", "left dense", "magnitude", "wanda"]
    assert re.fullmatch(r"wanda: test perplexity \d+\.\d\d, \d+\.\d seconds from the dense model", lines[4])
    assert re.fullmatch(r"step 0 of 100: validation perplexity \d+\.\d\d", lines[5])
    # that no group has moved
    *steps, warning = lines[6:]
    assert warning.startswith("maskpro: warning: no group has left the initial mask")
    found = [LINE.fullmatch(line) for line in steps]
    assert all(found), lines
    # a fiftieth of the steps is 2
    assert [int(match[1]) for match in found] == sorted({*range(2, 101, 2), 33, 66, 99})
    validation = json.loads((tmp_path / "run" / "report.json").read_text())["validation"]
    assert {int(match[1]): match[3] for match in found if match[3]} == {
        row["step"]: f"{row['perplexity']:.2f}" for row in validation[1:]
    }


@pytest.mark.slow
def test_to_be_quiet_is_of_a_process_and_not_of_a_run(inputs, tmp_path, capsys):
    assert main.main(learn(inputs, tmp_path / "loud")) == 0
    assert main.main(learn(inputs, tmp_path / "quiet", "--quiet")) == 0
    loud, quiet = (
        json.loads((tmp_path / name / "report.json").read_text())["settings"] | {"output": None}
        for name in ("loud", "quiet")
    )
    assert loud == quiet


def record(step, loss, tokens=100, seconds=0.5):
    return StepRecord(step, loss, None, None, None, 0.0, tokens, seconds)


def test_what_a_line_tells(capsys, monkeypatch):
    now = iter([0.0, 12.0, 15.0, 100.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(now))
    # gone on with behind step 140 of 200, a line every fourth
    lines = StepLines(200, 140)
    lines.add(record(140, 2.0), None)
    lines.add(record(141, 3.0), None)
    lines.add(record(142, float("nan")), None)
    lines.add(record(143, 4.0, seconds=2.5), None)
    assert capsys.readouterr().err == "step 144 of 200: loss 3.0000, 100 tokens a second, 02:48 left\n"
    lines.add(record(144, 1.0), 9.875)
    told = "step 145 of 200: loss 1.0000, validation perplexity 9.88, 200 tokens a second, 02:45 left\n"
    assert capsys.readouterr().err == told
    lines.add(record(199, float("nan")), None)
    assert capsys.readouterr().err == "step 200 of 200: loss nan, 200 tokens a second, 00:00 left\n"


def test_what_is_followed_in_lines(capsys):
    assert list(followed(range(107), "replaying", bars=False)) == list(range(107))
    lines = capsys.readouterr().err.splitlines()
    assert [int(re.match(r"replaying: step (\d+) of 107, [\d:]+ left$", line)[1]) for line in lines] == [
        *range(2, 107, 2),
        107,
    ]
    assert list(followed([], "replaying", bars=False)) == [] and capsys.readouterr().err == ""
