"""`maskpro export --to mask` and `maskpro apply`: a mask travels without weights, and its checkpoint comes back."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.command import learn, refuses
from helpers.tiny_llama import tiny_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from maskpro_kernels.checkpoints import masked_copy
from maskpro_kernels.checkpoints.mask_file import MaskFile, save_masks
from maskpro_kernels.cli import main
from maskpro_kernels.cli.mask_files import put_masks
from maskpro_kernels.cli.run_files import INITIAL_MASK
from maskpro_kernels.prune.initial_masks import top_n_mask
from maskpro_kernels.unfuse import in_linear_form

pytestmark = pytest.mark.usefixtures("eager_reference")


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """(mask file, dense checkpoint) of a run."""
    folder = tmp_path_factory.mktemp("exported")
    assert main.main(["export", str(run), str(folder / "mask"), "--to", "mask"]) == 0
    assert main.main(["export", str(run), str(folder / "dense")]) == 0
    return folder / "mask", folder / "dense"


def test_the_checkpoint_comes_back_byte_for_byte(inputs, exported, tmp_path, capsys):
    """Whether the base is copied or loaded: it was saved by the same transformers, into one file."""
    mask, dense = exported
    expected = {path.name: path.read_bytes() for path in dense.iterdir()}
    for name, more in (("copied", []), ("loaded", ["--max-shard-size", "5GB"])):
        assert main.main(["apply", str(mask), str(inputs / "model"), str(tmp_path / name), *more]) == 0
        told = capsys.readouterr().out
        of = f"under the masks of the file of digest {MaskFile(mask).digest} written to"
        assert f"dense 2:4 checkpoint of {inputs / 'model'} {of}" in told
        written = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        assert written.keys() == expected.keys()
        for file in written.keys() - {"README.md"}:
            assert written[file] == expected[file], file
        # what it tells of where it comes from, too
        card, _ = written["README.md"].decode().replace(f"# {name}", "# dense").split("<!--")
        assert card.replace(f'("{name}")', '("dense")') == expected["README.md"].decode().split("<!--")[0]


def test_against_the_mask_by_magnitude_no_file_is_needed(inputs, run, exported, tmp_path, capsys):
    assert main.main(["export", str(run), str(tmp_path / "mask"), "--to", "mask", "--against", "magnitude"]) == 0
    told = capsys.readouterr()
    mask = MaskFile(tmp_path / "mask")
    alone = mask.needs is None
    assert alone == ("the initial mask differs in so many groups" in told.err)
    assert alone or "against the mask by magnitude" in told.out
    for name, more in (("copied", []), ("loaded", ["--max-shard-size", "5GB"])):
        assert main.main(["apply", str(tmp_path / "mask"), str(inputs / "model"), str(tmp_path / name), *more]) == 0
        assert_same_bits(*(load_file(folder / "model.safetensors") for folder in (tmp_path / name, exported[1])))


@pytest.mark.parametrize("damage", ["cut short", "no index", "an index of nothing"])
def test_a_damaged_base_is_told_in_one_line(inputs, exported, tmp_path, capsys, damage):
    shutil.copytree(inputs / "model", tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    if damage == "cut short":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        weights.unlink()
        (tmp_path / "base" / "model.safetensors.index.json").write_text("{}" if damage == "no index" else "")
    refuses(capsys, tmp_path, ["apply", str(exported[0]), str(tmp_path / "base"), str(tmp_path / "out")], "model: ")


def test_an_error_within_the_copy_leaves_nothing(inputs, exported, tmp_path, capsys, monkeypatch):
    AutoModelForCausalLM.from_pretrained(inputs / "model").save_pretrained(tmp_path / "base", max_shard_size="20KB")
    shutil.copy(inputs / "model" / "tokenizer.json", tmp_path / "base")
    copy, files = masked_copy._copy_file, []

    def failing(mask, source, target):
        files.append(target)
        if len(files) > 1:
            # as of a tokenizer with further templates
            (target.parent / "folder").mkdir()
            (target.parent / "folder" / "file").touch()
            raise OSError(28, "No space left on device")
        copy(mask, source, target)

    monkeypatch.setattr(masked_copy, "_copy_file", failing)
    out = tmp_path / "new" / "out"
    refuses(
        capsys, tmp_path, ["apply", str(exported[0]), str(tmp_path / "base"), str(out)], "output: ", "No space left"
    )
    assert len(files) == 2 and not out.parent.exists()


def test_a_base_that_is_a_run_gives_no_report(inputs, run, exported, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(inputs / "model", base)
    for name in ("report.json", "settings.json"):
        shutil.copy(run / name, base)
    assert main.main(["apply", str(exported[0]), str(base), str(tmp_path / "out")]) == 0
    assert not {"report.json", "settings.json"} & {path.name for path in (tmp_path / "out").iterdir()}


def test_against_the_initial_mask_it_is_smaller(inputs, run, exported, tmp_path, capsys):
    initial = run / "progress" / INITIAL_MASK
    assert MaskFile(initial).provenance["of"].endswith("mask that a run began with")
    assert main.main(["export", str(run), str(tmp_path / "mask"), "--to", "mask", "--against", str(initial)]) == 0
    assert (tmp_path / "mask").stat().st_size < exported[0].stat().st_size
    apply = ["apply", str(tmp_path / "mask"), str(inputs / "model"), str(tmp_path / "out")]
    refuses(capsys, tmp_path, apply, "against: expected the initial mask that", "got no file")
    refuses(capsys, tmp_path, [*apply, "--against", "magnitude"], "got 'magnitude', which is no file")
    assert main.main([*apply, "--against", str(initial)]) == 0
    assert_same_bits(*(load_file(folder / "model.safetensors") for folder in (tmp_path / "out", exported[1])))
    out = str(tmp_path / "more")
    needless = ["apply", str(exported[0]), str(inputs / "model"), out, "--against", str(initial)]
    refuses(capsys, tmp_path, needless, "against: expected none, since")


def test_equal_masks_are_known_by_their_digest(run, exported, tmp_path, capsys):
    """Alone and against an initial mask they lie in different files."""
    initial, told = run / "progress" / INITIAL_MASK, {}
    for name, more in (("alone", []), ("changes", ["--against", str(initial)])):
        assert main.main(["export", str(run), str(tmp_path / name), "--to", "mask", *more]) == 0
        out = capsys.readouterr().out
        told[name] = re.search(r"masks (\w{32}), file digest (\w{32})$", out.strip()).groups()
        mask = MaskFile(tmp_path / name, MaskFile(initial))
        assert told[name] == (mask.digest_of_codes(), mask.digest)
        stored = sum(tensor.numel() for tensor in load_file(tmp_path / name).values())
        groups = sum(mask.codes(layer).numel() for layer in mask.layers)
        assert f"of which {stored:,} bytes are masks, {8 * stored / groups:.3f} bits a group" in out
    assert told["alone"][0] == told["changes"][0] and told["alone"][1] != told["changes"][1]
    assert "2.6" in f"{8 * MaskFile(tmp_path / 'alone').mask_bytes / groups:.3f}"


def test_validate_tells_what_a_mask_file_holds(inputs, run, exported, tmp_path, capsys, monkeypatch):
    initial, weights = run / "progress" / INITIAL_MASK, load_file(inputs / "model" / "model.safetensors")
    layers = [(name, weights[f"{name}.weight"]) for name in MaskFile(initial).layers]
    triples = [(name, top_n_mask(weight.abs(), "2:4"), weight) for name, weight in layers]
    for name, against in (("changes", MaskFile(initial)), ("magnitude", "magnitude")):
        save_masks(tmp_path / name, triples, "2:4", model="a name\n", against=against).close()
    monkeypatch.chdir(tmp_path)
    needs = {
        str(exported[0]): "none needed",
        str(initial): "none needed",
        "changes": f"needed, the file of digest {MaskFile(initial).digest}: name it by `maskpro apply --against`",
        "magnitude": "that by magnitude, which the base tells: no file is needed",
    }
    for path, needed in needs.items():
        assert main.main(["validate", path]) == 0
        found = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
        mask = MaskFile(path, MaskFile(initial))
        assert found["mask file"] == f"2:4, 14 layers, {mask.groups:,} groups"
        assert found["base model"] == f"{mask.model!r}, weights in float32, fingerprint {mask.base}"
        assert found["initial mask"] == needed
        assert found["file digest"] == f"{mask.digest}, what is in the file has it"
        assert ("masks" in found) == (needed == "none needed")
        if "masks" in found:
            assert found["masks"] == mask.digest_of_codes()
        if path == str(exported[0]):
            assert found["run"] == f'"{mask.provenance["run"]}"' and 'estimator="reinforce"' in found["settings"]
        else:
            assert found["run"] == "not told"


def test_validate_refuses_a_damaged_mask_file(exported, tmp_path, capsys):
    content = exported[0].read_bytes()
    for name in ("mine.mask", "mine.safetensors"):
        path = tmp_path / name
        # a header, then the masks
        for place in (9, 40, len(content) // 2, len(content) - 1):
            flipped = bytearray(content)
            flipped[place] ^= 1
            path.write_bytes(flipped)
            refuses(capsys, tmp_path, ["validate", str(path)], "checkpoint: expected", str(path))
        path.write_bytes(content[:-1])
        refuses(capsys, tmp_path, ["validate", str(path)], "checkpoint: expected", str(path))
        path.write_bytes(content)
        assert main.main(["validate", str(path)]) == 0


def test_a_base_in_several_files(inputs, exported, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(inputs / "model")
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    shutil.copy(inputs / "model" / "tokenizer.json", tmp_path / "base")
    assert main.main(["apply", str(exported[0]), str(tmp_path / "base"), str(tmp_path / "out")]) == 0
    files = sorted(path.name for path in (tmp_path / "base").glob("*.safetensors"))
    assert len(files) > 1 and files == sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    models = map(AutoModelForCausalLM.from_pretrained, (tmp_path / "out", exported[1]))
    assert_same_bits(*(dict(model.state_dict()) for model in models))


def test_how_the_base_generates_is_kept(inputs, exported, tmp_path):
    """Ends of turns, for one, may stand in no other file."""
    shutil.copytree(inputs / "model", tmp_path / "base")
    told = {"eos_token_id": [3, 4], "do_sample": True, "temperature": 0.7, "max_new_tokens": 77}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(told))
    for name, more in (("copied", []), ("loaded", ["--max-shard-size", "5GB"])):
        assert main.main(["apply", str(exported[0]), str(tmp_path / "base"), str(tmp_path / name), *more]) == 0
        written = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert {key: written[key] for key in told} == told


def test_another_base_is_refused_with_both_fingerprints(inputs, exported, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(inputs / "model")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1
    model.save_pretrained(tmp_path / "model")
    shutil.copy(inputs / "model" / "tokenizer.json", tmp_path / "model")
    fingerprint = MaskFile(exported[0]).base
    for more in ([], ["--max-shard-size", "5GB"]):
        told = "1 of 14 layers differ, such as model.layers.1.mlp.up_proj"
        refuses(
            capsys, tmp_path, ["apply", str(exported[0]), str(tmp_path / "model"), str(tmp_path / "out"), *more],
            f"of fingerprint {fingerprint}, got one of fingerprint ", told,
        )  # fmt: skip


def test_a_base_stored_in_another_dtype(inputs, exported, tmp_path):
    """It is loaded in the dtype of the mask."""
    AutoModelForCausalLM.from_pretrained(inputs / "model").double().save_pretrained(tmp_path / "base")
    shutil.copy(inputs / "model" / "tokenizer.json", tmp_path / "base")
    assert main.main(["apply", str(exported[0]), str(tmp_path / "base"), str(tmp_path / "out")]) == 0
    assert_same_bits(*(load_file(folder / "model.safetensors") for folder in (tmp_path / "out", exported[1])))


def test_weights_that_are_stored_transposed(tmp_path):
    """As GPT-2's are, square ones among them: the model is loaded, and its layers taken apart."""
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 300, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    with in_linear_form(model):
        linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        layers = [
            (n, top_n_mask(m.weight.detach().abs(), "2:4"), m.weight.detach()) for n, m in linears.items() if "h." in n
        ]
        save_masks(tmp_path / "mask", layers, "2:4", model="tiny").close()
    assert layers
    assert main.main(["apply", str(tmp_path / "mask"), str(tmp_path / "base"), str(tmp_path / "out")]) == 0
    put_masks(MaskFile(tmp_path / "mask"), model)
    assert_same_bits(dict(model.state_dict()), dict(GPT2LMHeadModel.from_pretrained(tmp_path / "out").state_dict()))


