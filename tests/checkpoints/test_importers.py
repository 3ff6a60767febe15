"""Masks of MaskLLM and MaskPro, checkpoints of compressed-tensors: what is read, and what is refused."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import warnings
import zipfile

import numpy as np
import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.checkpoints import (
    COMPRESSED,
    LAYER,
    MARLIN_24,
    compressed_folder,
    layers,
    marlin_24_folder,
    marlin_24_tensors,
    masked,
    random_masks,
    reconfigure,
    rewrite,
    store,
)
from helpers.full_disk import files_of_at_most
from helpers.tiny_llama import tiny_model, tiny_tokenizer
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import maskpro_kernels as mk
from maskpro_kernels import hf
from maskpro_kernels.checkpoints import importers, marlin_24
from maskpro_kernels.checkpoints.importers import read_masks, write_plain
from maskpro_kernels.cli import main
from maskpro_kernels.files import INDEX

pytestmark = pytest.mark.usefixtures("eager_reference")

TOKENS = torch.arange(12).view(1, 12)


def imported(*arguments: str, code: int = 0) -> None:
    assert main.main(["import", *map(str, arguments)]) == code


@pytest.mark.parametrize(("how", "file"), [("maskllm", "m.npz"), ("dict", "m.pt"), ("folder", "masks")])
def test_masks_of_others(how, file, tmp_path):
    model = tiny_model()
    masks = random_masks(model)
    assert_same_bits(read_masks(store(masks, tmp_path / file, how), layers(model), "2:4"), masks)
    if how == "maskllm":
        # as the hub has it
        assert_same_bits(read_masks(tmp_path, layers(model), "2:4"), masks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8, torch.int64, torch.float8_e4m3fn])
def test_masks_of_floats_and_integers(tmp_path, dtype):
    """Such as MaskLLM's tool_compute_mask_hf.py writes: float32, under the names of weights."""
    model = tiny_model()
    masks = random_masks(model)
    torch.save({f"{name}.weight.mask": mask.to(dtype) for name, mask in masks.items()}, tmp_path / "mask.pt")
    assert_same_bits(read_masks(tmp_path / "mask.pt", layers(model), "2:4"), masks)


def test_a_new_format_of_masks_is_one_function_and_one_entry(tmp_path, monkeypatch):
    def stored_masks(source, most):
        for name, rows in json.loads(source.read_text()).items():
            yield name, torch.tensor(rows).bool()

    monkeypatch.setitem(importers.MASK_FORMATS, ".json", stored_masks)
    (tmp_path / "masks.json").write_text(json.dumps({"a.mask": [[1, 0, 1, 0], [0, 0, 0, 1]]}))
    masks = read_masks(tmp_path / "masks.json", {"a": nn.Linear(4, 2), "b": nn.Linear(4, 2)}, "2:4")
    assert masks.keys() == {"a"} and masks["a"].tolist() == [[True, False, True, False], [False, False, False, True]]


def of_other_bytes():
    mask = torch.zeros(4, 8).bool()
    mask.view(torch.uint8)[0, 0] = 2
    return mask


BAD_MASKS = {
    "expected masks of the model's linear layers, got one of 'b'": {"b": torch.ones(4, 8).bool()},
    "expected .4, 8. for a, got .4, 4.": {"a": torch.zeros(4, 4).bool()},
    "expected at most 2 of every 4 kept, got 4 in a": {"a": torch.ones(4, 8).bool()},
    "expected 0 and 1, or false and true, got others in a": {"a": torch.full((4, 8), 0.5)},
    "expected 0 and 1, or false and true, got others in e": {"e": torch.zeros(4, 8) / 0},
    "expected 0 and 1, or false and true, got others in g": {"g": of_other_bytes()},
    "expected plain tensors by name, got 'a'": {"a": 3},
    "expected plain tensors by name, got 3": {3: torch.zeros(4, 8).bool()},
    "expected plain tensors by name, got 'c'": {"c": torch.ones(4, 8, device="meta").bool()},
    "expected at least one, got none": {},
}


