"""Digests of a checkpoint with packed weights or masks: what is changed in it is refused or told, and how to go on."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.checkpoints import reconfigure, rewrite
from helpers.command import refuses
from helpers.tiny_llama import tiny_model, tiny_tokenizer, write_inputs
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import maskpro_kernels as mk
from maskpro_kernels import hf
from maskpro_kernels.cli import main
from maskpro_kernels.cli.parser import build_parser
from maskpro_kernels.hf import stored_layers
from maskpro_kernels.stored_digests import ON_PURPOSE

pytestmark = pytest.mark.usefixtures("eager_reference")

LAYER = "model.layers.{}.mlp.down_proj"
TOKENS = torch.arange(12).view(1, 12)
SWITCH = (
    r"load it within maskpro_kernels.hf.without_digests\(\), and save it again; `maskpro eval`, `import`, `validate` "
    "and `speed` take --no-digests"
)


def stored(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]["digests"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folder with a checkpoint of packed weights, and one of masks."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model = tiny_model()
    mk.convert(model, "2:4")
    hf.save_model(model, tiny_tokenizer(), folder / "masked")
    hf.save_model(mk.finalize(model, to="packed"), tiny_tokenizer(), folder / "packed")
    return folder


@pytest.fixture(params=["packed", "masked"])
def folder(request, checkpoints, tmp_path):
    return shutil.copytree(checkpoints / request.param, tmp_path / request.param)


def flipped_sign(tensors):
    name = f"{LAYER.format(0)}.{'values' if f'{LAYER.format(0)}.values' in tensors else 'logits'}"
    tensors[name].view(torch.int32)[3, 1] ^= -(1 << 31)


def flipped_embedding(tensors):
    tensors["model.embed_tokens.weight"].view(torch.int32)[3, 1] ^= 1


def swapped_names(tensors):
    one, other = (sorted(name for name in tensors if name.startswith(LAYER.format(i))) for i in range(2))
    for first, second in zip(one, other, strict=True):
        tensors[first], tensors[second] = tensors[second], tensors[first]


def one_dtype(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()


DAMAGES = {
    "a sign": (flipped_sign, f"got {LAYER.format(0)}.(values|logits) damaged or changed"),
    "another weight": (flipped_embedding, "got model.embed_tokens.weight damaged or changed"),
    "names": (swapped_names, f"got {LAYER.format(0)}.* damaged or changed, as . others are"),
    "a dtype": (one_dtype, "got model.norm.weight damaged or changed"),
    "one less": (lambda tensors: tensors.pop("model.norm.weight"), "got model.norm.weight missing"),
    "one more": (lambda tensors: tensors.update(x=torch.ones(2)), "got x there"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_changed_tensors_are_refused_by_name(damage, folder):
    change, told = DAMAGES[damage]
    rewrite(change)(folder)
    with pytest.raises(
        ValueError, match=f"^checkpoint: expected the .* tensors that it was saved with, {told}.*{SWITCH}"
    ):
        AutoModelForCausalLM.from_pretrained(folder)
    with hf.without_digests():
        loaded = AutoModelForCausalLM.from_pretrained(folder)
    # as the message says, it is saved again
    loaded.save_pretrained(folder / "again")
    again = AutoModelForCausalLM.from_pretrained(folder / "again")
    assert_same_bits(again(TOKENS).logits, loaded(TOKENS).logits)


def test_the_pattern_of_a_layer_is_covered(checkpoints, tmp_path):
    """Here it would fit the shapes: the layer has as many values either way."""
    folder = shutil.copytree(checkpoints / "packed", tmp_path / "packed")
    names = json.loads((folder / "config.json").read_text())["quantization_config"]["patterns"]["2:4"]
    reconfigure(lambda config: config.update(patterns={"2:4": names[1:], "4:8": names[:1]}))(folder)
    with pytest.raises(ValueError, match=f"got quantization_config.patterns.*damaged or changed.*{SWITCH}"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_checkpoint_without_digests_is_refused(folder):
    reconfigure(lambda config: config.pop("digests"))(folder)
    with pytest.raises(ValueError, match=f"^checkpoint: expected digests of its tensors .*, got none.*{SWITCH}"):
        AutoModelForCausalLM.from_pretrained(folder)
    for wrong in (3, {"tensors": 3}, {"tensors": {}}):
        reconfigure(lambda config, wrong=wrong: config.update(digests=wrong))(folder)
        with pytest.raises((TypeError, ValueError), match="expected (tables of digests|digests of its tensors)"):
            AutoModelForCausalLM.from_pretrained(folder)


def test_a_config_that_was_saved_alone_is_told(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"written by config.save_pretrained alone\? save the model instead"):
        AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder)


def test_settings_that_were_changed_are_told(folder, recwarn):
    AutoModelForCausalLM.from_pretrained(folder)
    assert not recwarn.list
    config = json.loads((folder / "config.json").read_text())
    config["rms_norm_eps"] = 1e-4
    config["rope_parameters"]["rope_theta"] = 20000.0
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="was changed since it was saved: rms_norm_eps, rope_parameters.rope_theta; "):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.rms_norm_eps == 1e-4


def test_a_loaded_model_that_changes_is_saved_with_new_digests(folder):
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert "digests" not in loaded.config.to_dict()["quantization_config"]
    loaded.bfloat16().save_pretrained(folder / "again")
    assert stored(folder / "again")["tensors"].keys() == stored(folder)["tensors"].keys()
    again = AutoModelForCausalLM.from_pretrained(folder / "again", dtype=torch.bfloat16)
    assert_same_bits(dict(again.state_dict()), dict(loaded.state_dict()))


def test_the_config_of_a_loaded_model_loads_it_again(folder):
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    config = type(loaded.config).from_dict(loaded.config.to_dict())
    again = AutoModelForCausalLM.from_pretrained(folder, config=config)
    assert_same_bits(dict(again.state_dict()), dict(loaded.state_dict()))


def test_shards_have_the_digests_of_one_file(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    # files of before, of which one is written anew
    model.save_pretrained(folder / "again")
    model.save_pretrained(folder / "sharded", max_shard_size="20KB")
    files = sorted((folder / "sharded").glob("*.safetensors"))
    assert len(files) > 1
    assert stored(folder / "sharded")["tensors"] == stored(folder / "again")["tensors"] == stored(folder)["tensors"]
    AutoModelForCausalLM.from_pretrained(folder / "sharded")
    content = files[1].read_bytes()
    files[1].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="damaged or changed"):
        AutoModelForCausalLM.from_pretrained(folder / "sharded")


def test_weights_beside_the_checkpoint_have_no_digests(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    save_file({"x": torch.ones(2)}, folder / "other.safetensors")
    model.save_pretrained(folder)
    assert "x" not in stored(folder)["tensors"]
    AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_files_that_look_as_before_get_digests_too(folder, tmp_path, size, monkeypatch):
    """Written anew in the same tick of a file system's clock, into the same inode."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again", max_shard_size=size)
    before = stored(tmp_path / "again")
    monkeypatch.setattr(stored_layers, "_weights_in", lambda folder: dict.fromkeys(folder.glob("*.safetensors"), (0,)))
    model.save_pretrained(tmp_path / "again", max_shard_size=size)
    assert stored(tmp_path / "again")["tensors"] == before["tensors"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "again")


