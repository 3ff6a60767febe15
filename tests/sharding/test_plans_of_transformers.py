"""LLaMA and Qwen3 as transformers cuts them by its own plan, and runs that go on with other meshes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.cut_models import loaded, tokens, write_checkpoint
from helpers.in_ranks import all_in_ranks
from helpers.rank_jobs import rank_trainer
from helpers.sharded_jobs import whole_logits
from transformers import AutoModelForCausalLM

import maskpro_kernels as mk
from maskpro_kernels.digests import digest
from maskpro_kernels.files import discard

STEPS = 20


def rounded_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """In steps of 1 / 256: the order of a sum does not tell, but where it crosses one."""
    return (256 * language_loss(model, batch)).round() / 256


def language_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch, use_cache=False).loss.float()


def learn(
    rank: int,
    path: str,
    how: str,
    steps: int,
    cut_by: str | None,
    folder: str | None = None,
    save: str | None = None,
    rounded: bool = True,
) -> dict:
    """A run, which goes on where its folder holds one, and what the finished model gives."""
    model = loaded(path, cut_by, rank)
    found = mk.convert(model, "2:4", gap=2.0)
    loss = rounded_loss if how == "reinforce" and rounded else language_loss
    batches = [{"input_ids": ids, "labels": ids} for ids in tokens()]
    trainer = rank_trainer(how, model=model, batches=batches, loss_fn=loss, accumulate=2, output_dir=folder)
    if folder is not None and any(Path(folder).glob("snapshot-*")):
        trainer.resume()
    records = trainer.run(steps - trainer.steps_done, progress=False)
    trainer.close()
    logits = whole_logits(model)
    masks = [mk.top_n_mask(one, "2:4") for one in logits]
    if save is not None:
        model.save_pretrained(f"{save}/masked")
    mk.finalize(model)
    if save is not None:
        model.save_pretrained(f"{save}/dense")
    prompt = tokens()[0, :, :4]
    # FSDP2 hooks to forward alone
    gathered = cut_by in ("fully_shard", "both")
    text = None if gathered else model.eval().generate(prompt, max_new_tokens=12, pad_token_id=0)
    return {
        "converted": found.converted,
        "losses": [record.loss for record in records],
        "logits": logits,
        "digest": digest([*masks, *logits]),
        "tokens": text,
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_plans_as_loaded_learn_by_the_bits_of_one_process(name, tmp_path, eager_reference):
    path = write_checkpoint(name, tmp_path)
    of = {"path": path, "how": "reinforce", "steps": STEPS}
    alone = learn(0, cut_by=None, **of)
    assert len(alone["converted"]) == 14
    # they have moved from 2 where a weight is kept, and 0
    assert all((one % 2 != 0).any() for one in alone["logits"])
    for theirs in all_in_ranks(2, learn, cut_by="plan", save=str(tmp_path), **of):
        assert theirs["converted"] == alone["converted"]
        assert theirs["losses"] == alone["losses"]
        assert theirs["digest"] == alone["digest"]
        assert_same_bits(theirs["tokens"], alone["tokens"])
    # what the ranks have written together is read by one process
    masked = AutoModelForCausalLM.from_pretrained(tmp_path / "masked")
    assert_same_bits(whole_logits(masked), alone["logits"])
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    mk.finalize(masked)
    for one, other in zip(dense.parameters(), masked.parameters(), strict=True):
        assert_same_bits(one, other)


@pytest.mark.slow
def test_plans_that_shard_too_learn_by_the_bits_of_one_process(tmp_path, eager_reference):
    """Begun on a mesh [fsdp, tp] of four ranks, and gone on with two and by one process."""
    path, folder = write_checkpoint("llama", tmp_path), str(tmp_path / "run")
    alone = learn(0, path, "reinforce", STEPS, None)
    for theirs in all_in_ranks(4, learn, path=path, how="reinforce", steps=STEPS, cut_by="both", folder=folder):
        assert theirs["losses"] == alone["losses"]
        assert theirs["digest"] == alone["digest"]
    discard(max(Path(folder).glob("snapshot-*")))
    longer = learn(0, path, "reinforce", STEPS + 1, None)
    for theirs in all_in_ranks(2, learn, path=path, how="reinforce", steps=STEPS + 1, cut_by="plan", folder=folder):
        assert theirs["digest"] == longer["digest"]


@pytest.mark.slow
def test_straight_through_of_a_plan_learns_the_masks_of_one_process(tmp_path, eager_reference):
    of = {"path": write_checkpoint("llama", tmp_path), "how": "straight-through", "steps": STEPS}
    alone = learn(0, cut_by=None, **of)
    first, second = all_in_ranks(2, learn, cut_by="plan", **of)
    assert first["digest"] == second["digest"]
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    for one, other in zip(first["logits"], alone["logits"], strict=True):
        assert ((one - other).abs() < 1e-3).float().mean() > 0.99
        assert (mk.top_n_mask(one, "2:4") == mk.top_n_mask(other, "2:4")).float().mean() > 0.99


@pytest.mark.slow
def test_the_journal_of_a_plan_gives_its_bits_on_one_process(tmp_path, eager_reference):
    """Whatever rounding its losses have had."""
    path, folder = write_checkpoint("llama", tmp_path), tmp_path / "run"
    of = {"path": path, "how": "reinforce", "steps": STEPS, "rounded": False}
    first, second = all_in_ranks(2, learn, cut_by="plan", folder=str(folder), **of)
    assert first["digest"] == second["digest"]
    assert first["losses"] == pytest.approx(learn(0, cut_by=None, **of)["losses"], rel=1e-5)
    discard(max(folder.glob("snapshot-*")))
    model = loaded(path, None, 0)
    mk.convert(model, "2:4", gap=2.0)
    batches = [{"input_ids": ids, "labels": ids} for ids in tokens()]
    trainer = rank_trainer(
        "reinforce", model=model, batches=batches, loss_fn=language_loss, accumulate=2, output_dir=folder
    )
    assert trainer.resume() == STEPS
    trainer.close()
    assert_same_bits(whole_logits(model), first["logits"])


@pytest.mark.slow
@pytest.mark.parametrize("meshes", [("fully_shard", "plan"), ("plan", "fully_shard"), ("plan", None), (None, "plan")])
def test_runs_go_on_with_other_meshes(meshes, tmp_path, eager_reference):
    """By the journal too: the second part takes the last steps of the first one again."""
    path, folder = write_checkpoint("llama", tmp_path), str(tmp_path / "run")
    digests = []
    for cut_by, steps in zip(meshes, (3, 6), strict=True):
        of = {"path": path, "how": "reinforce", "steps": steps, "cut_by": cut_by, "folder": folder}
        digests = [r["digest"] for r in (all_in_ranks(2, learn, **of) if cut_by else [learn(0, **of)])]
        newest = max(Path(folder).glob("snapshot-*"))
        discard(newest)
    assert set(digests) == {learn(0, path, "reinforce", 6, None)["digest"]}