@pytest.mark.parametrize("message", BAD_MASKS)
def test_bad_masks_are_refused(message, tmp_path):
    torch.save(BAD_MASKS[message], tmp_path / "masks.pt")
    with pytest.raises(ValueError, match=f"masks: .*{message}"):
        read_masks(tmp_path / "masks.pt", {"a": nn.Linear(8, 4)}, "2:4")


def test_bad_arrays_are_refused(tmp_path):
    for array, message in (
        (np.zeros(8, np.uint8), "at most 32 bits expected, .* a has 8 bytes"),
        (np.zeros(2, np.uint8), "32 bits for a, got 16"),
        (np.zeros((4, 8), bool), "a is bool"),
    ):
        np.savez(tmp_path / "m.npz", a=array)
        with pytest.raises(ValueError, match=message):
            read_masks(tmp_path / "m.npz", {"a": nn.Linear(8, 4)}, "2:4")


@pytest.mark.parametrize("form", ["header.npz", "zeros.npz", "view.pt", "zip.pt"])
def test_sizes_are_checked_before_there_is_memory_for_them(form, tmp_path, monkeypatch):
    """Small files that ask for 64 GiB: by a header, by what is compressed, by a view that repeats one element."""
    file, size = tmp_path / form, 1 << 36
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (size,)})
    if form == "view.pt":
        torch.save({"a": torch.zeros(1, dtype=torch.bool).expand(size)}, file)
    elif form == "zip.pt":
        torch.save({"a": torch.zeros(4 << 20, dtype=torch.bool)}, tmp_path / "stored.pt")
        with (
            zipfile.ZipFile(tmp_path / "stored.pt") as stored,
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as small,
        ):
            for name in stored.namelist():
                small.writestr(name, stored.read(name))
    else:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as small:
            small.writestr("a.npy", header.getvalue() + bytes(1 << 20 if form == "zeros.npz" else 0))
    assert file.stat().st_size < 1 << 16
    monkeypatch.setattr(np, "ndarray", lambda *_, **__: pytest.fail("memory for an array"))
    expected = "exceed its own" if form == "zip.pt" else "at most 32 "
    with pytest.raises(ValueError, match="^masks: expected") as caught:
        read_masks(file, {"a": nn.Linear(8, 4)}, "2:4")
    assert expected in f"{caught.value} {caught.value.__cause__}"


@pytest.mark.parametrize("form", ["npz", "pt", "legacy.pt"])
def test_damaged_masks_are_masks_or_refused(form, tmp_path):
    """Wherever bytes are cut off or changed: no other error, and no warning."""
    mask = torch.tensor([[1, 1, 0, 0] * 2] * 4, dtype=torch.bool)
    write = {
        "npz": lambda file: np.savez_compressed(file, a=np.packbits(mask.numpy())),
        "pt": lambda file: torch.save({"a": mask}, file),
        "legacy.pt": lambda file: torch.save({"a": mask}, file, _use_new_zipfile_serialization=False),
    }
    content, file = io.BytesIO(), tmp_path / f"masks.{form}"
    write[form](content)
    content, draw, refused = content.getvalue(), random.Random(0), 0
    for turn in range(300):
        damaged = bytearray(content)
        if turn % 3:
            for _ in range(draw.choice((1, 2, 4))):
                damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        else:
            damaged = damaged[: draw.randrange(len(damaged))]
        file.write_bytes(damaged)
        with warnings.catch_warnings(action="error"):
            try:
                (read,) = read_masks(file, {"a": nn.Linear(8, 4)}, "2:4").values()
                assert read.shape == mask.shape
            except ValueError as error:
                assert str(error).startswith("masks: expected")
                refused += 1
    assert refused > 100


@pytest.mark.parametrize("to", ["dense", "packed"])
@pytest.mark.parametrize("how", ["maskllm", "folder"])
def test_import_of_masks(how, to, folder):
    masks = random_masks(tiny_model())
    # a group may keep fewer
    masks[LAYER][:, :4] = torch.tensor([False, False, False, True])
    source = store(masks, folder / ("m.npz" if how == "maskllm" else "masks"), how)
    imported(source, "--output", folder / "out", "--model", folder / "model", "--to", to)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "out")
    layer = loaded.get_submodule(LAYER)
    weight = layer.weight if to == "dense" else layer.packed.unpack()
    assert_same_bits(weight, masked(tiny_model(), masks).get_submodule(LAYER).weight)
    assert_same_bits(loaded(TOKENS).logits, masked(tiny_model(), masks)(TOKENS).logits)


