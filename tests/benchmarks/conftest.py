"""A tiny model and two texts, as the comparisons of methods take them; imported late as by those of checkpoints."""

from __future__ import annotations

import pytest


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    from helpers.tiny_llama import tiny_text, write_inputs

    folder = write_inputs(tmp_path / "inputs")
    (folder / "text.txt").write_text(tiny_text(paragraphs=200), encoding="utf-8")
    (folder / "other.txt").write_text(tiny_text(paragraphs=60, seed=1), encoding="utf-8")
    text, other = str(folder / "text.txt"), str(folder / "other.txt")
    sizes = (
        "--batch-size 4 --seq-len 16 --init-batches 2 --eval-windows 2 --eval-length 24 --dtype float32 --device cpu"
    )
    data = f"{text}:0.5,self:0.5"
    return ["--model", str(folder / "model"), "--data", data, "--samples", "6", "--test", text, other, *sizes.split()]
