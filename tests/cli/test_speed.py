"""`maskpro speed`."""

from __future__ import annotations

import inspect
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from helpers.command import contents, refuses
from helpers.tiny_llama import tiny_model, tiny_tokenizer
from huggingface_hub import HfApi
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from maskpro_kernels import convert, finalize, hf
from maskpro_kernels.cli import main, memory
from maskpro_kernels.cli.speed import _agreements
from maskpro_kernels.hf import Agreement, PeakMemory, save_model

pytestmark = pytest.mark.usefixtures("eager_reference")

SMALL = "--prompt-tokens 8 --new-tokens 4 --rounds 2 --device cpu --dtype float32".split()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same weights dense and packed, and the dense base."""
    folder = tmp_path_factory.mktemp("models")
    save_model(tiny_model(), tiny_tokenizer(), folder / "base")
    for to in ("dense", "packed"):
        model = tiny_model()
        convert(model, "2:4")
        save_model(finalize(model, to=to), tiny_tokenizer(), folder / to)
    return folder


@pytest.fixture(autouse=True)
def quick_memory(monkeypatch):
    """A fresh process for each model takes seconds to begin: see tests of ``peak_memory``."""
    monkeypatch.setattr(hf, "peak_memory", lambda *args, **options: PeakMemory(400_000_000, 450_000_000, False))


@pytest.fixture
def place(folders, monkeypatch):
    monkeypatch.chdir(folders)
    return folders


@pytest.mark.pictures
def test_it_prints_a_table_and_writes_figures_and_a_picture(place, tmp_path, capsys):
    output, threads = tmp_path / "out", torch.get_num_threads()
    arguments = ["speed", "dense", "packed", "base", *SMALL, "--batch-size", "2", "--threads", "1"]
    assert main.main([*arguments, "--output", str(output)]) == 0
    assert torch.get_num_threads() == threads
    captured = capsys.readouterr()
    above, titles, *rows = captured.out.splitlines()
    assert above.startswith("prompts of 8 tokens, 4 new ones, batch size 2, float32, on ")
    assert above.endswith(", threads: 1")
    assert re.split(" {2,}", titles)[:4] == ["model", "stored", "weights MB", "peak MB"]
    assert [re.split(" {2,}", row)[:2] for row in rows[:3]] == [
        ["dense", "dense"], ["packed", "packed 2:4"], ["base", "dense"],
    ]  # fmt: skip
    assert rows[3] == "medians of 2 rounds, quartiles in brackets; times: of the first model's decode"
    assert rows[4] == "peak memory: of a process of its own for each model; 400.0 MB without a model"
    assert rows[5] == "packed: same weights as dense; same 4 tokens"
    assert rows[6].startswith("base: other weights than dense, first in model.layers.0.self_attn.q_proj.weight; same ")
    assert "in memory together: 0.00 GB; cpu has " in captured.err and "round 3 of 3" in captured.err

    found = json.loads((output / "speed.json").read_text())
    assert found["agree"] is True and found["dtype"] == "float32" and found["rounds"] == 2
    assert {"device", "device_name", "processor", "threads", "system", "versions", "agreements"} < set(found)
    assert found["versions"]["torch"] == torch.__version__ and found["threads"] == 1
    assert [row["model"] for row in found["models"]] == ["dense", "packed", "base"]
    for row in found["models"]:
        assert row["peak_memory"] == 450_000_000 and row["process_memory"]["before"] == 400_000_000
        for name in ("prefill_tokens_per_second", "decode_tokens_per_second", "milliseconds_per_token"):
            assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"]
        assert len(row["prefill_seconds"]) == len(row["step_seconds"]) == 2
    assert found["agreements"][0]["same_weights"] and not found["agreements"][1]["same_weights"]
    assert (output / "speed.png").read_bytes().startswith(b"\x89PNG") and len(contents(output)) == 2


def test_equal_weights_that_write_otherwise_are_told_and_end_with_1(place, monkeypatch, capsys):
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
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].startswith("packed") and "THE MODELS DIFFER" in lines[-1]


def test_a_gap_that_is_no_number_is_none_in_json():
    found = Agreement("packed", "dense", None, 0, 4, math.nan, 0.5)
    (row,) = json.loads(json.dumps(_agreements(SimpleNamespace(agreements=[found])), allow_nan=False))
    assert row["gap"] is None and row["rounding"] == 0.5 and row["same_weights"] and not row["within_rounding"]


@pytest.mark.slow
def test_memory_that_cannot_be_measured_loses_nothing(place, monkeypatch, capsys):
    def failing(name, *args, **options):
        raise ValueError(f"the process of {name!r} was killed")

    monkeypatch.setattr(hf, "peak_memory", failing)
    assert main.main(["speed", "dense", *SMALL]) == 0
    captured = capsys.readouterr()
    assert "unknown" in captured.out.splitlines()[2]
    assert "maskpro: warning: the process of 'dense' was killed" in captured.err


def test_what_does_not_fit_is_refused_before_it_is_loaded(place, monkeypatch, capsys):
    monkeypatch.setattr(memory, "_free", lambda device: 10_000)
    told = "models: expected models that fit into memory together, got 0.00 GB of weights where cpu has 0.00 GB free"
    refuses(capsys, place, ["speed", "dense", "packed", *SMALL], told, "give fewer at once")


def test_a_name_of_no_model_is_told_before_any_is_loaded(place, monkeypatch, capsys):
    asked = []

    def unreachable(hub, repo_id, timeout):
        asked.append(repo_id)
        raise OSError("[Errno -2] Name or service not known")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", None)
    told = "got 'densse': there is no folder of that name, and the hub cannot be reached ([Errno -2] Name or service"
    refuses(capsys, place, ["speed", "dense", "densse", *SMALL], told)
    refuses(capsys, place, ["speed", "dense", "../densse", *SMALL], "got '../densse': no such folder")
    assert asked == ["densse"]


def test_bytes_in_a_folder_are_those_once_loaded(place):
    dense = hf.load_model("dense", torch.float32)[0]
    size = sum(parameter.nbytes for parameter in dense.parameters())
    assert memory._bytes_in(place / "dense", torch.float32) == size
    assert memory._bytes_in(place / "dense", torch.bfloat16) == size // 2
    packed = memory._bytes_in(place / "packed", torch.float32)
    linears = [
        name for name, module in dense.named_modules() if type(module).__name__ == "Linear" and name != "lm_head"
    ]
    weights = sum(dense.get_submodule(name).weight.numel() for name in linears)
    assert packed == size - weights * 2 + weights // 8
    assert memory._bytes_in(place, torch.float32) == 0
    assert 0 < memory._free(torch.device("cpu")) < 1e15


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ("./none", ["model: expected", "no such folder"]),
        ("dense dense", ["models: expected each model once, got 'dense' again"]),
        ("dense --new-tokens 1", ["new_tokens: expected at least 2, got 1"]),
        ("dense --prompt-tokens 0", ["prompt_tokens: expected at least 2, got 0"]),
        ("dense --batch-size 0", ["batch_size: expected at least 1, got 0"]),
        ("dense --batch-size 9999999", ["batch_size: expected 1 to "]),
        ("dense --rounds 0", ["rounds: expected at least 1, got 0"]),
        ("dense --threads 0", ["threads: expected at least 1, got 0"]),
        ("dense --device abacus", ["device: expected a device of this machine"]),
        ("dense --output base", ["output: expected a new or empty folder, got 'base'"]),
        ("dense --prompt-tokens 99999999", ["prompt_tokens: ", "give a longer text, or a smaller --prompt-tokens"]),
    ],
)
def test_it_refuses(place, capsys, arguments, messages):
    # of two argparse takes the last
    refuses_after_loading(capsys, place, ["speed", *SMALL, *arguments.split()], *messages)


def refuses_after_loading(capsys, folder, arguments, *messages):
    """``refuses``, but for the line that tells what memory the weights take."""
    before = contents(folder)
    assert main.main(arguments) == 2
    captured = capsys.readouterr()
    *told, last = captured.err.splitlines()
    assert all(line.startswith("weights in the folders") for line in told)
    assert last.startswith("maskpro: error: ") and all(message in last for message in messages), last
    assert captured.out == "" and contents(folder) == before


def test_other_vocabularies_and_too_few_positions_are_refused(place, tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["more"])
    save_model(tiny_model(), tokenizer, tmp_path / "other")
    arguments = ["speed", "dense", str(tmp_path / "other"), *SMALL]
    refuses_after_loading(
        capsys, place, arguments, "models: expected one vocabulary, got another in ", "than in 'dense'"
    )
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=11))
    save_model(model, tiny_tokenizer(), tmp_path / "gpt2")
    told = "new_tokens: expected at most 11 tokens together with --prompt-tokens"
    refuses_after_loading(capsys, place, ["speed", str(tmp_path / "gpt2"), *SMALL], told)
