"""Python files as trees: what the modules of a package import, and whether that is a circle."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def modules_of(package: Path) -> dict[str, Path]:
    """The files of a package by dotted name, "maskpro_kernels.ops" for ops/__init__.py."""
    names = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def holder(base: str, name: str, modules: Mapping[str, Path]) -> str:
    """The module that ``from base import name`` is after: a submodule, or the one whose name a package passes on."""
    if f"{base}.{name}" in modules:
        return f"{base}.{name}"
    if base in modules and modules[base].name == "__init__.py":
        for module, given in imported_names(base, modules):
            if given == name:
                return module
    return base


def imported_names(module: str, modules: Mapping[str, Path]) -> Iterator[tuple]:
    """(module, name that it is bound to) of each import; our names have the modules that define them.

    Imports inside functions are among them.
    """
    package = module if modules[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(parse(modules[module])):
        if isinstance(node, ast.Import):
            yield from ((alias.name, alias.asname or alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                found = holder(base, alias.name, modules) if base != module else base
                yield found, alias.asname or alias.name


def imports(module: str, modules: Mapping[str, Path]) -> set[str]:
    """Modules that a module imports."""
    return {name for name, _ in imported_names(module, modules)}


def reached_from(module: str, modules: Mapping[str, Path]) -> set[str]:
    """The modules of the package that one needs, itself among them."""
    pending, reached = [module], set()
    while pending:
        reached.add(module := pending.pop())
        pending += (imports(module, modules) & modules.keys()) - reached
    return reached


def check_no_circle(imported: Mapping[str, set[str]]) -> None:
    """Check that what each name imports can be below it.

    Raises:
        ValueError: for a circle, which it names.
    """
    try:
        TopologicalSorter(imported).prepare()
    except CycleError as error:
        raise ValueError(f"a circle of imports: {' <- '.join(error.args[1])}") from None


def names_in(path: Path) -> set[str]:
    """Imports of a file, and attributes that it reads, as dotted names."""
    nodes = list(ast.walk(parse(path)))
    names = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names
