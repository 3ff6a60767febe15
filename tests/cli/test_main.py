"""The command around its parts: help, versions, signals, and who reads what it prints."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from helpers.children import environment
from helpers.command import learn

from maskpro_kernels.cli import main
from maskpro_kernels.cli.learn import command, start

pytestmark = pytest.mark.usefixtures("eager_reference")


def test_versions_and_commands_are_printed(capsys):
    assert main.main(["--version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in lines and lines[0].startswith("python 3.")
    assert main.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert main.main([]) == 0 and capsys.readouterr().out == printed
    assert printed.startswith("usage: maskpro") and all(f"  {name} " in printed for name in main.COMMANDS)


def test_an_interrupt_before_the_first_step_is_a_line(inputs, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(start, "_convert_and_evaluate", interrupted)
    assert main.main(learn(inputs, tmp_path / "out")) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "maskpro: interrupted"


@pytest.mark.parametrize(
    ("error", "reported"),
    [
        (KeyError("weights"), "expected an entry 'weights' in a file, got none"),
        (MemoryError("too large"), "MemoryError: too large"),
        (RecursionError("too deep"), "RecursionError: too deep"),
        (OverflowError("too\nlarge"), "too large"),
        (torch.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory; use smaller windows or batches"),
    ],
)
def test_an_error_is_one_line(inputs, tmp_path, capsys, monkeypatch, error, reported):
    def failing(*_):
        raise error

    monkeypatch.setattr(command, "load_texts", failing)
    assert main.main(learn(inputs, tmp_path / "out")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"maskpro: error: {reported}")


@pytest.mark.parametrize(
    ("message", "reported"),
    [
        ("batch_size: expected at least 1, got 0", "--batch-size: expected at least 1, got 0"),
        ("data: batch_size: expected fewer", "data: --batch-size: expected fewer"),
        # no option, and no argument
        ("new_tokens: expected batch_size, got seed", "new_tokens: expected batch_size, got seed"),
    ],
)
def test_errors_name_options_as_they_are_given(inputs, tmp_path, capsys, monkeypatch, message, reported):
    def failing(*_):
        raise ValueError(message)

    monkeypatch.setattr(command, "load_texts", failing)
    assert main.main(learn(inputs, tmp_path / "out")) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"maskpro: error: {reported}"


def test_a_fault_of_the_package_is_no_line(inputs, tmp_path, monkeypatch):
    def failing(*_):
        raise RuntimeError("a fault")

    monkeypatch.setattr(command, "load_texts", failing)
    with pytest.raises(RuntimeError, match="a fault"):
        main.main(learn(inputs, tmp_path / "out"))


def test_warnings_and_what_the_package_logs_are_lines(capsys):
    import logging

    with main.printed_log():
        logging.getLogger("maskpro_kernels.ops").info("compiling")
    assert capsys.readouterr().err == "compiling\n"


def test_a_reader_that_has_gone_ends_a_command_without_a_word():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "maskpro_kernels", "--version"]
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, env=environment())
    os.close(writing)
    assert ended.returncode == 141 and ended.stderr == b""
