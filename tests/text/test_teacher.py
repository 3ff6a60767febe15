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
