"""Flipped bits of what a run leaves: refused, rebuilt to the same values, or told; never silent, never a traceback."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.flips import OUTCOMES, outcomes, stride_of_a_sample
from helpers.small_trainer import a_model, a_trainer_in, logits_of
from helpers.tiny_llama import tiny_model, tiny_tokenizer

import maskpro_kernels as mk
from maskpro_kernels import hf
from maskpro_kernels.checkpoints.logits import save_logits
from maskpro_kernels.cli.export import _learned
from maskpro_kernels.cli.perplexities import ValidationPerplexities
from maskpro_kernels.cli.run_files import read_report, read_settings

# No journal holds them
MEASURED = ("flip_rate", "seconds")

pytestmark = pytest.mark.usefixtures("eager_reference")


def what_a_trainer_goes_on_with(folder: Path, how: str) -> Callable:
    """Reads the folder of a run as ``resume`` does, and restores it."""
    trainer = a_trainer_in(folder, how)
    trainer.run(3, progress=False)
    trainer.close()
    files = {path: path.read_bytes() for path in folder.iterdir() if path.name not in ("journal", "metrics.jsonl")}
    mended = {path: path.read_bytes() for path in folder.iterdir() if path not in files}
    # to convert one takes longer than all else
    model = a_model()

    def read():
        damaged = {path: path.read_bytes() for path in mended}
        again = a_trainer_in(folder, how, model=model)
        try:
            steps = again.resume()
        finally:
            again.close()
            for path in set(folder.iterdir()) - files.keys() - mended.keys():
                path.unlink()
            for path, content in (files | damaged).items():
                path.write_bytes(content)
        rows = [{name: row[name] for name in row if name not in MEASURED} for row in again.metrics]
        return steps, rows, [logits.tolist() for logits in logits_of(again.model)]

    return read


def metrics_of(how: str) -> Callable:
    return lambda folder, run: (folder / "metrics.jsonl", what_a_trainer_goes_on_with(folder, how))


def a_journal(folder: Path, run: Path):
    return folder / "journal", what_a_trainer_goes_on_with(folder, "reinforce")


def settings(folder: Path, run: Path):
    shutil.copy(run / "settings.json", folder)
    return folder / "settings.json", lambda: json.dumps(read_settings(folder))


def a_report(folder: Path, run: Path):
    shutil.copy(run / "report.json", folder)
    return folder / "report.json", lambda: json.dumps(read_report(folder / "report.json"))


def perplexities(folder: Path, run: Path):
    shutil.copy(run / "progress" / "validation.jsonl", folder)

    def read():
        found = ValidationPerplexities(folder / "validation.jsonl", None, None, 1, 1, bars=False)
        found.run = json.loads((run / "settings.json").read_text())["run"]
        found.read()
        return found.rows

    return folder / "validation.jsonl", read


def logits(folder: Path, run: Path):
    metadata = {"model": "m", "pattern": "2:4", "dtype": "float32", "weights": "a" * 32, "dense_weights": "a" * 32}
    save_logits(a_model(), folder / "logits.safetensors", metadata | {"weights_are": "weights frozen", "run": "b" * 32})

    def read():
        learned, pattern = _learned(folder / "logits.safetensors")
        return {name: tensor.tolist() for name, tensor in learned.logits.items()}, learned.metadata, str(pattern)

    return folder / "logits.safetensors", read


def packed(name: str) -> Callable:
    def checkpoint(folder: Path, run: Path):
        sizes = {"vocab_size": 8, "hidden_size": 4, "intermediate_size": 8, "max_position_embeddings": 8}
        model = tiny_model(**sizes, num_hidden_layers=1, num_attention_heads=1).bfloat16()
        mk.convert(model, "2:4")
        mk.finalize(model, to="packed").save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)

        def read():
            loaded, _ = hf.load_model(str(folder), torch.bfloat16)
            return {key: tensor.tolist() for key, tensor in loaded.state_dict().items()}, loaded.config.to_json_string()

        return folder / name, read

    return checkpoint


# Those that are read fastest come first
FILES = {
    "logits.safetensors": logits,
    "validation.jsonl": perplexities,
    "metrics.jsonl of reinforce": metrics_of("reinforce"),
    "metrics.jsonl of straight-through": metrics_of("straight-through"),
    "settings.json": settings,
    "journal": a_journal,
    "packed model.safetensors": packed("model.safetensors"),
    "packed config.json": packed("config.json"),
    "report.json": a_report,
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Without the bars and the log of transformers."""
    hf.show_bars(False)
    monkeypatch.setattr(logging.getLogger("transformers"), "disabled", True)
    yield
    hf.show_bars(True)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "packed config.json" else name for name in FILES]
)
def test_a_sample_of_flipped_bits(name, run, tmp_path):
    path, read = FILES[name](tmp_path, run)
    found = outcomes(path, read, stride_of_a_sample(path, 40 if "trainer" in read.__qualname__ else 120))
    assert found["refused"] + found["rebuilt"] + found["told"] > 0.9 * sum(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_every_bit_flipped(name, run, tmp_path, capsys):
    """The table in docs/reproducibility.md, of whose packed files it has a sample; no bit is silent or a traceback."""
    path, read = FILES[name](tmp_path, run)
    found = outcomes(path, read)
    with capsys.disabled():
        print(f"\n| `{name}` | {sum(found.values())} | " + " | ".join(str(found[one]) for one in OUTCOMES) + " |")
