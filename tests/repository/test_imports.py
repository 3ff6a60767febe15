"""Modules that an import loads; imports go downward, without a circle."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.source_tree import check_no_circle, imported_names, imports, modules_of, names_in

import maskpro_kernels

NAME = maskpro_kernels.__name__
MODULES = modules_of(Path(maskpro_kernels.__file__).parent)


@functools.cache
def imported() -> dict[str, set[str]]:
    """The modules that each module imports from.

    The package itself passes names on, and python runs it before all others: no module imports from it.
    """
    return {module: imports(module, MODULES) & MODULES.keys() for module in MODULES if module != NAME}


def entries_of(package: str) -> dict[str, set[str]]:
    """The entries that each entry of a package imports from; an entry is a folder or a module at its top."""
    entry_of = {
        module: module.removeprefix(f"{package}.").split(".")[0]
        for module in imported()
        if module.startswith(f"{package}.")
    }
    below = {entry: set() for entry in entry_of.values()}
    for module, entry in entry_of.items():
        below[entry] |= {entry_of[other] for other in imported()[module] if other in entry_of} - {entry}
    return below


def test_a_circle_is_named():
    check_no_circle({"high": {"middle", "low"}, "middle": {"low"}, "low": set()})
    with pytest.raises(ValueError, match="^a circle of imports: .*high"):
        check_no_circle({"high": {"low"}, "low": {"high"}})


def test_modules_import_in_no_circle():
    check_no_circle({module: below - {module} for module, below in imported().items()})


@pytest.mark.parametrize("package", [NAME, f"{NAME}.ops"])
def test_entries_import_downward(package):
    """Imports inside functions count too."""
    check_no_circle(entries_of(package))


def test_no_module_imports_from_the_package_itself():
    assert [module for module, below in imported().items() if NAME in below] == []


@pytest.mark.parametrize(
    ("library", "place"), [("triton", "ops.triton"), ("transformers", "hf"), ("peft", "peft"), ("vllm", "vllm")]
)
def test_library_is_imported_in_one_place(library, place):
    users = [module for module in MODULES if library in {name.split(".")[0] for name in imports(module, MODULES)}]
    assert users
    if library == "transformers":
        # its parser reads the options of the command
        users.remove(f"{NAME}.cli.config")
    strangers = [module for module in users if f"{module}.".removeprefix(f"{NAME}.{place}.") == f"{module}."]
    assert strangers == []


def test_collectives_are_called_in_one_place():
    users = {module: names_in(path) for module, path in MODULES.items() if "torch.distributed" in names_in(path)}
    of_ranks = users.pop(f"{NAME}.ranks")
    assert of_ranks and users.keys() == {f"{NAME}.fsdp"}
    used = {name for name in users[f"{NAME}.fsdp"] if name.startswith("torch.distributed.")}
    assert used == {"torch.distributed.get_world_size"}


def test_few_modules_know_fsdp2():
    users = [module for module, below in imported().items() if f"{NAME}.fsdp" in below]
    assert len(users) <= 5, users


def test_files_of_ranks_are_written_in_one_place_without_collectives():
    """Of torch's distributed checkpoints planners, reader and writer alone: ``save`` and ``load`` call collectives."""
    place, dcp = f"{NAME}.shards", "torch.distributed.checkpoint"
    used = {module: {name for name in names_in(path) if name.startswith(dcp)} for module, path in MODULES.items()}
    assert [module for module, names in used.items() if names] == [place]
    names = {name.removeprefix(f"{dcp}.") for name in used[place] - {dcp}}
    assert names == {
        *("DefaultLoadPlanner", "DefaultSavePlanner", "HuggingFaceStorageReader", "HuggingFaceStorageWriter"),
        *("filesystem", "filesystem.FileSystem"),
    }


def test_import_of_the_package_is_light():
    heavy = ["triton", "transformers", "matplotlib", "datasets", "tensorboard"]
    # which imports the package first
    code = f"import sys, {NAME}.cli.main; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", maskpro_kernels.__all__)
def test_public_name_exists(name):
    assert hasattr(maskpro_kernels, name)
    assert getattr(maskpro_kernels, name).__doc__


def test_all_lists_what_the_package_imports():
    passed_on = sorted(name for module, name in imported_names(NAME, MODULES) if module in MODULES)
    assert sorted(maskpro_kernels.__all__) == passed_on
