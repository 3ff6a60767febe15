"""The documents: what they show runs, what they name exists, and where they point there is something.

Fenced blocks run document by document, from the first block to the last, in a folder of the document's own:

- Python blocks share one namespace. ``TINY_IN_PYTHON`` makes models, texts and numbers of steps in them small.
- ``maskpro`` lines of ``sh`` blocks run in this process. Models and texts become the tiny ones; sizes and steps become
  the small ones of ``SMALL``, appended, so that the line's own are parsed as well. A folder that ``--output`` names
  is removed first. One that ``--resume`` names becomes a run that was interrupted after its first step.
- Other lines of ``sh`` blocks are checked: targets of make, files and tests of python and pytest, extras of pip,
  options of the command after torchrun.

Before a block that does not run there is a comment with the reason: ``<!-- not run: needs two GPUs -->``.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import json
import re
import shlex
import shutil
import tomllib
from argparse import SUPPRESS
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers.cases import cases
from helpers.pictures import leave_blank
from helpers.routes import route_to_the_eager_reference
from helpers.rows import texts, write_jsonl
from helpers.tiny_llama import tiny_text, write_inputs

import maskpro_kernels
from maskpro_kernels.cli import main
from maskpro_kernels.cli.config import COMMANDS as COMMANDS_OF_MASKPRO
from maskpro_kernels.cli.config import parser_of
from maskpro_kernels.files import write_tensors
from maskpro_kernels.learn.trainer import MaskTrainer
from maskpro_kernels.packed import pack_24

pytestmark = pytest.mark.usefixtures("eager_reference")

ROOT = Path(__file__).parent.parent.parent
README, API, COMMANDS = ROOT / "README.md", ROOT / "docs" / "api.md", ROOT / "docs" / "commands.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
# With options of other programs
FOREIGN = ("migration.md", "CONTRIBUTING.md", "measurements.md")
LANGUAGES = {"python", "sh", "text", "json", "toml", "bibtex"}
FENCE = re.compile(
    r"(?:^<!-- (?P<marker>.*?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
PROGRAMS = ("maskpro", "make", "pip", "python", "pytest", "torchrun", "git")

SMALL = {
    "learn": "--steps 2 --batch-size 4 --seq-len 16 --calibration-batches 2 --eval-every 2 --eval-windows 2 "
    "--device cpu",
    "eval": "--eval-windows 2 --eval-length 24 --device cpu",
    "speed": "--prompt-tokens 8 --new-tokens 4 --rounds 1 --device cpu",
}
TINY_IN_PYTHON = {
    '"smollm2-135m"': '"model"',
    '"pydoc"': '"text.txt"',
    '"allenai/c4:en"': '"rows"',
    "pydoc:0.5": "text.txt:0.5",
    "steps=30": "steps=3",
    "run(30)": "run(3)",
    "tokenizer, 128)": "tokenizer, 32)",
    "length=128": "length=32",
    "calibration[:16]": "calibration[:2]",
}
TINY = {"--model": "model", "--data": "text.txt"}
TINY_DATASETS = {"allenai/c4:en": "rows"} | {name: name for name in ("mine.jsonl", "articles.jsonl")}


class Block(NamedTuple):
    """A fenced block: its language, its text, and the reason why it does not run, if any."""

    language: str
    code: str
    not_run: str | None


def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def prose_of(document: Path) -> str:
    """A document without its fenced blocks."""
    return FENCE.sub("", text_of(document))


def blocks_of(document: Path) -> list[Block]:
    blocks = []
    for match in FENCE.finditer(text_of(document)):
        marker = match["marker"]
        if marker is not None:
            assert re.fullmatch(r"not run: \S.*", marker), (
                f"{document.name}: expected <!-- not run: why -->, got {marker}"
            )
            marker = marker.removeprefix("not run: ")
        blocks.append(Block(match["language"], match["code"], marker))
    return blocks


def lines_of(code: str) -> list[list[str]]:
    """The commands of a shell block, each as words."""
    return [words for line in code.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


def inline_of(document: Path) -> list[str]:
    return [" ".join(code.split()) for code in INLINE.findall(prose_of(document))]


def subparsers() -> dict:
    return {command: parser_of(command) for command in COMMANDS_OF_MASKPRO}


# What runs


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """The folder that each document gets a copy of: model, texts, runs, and what other programs would have stored."""
    folder = write_inputs(tmp_path_factory.mktemp("prepared"))
    (folder / "text.txt").write_text(tiny_text(paragraphs=600), encoding="utf-8")
    (folder / "other.txt").write_text(tiny_text(paragraphs=300, seed=1), encoding="utf-8")
    write_datasets(folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        route_to_the_eager_reference(monkeypatch)
        leave_blank(monkeypatch)
        monkeypatch.chdir(folder)
        learn = ["learn", "--model", "model", "--data", "text.txt", *SMALL["learn"].split(), "--output"]
        assert main.main([*learn, "runs/mine"]) == 0
        step = MaskTrainer.step

        def interrupted(trainer):
            if trainer.steps_done == 1:
                raise KeyboardInterrupt
            return step(trainer)

        monkeypatch.setattr(MaskTrainer, "step", interrupted)
        assert main.main([*learn, "interrupted"]) == 130
    write_foreign_files(folder)
    return folder


def write_datasets(folder: Path) -> None:
    """Files of rows."""
    write_jsonl(folder / "rows" / "train.jsonl", texts(200))
    write_jsonl(folder / "mine.jsonl", texts(200))
    write_jsonl(folder / "articles.jsonl", texts(200, column="content"))


def write_foreign_files(folder: Path) -> None:
    """Masks as MaskPro and MaskLLM store them, and a checkpoint in compressed-tensors' sparse-24-bitmask format."""
    import numpy as np
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "runs" / "mine")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    masks = {name: layer.weight != 0 for name, layer in layers.items() if name != "lm_head"}
    for kind in ("initial_mask", "learned_mask"):
        (folder / kind).mkdir()
        for name, mask in masks.items():
            torch.save(mask, folder / kind / f"{name}.pt")
    flat = {f"{name}.mask": np.packbits(mask.flatten().numpy()) for name, mask in masks.items()}
    np.savez_compressed(folder / "mask_compressed.npz", **flat)
    compressed = folder / "compressed-tensors-checkpoint"
    shutil.copytree(folder / "model", compressed)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    for name in masks:
        weight = tensors.pop(f"{name}.weight")
        packed, shape = pack_24(weight), torch.tensor(weight.shape)
        tensors |= {f"{name}.compressed": packed.values, f"{name}.bitmask": packed.bitmask, f"{name}.shape": shape}
    write_tensors(tensors, compressed / "model.safetensors", {"format": "pt"})


