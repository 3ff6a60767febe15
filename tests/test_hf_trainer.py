"""The Trainer of transformers on sparse models."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.tiny_llama import tiny_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import maskpro_kernels as mk
from maskpro_kernels.hf import KeepMask
from maskpro_kernels.kept_zeros import KeptZeros
from maskpro_kernels.modules import masked_layers

pytestmark = pytest.mark.usefixtures("eager_reference")

LAYER = "model.layers.0.mlp.down_proj"


def texts(count: int = 16) -> list[dict]:
    ids = torch.randint(0, 30, (count, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def trained(model, folder, steps: int = 20, callbacks=(), **options) -> Trainer:
    options = {"learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.5} | options
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, report_to="none", use_cpu=True,
        disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=texts(), callbacks=list(callbacks))
    trainer.train()
    return trainer


def sparse(pattern: str = "2:4"):
    model = tiny_model()
    mk.convert(model, pattern)
    return mk.finalize(model).requires_grad_()


def counts(model, pattern) -> list[torch.Tensor]:
    """Of each group of each layer the weights that are not zero."""
    kept = KeptZeros(sparse(pattern), pattern).layers
    return [(model.get_submodule(name).weight.view(-1, mk.NMPattern(pattern).m) != 0).sum(1) for name in kept]


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_keep_mask_keeps_the_pattern_exactly(pattern, tmp_path):
    before, n = sparse(pattern), mk.NMPattern(pattern).n
    model = sparse(pattern)
    trained(model, tmp_path, callbacks=[KeepMask(pattern)])
    assert all((count == n).all() for count in counts(model, pattern))
    zeros = before.get_submodule(LAYER).weight == 0
    assert torch.equal(model.get_submodule(LAYER).weight == 0, zeros)
    assert (model.get_submodule(LAYER).weight != before.get_submodule(LAYER).weight)[~zeros].all()


def test_without_it_the_pattern_is_lost(tmp_path):
    """The fault that it is there for."""
    model = sparse()
    trained(model, tmp_path, steps=1)
    assert not all((count <= 2).all() for count in counts(model, "2:4"))


def test_a_model_that_follows_no_pattern_is_refused(tmp_path):
    with pytest.raises(ValueError, match="pattern: expected one that some layer follows, 2:4 is followed by none"):
        trained(tiny_model().requires_grad_(), tmp_path, callbacks=[KeepMask("2:4")])
    with pytest.raises(ValueError, match="pattern: expected N:M"):
        KeepMask("2:5")


def test_layers_that_are_all_frozen_are_told(tmp_path):
    model = tiny_model()
    mk.convert(model, "2:4")
    with pytest.warns(UserWarning, match="KeepMask: expected layers that train, got 14 frozen ones"):
        trained(mk.finalize(model), tmp_path, steps=1, callbacks=[KeepMask("2:4")])


def test_groups_with_fewer_than_n_keep_n():
    layer = torch.nn.Linear(8, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 5, 0, 0, 1, 2, 0, 0], [0, 0, 0, 0, 0, 0, 3, 4]]))
    kept = KeptZeros(torch.nn.Sequential(layer), "2:4")
    with torch.no_grad():
        layer.weight.fill_(torch.nan)
    kept.restore()
    assert (~layer.weight.isnan()).nonzero().tolist() == [
        [0, 2], [0, 3], [0, 6], [0, 7], [1, 2], [1, 3], [1, 4], [1, 5],
    ]  # fmt: skip


def test_a_checkpoint_of_a_converted_model_has_its_masks(tmp_path):
    """One that the Trainer writes: its model is back with logits and pattern, and the trainer goes on from it."""
    model = tiny_model()
    mk.convert(model, "2:4", gap=2.0)
    whole = trained(model, tmp_path / "whole", steps=4, save_strategy="steps", save_steps=2)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole/checkpoint-4")
    assert_same_bits([x.logits for x in masked_layers(loaded).values()],
                     [x.logits for x in masked_layers(whole.model).values()])  # fmt: skip
    # which the Trainer trains, as it would the model that was saved
    trained(loaded, tmp_path / "again", steps=1)


def test_packed_models_are_fine_tuned(tmp_path):
    model = tiny_model()
    mk.convert(model, "2:4")
    mk.finalize(model, to="packed").save_pretrained(tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").requires_grad_(False)
    before = loaded.get_submodule(LAYER).packed
    values, bitmask = before.values.clone(), before.bitmask.clone()
    for module in loaded.modules():
        if isinstance(module, mk.NMLinear):
            module.values.requires_grad_()
    trained(loaded, tmp_path / "run", steps=3, save_strategy="steps", save_steps=3)
    layer = loaded.get_submodule(LAYER)
    assert (layer.values != values).all() and torch.equal(layer.bitmask, bitmask)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint-3")
    assert_same_bits(again.get_submodule(LAYER).values, layer.values)
