"""The claims over several seeds: a table of means and spreads, and a second call that takes no step again."""

from __future__ import annotations

import json

import claims
import pytest
import rows
from methods import ONE_SHOT

from maskpro_kernels.learn.trainer import MaskTrainer
from maskpro_kernels.prune.convert import gap_for_flip_rate

pytestmark = pytest.mark.usefixtures("eager_reference")


def rows_in(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / rows.ROWS).read_text(encoding="utf-8").splitlines()][1:]


def test_every_seed_has_its_rows_once(arguments, tmp_path, monkeypatch, capsys):
    output, gaps, run = tmp_path / "output", [], MaskTrainer.run

    def counted(trainer, steps):
        first = next(iter(trainer.layers.values())).logits.detach()
        gaps.append(float(first.max() - first.min()))
        return run(trainer, steps, False)

    monkeypatch.setattr(MaskTrainer, "run", counted)
    monkeypatch.setattr(claims, "SEARCH", claims.SEARCH[::3])
    flip_rates = [given["flips"] for given in claims.SEARCH]
    claims.main([*arguments, "--output", str(output), "--seeds", "2", "--steps", "1", "2"])
    reported, runs = capsys.readouterr().out, len(gaps)
    # two that the first seed searches among, and the three of each seed
    assert runs == 2 + 2 * 3
    assert gaps[:2] == pytest.approx([gap_for_flip_rate(flips, "2:4") for flips in flip_rates], abs=1e-3)
    for seed in (0, 1):
        names = {row["method"] for row in rows_in(output / f"seed-{seed}")}
        assert names == {"dense", *ONE_SHOT, "sparsegpt, its weights", *claims.LEARNERS}
    assert "| dense |  | 0 |" in reported and "±" in reported
    claims.main([*arguments, "--output", str(output), "--seeds", "2", "--steps", "1", "2"])
    assert len(gaps) == runs and reported.endswith(capsys.readouterr().out)
    with pytest.raises(SystemExit):
        claims.main([*arguments, "--output", str(output), "--seeds", "0"])
