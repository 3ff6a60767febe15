"""What others store: masks of MaskLLM and MaskPro, compressed-tensors' weights; which patterns a checkpoint holds."""

from __future__ import annotations

import io
import json
import random
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.command import refuses
from helpers.full_disk import files_of_at_most
from helpers.tiny_llama import tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import maskpro_kernels as mk
from maskpro_kernels import hf
from maskpro_kernels.checkpoints import safetensors_files, survey
from maskpro_kernels.checkpoints.importers import compressed_tensors, learned_masks
from maskpro_kernels.cli import main
from maskpro_kernels.pruning.finalize import pack, unpack

pytestmark = pytest.mark.usefixtures("eager_reference")

# Written by Sparse24BitMaskTensor of compressed-tensors 0.14.0.1: two weights, with -0.0 and with groups of fewer than
# two values; the same weights as they were before under names that begin with "dense."
COMPRESSED = Path(__file__).parent / "data" / "sparse24-bitmask.safetensors"
LAYER = "model.layers.0.mlp.down_proj"


def layers(model) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def random_masks(model, pattern="2:4") -> dict[str, torch.Tensor]:
    """bool masks of all layers but the head."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: mk.expand_mask(mk.top_n_mask(torch.rand(layer.weight.shape, generator=generator), pattern), pattern)
        for name, layer in layers(model).items()
        if name != "lm_head"
    }


def masked(model, masks):
    for name, mask in masks.items():
        layer = model.get_submodule(name)
        layer.weight.data = torch.where(mask, layer.weight, 0).detach()
    return model


@pytest.fixture
def folder(tmp_path):
    hf.save_model(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    return tmp_path


def store(masks, path, how):
    if how == "maskllm":
        np.savez_compressed(path, **{f"{name}.weight.mask": np.packbits(mask.numpy()) for name, mask in masks.items()})
    elif how == "dict":
        torch.save({f"{name}.mask": mask for name, mask in masks.items()}, path)
    else:
        path.mkdir()
        for name, mask in masks.items():
            torch.save(mask, path / f"{name}.pt")
    return path


@pytest.mark.parametrize(("how", "file"), [("maskllm", "m.npz"), ("dict", "m.pt"), ("folder", "masks")])
def test_masks_of_others(how, file, tmp_path):
    model = tiny_model()
    masks = random_masks(model)
    read = learned_masks.read_masks(store(masks, tmp_path / file, how), layers(model), "2:4")
    assert read.keys() == masks.keys()
    assert all(torch.equal(read[name], mask) for name, mask in masks.items())


@pytest.mark.parametrize("to", ["dense", "packed"])
def test_what_a_mask_drops_is_zero_where_a_group_keeps_fewer(folder, to):
    masks = random_masks(tiny_model())
    masks[LAYER][:, :4] = torch.tensor([False, False, False, True])
    arguments = ["import", str(store(masks, folder / "masks", "folder")), str(folder / "out"), "--to", to]
    assert main.main([*arguments, "--model", str(folder / "model")]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(folder / "out")
    layer = loaded.get_submodule(LAYER)
    assert layer.bias is None and loaded.dtype == torch.float32
    weight = layer.weight if to == "dense" else layer.packed.unpack()
    assert torch.equal(weight, masked(tiny_model(), masks).get_submodule(LAYER).weight)


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
    "expected bool masks, got Tensor 'a'": lambda p: stored(p, {"a": torch.ones(4, 8)}),
    "expected bool masks, got int 'a'": lambda p: stored(p, {"a": 3}),
    "expected at least one, got none": lambda p: stored(p, {}),
    "expected a file of bool masks": lambda p: (p / "masks.pt").write_text("nothing") and p / "masks.pt",
    "expected an .npz file of MaskLLM": lambda p: (p / "masks.npz").write_text("nothing") and p / "masks.npz",
    "expected 32 bits for a, got 64": (
        lambda p: np.savez(p / "m.npz", **{"a.mask": np.zeros(8, np.uint8)}) or p / "m.npz"
    ),
    "flat uint8 arrays expected, note.txt is none": zipped,
    "flat uint8 arrays expected, masks/data.pkl is none": (
        lambda p: stored(p, {"a": torch.ones(4, 8).bool()}).rename(p / "m.npz")
    ),
    "expected names of layers, got 3": lambda p: stored(p, {3: torch.zeros(4, 8).bool()}),
    "expected bool masks whose bytes are 0 or 1, got others in a": lambda p: stored(p, {"a": of_other_bytes()}),
    "expected bool masks whose bytes .*, got others in b": lambda p: stored(
        p, {"b": torch.ones(4, 8).bool().to_sparse()}
    ),
    "expected bool masks whose bytes .*, got others in c": lambda p: stored(
        p, {"c": torch.ones(4, 8, device="meta").bool()}
    ),
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


def test_what_compressed_tensors_wrote(tmp_path):
    (tmp_path / "in").mkdir()
    tensors = load_file(COMPRESSED)
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    settings = {"model_type": "llama", "quantization_config": {"sparsity_config": {"format": "sparse-24-bitmask"}}}
    (tmp_path / "in" / "config.json").write_text(json.dumps(settings))
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    assert compressed_tensors.decompress(tmp_path / "in", tmp_path / "out") == 2
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("layers.0.down", "layers.1.up"):
        dense = tensors[f"dense.{name}"]
        assert written[f"{name}.weight"].dtype == dense.dtype and torch.equal(written[f"{name}.weight"], dense)
        assert torch.equal(written[f"dense.{name}"], dense)
        assert not any(f"{name}.{part}" in written for part in ("compressed", "bitmask", "shape"))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "llama"}
    assert (tmp_path / "out" / "tokenizer.json").exists()


def compressed_folder(folder, model):
    """A checkpoint in compressed-tensors' format, in two files."""
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    tensors = [{}, {}]
    for i, (name, tensor) in enumerate(state.items()):
        if name.endswith("proj.weight"):
            packed = mk.pack_24(tensor)
            name = name.removesuffix(".weight")
            tensors[i % 2][f"{name}.compressed"] = packed.values
            tensors[(i + 1) % 2][f"{name}.bitmask"] = packed.bitmask
            tensors[i % 2][f"{name}.shape"] = torch.tensor(tensor.shape).view(-1, 1)
        else:
            tensors[i % 2][name] = tensor.clone()
    model.config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    for i, part in enumerate(tensors):
        save_file(part, folder / f"model-{i}.safetensors", {"format": "pt"})
    where = {name: f"model-{i}.safetensors" for i, part in enumerate(tensors) for name in part}
    (folder / safetensors_files.INDEX).write_text(json.dumps({"weight_map": where}))
    return folder


