"""Python files as trees: what the modules of a package import, and on which floor that puts them."""

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


def statements(tree: ast.AST, inside_functions: bool = True) -> Iterator[ast.AST]:
    """All nodes of a tree.

    Args:
        inside_functions: whether those that only a call runs are among them.
    """
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    if inside_functions:
        yield from (node for node in ast.walk(tree) if node is not tree)
        return
    for node in ast.iter_child_nodes(tree):
        yield node
        if not isinstance(node, functions):
            yield from statements(node, inside_functions=False)


def holder(base: str, name: str, modules: Mapping[str, Path]) -> str:
    """The module that ``from base import name`` is after: a submodule, or the one whose name a package passes on."""
    if f"{base}.{name}" in modules:
        return f"{base}.{name}"
    if base in modules and modules[base].name == "__init__.py":
        for module, given in imported_names(base, modules):
            if given == name:
                return module
    return base


def imported_names(module: str, modules: Mapping[str, Path], inside_functions: bool = True) -> Iterator[tuple]:
    """(module, name that it is bound to) of each import, ours as the modules that hold the names."""
    package = module if modules[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in statements(parse(modules[module]), inside_functions):
        if isinstance(node, ast.Import):
            yield from ((alias.name, alias.asname or alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                found = holder(base, alias.name, modules) if base != module else base
                yield found, alias.asname or alias.name


def imports(module: str, modules: Mapping[str, Path], inside_functions: bool = True) -> set[str]:
    """Modules that a module imports."""
    return {name for name, _ in imported_names(module, modules, inside_functions)}


def reached_from(module: str, modules: Mapping[str, Path]) -> set[str]:
    """The modules of the package that one needs, itself among them."""
    pending, reached = [module], set()
    while pending:
        reached.add(module := pending.pop())
        pending += (imports(module, modules) & modules.keys()) - reached
    return reached


def floors(below: Mapping[str, set[str]]) -> list[list[str]]:
    """Names by floor: each is one above the highest of those that it imports.

    Raises:
        ValueError: for a circle, which it names.
    """
    try:
        order = list(TopologicalSorter(below).static_order())
    except CycleError as error:
        raise ValueError(f"a circle of imports: {' <- '.join(error.args[1])}") from None
    floor: dict[str, int] = {}
    for name in order:
        floor[name] = max((floor[other] + 1 for other in below.get(name, ())), default=0)
    return [sorted(name for name in floor if floor[name] == i) for i in range(max(floor.values(), default=-1) + 1)]


def names_in(path: Path) -> set[str]:
    """Imports of a file, and attributes that it reads, as dotted names."""
    nodes = list(statements(parse(path)))
    names = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def identifiers(tree: ast.AST) -> set[str]:
    """All names in code: of modules, functions, classes, parameters, keywords, variables and attributes."""
    fields = ("name", "asname", "id", "attr", "arg", "module")
    found = (getattr(node, field, None) for node in statements(tree) for field in fields)
    return {part for name in found if isinstance(name, str) for part in name.split(".")}
