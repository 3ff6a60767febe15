"""The emulators need numpy alone; only the driver and the plugin import torch, Triton and pytest."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import gpu_emulators

ROOT = Path(gpu_emulators.__file__).parent


def imported(path: Path) -> set[str]:
    """Packages that a file imports, inside of functions too."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.split(".")[0] for name in names}


def test_emulators_need_numpy_alone():
    files = [path for path in ROOT.rglob("*.py") if path not in (ROOT / "driver.py", ROOT / "plugin.py")]
    assert len(files) > 40
    others = {str(path.relative_to(ROOT)): imported(path) - sys.stdlib_module_names - {"numpy"} for path in files}
    assert {name: packages for name, packages in others.items() if packages} == {}
