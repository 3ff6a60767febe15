from __future__ import annotations

import errno
import os
import tempfile
from contextlib import suppress

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.full_disk import files_of_at_most
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from maskpro_kernels import MaskedLinear
from maskpro_kernels.checkpoints.logits import (
    load_learned,
    load_logits,
    load_weights,
    save_logits,
    save_weights,
    write_learned,
)
from maskpro_kernels.files import check_output
from maskpro_kernels.modules import masked_layers
from maskpro_kernels.stored_digests import without_digests


def masked(logits_dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 12)))
    for parent, name in ((model, "0"), (model[2], "0")):
        module = MaskedLinear.from_linear(getattr(parent, name), "2:4")
        module.logits.data = torch.randn_like(module.logits).to(logits_dtype)
        setattr(parent, name, module)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_round_trip(tmp_path, dtype):
    model = masked(dtype)
    metadata = {"model": "a/b", "pattern": "2:4", "note": "ünïcode"}
    save_logits(model, tmp_path / "logits.safetensors", metadata)
    logits, read = load_logits(tmp_path / "logits.safetensors")
    assert read == metadata
    assert logits.keys() == {"0", "2.0"}
    assert_same_bits(logits, {"0": model[0].logits, "2.0": model[2][0].logits})
    assert logits["0"].dtype == dtype and not logits["0"].requires_grad
    assert os.listdir(tmp_path) == ["logits.safetensors"]


def test_a_file_of_another_program_is_sealed_as_its_refusal_says(tmp_path):
    """Without a digest, or with that of what was in it before another program saved it again."""
    path = tmp_path / "logits.safetensors"
    logits = {"0": torch.randn(4, 8)}
    for metadata, refusal in (({}, "got none in"), ({"digest": "a" * 32}, "damaged or changed")):
        save_file(logits, path, {"note": "x", **metadata})
        with pytest.raises(ValueError, match=rf"{refusal}.*without_digests\(\), and write it by write_learned"):
            load_learned(path)
        with without_digests():
            learned = load_learned(path)
        write_learned(learned, path)
        found, read = load_logits(path)
        assert read == {"note": "x"}
        assert_same_bits(found, logits)


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        save_logits(masked(), tmp_path / "logits.safetensors", {})
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert (tmp_path / "logits.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "logits.safetensors"
    save_logits(masked(), path, {})
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        save_logits(masked(torch.bfloat16), path, {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "logits.safetensors"
    save_logits(masked(), path, {})
    before = path.read_bytes()
    with files_of_at_most(100), pytest.raises(OSError, match=r"logits.safetensors: .*File too large"):
        save_logits(masked(torch.bfloat16), path, {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def changed(model, by):
    for layer in masked_layers(model).values():
        layer.weight.data += by
        layer.weight_changed = True
    return model


def test_changed_weights_are_in_the_same_file(tmp_path):
    model = changed(masked(torch.bfloat16), 1.0)
    save_logits(model, tmp_path / "a.safetensors", {"note": "x"})
    save_logits(changed(masked(), 2.0), tmp_path / "a.pt", {})
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "a.safetensors"]
    (tmp_path / "a.safetensors").rename(tmp_path / "b")
    learned = load_learned(tmp_path / "b")
    layers = masked_layers(model)
    assert_same_bits(learned.logits, {name: layer.logits for name, layer in layers.items()})
    assert_same_bits(learned.weights, {name: layer.weight for name, layer in layers.items()})
    assert learned.metadata["note"] == "x"


def test_weights_in_the_place_of_others_are_told(tmp_path):
    weights = {name: torch.full((2, 4), float(index)) for index, name in enumerate("ab")}
    path = tmp_path / "weights.safetensors"
    save_weights(weights, path)
    assert_same_bits(load_weights(path), weights)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    # sorted by name, they are as before
    save_file({"b": weights["a"], "c": weights["b"]}, path, metadata=metadata)
    with pytest.raises(ValueError, match="expected what was written, got .*weights.safetensors', which was damaged"):
        load_weights(path)


def test_weights_of_some_layers_may_have_changed(tmp_path):
    model = masked()
    model[0].weight_changed = True
    save_logits(model, tmp_path / "a", {})
    learned = load_learned(tmp_path / "a")
    assert learned.logits.keys() == {"0", "2.0"} and learned.weights.keys() == {"0"}


@pytest.mark.parametrize("failing", range(4))
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
    learned = load_learned(path)
    layers = masked_layers(first if learned.logits["0"].dtype == torch.float32 else second)
    assert_same_bits(learned.logits, {name: layer.logits for name, layer in layers.items()})
    assert_same_bits(learned.weights, {name: layer.weight for name, layer in layers.items()})


def test_save_refuses_before_it_writes(tmp_path):
    path = tmp_path / "logits.safetensors"
    with pytest.raises(ValueError, match="model: expected a model with MaskedLinear layers, got none"):
        save_logits(nn.Linear(4, 4), path, {})
    with pytest.raises(TypeError, match=r"metadata: expected strings.*\('steps', 3\)"):
        save_logits(masked(), path, {"steps": 3})
    with pytest.raises(ValueError, match="metadata: expected other names than .* got digest"):
        save_logits(masked(), path, {"digest": "x"})
    assert os.listdir(tmp_path) == []


def test_load_refuses_what_is_no_safetensors_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_logits(tmp_path / "missing")
    path = tmp_path / "logits.safetensors"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="path: expected a safetensors file, got .*logits.safetensors"):
        load_logits(path)


def test_check_output(tmp_path):
    check_output(tmp_path)
    check_output(tmp_path / "new" / "deep")
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="output: expected a new or empty folder, got .*not empty"):
        check_output(tmp_path)
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="output: expected a folder, got .*file' is a file"):
            check_output(folder)


@pytest.mark.parametrize(("module", "name"), [(tempfile, "TemporaryFile"), (os, "mkdir")])
def test_check_output_refuses_a_folder_it_cannot_write(tmp_path, monkeypatch, module, name):
    """Also one that takes files but no folders, such as by a quota."""

    def refuse(*args, **others):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr(module, name, refuse)
    with pytest.raises(ValueError, match="output: expected a writable folder, got .*deep.*Permission denied"):
        check_output(tmp_path / "new" / "deep")
    assert os.listdir(tmp_path) == []
