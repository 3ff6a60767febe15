"""Masks of MaskLLM and MaskPro: what is read, what is refused, and the model under them."""

from __future__ import annotations

import io
import json
import random
import sys
import warnings
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.checkpoints import LAYER, compressed_folder, layers, masked, random_masks, store
from helpers.command import refuses
from helpers.full_disk import files_of_at_most
from helpers.tiny_llama import tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import maskpro_kernels as mk
from maskpro_kernels import hf
from maskpro_kernels.checkpoints.importers import compressed_tensors, learned_masks
from maskpro_kernels.cli import main

pytestmark = pytest.mark.usefixtures("eager_reference")


@pytest.mark.parametrize(("how", "file"), [("maskllm", "m.npz"), ("dict", "m.pt"), ("folder", "masks")])
def test_masks_of_others(how, file, tmp_path):
    model = tiny_model()
    masks = random_masks(model)
    read = learned_masks.read_masks(store(masks, tmp_path / file, how), layers(model), "2:4")
    assert_same_bits(read, masks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8, torch.int64, torch.float8_e4m3fn])
def test_masks_of_floats_and_integers(tmp_path, dtype):
    """Such as MaskLLM's tool_compute_mask_hf.py writes: float32, under the names of weights."""
    model = tiny_model()
    masks = random_masks(model)
    torch.save({f"{name}.weight.mask": mask.to(dtype) for name, mask in masks.items()}, tmp_path / "mask.pt")
    assert_same_bits(learned_masks.read_masks(tmp_path / "mask.pt", layers(model), "2:4"), masks)


