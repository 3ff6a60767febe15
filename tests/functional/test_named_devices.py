"""Devices that arguments name: those of another machine are refused with the reason, before anything has changed."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.functional.checks import check_device, missing_gpu
from maskpro_kernels.hf import load_model
from maskpro_kernels.learn.run import replay_run

# Texts of c10/cuda/CUDAFunctions.cpp
TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx Alternatively, go to: "
    "https://pytorch.org to install a PyTorch version that has been compiled with your version of the CUDA driver."
)
NO_DRIVER = (
    "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver from "
    "http://www.nvidia.com/Download/index.aspx"
)
NEEDS = "; CUDA 13.0, for which torch is built, needs driver 580 or newer"


def without_gpu(monkeypatch, error: str | None, cuda: str | None = "13.0", hip: str | None = None) -> None:
    """torch for CUDA or ROCm that finds no GPU, and says this when it is initialized."""

    def initialized():
        if error is not None:
            raise RuntimeError(error)

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", initialized)


@pytest.mark.parametrize(
    ("versions", "error", "reason"),
    [
        ({"cuda": None}, None, f"torch {torch.__version__} is built without CUDA"),
        ({}, TOO_OLD, "The NVIDIA driver on your system is too old (found version 12020)" + NEEDS),
        ({}, NO_DRIVER, "Found no NVIDIA driver on your system" + NEEDS),
        (
            {"cuda": "12.8"},
            NO_DRIVER,
            "Found no NVIDIA driver on your system; CUDA 12.8, for which torch is built, needs driver 525 or newer",
        ),
        ({"cuda": "14.1"}, NO_DRIVER, "Found no NVIDIA driver on your system"),
        ({}, "No CUDA GPUs are available", "No CUDA GPUs are available"),
        ({"cuda": None, "hip": "7.0"}, "No HIP GPUs are available", "No HIP GPUs are available"),
        ({}, None, "torch finds no GPU"),
    ],
)
def test_the_reason_that_there_is_no_gpu(versions, error, reason, monkeypatch):
    without_gpu(monkeypatch, error, **versions)
    assert missing_gpu() == reason


def test_a_gpu_needs_no_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert missing_gpu() is None


def test_arguments_that_name_a_gpu_where_there_is_none(monkeypatch, tmp_path):
    without_gpu(monkeypatch, TOO_OLD)
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    layers = list(model)
    calls = {
        "logits_device": [
            lambda: mk.MaskedLinear.from_linear(nn.Linear(8, 4), "2:4", logits_device="cuda"),
            lambda: mk.convert(model, "2:4", logits_device="cuda"),
        ],
        "device": [
            lambda: load_model("smollm2-135m", device="cuda"),
            lambda: replay_run(tmp_path, device=torch.device("cuda")),
        ],
    }
    for argument, functions in calls.items():
        for function in functions:
            with pytest.raises(
                ValueError,
                match=rf"^{argument}: expected one of cpu, got .*cuda.*: The NVIDIA driver .* \(found version 12020\)"
                + re.escape(NEEDS)
                + "$",
            ):
                function()
    assert list(model) == layers


def test_an_old_gpu_is_refused(monkeypatch):
    def refusing(device):
        raise ValueError(f"device: expected another, got {device}")

    empty = torch.empty
    monkeypatch.setattr("maskpro_kernels.functional.checks.architecture", refusing)
    monkeypatch.setattr(torch, "empty", lambda *sizes, device: empty(*sizes))
    with pytest.raises(ValueError, match="^device: expected another, got cpu$"):
        check_device("device", "cuda:0")
    assert check_device("device", "cpu") == torch.device("cpu")