def test_the_hub_gets_the_digests(folder, monkeypatch):
    uploaded = []

    class Hub:
        def create_repo(self, repo_id, **_):
            return type("Repository", (), {"repo_id": repo_id})

    def upload(self, working_dir, repo_id, *_, **__):
        uploaded.append(stored(folder / "again"))

    loaded = AutoModelForCausalLM.from_pretrained(folder)
    monkeypatch.setattr("transformers.modeling_utils.hf_api", Hub)
    monkeypatch.setattr("transformers.modeling_utils.create_and_tag_model_card", lambda *_, **__: CardOfNothing)
    monkeypatch.setattr(type(loaded), "_upload_modified_files", upload)
    loaded.save_pretrained(folder / "again", push_to_hub=True, repo_id="owner/name")
    assert uploaded == [stored(folder / "again")] and uploaded[0]["tensors"] == stored(folder)["tensors"]
    assert "_upload_modified_files" not in vars(loaded)


class CardOfNothing:
    def save(path):
        pass


def test_commands_refuse_and_take_the_switch(folder, tmp_path, capsys):
    write_inputs(tmp_path)
    data = ["--data", str(tmp_path / "text.txt"), "--device", "cpu", "--eval-windows", "2", "--eval-length", "16"]
    evaluate = ["eval", str(folder), "--dtype", "float32", *data]
    assert main.main(["validate", str(folder)]) == 0
    assert (
        f"all {len(stored(folder)['tensors'])} tensors have the digests that they were saved" in capsys.readouterr().out
    )
    rewrite(flipped_sign)(folder)
    for command in (evaluate, ["validate", str(folder)]):
        assert main.main(command) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("maskpro: error: ") and f"{LAYER.format(0)}." in line and "--no-digests" in line
        assert main.main([*command, "--no-digests"]) == 0
        capsys.readouterr()


