"""`maskpro learn --init`: masks by name, and by paths that a run does not need once it has begun."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.command import broken_off, learn, refuses, report
from helpers.tiny_llama import tiny_model, tiny_tokenizer, write_inputs
from safetensors.torch import load_file

import maskpro_kernels as mk
from maskpro_kernels.checked_json import read_sealed
from maskpro_kernels.checkpoints.mask_file import MaskFile
from maskpro_kernels.cli import main
from maskpro_kernels.cli.run_files import INITIAL_MASK
from maskpro_kernels.hf import save_model
from maskpro_kernels.prune.initial_masks import initial_codes

pytestmark = pytest.mark.usefixtures("eager_reference")


@pytest.fixture(scope="module")
def mine(run, tmp_path_factory):
    """The mask file of a run."""
    path = tmp_path_factory.mktemp("masks") / "mine.mask"
    assert main.main(["export", str(run), str(path), "--to", "mask"]) == 0
    return path


def began_with(folder):
    """Group codes of the mask that a run began with."""
    mask = MaskFile(folder / "progress" / INITIAL_MASK)
    return {name: mask.codes(name) for name in mask.layers}


def methods(folder):
    return [row["method"] for row in report(folder)["table"]]


def test_masks_by_name_have_a_row(inputs, tmp_path, capsys):
    for name in ("sparsegpt", "random"):
        options = ["--init", name, "--estimator", "straight-through", "--seed", "3", "--steps", "1"]
        assert main.main(learn(inputs, tmp_path / name, *options)) == 0
        assert f"groups differ from the {name} mask" in capsys.readouterr().out
        assert methods(tmp_path / name) == ["dense", "magnitude", "wanda", name, "straight-through"]
        assert report(tmp_path / name)["initial_mask"] is None and report(tmp_path / name)["start"] == name
    layers = {name: tiny_model().get_submodule(name) for name in report(tmp_path / "random")["converted"]}
    assert_same_bits(began_with(tmp_path / "random"), initial_codes(layers, "2:4", "random", seed=3))
    assert not torch.equal(*(next(iter(began_with(tmp_path / name).values())) for name in ("sparsegpt", "random")))


def test_a_run_begins_with_the_mask_of_a_file(inputs, run, mine, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(mine.parent)
    again = tmp_path / "again"
    assert main.main(learn(inputs, again, "--init", "mine.mask")) == 0
    captured, mask = capsys.readouterr(), MaskFile(mine)
    assert f"the run begins with the mask of the mask file mine.mask, {mask.digest}" in captured.err
    assert "groups differ from the mask of mine.mask; weights frozen" in captured.out
    assert_same_bits(began_with(again), {name: mask.codes(name) for name in mask.layers})
    table = {row["method"]: row["perplexity"] for row in report(again)["table"]}
    assert list(table) == ["dense", "magnitude", "wanda", "mask of mine.mask", "reinforce"]
    assert table["mask of mine.mask"] == {row["method"]: row["perplexity"] for row in report(run)["table"]}["reinforce"]
    # settings hold for every folder, and what the mask is known by
    for name in ("settings.json", "report.json"):
        written, changed = read_sealed((again / name).read_bytes())
        assert written["settings"]["init"] == str(mine) and not changed
        assert written["initial_mask"] == {"kind": "mask file", "digest": mask.digest}
    # no path of this machine travels
    for name in ("README.md", f"progress/{INITIAL_MASK}"):
        content = (again / name).read_bytes()
        assert str(mine.parent).encode() not in content and b"mask of mine.mask" in content
    assert main.main(["learn", "--config", str(again / "settings.json"), "--output", str(tmp_path / "third")]) == 0
    assert_same_bits(*(load_file(folder / "logits.safetensors") for folder in (again, tmp_path / "third")))


def test_a_run_and_a_checkpoint_give_the_same_mask_as_its_file(inputs, run, mine, tmp_path):
    """The name of a mask goes before a folder of that name, which is given by its path."""
    expected = {name: MaskFile(mine).codes(name) for name in MaskFile(mine).layers}
    checkpoint = tmp_path / "wanda"
    assert main.main(["export", str(run), str(checkpoint), "--to", "packed"]) == 0
    for source, kind in ((run, "run"), (checkpoint, "checkpoint")):
        folder = tmp_path / kind
        assert main.main(learn(inputs, folder, "--init", str(source), "--steps", "1")) == 0
        assert_same_bits(began_with(folder), expected)
        told = report(folder)["initial_mask"]
        assert told["kind"] == kind and len(told["digest"]) == 32
        assert methods(folder)[3] == f"mask of {source.name}"


def test_a_run_goes_on_without_the_file_that_it_began_with(inputs, mine, tmp_path, monkeypatch, capsys):
    copy, run = tmp_path / "copy.mask", tmp_path / "run"
    shutil.copy(mine, copy)
    options = ["--init", str(copy), "--estimator", "straight-through", "--steps", "6", "--refit", "scales"]
    assert main.main(learn(inputs, tmp_path / "whole", *options)) == 0

    def stop():
        raise KeyboardInterrupt

    assert broken_off(inputs, run, monkeypatch, 3, options, stop) == 130
    copy.unlink()
    capsys.readouterr()
    assert main.main(["learn", "--resume", str(run), "--device", "cpu"]) == 0
    assert "groups differ from the mask of copy.mask; scales refitted" in capsys.readouterr().out
    assert_same_bits(*(load_file(folder / "logits.safetensors") for folder in (run, tmp_path / "whole")))
    assert methods(run) == methods(tmp_path / "whole")
    assert methods(run)[3] == "mask of copy.mask, scales refitted"
    assert report(run)["initial_mask"] == report(tmp_path / "whole")["initial_mask"]


def test_a_checkpoint_with_other_kept_weights_is_told(inputs, tmp_path, capsys):
    model = tiny_model()
    mk.convert(model, "2:4", init="random")
    mk.finalize(model)
    for name in ("q_proj", "k_proj"):
        model.get_submodule(f"model.layers.0.self_attn.{name}").weight.data *= 2
    save_model(model, tiny_tokenizer(), tmp_path / "pruned")
    options = ["--init", str(tmp_path / "pruned"), "--steps", "1"]
    assert main.main(learn(inputs, tmp_path / "run", *options)) == 0
    told = f"maskpro: warning: {tmp_path / 'pruned'}: kept weights of 2 layers, such as model.layers.0.self_attn.q_proj"
    assert told in capsys.readouterr().err
    layers = {name: tiny_model().get_submodule(name) for name in report(tmp_path / "run")["converted"]}
    assert_same_bits(began_with(tmp_path / "run"), initial_codes(layers, "2:4", "random"))


def test_masks_that_do_not_belong_here_are_refused(inputs, run, mine, tmp_path, capsys):
    """Before the dense model draws a sample, and in one line."""
    other = write_inputs(tmp_path)
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1
    model.save_pretrained(other / "model")
    sparse = tmp_path / "sparse"
    save_model(tiny_model(), tiny_tokenizer(), sparse)
    (tmp_path / "empty").mkdir()

    def refused(folder, init, *more):
        data = f"{inputs / 'text.txt'},self"
        arguments = learn(folder, tmp_path / "new", "--init", str(init), "--data", data)
        refuses(capsys, tmp_path, [*arguments, *more[:-1]], more[-1])

    refused(other, mine, "model: expected the base that the masks were learned on, model, of fingerprint")
    refused(other, run, "model: expected the base of the run in")
    refused(inputs, mine, "--pattern", "4:8", "init: expected a mask of 4:8, got one of 2:4 in")
    refused(inputs, run, "--pattern", "4:8", "init: expected a mask of 4:8, got one of 2:4 in")
    refused(inputs, sparse, "init: expected weights that follow 2:4, got more in 100.0% of the groups of")
    refused(inputs, inputs / "text.txt", "init: expected a mask file, got")
    initial, changes = run / "progress" / INITIAL_MASK, tmp_path / "changes.mask"
    assert main.main(["export", str(run), str(changes), "--to", "mask", "--against", str(initial)]) == 0
    refused(inputs, changes, "init: against: expected the initial mask that")
    refused(inputs, tmp_path / "empty", "init: expected a folder with a config.json, got")
    told = "init: expected one of magnitude, wanda, reconstruction, sparsegpt, random, or the path of a mask file"
    refused(inputs, "randm", told)


def test_a_run_that_was_killed_has_no_mask_yet(inputs, tmp_path, capsys, monkeypatch):
    killed = tmp_path / "killed"
    assert main.main(learn(inputs, killed, "--steps", "1")) == 0
    for name in ("logits.safetensors", "report.json", "config.json"):
        (killed / name).unlink()
    arguments = learn(inputs, tmp_path / "new", "--init", str(killed))
    refuses(capsys, tmp_path, arguments, "init: expected a run that has left logits.safetensors", "learn --resume")