@pytest.fixture
def folder(prepared, tmp_path, monkeypatch) -> Path:
    copied = tmp_path / "work"
    shutil.copytree(prepared, copied)
    monkeypatch.chdir(copied)
    leave_blank(monkeypatch)
    return copied


def run_command(words: list[str]) -> None:
    """A ``maskpro`` line, on tiny inputs."""
    _, *argv = words
    if argv[0] == "--version":
        assert main.main(argv) == 0
        return
    for at, word in enumerate(argv):
        if word in TINY:
            argv[at + 1] = TINY_DATASETS.get(argv[at + 1], TINY[word])
        elif word == "--output" and Path(argv[at + 1]).is_dir():
            shutil.rmtree(argv[at + 1])
        elif word == "--resume":
            shutil.rmtree(argv[at + 1], ignore_errors=True)
            shutil.copytree("interrupted", argv[at + 1])
    argv = ["model" if word == "smollm2-135m" else word for word in argv]
    small = [] if "--resume" in argv else SMALL.get(argv[0], "").split()
    if argv[0] == "learn" and small and "--data" not in argv:
        # the default has the whole standard library
        small += ["--data", "text.txt:0.5,self:0.5"]
    assert main.main([*argv, *small]) == 0, f"{shlex.join(words)}, run as {shlex.join(argv + small)}"


def run_block(block: Block, names: dict, document: Path) -> None:
    if block.language == "python":
        code = block.code
        for large, tiny in TINY_IN_PYTHON.items():
            code = code.replace(large, tiny)
        exec(compile(code, document.name, "exec"), names)
    elif block.language == "sh":
        for words in lines_of(block.code):
            if words[0] == "maskpro":
                run_command(words)
            else:
                check_line(words, document)


WITH_BLOCKS = [document for document in DOCUMENTS if any(b.language in ("python", "sh") for b in blocks_of(document))]
# Those with the most runs; the options of their commands are checked by every suite
LONG = ("commands", "data", "ecosystem", "measurements", "migration", "serving", "training")


@pytest.mark.parametrize(
    "document",
    cases(((document,) for document in WITH_BLOCKS), slow=lambda document: document.stem in LONG),
    ids=lambda document: document.stem,
)
def test_blocks_run(document, folder, datasets_cache, capsys):
    """And where one prints the loss of an initial and of a learned mask, the learned one is better."""
    names = {"__name__": "__main__"}
    for block in blocks_of(document):
        if block.not_run is None:
            run_block(block, names, document)
            printed = dict(re.findall(r"^(initial mask|learned mask): (.*)$", capsys.readouterr().out, re.MULTILINE))
            if printed:
                assert float(printed["learned mask"]) < 0.95 * float(printed["initial mask"]), block.code