def test_validate_refuses_what_loading_refuses_before_its_table(folder, capsys):
    assert main.main(["validate", str(folder)]) == 0
    good = (folder / "config.json").read_bytes()
    for change, told in (
        (lambda config: config.pop("digests"), "expected digests of its tensors"),
        (lambda config: config.update(format="x"), "got quantization_config.format damaged or changed"),
    ):
        reconfigure(change)(folder)
        refuses(capsys, folder, ["validate", str(folder)], told)
        (folder / "config.json").write_bytes(good)
    (folder / "config.json").write_bytes(good[:-9])
    refuses(capsys, folder, ["validate", str(folder)], "checkpoint: expected")
    (folder / "config.json").write_bytes(good)
    rewrite(flipped_sign)(folder)
    refuses(capsys, folder, ["validate", str(folder)], "damaged or changed")


def test_validate_tells_changed_settings(folder, capsys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    assert main.main(["validate", str(folder)]) == 0
    assert "was changed since it was saved: rms_norm_eps" in capsys.readouterr().err


def test_validate_of_one_file_compares_what_is_in_it(folder, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    file = sorted((tmp_path / "sharded").glob("*.safetensors"))[1]
    count = len(load_file(file))
    assert main.main(["validate", str(file)]) == 0
    assert f"all {count} tensors have the digests" in capsys.readouterr().out
    save_file({"x": torch.ones(2, 4)}, tmp_path / "sharded" / "other.safetensors")
    assert main.main(["validate", str(tmp_path / "sharded" / "other.safetensors")]) == 0
    assert "digests" not in capsys.readouterr().out
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refuses(capsys, tmp_path, ["validate", str(file)], "damaged or changed")


def test_the_switch_is_told_of_the_commands_that_have_it():
    told = set(re.findall(r"`(?:maskpro )?(\w+)`", ON_PURPOSE))
    (commands,) = (action.choices for action in build_parser()._actions if isinstance(action.choices, dict))
    assert told == {name for name, parser in commands.items() if "--no-digests" in parser._option_string_actions}


def test_what_is_told_of_a_checkpoint_has_one_cure(folder):
    reconfigure(lambda config: config.pop("digests"))(folder)
    with pytest.raises(ValueError, match="take that file from where the checkpoint comes from") as told:
        hf.load_model(str(folder), torch.float32)
    assert "copy or download it again" not in str(told.value)


def test_dense_checkpoints_have_none(tmp_path):
    model = tiny_model()
    mk.convert(model, "2:4")
    mk.finalize(model).save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert load_file(tmp_path / "model.safetensors")
