"""Digests of what an earlier version has drawn and learned: every later one gives the same bits.

All inputs are small multiples of a power of two and all losses are sums of integers, so that no processor rounds them
differently.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import zlib
from pathlib import Path

import pytest
import torch
from helpers.cases import slow
from helpers.routes import take_route
from torch import Tensor, nn

import maskpro_kernels as mk
from maskpro_kernels.files import SIZE
from maskpro_kernels.learn.journal import pack_entry, read_journal

GOLDENS = json.loads((Path(__file__).parent / "goldens.json").read_text())
ROWS, SEED = 33, 12345678901234
PATTERNS = ["1:2", "1:4", "2:4", "3:4", "4:8", "5:8", "8:16"]
# The interpreter and the compiler take little time for these; test_bits.py compares other patterns with the reference
QUICK = [*itertools.product(["2:4"], ["float32", "bfloat16", "float16"]), ("4:8", "bfloat16")]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RUNS = {
    "one draw": {"estimator": {"lr": 4.0, "alpha": 0.9}},
    "three draws, normalized": {"estimator": {"lr": 0.5, "draws": 3, "normalize": True}, "accumulate": 2},
    "bfloat16": {"estimator": {"lr": 4.0, "tracker": "before"}, "logits_dtype": torch.bfloat16},
    "4:8": {"estimator": {"lr": 4.0, "refresh": True}, "pattern": "4:8", "logits_dtype": torch.float16},
    "8:16": {"estimator": {"lr": 4.0}, "pattern": "8:16"},
}


def digest(*tensors: Tensor) -> str:
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(f"{list(tensor.shape)} {tensor.dtype}".encode())
        whole.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
    return whole.hexdigest()[:16]


def exact(*shape: int, seed: int) -> Tensor:
    """Multiples of 1/8 within +-16."""
    return torch.randint(-128, 129, shape, generator=torch.Generator().manual_seed(seed)) / 8


def operations(pattern: str, dtype: torch.dtype) -> dict[str, str]:
    """Digests of draws, masked weights and updates, of whole layers and of shards."""
    n, m = mk.NMPattern(pattern).n, mk.NMPattern(pattern).m
    logits, weight = exact(ROWS, 6 * m, seed=1).to(dtype), exact(ROWS, 6 * m, seed=2).to(dtype)
    place = {"step": 7, "layer": 3, "group_offset": 11, "group_row_stride": 11}
    one, several, codes = logits.clone(), logits.clone(), mk.sample_mask(logits, pattern, seed=3)
    mk.score_update_(one, 0.375, pattern=pattern, temperature=0.75, seed=SEED, draw=4, **place)
    mk.score_update_(several, [0.375, -1.5, 0.25], pattern=pattern, seed=SEED, draw=[0, 3, 9], **place)
    probable = mk.mask_log_prob(logits, codes, pattern) if n <= 4 else logits
    return {
        "log-probability": digest(probable),
        "slope": digest(slope(pattern, dtype)),
        "mask": digest(mk.sample_mask(logits, pattern, seed=-5)),
        "mask of a shard": digest(mk.sample_mask(logits, pattern, temperature=0.75, seed=SEED, draw=2, **place)),
        "masked weight": digest(mk.sample_masked_weight(weight, logits, pattern, seed=SEED, draw=1, **place)),
        "top-N mask": digest(mk.top_n_mask(logits, pattern)),
        "update": digest(one),
        "update by several draws": digest(several),
    }


def slope(pattern: str, dtype: torch.dtype) -> Tensor:
    """Straight-through gradients of logits, from integers below 16."""
    k = 4 * mk.NMPattern(pattern).m
    x, weight, grad = (exact(*shape, seed=seed).sign() for seed, shape in enumerate(((4, k), (16, k), (4, 16))))
    logits = exact(16, k, seed=3).to(dtype).requires_grad_()
    mk.straight_through_linear(x, weight, logits, pattern=pattern, seed=SEED, layer=5).backward(grad)
    return logits.grad


class Exact(nn.Module):
    """Two layers of integers, whose masked weights alone decide the loss."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 48, bias=False), nn.Linear(48, 16, bias=False)
        with torch.no_grad():
            for seed, layer in enumerate((self.up, self.down)):
                layer.weight.copy_(8 * exact(*layer.weight.shape, seed=seed))