# What is checked


def check_line(words: list[str], document: Path) -> None:
    """That what a shell line names exists; ValueError where there is no check for its program."""
    program, *arguments = words
    reported = f"{document.name}: {shlex.join(words)}"
    if program == "maskpro":
        check_options(arguments, reported)
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = {word for line in re.findall(r"^([\w -]+):", makefile, re.MULTILINE) for word in line.split()}
        variables = set(re.findall(r"^(\w+) \?=", makefile, re.MULTILINE))
        given = {word.partition("=")[0] for word in arguments if "=" in word}
        assert given <= variables and {word for word in arguments if "=" not in word} <= targets, reported
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        named = [name for word in arguments for part in re.findall(r"\[(.*)\]", word) for name in part.split(",")]
        assert set(named) <= project["optional-dependencies"].keys(), reported
    elif program in ("python", "pytest"):
        check_tests(arguments, reported)
    elif program == "torchrun":
        check_options(arguments[arguments.index("-m") + 2 :] if "-m" in arguments else [], reported)
    elif program not in ("git", "vllm"):  # vLLM has tests and an environment of its own
        raise ValueError(f"{reported}: no check for this program; mark the block as not run")


def check_options(arguments: list[str], reported: str) -> None:
    """That a command of ``maskpro`` has these options."""
    commands = subparsers()
    if not arguments or arguments[0] in ("--version", "--help", "COMMAND"):
        return
    assert arguments[0] in commands, reported
    known = set(commands[arguments[0]]._option_string_actions)
    assert {word for word in arguments if word.startswith("--")} <= known, reported


def check_tests(arguments: list[str], reported: str) -> None:
    """That files exist, and that each word of ``-k`` is in the name of a test in them."""
    if "-m" in arguments[:1]:
        return
    paths = [ROOT / word for word in arguments if word.endswith(".py") or word in ("benchmarks", "tests")]
    assert all(path.exists() for path in paths), reported
    if "-k" in arguments:
        files = [file for path in paths for file in (path.rglob("test_*.py") if path.is_dir() else [path])]
        tests = {
            node.name for file in files for node in ast.parse(text_of(file)).body if isinstance(node, ast.FunctionDef)
        }
        words = set(arguments[arguments.index("-k") + 1].split()) - {"and", "or", "not"}
        assert all(any(word in test for test in tests if test.startswith("test_")) for word in words), reported


@pytest.mark.parametrize("document", WITH_BLOCKS, ids=lambda document: document.stem)
def test_blocks_name_what_there_is(document):
    """Python that compiles; commands, options, files and tests that exist."""
    for block in blocks_of(document):
        if block.language == "python":
            compile(block.code, document.name, "exec")
        elif block.language == "sh" and block.not_run is None:
            for words in lines_of(block.code):
                check_line(words, document)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.stem)
def test_fences_and_marks(document):
    assert text_of(document).count("\n```") % 2 == 0
    assert not re.search(r"\n\n    \S", prose_of(document)), "an indented block: fence it, so that it is seen here"
    for block in blocks_of(document):
        assert block.language in LANGUAGES, block
        if block.language == "text":
            assert not any(line.startswith(PROGRAMS) for line in block.code.splitlines()), block.code
        if block.language == "json":
            json.loads(block.code)
        if block.language == "toml":
            tomllib.loads(block.code)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.stem)
def test_commands_in_the_prose_exist(document):
    for code in inline_of(document):
        if code.split()[0] in PROGRAMS and len(code.split()) > 1:
            check_line(shlex.split(code), document)
        elif code.startswith("--") and document.name not in FOREIGN:
            options = {option for parser in subparsers().values() for option in parser._option_string_actions}
            assert code.split()[0] in options, f"{document.name}: {code}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.stem)
def test_files_and_modules_in_the_prose_exist(document):
    for code in inline_of(document):
        if re.fullmatch(r"(maskpro_kernels|tests|benchmarks|docs)/[\w./]*", code):
            assert (ROOT / code).exists(), f"{document.name}: {code}"
        elif re.fullmatch(r"maskpro_kernels(\.\w+)+", code):
            assert is_there(code), f"{document.name}: {code}"


def is_there(dotted: str) -> bool:
    """Return whether a module, or an attribute of a module, has that name."""
    try:
        importlib.import_module(dotted)
    except ModuleNotFoundError:
        module, _, name = dotted.rpartition(".")
        return hasattr(importlib.import_module(module), name)
    return True


