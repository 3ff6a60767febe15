"""Which patterns a checkpoint holds, dense or packed."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.checkpoints import COMPRESSED, LAYER, layers, masked, random_masks
from helpers.command import refuses
from helpers.tiny_llama import tiny_model
from safetensors.torch import save_file

import maskpro_kernels as mk
from maskpro_kernels import safetensors_files
from maskpro_kernels.checkpoints import survey
from maskpro_kernels.cli import main
from maskpro_kernels.prune.finalize import pack, unpack

pytestmark = pytest.mark.usefixtures("eager_reference")


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
    assert_same_bits({name: layer.weight for name, layer in layers(model).items()}, expected)
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


def test_of_a_dense_checkpoint_the_zeros_alone_tell_damage(tmp_path, capsys):
    """As docs/reproducibility.md says: nothing holds a digest of its kept weights."""
    weight = torch.tensor([[0.0, 1, 0, 2, 0, 0, 3, 4]])

    def told(place, bit):
        changed = weight.clone()
        changed.view(torch.int32)[0, place] ^= 1 << bit
        save_file({"a.weight": changed}, tmp_path / "model.safetensors")
        assert main.main(["validate", str(tmp_path)]) == 0
        return capsys.readouterr().out.splitlines()[-1]

    assert told(1, 5) == told(7, 22) == "1 of 1 follow 2:4, 4:8"
    assert told(0, 5) == "1 of 1 follow 5:8, 3:4"


def test_validate_refuses_what_is_no_checkpoint(tmp_path, capsys):
    refuses(capsys, tmp_path, ["validate", str(tmp_path)], "checkpoint: expected a folder with safetensors files")
    (tmp_path / "broken.safetensors").write_text("nothing")
    refuses(capsys, tmp_path, ["validate", str(tmp_path)], "checkpoint: expected a whole safetensors file")
    save_file({"a": torch.ones(3)}, tmp_path / "broken.safetensors")
    refuses(capsys, tmp_path, ["validate", str(tmp_path)], "checkpoint: expected matrices")
