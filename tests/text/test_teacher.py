"""Whose logits a cache holds: it answers for one dense model alone, whatever becomes of the weights."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.straight_through import batches_of_tokens, masked_llama
from helpers.tiny_llama import tiny_model

import maskpro_kernels as mk
from maskpro_kernels.text import teacher
from maskpro_kernels.text.losses import distillation_loss
from maskpro_kernels.text.teacher import TeacherCache

pytestmark = pytest.mark.usefixtures("eager_reference")

OTHER = "^cache: expected logits of this model alone, got some of a model with other weights"


def scale_(model, name: str) -> None:
    with torch.no_grad():
        model.get_parameter(name).mul_(1.25)


def replace(model, name: str) -> None:
    module, _, own = name.rpartition(".")
    setattr(model.get_submodule(module), own, torch.nn.Parameter(1.25 * model.get_parameter(name).detach()))


@pytest.mark.parametrize("change", [scale_, replace])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_weights_that_have_changed_since_are_another_teacher(place, name, change, tmp_path):
    model, batches = masked_llama(gap=2.0), batches_of_tokens()
    loss = distillation_loss("kl", cache=TeacherCache(8, tmp_path if place == "disk" else None))
    before = float(loss(model, batches[0]).detach())
    plain = copy.deepcopy(model)
    change(model, name)
    # of a batch that is held, and of a new one
    for batch in batches[:2]:
        with pytest.raises(ValueError, match=OTHER):
            loss(model, batch)
    assert float(loss(plain, batches[0]).detach()) == before


def test_weights_are_read_again_only_where_they_may_have_changed(monkeypatch):
    model, batches = masked_llama(gap=2.0), batches_of_tokens()
    loss, digests, plain = distillation_loss("kl", cache=TeacherCache(8)), [], teacher.digest
    monkeypatch.setattr(teacher, "digest", lambda tensors: (digests.append(1), plain(tensors))[1])
    mk.MaskTrainer(model, loss, batches, mk.StraightThrough(lr=1.0), seed=0).run(3, progress=False)
    # one of the weights, and one of each batch
    assert len(digests) == 4


def test_weights_without_a_count_of_writes_are_read_each_time():
    with torch.inference_mode():
        model, batch = tiny_model(), batches_of_tokens()[0]
        loss = distillation_loss("kl", cache=TeacherCache(8))
        loss.fill(model, [batch])
        loss.fill(model, [batch])
        scale_(model, "model.norm.weight")
        with pytest.raises(ValueError, match=OTHER):
            loss.fill(model, [batch])


def test_a_model_with_a_tied_head_is_the_same_teacher_once_it_is_converted(tmp_path):
    model, batches = tiny_model(), batches_of_tokens()
    distillation_loss("kl", cache=TeacherCache(8, tmp_path)).fill(model, batches)
    mk.convert(model, "2:4", targets=["*_proj", "lm_head"])
    again = distillation_loss("kl", cache=TeacherCache(8, tmp_path))
    assert float(again(model, batches[0]).detach()) > 0


def filled(model, folder):
    """A loss whose cache in a folder has been filled, as the next process finds it."""
    distillation_loss("kl", cache=TeacherCache(8, folder)).fill(model, batches_of_tokens())
    return distillation_loss("kl", cache=TeacherCache(8, folder))


def trainer_with(loss, folder) -> mk.MaskTrainer:
    estimator = mk.StraightThrough(lr=1.0, train_weights=1e-3)
    return mk.MaskTrainer(masked_llama(gap=2.0), loss, batches_of_tokens(), estimator, seed=0, output_dir=folder)


def test_a_run_goes_on_with_the_same_teacher_alone(tmp_path):
    model, other = masked_llama(gap=2.0), masked_llama(gap=2.0)
    # the weights of masked layers are those of the run
    scale_(other, "model.norm.weight")
    first = trainer_with(filled(model, tmp_path / "one"), tmp_path / "run")
    first.run(2, progress=False)
    first.close()
    for loss in (filled(other, tmp_path / "two"), distillation_loss("kl", cache=TeacherCache(8, tmp_path / "none"))):
        with pytest.raises(ValueError, match="^output_dir: expected a run with loss teacher .*, got '"):
            trainer_with(loss, tmp_path / "run").resume()
    second = trainer_with(distillation_loss("kl", cache=TeacherCache(8, tmp_path / "one")), tmp_path / "run")
    assert second.resume() == 2
    second.run(1, progress=False)


def test_a_run_that_fills_its_cache_as_it_goes_goes_on(tmp_path):
    def trainer():
        loss = distillation_loss("kl", cache=TeacherCache(8, tmp_path / "teacher"))
        return mk.MaskTrainer(
            masked_llama(gap=2.0), loss, batches_of_tokens(), mk.StraightThrough(lr=1.0), seed=0, output_dir=tmp_path
        )

    first = trainer()
    first.run(2, progress=False)
    first.close()
    second = trainer()
    assert second.resume() == 2
    second.run(1, progress=False)


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_what_was_held_without_a_fill_does_not_outlive_the_weights(place, tmp_path):
    model, batches = masked_llama(gap=2.0), batches_of_tokens()
    loss = distillation_loss("kl", cache=TeacherCache(8, tmp_path if place == "disk" else None))
    loss(model, batches[0])
    model.model.layers[0].mlp.up_proj.weight_changed = True
    lacking = (
        "^cache: expected the dense model's logits (of every batch|to be filled in), got none.*weights have changed"
    )
    for act in (lambda: loss(model, batches[0]), lambda: loss.fill(model, batches)):
        with pytest.raises(ValueError, match=lacking) as error:
            act()
        assert ("a folder that all ranks have to see" in str(error.value)) == (place == "disk")


def test_a_folder_that_was_filled_for_a_model_takes_no_other(tmp_path):
    other = masked_llama(gap=2.0)
    scale_(other, "model.norm.weight")
    loss, files = filled(masked_llama(gap=2.0), tmp_path), sorted(tmp_path.iterdir())
    batch = torch.zeros(1, 4, dtype=torch.int64)
    for act in (lambda: loss.fill(other, [batch]), lambda: loss(other, batch)):
        with pytest.raises(ValueError, match=OTHER):
            act()
    assert sorted(tmp_path.iterdir()) == files
    for damage in (b"", b"[]", b"{}"):
        (tmp_path / teacher.TEACHER).write_bytes(damage)
        with pytest.raises(ValueError, match="^cache: .*a damaged one"):
            distillation_loss("kl", cache=TeacherCache(8, tmp_path)).settings()


def test_a_fill_that_is_broken_off_goes_on_behind_the_last_batch(tmp_path, monkeypatch):
    model, batches, asked, plain = masked_llama(gap=2.0), batches_of_tokens(), [], teacher.teacher_logits
    whole = filled(model, tmp_path / "whole")

    def asks(_, batch):
        asked.append(batch)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return plain(model, batch)

    monkeypatch.setattr(teacher, "teacher_logits", asks)
    with pytest.raises(KeyboardInterrupt):
        filled(model, tmp_path / "broken")
    again = distillation_loss("kl", cache=TeacherCache(8, tmp_path / "broken"))
    assert again.lacking(batches) == [1, 2] and whole.lacking(batches) == []
    filled(model, tmp_path / "broken")
    assert len(asked) == 4 and again.lacking(batches) == []
    assert [float(again(model, batch).detach()) for batch in batches] == [
        float(whole(model, batch).detach()) for batch in batches
    ]