def test_import_of_a_dense_checkpoint_with_zeros(tmp_path, capsys):
    masks, model = random_masks(tiny_model(), "4:8"), tiny_model()
    for name, mask in masks.items():
        # -0.0 where a negative weight is dropped
        model.get_submodule(name).weight.data *= mask
    model.get_submodule(LAYER).weight.data.fill_(1.0)
    hf.save_model(model, tiny_tokenizer(), tmp_path / "in")
    imported(tmp_path / "in", "--output", tmp_path / "out", "--pattern", "4:8", "--dtype", "float32")
    assert f"left dense: {LAYER} (100.0% of its groups do not follow 4:8)" in capsys.readouterr().err
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded.get_submodule(LAYER)) is nn.Linear
    assert type(loaded.get_submodule("model.layers.1.mlp.down_proj")) is mk.NMLinear
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_an_import_has_the_dtype_of_its_source(stored, tmp_path):
    masks = random_masks(tiny_model())
    hf.save_model(masked(tiny_model(), masks).to(stored), tiny_tokenizer(), tmp_path / "in")
    imported(tmp_path / "in", "--output", tmp_path / "out", "--to", "dense")
    found, given = (load_file(tmp_path / name / "model.safetensors")[f"{LAYER}.weight"] for name in ("out", "in"))
    assert_same_bits(found, given)