def exact_loss(model: Exact, batch: Tensor) -> float:
    """A sum of integers, over a power of two."""
    weights = [layer.masked_weight().double() for layer in (model.up, model.down)]
    return (
        sum(float((weight * factor).sum()) for weight, factor in zip(weights, batch.view(-1, 1, 1), strict=True)) / 4096
    )


def run(folder: Path, estimator: dict, pattern: str = "2:4", logits_dtype=torch.float32, **settings) -> list[str]:
    """Digests of the logits and of the journal's records of 20 steps by REINFORCE."""
    model, batches = Exact(), [torch.tensor([first, 3 - first]).double() for first in range(3)]
    mk.convert(model, pattern, gap=2.0, logits_dtype=logits_dtype)
    trainer = mk.MaskTrainer(
        model, exact_loss, batches, mk.Reinforce(**estimator), seed=5, output_dir=folder, **settings
    )
    trainer.run(20, progress=False)
    trainer.close()
    # each with its checksum at the time of the goldens
    bodies = [pack_entry(entry, b"")[:-SIZE] for entry in read_journal(folder / "journal").entries]
    content = b"".join(body + zlib.crc32(body).to_bytes(4, "little") for body in bodies)
    return [digest(model.up.logits, model.down.logits), hashlib.sha256(content).hexdigest()[:16]]


def cases():
    """Every pattern, dtype and route; what takes the interpreter or the compiler many seconds is slow."""
    for route, pattern, dtype in itertools.product(("eager", "compiled", "kernels"), PATTERNS, DTYPES):
        dear = route != "eager" and (pattern, dtype) not in QUICK
        yield pytest.param(route, pattern, dtype, marks=[pytest.mark.slow] if dear else [])


@pytest.mark.parametrize(("route", "pattern", "dtype"), list(cases()))
def test_draws_and_updates_are_those_of_an_earlier_version(route, pattern, dtype, monkeypatch):
    take_route(monkeypatch, route)
    assert operations(pattern, DTYPES[dtype]) == GOLDENS[f"{pattern} {dtype}"]


class Signs(nn.Module):
    """A layer of -1, 0 and 1, whose slopes and their squares are sums of few multiples of 1/8."""

    def __init__(self):
        super().__init__()
        self.only = nn.Linear(32, 16, bias=False)
        with torch.no_grad():
            self.only.weight.copy_(exact(16, 32, seed=0).sign())

    def forward(self, x: Tensor) -> Tensor:
        return self.only(x)


def signs_loss(model: Signs, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, factor = batch
    return (model(x) * factor).sum() / 4


def straight_through_run(folder: Path, pattern: str, logits_dtype: torch.dtype) -> str:
    """Digest of the logits of 20 steps."""
    model = Signs()
    batches = [(exact(4, 32, seed=10 + i).sign(), exact(4, 16, seed=20 + i).sign()) for i in range(3)]
    mk.convert(model, pattern, gap=2.0, logits_dtype=logits_dtype)
    trainer = mk.MaskTrainer(model, signs_loss, batches, mk.StraightThrough(lr=0.3, steps=20), seed=5)
    trainer.run(20, progress=False)
    return digest(model.only.logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", slow("float16")])
@pytest.mark.parametrize("pattern", [slow("1:4"), "2:4", "4:8"])
@pytest.mark.parametrize("route", ["eager", "compiled", pytest.param("kernels", marks=pytest.mark.slow)])
def test_straight_through_runs_are_those_of_an_earlier_version(route, pattern, dtype, tmp_path, monkeypatch):
    take_route(monkeypatch, route)
    expected = GOLDENS[f"straight-through, {pattern} {dtype}"]
    assert straight_through_run(tmp_path, pattern, DTYPES[dtype]) == expected


@pytest.mark.parametrize("name", [slow(name) if name == "8:16" else name for name in RUNS])
def test_runs_and_their_journals_are_those_of_an_earlier_version(name, tmp_path, eager_reference):
    assert run(tmp_path, **RUNS[name]) == GOLDENS[name]