@pytest.mark.parametrize("to", ["dense", "packed"])
def test_what_a_mask_drops_is_zero_where_a_group_keeps_fewer(folder, to):
    masks = random_masks(tiny_model())
    masks[LAYER][:, :4] = torch.tensor([False, False, False, True])
    arguments = ["import", str(store(masks, folder / "masks", "folder")), "--output", str(folder / "out"), "--to", to]
    assert main.main([*arguments, "--model", str(folder / "model")]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(folder / "out")
    layer = loaded.get_submodule(LAYER)
    assert layer.bias is None and loaded.dtype == torch.float32
    weight = layer.weight if to == "dense" else layer.packed.unpack()
    assert_same_bits(weight, masked(tiny_model(), masks).get_submodule(LAYER).weight)


def zipped(tmp_path):
    path = tmp_path / "masks.npz"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("note.txt", "none")
    return path


def of_other_bytes():
    mask = torch.zeros(4, 8).bool()
    mask.view(torch.uint8)[0, 0] = 2
    return mask


def stored(tmp_path, content):
    path = tmp_path / "masks.pt"
    torch.save(content, path)
    return path


BAD_MASKS = {
    "expected masks of the model's linear layers, got one of 'b'": lambda p: stored(p, {"b": torch.ones(4, 8).bool()}),
    "expected .4, 8. for a, got .4, 4.": lambda p: stored(p, {"a": torch.zeros(4, 4).bool()}),
    "expected at most 2 of every 4 kept, got 4 in a": lambda p: stored(p, {"a": torch.ones(4, 8).bool()}),
    "expected 0 and 1, or false and true, alone, got others in a": lambda p: stored(p, {"a": torch.full((4, 8), 0.5)}),
    "expected 0 and 1, or false and true, alone, got others in d": (
        lambda p: stored(p, {"d": torch.full((4, 8), 2, dtype=torch.int64)})
    ),
    "expected 0 and 1, or false and true, alone, got others in e": lambda p: stored(p, {"e": torch.zeros(4, 8) / 0}),
    "expected plain tensors, got torch.complex64 in f": lambda p: stored(p, {"f": torch.zeros(4, 8) * 1j}),
    "expected tensors, got int 'a'": lambda p: stored(p, {"a": 3}),
    "expected at least one, got none": lambda p: stored(p, {}),
    "expected a file of masks": lambda p: (p / "masks.pt").write_text("nothing") and p / "masks.pt",
    "expected an .npz file of MaskLLM": lambda p: (p / "masks.npz").write_text("nothing") and p / "masks.npz",
    "expected 32 bits for a, got 64": (
        lambda p: np.savez(p / "m.npz", **{"a.mask": np.zeros(8, np.uint8)}) or p / "m.npz"
    ),
    "flat uint8 arrays expected, note.txt is none": zipped,
    "flat uint8 arrays expected, masks/data.pkl is none": (
        lambda p: stored(p, {"a": torch.ones(4, 8).bool()}).rename(p / "m.npz")
    ),
    "expected names of layers, got 3": lambda p: stored(p, {3: torch.zeros(4, 8).bool()}),
    "expected 0 and 1, or false and true, alone, got others in g": lambda p: stored(p, {"g": of_other_bytes()}),
    "expected plain tensors, got torch.sparse_coo in b": lambda p: stored(
        p, {"b": torch.ones(4, 8).bool().to_sparse()}
    ),
    "expected plain tensors, got meta in c": lambda p: stored(p, {"c": torch.ones(4, 8, device="meta").bool()}),
    "flat uint8 arrays expected, a is bool": (lambda p: np.savez(p / "m.npz", a=np.zeros((4, 8), bool)) or p / "m.npz"),
}


@pytest.mark.parametrize("told", BAD_MASKS)
def test_bad_masks_are_refused(told, tmp_path):
    with pytest.raises(ValueError, match=f"masks: .*{told}"):
        learned_masks.read_masks(BAD_MASKS[told](tmp_path), {"a": nn.Linear(8, 4)}, "2:4")


def written_by(write):
    file = io.BytesIO()
    write(file)
    return file.getvalue()


@pytest.mark.parametrize("form", ["npz", "pt", "legacy.pt"])
def test_damaged_masks_are_masks_or_refused(form, tmp_path):
    """Wherever bytes are cut off or changed: no other error, and no warning."""
    mask = torch.tensor([[1, 1, 0, 0] * 2] * 4, dtype=torch.bool)
    content = {
        "npz": lambda file: np.savez_compressed(file, a=np.packbits(mask.numpy())),
        "pt": lambda file: torch.save({"a": mask}, file),
        "legacy.pt": lambda file: torch.save({"a": mask}, file, _use_new_zipfile_serialization=False),
    }
    content, file = written_by(content[form]), tmp_path / f"masks.{form}"
    draw, refused = random.Random(0), 0
    for turn in range(600):
        damaged = bytearray(content)
        if turn % 3:
            for _ in range(draw.choice((1, 2, 4))):
                damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        else:
            damaged = damaged[: draw.randrange(len(damaged))]
        file.write_bytes(damaged)
        with warnings.catch_warnings(action="error"):
            try:
                (read,) = learned_masks.read_masks(file, {"a": nn.Linear(8, 4)}, "2:4").values()
                assert read.shape == mask.shape
            except ValueError as error:
                assert str(error).startswith("masks: expected")
                refused += 1
    assert refused > 200


def test_an_array_is_decompressed_once(tmp_path, monkeypatch):
    asked, take = [], np.lib.npyio.NpzFile.__getitem__
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda file, name: asked.append(name) or take(file, name))
    masks = random_masks(tiny_model())
    learned_masks.read_masks(store(masks, tmp_path / "m.npz", "maskllm"), layers(tiny_model()), "2:4")
    assert asked == [f"{name}.weight.mask" for name in masks]