def test_what_was_fetched_from_the_hub_before_is_read_offline(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    masks, commit = random_masks(tiny_model()), "0123456789abcdef0123456789abcdef01234567"
    (tmp_path / "npz").mkdir()
    sources = {
        "masks": store(masks, tmp_path / "npz" / "mask_compressed.npz", "maskllm").parent,
        "sparse": compressed_folder(tmp_path / "sparse", masked(tiny_model(), masks)),
        "dense": folder / "model",
    }
    for name, source in sources.items():
        place = tmp_path / "cache" / f"models--owner--{name}"
        shutil.copytree(source, place / "snapshots" / commit)
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(commit)
    expected = masked(tiny_model(), masks)(TOKENS).logits
    imported("owner/masks", "--output", tmp_path / "a", "--model", "owner/dense", "--dtype", "float32")
    imported("owner/sparse", "--output", tmp_path / "b", "--dtype", "float32")
    for name in "ab":
        assert_same_bits(AutoModelForCausalLM.from_pretrained(tmp_path / name)(TOKENS).logits, expected)
    with pytest.raises(
        OSError, match="source: expected a file, a folder or an id owner/name on the hub, got 'owner/x'"
    ):
        hf.fetch("owner/x")


def test_bytes_that_compressed_tensors_wrote(tmp_path):
    (tmp_path / "in").mkdir()
    tensors = load_file(COMPRESSED)
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    settings = {"model_type": "llama", "quantization_config": {"sparsity_config": {"format": "sparse-24-bitmask"}}}
    (tmp_path / "in" / "config.json").write_text(json.dumps(settings))
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    assert write_plain(tmp_path / "in", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("layers.0.down", "layers.1.up"):
        dense, found = tensors[f"dense.{name}"], written[f"{name}.weight"]
        # a value of -0 may be stored as 0
        assert found.dtype == dense.dtype and torch.equal(found, dense)
        assert_same_bits(written[f"dense.{name}"], dense)
        assert not any(f"{name}.{part}" in written for part in ("compressed", "bitmask", "shape"))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "llama"}
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("to", ["dense", "packed"])
def test_import_of_a_compressed_checkpoint(to, tmp_path):
    model = masked(tiny_model(), random_masks(tiny_model()))
    source = compressed_folder(tmp_path / "in", model)
    imported(source, "--output", tmp_path / "out", "--to", to, "--dtype", "float32")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded.get_submodule(LAYER)) is (nn.Linear if to == "dense" else mk.Sparse24Linear)
    assert_same_bits(loaded(TOKENS).logits, model(TOKENS).logits)
    if to == "packed":
        # and back
        imported(tmp_path / "out", "--output", tmp_path / "dense", "--to", "dense")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
        assert type(loaded.get_submodule(LAYER)) is nn.Linear
        assert_same_bits(loaded(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_import_of_a_checkpoint_in_the_format_dense(tmp_path, key):
    """Which transformers would load by the package compressed-tensors alone."""
    model = masked(tiny_model(), random_masks(tiny_model()))
    model.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path / "in")
    config = tmp_path / "in" / "config.json"
    of_compression = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "config_groups": {},
        "sparsity_config": {"format": "dense", "sparsity_structure": "2:4", "targets": ["Linear"]},
    }
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: of_compression}))
    imported(tmp_path / "in", "--output", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded.get_submodule(LAYER)) is mk.Sparse24Linear
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_other_quantizations_are_left_to_transformers_and_quantized_weights_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path / "in")
    config = tmp_path / "in" / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"quantization_config": {"quant_method": "gptq"}}))
    assert not write_plain(tmp_path / "in", tmp_path / "out")
    of_compression = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    config.write_text(json.dumps(settings | {"quantization_config": of_compression}))
    with pytest.raises(ValueError, match="checkpoint: expected weights in the format .* got the format pack-quantized"):
        write_plain(tmp_path / "in", tmp_path / "out")
    of_compression |= {"format": "dense", "kv_cache_scheme": {"num_bits": 8}}
    config.write_text(json.dumps(settings | {"quantization_config": of_compression}))
    with pytest.raises(ValueError, match="checkpoint: expected a cache in the model's dtype, got a kv_cache_scheme in"):
        write_plain(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("a.shape"), "expected a.compressed, .bitmask, .shape, got none of .'shape'"),
        (lambda t: t.pop("a.compressed"), "expected a.compressed, .bitmask, .shape, got none of .'compressed'. in '.*"),
        (lambda t: t.update({"a.weight": torch.ones(4, 8)}), "expected a.weight or a.compressed, got both in '.*"),
        (lambda t: t.update({"a.shape": torch.tensor([4, 8, 1])}), "expected rows of whole groups of 4 in a.shape"),
        (lambda t: t.update({"a.shape": torch.tensor([-4, 8])}), "expected rows of whole groups of 4 in a.shape"),
        (lambda t: t.update({"a.shape": torch.tensor([4, 16])}), "expected 32 values of .* in a.compressed"),
        (lambda t: t.update({"a.bitmask": t["a.bitmask"] ^ 1}), "a.bitmask: expected exactly 2 of every 4"),
    ],
)
def test_damaged_compressed_weights_are_refused(change, message, tmp_path):
    packed = mk.pack_24(torch.ones(4, 8) * torch.tensor([1, 1, 0, 0] * 2))
    tensors = {"a.compressed": packed.values, "a.bitmask": packed.bitmask, "a.shape": torch.tensor([4, 8])}
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"checkpoint: .*{message}"):
        write_plain(tmp_path, tmp_path / "out")


def marlin_24_model():
    """With rows of 128 and of 384 columns: scales of one group and of three."""
    model = tiny_model(hidden_size=128, intermediate_size=384)
    return masked(model, random_masks(model))


