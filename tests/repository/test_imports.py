"""Modules that an import loads; imports go downward, on few floors, without a circle."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from helpers.source_tree import floors, imported_names, imports, modules_of, names_in, reached_from

import maskpro_kernels

NAME = maskpro_kernels.__name__
MODULES = modules_of(Path(maskpro_kernels.__file__).parent)
MOST_FLOORS = 8
MOST_FILES_OF_LEARN = 80


@functools.cache
def imported() -> dict[str, set[str]]:
    """The modules that each module imports from.

    The package itself passes names on, and python runs it before all others: no module imports from it.
    """
    return {module: imports(module, MODULES) & MODULES.keys() for module in MODULES if module != NAME}


def rooms_of(house: str) -> dict[str, set[str]]:
    """The rooms that each room of a house imports from; a room is a folder or a file at its top."""
    of = {
        module: module.removeprefix(f"{house}.").split(".")[0]
        for module in imported()
        if module.startswith(f"{house}.")
    }
    rooms = {room: set() for room in of.values()}
    for module, room in of.items():
        rooms[room] |= {of[other] for other in imported()[module] if other in of} - {room}
    return rooms


def shown(storeys: Iterable[list[str]]) -> str:
    return "\n".join(f"floor {number}: {', '.join(names)}" for number, names in enumerate(storeys))


def test_floors_are_the_longest_chain():
    below = {"roof": {"attic"}, "attic": {"cellar"}, "hut": {"cellar"}, "cellar": set()}
    assert floors(below) == [["cellar"], ["attic", "hut"], ["roof"]]


def test_a_circle_is_named():
    with pytest.raises(ValueError, match="^a circle of imports: .*hall"):
        floors({"hall": {"stairs"}, "stairs": {"hall"}})


def test_modules_import_in_no_circle():
    floors({module: below - {module} for module, below in imported().items()})


@pytest.mark.parametrize("house", [NAME, f"{NAME}.ops"])
def test_rooms_are_on_few_floors_without_a_circle(house):
    """Imports inside functions count too."""
    storeys = floors(rooms_of(house))
    assert len(storeys) <= MOST_FLOORS, f"{len(storeys)} floors, at most {MOST_FLOORS} expected:\n{shown(storeys)}"


def test_the_command_learn_needs_few_files():
    """It, and what it imports, directly or not, imports inside functions among them."""
    needed = reached_from(f"{NAME}.cli.learn", MODULES)
    # a module brings the packages that it is in
    needed |= {name.rpartition(".")[0] for name in needed} & MODULES.keys()
    assert len(needed) <= MOST_FILES_OF_LEARN, sorted(needed)


def test_no_module_imports_from_the_package_itself():
    assert [module for module, below in imported().items() if NAME in below] == []


@pytest.mark.parametrize(("library", "place"), [("triton", "ops.triton"), ("transformers", "hf"), ("peft", "peft")])
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
    # what ranks share of a tensor is torch's own, and calls them itself
    used = {name for name in users[f"{NAME}.fsdp"] if name.startswith("torch.distributed.")}
    others = {
        name for name in used if not name.startswith(("torch.distributed.tensor", "torch.distributed.checkpoint"))
    }
    assert others == {"torch.distributed.get_world_size"}


def test_files_of_ranks_are_written_in_one_place_without_collectives():
    """Of torch's distributed checkpoints planners, reader and writer alone: ``save`` and ``load`` call collectives."""
    place, dcp = f"{NAME}.fsdp", "torch.distributed.checkpoint"
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