@pytest.mark.parametrize("to", ["dense", "packed"])
def test_import_of_a_compressed_checkpoint(to, tmp_path, capsys):
    model = masked(tiny_model(), random_masks(tiny_model()))
    source = compressed_folder(tmp_path / "in", model)
    arguments = ["import", str(source), str(tmp_path / "out"), "--to", to, "--dtype", "float32"]
    assert main.main(arguments) == 0
    assert f"{to} 2:4 checkpoint with 14 sparse layers written to" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    layer = loaded.get_submodule(LAYER)
    assert type(layer) is (nn.Linear if to == "dense" else mk.Sparse24Linear)
    tokens = torch.arange(12).view(1, 12)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("to", ["dense", "packed"])
@pytest.mark.parametrize("how", ["maskllm", "folder"])
def test_import_of_masks(how, to, folder, capsys):
    masks = random_masks(tiny_model())
    source = store(masks, folder / ("m.npz" if how == "maskllm" else "masks"), how)
    arguments = ["import", str(source), str(folder / "out"), "--model", str(folder / "model"), "--to", to]
    assert main.main([*arguments, "--dtype", "float32"]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(folder / "out")
    tokens = torch.arange(12).view(1, 12)
    assert torch.equal(loaded(tokens).logits, masked(tiny_model(), masks)(tokens).logits)


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
        main.main(["import", str(tmp_path / "in"), str(tmp_path / "out"), "--pattern", "4:8", "--dtype", "float32"])
        == 0
    )
    captured = capsys.readouterr()
    assert f"left dense: {LAYER} (100.0% of its groups do not follow 4:8)" in captured.err
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded.get_submodule(LAYER)) is nn.Linear
    assert type(loaded.get_submodule("model.layers.1.mlp.down_proj")) is mk.NMLinear
    tokens = torch.arange(12).view(1, 12)
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)