@pytest.mark.parametrize("weight", ["groups", "two_groups", "rows"])
def test_bytes_in_marlin_24_that_compressed_tensors_wrote(weight):
    tensors = load_file(MARLIN_24)
    integers = tensors[f"integers.{weight}"]
    scales = tensors[f"scales.{weight}"]
    expected = (integers.float() * scales.float().repeat_interleave(integers.shape[1] // scales.shape[1], 1)).half()
    stored = {part: tensors[f"{weight}.{part}"] for part in marlin_24.COMPRESSED_TENSORS}
    found = marlin_24.marlin_24_weight(weight, stored)
    assert found.dtype == torch.float16 and torch.equal(found, expected) and expected.count_nonzero() > 500
    # the packer of these tests too, but for places of groups with fewer than two values
    values, metadata, packed_scales = marlin_24_tensors(integers.long(), scales, 8 if weight == "rows" else 4)
    assert_same_bits(packed_scales, stored["scale_packed"])
    by_tests = dict(zip(marlin_24.COMPRESSED_TENSORS, (values, metadata, packed_scales), strict=True))
    assert_same_bits(marlin_24.marlin_24_weight(weight, by_tests), found)


@pytest.mark.parametrize("names", [marlin_24.COMPRESSED_TENSORS, marlin_24.VLLM])
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, None), (8, 128), (8, None)])
def test_import_of_marlin_24(bits, group, names, tmp_path):
    model = marlin_24_model()
    source = marlin_24_folder(tmp_path / "in", model, bits, group, names)
    imported(source, "--output", tmp_path / "packed", "--dtype", "float32")
    imported(source, "--output", tmp_path / "dense", "--to", "dense", "--dtype", "float32")
    for to, kind in (("packed", mk.Sparse24Linear), ("dense", nn.Linear)):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / to)
        assert type(loaded.get_submodule(LAYER)) is kind
        assert_same_bits(loaded(TOKENS).logits, model(TOKENS).logits)


def test_four_bits_of_marlin_24_stay_four_bits(tmp_path):
    """A block of int4 has the values of 128 columns; one at an end of the range gives the scale."""
    model = marlin_24_model()
    source = marlin_24_folder(tmp_path / "in", model)
    imported(source, "--output", tmp_path / "out", "--values", "int4", "--dtype", "float32")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, layer in loaded.named_modules():
        if isinstance(layer, mk.NMLinear):
            weight = model.get_submodule(name).weight
            assert layer.kind == "int4" and (layer.packed.unpack() - weight).norm() < 1e-3 * weight.norm()


def test_scales_of_two_groups_in_the_order_of_vllm():
    """It compares a group with all columns, so that two groups are in the order of many."""
    draw = torch.Generator().manual_seed(0)
    integers = torch.randint(1, 8, (64, 256), generator=draw) * torch.tensor([0, 1, 1, 0] * 64)
    scales = torch.rand(64, 2, generator=draw).half()
    values, metadata, in_one_order = marlin_24_tensors(integers, scales, 4)
    order = [i // 8 * 8 + [0, 4, 1, 5, 2, 6, 3, 7][i % 8] for i in range(64)]
    for names, stored in ((marlin_24.COMPRESSED_TENSORS, in_one_order), (marlin_24.VLLM, in_one_order[:, order])):
        found = marlin_24.marlin_24_weight("a", dict(zip(names, (values, metadata, stored), strict=True)))
        assert_same_bits(found, (integers * scales.float().repeat_interleave(128, 1)).half())


def changed_scheme(**settings):
    return reconfigure(lambda config: config["config_groups"]["group_0"]["weights"].update(settings))


VALUES, METADATA, SCALES = (f"{LAYER}.{part}" for part in marlin_24.COMPRESSED_TENSORS)
SHAPES = f"expected weight_packed int32 .K / 32, 2 out or 4 out., .* of {LAYER}, with out divisible by 64, got .*"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            rewrite(lambda t: t.pop(METADATA)),
            f"expected {LAYER}.weight_packed, .meta, .scale_packed, got none of .'met",
        ),
        (rewrite(lambda t: t.pop(VALUES)), f"expected {LAYER}.weight_packed, .*, got none of .'weight_packed'"),
        (rewrite(lambda t: t.update({f"{LAYER}.weight": torch.ones(4, 8)})), "expected .*weight_packed, got both in"),
        (rewrite(lambda t: t.update({VALUES: t[VALUES][:-1]})), SHAPES),
        (rewrite(lambda t: t.update({VALUES: t[VALUES][:, :-1].contiguous()})), SHAPES),
        (rewrite(lambda t: t.update({VALUES: t[VALUES].float()})), SHAPES),
        (rewrite(lambda t: t.update({METADATA: t[METADATA].flatten()})), SHAPES),
        (rewrite(lambda t: t.update({SCALES: t[SCALES][:2].contiguous()})), SHAPES),
        (rewrite(lambda t: t.update({SCALES: t[SCALES].bfloat16()})), SHAPES),
        (rewrite(lambda t: t[SCALES].view(-1)[3:4].fill_(torch.inf)), f"{SCALES}: expected finite scales, got NaN or"),
        (rewrite(lambda t: t[METADATA].view(-1)[5:6].fill_(0x4454)), f"{METADATA}: expected two places in order for"),
        (changed_scheme(num_bits=3), 'expected .* format marlin-24 .*, got weights .*"num_bits": 3'),
        (changed_scheme(symmetric=False), '"symmetric": false'),
        (changed_scheme(group_size=64), '"group_size": 64'),
        (changed_scheme(type="float"), '"type": "float"'),
        (
            reconfigure(lambda c: c["config_groups"]["group_0"].update(input_activations={"num_bits": 8})),
            'and activations unchanged, got .* and activations .*"num_bits": 8',
        ),
        (reconfigure(lambda c: c["config_groups"].update(group_0=[3])), "got weights null"),
        (reconfigure(lambda c: c.update(format="pack-quantized")), "got the format pack-quantized"),
    ],
)
def test_damaged_and_other_weights_in_marlin_24_are_refused(damage, message, tmp_path):
    source = marlin_24_folder(tmp_path / "in", marlin_24_model())
    damage(source)
    with pytest.raises(ValueError, match=f"^checkpoint: .*{message}"):
        write_plain(source, tmp_path / "out")