def anchors_of(document: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", prose_of(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.stem)
def test_links_resolve(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(document)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = (document.parent / path).resolve() if path else document
        assert there.exists() and there.is_relative_to(ROOT), f"{document.name}: {target}"
        if anchor:
            assert anchor in anchors_of(there), f"{document.name}: {target}"


def test_the_tree_has_every_entry_of_the_package():
    """In the table of CONTRIBUTING.md; its rows for folders inside others exist too."""
    rows = re.findall(r"^\| `(maskpro_kernels/[\w./]+)` \|", text_of(ROOT / "CONTRIBUTING.md"), re.MULTILINE)
    package = ROOT / "maskpro_kernels"
    entries = {path.relative_to(package).parts[0] for path in package.rglob("*.py")} - {"__init__.py", "__main__.py"}
    assert {row.rstrip("/").split("/")[1] for row in rows} == entries
    assert all((ROOT / row).exists() for row in rows)


def test_every_document_is_linked_from_the_index():
    for page in (ROOT / "docs" / "index.md",):
        linked = {
            (page.parent / target.partition("#")[0]).resolve() for target in re.findall(r"\]\(([^)]+)\)", text_of(page))
        }
        missing = set((ROOT / "docs").glob("*.md")) - linked - {ROOT / "docs" / "index.md"}
        assert not missing, f"{page.name}: {missing}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.stem)
def test_no_figure_is_missing(document):
    assert re.findall(r"@@\w+@@", text_of(document)) == []


def test_readme_is_short():
    assert len(text_of(README).splitlines()) <= 130


def test_the_picture_is_what_its_script_draws():
    spec = importlib.util.spec_from_file_location("figure", ROOT / "docs" / "figure.py")
    figure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figure)
    assert figure.picture() == text_of(figure.PICTURE)


# References


class Shown:
    """A default as the reference shows it."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


def signature_of(what) -> str:
    """Names and defaults of the arguments, without annotations."""
    parameters = []
    for parameter in inspect.signature(what).parameters.values():
        if inspect.isfunction(parameter.default):
            parameter = parameter.replace(default=Shown(parameter.default.__name__))
        parameters.append(parameter.replace(annotation=inspect.Parameter.empty))
    return str(inspect.Signature(parameters))


def entries_of_the_api() -> dict[str, str]:
    """The signature, or the fields, that each name is listed with; those of methods as ``Class.method``."""
    entries = re.findall(r"^ *- `([\w.]+)(\(.*?\))?`(?: with ([^:]*))?:", text_of(API), re.MULTILINE | re.DOTALL)
    return {name: " ".join((signature or fields).split()) for name, signature, fields in entries}


def test_api_lists_exactly_the_public_names():
    assert sorted(name for name in entries_of_the_api() if "." not in name) == sorted(maskpro_kernels.__all__)


@pytest.mark.parametrize("name", maskpro_kernels.__all__)
def test_api_shows_the_signatures(name):
    entries, what = entries_of_the_api(), getattr(maskpro_kernels, name)
    if entries[name].startswith("("):
        assert entries[name] == signature_of(what)
    else:
        assert entries[name] == ", ".join(f"`{field.name}`" for field in dataclasses.fields(what))
    for method, arguments in entries.items():
        if method.startswith(f"{name}."):
            attribute = inspect.getattr_static(what, method.removeprefix(f"{name}."))
            unbound = attribute.__func__ if isinstance(attribute, classmethod) else attribute
            assert signature_of(unbound.__get__(what)) == arguments, method


def test_modules_outside_of_the_namespace_hold_what_api_says():
    rows = re.findall(r"^\| `(maskpro_kernels\.[\w.]+)` \| (.*) \|$", text_of(API), re.MULTILINE)
    assert rows
    for module, names in rows:
        for name in re.findall(r"`(\w+)`", names):
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def sections_of_the_commands() -> dict[str, dict[str, str]]:
    """Defaults by option, for each command."""
    parts = re.split(r"^## (.*)$", text_of(COMMANDS), flags=re.MULTILINE)
    return {
        title: dict(re.findall(r"^\| `((?:--|[A-Z])[^`]*)` \| (.*?) \|", body, re.MULTILINE))
        for title, body in zip(parts[1::2], parts[2::2], strict=True)
    }


@pytest.mark.parametrize("command", subparsers())
def test_commands_lists_the_options_with_their_defaults(command):
    shown = sections_of_the_commands()[command]
    actions = [action for action in subparsers()[command]._actions if action.dest != "help"]
    # positional arguments first; of the two spellings of an option the first, with hyphens
    actions.sort(key=lambda action: bool(action.option_strings))
    names = {(action.option_strings or [action.metavar])[0]: action for action in actions}
    assert list(shown) == list(names)
    for name, action in names.items():
        if action.default not in (None, SUPPRESS) and name != "--device":
            assert shown[name] == f"`{action.default}`", name
        elif "(default:" in (action.help or ""):
            assert shown[name], name
