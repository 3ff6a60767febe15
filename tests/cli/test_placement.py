"""Where `maskpro learn` computes and in which dtypes: what shapes the result is the run's own, the rest is not."""

from __future__ import annotations

import json
import os
import signal
import types

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.cases import slow
from helpers.command import broken_off, learn, refuses, report
from helpers.damage import edit
from helpers.far_device import far_device
from safetensors.torch import load_file
from torch.utils import checkpoint

from maskpro_kernels.cli import main
from maskpro_kernels.cli.parser import build_parser
from maskpro_kernels.cli.run_settings import check_process, complete
from maskpro_kernels.learn.trainer import MaskTrainer
from maskpro_kernels.modules import masked_layers

pytestmark = pytest.mark.usefixtures("eager_reference")

STRAIGHT = "--estimator straight-through --lr 1".split()


def learned(folder):
    return load_file(folder / "logits.safetensors")


@pytest.fixture(scope="module")
def straight(inputs, tmp_path_factory):
    """Folder of a finished run by straight-through."""
    from helpers.routes import route_to_the_eager_reference

    folder = tmp_path_factory.mktemp("straight") / "run"
    with pytest.MonkeyPatch.context() as patched:
        route_to_the_eager_reference(patched)
        assert main.main(learn(inputs, folder, *STRAIGHT)) == 0
    return folder


@pytest.fixture
def recomputed(monkeypatch):
    """How often a block was checkpointed."""
    calls, original = [], checkpoint.checkpoint

    def counted(*arguments, **options):
        calls.append(options)
        return original(*arguments, **options)

    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counted)
    return calls


@pytest.mark.parametrize(
    "options",
    [
        # the next one but one has both
        pytest.param([], marks=pytest.mark.slow),
        pytest.param(["--loss", "kl"], marks=pytest.mark.slow),
        pytest.param(["--loss", "ce+kl", "--accumulate", "2"], marks=pytest.mark.slow),
        ["--train-weights", "1e-3"],
    ],
    ids=["ce", "kl", "several batches", "weights learn"],
)
def test_checkpointed_activations_give_the_same_bits(inputs, tmp_path, recomputed, options):
    for name, more in (("plain", []), ("checkpointed", ["--gradient-checkpointing"])):
        assert main.main(learn(inputs, tmp_path / name, *STRAIGHT, *options, *more)) == 0
        assert bool(recomputed) == (name == "checkpointed")
    assert {call["use_reentrant"] for call in recomputed} == {False}
    assert_same_bits(learned(tmp_path / "checkpointed"), learned(tmp_path / "plain"))
    plain, checkpointed = report(tmp_path / "plain"), report(tmp_path / "checkpointed")
    assert [step["loss"] for step in checkpointed["steps"]] == [step["loss"] for step in plain["steps"]]
    assert checkpointed["settings"]["gradient_checkpointing"] is True


