"""What CONTRIBUTING.md asks of every file: the parameters of functions, and the field's words."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from helpers.children import ROOT
from helpers.source_tree import identifiers, parse, statements

FOLDERS = ("maskpro_kernels", "benchmarks", "docs", "tests")
FILES = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
TREES = {str(path.relative_to(ROOT)): parse(path) for path in sorted(FILES)}

# Names that the field has other words for, and those of what is no longer read
OLD_WORDS = re.compile(
    r"(^|_)(settled|urns?)(_|$)|arrival_score|most_skipped|^_?Clock$|^_?EARLIER_|^_Descent$|^Passes$"
)


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """(file, function) of all, those inside others and of classes among them."""
    for name, tree in TREES.items():
        for node in statements(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield name, node


def parameters(node: ast.FunctionDef) -> int:
    given = node.args
    return len([*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))])


def is_kernel(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)


def test_no_function_takes_many_parameters():
    """Operations and kernels take what a launch needs; of others ``self`` counts as well."""
    others = [(name, node) for name, node in functions() if not name.startswith("maskpro_kernels/ops/")]
    counts = {f"{name}:{node.lineno} {node.name}": parameters(node) for name, node in others if not is_kernel(node)}
    many = [f"{name}: {count}" for name, count in counts.items() if count > 12]
    assert not many, "more than 12 parameters:\n" + "\n".join(many)


def test_names_are_words_of_the_field():
    found = {name: [word for word in identifiers(tree) if OLD_WORDS.search(word)] for name, tree in TREES.items()}
    assert {name: words for name, words in found.items() if words} == {}


def test_old_words_are_found_in_names_of_any_kind():
    source = (
        "import a.urn as b\ndef f(x, settled=1, **y):\n    x.most_skipped[EARLIER_SETTINGS] = f(arrival_score=return_)"
    )
    assert len([word for word in identifiers(ast.parse(source)) if OLD_WORDS.search(word)]) == 5
    assert not [word for word in ("return_", "turns", "MOST_SKIPPED", "clock", "EARLIER") if OLD_WORDS.search(word)]


def test_no_file_of_tests_imports_another():
    """What several need stands in ``helpers``."""
    files = {path.stem for path in (ROOT / "tests").rglob("test_*.py")} | {"conftest"}
    for name, tree in TREES.items():
        if name.startswith("tests/"):
            nodes = [node for node in statements(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
            imported = {part for node in nodes for part in identifiers(node) | {getattr(node, "module", None)}}
            assert not imported & files, name
