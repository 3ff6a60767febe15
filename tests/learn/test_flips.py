"""Bits that flip at chance in the files of a run and in a mask file: none is silent, and each refusal is one line."""

from __future__ import annotations

import os
import random
import re
import shutil
import warnings
from collections import Counter

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.cases import slow
from helpers.small_trainer import a_trainer_in, logits_of
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.checkpoints.mask_file import save_masks

pytestmark = pytest.mark.usefixtures("eager_reference")

STEPS = 6


def flipped(content: bytes, count: int) -> list[bytes]:
    """So many copies, each with another bit flipped."""
    copies = []
    for bit in random.Random(0).sample(range(8 * len(content)), count):
        copies.append(bytearray(content))
        copies[-1][bit // 8] ^= 1 << bit % 8
    return list(map(bytes, copies))


# Of each file of a run: how often a bit is flipped, and what comes of it
FLIPS = {
    ("reinforce", "journal"): (70, {"refused": 66, "taken again": 4}),
    ("reinforce", "newest snapshot"): (30, {"taken again": 30}),
    ("reinforce", "snapshot before"): (15, {"not read": 15}),
    ("straight-through", "newest snapshot"): (40, {"taken again": 40}),
    ("straight-through", "snapshot before"): (15, {"not read": 15}),
}


@pytest.mark.parametrize(
    ("how", "name"), [case if "newest" in case[1] or case[1] == "journal" else slow(*case) for case in FLIPS]
)
def test_a_flip_in_a_run_is_refused_or_changes_nothing(tmp_path, monkeypatch, how, name):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    first = a_trainer_in(tmp_path / "run", how)
    for _ in range(2):
        first.run(STEPS // 2, progress=False)
    first.close()
    files = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    *_, before, newest = sorted(file for file in files if file.startswith("snapshot"))
    file = {"newest snapshot": newest, "snapshot before": before}.get(name, name)
    count, expected = FLIPS[how, name]
    found = Counter()
    for content in flipped(files[file], count):
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").mkdir()
        for other in files:
            (tmp_path / "run" / other).write_bytes(content if other == file else files[other])
        again = a_trainer_in(tmp_path / "run", how)
        untouched = logits_of(again.model)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                done = again.resume()
            except (ValueError, OSError) as error:
                assert re.fullmatch(r"(journal|snapshot|output_dir): expected [^\n]*got [^\n]*", str(error))
                assert_same_bits(logits_of(again.model), untouched)
                found["refused"] += 1
                continue
        if done < STEPS:
            again.run(STEPS - done, progress=False)
        assert_same_bits(logits_of(again.model), logits_of(first.model))
        assert again.estimator.state() == first.estimator.state()
        again.close()
        found["taken again" if warned else "not read"] += 1
    assert found == expected


def test_a_flip_in_a_mask_file_is_refused(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    layers = (
        (name, mk.top_n_mask(layer.weight, "4:8"), layer.weight.detach()) for name, layer in model.named_children()
    )
    save_masks(tmp_path / "mask", layers, "4:8", model="tiny")
    for content in flipped((tmp_path / "mask").read_bytes(), 40):
        (tmp_path / "mask").write_bytes(content)
        with pytest.raises(ValueError, match=r"^init: expected [^\n]*got [^\n]*$"):
            mk.convert(model, "4:8", init=str(tmp_path / "mask"))
        assert not any(isinstance(layer, mk.MaskedLinear) for layer in model)