@pytest.mark.parametrize("to", ["dense", "packed"])
@pytest.mark.parametrize("how", ["maskllm", "folder"])
def test_import_of_masks(how, to, folder, capsys):
    masks = random_masks(tiny_model())
    source = store(masks, folder / ("m.npz" if how == "maskllm" else "masks"), how)
    arguments = ["import", str(source), "--output", str(folder / "out"), "--model", str(folder / "model"), "--to", to]
    assert main.main([*arguments, "--dtype", "float32"]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(folder / "out")
    tokens = torch.arange(12).view(1, 12)
    assert_same_bits(loaded(tokens).logits, masked(tiny_model(), masks)(tokens).logits)


def test_import_of_a_dense_checkpoint_with_zeros(tmp_path, capsys):
    masks = random_masks(tiny_model(), "4:8")
    model = tiny_model()
    for name, mask in masks.items():
        # -0.0 where a negative weight is dropped
        model.get_submodule(name).weight.data *= mask
    del masks[LAYER]
    model.get_submodule(LAYER).weight.data.fill_(1.0)
    hf.save_model(model, tiny_tokenizer(), tmp_path / "in")
    assert (
        main.main(
            [
                "import",
                str(tmp_path / "in"),
                "--output",
                str(tmp_path / "out"),
                "--pattern",
                "4:8",
                "--dtype",
                "float32",
            ]
        )
        == 0
    )
    captured = capsys.readouterr()
    assert f"left dense: {LAYER} (100.0% of its groups do not follow 4:8)" in captured.err
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded.get_submodule(LAYER)) is nn.Linear
    assert type(loaded.get_submodule("model.layers.1.mlp.down_proj")) is mk.NMLinear
    tokens = torch.arange(12).view(1, 12)
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    ("stored", "named", "expected"),
    [
        (torch.float32, None, torch.float32),
        (torch.float16, None, torch.float16),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.float64, None, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("of", ["checkpoint", "masks"])
def test_an_import_has_the_dtype_of_its_source(tmp_path, capsys, stored, named, expected, of):
    """What the config names goes before what the files hold; where neither can be kept, that is told."""
    masks = random_masks(tiny_model())
    hf.save_model(masked(tiny_model(), masks).to(stored), tiny_tokenizer(), tmp_path / "in")
    config = tmp_path / "in" / "config.json"
    settings = {name: value for name, value in json.loads(config.read_text()).items() if name != "dtype"}
    config.write_text(json.dumps(settings | ({} if named is None else {"dtype": named})))
    source = [str(tmp_path / "in")]
    if of == "masks":
        source = [str(store(masks, tmp_path / "m.npz", "maskllm")), "--model", *source]
    assert main.main(["import", *source, "--output", str(tmp_path / "out"), "--to", "dense"]) == 0
    found, given = (load_file(tmp_path / name / "model.safetensors")[f"{LAYER}.weight"] for name in ("out", "in"))
    assert_same_bits(found, given.to(expected))
    told = f"neither a config nor safetensors files tell that weights of {str(tmp_path / 'in')!r} are in one of"
    assert (told in capsys.readouterr().err) == (stored == torch.float64)


@pytest.mark.parametrize(
    ("held", "expected"), [({"F32": 3}, "float32"), ({"BF16": 3, "I8": 1}, "bfloat16"), ({}, None)]
)
def test_weights_on_the_hub_tell_their_dtype_before_they_are_fetched(tmp_path, monkeypatch, held, expected):
    # a function of the package has the name of this module
    of_stored = sys.modules["maskpro_kernels.hf.stored_dtype"]
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(of_stored, "check_model", lambda name: None)
    monkeypatch.setattr(of_stored, "hf_hub_download", lambda name, file: tmp_path / file)
    metadata = SimpleNamespace(parameter_count=held)
    monkeypatch.setattr(of_stored, "get_safetensors_metadata", lambda name: metadata)
    assert hf.stored_dtype("owner/name") == expected


def test_bad_imports_are_refused(folder, tmp_path, capsys):
    output = ["--output", str(tmp_path / "out")]
    refuses(capsys, tmp_path, ["import", str(tmp_path / "none"), *output], "source: expected a file, a folder or an id")
    refuses(capsys, tmp_path, ["import", str(folder / "model" / "config.json"), *output], "model: expected the model")
    refuses(
        capsys,
        tmp_path,
        ["import", str(folder / "model"), "--output", str(folder / "model")],
        "output: expected a new or",
    )
    refuses(capsys, tmp_path, ["import", str(folder / "model"), *output], "pattern: expected one that some layer")
    refuses(capsys, tmp_path, ["import", str(folder / "model"), *output, "--pattern", "2:5"], "pattern: expected N:M")
    source = compressed_folder(tmp_path / "in", masked(tiny_model(), random_masks(tiny_model())))
    file = source / "model-0.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(".compressed"))
    save_file(tensors | {name: tensors[name][:-1].clone()}, file, {"format": "pt"})
    refuses(capsys, tmp_path, ["import", str(source), *output], "values of float32, bfloat16 or float16 in")
    file.write_bytes(file.read_bytes()[:-9])
    refuses(capsys, tmp_path, ["import", str(source), *output], "expected a whole safetensors file")


def test_a_full_disk_is_told_as_one(tmp_path):
    source = compressed_folder(tmp_path / "in", masked(tiny_model(), random_masks(tiny_model())))
    with files_of_at_most(4096), pytest.raises(OSError, match="model-0.safetensors: .*File too large"):
        compressed_tensors.write_plain(source, tmp_path / "out")
