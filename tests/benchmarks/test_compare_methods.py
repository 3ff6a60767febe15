"""The comparison of methods: rows of all of them, kept as they come; a second call takes no step again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import compare
import pytest
import rows
from methods import LEARNERS, METHODS

from maskpro_kernels.learn.trainer import MaskTrainer

pytestmark = pytest.mark.usefixtures("eager_reference")


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / rows.ROWS).read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_every_method_has_its_rows_once(arguments, tmp_path, monkeypatch, capsys):
    output, runs = tmp_path / "output", []
    run = MaskTrainer.run
    monkeypatch.setattr(MaskTrainer, "run", lambda trainer, steps: runs.append(steps) or run(trainer, steps, False))
    arguments += ["--output", str(output)]
    compare.main([*arguments, "--steps", "1", "--methods", "wanda", "maskllm"])
    assert runs == [1] * 5
    samples = (output / "samples.safetensors").read_bytes()
    compare.main([*arguments, "--steps", "2", "1"])
    assert (output / "samples.safetensors").read_bytes() == samples
    # of each learner the default and others; with two steps the default, and the best where it is another one
    more = [row for row in lines(output)[1:] if row["steps"] == 2 and row["method"] in LEARNERS]
    assert runs.count(1) == sum(len(learner.candidates()) for learner in LEARNERS.values())
    assert runs.count(2) == len(more) and 5 <= len(more) <= 10
    first, *found = lines(output)
    assert first["shared"]["batch_size"] == 4
    names = {row["method"] for row in found}
    assert names == {"dense", *METHODS, "sparsegpt, its weights", "proxsparse, its weights"}
    dense = next(row for row in found if row["method"] == "dense")
    for row in found:
        assert list(row["perplexity"]) == ["text.txt", "other.txt"] and {"commit", "device", "torch"} <= row.keys()
        ratios = [row["perplexity"][text] / dense["perplexity"][text] for text in dense["perplexity"]]
        assert row["score"] == pytest.approx(math.sqrt(math.prod(ratios)))
        assert row["tokens"] == row["steps"] * 64
        assert row["weights"] == ("own" if "its weights" in row["method"] else "dense")
    state = {row["method"]: row["state_bytes_per_weight"] for row in found}
    # of six masks a group, of one logit, of one weight, each with two moments; of logits alone
    assert (state["maskllm"], state["relaxed-top-k"], state["proxsparse"]) == (18.0, 12.0, 12.0)
    assert (state["reinforce"], state["wanda"]) == (4.0, 0.0)
    # and of a float a row for the curvature, which is little where rows are long
    assert 4.0 < state["straight-through"] < 4.25
    before, reported = (output / rows.TABLE).read_text(encoding="utf-8"), len(runs)
    capsys.readouterr()
    compare.main([*arguments, "--steps", "1", "2"])
    assert len(runs) == reported and capsys.readouterr().out == before
    assert before.count("\n") == len(found) + 2 and "**lr" in before
    with pytest.raises(
        SystemExit, match="^error: output: expected the rows of a comparison with the same seed, got others"
    ):
        compare.main([*arguments, "--seed", "1"])
    text = Path(arguments[arguments.index("--data") + 1].partition(":")[0])
    text.write_text(text.read_text(encoding="utf-8") + "\n\nOne more.", encoding="utf-8")
    with pytest.raises(SystemExit, match="^error: output: expected the rows of a comparison with the same texts, got"):
        compare.main([*arguments, "--steps", "1", "2"])
