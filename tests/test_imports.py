"""What an import loads, and which module may import which."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import maskpro_kernels

ROOT = Path(maskpro_kernels.__file__).parent

# A module may import only from those before it
ORDER = [
    "pattern",
    "philox",
    "reference",
    "certain",
    "native",
    "graphs",
    "compiled",
    "kernels.device",
    "kernels.launch",
    "kernels.sampling",
    "kernels.masked_gemm",
    "kernels.packed",
    "kernels.swaps",
    "kernels.straight_through",
    "ops",
    "functional",
    "packed",
    "uncompiled",
    "modules",
    "ranks",
    "estimators",
    "journal",
    "snapshots",
    "batches",
    "replay",
    "run_folder",
    "initial_losses",
    "trainer",
    "masks",
    "reconstruction",
    "convert",
    "data",
    "evaluation",
    "export",
    "checkpoints",
    "hf",
    "report",
    "scalars",
    "pictures",
    "commands.arguments",
    "commands.models",
    "commands.progress",
    "commands.runs",
    "commands.held_out",
    "commands.signals",
    "commands.inputs",
    "commands.initial",
    "commands.learn",
    "commands.replay",
    "commands.evaluation",
    "commands.checkpoints",
    "cli",
]


def module_name(path: Path) -> str:
    """Name below the package: "" for its own __init__, "kernels" for that of kernels."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}
PACKAGES = {name for name, path in SOURCES.items() if path.name == "__init__.py"}
EXPORTS = {
    alias.asname or alias.name: node.module
    for node in ast.parse(SOURCES[""].read_text()).body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}


def own_module(base: str, name: str) -> str:
    """The module of ours that ``from base import name`` reaches: a submodule, or what holds the name."""
    if base == "" and name in EXPORTS:
        return EXPORTS[name]
    submodule = f"{base}.{name}" if base else name
    return submodule if submodule in SOURCES else base


def imported(module: str, lazy: bool) -> set[str]:
    """Modules that a module imports: ours as ".name", others by their first name.

    Args:
        lazy: whether imports inside functions count.
    """
    package = module.split(".") if module in PACKAGES else module.split(".")[:-1]
    found = set()
    pending = list(ast.parse(SOURCES[module].read_text()).body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not lazy:
            continue
        pending.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {"." + ".".join(n[1:]) if n[0] == "maskpro_kernels" else n[0] for n in names}
        elif isinstance(node, ast.ImportFrom):
            path = node.module.split(".") if node.module else []
            if node.level:
                base = [*package[: len(package) - node.level + 1], *path]
            elif path[0] == "maskpro_kernels":
                base = path[1:]
            else:
                found.add(path[0])
                continue
            found |= {"." + own_module(".".join(base), alias.name) for alias in node.names}
    return found


def test_order_names_every_module():
    assert set(ORDER) == SOURCES.keys() - PACKAGES


@pytest.mark.parametrize("module", ORDER)
def test_imports_go_down_the_order(module):
    above = ORDER[ORDER.index(module) :]
    ours = {name[1:] for name in imported(module, lazy=False) if name.startswith(".")}
    assert ours <= set(ORDER), "imports a package as a whole"
    assert not ours & set(above)


@pytest.mark.parametrize(
    ("library", "allowed"), [("triton", "kernels."), ("transformers", "hf")], ids=["triton", "transformers"]
)
def test_library_is_imported_in_one_place(library, allowed):
    users = [module for module in SOURCES if library in imported(module, lazy=True)]
    assert users
    assert all(module.startswith(allowed) for module in users), users


def test_collectives_are_called_in_one_place():
    assert [module for module, path in SOURCES.items() if "torch.distributed" in names_in(path)] == ["ranks"]


def names_in(path: Path) -> set[str]:
    """What a file imports, and the attributes that it reads, as dotted names."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("module", ["maskpro_kernels", "maskpro_kernels.cli"])
def test_import_of_the_package_is_light(module):
    heavy = ["triton", "transformers", "matplotlib", "datasets", "tensorboard"]
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", maskpro_kernels.__all__)
def test_public_name_exists(name):
    assert hasattr(maskpro_kernels, name)
    assert getattr(maskpro_kernels, name).__doc__


def test_all_lists_what_the_package_imports():
    assert sorted(maskpro_kernels.__all__) == sorted(EXPORTS)
