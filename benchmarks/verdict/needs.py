"""What a run needs, found before anything else is imported."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Exit status where nothing is wrong or slow, but something has not run
INCOMPLETE = 4
# Of the package and of Triton, which compiles its launchers
PACKAGES = ("torch", "triton", "numpy", "safetensors", "tqdm", "filelock", "llvmlite")
COMPILERS = ("cc", "gcc", "clang")
OF_TESTS = ("pytest", "hypothesis", "mpmath", "numpy")
INSTALL = "python3 -m pip install"


def missing(packages: Sequence[str]) -> list[str]:
    return [name for name in packages if find_spec(name) is None]


def of_everything() -> str | None:
    """What keeps the whole verdict from running."""
    packages = missing(PACKAGES)
    if packages:
        return f"{', '.join(packages)} missing: {INSTALL} {' '.join(packages)}"
    if not any(map(shutil.which, COMPILERS)):
        return f"no C compiler for Triton: install one of {', '.join(COMPILERS)}"
    return None


def of_tests() -> str | None:
    """What keeps the tests from running."""
    packages = missing(OF_TESTS)
    if packages:
        return f"{', '.join(packages)} missing: {INSTALL} {' '.join(packages)}"
    if not (ROOT / "emulators" / "gpu_emulators").is_dir():
        return "no folder emulators/gpu_emulators: run in a checkout of the repository"
    return None


def of_vllm() -> str | None:
    """What keeps vLLM from serving a packed model."""
    if missing(["vllm"]):
        return f"vllm missing: {INSTALL} vllm"
    if "maskpro_kernels" not in entry_points(group="vllm.general_plugins").names:
        return f"vLLM does not find maskpro_kernels: {INSTALL} -e ."
    return None


def of_details() -> list[str]:
    """What some lines of the page need."""
    found = []
    if missing(["xdist"]):
        found.append(f"tests in parallel (xdist missing: {INSTALL} pytest-xdist)")
    if shutil.which("nvidia-smi") is None:
        found.append("version of the driver (no nvidia-smi)")
    return found
