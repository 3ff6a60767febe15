"""Child processes that import what tests import."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


def search_path() -> str:
    """PYTHONPATH of a child: as pytest's own, before what the variable holds here."""
    paths = [ROOT / "tests", BENCHMARKS, ROOT, os.environ.get("PYTHONPATH")]
    return os.pathsep.join(str(path) for path in paths if path)


def environment() -> dict[str, str]:
    """Of a child on the routes that users get, without Triton's interpreter."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return inherited | {"PYTHONPATH": search_path()}