def test_bad_imports_are_refused(folder, tmp_path, capsys):
    output = str(tmp_path / "out")
    refuses(capsys, tmp_path, ["import", str(tmp_path / "none"), output], "source: expected a file or folder")
    refuses(capsys, tmp_path, ["import", str(folder / "model" / "config.json"), output], "model: expected the model")
    refuses(capsys, tmp_path, ["import", str(folder / "model"), str(folder / "model")], "output: expected a new or")
    refuses(capsys, tmp_path, ["import", str(folder / "model"), output], "pattern: expected one that some layer")
    refuses(capsys, tmp_path, ["import", str(folder / "model"), output, "--pattern", "2:5"], "pattern: expected N:M")
    source = compressed_folder(tmp_path / "in", masked(tiny_model(), random_masks(tiny_model())))
    file = source / "model-0.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(".compressed"))
    save_file(tensors | {name: tensors[name][:-1].clone()}, file, {"format": "pt"})
    refuses(capsys, tmp_path, ["import", str(source), output], "values of float32, bfloat16 or float16 in")
    file.write_bytes(file.read_bytes()[:-9])
    refuses(capsys, tmp_path, ["import", str(source), output], "expected a whole safetensors file")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop("a.shape"), "expected a.compressed, .bitmask, .shape, got none of .'shape'"),
        (lambda t: t.update({"a.shape": torch.tensor([4, 8, 1])}), "expected two positive integers in a.shape"),
        (lambda t: t.update({"a.shape": torch.tensor([-4, 8])}), "expected two positive integers in a.shape"),
        (
            lambda t: t.update({"a.shape": torch.tensor([2, 3]), "a.compressed": torch.ones(3)}),
            "expected rows of whole groups of 4 in a.shape, got .2, 3.",
        ),
        (lambda t: t.update({"a.shape": torch.tensor([4, 16])}), "expected 32 values of .* in a.compressed"),
        (lambda t: t.update({"a.bitmask": t["a.bitmask"] ^ 1}), "a.bitmask: expected exactly 2 of every 4"),
    ],
)
def test_damaged_compressed_weights_are_refused(change, told, tmp_path):
    packed = mk.pack_24(
        masked(nn.Sequential(nn.Linear(8, 4)), {"0": torch.tensor([[True, True, False, False] * 2] * 4)})[0].weight
    )
    tensors = {"a.compressed": packed.values, "a.bitmask": packed.bitmask, "a.shape": torch.tensor([4, 8])}
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"checkpoint: .*{told}"):
        compressed_tensors.decompress(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match=f"checkpoint: .*{told}"):
        list(survey.survey(safetensors_files.weight_files(tmp_path)))


@pytest.mark.parametrize("config", ["[]", "{", "\x00"])
def test_a_damaged_config_is_refused(config, tmp_path):
    source = compressed_folder(tmp_path / "in", masked(tiny_model(), random_masks(tiny_model())))
    (source / "config.json").write_text(config)
    with pytest.raises(ValueError, match="checkpoint: expected settings in config.json, got .*download it again"):
        compressed_tensors.decompress(source, tmp_path / "out")


def test_a_full_disk_is_told_as_one(tmp_path):
    source = compressed_folder(tmp_path / "in", masked(tiny_model(), random_masks(tiny_model())))
    with files_of_at_most(4096), pytest.raises(OSError, match="model-0.safetensors: .*File too large"):
        compressed_tensors.decompress(source, tmp_path / "out")


def test_a_single_shard_keeps_its_index(tmp_path):
    packed = mk.pack_24(torch.zeros(4, 8))
    (tmp_path / "in").mkdir()
    save_file(
        {"a.compressed": packed.values, "a.bitmask": packed.bitmask, "a.shape": torch.tensor([4, 8])},
        tmp_path / "in" / "model-00001-of-00001.safetensors",
    )
    assert compressed_tensors.decompress(tmp_path / "in", tmp_path / "out") == 1
    index = json.loads((tmp_path / "out" / safetensors_files.INDEX).read_text())
    assert index["weight_map"] == {"a.weight": "model-00001-of-00001.safetensors"}


