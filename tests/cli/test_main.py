"""The command around its parts: help, versions, signals, and who reads what it prints."""

from __future__ import annotations

import os
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl

import pytest
import torch
from helpers.command import contents, learn

from maskpro_kernels.cli import learn as learning
from maskpro_kernels.cli import main

pytestmark = pytest.mark.usefixtures("eager_reference")


def test_versions_are_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(["--version"])
    lines = capsys.readouterr().out.splitlines()
    assert not ended.value.code and f"torch {torch.__version__}" in lines and lines[0].startswith("python 3.")


# Writes lines until a signal comes
TALKATIVE = """
import sys
from maskpro_kernels.cli.signals import Signals
with Signals() as signals:
    print("ready", flush=True)
    while not signals.came:
        print("x" * 200, file=sys.stderr)
print("ended")
"""


def test_a_signal_in_the_midst_of_a_write_to_a_slow_pipe(monkeypatch):
    # without its buffer there would be nothing to break
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    reading, writing = os.pipe()
    with subprocess.Popen([sys.executable, "-c", TALKATIVE], stdout=subprocess.PIPE, stderr=writing) as child:
        os.close(writing)
        assert child.stdout.readline() == b"ready\n"
        before = filled = 0
        while not 0 < filled == before:
            time.sleep(0.2)
            before, filled = filled, struct.unpack("i", ioctl(reading, termios.FIONREAD, bytes(4)))[0]
        child.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        with open(reading, "rb") as pipe:
            told = pipe.read()
        assert child.stdout.read() == b"ended\n", told[-1000:]
    assert child.returncode == 0 and b"SIGTERM: the run stops after this step\n" in told


def test_an_interrupt_before_the_first_step_is_told_in_a_line(inputs, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(learning, "initial_masks", interrupted)
    before = contents(tmp_path)
    assert main.main(learn(inputs, tmp_path / "out")) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "maskpro: interrupted"
    assert contents(tmp_path) == before


def test_a_reader_that_has_gone_ends_a_command_without_a_word(inputs):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "maskpro_kernels", "validate", str(inputs / "model")]
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert ended.returncode == 141 and ended.stderr == b""
    # and where there is none from the start
    command = f"{shlex.join(command)} >&-"
    assert subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE).returncode == 0


def test_a_pipe_that_breaks_elsewhere_is_an_error(inputs, tmp_path, capsys, monkeypatch):
    def broken(*_):
        raise BrokenPipeError("download")

    monkeypatch.setattr(learning, "read_inputs", broken)
    assert main.main(learn(inputs, tmp_path / "out")) == 2
    assert "download" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [[], ["learn"], ["eval"], ["compare"], ["export"], ["import"], ["validate"], ["replay"], ["speed"]]
)
def test_help(capsys, command):
    with pytest.raises(SystemExit) as end:
        main.main([*command, "--help"])
    assert end.value.code == 0
    assert "usage: maskpro" in capsys.readouterr().out
