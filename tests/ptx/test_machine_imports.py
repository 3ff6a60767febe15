"""The PTX machine could be given away: it needs numpy alone, and only its driver knows torch and Triton."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import ptx_machine

DRIVER = {"triton_driver.py", "plugin.py"}


def imported(path: Path) -> set[str]:
    """The packages that a file imports, wherever it does."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.split(".")[0] for name in names}


def test_the_machine_needs_numpy_alone():
    folder = Path(ptx_machine.__file__).parent
    files = [path for path in folder.rglob("*.py") if path.name not in DRIVER]
    assert len(files) > 20
    others = {path.name: imported(path) - sys.stdlib_module_names - {"numpy"} for path in files}
    assert {name: packages for name, packages in others.items() if packages} == {}
