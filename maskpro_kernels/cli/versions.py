"""The versions of what decides what a run gives."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide what a run gives."""
    found = {"python": platform.python_version()}
    for package in ("maskpro-kernels", "torch", "triton", "transformers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
