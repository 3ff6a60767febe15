"""The folder for the hub of kernels loads without the package, together with other versions of itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.children import ROOT

import maskpro_kernels as mk

LOAD = """
import importlib.util, json, sys

import torch

class Missing:
    '''Nothing but torch and Triton is installed.'''

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in LACKING:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())

def load(folder):
    name = json.loads(open(f"{folder}/metadata.json").read())["id"]
    spec = importlib.util.spec_from_file_location(name, f"{folder}/__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

loaded = [load(folder) for folder in FOLDERS]
generator = torch.Generator().manual_seed(0)
logits, weight, x = (torch.randn(*shape, generator=generator) for shape in ((24, 64), (24, 64), (3, 64)))
for module in loaded:
    drawn = module.sample_mask(logits, "2:4", seed=1, step=2, layer=3)
    layer = module.MaskedLinear(weight, None, logits.clone(), "2:4")
    with torch.no_grad():
        module.score_update_(layer.logits, 0.5, pattern="2:4", **layer.counter().keywords())
    packed = module.NMLinear(module.pack_nm(weight * module.expand_mask(drawn, "2:4"), "2:4"), None)
    y = layer(x).sum(), packed(x).detach().sum()
    print(json.dumps([drawn.tolist(), layer.logits.detach().view(torch.int32).tolist(), [float(part) for part in y]]))
names = {type(layer).__module__ for layer in (module.MaskedLinear(weight, None, logits, "2:4") for module in loaded)}
assert len(names) == len(loaded), names
"""
THIRD_PARTY = ("llvmlite", "safetensors", "tqdm", "filelock", "transformers", "numba", "maskpro_kernels")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "repository"
    command = [sys.executable, ROOT / "hub" / "build.py", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(folder / "build" / f"torch-{name}") for name in ("cpu", "cuda", "rocm")]
    return folder


@pytest.fixture(scope="module")
def another(repository, tmp_path_factory):
    """A version whose kernels are others, by a comment."""
    root = tmp_path_factory.mktemp("another")
    for name in ("hub", "maskpro_kernels"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "LICENSE", root / "LICENSE")
    with open(root / "maskpro_kernels" / "ops" / "pattern.py", "a", encoding="utf-8") as file:
        file.write("# another version\n")
    command = [sys.executable, root / "hub" / "build.py", root / "repository"]
    subprocess.run(command, check=True, capture_output=True)
    return root / "repository"


def loaded(folders, lacking=()):
    """Results of each version, in a process without the packages ``lacking``."""
    head = f"LACKING = {lacking!r}\nFOLDERS = {[str(folder) for folder in folders]!r}\n"
    done = subprocess.run([sys.executable, "-I", "-c", head + LOAD], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def metadata(repository, backend="cpu"):
    return json.loads((repository / "build" / f"torch-{backend}" / "metadata.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "lacking",
    [
        pytest.param((), marks=pytest.mark.slow, id="all installed"),
        pytest.param(THIRD_PARTY, id="torch and Triton alone"),
    ],
)
def test_two_versions_in_one_process(repository, another, lacking):
    first, second = loaded([folder / "build" / "torch-cpu" for folder in (repository, another)], lacking)
    assert first == second
    logits = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    drawn = mk.sample_mask(logits, "2:4", seed=1, step=2, layer=3)
    assert first[0] == drawn.tolist()


def test_a_version_is_named_by_its_files(repository, another):
    names = [metadata(folder, backend)["id"] for folder in (repository, another) for backend in ("cpu", "cuda")]
    assert len(set(names)) == 4
    assert metadata(repository, "rocm")["backend"] == {"type": "rocm"}
    assert f"version\n{mk.__version__} of which" in (repository / "README.md").read_text(encoding="utf-8")


def test_it_is_not_written_over(repository):
    command = [sys.executable, ROOT / "hub" / "build.py", repository]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "expected a folder that does not exist" in done.stderr


@pytest.mark.ecosystem
def test_the_library_of_the_hub_loads_it(repository, another):
    code = f"""
from pathlib import Path
import kernels, torch
first, second = (kernels.get_local_kernel(Path(folder)) for folder in {[str(repository), str(another)]!r})
draws = [module.sample_mask(torch.zeros(4, 8), "2:4", seed=1) for module in (first, second)]
assert first is not second and torch.equal(*draws)
print(*(found.metadata.id for found in kernels.get_loaded_kernels()))
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [metadata(folder)["id"] for folder in (repository, another)]
