"""No file is read as a pickle, or as YAML that makes objects: whoever writes one would have his code run."""

from __future__ import annotations

import ast
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_llama import write_inputs
from torch import nn

import maskpro_kernels
from maskpro_kernels import hf
from maskpro_kernels.checkpoints.importers import read_masks

PACKAGE = Path(maskpro_kernels.__file__).parent
# Each makes objects of what it reads
READERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pandas"}
# What has to be said beside a reader, and the value that keeps it from making objects
SAFE = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False), "numpy.load": ("allow_pickle", False)}
YAML = ("load", "load_all", "unsafe_load", "full_load", "unsafe_load_all", "full_load_all")
OPTIONS = "cli/config.py"


def unsafe(tree: ast.AST) -> list[str]:
    """Calls in a module that read files and may run code of their writer."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [name for name in names if name.split(".")[0] in READERS]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            name, value = SAFE.get(called, (None, None))
            given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
            if (name and given.get(name) is not value) or called in {f"yaml.{reader}" for reader in YAML}:
                found.append(called)
    return found


def test_no_module_reads_pickles():
    files = {str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    found = {name: unsafe(ast.parse(text)) for name, text in files.items()}
    assert {name: what for name, what in found.items() if what} == {OPTIONS: ["yaml.load"]}
    # the loader that makes strings of all values
    assert "yaml.load(content, yaml.BaseLoader)" in files[OPTIONS]


class Planted:
    """Whoever loads its pickle makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def as_torch_saves(folder: Path, planted: Planted) -> None:
    torch.save({"x.mask": planted}, folder / "masks.pt")


def as_torch_saved_before(folder: Path, planted: Planted) -> None:
    torch.save({"x.mask": planted}, folder / "masks.pt", _use_new_zipfile_serialization=False)


def as_pickle_saves(folder: Path, planted: Planted) -> None:
    (folder / "masks.pt").write_bytes(pickle.dumps(planted))


def as_numpy_saves(folder: Path, planted: Planted) -> None:
    np.savez(folder / "masks.npz", x=np.array([planted], dtype=object))


def in_an_archive(folder: Path, planted: Planted) -> None:
    with zipfile.ZipFile(folder / "masks.npz", "w") as file:
        file.writestr("x.npy", pickle.dumps(planted))


@pytest.mark.parametrize(
    "write", [as_torch_saves, as_torch_saved_before, as_pickle_saves, as_numpy_saves, in_an_archive]
)
def test_planted_masks_run_no_code(write, tmp_path):
    mark = tmp_path / "mark"
    write(tmp_path, Planted(mark))
    with pytest.raises(ValueError, match="^masks: expected"):
        read_masks(next(tmp_path.glob("masks.*")), {"x": nn.Linear(8, 4)}, "2:4")
    assert not mark.exists()
    # the plant is valid
    pickle.loads(pickle.dumps(Planted(mark)))
    assert mark.exists()


def test_planted_weights_run_no_code(tmp_path):
    folder, mark = write_inputs(tmp_path) / "model", tmp_path / "mark"
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Planted(mark)}, folder / "pytorch_model.bin")
    with pytest.raises((ValueError, OSError), match="^model: expected a "):
        hf.load_model(str(folder), torch.float32)
    shutil.copy(folder / "pytorch_model.bin", folder / "model.safetensors")
    with pytest.raises((ValueError, OSError), match="^model: expected a "):
        hf.load_model(str(folder), torch.float32)
    assert not mark.exists()