def test_validate_reads_floats_of_8_bits(tmp_path):
    save_file({"a": torch.tensor([[0.0, 1, 0, -2]]).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    (row,) = survey.survey(safetensors_files.weight_files(tmp_path))
    assert row.density == 0.5 and row.patterns == ("1:2", "2:4")


def test_packing_and_unpacking_a_model():
    model = masked(tiny_model(), random_masks(tiny_model())).eval()
    expected = {name: layer.weight.clone() for name, layer in layers(model).items()}
    conversion = pack(model, "2:4")
    assert len(conversion.converted) == 14 and list(conversion.skipped) == ["lm_head"]
    unpack(model)
    assert all(torch.equal(layer.weight, expected[name]) for name, layer in layers(model).items())
    with pytest.raises(ValueError, match="pattern: expected one that some layer follows"):
        pack(tiny_model(), "2:4")


def test_validate_tells_what_a_checkpoint_holds(tmp_path, capsys):
    weight = torch.tensor([[0.0, 1, -0.0, 2, 0, 0, 3, 4]]).repeat(2, 1)
    dense = {"a.weight": weight, "b.weight": torch.ones(3, 24), "c.weight": torch.zeros(4), "d.weight": weight[:, :6]}
    save_file({name: tensor.contiguous() for name, tensor in dense.items()}, tmp_path / "dense.safetensors")
    rows = {row.name: row for row in survey.survey(safetensors_files.weight_files(tmp_path))}
    assert rows.keys() == {"a.weight", "b.weight", "d.weight"}
    a = rows["a.weight"]
    assert a.patterns == ("2:4", "4:8") and a.density == 0.5 and a.negative_zeros == 2 and a.shape == (2, 8)
    assert a.alignment == 8 and rows["b.weight"].alignment == 8 and rows["d.weight"].alignment == 2
    assert rows["b.weight"].patterns == () and not a.packed
    assert main.main(["validate", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "50.00%" in out and "2:4, 4:8" in out and "none" in out
    assert out.splitlines()[-3:] == ["1 of 3 follow 2:4, 4:8", "1 of 3 follow no pattern", "1 of 3 follow 1:2"]
    # the logits of a run are no weights of its checkpoint
    logits = tmp_path / "logits.safetensors"
    save_file({"a": torch.rand(2, 8)}, logits)
    assert main.main(["validate", str(tmp_path)]) == 0
    assert capsys.readouterr().out == out
    assert main.main(["validate", str(logits)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 of 1 follow no pattern"


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "8:16"])
def test_validate_unpacks(pattern, tmp_path):
    weight = torch.where(random_masks(tiny_model(), pattern)[LAYER], torch.ones(32, 64), 0)
    packed = mk.pack_nm(weight, pattern)
    save_file({"a.values": packed.values, "a.bitmask": packed.bitmask}, tmp_path / "packed.safetensors")
    (row,) = survey.survey(safetensors_files.weight_files(tmp_path))
    assert row.name == "a.weight" and row.packed and pattern in row.patterns and row.shape == (32, 64)
    save_file({"a.values": packed.values, "a.bitmask": packed.bitmask ^ 1}, tmp_path / "packed.safetensors")
    with pytest.raises(ValueError, match="expected a bitmask in a that keeps N of every M"):
        list(survey.survey(safetensors_files.weight_files(tmp_path)))


def test_validate_takes_weights_for_packed_where_a_bitmask_is_there(tmp_path):
    tensors = {"a.weight": torch.ones(8, 8), "mem.values": torch.ones(3, 3), "b.bitmask": torch.ones(2, 2)}
    tensors |= {"c.values": torch.ones(2, 8), "c.bitmask": torch.ones(2, 8)}
    save_file(tensors, tmp_path / "model.safetensors")
    rows = list(survey.survey(safetensors_files.weight_files(tmp_path)))
    assert {row.name: (row.shape, row.packed) for row in rows} == {
        name: (tuple(tensor.shape), False) for name, tensor in tensors.items()
    }


def test_validate_reads_compressed_tensors():
    rows = {row.name: row for row in survey.survey([COMPRESSED])}
    assert rows["layers.0.down.weight"].packed and "2:4" in rows["layers.0.down.weight"].patterns
    assert rows["layers.0.down.weight"].density == rows["dense.layers.0.down"].density
    assert rows["dense.layers.0.down"].negative_zeros > 0


def test_validate_refuses_what_is_no_checkpoint(tmp_path, capsys):
    refuses(capsys, tmp_path, ["validate", str(tmp_path)], "checkpoint: expected a folder with safetensors files")
    (tmp_path / "broken.safetensors").write_text("nothing")
    refuses(capsys, tmp_path, ["validate", str(tmp_path)], "checkpoint: expected a whole safetensors file")
    save_file({"a": torch.ones(3)}, tmp_path / "broken.safetensors")
    refuses(capsys, tmp_path, ["validate", str(tmp_path)], "checkpoint: expected matrices")
