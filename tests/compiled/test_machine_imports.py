"""The machines could be given away: they need numpy alone, and only their driver knows torch and Triton."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import gcn_machine
import machines
import ptx_machine
import pytest

DRIVER = {"triton_driver.py", "plugin.py"}


def imported(path: Path) -> set[str]:
    """The packages that a file imports, wherever it does."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("package", [ptx_machine, gcn_machine, machines], ids=lambda package: package.__name__)
def test_a_machine_needs_numpy_alone(package):
    """And what the machines share, which needs none of them."""
    folder = Path(package.__file__).parent
    files = [path for path in folder.rglob("*.py") if path.name not in DRIVER]
    assert len(files) > 3
    shared = {"numpy"} if package is machines else {"numpy", "machines"}
    others = {path.name: imported(path) - sys.stdlib_module_names - shared for path in files}
    assert {name: packages for name, packages in others.items() if packages} == {}
