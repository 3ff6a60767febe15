"""A run that was killed before its first step: the same command goes on, whatever it had written by then."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import torch
from helpers.command import learn, refuses
from helpers.routes import route_to_the_eager_reference
from safetensors.torch import load_file

from maskpro_kernels.cli import learn as learn_command
from maskpro_kernels.cli import main
from maskpro_kernels.cli.run_files import SETTINGS
from maskpro_kernels.cli.unbegun import clear_unbegun
from maskpro_kernels.files import check_output

pytestmark = pytest.mark.usefixtures("eager_reference")

# All that is written ahead of the first step: samples, what the dense model has said, and refitted weights
ALL = "--estimator straight-through --lr 1 --init wanda --refit weights --loss kl --train-weights 1e-3".split()
# Files of a user, under names like those of files that are being written
OWN = ("notes.txt", "thesis.tmp", ".tmpdata", ".tmpthesis", f"thesis.{'0a1b' * 4}.tmp")
CHANGES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "tempfile.mkstemp", "tempfile.mkdtemp")


def watch(output: Path, into: Path) -> None:
    """From now on keep a copy of a folder as it is ahead of each change, until a run has begun in it."""
    copying, seen = False, set()

    def hook(event: str, arguments: tuple) -> None:
        nonlocal copying
        if copying or event not in CHANGES or not str(arguments[0]).startswith(str(output)):
            return
        copying = True
        if output.is_dir() and not (output / SETTINGS).exists():
            held = frozenset((path.relative_to(output), path.stat().st_size) for path in output.rglob("*"))
            if held not in seen:
                seen.add(held)
                shutil.copytree(output, into / str(len(seen)))
        copying = False

    sys.addaudithook(hook)


@pytest.fixture(scope="module")
def command(inputs):
    text = inputs / "text.txt"

    def of(output: Path) -> list[str]:
        return learn(inputs, output, *ALL, "--data", f"{text}:0.5,self:0.5")

    return of


@pytest.fixture(scope="module")
def starts(command, tmp_path_factory):
    """(a whole run, copies of its folder as a process would have left it that was killed at that moment)."""
    folder = tmp_path_factory.mktemp("starts")
    output, copies = folder / "run", folder / "copies"
    output.mkdir()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            # both for as long as the process lives; products of another route have other bits
            route_to_the_eager_reference(pytest.MonkeyPatch())
            watch(output, copies)
            code = main.main(command(output))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    return output, sorted(copies.iterdir(), key=lambda path: int(path.name))


def halves(folder: Path) -> None:
    """What is left of files that were being written: under our temporary names, and under those of safetensors."""
    progress = folder / "progress"
    part = f".{'0a1b' * 4}.tmp"
    for path in (progress / f"samples.safetensors{part}", progress / ".tmpXb3Yz9", folder / f"settings.json{part}"):
        path.write_bytes(b"half of it")


def test_whatever_a_killed_start_has_left_is_gone_on_with(starts, tmp_path):
    _, copies = starts
    # samples, a lock, the dense model's words, a snapshot, refitted weights, a validation perplexity
    assert len(copies) > 15
    for copy in copies:
        learn_command._check_output(copy)
        if (copy / "progress").is_dir():
            halves(copy)
            learn_command._check_output(copy)
        for own in OWN:
            (copy / own).write_text("mine")
            with pytest.raises(ValueError, match="which is not empty"):
                learn_command._check_output(copy)
            (copy / own).unlink()
    cleared = shutil.copytree(copies[-1], tmp_path / "run")
    halves(cleared)
    for own in OWN:
        (cleared / own).write_text("mine")
    clear_unbegun(cleared)
    assert {path.name for path in cleared.iterdir()} == {"progress", *OWN}


@pytest.mark.parametrize("which", [-1, *(pytest.param(i, marks=pytest.mark.slow) for i in (2, 5, 8, 11, 14))])
def test_the_same_command_gives_the_same_run(starts, command, which, tmp_path, capsys):
    whole, copies = starts
    run = shutil.copytree(copies[which], tmp_path / "run")
    halves(run)
    refuses(capsys, tmp_path, ["learn", "--resume", str(run)], "without settings.json", "`maskpro learn --output`")
    assert main.main(command(run)) == 0
    learned, again = (load_file(folder / "logits.safetensors") for folder in (whole, run))
    assert learned.keys() == again.keys() and all(torch.equal(learned[name], again[name]) for name in learned)
    assert not [path for path in run.rglob("*") if "tmp" in path.name]


def test_a_look_at_a_folder_leaves_nothing_in_it_even_if_it_is_killed(tmp_path, monkeypatch):
    """A probe that has a name would stay behind, and the folder would no longer be empty."""
    held = []
    real = tempfile.TemporaryFile

    def probe(**where):
        file = real(**where)
        held.extend(tmp_path.iterdir())
        return file

    monkeypatch.setattr(tempfile, "TemporaryFile", probe)
    monkeypatch.setattr(tempfile, "mkdtemp", None)
    monkeypatch.setattr(tempfile, "mkstemp", None)
    check_output(tmp_path / "new")
    check_output(tmp_path)
    assert held == []
