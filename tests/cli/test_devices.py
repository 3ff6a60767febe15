"""The device that a command computes on: it says which one, and why."""

from __future__ import annotations

import pytest
import torch
from helpers.command import learn, refuses

from maskpro_kernels.cli import inputs as shared
from maskpro_kernels.cli import main
from maskpro_kernels.functional import checks

pytestmark = pytest.mark.usefixtures("eager_reference")

REASON = "The NVIDIA driver on your system is too old (found version 12020); CUDA 13.0 needs driver 580 or newer"


def test_a_run_without_a_gpu_says_why(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shared, "missing_gpu", lambda: REASON)
    words = learn(inputs, tmp_path / "out")
    place = words.index("--device")
    del words[place : place + 2]
    assert main.main(words) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"device: cpu, since there is no GPU: {REASON}"
    assert lines[1] == f"loading {inputs / 'model'}"


@pytest.mark.parametrize("command", ["eval", "speed"])
def test_each_command_says_its_device(inputs, capsys, command):
    words = {"eval": f"--data {inputs / 'text.txt'}", "speed": "--prompt-tokens 4 --new-tokens 2 --rounds 1"}[command]
    assert main.main([command, str(inputs / "model"), "--device", "cpu", *words.split()]) == 0
    assert "device: cpu, by --device" in capsys.readouterr().err.splitlines()


def test_the_gpu_that_is_used_is_named(capsys, monkeypatch):
    monkeypatch.setattr(shared, "missing_gpu", lambda: None)
    monkeypatch.setattr(shared, "device_of", lambda name: torch.device(name or "cuda:0"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA H100 as {device}")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in (None, "cuda:1", "auto"):
        shared.report_device(name)
    assert capsys.readouterr().err.splitlines() == [
        "device: cuda:0, NVIDIA H100 as cuda:0",
        "device: cuda:1, by --device",
        "device: auto, GPUs: 2",
    ]


def test_a_gpu_that_is_not_there_is_refused_with_the_reason(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(checks, "missing_gpu", lambda: REASON)
    words = learn(inputs, tmp_path / "out", "--device", "cuda")
    refuses(capsys, tmp_path, words, f"device: expected one of cpu, got 'cuda': {REASON}")
