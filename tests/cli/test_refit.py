"""Runs whose weights are refitted: what they keep, and that nobody takes their masks for the whole result."""

from __future__ import annotations

import shlex
import shutil

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.cases import slow
from helpers.command import broken_off, learn, nonzeros, refuses, report
from helpers.damage import edit
from helpers.routes import route_to_the_eager_reference
from helpers.tiny_llama import tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import maskpro_kernels as mk
from maskpro_kernels.checkpoints.logits import load_logits, write_logits
from maskpro_kernels.cli import main
from maskpro_kernels.modules import masked_layers
from maskpro_kernels.prune.refit import put_weights

pytestmark = pytest.mark.usefixtures("eager_reference")

STRAIGHT_THROUGH = "--estimator straight-through --lr 1 --init reconstruction --refit".split()
WAYS = {
    "weights": [*STRAIGHT_THROUGH, "weights"],
    "scales": [*STRAIGHT_THROUGH, "scales"],
    "of a mask that stays": "--init wanda --refit weights".split(),
}
EVALUATED = "--eval-windows 5 --eval-length 24 --device cpu".split()


class Killed(BaseException):
    pass


def kill():
    raise Killed


@pytest.fixture(scope="module", params=[slow(way) if way != "weights" else way for way in WAYS])
def refitted(request, inputs, tmp_path_factory):
    """(options, folder) of a run that has ended."""
    folder = tmp_path_factory.mktemp("refitted") / "run"
    options = [*WAYS[request.param], "--steps", "4", "--eval-every", "2"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        route_to_the_eager_reference(monkeypatch)
        assert main.main(learn(inputs, folder, *options)) == 0
    return options, folder


def test_table_and_report_tell_it(refitted, inputs, capsys):
    options, run = refitted
    written = report(run)
    told = f"{options[-5]} refitted"
    estimator = "straight-through" if "straight-through" in options else "reinforce"
    init = options[options.index("--init") + 1]
    methods = [row["method"] for row in written["table"]]
    assert methods == ["dense", "magnitude", "wanda", f"{init}, {told}", f"{estimator}, {told}"]
    assert written["weights"] == told and written["start"] == f"{init}, {told}"
    page = (run / "report.html").read_text(encoding="utf-8")
    assert f"The weights are not those of the dense model: {told}." in page
    assert main.main(["eval", str(run), "--data", str(inputs / "text.txt"), *EVALUATED]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"test perplexity {written['table'][-1]['perplexity']:.2f} over 5 windows of 24 tokens"
    assert lines[4:] == [f"not the dense model's weights under a mask: {told}"]


def test_the_checkpoint_holds_the_refitted_weights_under_the_learned_masks(refitted, inputs):
    _, run = refitted
    learned, checkpoint, dense = load_logits(run / "logits.safetensors"), tiny_model(), tiny_model()
    checkpoint.load_state_dict(AutoModelForCausalLM.from_pretrained(run).state_dict())
    assert learned.weights.keys() == learned.logits.keys() == set(report(run)["converted"])
    for name, weight in learned.weights.items():
        kept = mk.expand_mask(mk.top_n_mask(learned.logits[name], "2:4"), "2:4")
        assert (weight != dense.get_submodule(name).weight).any()
        assert_same_bits(checkpoint.get_submodule(name).weight, torch.where(kept, weight, 0.0))
        assert (nonzeros(checkpoint, name) == 2).all()
    # and by hand, as a user without the command would
    codes = {name: mk.top_n_mask(logits, "2:4") for name, logits in learned.logits.items()}
    mk.convert(dense, "2:4", targets=list(codes), init=codes)
    put_weights(masked_layers(dense), learned.weights)
    mk.finalize(dense)
    assert_same_bits(dict(dense.state_dict()), dict(checkpoint.state_dict()))


def test_masks_alone_are_refused(refitted, tmp_path, capsys):
    """Whatever happens to the weights with them."""
    _, run = refitted
    with pytest.raises(ValueError, match=r"path: expected logits over the weights of the dense model, .*load_logits"):
        load_logits(run / "logits.safetensors")
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "logits.safetensors"
    with safe_open(run / file.name, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(run / file.name)
    weights = {name: tensor for name, tensor in tensors.items() if name.endswith(".weight")}
    (one, of_one), (other, of_other) = [item for item in weights.items() if "self_attn.q_proj" in item[0]]
    assert of_one.shape == of_other.shape
    for changed in (
        {name: tensor for name, tensor in tensors.items() if name not in weights},
        {name: tensor for name, tensor in tensors.items() if name != one},
        tensors | {one: of_one + 1},
        tensors | {one: of_other, other: of_one},
    ):
        save_file(changed, file, metadata=metadata)
        told = "run: path: expected what was written, got "
        export = ["export", str(file.parent), str(tmp_path / "out")]
        refuses(capsys, tmp_path, export, told, "restore logits.safetensors from a copy")


def test_export_rebuilds_the_checkpoint(refitted, tmp_path, capsys):
    options, run = refitted
    assert main.main(["export", str(run), str(tmp_path / "float32")]) == 0
    assert f", {options[-5]} refitted, written to" in capsys.readouterr().out
    assert main.main(["export", str(run), str(tmp_path / "packed"), "--to", "packed"]) == 0
    assert main.main(["export", str(run), str(tmp_path / "short"), "--dtype", "bfloat16"]) == 0
    learned, exported, short = map(
        AutoModelForCausalLM.from_pretrained, (run, tmp_path / "float32", tmp_path / "short")
    )
    assert_same_bits(dict(exported.state_dict()), dict(learned.state_dict()))
    for name, tensor in learned.state_dict().items():
        assert_same_bits(short.state_dict()[name], tensor.bfloat16())
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    tokens = torch.arange(12).view(1, 12)
    assert_same_bits(packed(tokens).logits, learned(tokens).logits)


def test_export_refuses_another_base_model(refitted, inputs, tmp_path, capsys):
    _, run = refitted
    model = AutoModelForCausalLM.from_pretrained(inputs / "model")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1
    shutil.copytree(inputs / "model", tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    shutil.copytree(run, tmp_path / "run")
    learned = load_logits(run / "logits.safetensors")
    moved = learned._replace(metadata=learned.metadata | {"model": str(tmp_path / "model")})
    edit(tmp_path / "run" / "report.json", logits_file=write_logits(moved, tmp_path / "run" / "logits.safetensors"))
    told = "that its masks were learned on, got others; put back the base model"
    refuses(capsys, tmp_path, ["export", str(tmp_path / "run"), str(tmp_path / "out")], told)


def test_replay_writes_the_weights_too(refitted, tmp_path, capsys):
    options, run = refitted
    if "straight-through" in options:
        assert not (run / "progress" / "start-weights.safetensors").exists()
        refuses(capsys, tmp_path, ["replay", str(run), "--device", "cpu"], "a run whose estimator keeps none")
        return
    (tmp_path / "again").mkdir()
    file = tmp_path / "again" / "logits.safetensors"
    assert main.main(["replay", str(run), "--output", str(file), "--device", "cpu"]) == 0
    assert "its masks are nothing without the refitted weights" in capsys.readouterr().out
    replayed, learned = (load_logits(folder / "logits.safetensors") for folder in (tmp_path / "again", run))
    assert replayed.metadata == learned.metadata
    assert_same_bits(replayed.logits, learned.logits)
    assert_same_bits(replayed.weights, learned.weights)
    assert main.main(["export", str(tmp_path / "again"), str(tmp_path / "out")]) == 0
    # without them there is no result
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "progress" / "start-weights.safetensors").unlink()
    arguments = ["replay", str(tmp_path / "run"), "--output", str(tmp_path / "lost"), "--device", "cpu"]
    refuses(capsys, tmp_path, arguments, "expected the changed weights that the masks belong to", "got no file")
    # nor is there one where it is not known whether there were some
    (tmp_path / "run" / "settings.json").unlink()
    refuses(capsys, tmp_path, arguments, "run: expected settings.json, which tells whether weights were refitted")


def test_lost_or_damaged_logits_are_had_again_as_told(refitted, tmp_path, capsys):
    options, run = refitted
    shutil.copytree(run, tmp_path / "run")
    logits, export = tmp_path / "run" / "logits.safetensors", ["export", str(tmp_path / "run"), str(tmp_path / "out")]
    logits.write_bytes(logits.read_bytes()[:-8])
    refuses(capsys, tmp_path, export, "restore logits.safetensors from a copy")
    logits.rename(tmp_path / "damaged")
    assert main.main(export) == 2
    told = capsys.readouterr().err.rstrip()
    assert "run: expected logits.safetensors in" in told and "restore logits.safetensors from a copy" in told
    if "straight-through" in options:
        assert told.endswith("from a copy")
        return
    _, _, command = told.partition(", or run: maskpro ")
    assert main.main(shlex.split(command)) == 0
    assert main.main(export) == 0
    learned, exported = (load_file(folder / "model.safetensors") for folder in (run, tmp_path / "out"))
    assert_same_bits(exported, learned)


def test_a_run_that_was_killed_goes_on(refitted, inputs, tmp_path, monkeypatch):
    options, whole = refitted
    step = list(WAYS.values()).index(options[:-4])
    run = tmp_path / "run"
    with pytest.raises(Killed):
        broken_off(inputs, run, monkeypatch, step, options, kill)
    assert (run / "progress" / "start-weights.safetensors").exists()
    assert main.main(["learn", "--resume", str(run)]) == 0
    expected, found = (load_logits(folder / "logits.safetensors") for folder in (whole, run))
    assert_same_bits(found.logits, expected.logits)
    assert_same_bits(found.weights, expected.weights)
    assert found.metadata == expected.metadata | {"run": found.metadata["run"]}
    for name in ("validation", "weights", "start", "flipped_groups"):
        assert report(run)[name] == report(whole)[name]
    assert [row["perplexity"] for row in report(run)["table"]] == [row["perplexity"] for row in report(whole)["table"]]


def test_resume_refuses_lost_or_damaged_weights(inputs, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    with pytest.raises(Killed):
        broken_off(inputs, run, monkeypatch, 2, WAYS["of a mask that stays"], kill)
    start = run / "progress" / "start-weights.safetensors"
    sound = start.read_bytes()
    start.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    resume = ["learn", "--resume", str(run), "--device", "cpu"]
    capsys.readouterr()
    assert main.main(resume) == 2
    assert "resume: path: expected what was written, got " in capsys.readouterr().err
    start.unlink()
    assert main.main(resume) == 2
    assert "got no file; restore" in capsys.readouterr().err
    start.write_bytes(sound)
    assert main.main(resume) == 0


def test_validate_passes_over_the_logits_beside_the_checkpoint(refitted, capsys):
    _, run = refitted
    assert main.main(["validate", str(run)]) == 0
    out = capsys.readouterr().out
    assert "14 of 15 follow 2:4" in out
