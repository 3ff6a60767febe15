"""`maskpro export --to mask`, and `maskpro import` of it: a mask travels without weights."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.command import refuses
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import maskpro_kernels as mk
from maskpro_kernels.checkpoints.mask_file import load_masks
from maskpro_kernels.cli import main
from maskpro_kernels.cli.run_files import INITIAL_MASK

pytestmark = pytest.mark.usefixtures("eager_reference")


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """(mask file, dense checkpoint) of a run."""
    folder = tmp_path_factory.mktemp("exported")
    assert main.main(["export", str(run), str(folder / "mask"), "--to", "mask"]) == 0
    assert main.main(["export", str(run), str(folder / "dense")]) == 0
    return folder / "mask", folder / "dense"


@pytest.mark.parametrize("to", ["dense", "packed"])
def test_the_checkpoint_comes_back(to, inputs, exported, tmp_path):
    mask, dense = exported
    out = tmp_path / "out"
    assert main.main(["import", str(mask), "--model", str(inputs / "model"), "--output", str(out), "--to", to]) == 0
    tokens = torch.arange(12).view(1, 12)
    assert_same_bits(*(AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in (out, dense)))
    if to == "dense":
        assert (out / "model.safetensors").read_bytes() == (dense / "model.safetensors").read_bytes()


def test_another_base_and_a_damaged_file_are_refused(inputs, exported, tmp_path, capsys):
    shutil.copytree(inputs / "model", tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] += 1
    save_file(tensors, weights, {"format": "pt"})
    base, out = ["--model", str(tmp_path / "base")], ["--output", str(tmp_path / "out")]
    told = f"of fingerprint {load_masks(exported[0]).base} in"
    refuses(capsys, tmp_path, ["import", str(exported[0]), *base, *out], told)
    content = exported[0].read_bytes()
    (tmp_path / "mask").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refuses(capsys, tmp_path, ["import", str(tmp_path / "mask"), *base, *out], "mask: expected what was written, got")


def test_a_run_keeps_its_initial_mask(run, inputs):
    mask = load_masks(run / "progress" / INITIAL_MASK)
    assert mask.model == "model" and mask.provenance["of"].endswith("mask that a run began with")
    model = AutoModelForCausalLM.from_pretrained(inputs / "model")
    mask.check_base({name: model.get_submodule(name).weight for name in mask.layers})
    assert mask.pattern == mk.NMPattern("2:4")