def test_a_single_shard_keeps_its_index(tmp_path):
    packed = mk.pack_24(torch.zeros(4, 8))
    (tmp_path / "in").mkdir()
    save_file(
        {"a.compressed": packed.values, "a.bitmask": packed.bitmask, "a.shape": torch.tensor([4, 8])},
        tmp_path / "in" / "model-00001-of-00001.safetensors",
    )
    assert write_plain(tmp_path / "in", tmp_path / "out")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["weight_map"] == {"a.weight": "model-00001-of-00001.safetensors"}


def test_bad_imports_are_refused_in_one_line(folder, tmp_path, capsys):
    source = compressed_folder(tmp_path / "in", masked(tiny_model(), random_masks(tiny_model())))
    (source / "model-0.safetensors").write_bytes((source / "model-0.safetensors").read_bytes()[:-9])
    model, pickled = folder / "model", tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(model / "config.json", pickled)
    torch.save(tiny_model().state_dict(), pickled / "pytorch_model.bin")
    for arguments, message in (
        ([pickled], "checkpoint: expected a folder with safetensors files"),
        ([tmp_path / "none" / "x" / "y"], "source: expected a file, a folder or an id"),
        ([model / "model.safetensors"], "model: expected the model of the masks in"),
        ([model], "pattern: expected one that some layer"),
        ([model, "--pattern", "2:5"], "pattern: expected N:M"),
        ([source], "expected a whole safetensors file"),
    ):
        imported(*arguments, "--output", tmp_path / "out", code=2)
        *_, line = capsys.readouterr().err.splitlines()
        assert message in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"[1,2]", b"{", b'{"a": "\xff"}', b"[" * 100_000])
@pytest.mark.parametrize("what", ["source", "model"])
def test_a_config_that_is_no_json_object_is_refused_by_name(what, content, folder, capsys):
    file = folder / "model" / "config.json"
    file.write_bytes(content)
    masks = [store(random_masks(tiny_model()), folder / "masks", "folder"), "--model"] if what == "model" else []
    imported(*masks, folder / "model", "--output", folder / "out", code=2)
    *_, line = capsys.readouterr().err.splitlines()
    assert f"{'model' if masks else 'checkpoint'}: expected a JSON object in '{file}'" in line


