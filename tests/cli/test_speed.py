"""`maskpro speed`."""

from __future__ import annotations

import inspect
import json
import re

import pytest
from helpers.command import refuses
from helpers.tiny_llama import tiny_model, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from maskpro_kernels import convert, finalize
from maskpro_kernels.cli import inputs, main
from maskpro_kernels.hf import save_model

pytestmark = pytest.mark.usefixtures("eager_reference")

SMALL = "--prompt-tokens 8 --new-tokens 4 --rounds 2 --device cpu --dtype float32".split()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Equal weights, dense and packed, and the dense base."""
    folder = tmp_path_factory.mktemp("models")
    save_model(tiny_model(), tiny_tokenizer(), folder / "base")
    for to in ("dense", "packed"):
        model = tiny_model()
        convert(model, "2:4")
        save_model(finalize(model, to=to), tiny_tokenizer(), folder / to)
    return folder


@pytest.fixture
def place(folders, monkeypatch):
    monkeypatch.chdir(folders)
    return folders


def test_it_prints_a_table_and_writes_figures(place, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out.json"
    arguments = ["speed", "dense", "packed", "base", *SMALL, "--batch-size", "2", "--output", str(output)]
    # a line of progress as soon as there is something to report
    monkeypatch.setattr(inputs, "SECONDS", 0)
    assert main.main(arguments) == 0
    captured = capsys.readouterr()
    above, titles, *rows = captured.out.splitlines()
    assert above.startswith("prompts of 8 tokens, 4 new ones, batch size 2, float32, on ")
    assert re.split(" {2,}", titles)[:4] == ["model", "stored", "weights MB", "peak MB"]
    assert [re.split(" {2,}", row)[:2] for row in rows[:3]] == [
        ["dense", "dense"], ["packed", "packed 2:4"], ["base", "dense"],
    ]  # fmt: skip
    assert rows[3] == "medians of 2 rounds, quartiles in brackets; times: of the first model's decode"
    assert rows[4] == "packed: same weights as dense; same 4 tokens"
    assert rows[5].startswith("base: other weights than dense, first in model.layers.0.self_attn.q_proj.weight; same ")
    assert "round 2 of 2" in captured.err and "of 3" not in captured.err
    found = json.loads(output.read_text())
    assert found["agree"] is True and found["options"]["dtype"] == "float32"
    assert [row["model"] for row in found["models"]] == ["dense", "packed", "base"]
    for row in found["models"]:
        for name in ("prefill_tokens_per_second", "decode_tokens_per_second"):
            assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"]


def test_equal_weights_that_write_otherwise_are_reported_and_end_with_1(place, monkeypatch, capsys):
    forward = LlamaForCausalLM.forward

    def broken(model, *args, **options):
        found = forward(model, *args, **options)
        if hasattr(model.model.layers[0].mlp.up_proj, "bitmask"):
            found.logits = -found.logits
        return found

    # as transformers sees it: with its options
    broken.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(LlamaForCausalLM, "forward", broken)
    assert main.main(["speed", "dense", "packed", *SMALL]) == 1
    assert "THE MODELS DIFFER" in capsys.readouterr().out.splitlines()[-1]


def test_what_cannot_be_measured_is_refused(place, tmp_path, capsys):
    refuses(capsys, place, ["speed", "dense", "none/at/all", *SMALL], "model: expected 'smollm2-135m', a folder or")
    refuses(capsys, place, ["speed", "dense", "dense", *SMALL], "models: expected each model once")
    refuses(capsys, place, ["speed", "dense", *SMALL, "--rounds", "0"], "rounds: expected at least 1, got 0")
    other = tiny_tokenizer()
    other.add_tokens(["w99"])
    save_model(tiny_model(), other, tmp_path / "other")
    refuses(capsys, place, ["speed", "dense", str(tmp_path / "other"), *SMALL], "models: expected one vocabulary")
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=2, n_positions=10))
    save_model(model, tiny_tokenizer(), tmp_path / "short")
    reported = "--new-tokens: expected at most 10 tokens together with --prompt-tokens"
    refuses(capsys, place, ["speed", str(tmp_path / "short"), *SMALL], reported)