def test_a_run_goes_on_with_checkpointed_activations_and_on_another_logits_device(
    inputs, straight, tmp_path, monkeypatch, recomputed
):
    run = tmp_path / "run"
    stop = broken_off(inputs, run, monkeypatch, 1, STRAIGHT, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert stop == 0 and not recomputed
    more = ["--gradient-checkpointing", "--logits-device", "cpu", "--device-map", '{"": "cpu"}', "--report-to", "none"]
    assert main.main(["learn", "--resume", str(run), *more]) == 0
    assert recomputed
    assert_same_bits(learned(run), learned(straight))
    settings = report(run)["settings"]
    assert settings["device_map"] == {"": "cpu"} and "device" not in settings


@pytest.mark.parametrize(
    "how", [STRAIGHT, pytest.param([], marks=pytest.mark.slow)], ids=["straight-through", "reinforce"]
)
def test_logits_in_16_bits(inputs, tmp_path, capsys, how):
    run = tmp_path / "run"
    assert main.main(learn(inputs, run, *how, "--logits-dtype", "bfloat16", "--steps", "3")) == 0
    assert {tensor.dtype for tensor in learned(run).values()} == {torch.bfloat16}
    assert report(run)["settings"]["logits_dtype"] == "bfloat16"
    assert main.main(["export", str(run), str(tmp_path / "again")]) == 0
    exported, written = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", run))
    assert_same_bits(exported, written)
    if not how:
        capsys.readouterr()
        assert main.main(["replay", str(run), "--device", "cpu"]) == 0
        assert report(run)["logits"] in capsys.readouterr().out


def test_the_dtype_of_the_logits_is_the_run_s_own(inputs, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    assert broken_off(inputs, run, monkeypatch, 1, STRAIGHT, lambda: os.kill(os.getpid(), signal.SIGINT)) == 0
    refuses(capsys, run, ["learn", "--resume", str(run), "--logits-dtype", "bfloat16"], "got --logits-dtype")
    edit(run / "settings.json", settings={"logits_dtype": "bfloat16"})
    assert main.main(["learn", "--resume", str(run)]) == 2
    told = capsys.readouterr().err
    assert (
        "expected a run with layers model.layers.0.self_attn.q_proj [0, '2:4', [32, 32], 'torch.bfloat16'], got "
        in told
    )


def test_logits_on_another_device(inputs, run, tmp_path, monkeypatch):
    """Which is emulated, for an estimator without autograd; the bits are those of logits beside their weights."""
    library = far_device()
    seen, step = set(), MaskTrainer.step

    def looked_at(trainer):
        seen.update(layer.logits.device.type for layer in masked_layers(trainer.model).values())
        return step(trainer)

    monkeypatch.setattr(MaskTrainer, "step", looked_at)
    monkeypatch.setattr("maskpro_kernels.cli.run_settings.device_of", lambda name, _="": torch.device(name))
    assert main.main(learn(inputs, tmp_path / "run", "--logits-device", "far")) == 0
    assert seen == {"far"} and library
    assert_same_bits(learned(tmp_path / "run"), learned(run))


@pytest.mark.parametrize("device_map", ["auto", slow('{"": "cpu"}'), slow('{"model": "cpu", "lm_head": "cpu"}')])
def test_a_model_that_transformers_places(inputs, straight, tmp_path, device_map):
    arguments = learn(inputs, tmp_path / "run", *STRAIGHT, "--device-map", device_map)
    at = arguments.index("--device")
    assert main.main(arguments[:at] + arguments[at + 2 :]) == 0
    assert_same_bits(learned(tmp_path / "run"), learned(straight))
    assert report(tmp_path / "run")["settings"]["device_map"] == (
        device_map if device_map == "auto" else json.loads(device_map)
    )


def test_ranks_take_no_device_map(inputs):
    args = build_parser().parse_args(learn(inputs, "none", "--accumulate", "2"))
    args.device_map = "auto"
    two = types.SimpleNamespace(world=2, rank=0)
    with pytest.raises(ValueError, match="device_map: expected none under torchrun, .*got 'auto'; give --device"):
        complete(args)
        check_process(args, two)


def test_weights_that_are_offloaded_are_refused(inputs, tmp_path, monkeypatch, capsys):
    from maskpro_kernels.hf import load_model

    def offloaded(name, dtype, device_map, **_):
        model, tokenizer = load_model(name, dtype)
        model.model.layers[1].to("meta")
        return model, tokenizer

    monkeypatch.setattr("maskpro_kernels.hf.load_model", offloaded)
    arguments = learn(inputs, tmp_path / "run", "--device-map", "auto")
    at = arguments.index("--device")
    told = "got model.layers.1.self_attn.q_proj.weight offloaded"
    refuses(capsys, tmp_path, arguments[:at] + arguments[at + 2 :], told, "give another map")


def test_a_model_whose_blocks_cannot_be_checkpointed(inputs, tmp_path, monkeypatch, capsys):
    def none(model, *_, **__):
        raise ValueError("not compatible with gradient checkpointing")

    monkeypatch.setattr("transformers.PreTrainedModel._set_gradient_checkpointing", none)
    arguments = learn(inputs, tmp_path / "run", *STRAIGHT, "--gradient-checkpointing", "--gap", "1")
    refuses(capsys, tmp_path, arguments, "expected a model whose blocks transformers can checkpoint", "leave it out")
