"""The rules of CONTRIBUTING.md: the tree, the parameters of functions, and the field's words."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

from helpers.children import ROOT
from helpers.source_tree import identifiers, parse, statements

FOLDERS = ("maskpro_kernels", "benchmarks", "docs", "tests")
FILES = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]

PACKAGE = sorted((ROOT / "maskpro_kernels").rglob("*.py"))
SCRIPTS = sorted(path for folder in ("benchmarks", "docs", "tests") for path in (ROOT / folder).rglob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TREE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## The tree")[2].partition("\n## ")[0]
ENTRIES = re.findall(r"^\| `(maskpro_kernels/[\w./]+)` \|", TREE, re.MULTILINE)
# The field has plainer words: report and raise, after, again, is, continue, interrupt, add, unfuse
RIDDLES = re.compile(
    r"\b(told|tells?|telling|unbegun|parting|behind|anew|kin|stands?|under way|(goes?|going) on|(broken?|breaks?) off|"
    r"came to|comes? (to|by|about)|taken for|takes? (for|turns)|summed up|sums? up|shared out|hands? on|puts? together|"
    r"ma(de|kes?) up for|as (it|they) (is|are|was|were)|(left|stays?) as|a sound|gives? whether)\b",
    re.IGNORECASE,
)
BEGINNINGS = re.compile(r"(What|Whether|The same)\b")

# Names that the field has other words for, and those of what is no longer read
OLD_WORDS = re.compile(
    r"(^|_)(settled|urns?)(_|$)|arrival_score|most_skipped|^_?Clock$|^_?EARLIER_|^_Descent$|^Passes$"
)


@functools.cache
def trees() -> dict[str, ast.Module]:
    return {str(path.relative_to(ROOT)): parse(path) for path in sorted(FILES)}


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """(file, function) of all, those inside others and of classes among them."""
    for name, tree in trees().items():
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


def test_the_tree_has_every_entry_of_the_package():
    entries = {path.relative_to(ROOT).parts[1] for path in PACKAGE} - {"__init__.py", "__main__.py"}
    assert {entry.rstrip("/").split("/")[1] for entry in ENTRIES} == entries
    assert all((ROOT / entry).exists() for entry in ENTRIES)


def words_of(path: Path) -> Iterator[str]:
    """The names, docstrings and comments of a file; other strings are for users."""
    tree = parse(path)
    yield from (name.replace("_", " ") for name in identifiers(tree))
    for node in [tree, *statements(tree)]:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node, clean=False) or ""
    yield from re.findall("# (.*)", path.read_text(encoding="utf-8"))


def test_there_are_no_riddles():
    found = {}
    for path in (*PACKAGE, *SCRIPTS, *PAGES):
        text = path.read_text(encoding="utf-8") if path.suffix == ".md" else "; ".join(words_of(path))
        found[str(path.relative_to(ROOT))] = [riddle[0] for riddle in RIDDLES.finditer(" ".join(text.split()))]
    assert {name: riddles for name, riddles in found.items() if riddles} == {}


def test_docstrings_begin_with_an_imperative_or_a_noun():
    found = [
        f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"
        for path in PACKAGE + SCRIPTS
        for tree in [parse(path)]
        for node in [tree, *statements(tree)]
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and BEGINNINGS.match(ast.get_docstring(node) or "")
    ]
    assert found == []


def test_names_are_words_of_the_field():
    found = {name: [word for word in identifiers(tree) if OLD_WORDS.search(word)] for name, tree in trees().items()}
    assert {name: words for name, words in found.items() if words} == {}


def test_old_words_are_found_in_names_of_any_kind():
    source = (
        "import a.urn as b\ndef f(x, settled=1, **y):\n    x.most_skipped[EARLIER_SETTINGS] = f(arrival_score=return_)"
    )
    assert len([word for word in identifiers(ast.parse(source)) if OLD_WORDS.search(word)]) == 5
    assert not [word for word in ("return_", "turns", "MOST_SKIPPED", "clock", "EARLIER") if OLD_WORDS.search(word)]


def test_no_file_of_tests_imports_another():
    """Functions of several tests are in ``helpers``."""
    files = {path.stem for path in (ROOT / "tests").rglob("test_*.py")} | {"conftest"}
    for name, tree in trees().items():
        if name.startswith("tests/"):
            nodes = [node for node in statements(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
            imported = {part for node in nodes for part in identifiers(node) | {getattr(node, "module", None)}}
            assert not imported & files, name