@pytest.mark.parametrize("name", ["model/z.safetensors", "m.npz", "m.pt", "masks/a.npz", "masks/a.pt"])
def test_pipes_are_refused_by_name(name, folder, capsys):
    (folder / "masks").mkdir()
    pipe = folder / name
    os.mkfifo(pipe)
    # otherwise a program that opens the pipe would wait for a writer
    writer = os.open(pipe, os.O_RDWR)
    source = pipe if pipe.parent == folder else pipe.parent
    more = [] if name.startswith("model") else ["--model", folder / "model"]
    imported(source, *more, "--output", folder / "out", code=2)
    os.close(writer)
    *_, line = capsys.readouterr().err.splitlines()
    expected = "regular files" if name.startswith("model") else "a file or a folder of files"
    assert f"expected {expected}, got '{pipe}'" in line


@pytest.mark.parametrize("name", ["none.safetensors", "../x.safetensors", 3, None])
def test_shards_that_are_not_in_the_folder_are_refused_by_name(name, folder, capsys):
    source = compressed_folder(folder / "in", masked(tiny_model(), random_masks(tiny_model())))
    shutil.copy(source / "model-0.safetensors", folder / "x.safetensors")
    index = json.loads((source / INDEX).read_text())
    index["weight_map"] = index["weight_map"] | {"model.norm.weight": name} if name else name
    (source / INDEX).write_text(json.dumps(index))
    imported(source, "--output", folder / "out", code=2)
    *_, line = capsys.readouterr().err.splitlines()
    assert f"checkpoint: expected an index of files in '{source}', got {name!r}" in line


@pytest.mark.parametrize("damage", ["weight", "tokenizer", "size", "format"])
def test_errors_of_a_decompressed_copy_name_its_source(damage, folder, capsys):
    source = compressed_folder(folder / "in", masked(tiny_model(), random_masks(tiny_model())))
    config = json.loads((source / "config.json").read_text())
    if damage == "weight":
        tensors = load_file(source / "model-0.safetensors")
        del tensors["model.embed_tokens.weight"]
        save_file(tensors, source / "model-0.safetensors", {"format": "pt"})
    elif damage == "tokenizer":
        (source / "tokenizer.json").unlink()
    elif damage == "size":
        config["vocab_size"] = 4_000_000
    else:
        config["quantization_config"] = {"format": ["x"]}
    (source / "config.json").write_text(json.dumps(config))
    imported(source, "--output", folder / "out", code=2)
    *lines_before, line = capsys.readouterr().err.splitlines()
    assert lines_before == ([] if damage == "format" else [f"loading {source}"])
    assert "the format ['x']" in line if damage == "format" else f"'{source}'" in line
    assert sorted(path.name for path in folder.iterdir()) == ["in", "model"]


def test_a_full_disk_for_a_decompressed_copy_names_the_output(tmp_path, capsys):
    source = compressed_folder(tmp_path / "in", masked(tiny_model(), random_masks(tiny_model())))
    with files_of_at_most(4096):
        imported(source, "--output", tmp_path / "out", code=2)
    *_, line = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'out'}/model-0.safetensors: " in line and "File too large" in line


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_weights_that_are_not_finite_are_refused_by_name(values, folder, capsys):
    model = masked(tiny_model(), random_masks(tiny_model()))
    weight = model.get_submodule(LAYER).weight.data
    weight[weight != 0] = torch.nan
    hf.save_model(model, tiny_tokenizer(), folder / "in")
    imported(folder / "in", "--output", folder / "out", "--values", values, code=2)
    *_, line = capsys.readouterr().err.splitlines()
    assert line == f"maskpro: error: source: expected finite weights, got NaN or infinity in {LAYER}"
    # the output head is not rounded
    model = masked(tiny_model(tie_word_embeddings=False), random_masks(tiny_model()))
    model.lm_head.weight.data[3, 5] = torch.nan
    hf.save_model(model, tiny_tokenizer(), folder / "head")
    imported(folder / "head", "--output", folder / "out", "--values", values)


def test_a_full_disk_is_an_oserror(tmp_path):
    source = compressed_folder(tmp_path / "in", masked(tiny_model(), random_masks(tiny_model())))
    with files_of_at_most(4096), pytest.raises(OSError, match="model-0.safetensors: .*File too large"):
        write_plain(source, tmp_path / "out")
