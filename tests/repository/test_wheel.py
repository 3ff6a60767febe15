"""The wheel that `python -m build` makes works when it is installed alone, and holds the package and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from helpers.children import ROOT

import maskpro_kernels

SOURCES = ("maskpro_kernels", "tests", "benchmarks", "pyproject.toml", "setup.py", "README.md", "LICENSE")
LEARN = """
from importlib import resources

import torch
from torch import nn

import maskpro_kernels as mk

print(mk.__file__)
assert resources.files("maskpro_kernels").joinpath("py.typed").is_file()
for estimator in (mk.Reinforce(lr=1.0), mk.StraightThrough(lr=0.1)):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.randn(64, 16)
    y = model(x).detach()
    mk.convert(model, "2:4")
    loss = lambda model, batch: nn.functional.mse_loss(model(batch), y)
    trainer = mk.MaskTrainer(model, loss, [x], estimator, seed=0)
    assert len(trainer.run(5, progress=False)) == 5
    trainer.close()
    mk.finalize(model)
    assert (model[0].weight.view(-1, 4) == 0).sum(1).min() == 2
print("learned")
"""


def run(*command, **how):
    """Output of a command without access to this tree."""
    hidden = ("PYTHONPATH", "TRITON_INTERPRET")
    outside = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=outside, **how)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Wheel, by way of the source distribution, of a copy of the tree; without isolation: offline."""
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, tree / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tree / "dist", tree, cwd=tree.parent)
    (built,) = (tree / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """Of a fresh virtual environment that holds the wheel alone; its dependencies come from that of the tests."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # python searches the folders that are named here, but finds nothing that is installed in them as editable
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "others.pth").write_text("".join(f"{path}\n" for path in others), encoding="utf-8")
    options = ["--quiet", "--no-index", "--no-deps", "--ignore-installed"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel)
    return python


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        (described,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(file.read(described).decode("utf-8"))
    assert "maskpro_kernels/py.typed" in names
    inside = {name.split("/")[0] for name in names}
    assert inside == {"maskpro_kernels", described.split("/")[0]}
    kept = {str(path.relative_to(ROOT)) for path in (ROOT / "maskpro_kernels").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == kept
    assert metadata["Name"] == "maskpro-kernels" and metadata["Version"] == maskpro_kernels.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert (ROOT / "README.md").read_text(encoding="utf-8").strip() == metadata.get_payload().strip()


def test_the_version_that_is_cited():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0" and cited["version"] == maskpro_kernels.__version__
    assert {"message", "title", "authors", "license"} <= cited.keys()


@pytest.mark.slow
def test_the_wheel_learns_five_steps(python, tmp_path):
    where, learned = run(python, "-c", LEARN, cwd=tmp_path).splitlines()
    assert Path(where).is_relative_to(python.parents[1]) and learned == "learned"


def test_the_wheel_brings_the_command(python, tmp_path):
    for command in ([python.with_name("maskpro")], [python, "-m", "maskpro_kernels"]):
        lines = run(*command, "--version", cwd=tmp_path).splitlines()
        assert f"maskpro-kernels {maskpro_kernels.__version__}" in lines
