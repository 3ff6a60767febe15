"""Optional packages: the extras that bring them, and what is said where one is missing."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest
from helpers.children import ROOT, environment
from helpers.source_tree import imports, modules_of

from maskpro_kernels.cli import main
from maskpro_kernels.extras import EXTRAS, missing, require

PACKAGE = ROOT / "maskpro_kernels"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Packages by the names under which they are imported
IMPORTED = {"torch", "triton", "numpy", "safetensors", "tqdm", "filelock", "llvmlite"}
# What transformers brings, what makes the hooks that it is imported for, and what imports this package itself
WITH_OTHERS = {"huggingface_hub", "accelerate", "yaml", "vllm"}


def named(requirements):
    return [re.match(r"[\w-]+", requirement)[0] for requirement in requirements]


def brought(extra):
    """The packages of an extra of pyproject.toml, those of the extras in it too."""
    found = []
    for requirement in PROJECT["optional-dependencies"][extra]:
        inner = re.fullmatch(r"maskpro-kernels\[(.*)\]", requirement)
        found += [name for other in inner[1].split(",") for name in brought(other)] if inner else named([requirement])
    return found


@pytest.mark.parametrize("extra", EXTRAS)
def test_extras_are_those_of_the_project(extra):
    assert brought(extra) == list(EXTRAS[extra])


def test_every_package_that_is_imported_is_a_dependency_or_optional():
    modules = modules_of(PACKAGE)
    libraries = {name.split(".")[0] for module in modules for name in imports(module, modules)}
    optional = {package for packages in EXTRAS.values() for package in packages}
    assert set(named(PROJECT["dependencies"])) == IMPORTED
    own = {"maskpro_kernels", *sys.stdlib_module_names, "pydoc_data"}
    assert libraries - own - optional - IMPORTED - WITH_OTHERS == set()


@pytest.mark.parametrize(
    ("packages", "extra"),
    [
        (["transformers"], "hf"),
        (["matplotlib"], "cli"),
        (["transformers", "matplotlib"], "cli"),
        (["accelerate"], "hf"),
        (["datasets"], "data"),
    ],
    ids=str,
)
def test_the_smallest_extra_that_brings_all_is_reported(packages, extra, monkeypatch):
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)
    reported = f"the package {packages[0]}, which is not installed; the extra {extra!r} brings it"
    if len(packages) > 1:
        reported = f"the packages {' and '.join(packages)}, which are not installed; the extra {extra!r} brings them"
    reported += ", see Install in README.md"
    assert missing(*packages) == reported
    with pytest.raises(ModuleNotFoundError) as raised:
        require("this", *packages)
    assert str(raised.value) == f"this needs {reported}"


def test_nothing_is_reported_what_is_installed():
    assert missing("transformers", "matplotlib") is None
    require("this", "transformers")


@pytest.mark.parametrize(
    ("arguments", "packages", "extra"),
    [
        (["learn", "--model", "m", "--data", "d", "--output", "o"], ["transformers", "matplotlib"], "cli"),
        (["learn", "--resume", "run"], ["matplotlib"], "cli"),
        (["eval", "m", "--data", "d"], ["transformers"], "hf"),
        (["export", "run", "out"], ["transformers"], "hf"),
        (["import", "masks.npz", "--output", "out"], ["transformers"], "hf"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_a_command_reports_what_it_lacks_before_anything_else(arguments, packages, extra, monkeypatch, capsys):
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)
    assert main.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"maskpro: error: {arguments[0]}: expected the package")
    assert all(package in line for package in packages)
    assert line.endswith(
        f"the extra {extra!r} brings {'it' if len(packages) == 1 else 'them'}, see Install in README.md"
    )


def test_models_of_hugging_face_report_which_extra_they_lack():
    """And all else is there without transformers."""
    code = "\n".join(
        (
            "import sys",
            "sys.modules['transformers'] = None",
            "import maskpro_kernels, maskpro_kernels.cli.main",
            "try:",
            "    import maskpro_kernels.hf",
            "except ModuleNotFoundError as error:",
            "    print(error)",
        )
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout.strip() == (
        "maskpro_kernels.hf needs the package transformers, which is not installed; the extra 'hf' brings it, see "
        "Install in README.md"
    )


def test_no_page_advises_to_install_this_package_by_name():
    """It is on no registry: whoever takes the name there would be installed."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "hub").iterdir(), *PACKAGE.rglob("*.py")]
    for page in pages:
        assert not re.search(r"pip install[^\n]*maskpro|maskpro-kernels\[", page.read_text(encoding="utf-8")), page
