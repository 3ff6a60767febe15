"""REINFORCE for a number of forwards: a search by validation text, and the best with all forwards."""

from __future__ import annotations

import json

import forwards
import long_run
import pytest
import rows
import torch

from maskpro_kernels import mask_log_prob, pack_mask, top_n_mask
from maskpro_kernels.learn.trainer import MaskTrainer
from maskpro_kernels.prune.convert import gap_for_flip_rate

pytestmark = pytest.mark.usefixtures("eager_reference")

SIZES = "--batches 3 --forwards 40 --search-forwards 20".split()
SEARCH = ({"draws": 1}, {"accumulate": 2}, {"enough": 0.5})


class Killed(BaseException):
    pass


@pytest.fixture
def short_search(monkeypatch):
    monkeypatch.setattr(forwards, "LEARNER", forwards.Learner(forwards.FlipRate, forwards.FIRST, SEARCH))


def figures(folder) -> list[dict]:
    """The rows of REINFORCE, without seconds."""
    lines = (folder / rows.ROWS).read_text(encoding="utf-8").splitlines()
    found = [row for row in map(json.loads, lines[1:]) if row["method"] == forwards.FlipRate.name]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found]


def run(arguments, folder, *more):
    forwards.main([*arguments, "--output", str(folder), *SIZES, *more])


@pytest.mark.usefixtures("short_search")
def test_the_best_of_a_short_search_takes_all_forwards(arguments, tmp_path, monkeypatch, capsys):
    losses = []
    loss = long_run.causal_lm_loss

    def counted(model, batch):
        losses.append(batch)
        return loss(model, batch)

    monkeypatch.setattr(long_run, "causal_lm_loss", counted)
    whole = tmp_path / "whole"
    run(arguments, whole)
    *search, last = figures(whole)
    candidates = forwards.LEARNER.candidates()
    assert [row["settings"] for row in search] == candidates
    # one draw a step has 17 steps, and 3 losses under the initial mask
    assert [row["steps"] for row in search] == [5, 17, 2, 5]
    chosen = min(search, key=lambda row: row["validation"])["settings"]
    assert last["settings"] == chosen
    steps = (40 - (3 if chosen["draws"] == 1 else 0)) // (chosen["draws"] * chosen["accumulate"])
    assert last["steps"] == steps
    of_last = steps * chosen["draws"] * chosen["accumulate"] + (3 if chosen["draws"] == 1 else 0)
    assert len(losses) == 20 + 20 + 16 + 20 + of_last
    assert not list(whole.glob("search-*"))
    # killed in the search and in the run of all forwards, it ends with the same rows
    losses.clear()
    again = tmp_path / "again"
    step = MaskTrainer.step
    # after 26 of the search's 29 steps, and after one of the steps of all forwards
    for interrupted in (26, 4):
        steps_before = iter(range(interrupted))

        def killed_step(trainer, steps_before=steps_before):
            if next(steps_before, None) is None:
                raise Killed
            return step(trainer)

        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(MaskTrainer, "step", killed_step)
            run(arguments, again)
    run(arguments, again)
    assert figures(again) == figures(whole)
    assert len(losses) == 20 + 20 + 16 + 20 + of_last


def test_an_advantage_that_is_enough_moves_the_groups_that_were_flipped(arguments, tmp_path):
    args = forwards.parsed([*arguments, "--output", str(tmp_path / "out"), *SIZES])
    comparison = forwards.Forwards(args)
    for settings in forwards.LEARNER.candidates():
        estimator = comparison.estimator_of(forwards.FlipRate.name, settings, 5)
        gap = comparison.gap_of(estimator)
        assert gap == gap_for_flip_rate(settings["flips"], "2:4")
        logits = torch.tensor([[gap, gap, 0.0, 0.0]], requires_grad=True)
        flipped = pack_mask(torch.tensor([[True, False, True, False]]), "2:4")
        (score,) = torch.autograd.grad(mask_log_prob(logits, flipped, "2:4").sum(), logits)
        for share, moved in ((0.9, False), (1.1, True)):
            advantage = -share * settings["enough"]
            after = logits.detach() - estimator.lr / estimator.draws * advantage * score
            assert torch.equal(top_n_mask(after, "2:4"), flipped) == moved


@pytest.mark.parametrize("wrong", [["--forwards", "18"], ["--search-forwards", "4"], ["--batches", "0"]])
def test_wrong_numbers_are_refused(arguments, tmp_path, wrong):
    with pytest.raises(SystemExit, match="^2$"):
        run(arguments, tmp_path, *wrong)
    assert not list(tmp_path.glob(rows.ROWS))
