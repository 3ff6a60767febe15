"""Values that `maskpro learn` refuses, before anything is written."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from helpers.command import learn, refuses
from helpers.tiny_llama import tiny_model, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from maskpro_kernels.cli import main
from maskpro_kernels.hf import save_model

pytestmark = pytest.mark.usefixtures("eager_reference")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--pattern", "4:2", "pattern: expected N:M with"),
        ("--pattern", "2:5", "pattern: expected N:M with"),
        ("--pattern", "two", 'pattern: expected "N:M"'),
        ("--steps", "0", "steps: expected at least 1, got 0"),
        ("--batch-size", "0", "batch_size: expected at least 1, got 0"),
        ("--batch-size", "1000", "batch_size: expected at most"),
        ("--seq-len", "1", "seq_len: expected at least 2, got 1"),
        ("--seq-len", "100000", "text: expected at least 100000 tokens"),
        ("--calibration-batches", "0", "calibration_batches: expected at least 1, got 0"),
        ("--init-batches", "0", "init_batches: expected at least 1, got 0"),
        ("--eval-every", "0", "eval_every: expected at least 1, got 0"),
        ("--eval-windows", "0", "eval_windows: expected at least 1, got 0"),
        ("--eval-length", "100000", "text: expected at least 100000 tokens"),
        ("--gap", "27", "gap: expected at most 26"),
        ("--gap", "0", "gap: expected a positive number, got 0"),
        ("--gap", "nan", "gap: expected a positive number, got nan"),
        ("--flip-rate", "1", "flip_rate: expected a float in [1.5e-11, 0.8333] for 2:4, got 1.0"),
        ("--lr", "nan", "lr"),
        ("--alpha", "1.5", "alpha"),
        ("--seed", "-1", "seed: expected at least 0, got -1"),
        ("--seed", "9223372036854775808", "seed: expected an int below 2**63"),
        ("--device", "abacus", "device: expected a device of this machine, got 'abacus'"),
        ("--model", "/no/such/folder", "no such folder"),
        ("--data", "EMPTY", "the text is empty"),
        ("--data", "FULL", "source: expected a dataset that can be read, got"),
        ("--data", "/no/such.txt", "there is no such file or folder; check its name"),
        ("--other-data", "EMPTY", "other_data: source: expected at least 3 different paragraphs"),
        ("--output", "FULL", "output: expected a new or empty folder"),
    ],
)
def test_learn_refuses_bad_input(inputs, tmp_path, capsys, option, value, message):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    places = {"EMPTY": tmp_path / "empty.txt", "FULL": tmp_path / "full"}
    refuses(capsys, tmp_path, learn(inputs, tmp_path / "output", option, str(places.get(value, value))), message)


def test_a_gap_that_logits_cannot_hold_is_refused_before_a_model_is_read(inputs, tmp_path, capsys):
    options = ["--estimator", "straight-through", "--gap", "1e5", "--logits-dtype", "float16", "--model", "/no/such"]
    told = "gap: expected a float within [0, 65504], for logits in torch.float16, got 100000.0"
    refuses(capsys, tmp_path, learn(inputs, tmp_path / "output", *options), told)


@pytest.mark.parametrize("data", ["self", "TEXT"])
@pytest.mark.parametrize("option", ["--seq-len", "--eval-length"])
def test_windows_longer_than_a_model_has_positions_for_are_refused(inputs, tmp_path, capsys, data, option):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=16, n_layer=1, n_head=2, n_positions=30))
    save_model(model, tiny_tokenizer(), tmp_path / "gpt2")
    options = ["--model", str(tmp_path / "gpt2"), "--data", data.replace("TEXT", str(inputs / "text.txt"))]
    told = f"{option[2:].replace('-', '_')}: expected at most 30, which the model has positions for, got 31"
    refuses(capsys, tmp_path, learn(inputs, tmp_path / "output", *options, option, "31"), told)


def test_learn_refuses_a_model_without_linears(inputs, tmp_path, capsys, monkeypatch):
    class Unigram(torch.nn.Embedding):
        def forward(self, input_ids, use_cache=False):
            return type("Output", (), {"logits": super().forward(input_ids)})

    monkeypatch.setattr(
        "maskpro_kernels.hf.load_model", lambda name, dtype, device_map, **_: (Unigram(40, 40), tiny_tokenizer())
    )
    refuses(capsys, tmp_path, learn(inputs, tmp_path / "output"), "Linear")


def test_learn_refuses_non_finite_weights(inputs, tmp_path, capsys, monkeypatch):
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    monkeypatch.setattr("maskpro_kernels.hf.load_model", lambda name, dtype, device_map, **_: (model, tiny_tokenizer()))
    refuses(capsys, tmp_path, learn(inputs, tmp_path / "output"), "model.layers.1.mlp.up_proj")


def test_learn_refuses_to_run_without_matplotlib(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    refuses(capsys, tmp_path, learn(inputs, tmp_path / "output"), "pip install 'maskpro-kernels[cli]'")


def test_reinforce_has_no_bound_of_a_step(inputs, tmp_path, capsys):
    arguments = learn(inputs, tmp_path / "output", "--max-update", "1")
    refuses(capsys, tmp_path, arguments, "max_update: expected none, for it is of straight-through alone")


def test_straight_through_has_no_alpha(inputs, tmp_path, capsys):
    arguments = learn(inputs, tmp_path / "output", "--estimator", "straight-through", "--alpha", "0.5")
    refuses(capsys, tmp_path, arguments, "alpha: expected none, for it is of reinforce alone")


def test_gap_excludes_flip_rate(inputs, tmp_path, capsys):
    with pytest.raises(SystemExit) as refusal:
        main.main(learn(inputs, tmp_path / "output", "--gap", "5", "--flip-rate", "0.1"))
    assert refusal.value.code == 2
    assert "not allowed with" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