def test_options_without_effect_are_refused(run, tmp_path, capsys):
    export = ["export", str(run), str(tmp_path / "out")]
    for option in (["--dtype", "bfloat16"], ["--values", "int8"], ["--max-shard-size", "5GB"]):
        refuses(capsys, tmp_path, [*export, "--to", "mask", *option], f"leave {option[0]} out")
    refuses(capsys, tmp_path, [*export, "--against", "magnitude"], "against: expected none without --to mask")
    (tmp_path / "there").write_text("mine")
    arguments = ["export", str(run), str(tmp_path / "there"), "--to", "mask"]
    refuses(capsys, tmp_path, arguments, "output: expected a new file")
    arguments = [*export, "--to", "mask", "--against", str(tmp_path / "there")]
    refuses(capsys, tmp_path, arguments, "against: expected a mask file")
    weights = torch.ones(4, 8)
    save_masks(tmp_path / "4:8", [("a", top_n_mask(weights, "4:8"), weights)], "4:8", model="tiny").close()
    arguments = [*export, "--to", "mask", "--against", str(tmp_path / "4:8")]
    refuses(capsys, tmp_path, arguments, "against: expected a mask of 2:4, got one of 4:8")


def test_a_mask_over_changed_weights_is_refused(inputs, tmp_path, capsys):
    assert main.main([*learn(inputs, tmp_path / "run"), "--refit", "scales"]) == 0
    assert not (tmp_path / "run" / "progress" / INITIAL_MASK).exists()
    arguments = ["export", str(tmp_path / "run"), str(tmp_path / "mask"), "--to", "mask"]
    refuses(capsys, tmp_path, arguments, "run: expected a mask of the weights of the base model, got scales refitted")


def test_a_file_holds_no_path(inputs, run, exported):
    for path in (exported[0], run / "progress" / INITIAL_MASK):
        assert str(inputs).encode() not in path.read_bytes()
        assert MaskFile(path).model == "model"


def test_what_another_program_tells_is_left_out(inputs, run, exported, tmp_path, capsys):
    mask = MaskFile(exported[0])
    weights = load_file(inputs / "model" / "model.safetensors")
    layers = [(name, mask.codes(name), weights[f"{name}.weight"]) for name in mask.layers]
    other = {"origin": {"table": [{}]}}
    save_masks(tmp_path / "mask", layers, "2:4", model="tiny", provenance=other).close()
    assert main.main(["apply", str(tmp_path / "mask"), str(inputs / "model"), str(tmp_path / "out")]) == 0
    assert "what the mask file tells of its run is left out" in capsys.readouterr().err
    assert (tmp_path / "out" / "README.md").exists()
