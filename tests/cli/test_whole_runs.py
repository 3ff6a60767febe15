"""Masks, logits and checkpoints of whole runs of the command, compared with stored ones.

Group codes and packed tensors are compared by digest: weights are multiples of 1/256, so packing rounds them alike on
every processor. Logits depend on how a processor adds up a matmul, so their sums are compared with a tolerance.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from helpers.tiny_llama import tiny_model, tiny_text, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import maskpro_kernels as mk
import maskpro_kernels.hf  # transformers loads packed weights after it
from maskpro_kernels.checkpoints.logits import load_logits
from maskpro_kernels.checkpoints.mask_file import load_masks
from maskpro_kernels.cli import main
from maskpro_kernels.packed import NMLinear

pytestmark = pytest.mark.usefixtures("eager_reference")

GOLDENS = Path(__file__).with_name("whole_runs.json")
EXPECTED = json.loads(GOLDENS.read_text()) if GOLDENS.is_file() else {}
SIZES = "--steps 3 --batch-size 4 --seq-len 16 --calibration-batches 3 --eval-windows 4 --seed 3"
WAYS = {
    "straight-through": "--estimator straight-through --init reconstruction --gap 2 --lr 1",
    "straight-through, refitted and trained": "--estimator straight-through --init reconstruction --gap 2 "
    "--refit weights --train-weights 0.001",
    "reinforce": "--estimator reinforce --init wanda --gap 2 --lr 5",
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folder with a model whose weights are multiples of 1/256, and a text."""
    folder = tmp_path_factory.mktemp("sources")
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            rounded = (parameter * 256 * 4).round() / 256
            # no group may have fewer than two kept weights that are not 0
            parameter.copy_(torch.where(rounded == 0, 1 / 256, rounded))
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(tiny_text(), encoding="utf-8")
    return folder


def command(sources: Path, way: str, output: Path) -> list[str]:
    given = ["--model", str(sources / "model"), "--data", str(sources / "text.txt")]
    options = f"--device cpu --dtype float32 {SIZES} {WAYS[way]}".split()
    return ["learn", *given, *options, "--output", str(output)]


@pytest.fixture(scope="module")
def runs(sources, tmp_path_factory):
    """Folder with a finished run of each way, by its name."""
    from helpers.routes import route_to_the_eager_reference

    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        route_to_the_eager_reference(monkeypatch)
        for way in WAYS:
            assert main.main(command(sources, way, folder / way)) == 0
    return folder


def digest(tensors: dict[str, torch.Tensor]) -> str:
    whole = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        whole.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        whole.update(tensor.flatten().view(torch.uint8).numpy())
    return whole.hexdigest()[:16]


def masks(folder: Path) -> str:
    """Digest of the codes of all layers in a dense checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    return digest({name: mk.pack_mask(layer.weight != 0, "2:4") for name, layer in layers.items() if name != "lm_head"})


def packed(folder: Path) -> str:
    """Digest of all packed tensors of a checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, NMLinear)}
    assert len(layers) == 14
    return digest(
        {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.state_dict().items()}
    )


def greedy(folder: Path) -> list[int]:
    """16 tokens that a checkpoint writes."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    begun = tokenizer("w3 w1 w4 w1 w5", return_tensors="pt").input_ids
    return model.generate(begun, max_new_tokens=16, do_sample=False, pad_token_id=1)[0, begun.shape[1] :].tolist()


def sums(folder: Path) -> list[float]:
    """Of the logits of a run: their sum, that of their magnitudes and of their squares."""
    logits = load_logits(folder / "learned/logits.safetensors").logits
    whole = torch.cat([logits[name].double().flatten() for name in sorted(logits)])
    return [float(whole.sum()), float(whole.abs().sum()), float(whole.square().sum())]


def compare(name: str, found: object) -> None:
    expected = EXPECTED[name]
    if isinstance(found, list) and isinstance(found[0], float):
        expected = pytest.approx(expected, rel=2e-5)
    assert found == expected, f"{name}: {found}"


@pytest.mark.parametrize("way", WAYS)
def test_learned_masks_and_logits(way, runs):
    compare(f"{way}: masks", masks(runs / way))
    compare(f"{way}: sums of logits", sums(runs / way))
    compare(f"{way}: greedy tokens", greedy(runs / way))


@pytest.mark.parametrize("values", ["keep", "int8"])
def test_packed_export(values, runs, tmp_path):
    arguments = ["export", str(runs / "straight-through"), str(tmp_path / "packed"), "--to", "packed"]
    assert main.main([*arguments, "--values", values]) == 0
    compare(f"packed, {values}", packed(tmp_path / "packed"))
    compare(f"packed, {values}: greedy tokens", greedy(tmp_path / "packed"))


def test_mask_file(runs, tmp_path):
    assert main.main(["export", str(runs / "straight-through"), str(tmp_path / "mask"), "--to", "mask"]) == 0
    mask = load_masks(tmp_path / "mask")
    codes = {name: mask.codes(name) for name in mask.layers}
    assert digest(codes) == EXPECTED["straight-through: masks"]
