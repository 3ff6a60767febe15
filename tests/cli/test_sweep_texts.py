"""`maskpro sweep` where a text changes between its runs, and where no run learns anything."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers.command import report
from helpers.sweeps import results, seeds_of, sweep, write_sweep

from maskpro_kernels.checkpoints.mask_file import save_masks
from maskpro_kernels.hf import load_model
from maskpro_kernels.prune.initial_masks import initial_codes
from maskpro_kernels.prune.selection import layers_to_convert

pytestmark = pytest.mark.usefixtures("eager_reference")


def changed(text, parts):
    """The text with other words in the paragraphs of some parts, by their places modulo 5."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(each[::-1].replace(" ", " w") if i % 5 in parts else each for i, each in enumerate(paragraphs))


@pytest.fixture
def began(inputs, tmp_path, capsys):
    """(FILE, folder, text) of a sweep whose first run has learned from a text, before others are added."""
    text = tmp_path / "text.txt"
    shutil.copy(inputs / "text.txt", text)
    options = {"data": str(text), "steps": 1}
    file = write_sweep(tmp_path, inputs, base=options, grid={"seed": [0]})
    assert sweep(file, tmp_path / "all") == 0
    assert "changed" not in "".join(capsys.readouterr())
    write_sweep(tmp_path, inputs, base=options, grid={"seed": [0, 1]})
    return file, tmp_path / "all", text


def test_runs_that_learned_from_other_text_are_rows_of_their_own(began, capsys):
    file, folder, text = began
    name = results(folder)["runs"][0]["name"]
    text.write_text(changed(text.read_text(), (2, 3, 4)))
    assert sweep(file, folder, "--dry-run") == 0
    told = f"{str(text)!r} has changed since 1 of the finished runs learned from it, such as {name}"
    assert told in capsys.readouterr().err
    assert sweep(file, folder) == 0
    captured, found = capsys.readouterr(), results(folder)
    assert told in captured.err
    assert seeds_of(found) == [[[0], [1]]]
    digests = [report(folder / run["name"])["learned_texts"][0][:8] for run in found["runs"]]
    assert [row["label"] for row in found["tables"][0]["rows"]] == [f"base (text {digest})" for digest in digests]
    assert digests[0] != digests[1]
    for told in (captured.out, (folder / "report.html").read_text()):
        assert "The text that is learned from has changed between these runs" in told and digests[0] in told


def test_a_text_that_is_put_back_counts_as_the_same(began, capsys):
    file, folder, text = began
    before = text.read_text()
    text.write_text(changed(before, (2, 3, 4)))
    text.write_text(before)
    assert sweep(file, folder) == 0
    assert "changed" not in "".join(capsys.readouterr())
    assert seeds_of(results(folder)) == [[[0, 1]]]


@pytest.mark.parametrize(("part", "which"), [(0, "test"), (1, "validation")])
def test_other_windows_of_the_same_text_are_told(began, capsys, part, which):
    file, folder, text = began
    text.write_text(changed(text.read_text(), (part,)))
    assert sweep(file, folder) == 0
    out, found = capsys.readouterr().out, results(folder)
    assert seeds_of(found) == [[[0]], [[1]]]
    for told in (out, (folder / "report.html").read_text()):
        assert told.count(f"The {which} text has changed between these runs and those of another table") == 2


def test_a_step_that_moves_no_mask_compares_initial_masks(inputs, tmp_path, capsys):
    """By the defaults of straight-through; of a mask in a file as well."""
    mask = tmp_path / "random.mask"
    model = load_model(str(inputs / "model"), torch.float32)[0]
    layers = {name: model.get_submodule(name) for name in layers_to_convert(model, "2:4")[0]}
    triples = [
        (name, codes, layers[name].weight.detach()) for name, codes in initial_codes(layers, "2:4", "random").items()
    ]
    save_masks(mask, triples, "2:4", model="model").close()
    options = {"estimator": "straight-through", "steps": 1}
    grid = {"init": ["magnitude", "wanda", "sparsegpt", str(mask)]}
    assert sweep(write_sweep(tmp_path, inputs, base=options, grid=grid), tmp_path / "all") == 0
    captured, rows = capsys.readouterr(), results(tmp_path / "all")["tables"][0]["rows"]
    assert captured.err.count("no mask will change") == 4
    assert [row["moved"]["mean"] for row in rows] == [0.0] * 4
    assert [row["test"] for row in rows] == [row["initial_test"] for row in rows]
    assert len({row["test"]["mean"] for row in rows}) == 4
