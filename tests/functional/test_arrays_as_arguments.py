"""Arrays, and objects whose ``repr`` has lines, as arguments: each is refused in one line that names the argument."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.small_trainer import a_model, loss_fn, some_batches
from torch import nn

import maskpro_kernels as mk

pytestmark = pytest.mark.usefixtures("eager_reference")

ARRAY = np.zeros((3, 8), np.float32)
WEIGHT = torch.eye(8)
PACKED = mk.pack_nm(WEIGHT, "2:4")


class Lines:
    def __repr__(self) -> str:
        return "two\nlines"


def dense_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))


def enter(model):
    with mk.dense(model):
        pytest.fail("entered")


# By name: what is called, good arguments, and those that an array may not be
CALLS = {
    "convert": (
        mk.convert,
        lambda: {"model": dense_model(), "pattern": "2:4"},
        "model pattern targets init gap flip_rate logits_dtype logits_device refit seed",
    ),
    "finalize": (mk.finalize, lambda: {"model": a_model(), "to": "packed"}, "model to values"),
    "refit": (mk.refit, lambda: {"model": a_model(), "calibration": some_batches()}, "model to"),
    "advance": (mk.advance, dict, "model"),
    "log_prob": (mk.log_prob, dict, "model"),
    "dense": (enter, dict, "model"),
    "MaskTrainer": (
        mk.MaskTrainer,
        lambda: {
            "model": a_model(),
            "loss_fn": loss_fn,
            "batches": some_batches(),
            "estimator": mk.Reinforce(),
            "seed": 1,
        },
        "model loss_fn estimator seed output_dir snapshot_minutes max_skipped accumulate timeout",
    ),
    "StraightThrough": (
        mk.StraightThrough,
        dict,
        "lr steps curvature max_update decay fisher_every train_weights masks_until weight_decay",
    ),
    "Reinforce": (mk.Reinforce, dict, "lr alpha tracker normalize draws refresh steps"),
    "MaskOptimizer": (
        mk.MaskOptimizer,
        lambda: {"model": a_model()},
        "model lr curvature max_update decay loss_scale tokens",
    ),
    "pack_nm": (mk.pack_nm, lambda: {"weight": WEIGHT, "pattern": "2:4"}, "weight pattern values"),
    "PackedNM": (
        mk.PackedNM,
        lambda: {"values": PACKED.values, "bitmask": PACKED.bitmask, "pattern": "2:4"},
        "values bitmask pattern scales",
    ),
    "nm_linear": (mk.nm_linear, lambda: {"x": WEIGHT, "packed": PACKED}, "x packed bias"),
    "NMLinear": (mk.NMLinear, lambda: {"packed": PACKED}, "packed bias"),
    "MaskedLinear": (
        mk.MaskedLinear,
        lambda: {"weight": WEIGHT, "bias": None, "logits": WEIGHT, "pattern": "2:4"},
        "weight bias logits pattern layer group_offset group_row_stride",
    ),
    "MaskedLinear.from_linear": (
        mk.MaskedLinear.from_linear,
        lambda: {"linear": nn.Linear(8, 4), "pattern": "2:4"},
        "linear pattern init gap logits_dtype logits_device layer",
    ),
}


@pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name in CALLS for argument in CALLS[name][2].split()]
)
def test_an_array_is_refused_in_a_line(name, argument):
    called, good, _ = CALLS[name]
    for value in (ARRAY, Lines()):
        arguments = good()
        model = arguments.get("model")
        before = None if model is None else list(map(type, model.modules()))
        with pytest.raises((TypeError, ValueError), match=rf"^{argument}: expected [^\n]*got [^\n]*$"):
            called(**arguments | {argument: value})
        assert model is None or list(map(type, model.modules())) == before


# Paths of no folder, which no step may begin with
@pytest.mark.parametrize("path", ["file", "file/below", "a" * 300, 3, b"folder"])
def test_an_output_dir_that_cannot_be_a_folder_is_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^output_dir: expected a folder, got [^\n]*$"):
        mk.MaskTrainer(a_model(), loss_fn, some_batches(), mk.Reinforce(), seed=1, output_dir=path)
    mk.MaskTrainer(a_model(), loss_fn, some_batches(), mk.Reinforce(), seed=1, output_dir="new/folder")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
