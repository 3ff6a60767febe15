"""The versions of what decides what a run gives, and the machine that decides how fast."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide what a run gives."""
    found = {"python": platform.python_version()}
    for package in ("maskpro-kernels", "torch", "triton", "transformers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine(device: torch.device) -> dict[str, str | int]:
    """What a timing on a device depends on: the device's name, that of the processor, and the threads of torch."""
    processor = _processor()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor
    return {
        "device": str(device),
        "device_name": name,
        "processor": processor,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }


def _processor() -> str:
    # Linux, but on ARM
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.processor() or platform.machine()
