"""`maskpro learn` tells what memory it needs, and what it has used."""

from __future__ import annotations

import re
import types

import pytest
import torch
from helpers.command import learn, report
from helpers.tiny_llama import tiny_model

from maskpro_kernels.cli import main, memory
from maskpro_kernels.cli.parser import build_parser
from maskpro_kernels.cli.run_settings import complete
from maskpro_kernels.hf import checkpoint_activations

pytestmark = pytest.mark.usefixtures("eager_reference")

STRAIGHT = "--estimator straight-through --lr 1".split()


def told(capsys):
    """GB by part, from the line that tells them."""
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith("memory that a step needs, estimated: ")]
    # before what takes long
    assert lines.index(line) < next(at for at, other in enumerate(lines) if other.startswith("magnitude: "))
    return {name: float(size) for name, size in re.findall(r"(\w+) (\d+\.\d\d)[,)]", line)}


@pytest.mark.parametrize(
    "options", [STRAIGHT, pytest.param([], marks=pytest.mark.slow)], ids=["straight-through", "reinforce"]
)
def test_a_run_tells_what_it_needs_and_reports_what_it_used(inputs, tmp_path, capsys, options):
    assert main.main(learn(inputs, tmp_path / "run", *options)) == 0
    parts = {"weights", "logits", "masks", "optimizer", "gradients", "activations", "teacher", "copies", "gathered"}
    assert told(capsys).keys() == parts
    found = report(tmp_path / "run")["memory"]
    needed = found["needed"]
    assert needed["logits"] == 4 * 18432 and needed["teacher"] == 0
    assert (needed["gradients"] > 0) == (options == STRAIGHT)
    # python and its libraries alone take more than such a model
    assert found["used"]["process"] > sum(needed.values())
    page = (tmp_path / "run" / "report.html").read_text()
    assert "activations, estimated" in page and "most held: process" in page


def needed(inputs, *options):
    """Without a run."""
    args = build_parser().parse_args(learn(inputs, "none", *STRAIGHT, "--seq-len", "48", *options))
    estimator, model = complete(args), tiny_model()
    if args.gradient_checkpointing:
        checkpoint_activations(model)
    return memory.needed_memory(args, estimator, 1, model)


def test_options_that_save_memory_are_seen_to(inputs):
    plain = needed(inputs)
    assert needed(inputs, "--logits-dtype", "bfloat16").logits == plain.logits / 2
    assert needed(inputs, "--gradient-checkpointing").activations < 0.8 * plain.activations
    assert needed(inputs, "--loss", "kl").teacher == 4 * 48 * 32 * 4
    cached = needed(inputs, "--loss", "kl", "--train-weights", "1e-3")
    assert cached.teacher == 4 * 48 * 516 and cached.optimizer > 8 * 18432 > plain.optimizer
    assert needed(inputs, "--accumulate", "2").gradients > plain.gradients
    # as plain weights lie where the logits do, no copies come
    assert plain.copies == needed(inputs, "--logits-device", "cpu").copies == 0
    # evaluation holds the most
    assert needed(inputs, "--eval-length", "2000").activations > 2 * plain.activations


def test_a_device_with_less_is_warned_of(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "_total", lambda device: 1000)
    assert main.main(learn(inputs, tmp_path / "run", *STRAIGHT)) == 0
    err = capsys.readouterr().err
    assert "maskpro: warning: cpu has 0.00 GB of memory, and about 0.00 GB are needed; take a smaller" in err


def test_the_memory_of_gpus_is_that_of_their_allocator(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda index: 7 + index)
    properties = types.SimpleNamespace(total_memory=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    used = memory.used_memory()
    assert used["cuda:0"] == 7 and used["cuda:1"] == 8 and used["process"] > 0
    assert memory._total(torch.device("cuda:1")) == 9 and memory._total(torch.device("meta")) == 0
