"""Logits in a file, with the weights that have changed."""

from __future__ import annotations

import os
from contextlib import suppress

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.full_disk import files_of_at_most
from safetensors.torch import load_file, save_file
from torch import nn

from maskpro_kernels import MaskedLinear
from maskpro_kernels.checkpoints.logits import load_logits, save_logits, write_logits
from maskpro_kernels.modules import masked_layers


def masked(logits_dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 12)))
    for parent, name in ((model, "0"), (model[2], "0")):
        module = MaskedLinear.from_linear(getattr(parent, name), "2:4")
        module.logits.data = torch.randn_like(module.logits).to(logits_dtype)
        setattr(parent, name, module)
    return model


def changed(model, by):
    for layer in masked_layers(model).values():
        layer.weight.data += by
        layer.weight_changed = True
    return model


def assert_of(path, model):
    content, layers = load_logits(path), masked_layers(model)
    assert_same_bits(content.logits, {name: layer.logits for name, layer in layers.items()})
    assert_same_bits(content.weights, {name: layer.weight for name, layer in layers.items() if layer.weight_changed})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_round_trip(tmp_path, dtype):
    model, path = masked(dtype), tmp_path / "logits.safetensors"
    metadata = {"model": "a/b", "pattern": "2:4", "note": "ünïcode"}
    save_logits(model, path, metadata)
    content = load_logits(path)
    assert content.metadata == metadata and content.logits["0"].dtype == dtype
    assert content.logits.keys() == {"0", "2.0"} and not content.logits["0"].requires_grad
    assert_of(path, model)
    assert os.listdir(tmp_path) == ["logits.safetensors"]


def test_changed_weights_are_in_the_same_file(tmp_path):
    model = changed(masked(torch.bfloat16), 1.0)
    model[2][0].weight_changed = False
    save_logits(model, tmp_path / "a", {"note": "x"})
    assert_of(tmp_path / "a", model)
    content = load_logits(tmp_path / "a")
    assert content.weights.keys() == {"0"} and content.metadata == {"note": "x"}
    write_logits(content, tmp_path / "again")
    assert_of(tmp_path / "again", model)


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        save_logits(masked(), tmp_path / "logits.safetensors", {})
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert (tmp_path / "logits.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "logits.safetensors"
    save_logits(masked(), path, {})
    before = path.read_bytes()
    with files_of_at_most(100), pytest.raises(OSError, match=r"logits.safetensors: .*File too large"):
        save_logits(masked(torch.bfloat16), path, {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("failing", range(3))
def test_whichever_write_fails_logits_and_weights_are_of_one_model(tmp_path, monkeypatch, failing):
    path, first, second = tmp_path / "logits", changed(masked(), 1.0), changed(masked(torch.bfloat16), 2.0)
    save_logits(first, path, {})
    sync, synced = os.fsync, []

    def fail(descriptor):
        synced.append(descriptor)
        if len(synced) > failing:
            raise OSError("no space left on device")
        sync(descriptor)

    with monkeypatch.context() as patched, suppress(OSError):
        patched.setattr(os, "fsync", fail)
        save_logits(second, path, {})
    assert_of(path, first if load_logits(path).logits["0"].dtype == torch.float32 else second)


def test_what_is_no_file_of_logits_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model: expected a model with MaskedLinear layers, got none"):
        save_logits(nn.Linear(4, 4), tmp_path / "logits", {})
    assert os.listdir(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        load_logits(tmp_path / "missing")
    (tmp_path / "logits").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="path: expected a file of logits, got .*logits"):
        load_logits(tmp_path / "logits")


@pytest.mark.parametrize("name", ["0.weight", "0", "weight/0", "logits", "/0"])
def test_tensors_of_other_names_are_refused(tmp_path, name):
    save_logits(changed(masked(), 1.0), tmp_path / "a", {})
    save_file({**load_file(tmp_path / "a"), name: torch.zeros(1)}, tmp_path / "a")
    with pytest.raises(
        ValueError, match=r"^path: expected a file of logits, got [^\n]* begin with logits/ or weights/"
    ):
        load_logits(tmp_path / "a")


def test_names_are_those_of_no_model(tmp_path):
    """A loader that reads the file beside the model's own finds no tensor that it looks for."""
    model = changed(masked(), 1.0)
    save_logits(model, tmp_path / "a", {})
    assert load_file(tmp_path / "a").keys() == {"logits/0", "logits/2.0", "weights/0", "weights/2.0"}
    assert not load_file(tmp_path / "a").keys() & model.state_dict().keys()
