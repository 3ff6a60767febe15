"""The claims over several seeds: settings by the first one alone, means and spreads, and a resumed call."""

from __future__ import annotations

import json

import claims
import pytest
import rows
from compare import Comparison
from methods import ONE_SHOT

from maskpro_kernels.learn.trainer import MaskTrainer
from maskpro_kernels.prune.convert import gap_for_flip_rate

pytestmark = pytest.mark.usefixtures("eager_reference")


def rows_in(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / rows.ROWS).read_text(encoding="utf-8").splitlines()][1:]


def test_the_first_seed_chooses_by_validation_text(arguments, tmp_path, monkeypatch, capsys):
    """Not by the test texts; and a row is the mean over the seeds, with its spread."""
    made, wanted = [], claims.SEARCH[2]

    def learn(self, name, settings, steps):
        if self.rows.find(name, settings, steps) is not None:
            return
        lr, flips, seed = settings.get("lr", 1.0), settings.get("flips", 0.0), self.args.seed
        made.append((seed, name, lr, flips, steps))
        row = {"method": name, "settings": dict(settings), "steps": steps, "weights": "dense", "seconds": 1000.0}
        validation = abs(lr - wanted["lr"]) + abs(flips - wanted["flips"]) + seed
        row |= {"validation": validation, "perplexity": {"a": lr + seed}}
        row |= {"score": 2.0 * (1 + seed), "changed_groups": 1000 * seed, "state_bytes_per_weight": 0.0}
        self.rows.add([row])

    monkeypatch.setattr(Comparison, "learn", learn)
    monkeypatch.setattr(claims.Claims, "without_steps", lambda self: None)
    claims.main([*arguments, "--output", str(tmp_path / "output"), "--seeds", "2", "--steps", "3", "5"])
    tuned = claims.FlipRate.name
    searched = [row for row in made if row[1] == tuned and row[4] == 3]
    assert [row[2:4] for row in searched] == [(given["lr"], given["flips"]) for given in claims.SEARCH]
    assert {row[0] for row in searched} == {0}
    assert [row for row in made if row[1] == tuned and row[4] == 5] == [
        (0, tuned, wanted["lr"], wanted["flips"], 5),
        (1, tuned, wanted["lr"], wanted["flips"], 5),
    ]
    reported = capsys.readouterr().out.splitlines()
    assert reported[0] == "| method | settings | steps | a | score | groups that moved | seconds |"
    assert reported[2] == "| dense |  | 0 | 1.50 ± 0.71 | 3.00 ± 1.41 | 500 | 1,000 |"
    assert len(reported) == 2 + 1 + len(ONE_SHOT) + 3


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
